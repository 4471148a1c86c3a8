"""The process that steps are forked from: it imports the heavy libraries once, and then forks each step in an instant.

Each step is a process of its own, so that the memory of one phase is free again before the next one starts.
"""

import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

import dagster as dg
from alembic.script import ScriptDirectory
from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.step import ExecutionStep
from dagster._core.execution.retries import RetryMode
from dagster._core.executor import multiprocess
from dagster._core.executor.child_process_executor import ChildProcessCrashException

from resources.common.processes import CHECKING, RUN_PROCESS, ended_after_interrupt

# Progress bars fill the logs of the UI; assets log count, rate and time left instead.
os.environ["TQDM_DISABLE"] = "1"
# Threads that wait for each other by spinning make a step several times slower as soon as another program needs a core, and those
# that sleep at once are slower alone. So they spin for a moment first (tests/benchmarks/waiting.py).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# SimPO lives in trl.experimental, which is why trl is pinned exactly.
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
# What is left in shared memory by a killed step, or by a run that had to end at once, is removed. Python need not say so, after the
# last sentence of the run.
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
# The process that steps are forked from takes seconds to import: it has to notice that its run has ended before that.
os.environ[RUN_PROCESS] = str(os.getpid())

PRELOADED = ["synpo_assets.cli.preload"]
# Of a run, after it was told to stop: longer than its steps are given, and than a server takes to end.
ENDS_WITHIN_SECONDS = 30.0
# Between two looks of a run that has nothing at work.
LOOKS_AGAIN_SECONDS = 0.1


class PatientExecution(ActiveExecution):
    """Dagster's own, which sleeps while nothing is at work and nothing may start.

    The loop of its executor asks again at once. A run that waits for what holds the pool, or to try a step again, would take
    a whole core meanwhile.
    """

    def get_steps_to_execute(self, limit: int | None = None) -> Sequence[ExecutionStep]:
        """The steps that may start now."""
        steps = super().get_steps_to_execute(limit)
        if not (steps or self._in_flight):
            time.sleep(LOOKS_AGAIN_SECONDS)
        return steps


step_of_dagster = multiprocess.execute_step_out_of_process


def finished_or_failed_step(*arguments: Any) -> Iterator[dg.DagsterEvent | None]:
    """Dagster's own, for which a step that has said how it ended does not end again if its process is killed after that.

    Dagster would not find it at work any more, and end the whole run.
    """
    has_ended = False
    try:
        for event in step_of_dagster(*arguments):
            has_ended = has_ended or (
                event is not None and (event.is_step_success or event.is_step_failure or event.is_step_up_for_retry)
            )
            yield event
    except ChildProcessCrashException:
        if not has_ended:
            raise


# Dagster reads its migrations, some fifty files, anew whenever it opens a database, and each step opens several.
ScriptDirectory.from_config = functools.cache(ScriptDirectory.from_config)  # type: ignore[method-assign]
# The executor finds both by these names, and takes no others.
multiprocess.ActiveExecution = PatientExecution  # type: ignore[misc]
multiprocess.execute_step_out_of_process = finished_or_failed_step  # type: ignore[assignment]


class BoundedExecutor(multiprocess.MultiprocessExecutor):
    """Dagster's own, in a process that ends soon after it was told to.

    Dagster tells a step to stop by setting an event, which returns once the step has heard: never, if it was killed meanwhile.
    """

    def execute(self, *arguments: Any) -> Iterator[dg.DagsterEvent]:
        """Runs the steps of a plan, each in a process of its own."""
        with ended_after_interrupt(ENDS_WITHIN_SECONDS):
            yield from super().execute(*arguments)


@dg.executor(config_schema={}, requirements=dg.multiple_process_executor_requirements())
def executor(context: dg.InitExecutorContext) -> BoundedExecutor:
    """Steps are forked from a process that has imported the heavy libraries, and those of the pool wait for each other.

    The pool alone would do, but whoever finds it full asks again after up to 15 seconds.
    """
    from synpo_assets.graph.stage import GPU_POOL, GPU_TAG

    events = context.instance.event_log_storage
    limits = {pool.name: pool.limit for pool in events.get_pool_limits()}
    limit = limits.get(GPU_POOL, events.get_pool_config().default_pool_limit)
    return BoundedExecutor(
        RetryMode.ENABLED,
        max_concurrent=None,
        tag_concurrency_limits=[{"key": GPU_TAG, "limit": limit}] if limit else [],
        start_method="forkserver",
        explicit_forkserver_preload=PRELOADED,
    )


def start_preloading(home: Path) -> IO[bytes]:
    """Has it import while this process checks and prepares the run; the graph only once the returned file is closed."""
    checking = tempfile.NamedTemporaryFile(prefix="synpo-checking-")  # noqa: SIM115
    os.environ |= {"SYNPO_HOME": str(home), "DAGSTER_HOME": str(home), CHECKING: checking.name}
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    return checking
