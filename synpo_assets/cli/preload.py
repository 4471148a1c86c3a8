"""What every step of a run needs, made once in the process that the steps are forked from."""

# ruff: noqa: E402
import gc
import os
import signal

from resources.common.processes import CHECKING, RUN_PROCESS, end_with_this_parent

# First of all: else it would go on importing for seconds after its run was killed.
end_with_this_parent(int(os.environ[RUN_PROCESS]))

# An interrupt is for the run to tell of.
interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
# What is imported is no garbage, and to look for some takes a fifth of the time.
gc.disable()

import importlib
import time
from pathlib import Path

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
# A home may only get its settings, which decide the graph, once all that they name was checked.
while (checking := os.environ.get(CHECKING)) and Path(checking).exists():
    time.sleep(0.05)
from dagster._core.storage.event_log import sqlite as events
from dagster._core.storage.runs import sqlite as runs
from dagster._core.storage.schedules import sqlite as schedules
from dagster._core.storage.sql import ScriptDirectory, get_alembic_config

from definitions import defs

# The migrations of the databases that each step opens; the executor keeps what was read.
for storage in (events.sqlite_event_log, runs.sqlite_run_storage, schedules.sqlite_schedule_storage):
    ScriptDirectory.from_config(get_alembic_config(storage.__file__)).get_current_head()
# Resolving a job takes about as long as forking a step; a repository keeps those that it has resolved.
defs.get_repository_def().get_all_jobs()
# What was imported is no garbage: a step need not search it, and so shares its memory with the others.
gc.collect()
gc.freeze()
gc.enable()
signal.signal(signal.SIGINT, interrupted)
