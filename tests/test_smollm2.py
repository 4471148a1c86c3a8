"""One iteration on the real SmolLM2-135M, as small as it gets: `pytest -n 0 -m slow`."""

import polars as pl
import pytest
import yaml

from tests.conftest import synpo

pytestmark = pytest.mark.slow


def test_one_iteration_on_a_real_language_model(tmp_path):
    few = {"max_examples": 16, "epochs": 1}
    settings = {
        "preset": "laptop",
        "seed_data": {"train_limit": 40, "judge_limit": 16, "scorer_limit": 16, "held_out_limit": 4},
        # Below about twenty steps the generator does not learn the output format, and no prompt is valid.
        "prompt_generator": {
            "prompts_per_iteration": 8,
            "max_overdraw": 6,
            "training": {"batch_size": 4, "micro_batch_size": 4, "epochs": 2, "max_examples": 40},
        },
        "response_improver": {"margin_threshold": -100, "training": few},
        "scorer": {"training": few},
        "preferences": {"margin_threshold": -100, "pairs_per_iteration": 4},
        "preference_optimization": {
            "training": {"learning_rate": 1e-3, "batch_size": 2, "micro_batch_size": 2, "epochs": 2}
        },
    }
    file, home = tmp_path / "small.yaml", tmp_path / "home"
    file.write_text(yaml.safe_dump(settings))
    result = synpo("run", "--settings", file, "--home", home, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    pairs = pl.read_parquet(home / "tables/preference_pairs/0001.parquet")
    assert 0 < pairs.height <= 4
    for pair in pairs.to_dicts():
        assert pair["chosen"][0]["content"] != pair["rejected"][0]["content"]
    evaluation = pl.read_parquet(home / "tables/evaluation/0001.parquet")
    assert evaluation.height == 4
    assert (evaluation["candidate_response"] != evaluation["initial_response"]).any(), "training changed nothing"
    assert (home / "checkpoints/model_checkpoint/0001.json").exists()
