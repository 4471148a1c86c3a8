"""What every step of a run needs, made once in the process that the steps are forked from."""

# ruff: noqa: E402
import os

from resources.common.processes import end_with_this_parent

# First of all: else it would go on importing for seconds after its run was killed.
end_with_this_parent(int(os.environ["SYNPO_RUN_PROCESS"]))

# Dagster imports the storages when it opens an instance, and pandera its checks when it validates the first table.
import dagster._core.storage.base_storage
import dagster._core.storage.sqlite_storage  # noqa: F401
import pandera.backends.polars.builtin_checks  # noqa: F401

from definitions import defs

# Resolving a job takes about as long as forking a step; a repository keeps those that it has resolved.
defs.get_repository_def().get_all_jobs()
