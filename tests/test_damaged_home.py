"""Whatever file of a finished home is damaged, a command ends with what it was asked for or with one sentence: `-m slow`."""

import os
import random
import shutil

import polars as pl
import pytest

from synpo_assets.cli import runs
from synpo_assets.cli.healing import damaged_assets
from synpo_assets.graph.missing import missing_assets
from tests.conftest import synpo, synpo_here

CHECKPOINT = "checkpoints/model_checkpoint/0001"
PLACES = (
    "settings.yaml", "dagster.yaml", "last_valid_settings.json", "expected_seconds.json", "run.lock",
    "history/runs.db", "history/runs/index.db", "history/runs/*-*.db", "schedules/schedules.db",
    "tables/preference_pairs/0001.parquet", "tables/preference_pairs/0001.parquet.xxh128",
    "metrics/evaluation/0001.parquet", "settings/evaluation/0001.parquet",
    "shards/*/*.parquet", "shards/*/fingerprint.json", "reports/boosting_report.html",
    f"{CHECKPOINT}.json", "checkpoints/policy/0002.json", f"{CHECKPOINT}/*/manifest.json",
    f"{CHECKPOINT}/*/merged/model.safetensors", f"{CHECKPOINT}/*/trainer_log.jsonl", f"{CHECKPOINT}/*/training_summary.json",
    f"{CHECKPOINT}/*/verified_by_run",
)  # fmt: skip


def become_random_bytes(file):
    # 0xff begins no character.
    file.write_bytes(b"\xff" + random.Random(1).randbytes(file.stat().st_size))


def become_a_directory(file):
    file.unlink()
    (file / "inside").mkdir(parents=True)


def lose_its_end(file):
    os.truncate(file, file.stat().st_size * 2 // 3)


DAMAGES = (become_random_bytes, become_a_directory, lose_its_end, lambda file: os.truncate(file, 0))
# Each place with one of the damages; all of them with all take minutes.
CASES = [(place, DAMAGES[number % len(DAMAGES)]) for number, place in enumerate(PLACES)]
CASES += [("history/runs.db", become_random_bytes), ("shards/*/fingerprint.json", become_random_bytes)]


@pytest.mark.slow
def test_what_a_stage_looks_up_later_in_the_graph_does_not_keep_it_from_being_made_again(nano_run, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(nano_run.home, home, symlinks=True)
    (home / "tables/evaluation/0001.parquet").unlink()
    damaged = [home / place for place in (
        "metrics/gold_comparison/0001.parquet", "metrics/promotion/0002.parquet", "tables/evaluation/0002.parquet",
        "settings/keyword_pool/once.parquet",
    )]  # fmt: skip
    for file in damaged:
        lose_its_end(file)
    result = synpo("run", "--home", home, "--iterations", 2)
    assert result.returncode == 0, result.stderr[-2000:]
    for file in damaged:
        assert pl.read_parquet(file).height


@pytest.mark.parametrize(("place", "damage"), CASES)
def test_a_command_on_a_damaged_home_ends_with_a_sentence(nano_run, tmp_path, monkeypatch, place, damage):
    home = tmp_path / "home"
    shutil.copytree(nano_run.home, home, symlinks=True)

    def look(instance, services, partition, *_):
        missing_assets(instance, services, partition, damaged_assets(instance, services, partition))
        return True

    # What is missing is found, and not made.
    monkeypatch.setattr(runs, "_run", look)
    monkeypatch.setattr("synpo_assets.cli.webserver.serve", lambda *arguments: None)
    damage(sorted(home.glob(place))[0])
    at = ("--home", home)
    for command in (
        ("rows", "preference_pairs", *at), ("trace", "pair-", *at), ("compare", home), ("ui", *at),
        ("export", "--format", "trl", "--output", tmp_path / "pairs.jsonl", "--overwrite", *at),
        ("run", "--iterations", 2, *at), ("clean", "--delete", "--checkpoints", *at),
    ):  # fmt: skip
        result = synpo_here(*command)
        assert result.returncode in (0, 2), (command, result.stderr)
        if result.returncode == 2:
            assert result.stderr.startswith("synpo: "), command
            assert result.stderr.count("\n") == 1, "one sentence, and no traceback"
