"""What every step of a run needs, made once in the process that the steps are forked from."""

# Dagster imports these when it opens an instance, which each step does.
import dagster._core.storage.base_storage
import dagster._core.storage.sqlite_storage  # noqa: F401

from definitions import defs

# Resolving a job takes about as long as forking a step; a repository keeps those that it has resolved.
defs.get_repository_def().get_all_jobs()
