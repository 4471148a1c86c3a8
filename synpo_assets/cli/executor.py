"""The process that steps are forked from: it imports the heavy libraries once, and then forks each step in an instant.

Each step is a process of its own, so that the memory of one phase is free again before the next one starts.
"""

import multiprocessing
from multiprocessing import forkserver

import dagster as dg

PRELOADED = [
    "synpo_assets.cli.preload", "dagster._core.executor.multiprocess", "transformers.trainer", "datasets", "peft",
    "transformers.models.auto.modeling_auto", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "trl.experimental.cpo",
    "matplotlib.backends.backend_svg",
]  # fmt: skip
executor = dg.multiprocess_executor.configured({"start_method": {"forkserver": {"preload_modules": PRELOADED}}})


def start_preloading() -> None:
    """Has it import while this process prepares the run; SYNPO_HOME and DAGSTER_HOME must name the home by now."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
