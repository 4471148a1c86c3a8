"""Two whole iterations on the nano model through `synpo run`, then everything that can be asked about them."""

import json
import re
import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from synpo_assets.algorithm import stages_of
from synpo_assets.evaluation.win_rates import COMPARISONS
from synpo_assets.graph.metrics import judge_doubt
from synpo_assets.graph.tables import check
from synpo_assets.method.evaluation import outcome_name
from synpo_assets.method.seed import HELD_OUT
from tests.conftest import synpo_here
from tests.nano import active_settings, nano_settings, write_settings
from tests.stand_ins import services_in

STAGES = [stage for stage in stages_of(active_settings()) if not stage.opt_in and stage.name != "boosting_report"]
TABLES = {stage.name: stage.schema for stage in STAGES if stage.schema}
ONCE = {stage.name for stage in STAGES if stage.once}
CHECKPOINTS = {stage.name for stage in STAGES if stage.checkpoint and not stage.once}


@pytest.fixture(scope="module")
def home(nano_run):
    assert nano_run.result.returncode == 0, nano_run.result.stdout[-3000:] + nano_run.result.stderr[-3000:]
    return nano_run.home


@pytest.fixture(scope="module")
def instance(home):
    with dg.DagsterInstance.from_config(str(home)) as persistent:
        yield persistent


def table(home, name, iteration=None):
    return pl.read_parquet(home / "tables" / (f"{name}/{iteration:04d}.parquet" if iteration else f"{name}.parquet"))


def metadata(instance, asset, partition=None):
    selection = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[partition] if partition else None)
    event = instance.fetch_materializations(selection, limit=1).records[0].asset_materialization
    return {name: entry.value for name, entry in event.metadata.items()} | {"tags": event.tags}


def test_the_summary_shows_what_was_made(nano_run, home):
    printed = nano_run.result.stdout
    for asset in ONCE | (TABLES.keys() - ONCE) | CHECKPOINTS:
        assert asset in printed
    for word in ("chosen", "rejected", "win rate", "M_2", "synpo ui --home"):
        assert word in printed
    # The strongest of the nulls, by name, beside what M_t follows.
    assert re.search(r"instructions; \d+\.\d% by (their own prompts|the first sentences|M_0's answers|M_t's answers)",
                     " ".join(printed.split()))  # fmt: skip


def test_progress_is_in_the_event_log_under_its_asset_and_once_on_the_terminal(nano_run, home, instance):
    terminal = (nano_run.failed.stderr + nano_run.result.stderr).splitlines()
    shown = Counter(tuple(line.split(maxsplit=2)[1:]) for line in terminal if line.endswith(" s left."))
    logs = (instance.all_logs(run.run_id) for run in instance.get_runs())
    said = ((entry.step_key, entry.user_message) for log in logs for entry in log)
    assert shown == Counter((step, line) for step, line in said if line.endswith(" s left."))
    assert {"base_responses", "model_checkpoint", "evaluation"} <= {asset for asset, _ in shown}


def test_the_summary_of_a_copied_home_names_the_model_that_lies_there(home, tmp_path):
    copy = tmp_path / "copied"
    shutil.copytree(home, copy)
    done = synpo_here("run", "--home", copy, "--iterations", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("M_2  "))
    assert Path(line.removeprefix("M_2").strip()).is_relative_to(copy / "checkpoints" / "model_checkpoint" / "0002")


def test_a_failed_asset_is_named_and_the_next_run_does_only_the_rest(nano_run):
    assert nano_run.failed.returncode == 1
    assert "response_improver failed. " in nano_run.failed.stderr
    assert "response_improver.margin_threshold = 1000000000.0, or by rules that it breaks:" in nano_run.failed.stderr
    assert "run the same command again" in nano_run.failed.stderr
    assert "prompt_generator" in nano_run.failed.stderr
    assert "prompt_generator" not in nano_run.result.stderr, "finished work was done again"


def test_every_asset_of_both_iterations_is_materialized(instance):
    for asset in ONCE:
        assert instance.get_latest_materialization_event(dg.AssetKey(asset)), asset
    for asset in (TABLES.keys() - ONCE) | CHECKPOINTS:
        assert {"0001", "0002"} <= instance.get_materialized_partitions(dg.AssetKey(asset)), asset


@pytest.mark.parametrize("name", TABLES)
def test_every_table_obeys_its_schema(home, name):
    for iteration in [None] if name in ONCE else [1, 2]:
        assert check(TABLES[name], table(home, name, iteration)) is None


@pytest.mark.parametrize("iteration", [1, 2])
def test_every_row_of_a_pair_can_be_followed_back(home, instance, iteration):
    pairs, prompts = table(home, "preference_pairs", iteration), table(home, "synthetic_prompts", iteration)
    refined, initial = table(home, "refined_responses", iteration), table(home, "rejected_responses", iteration)
    base, sets = table(home, "base_responses", iteration), table(home, "keyword_sets", iteration)
    chain = (
        pairs.join(refined, left_on="chosen_response_id", right_on="response_id", suffix="_refined", validate="1:1")
        .join(initial, left_on="rejected_response_id", right_on="response_id", suffix="_initial", validate="1:1")
        .join(base, left_on="base_response_id", right_on="response_id", suffix="_base", validate="1:1")
        .join(prompts, on="prompt_id", suffix="_prompt", validate="1:1")
        .join(sets, on="keyword_set_id", suffix="_sets", validate="1:1")
    )
    assert chain.height == pairs.height > 0
    for row in chain.to_dicts():
        assert row["prompt"][0]["content"] == row["prompt_prompt"]
        assert row["chosen"][0]["content"] == row["response"]
        assert row["rejected"][0]["content"] == row["response_initial"]
        assert all(word in row["paragraph"].lower() for word in row["keywords"])
    partition = f"{iteration:04d}"
    m0 = metadata(instance, "initial_policy")["sha"]
    assert pairs["rejected_checkpoint_sha"].unique().to_list() == [m0]
    assert pairs["chosen_checkpoint_sha"].unique().to_list() == [
        metadata(instance, "response_improver", partition)["sha"]
    ]
    entered = metadata(instance, "policy", partition)["sha"]
    assert base["checkpoint_sha"].unique().to_list() == [entered]
    assert entered == (m0 if iteration == 1 else metadata(instance, "model_checkpoint", "0001")["sha"])


def test_the_policy_learns_from_all_pairs_so_far_and_starts_from_m0(home, instance):
    first, second = table(home, "preference_pairs", 1), table(home, "preference_pairs", 2)
    assert table(home, "preference_history", 1).is_empty()
    assert table(home, "preference_history", 2).equals(first)
    about = metadata(instance, "model_checkpoint", "0002")
    by_iteration = [about[f"pairs_of_iteration of {key}"] for key in ("0001", "0002")]
    assert by_iteration == [first.height, second.height]
    assert about["examples"] == first.height + second.height
    manifest = json.loads((home / "checkpoints/model_checkpoint/0002.json").read_text())["directory"]
    manifest = json.loads((home / "checkpoints" / manifest / "manifest.json").read_text())
    assert manifest["parents"]["start"]["sha"] == metadata(instance, "initial_policy")["sha"]
    assert manifest["parents"]["policy"]["sha"] == metadata(instance, "model_checkpoint", "0001")["sha"]


def test_nothing_is_generated_twice(instance):
    assert metadata(instance, "rejected_responses", "0001")["generated_tokens"] == 0
    assert metadata(instance, "rejected_responses", "0002")["generated_tokens"] > 0


def test_iterations_draw_different_keyword_sets(home):
    drawn = [set(table(home, "keyword_sets", iteration)["keyword_set_id"]) for iteration in (1, 2)]
    assert not drawn[0] & drawn[1]


def test_held_out_prompts_are_never_trained_on(home):
    seed = table(home, "seed_pairs")
    held_out = set(seed.filter(pl.col("split").is_in(HELD_OUT))["prompt_id"])
    aside = [set(seed.filter(split=split)["prompt_id"]) for split in ("judge", "scorer")]
    for iteration in (1, 2):
        for read_by_one in aside:
            assert read_by_one
            assert not read_by_one & set(table(home, "seed_responses", iteration)["prompt_id"])
        assert not held_out & set(table(home, "seed_responses", iteration)["prompt_id"])
        assert not held_out & set(table(home, "preference_pairs", iteration)["prompt_id"])
        assert set(table(home, "evaluation", iteration)["prompt_id"]) == held_out


def test_the_improvers_filter_says_beside_its_share_what_it_would_say_of_other_gold(home, instance):
    for iteration in (1, 2):
        filtered, about = (
            table(home, "seed_responses", iteration),
            metadata(instance, "seed_responses", f"{iteration:04d}"),
        )
        for label, column in (("gold", "margin"), ("another_gold", "other_margin")):
            share = (filtered[column] > 0).mean()
            assert about[f"gold_better_share of {label}"] == pytest.approx(share, abs=1e-4)
        assert filtered["margin"].to_list() != filtered["other_margin"].to_list()
        improver = metadata(instance, "response_improver", f"{iteration:04d}")
        assert improver["passing_share of gold"] == 1.0, "the threshold of these settings lets all pass"


def test_the_evaluation_compares_with_m0_and_the_policy_before_by_both_judges(home, instance):
    shas = [metadata(instance, "initial_policy")["sha"]]
    for iteration in (1, 2):
        about, frame = metadata(instance, "evaluation", f"{iteration:04d}"), table(home, "evaluation", iteration)
        shas.append(metadata(instance, "model_checkpoint", f"{iteration:04d}")["sha"])
        wanted = {"candidate": shas[iteration], "previous": shas[iteration - 1], "initial": shas[0]}
        assert {name: frame[f"{name}_checkpoint_sha"].unique().to_list() for name in wanted} == {
            name: [sha] for name, sha in wanted.items()
        }
        frame = frame.filter(split="test")
        rates = {
            tuple(row.data[name] for name in ("judge", "model", "opponent")): row.data
            for row in about["win_rates"].records
        }
        assert rates.keys() == {(judge, *compared) for judge in ("judge", "scorer") for compared in COMPARISONS}
        for (judge, model, over), rate in rates.items():
            judged = frame[outcome_name(judge, model, over)]
            assert rate["wins"] == (judged == "win").sum()
            # Of a judge at chance no rate is shown.
            assert rate["win_rate"] is None or rate["low"] <= rate["win_rate"] <= rate["high"]
        doubt, rate = judge_doubt(services_in(home).metrics), rates["judge", "candidate", "initial"]["win_rate"]
        shown = about["win_rate of candidate over initial by independent judge"]
        assert (rate is None and shown == doubt) if doubt else shown == pytest.approx(rate, abs=1e-4)
        # A tie is half a win.
        by_scorer = ((frame["candidate_score"] - frame["initial_score"]).sign().mean() + 1) / 2
        assert about["win_rate of candidate over initial by scorer (took part in training)"] == pytest.approx(
            by_scorer, abs=1e-4
        )
        assert "scorer (took part in training)" in about["judges"]
    first = table(home, "evaluation", 1)
    assert first["previous_response"].equals(first["initial_response"])


def test_the_judge_is_trained_on_its_own_rows_with_another_seed(home, instance):
    judge, scorer = metadata(instance, "judge_model"), metadata(instance, "reward_model")
    assert judge["sha"] != scorer["sha"]
    assert table(home, "seed_pairs").filter(split="judge").height == 8
    assert judge["examples"] == 16, "as many of its pairs as max_examples lets in"
    name = json.loads((home / "checkpoints/judge_model/once.json").read_text())["directory"]
    assert json.loads((home / "checkpoints" / name / "manifest.json").read_text())["random_seed"] == 43


@pytest.mark.parametrize("asset", ["base_responses", "refined_responses", "synthetic_prompts", "rejected_responses"])
def test_generated_tables_show_tokens_speed_and_checkpoint(instance, asset):
    about = metadata(instance, asset, "0002")
    for name in (
        "rows", "input_tokens", "output_tokens", "generated_tokens_per_second", "generation_seconds", "checkpoint",
        "checkpoint_sha", "sample", "dagster/row_count",
    ):  # fmt: skip
        assert name in about, name


def test_checkpoints_show_their_training(instance):
    about = metadata(instance, "model_checkpoint", "0002")
    for name in (
        "sha",
        "path",
        "examples",
        "trained_tokens",
        "training_steps",
        "training_seconds",
        "final_loss",
        "training_log",
    ):
        assert name in about, name
    assert 0 < len(about["training_log"].records) <= about["training_steps"]


def test_content_versions_are_recorded(home, instance):
    from synpo_assets.graph.presentation import table_version

    tags = metadata(instance, "preference_pairs", "0001")["tags"]
    assert tags["dagster/data_version"] == table_version(table(home, "preference_pairs", 1))
    assert tags["dagster/code_version"]


def test_a_second_run_finds_nothing_to_do(home, instance):
    before = instance.get_runs_count()
    result = synpo_here("run", "--home", home, "--iterations", 2)
    assert result.returncode == 0
    assert instance.get_runs_count() == before


def test_other_settings_are_refused_for_a_home_that_exists(tmp_path, home, nano_model):
    other = write_settings(tmp_path / "other.yaml", nano_settings(nano_model) | {"random_seed": 7})
    result = synpo_here("run", "--settings", other, "--home", home)
    assert result.returncode == 2
    assert "was made with other settings (random_seed: 42 there, 7 asked for)" in result.stderr


def test_no_pool_slot_is_left_behind(home):
    (database,) = (home / "history").rglob("index.db") if (home / "history").exists() else home.rglob("index.db")
    with sqlite3.connect(database) as connection:
        assert connection.execute("select count(*) from concurrency_slots where run_id is not null").fetchone() == (0,)
