"""A step that fails for a while is tried again; one that would fail again is not."""

import dagster as dg
import pytest

from definitions import build
from resources.settings.files import active_settings
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import CheckpointError
from resources.training.trainer import TrainingError
from synpo_assets.graph.stage import GPU_POOL, RETRIES
from tests.conftest import HOME


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


def test_every_asset_is_retried_and_those_that_use_a_model_share_a_pool():
    definitions, _ = build(active_settings(), HOME)
    assets = {asset.key.to_user_string(): asset for asset in definitions.assets if asset.is_executable}
    assert all(asset.op.retry_policy == RETRIES for asset in assets.values())
    without_models = {name for name, asset in assets.items() if asset.op.pool != GPU_POOL}
    assert without_models == {
        "initial_policy", "seed_pairs", "verifiable_instructions", "keyword_pool", "keyword_sets", "policy",
        "preference_history", "promotion", "boosting_report", "published_dataset", "published_model",
    }  # fmt: skip
