"""Without an improver: the best and the worst of several answers, and a graph that trains no model for it."""

import dataclasses
import json
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from definitions import build
from resources.common.errors import FinalError
from resources.scoring.scorer import Comparison, ScoringUsage
from resources.settings.files import load_settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from synpo_assets.cli.estimate import CHAT_TOKENS, TOKENS_PER_WORD, expected_work, sizes_of
from synpo_assets.cli.preflight import disk_needed
from synpo_assets.graph.metrics import SCHEMA, Metrics, recorded
from synpo_assets.graph.missing import asset_names
from synpo_assets.graph.schemas import PreferencePairs, RefinedResponses, Responses
from synpo_assets.graph.stage import MADE_FROM
from synpo_assets.graph.tables import check
from synpo_assets.method.ids import content_id
from synpo_assets.method.ranking import beside_first, repeated_prompts, with_ranks
from synpo_assets.publishing.cards import CardData, dataset_card
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.stages.preferences import preference_pairs
from synpo_assets.stages.ranked_samples import chosen_responses, rejected_responses
from synpo_assets.stages.responses import base_responses
from tests.conftest import synpo
from tests.nano import active_settings, nano_settings, seed_rows, write_settings
from tests.stand_ins import ITERATIONS, run, services_in, shown, without_rules
from tests.test_loop import pairs as some_pairs

ASKED = [row["prompt"] for row in seed_rows()[:3]]
RANKED = {"chosen_from": "ranked_samples", "ranked_samples": 3}


def ranked_settings(folder, nano_model, **changes):
    """A settings file of the nano model with ranked samples."""
    settings = nano_settings(nano_model)
    settings["preferences"] |= RANKED
    return write_settings(folder / "settings.yaml", settings | changes)


# The ranking.


MARGIN = st.integers(-3, 3).map(float)


@settings(deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda further: st.lists(st.lists(MARGIN, min_size=further, max_size=further), min_size=1)
    )
)
def test_the_best_and_the_worst_are_two_answers_with_the_extreme_margins(margins):
    """The margins of each prompt's further answers over its first one."""
    samples = len(margins[0]) + 1
    prompts = pl.DataFrame({"prompt_id": [f"prompt-{number}" for number in range(len(margins))]})
    repeated = repeated_prompts(prompts, samples)
    repeated = repeated.with_columns(finish_reason=pl.lit("stop"))
    ranked = with_ranks(repeated, pl.Series([margin for own in margins for margin in own]))
    assert ranked.select("prompt_id", "sample").rows() == repeated.select("prompt_id", "sample").rows()
    for prompt_id, further in zip(prompts["prompt_id"], margins, strict=True):
        own, rows = [0.0, *further], ranked.filter(prompt_id=prompt_id)
        assert sorted(rows["rank"]) == list(range(1, samples + 1))
        best, worst = (rows.row(by_predicate=pl.col("rank") == rank, named=True) for rank in (1, samples))
        assert (best["margin_over_first"], worst["margin_over_first"]) == (max(own), min(own))
        assert best["sample"] == own.index(max(own)) + 1
        assert best["sample"] != worst["sample"]


def test_every_further_answer_is_compared_with_the_first_of_its_prompt():
    answered = repeated_prompts(pl.DataFrame({"prompt_id": ["a", "b"], "prompt": ["A?", "B?"]}), 3)
    answered = without_rules(answered.with_columns(response=pl.Series(["a1", "a2", "a3", "b1", "b2", "b3"])))
    expected = [("A?", "a2", "a1"), ("A?", "a3", "a1"), ("B?", "b2", "b1"), ("B?", "b3", "b1")]
    assert beside_first(answered).select("prompt", "first", "second").rows() == expected


# The assets.


class PrefersLong:
    """Stands in for the scorer; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def compare(self, model, rows):
        self.asked.append(list(rows))
        first, second = (pl.Series([float(len(row[place])) for row in self.asked[-1]]) for place in (1, 2))
        return Comparison(first, second, "reward_difference", ScoringUsage(1, 0, 1, 0, 0, 1.0))


def stand_in_checkpoint(name, weights, partitions=None):
    @dg.asset(name=name, partitions_def=partitions, io_manager_key="checkpoints")
    def made(context: dg.AssetExecutionContext, checkpoints: dg.ResourceParam[CheckpointStore]) -> Checkpoint:
        return checkpoints.adopt(context, Path(weights), {"source": "directory"})

    return made


@dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
def synthetic_prompts() -> pl.DataFrame:
    return without_rules(pl.DataFrame({"prompt_id": [content_id("prompt", text) for text in ASKED], "prompt": ASKED}))


@dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
def preference_history() -> pl.DataFrame:
    return pl.DataFrame(schema={name: c.dtype.type for name, c in PreferencePairs.to_schema().columns.items()})


@pytest.fixture
def iteration(tmp_path, nano_checkpoint):
    """Makes the pairs of an iteration from ranked samples; returns tables, metrics, what the UI shows, and the scorer."""
    shared = active_settings()
    ranked = {"preferences": shared.preferences.model_copy(update={**RANKED, "margin_threshold": 0.0})}
    models = [stand_in_checkpoint("reward_model", nano_checkpoint.weights),
              stand_in_checkpoint("policy", nano_checkpoint.weights, ITERATIONS)]  # fmt: skip
    stages = [base_responses, chosen_responses, rejected_responses, preference_pairs]

    def iteration(**updates):
        scorer = PrefersLong()
        services = services_in(tmp_path, shared.model_copy(update=ranked | updates))
        services = dataclasses.replace(services, scorer=scorer)
        with dg.DagsterInstance.ephemeral() as instance:
            result = run([*models, synthetic_prompts, preference_history, *stages], instance, services, "0001")
            about = {stage.name: shown(instance, stage.name, "0001") for stage in stages}
        tables = {stage.name: result.output_for_node(stage.name) for stage in stages}
        return tables, recorded(services.metrics, "0001"), about, scorer

    return iteration


def test_the_pairs_are_the_best_over_the_worst_of_the_policys_own_answers(iteration):
    tables, _, about, scorer = iteration()
    base, best, worst, pairs = tables.values()
    for schema, frame in ((RefinedResponses, best), (Responses, worst), (PreferencePairs, pairs)):
        assert check(schema, frame) is None
    assert base["prompt_id"].to_list() == best["prompt_id"].to_list() == worst["prompt_id"].to_list()
    assert best["base_response_id"].to_list() == base["response_id"].to_list()
    assert {len(rows) for rows in scorer.asked[:2]} == {2 * len(ASKED)}
    for prompt, first, longest, shortest in zip(
        ASKED, base["response"], best["response"], worst["response"], strict=True
    ):
        samples = [first, *(answer for asked, answer, beside in scorer.asked[0] if asked == prompt and beside == first)]
        assert len(samples) == 3
        assert (longest, shortest) == (max(samples, key=len), min(reversed(samples), key=len))
    both = zip(best["response"], worst["response"], strict=True)
    assert pairs.height == sum(len(longest) > len(shortest) for longest, shortest in both) > 0
    assert about["chosen_responses"]["checkpoint"] == about["rejected_responses"]["checkpoint"] == "policy"
    assert pairs["chosen_checkpoint_sha"].unique().to_list() == [about["base_responses"]["checkpoint_sha"]]


def test_where_all_samples_are_equal_the_error_says_what_to_raise(iteration):
    responses = active_settings().responses
    greedy = responses.sampling.model_copy(update={"temperature": 0.0})
    with pytest.raises(FinalError, match=r"'equal_sides': 3.* if `equal_sides` did, responses\.sampling\.temperature"):
        iteration(responses=responses.model_copy(update={"sampling": greedy}))


def test_the_columns_of_the_pairs_are_described_for_both_origins():
    """The card of a published dataset shows these, whatever made the chosen side."""
    columns = PreferencePairs.to_schema().columns
    for name in ("chosen", "chosen_response_id"):
        assert "the refined response, or the best of the ranked samples" in columns[name].description.lower()


@pytest.mark.slow
def test_nothing_is_generated_twice(iteration):
    _, measured, _, _ = iteration()
    sides = ("chosen_responses", "rejected_responses")
    reused = [measured.find("reused_completions", asset=side) for side in sides]
    assert [each.n for each in reused] == [3 * len(ASKED)] * 2
    assert sorted(each.value for each in reused) == [len(ASKED), 3 * len(ASKED)]
    assert sorted(measured.value("generated_tokens", asset=side) > 0 for side in sides) == [False, True]
    _, again, _, _ = iteration()
    assert [again.value("generated_tokens", asset=name) for name in ("base_responses", "chosen_responses")] == [0, 0]


# The graph and what is planned by it.


def test_the_graph_has_no_improver_and_every_asset_of_an_iteration_descends_from_the_policy(tmp_path, nano_model):
    definitions, services = build(load_settings(ranked_settings(tmp_path, nano_model)), tmp_path / "ranked")
    graph, usual_graph = services.graph, services_in(tmp_path / "usual").graph
    nodes = {key.to_user_string(): graph.get(key) for key in graph.get_all_asset_keys()}
    usual = {key.to_user_string() for key in usual_graph.get_all_asset_keys()}
    without = {"seed_responses", "response_improver", "refined_responses"}
    assert usual - nodes.keys() == without
    assert nodes.keys() - usual == {"chosen_responses"}
    off = {name for name, node in nodes.items() if not node.is_executable}
    assert off == {"benchmark_scores", "benchmark_answers"}
    assert not {key.asset_key.to_user_string() for key in graph.asset_check_keys} - nodes.keys()
    assert not any(node.partition_mappings for node in nodes.values())
    assert set(asset_names(graph, True)) == set(asset_names(usual_graph, True)) - without | {"chosen_responses"}
    parents = {name: {key.to_user_string() for key in node.parent_keys} for name, node in nodes.items()}
    assert {"chosen_responses", "rejected_responses"} <= parents["preference_pairs"]
    sampled = {"synthetic_prompts", "base_responses", "policy", "reward_model"}
    assert sampled == parents["chosen_responses"] == parents["rejected_responses"]
    assert nodes["preference_pairs"].metadata[MADE_FROM]["chosen_response_id"] == "chosen_responses"

    def descends(name):
        return name == "policy" or any(descends(parent) for parent in parents[name])

    assert all(descends(name) for name, node in nodes.items() if node.is_partitioned)
    jobs = {
        name: {key.to_user_string() for key in definitions.resolve_job_def(name).asset_layer.executable_asset_keys}
        for name in ("foundation", "iteration", "synpo")
    }
    assert "chosen_responses" in jobs["iteration"]
    assert not any(without & job for job in jobs.values())


def test_what_is_planned_leaves_the_improver_out(tmp_path, nano_model):
    (tmp_path / "usual").mkdir()
    usual = load_settings(write_settings(tmp_path / "usual" / "settings.yaml", nano_settings(nano_model)))
    ranked = load_settings(ranked_settings(tmp_path, nano_model))
    assert len(usual.trainings) == len(ranked.trainings) + 1
    assert disk_needed(ranked) < disk_needed(usual)
    seed = pl.DataFrame({"split": ["train", "test"], "prompt": ["a b"] * 2, "answer": ["c d"] * 2})
    planned = expected_work(sizes_of(ranked, seed, 0))
    answers = ranked.prompt_generator.prompts_per_iteration * ranked.responses.sampling.max_new_tokens
    written = {stage.name: work.tokens for stage, work in planned if work.kind == "generate" and not stage.once}
    assert written["base_responses"] + written["chosen_responses"] == RANKED["ranked_samples"] * answers
    without = {"seed_responses", "response_improver", "refined_responses", "rejected_responses"}
    assert not {stage.name for stage, _ in planned} & without


@pytest.mark.parametrize(("kind", "readings"), [("trained", 5), ("pair_ranker", 2 * 4 + 2)])
def test_what_is_scored_depends_on_what_the_scorer_reads(tmp_path, nano_model, kind, readings):
    """A reward model reads each of five answers; a pair ranker the first beside each other, then best and worst, twice."""
    scorer = {"scorer": {"kind": kind, "name": "some/ranker"}} if kind == "pair_ranker" else {}
    scorer["judge"] = {"training": nano_settings(nano_model)["scorer"]["training"]}
    preferences = nano_settings(nano_model)["preferences"] | RANKED | {"ranked_samples": 5}
    settings = load_settings(ranked_settings(tmp_path, nano_model, **scorer, preferences=preferences))
    seed = pl.DataFrame({"split": ["train", "test"], "prompt": ["a b"] * 2, "answer": ["c d"] * 2})
    scored = [(stage.name, work) for stage, work in expected_work(sizes_of(settings, seed, 0)) if work.kind == "score"]
    sides = sum(work.tokens for name, work in scored if name in ("chosen_responses", "preference_pairs"))
    answers = 2 if kind == "pair_ranker" else 1
    asked, written = CHAT_TOKENS + 2 * TOKENS_PER_WORD, settings.responses.sampling.max_new_tokens
    assert sides == pytest.approx(10 * readings * (asked + answers * written))


@pytest.mark.parametrize(("samples", "rewrites", "words", "others"), [
    (3, 1, "answered it 3\ntimes, and the scorer ranked the answers: `chosen` is the best", "response improver rewrote"),
    (None, 1, "response improver rewrote that answer: `chosen`", "ranked the answers"),
    (None, 4, "that answer 4 times: `chosen` is the best of the rewrites by the scorer", "rewrote that answer: `chosen`"),
])  # fmt: skip
def test_the_card_of_the_pairs_says_where_both_sides_come_from(samples, rewrites, words, others):
    pairs = some_pairs(1, 1)
    first = FinishedIteration("0001", Metrics(pl.DataFrame(schema=SCHEMA)), 1.0, pairs, [], "reward", {}, {}, None)
    data = CardData(
        repository=None, license_name=None, language="en", base_model="a model", base_model_id=None,
        base_model_name="model", iterations=[first], scorer="F", sample="{}", verdicts={},
    )  # fmt: skip
    stated = {
        "pairs": pairs,
        "columns": {},
        "writers": [],
        "ranked_samples": samples,
        "rewrites": rewrites,
        "settings": {},
    }
    card = dataset_card(data, **stated, own_answers=False)
    assert words in card
    assert others not in card
    own = "or the answer itself where it is above every rewrite"
    assert (own in dataset_card(data, **stated, own_answers=True)) == (rewrites > 1 and samples is None)
    assert own not in card


@pytest.mark.slow
def test_a_whole_iteration_with_ranked_samples(tmp_path, nano_model):
    home = tmp_path / "home"
    result = synpo("run", "--settings", ranked_settings(tmp_path, nano_model), "--home", home)
    assert result.returncode == 0, result.stderr[-3000:]
    pairs, base = (
        pl.read_parquet(home / f"tables/{name}/0001.parquet") for name in ("preference_pairs", "base_responses")
    )
    assert pairs["chosen_checkpoint_sha"].unique().to_list() == base["checkpoint_sha"].unique().to_list()
    assert not (home / "tables" / "seed_responses").exists()
    assert not (home / "checkpoints" / "response_improver").exists()
    traced = synpo("trace", pairs["pair_id"][0], "--home", home, "--json")
    assert traced.returncode == 0, traced.stderr
    (pair,) = json.loads(traced.stdout)
    chosen = next(node for node in pair["made_from"] if node["kind"] == "chosen")
    assert {node["kind"] for node in chosen["made_from"]} == {"written by", "base"}
    report = (home / "reports" / "boosting_report.html").read_text()
    assert "model that wrote the chosen side" in report
    assert "Everything here is in use" in synpo("clean", "--home", home).stdout
    assert synpo("run", "--home", home).returncode == 0
