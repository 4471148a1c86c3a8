"""Several rewrites of each answer: which of them is chosen, what is generated for it, and pairs of like length."""

import dataclasses

import dagster as dg
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.generation.language_model import Usage
from resources.settings.files import load_settings
from resources.settings.sections import SettingsError
from synpo_assets.cli.estimate import CHAT_TOKENS, TOKENS_PER_WORD, expected_work, sizes_of
from synpo_assets.graph.metrics import recorded
from synpo_assets.graph.schemas import RefinedResponses
from synpo_assets.graph.stage import MADE_FROM
from synpo_assets.graph.tables import check
from synpo_assets.method.pairs import join_sides, select_pairs
from synpo_assets.method.ranking import best_of_like_length, repeated_prompts
from synpo_assets.method.rules import CONSTRAINTS
from synpo_assets.stages.best_rewrites import best_rewrites
from synpo_assets.stages.improver import refined_responses, rejected_responses
from synpo_assets.stages.responses import base_responses
from tests.nano import active_settings, nano_settings, write_settings
from tests.stand_ins import ITERATIONS, graph_of, run, scored, services_in
from tests.stand_ins import instance as instance
from tests.test_method import responses
from tests.test_ranked_samples import ASKED, PrefersLong, stand_in_checkpoint, synthetic_prompts

RULES = [{"rule": "all_lowercase", "value": ""}]
LENGTH, MARGIN = st.integers(0, 12), st.integers(-3, 3).map(float)


def several(samples=3, **changes):
    """The nano settings with several rewrites of each answer."""
    shared = active_settings()
    improver = shared.response_improver.model_copy(update={"samples": samples, **changes})
    return shared.model_copy(update={"response_improver": improver})


# The choice.


@st.composite
def rewrites(draw):
    """Of each prompt: the length of the rejected answer, those of the rewrites, and the margins of the further ones."""
    further = draw(st.integers(1, 3))
    lengths = st.lists(LENGTH, min_size=further + 1, max_size=further + 1)
    margins = st.lists(MARGIN, min_size=further, max_size=further)
    return draw(st.lists(st.tuples(LENGTH, lengths, margins), min_size=1, max_size=5))


@settings(deadline=None)
@given(rewrites(), st.sampled_from([1.1, 1.25, 2.0, 100.0]), st.booleans())
def test_the_best_of_like_length_is_taken_or_else_the_nearest_and_rules_go_first(prompts, most, has_rules):
    samples = len(prompts[0][1])
    names = pl.DataFrame({"prompt_id": [f"prompt-{number}" for number in range(len(prompts))]})
    # As the stage lays them out: the first samples of all prompts, then the further ones prompt by prompt.
    answered = pl.concat([
        repeated_prompts(names, samples).filter(pl.col("sample") == 1),
        repeated_prompts(names, samples).filter(pl.col("sample") > 1),
    ])  # fmt: skip
    lengths = [own[0] for _, own, _ in prompts] + [length for _, own, _ in prompts for length in own[1:]]
    others = [other for other, _, _ in prompts] + [other for other, own, _ in prompts for _ in own[1:]]
    texts = {
        name: pl.Series(["x" * length for length in each])
        for name, each in (("response", lengths), ("rejected", others))
    }
    margins = pl.Series([margin for _, _, own in prompts for margin in own])
    rules = pl.Series([RULES if has_rules else []] * answered.height, dtype=CONSTRAINTS)
    answered = answered.with_columns(**texts, finish_reason=pl.lit("stop"), constraints=rules, is_own=False)
    best = best_of_like_length(answered, margins, most)
    assert best["prompt_id"].to_list() == names["prompt_id"].to_list()
    for (other, own, further), row in zip(prompts, best.to_dicts(), strict=True):
        factors = [max(length, other, 1) / max(min(length, other), 1) for length in own]
        ranks = [
            (length == other, -margin if has_rules else 0.0, 1.0 if factor <= most else factor, -margin, sample)
            for sample, (length, factor, margin) in enumerate(zip(own, factors, [0.0, *further], strict=True), 1)
        ]
        taken = min(ranks)[-1]
        assert (row["sample"], row["is_alike"]) == (taken, factors[taken - 1] <= most)


@pytest.mark.parametrize(
    ("own", "margin", "finish_reason", "is_chosen"),
    [("own answer", 2.0, "stop", True), ("own answer", 1.0, "stop", False), ("own answer", 2.0, "length", False),
     ("rejected", 2.0, "stop", False), ("o", 2.0, "stop", False)],
)  # fmt: skip
def test_an_own_answer_is_chosen_where_it_is_above_every_rewrite_and_no_less_alike_in_length(
    own, margin, finish_reason, is_chosen
):
    """The second rewrite has the margin 1, and the first is as long as the own answer."""
    answered = pl.DataFrame({
        "prompt_id": ["a"] * 3, "sample": [1, 2, 3], "response": ["a rewrite", "rewritten", own], "rejected": ["rejected"] * 3,
        "finish_reason": ["stop", "stop", finish_reason], "constraints": pl.Series([[]] * 3, dtype=CONSTRAINTS),
        "is_own": [False, False, True],
    })  # fmt: skip
    best = best_of_like_length(answered, pl.Series([1.0, margin]), 1.25)
    assert best["response"].to_list() == [own if is_chosen else "rewritten"]


@pytest.mark.parametrize("rules", [[], RULES])
@pytest.mark.parametrize(("margin", "is_chosen"), [(0.5, False), (1.0, False), (2.0, True)])
def test_an_own_answer_nearer_in_length_is_chosen_only_where_it_is_above_every_rewrite(rules, margin, is_chosen):
    answered = pl.DataFrame({
        "prompt_id": ["a"] * 3, "sample": [1, 2, 3],
        "response": ["a rewrite", "rewritten", "rejectee"], "rejected": ["rejected"] * 3,
        "finish_reason": ["stop"] * 3, "constraints": pl.Series([rules] * 3, dtype=CONSTRAINTS), "is_own": [False, False, True],
    })  # fmt: skip
    best = best_of_like_length(answered, pl.Series([1.0, margin]), 1.01)
    assert best["response"].to_list() == ["rejectee" if is_chosen else "rewritten"]


def test_a_rewrite_that_is_the_rejected_answer_is_the_last_choice():
    answered = pl.DataFrame({
        "prompt_id": ["a"] * 2, "sample": [1, 2], "response": [" rejected", "much longer than it"], "rejected": ["rejected"] * 2,
        "finish_reason": ["stop"] * 2, "constraints": pl.Series([[]] * 2, dtype=CONSTRAINTS), "is_own": [False] * 2,
    })  # fmt: skip
    assert best_of_like_length(answered, pl.Series([-3.0]), 1.25)["sample"].to_list() == [2]


# The asset.


@pytest.fixture
def rewritten(tmp_path, nano_checkpoint):
    """Makes the rewrites of an iteration; returns the tables, the metrics, and what the scorer was asked."""
    models = [stand_in_checkpoint(name, nano_checkpoint.weights) for name in ("initial_policy", "reward_model")]
    models += [
        stand_in_checkpoint(name, nano_checkpoint.weights, ITERATIONS) for name in ("policy", "response_improver")
    ]
    stages = [base_responses, rejected_responses, refined_responses, best_rewrites]

    def rewritten(writer=None, **changes):
        scorer = PrefersLong()
        services = dataclasses.replace(services_in(tmp_path, several(**changes)), scorer=scorer)
        services = dataclasses.replace(services, language_model=writer or services.language_model)
        with dg.DagsterInstance.ephemeral() as instance:
            result = run([*models, synthetic_prompts, *stages], instance, services, "0001")
        tables = [result.output_for_node(stage.name) for stage in stages]
        return tables, recorded(services.metrics, "0001"), scorer

    return rewritten


def test_the_first_rewrite_is_not_made_again_and_the_best_is_chosen(rewritten):
    # What is cut is chosen last.
    sampling = active_settings().response_improver.sampling.model_copy(update={"max_new_tokens": 200})
    (base, _, first, best), measured, scorer = rewritten(max_length_ratio=1e4, sampling=sampling)
    assert check(RefinedResponses, best) is None
    assert best["prompt_id"].to_list() == base["prompt_id"].to_list()
    assert best["base_response_id"].to_list() == base["response_id"].to_list()
    (asked,) = scorer.asked
    assert len(asked) == 2 * len(ASKED)
    usage = measured.find("reused_completions", asset="best_rewrites")
    assert (usage.value, usage.n) == (0, 2 * len(ASKED))
    for prompt, response, first_one in zip(ASKED, best["response"], first["response"], strict=True):
        others = [other for asked_for, other, _ in asked if asked_for == prompt]
        assert len(response) == max(map(len, [first_one, *others]))
    assert measured.value("samples_per_prompt", asset="best_rewrites") == 3
    assert measured.value("like_length_share") == 1
    _, again, _ = rewritten(max_length_ratio=1.01, sampling=sampling)
    assert again.value("generated_tokens", asset="best_rewrites") == 0
    assert again.value("like_length_share") < 1


SAID = dict(zip(ASKED, ["the longest of all answers", "short", "the longest, and M_0's"], strict=True))


class Scripted:
    """Stands in for the models: R_t's second rewrite is the longest, and the policy's answers are told."""

    def answer(self, checkpoint, prompts, sampling):
        asked = [(row_id, messages[-1]["content"]) for row_id, messages in prompts]
        texts = [self.written(checkpoint.asset, row_id, text) for row_id, text in asked]
        tokens = {"input_tokens": pl.lit(3, pl.Int64), "output_tokens": pl.lit(4, pl.Int64)}
        frame = pl.DataFrame({"id": [row_id for row_id, _ in asked], "text": texts}).with_columns(**tokens)
        return frame.with_columns(finish_reason=pl.lit("stop")), Usage(len(asked), 0, 3, 4, 4, 0, 1.0)

    def written(self, asset, row_id, asked):
        if asset == "response_improver":
            return "long rewrite" if row_id.endswith("sample 2") else "rewrite"
        return SAID[asked] if asset == "policy" or asked == ASKED[2] else "by M_0"


def test_the_policys_answer_is_chosen_where_it_is_above_every_rewrite_and_not_the_rejected_one(rewritten):
    (base, _, _, best), measured, _ = rewritten(Scripted(), max_length_ratio=100.0, own_answers=True)
    assert check(RefinedResponses, best) is None
    assert best["response"].to_list() == ["the longest of all answers", "long rewrite", "long rewrite"]
    assert (best["response_id"] == base["response_id"]).to_list() == [True, False, False]
    assert measured.value("own_answer_share") == pytest.approx(1 / 3)
    (base, _, _, best), measured, _ = rewritten(Scripted(), max_length_ratio=100.0)
    assert best["response"].to_list() == ["long rewrite"] * 3
    assert measured.find("own_answer_share") is None


def test_only_several_rewrites_have_a_stage_of_their_own():
    one, many = (graph_of(several(count)) for count in (1, 3))
    assert many.materializable_asset_keys - one.materializable_asset_keys == {dg.AssetKey("best_rewrites")}
    pairs = many.get(dg.AssetKey("preference_pairs"))
    assert dg.AssetKey("best_rewrites") in pairs.parent_keys
    assert dg.AssetKey("refined_responses") not in pairs.parent_keys
    assert pairs.metadata[MADE_FROM]["chosen_response_id"] == "best_rewrites"
    ranked = several(3).preferences.model_copy(update={"chosen_from": "ranked_samples"})
    without = graph_of(several(3).model_copy(update={"preferences": ranked}))
    assert dg.AssetKey("best_rewrites") not in without.materializable_asset_keys


def test_greedy_rewrites_are_refused(tmp_path, nano_model):
    changed = nano_settings(nano_model)
    changed["response_improver"] |= {"samples": 2, "sampling": {"temperature": 0, "max_new_tokens": 8}}
    with pytest.raises(SettingsError, match=r"response_improver.*samples is 2 and sampling is greedy"):
        load_settings(write_settings(tmp_path / "settings.yaml", changed))


@pytest.mark.parametrize("own_answers", [False, True])
@pytest.mark.parametrize(("kind", "readings"), [("trained", 3), ("pair_ranker", 2 * 2)])
def test_the_estimate_counts_further_rewrites_and_what_is_read(tmp_path, nano_model, kind, readings, own_answers):
    changed = nano_settings(nano_model)
    changed["judge"] = {"training": changed["scorer"]["training"]}
    changed |= {"scorer": {"kind": kind, "name": "some/ranker"}} if kind == "pair_ranker" else {}
    changed["response_improver"] |= {"samples": 3, "own_answers": own_answers}
    stated = load_settings(write_settings(tmp_path / "settings.yaml", changed))
    seed = pl.DataFrame({"split": ["train", "held_out"], "prompt": ["a b"] * 2, "answer": ["c d"] * 2})
    planned = expected_work(sizes_of(stated, seed, 0))
    work, later = (
        {work.kind: work.tokens for stage, work in planned if stage is best_rewrites and work.later_only == only}
        for only in (False, True)
    )
    length, answers = stated.response_improver.sampling.max_new_tokens, 2 if kind == "pair_ranker" else 1
    assert work["generate"] == 10 * 2 * length
    asked = CHAT_TOKENS + 2 * TOKENS_PER_WORD
    assert work["score"] == pytest.approx(10 * readings * (asked + answers * length))
    written = stated.responses.sampling.max_new_tokens
    of_own = 2 * (asked + written + length) if kind == "pair_ranker" else asked + written
    assert later == {"score": pytest.approx(10 * of_own * own_answers)}, "the policy's answer too, from iteration 2 on"


# Pairs of like length.


@pytest.mark.parametrize(("most", "kept"), [(None, 4), (4.0, 4), (3.0, 3), (1.25, 2), (1.2, 1)])
def test_pairs_whose_sides_differ_too_much_in_length_are_dropped_and_counted(most, kept):
    chosen = ["abcd", "abcde", " abcdefghijkl ", "a"]
    joined = join_sides(responses("r", chosen), responses("0", ["wxyz"] * 4))
    pairs, dropped = select_pairs(scored(joined, 1.0, 0.0), 0, 1, 3, 9, 0, most)
    assert pairs.height == kept
    assert dropped.get("length") == (None if most is None else 4 - kept)
    assert pairs.height + sum(dropped.values()) == 4
