"""What runs leave behind where they end early: pool slots, steps at work."""

import json
import multiprocessing
import signal
import socket
import sqlite3
import threading
import time
from contextlib import suppress

import dagster as dg
import pytest
from dagster._core.storage.tags import GRPC_INFO_TAG
from sqlalchemy.exc import OperationalError

from synpo_assets.cli.runs import (
    FOREGROUND_TAG,
    _ended_from_the_ui,
    _leaving_no_step_behind,
    close_dead_runs,
    run_missing,
)
from tests.stand_ins import services_in

FAILED = OperationalError("SELECT", {}, sqlite3.OperationalError("disk I/O error"))

JOB = dg.Definitions([dg.AssetSpec("anything")]).resolve_implicit_global_asset_job_def()


@pytest.fixture
def instance(tmp_path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 1)
        yield instance


def run_with_the_slot(instance, status, tags=None):
    run = instance.create_run_for_job(JOB, status=status, tags=tags)
    assert instance.event_log_storage.claim_concurrency_slot("gpu", run.run_id, "reward_model").is_claimed
    return run


def claims_after_closing(instance):
    close_dead_runs(instance)
    return instance.event_log_storage.get_concurrency_info("gpu").active_run_ids


@pytest.mark.parametrize("tags", [{FOREGROUND_TAG: "true"}, {}], ids=["in the foreground", "from the UI"])
def test_a_terminated_run_does_not_keep_the_next_one_waiting(instance, tags):
    run_with_the_slot(instance, dg.DagsterRunStatus.CANCELED, tags)
    assert claims_after_closing(instance) == set()


def test_a_killed_foreground_run_is_closed_and_its_slot_is_free(instance):
    killed = run_with_the_slot(instance, dg.DagsterRunStatus.STARTED, {FOREGROUND_TAG: "true"})
    assert claims_after_closing(instance) == set()
    assert instance.get_run_by_id(killed.run_id).status == dg.DagsterRunStatus.FAILURE


def test_a_run_that_the_ui_started_and_that_lives_keeps_its_slot(instance):
    living = run_with_the_slot(instance, dg.DagsterRunStatus.STARTED)
    assert claims_after_closing(instance) == {living.run_id}
    assert instance.get_run_by_id(living.run_id).status == dg.DagsterRunStatus.STARTED


@pytest.mark.parametrize("lives", [True, False])
def test_a_run_of_a_ui_that_ended_is_closed(instance, tmp_path, lives):
    """Its process went with the server that it was started in; no daemon may be at work to see that."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "server"))
        if lives:
            server.listen()
        tags = {GRPC_INFO_TAG: json.dumps({"host": "localhost", "socket": str(tmp_path / "server")})}
        run = run_with_the_slot(instance, dg.DagsterRunStatus.STARTED, tags)
        assert claims_after_closing(instance) == ({run.run_id} if lives else set())
        assert instance.get_run_by_id(run.run_id).is_finished is not lives


def test_the_slot_of_a_run_that_was_deleted_is_free(instance):
    run = run_with_the_slot(instance, dg.DagsterRunStatus.STARTED)
    instance.run_storage.delete_run(run.run_id)
    assert claims_after_closing(instance) == set()


def test_a_run_that_cannot_write_its_history_ends_its_own_steps_alone():
    context = multiprocessing.get_context("fork")
    other = context.Process(target=time.sleep, args=(60,))
    other.start()
    step = context.Process(target=time.sleep, args=(60,))
    with suppress(OperationalError), _leaving_no_step_behind():
        step.start()
        raise FAILED
    assert (step.exitcode, other.is_alive()) == (-signal.SIGKILL, True)
    other.kill()
    other.join()


def test_the_watch_for_the_uis_word_survives_a_history_that_cannot_be_read(monkeypatch):
    """And interrupts the run once it can be read again."""
    monkeypatch.setattr("synpo_assets.cli.runs.CANCELLATION_POLL_SECONDS", 0.01)
    answers, interrupted = iter([FAILED, [], ["a run that is to be canceled"]]), threading.Event()
    monkeypatch.setattr("os.kill", lambda *_: interrupted.set())

    class Instance:
        def get_runs(self, *_, **__):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

    with _ended_from_the_ui(Instance()):
        assert interrupted.wait(10)


@pytest.mark.parametrize(("damaged", "rounds", "succeeds"), [(["keyword_sets"], 2, True), ([], 1, False)])
def test_a_run_that_failed_while_damage_was_mended_begins_once_more(
    instance, tmp_path, monkeypatch, damaged, rounds, succeeds
):
    """The report may have read a table in the moment before it was made again."""
    services, begun = services_in(tmp_path / "home"), []

    def made(instance, services, partition, iterations, mended):
        begun.append(partition)
        mended += damaged if partition and len(begun) == 2 else []
        return partition is None or len(begun) > 2

    monkeypatch.setattr("synpo_assets.cli.runs._run", made)
    monkeypatch.setattr("synpo_assets.cli.runs.damaged_assets", lambda *_: {})
    monkeypatch.setattr("synpo_assets.cli.runs.warn_of_outdated", lambda *_: None)
    assert run_missing(instance, services, 1) == succeeds
    assert begun == [None, "0001"] * rounds
