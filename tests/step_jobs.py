"""Jobs for the tests of the executor, in a module of their own: each step imports it anew, and no more than it needs."""

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import dagster as dg

from synpo_assets.cli import executor


@dg.asset
def endless(_: dg.AssetExecutionContext) -> None:
    Path(os.environ["STEP"]).write_text(str(os.getpid()))
    time.sleep(60)


def endless_job():
    job = dg.define_asset_job("endless_job", dg.AssetSelection.all())
    return dg.Definitions(assets=[endless], jobs=[job], executor=executor.executor).resolve_job_def("endless_job")


def run_endless_job():
    """What a run does: in a process of its own, which takes an interrupt as Dagster's server does."""
    executor.ENDS_WITHIN_SECONDS, executor.PRELOADED = 1.0, []
    with dg.DagsterInstance.local_temp(os.environ["HOME_OF_RUN"]) as instance:
        dg.execute_job(dg.reconstructable(endless_job), instance)


@dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
def killed_late(late: dg.ResourceParam[object]) -> None:
    pass


@dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
def fails_twice(late: dg.ResourceParam[object]) -> None:
    raise RuntimeError


@dg.asset(deps=[killed_late])
def after_it() -> None:
    time.sleep(3)


@dg.resource
@contextlib.contextmanager
def late(_):
    """Ends the process of the step that used it, once the step has said how it ended."""
    yield
    if multiprocessing.parent_process():
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)


def job_killed_late():
    job = dg.define_asset_job("late_job", dg.AssetSelection.all())
    assets = dg.Definitions(
        assets=[killed_late, fails_twice, after_it], jobs=[job], resources={"late": late}, executor=executor.executor
    )
    return assets.resolve_job_def("late_job")


def of_the_pool(name):
    @dg.asset(name=name, pool="gpu", op_tags={"synpo/pool": "true"})
    def made() -> None:
        time.sleep(0.2)

    return made


def job_of_the_pool():
    assets = [of_the_pool(name) for name in ("one", "another", "a_third")]
    job = dg.define_asset_job("pool_job", dg.AssetSelection.all())
    return dg.Definitions(assets=assets, jobs=[job], executor=executor.executor).resolve_job_def("pool_job")
