"""The gate on real Dagster instances: what is promoted, what is not and why, and what the next iteration says to it."""

import logging
import shutil
from typing import get_args

import dagster as dg
import pytest
import yaml

from resources.common.errors import FinalError
from resources.settings.evaluation import GateMetric
from resources.settings.files import load_settings
from resources.storage.checkpoint_store import CheckpointError, CheckpointStore
from resources.storage.tables import ParquetTables
from synpo_assets.cli.runs import asset_graph
from synpo_assets.evaluation.promotion import gate_figures, promotion
from synpo_assets.evaluation.win_rates import evaluation
from synpo_assets.graph.history import data_version_of, input_version_of, metadata_of
from synpo_assets.graph.missing import asset_names, missing_assets, outdated_assets
from synpo_assets.graph.schemas import Promotion, check
from synpo_assets.stages.loop import promotion_refusal
from tests.conftest import synpo
from tests.nano import write_settings
from tests.test_loop import enter, evaluation_asset, gated, make, model_checkpoint_asset, run
from tests.test_loop import instance as instance
from tests.test_loop import stores as stores

LOOPS = {"mean_repetition policy": 0.4}
DATA_VERSION = "dagster/data_version"
PROMPTS_READ = "dagster/input_data_version/synthetic_prompts"
REFUSED = "model_checkpoint[0001] was not promoted to policy[0002]: "


def judge(instance, stores, **limits):
    """Materializes promotion[0001] under these limits and returns its table and its metadata."""
    result = run([promotion], instance, stores | {"settings": gated(**limits)}, "0001")
    assert result.success
    return result.output_for_node("promotion"), metadata_of(instance, "promotion", "0001")


def test_several_figures_are_judged_and_each_stands_with_its_limits(instance, stores):
    make(instance, stores, figures=LOOPS)
    report(instance, {"instruction_following": {"verifiable_rate policy": 0.25, "verifiable_rate initial": 0.5}})
    table, about = judge(
        instance, stores, minimum={"win_rate_over_initial": 0.55, "verifiable_rate_gain": -0.05},
        maximum={"mean_repetition": 0.2, "win_rate_over_initial": 0.9},
    )  # fmt: skip
    assert check(Promotion, table) is None
    assert table.select("metric", "value", "minimum", "maximum", "passed").rows() == [
        ("win_rate_over_initial", 0.6, 0.55, 0.9, True),
        ("verifiable_rate_gain", -0.25, -0.05, None, False),
        ("mean_repetition", 0.4, None, 0.2, False),
    ]
    reasons = ["verifiable_rate_gain is -0.25, less than -0.05", "mean_repetition is 0.4, more than 0.2"]
    assert table["reason"].to_list() == [None, *reasons]
    assert about["promoted"] is False
    assert about["verdict"] == f"{REFUSED}{'; '.join(reasons)}."


@pytest.mark.parametrize(("before", "after", "limit"), [(0.40, 0.35, "minimum"), (0.1, 0.4, "maximum")])
def test_a_gain_that_is_equal_to_its_limit_passes(instance, stores, before, after, limit):
    """In binary fractions 0.35 - 0.40 is less than -0.05, and 0.4 - 0.1 more than 0.3."""
    make(instance, stores)
    rates = {"verifiable_rate policy": after, "verifiable_rate initial": before}
    report(instance, {"instruction_following": rates})
    table, about = judge(instance, stores, **{limit: {"verifiable_rate_gain": round(after - before, 2)}})
    assert table["reason"].to_list() == [None]
    assert about["promoted"] is True


def test_without_limits_everything_is_promoted_and_the_table_is_empty(instance, stores):
    make(instance, stores, figures=LOOPS)
    table, about = judge(instance, stores)
    assert check(Promotion, table) is None
    assert table.is_empty()
    assert about["verdict"] == "model_checkpoint[0001] was promoted to policy[0002]: the gate has no limits."


def test_what_is_not_promoted_is_not_reported_and_the_next_iteration_says_why(instance, stores):
    stores["settings"] = gated(maximum={"mean_repetition": 0.2})
    result = make(instance, stores, figures=LOOPS)
    assert result.success, "the verdict is data, not a failure"
    warned = [entry.user_message for entry in instance.all_logs(result.run_id) if entry.level == logging.WARNING]
    assert warned == [f"{REFUSED}mean_repetition is 0.4, more than 0.2."]
    assert instance.get_materialized_partitions(dg.AssetKey("policy")) == set()
    with pytest.raises(CheckpointError) as error:
        enter(instance, stores, "0002")
    said = str(error.value)
    assert f"{REFUSED}mean_repetition is 0.4, more than 0.2. Mend the cause" in said
    assert "correct the limits in the section `gate` of the settings and materialize promotion[0001] again" in said
    judge(instance, stores, maximum={"mean_repetition": 0.5})
    made = enter(instance, stores, "0002")
    assert data_version_of(instance, "policy", "0002") == made.sha[:16]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_figure_that_is_missing_does_not_pass(instance, stores, value):
    make(instance, stores, figures={} if value is None else {"mean_repetition policy": value})
    table, about = judge(instance, stores, maximum={"mean_repetition": 0.5, "prompt_similarity_to_seed": 2.0})
    assert check(Promotion, table) is None
    assert about["verdict"] == (
        f"{REFUSED}mean_repetition was not measured; prompt_similarity_to_seed was not measured."
    )


def test_an_evaluation_of_an_older_checkpoint_is_not_judged(instance, stores):
    make(instance, stores)
    judged = metadata_of(instance, "promotion", "0001")
    run(model_checkpoint_asset("M_1 again"), instance, stores, "0001")
    made = stores["checkpoints"].current("model_checkpoint", "0001")
    with pytest.raises(FinalError) as error:
        judge(instance, stores)
    assert f"evaluation[0001] is about {judged['checkpoint_sha'][:16]}" in str(error.value)
    assert f"model_checkpoint[0001] is {made.sha[:16]} by now: materialize evaluation[0001] again" in str(error.value)
    run([evaluation_asset()], instance, stores, "0001")
    assert judge(instance, stores)[1]["checkpoint_sha"] == made.sha
    assert enter(instance, stores, "0002") == made


@pytest.mark.parametrize("asset", ["instruction_following", "gold_comparison"])
def test_another_measurement_of_an_older_checkpoint_is_not_judged(instance, stores, asset):
    """Even with a new evaluation: the gate would judge M_t by the figures of the model before it."""
    make(instance, stores)
    sha = stores["checkpoints"].current("model_checkpoint", "0001").sha
    report(instance, {asset: {"checkpoint_sha": sha}})
    assert judge(instance, stores)[1]["promoted"] is True
    report(instance, {asset: {"checkpoint_sha": "f" * 64}})
    with pytest.raises(FinalError, match=rf"{asset}\[0001\] is about ffff.*: materialize {asset}\[0001\] again"):
        judge(instance, stores)


def test_pairs_that_the_checkpoint_was_not_trained_on_are_not_judged(instance, stores):
    """Else M_t would be promoted for the pairs of a model that does not exist yet."""

    def report_pairs(version, margin):
        event = dg.AssetMaterialization(
            "preference_pairs", partition="0001", metadata={"mean_margin": margin}, tags={DATA_VERSION: version}
        )
        instance.report_runless_asset_event(event)

    report_pairs("old", 0.5)
    make(instance, stores, trained_on={"preference_pairs[0001]": "old"})
    limits = {"minimum": {"mean_margin": 1.0}}
    assert judge(instance, stores, **limits)[1]["promoted"] is False
    report_pairs("new", 2.0)
    with pytest.raises(FinalError) as error:
        judge(instance, stores, **limits)
    assert str(error.value) == (
        "model_checkpoint[0001] was trained on version old of preference_pairs[0001], which has version new by now: "
        "materialize model_checkpoint[0001] and evaluation[0001] again."
    )
    make(instance, stores, text="M_1 again", trained_on={"preference_pairs[0001]": "new"})
    assert judge(instance, stores, **limits)[1]["promoted"] is True


def test_the_diversity_of_prompts_that_were_not_answered_is_not_judged_by(instance, stores):
    make(instance, stores)

    def report_made_from(asset, version):
        event = dg.AssetMaterialization(
            asset, partition="0001", metadata={"mean_similarity synthetic": 0.2}, tags={PROMPTS_READ: version}
        )
        instance.report_runless_asset_event(event)

    for asset in ("base_responses", "prompt_diversity"):
        report_made_from(asset, "old")
    limits = {"maximum": {"prompt_similarity": 0.5}}
    assert judge(instance, stores, **limits)[1]["promoted"] is True
    report_made_from("prompt_diversity", "new")
    with pytest.raises(
        FinalError,
        match=r"another version of synthetic_prompts\[0001\] than base_responses\[0001\] answers: materialize",
    ):
        judge(instance, stores, **limits)
    assert judge(instance, stores)[1]["promoted"] is True, "no limit is about prompts"


def test_versions_are_recorded_by_which_the_gate_knows_its_data(nano_run):
    store = CheckpointStore(str(nano_run.home / "checkpoints"))
    with dg.DagsterInstance.from_config(str(nano_run.home)) as persistent:
        for partition in ("0001", "0002"):
            learned = store.current("model_checkpoint", partition).manifest["trained_on"]
            version = data_version_of(persistent, "preference_pairs", partition)
            assert learned[f"preference_pairs[{partition}]"] == version
            read = [
                input_version_of(persistent, asset, partition, "synthetic_prompts")
                for asset in ("prompt_diversity", "base_responses")
            ]
            assert None not in read
            assert len(set(read)) == 1


def test_without_an_evaluation_there_is_nothing_to_judge(instance, stores):
    make(instance, stores)
    instance.wipe_assets([dg.AssetKey("evaluation")])
    with pytest.raises(FinalError, match=r"materialize evaluation\[0001\] first"):
        judge(instance, stores)


def test_a_checkpoint_made_again_needs_a_new_promotion_unless_it_is_the_same(instance, stores):
    make(instance, stores)
    run(model_checkpoint_asset(), instance, stores, "0001")
    assert enter(instance, stores, "0002").label == "model_checkpoint[0001]"
    run(model_checkpoint_asset("M_1 again"), instance, stores, "0001")
    with pytest.raises(CheckpointError, match=r"by now: materialize evaluation\[0001\] and promotion\[0001\] again"):
        enter(instance, stores, "0002")


def test_without_a_promotion_the_next_iteration_refuses(instance, stores):
    make(instance, stores)
    instance.wipe_assets([promotion.key])
    with pytest.raises(CheckpointError, match=r"promotion\[0001\] was never materialized: run that iteration first"):
        enter(instance, stores, "0002")
    instance.report_runless_asset_event(dg.AssetMaterialization("promotion", partition="0001"))
    with pytest.raises(CheckpointError, match=r"promotion\[0001\] holds no verdict on model_checkpoint\[0001\]"):
        enter(instance, stores, "0002")


def test_an_evaluation_of_a_checkpoint_that_does_not_exist_is_refused(nano_run, instance, stores, tmp_path):
    from definitions import defs

    for folder in ("checkpoints", "tables"):
        shutil.copytree(nano_run.home / folder, tmp_path / folder, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "model_checkpoint" / "0002.json").unlink()
    unused = dict.fromkeys(
        ("language_model", "scorer", "trainer", "embedder", "likelihood", "harness"),
        dg.ResourceDefinition.none_resource(),
    )
    with pytest.raises(
        CheckpointError, match=r"model_checkpoint\[0002\] has no checkpoint in .*: materialize model_checkpoint"
    ):
        run(list(defs.assets), instance, stores | unused, "0002", selection=[evaluation])


FIGURES = {
    "evaluation": {
        "win_rate_over_initial": 0.6, "win_rate_over_initial_low": 0.5, "win_rate_over_previous": 0.4,
        "win_rate_over_initial_by_scorer": 0.9, "held_out_reward policy": 1.5, "held_out_reward initial": 1.0,
        "mean_repetition policy": 0.3, "cut_share policy": 0.7,
    },
    "instruction_following": {"verifiable_rate policy": 0.25, "verifiable_rate initial": 0.5},
    "gold_comparison": {
        "gold_log_likelihood policy": -2.5, "gold_log_likelihood initial": -3.0, "gold_similarity policy": 0.75,
        "gold_similarity initial": 0.5,
    },
    "preference_pairs": {"mean_margin": 2.5, "chosen_to_rejected_length": 1.25, "dagster/row_count": 8},
    "prompt_diversity": {"mean_similarity synthetic": 0.25, "mean_similarity seed": 0.125},
}  # fmt: skip


def report(instance, metadata):
    for asset, about in metadata.items():
        instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition="0001", metadata=about))


def test_every_figure_that_may_be_limited_is_read_from_where_it_is_recorded(instance):
    report(instance, FIGURES)
    figures = gate_figures(instance, "0001")
    assert figures == {
        "win_rate_over_initial": 0.6, "win_rate_over_initial_low": 0.5, "win_rate_over_previous": 0.4,
        "win_rate_over_initial_by_scorer": 0.9, "held_out_reward_gain": 0.5, "verifiable_rate_gain": -0.25,
        "gold_log_likelihood_gain": 0.5, "gold_similarity_gain": 0.25,
        "mean_repetition": 0.3, "cut_share": 0.7, "prompt_similarity": 0.25, "prompt_similarity_to_seed": 2.0,
        "mean_margin": 2.5, "chosen_to_rejected_length": 1.25, "pairs_kept": 8,
    }  # fmt: skip
    assert set(figures) == set(get_args(GateMetric))
    assert set(gate_figures(instance, "0002").values()) == {None}


def test_a_refused_checkpoint_is_judged_again_once_the_limits_were_changed(instance):
    """Else the same command again would refuse for ever, whatever the limits are by now."""
    graph = asset_graph()
    report(instance, {name: {} for name in asset_names(graph, partitioned=True)})

    def judged(promoted, version):
        tags = {"dagster/code_version": version}
        event = dg.AssetMaterialization("promotion", partition="0001", metadata={"promoted": promoted}, tags=tags)
        instance.report_runless_asset_event(event)
        return "promotion" in missing_assets(instance, graph, "0001"), outdated_assets(instance, graph)

    assert judged(False, graph.get(promotion.key).code_version) == (False, [])
    assert judged(False, "other limits") == (True, [])
    assert judged(True, "other limits") == (False, ["promotion[0001]"])


def test_the_summary_of_a_run_says_what_was_promoted(nano_run):
    for iteration in (1, 2):
        sentence = (
            f"model_checkpoint[000{iteration}] was promoted to policy[000{iteration + 1}]: the gate has no limits."
        )
        assert sentence in " ".join(nano_run.result.stdout.split())


@pytest.mark.slow
def test_a_run_stops_after_an_iteration_that_was_not_promoted(nano_run, tmp_path):
    """The real M_2: refused for one figure of two, by `synpo run` too; with other limits it enters iteration 3."""
    home = tmp_path / "home"
    shutil.copytree(nano_run.home, home)
    file = home / "settings.yaml"
    limits = {"minimum": {"win_rate_over_initial_low": 0.0, "pairs_kept": 1000}}
    write_settings(file, yaml.safe_load(file.read_text()) | {"gate": limits})
    resources = {
        "checkpoints": CheckpointStore(str(home / "checkpoints")),
        "tables": ParquetTables(str(home / "tables")),
    }
    with dg.DagsterInstance.from_config(str(home)) as persistent:
        run([promotion], persistent, resources | {"settings": load_settings(file)}, "0002")
        refusal = promotion_refusal(persistent, "0002")
        assert refusal.startswith("model_checkpoint[0002] was not promoted to policy[0003]: pairs_kept is ")
        stopped = synpo("run", "--home", home, "--iterations", 3)
        assert stopped.returncode == 1
        assert refusal in " ".join(stopped.stderr.split()), stopped.stderr[-3000:]
        assert not (home / "tables" / "keyword_sets" / "0003.parquet").exists()
        run([promotion], persistent, resources | {"settings": gated(minimum={"pairs_kept": 1})}, "0002")
        assert promotion_refusal(persistent, "0002") is None
        assert data_version_of(persistent, "policy", "0003") == metadata_of(persistent, "policy", "0003")["sha"][:16]
