"""Materializing what is missing, in order, in the foreground."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dagster as dg
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from dagster._core.events import RunFailureReason
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._core.storage.runs import SqliteRunStorage
from dagster._core.storage.tags import GRPC_INFO_TAG, PARTITION_NAME_TAG
from dagster._utils.error import SerializableErrorInfo
from sqlalchemy.exc import SQLAlchemyError

from resources.common.errors import DISK_IS_FULL, FinalError, full_disk
from resources.common.text import asset_label, visible
from resources.settings.sections import SettingsError
from resources.storage.files import remove_abandoned
from synpo_assets.cli.automation import ALL_ASSETS_JOB
from synpo_assets.cli.healing import damaged_assets
from synpo_assets.cli.home import ONLY_OWNER_ENTERS
from synpo_assets.cli.terminal import KILLED, first_cause, reason_of
from synpo_assets.graph.budget import SPENT, budget_refusal
from synpo_assets.graph.missing import CONTROL, MADE, VERDICTS, missing_assets, missing_checks, outdated_assets
from synpo_assets.graph.outlook import ITERATIONS_TAG
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.services import Services

FOREGROUND_TAG = "synpo/foreground"
CANCELLATION_POLL_SECONDS = 2.0
# What is damaged may only be seen when it is used, and again when what was made of it is.
ROUNDS = 3


def asset_job() -> dg.JobDefinition:
    """The job of all assets, in a form that each process of a run can load."""
    from definitions import defs

    return defs.resolve_job_def(ALL_ASSETS_JOB)


@contextmanager
def locked(home: Path, name: str = "run") -> Iterator[None]:
    """Holds the home, which is made if need be, for this process; the lock goes with the process, however it ends."""
    # What a model wrote is nobody else's, and settings may hold the address of a database.
    home.mkdir(mode=ONLY_OWNER_ENTERS, parents=True, exist_ok=True)
    with (home / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"Another `synpo {name}` is at work in {home}: wait until it ends, or stop it."
            ) from None
        yield


def run_missing(instance: DagsterInstance, services: Services, iterations: int) -> bool:
    """Materializes the assets made once, then iterations 1 to N, wherever something is missing.

    Returns whether all of it is materialized now. It stops at the first iteration that fails; if damage was found meanwhile, it
    begins once more.

    Raises:
        KeyboardInterrupt: The run was interrupted, or terminated in the UI.
    """
    close_dead_runs(instance)
    remove_abandoned(services.home, "**/.*.tmp")
    warn_of_outdated(instance, services)
    partitions = [None, *(partition_key(number) for number in range(1, iterations + 1))]
    for _ in range(ROUNDS):
        mended = list[str]()
        if all(_run(instance, services, partition, iterations, mended) for partition in partitions):
            return True
        # Stages look up what others measured, also later in the iteration, and in later iterations.
        set_aside = [store.set_damaged_aside() for store in (services.tables, services.metrics, services.used_settings)]
        # What failed may have read what was made again beside it.
        if not (
            mended or any(set_aside) or any(damaged_assets(instance, services, partition) for partition in partitions)
        ):
            break
    return False


def warn_of_outdated(instance: DagsterInstance, services: Services) -> None:
    """Names the assets that were made with other settings or code: they are kept, and renewing them is a choice."""
    if outdated := outdated_assets(instance, services):
        logging.getLogger("synpo").warning(
            "Made by other code or with other settings, and kept: %s. Materialize them again in `synpo ui` to renew them; what "
            "follows from them is then marked as stale there.",
            ", ".join(outdated),
        )


def close_dead_runs(instance: DagsterInstance) -> None:
    """Marks runs that were killed as failed, and gives back the pool slots that ended runs still hold.

    A run that was killed or terminated may have claimed a slot for a step that never reported its end. The daemon
    frees such slots where it runs; without one, the next run would wait for them forever.

    To be called while holding the lock of the home: then no unfinished foreground run can be alive.
    """
    for run in instance.get_runs(RunsFilter(statuses=NOT_FINISHED_STATUSES)):
        if FOREGROUND_TAG in run.tags or _was_in_the_ui_that_ended(instance, run):
            instance.report_run_failed(run, "The process of this run was killed. Finished work is kept.")
    for run_id in instance.event_log_storage.get_concurrency_run_ids():
        holder = instance.get_run_by_id(run_id)
        if holder is None or holder.is_finished:
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def _was_in_the_ui_that_ended(instance: DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether the server that the UI had start this run is gone, and the run with it.

    A history that machines share tells of servers of which nothing can be seen from here.
    """
    if GRPC_INFO_TAG not in run.tags or not isinstance(instance.run_storage, SqliteRunStorage):
        return False
    server = json.loads(run.tags[GRPC_INFO_TAG])
    family, address = (
        (socket.AF_UNIX, server["socket"])
        if server.get("socket")
        else (socket.AF_INET, (server["host"], server["port"]))
    )
    with socket.socket(family) as connection:
        return connection.connect_ex(address) in (errno.ENOENT, errno.ECONNREFUSED)


def _run(
    instance: DagsterInstance, services: Services, partition: str | None, iterations: int, mended: list[str]
) -> bool:
    """Materializes what is missing of an iteration; `mended` is told of what was damaged. Whether all of it is there now."""
    damaged = damaged_assets(instance, services, partition)
    mended += damaged
    for name, problem in damaged.items():
        logging.getLogger("synpo").warning("%s is made again. %s.", asset_label(name, partition), problem)
    names = missing_assets(instance, services, partition, damaged)
    checks = missing_checks(instance, services, partition, names)
    if not (names or checks):
        return True
    if spent := budget_refusal(instance, services):
        raise FinalError(spent)
    tags = {FOREGROUND_TAG: "true", ITERATIONS_TAG: str(iterations)}
    if partition is not None:
        tags |= {PARTITION_NAME_TAG: partition}
    with (
        _ended_from_the_ui(instance),
        _leaving_no_step_behind(),
        dg.execute_job(
            dg.reconstructable(asset_job).get_subset(
                asset_selection=frozenset(map(dg.AssetKey, names)), asset_check_selection=frozenset(checks)
            ),
            instance=instance,
            tags=tags,
            run_config={"loggers": {"console": {}}},
        ) as result,
    ):
        told = [_is_told(instance, services, event) for event in result.all_events]
        if any(_ended_early(event) for event in result.all_events):
            raise KeyboardInterrupt
        if not (result.success or any(told)):
            logging.getLogger("synpo").error("The run ended before its steps could say why. %s", KILLED)
        succeeded = result.success
    # Only now is it known whether the verdicts of this iteration are others than its pairs were made with, and whether other
    # weights came of an M_t or a control that was made again, so that what was measured of the earlier ones is missing.
    return succeeded and (
        {VERDICTS, MADE, CONTROL}.isdisjoint(names) or _run(instance, services, partition, iterations, mended)
    )


def _is_told(instance: DagsterInstance, services: Services, event: dg.DagsterEvent) -> bool:
    """Says why a step or a check failed; whether an event tells of either.

    Raises:
        FinalError: The disk is full or the budget is spent, so that nothing more can be made.
    """
    if event.is_step_failure and not _is_interrupt(event.step_failure_data.error):
        sentence = failure_sentence(event)
        if (reason := full_disk(sentence)) is not None:
            raise FinalError(DISK_IS_FULL.format(reason))
        if SPENT in sentence and (spent := budget_refusal(instance, services)):
            raise FinalError(spent)
        logging.getLogger("synpo").error(sentence)
        return True
    if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        evaluation = event.asset_check_evaluation_data
        if not evaluation.passed:
            logging.getLogger("synpo").warning(check_sentence(evaluation))
            return True
    return False


def _ended_early(event: dg.DagsterEvent) -> bool:
    """Whether an event says that the run ended because it was told to: Dagster then raises nothing."""
    if event.event_type == dg.DagsterEventType.RUN_FAILURE:
        return event.job_failure_data.failure_reason == RunFailureReason.UNEXPECTED_TERMINATION
    return event.event_type == dg.DagsterEventType.RUN_CANCELED


def _is_interrupt(error: SerializableErrorInfo | None) -> bool:
    return error is not None and error.cls_name in ("DagsterExecutionInterruptedError", "KeyboardInterrupt")


@contextmanager
def _ended_from_the_ui(instance: DagsterInstance) -> Iterator[None]:
    """Interrupts this process when its run is terminated in the UI, as Dagster does for runs that it started itself."""
    done = threading.Event()
    terminated = RunsFilter(statuses=[DagsterRunStatus.CANCELING], tags={FOREGROUND_TAG: "true"})

    def watch() -> None:
        while not done.wait(CANCELLATION_POLL_SECONDS):
            # What is wrong with a history that cannot be read is said by the run itself.
            with suppress(SQLAlchemyError):
                if instance.get_runs(terminated, limit=1):
                    os.kill(os.getpid(), signal.SIGINT)
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _leaving_no_step_behind() -> Iterator[None]:
    """Ends the steps that the executor leaves at work where it cannot write to the history."""
    others = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for step in set(multiprocessing.active_children()) - others:
            step.kill()
            step.join()


def failure_sentence(event: dg.DagsterEvent) -> str:
    """Which asset failed, the error that ended it, and where in the code.

    The process of a failed step may end before its last words reach the terminal, so they are read from its event.
    """
    error = first_cause(event.step_failure_data.error)
    reason = reason_of(error)
    place = f"\n  {error.stack[-1].strip().splitlines()[0]}" if error and error.stack and reason != KILLED else ""
    return visible(f"{event.step_key} failed. {reason}{place}")


def check_sentence(evaluation: dg.AssetCheckEvaluation) -> str:
    """Which check of which asset and iteration did not pass, and its figures."""
    where = asset_label(evaluation.asset_key.to_user_string(), evaluation.partition)
    figures = ", ".join(f"{name} {_rounded(entry.value)}" for name, entry in evaluation.metadata.items())
    outcome = "failed, and what follows it is not made" if evaluation.blocking else "did not pass"
    return f"The check {evaluation.check_name} of {where} {outcome}: {figures}."


def _rounded(value: object) -> object:
    return round(value, 3) if isinstance(value, float) else value
