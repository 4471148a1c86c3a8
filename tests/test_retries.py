"""A step that fails for a while is tried again; one that would fail again is not."""

import dagster as dg
import pytest

from resources.checkpoint_store import CheckpointError
from resources.trainer import TrainingError
from synpo_assets.partitions import ON_GPU


def attempts(error, failures):
    """How often an asset with the arguments of every model step is tried, and whether it succeeds."""
    tried = []
    policy = ON_GPU["retry_policy"]._replace(delay=0.01)

    @dg.asset(**{**ON_GPU, "retry_policy": policy})
    def step() -> None:
        tried.append(1)
        if len(tried) <= failures:
            raise error

    result = dg.materialize([step], raise_on_error=False)
    return len(tried), result.success


def test_a_transient_failure_is_tried_again_with_growing_pauses():
    assert attempts(ConnectionError("the server went away"), failures=2) == (3, True)
    assert ON_GPU["retry_policy"].backoff == dg.Backoff.EXPONENTIAL


def test_tries_are_limited():
    assert attempts(ConnectionError("the server went away"), failures=9) == (3, False)


@pytest.mark.parametrize("error", [TrainingError("diverged"), CheckpointError("altered")])
def test_what_would_fail_again_is_not_tried_again(error):
    assert attempts(error, failures=1) == (1, False)


def test_every_asset_of_the_gpu_pool_is_retried():
    from definitions import defs

    for asset in defs.assets:
        if asset.op.pool == ON_GPU["pool"]:
            assert asset.op.retry_policy == ON_GPU["retry_policy"], asset.key
