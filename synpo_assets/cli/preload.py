"""What every step of a run needs, made once in the process that the steps are forked from."""

# ruff: noqa: E402
import os

from resources.common.processes import end_with_this_parent

# First of all: else it would go on importing for seconds after its run was killed.
end_with_this_parent(int(os.environ["SYNPO_RUN_PROCESS"]))

import gc
import importlib

from definitions import defs

MODULES = (
    "dagster._core.executor.multiprocess", "transformers.trainer", "datasets", "peft",
    "transformers.models.auto.modeling_auto", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "trl.experimental.cpo",
    "matplotlib.backends.backend_svg",
    # Dagster imports the storages when it opens an instance, and pandera its checks when it validates the first table.
    "dagster._core.storage.base_storage", "dagster._core.storage.sqlite_storage", "pandera.backends.polars.builtin_checks",
)  # fmt: skip
for module in MODULES:
    importlib.import_module(module)
# Transformers compiles how the weights of all its models are renamed when the first is loaded.
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")
# Resolving a job takes about as long as forking a step; a repository keeps those that it has resolved.
defs.get_repository_def().get_all_jobs()
# What was imported is no garbage: a step need not search it, and so shares its memory with the others.
gc.collect()
gc.freeze()
