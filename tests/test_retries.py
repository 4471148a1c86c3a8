"""A step that fails for a while is tried again; one that would fail again is not."""

import dagster as dg
import pytest
from dagster._utils.error import SerializableErrorInfo

from definitions import build
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import CheckpointError
from resources.training.trainer import TrainingError
from synpo_assets.cli.terminal import KILLED, reason_of, terminal_logger
from synpo_assets.graph.stage import GPU_POOL, RETRIES
from tests.conftest import HOME
from tests.nano import active_settings


def attempts(error, failures):
    """How often an asset with the retries of ours is tried, and whether it succeeds."""
    tried = []

    @dg.asset(retry_policy=RETRIES._replace(delay=0.01))
    def step() -> None:
        tried.append(1)
        if len(tried) <= failures:
            raise error

    result = dg.materialize([step], raise_on_error=False)
    return len(tried), result.success


def test_a_transient_failure_is_tried_again_with_growing_pauses():
    assert attempts(ConnectionError("the server went away"), failures=2) == (3, True)
    assert RETRIES.backoff == dg.Backoff.EXPONENTIAL


def test_tries_are_limited():
    assert attempts(ConnectionError("the server went away"), failures=9) == (3, False)


@pytest.mark.parametrize("error", [TrainingError("diverged"), CheckpointError("altered"), SettingsError("wrong")])
def test_what_would_fail_again_is_not_tried_again(error):
    assert attempts(error, failures=1) == (1, False)


def printed(capfd, body):
    """What a run prints of an asset with this body, which is tried twice."""

    @dg.asset(retry_policy=RETRIES._replace(max_retries=1, delay=1))
    def step(context) -> None:
        body(context)

    everything = dg.Definitions([step], jobs=[dg.define_asset_job("all")], loggers={"console": terminal_logger})
    everything.resolve_job_def("all").execute_in_process(run_config={"loggers": {"console": {}}}, raise_on_error=False)
    return [line.split("  ", 1)[1].strip() for line in capfd.readouterr().err.splitlines()]


def test_a_try_that_failed_is_told_at_once_with_its_reason(capfd):
    def unlucky(context):
        context.log.info("at work")
        context.log.debug("not for people")
        raise ConnectionError("the server went away")

    told = "WARNING: It failed, and is tried again in 1 s. ConnectionError: the server went away"
    assert [line.split(maxsplit=1)[1] for line in printed(capfd, unlucky)] == ["at work", told, "at work"]


def test_a_killed_process_is_told_in_words():
    def error(name, cause=None):
        return SerializableErrorInfo(f"dagster.{name}: it is gone", ["a place"], name, cause)

    assert reason_of(error("DagsterExecutionStepExecutionError", error("ChildProcessCrashException"))) == KILLED
    assert reason_of(error("ValueError")) == "ValueError: it is gone"
    assert reason_of(None) == "No reason was recorded."


def test_every_asset_is_retried_and_those_that_use_a_model_share_a_pool():
    definitions, _ = build(active_settings(), HOME)
    assets = {asset.key.to_user_string(): asset for asset in definitions.assets if asset.is_executable}
    assert all(asset.op.retry_policy == RETRIES for asset in assets.values())
    without_models = {name for name, asset in assets.items() if asset.op.pool != GPU_POOL}
    assert without_models == {
        "initial_policy", "seed_pairs", "verifiable_instructions", "keyword_pool", "keyword_sets", "policy",
        "preference_history", "promotion", "boosting_report", "published_dataset", "published_model",
    }  # fmt: skip
