"""The process that steps are forked from: it imports the heavy libraries once, and then forks each step in an instant.

Each step is a process of its own, so that the memory of one phase is free again before the next one starts.
"""

import multiprocessing
import os
from multiprocessing import forkserver

import dagster as dg

# Progress bars fill the logs of the UI; assets log count, rate and time left instead.
os.environ["TQDM_DISABLE"] = "1"
# Threads that wait for each other by spinning make a step several times slower as soon as another program needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# SimPO lives in trl.experimental, which is why trl is pinned exactly.
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
# The process that steps are forked from takes seconds to import: it has to notice that its run has ended before that.
os.environ["SYNPO_RUN_PROCESS"] = str(os.getpid())

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
