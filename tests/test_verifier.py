"""A verifier as scorer: rules in the seed, in what the generator writes, between two answers, and in all that shows pairs."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.generation.language_model import Usage
from resources.scoring.scorer import Comparison, RewardScorer, ScoringUsage
from resources.settings.files import load_settings, preset_path
from resources.settings.method import TrainedScorer, VerifierScorer
from resources.settings.sections import SettingsError
from resources.training.job import TrainingSummary
from synpo_assets.cli.preflight import check_before_run, print_check
from synpo_assets.graph.lineage import links_of, trace
from synpo_assets.graph.metrics import SCHEMA, Metrics, recorded
from synpo_assets.graph.schemas import PreferencePairs, SeedPairs, SeedResponses, SyntheticPrompts
from synpo_assets.graph.tables import check
from synpo_assets.method.pairs import select_pairs
from synpo_assets.method.ranking import beside_first, best_of_like_length, repeated_prompts, with_ranks
from synpo_assets.method.rules import ALONE, COMPARING, CONSTRAINTS, COUNTING, followed, read_constraints
from synpo_assets.method.stated_rules import is_stated
from synpo_assets.method.templates import generator_instruction, generator_target, parse_question, parse_rules
from synpo_assets.method.verifiable import RULES_HOLD, rule_scores
from synpo_assets.publishing.cards import CardData, dataset_card
from synpo_assets.publishing.forms import CONVERSIONS
from synpo_assets.publishing.published import _scorer
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.rows import report_rows
from synpo_assets.stages.improver import refined_responses, rejected_responses, response_improver, seed_responses
from synpo_assets.stages.preferences import preference_pairs
from synpo_assets.stages.prompts import prompt_filter, prompt_generator, synthetic_prompts
from synpo_assets.stages.responses import base_responses
from synpo_assets.stages.scorers import scored_answers
from synpo_assets.stages.seed import seed_pairs, seed_table
from tests.nano import active_settings, nano_settings, seed_rows, write_settings
from tests.stand_ins import ITERATIONS, run, scored, services_in
from tests.stand_ins import instance as instance
from tests.test_improver_edits import RecordingTrainer
from tests.test_loop import pairs as some_pairs
from tests.test_measurements import CASES
from tests.test_ranked_samples import preference_history, stand_in_checkpoint

LOWERCASE = {"rule": "all_lowercase", "value": ""}
BRIEF = {"rule": "words_at_most", "value": "3"}


def rules_of(*constraints):
    return pl.Series([list(each) for each in constraints], dtype=CONSTRAINTS)


# The rules between two answers.


@pytest.mark.parametrize(("rule", "value", "good", "bad"), CASES)
def test_of_each_rule_the_answer_that_follows_is_preferred(rule, value, good, bad):
    sides = pl.DataFrame({"first": [good, bad, good, bad], "second": [bad, good, good, bad]})
    asked = sides.with_columns(constraints=rules_of(*[[{"rule": rule, "value": value}]] * 4))
    assert rule_scores(asked).rows() == [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)]


@given(st.lists(st.sampled_from(CASES), min_size=1, max_size=3), st.sampled_from(CASES), st.sampled_from(CASES))
def test_all_rules_must_hold_and_exchanged_answers_exchange_their_scores(rules, one, other):
    constraints = [{"rule": rule, "value": value} for rule, value, *_ in rules]
    asked = pl.DataFrame({"first": [one[2], other[3]], "second": [other[3], one[2]]})
    (first, second), exchanged = rule_scores(asked.with_columns(constraints=rules_of(*[constraints] * 2))).rows()
    assert exchanged == (second, first)
    assert (first, second) == (float(all(followed(constraints, one[2]))), float(all(followed(constraints, other[3]))))


class PrefersLong:
    """Stands in for the scorer; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def compare(self, model, rows):
        self.asked += rows
        first, second = (pl.Series([float(len(row[place])) for row in rows], dtype=pl.Float64) for place in (1, 2))
        return Comparison(first, second, "reward_difference", ScoringUsage(len(rows), 0, 1, 0, 0, 1.0))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["ab", "AB", "abcd"]), st.sampled_from(["ab", "ABC"]))))
@settings(deadline=None, max_examples=30)
def test_rules_decide_where_there_are_some_and_the_scorer_elsewhere(rows):
    scorer = PrefersLong()
    services = types.SimpleNamespace(scorer=scorer)
    asked = pl.DataFrame(
        {"prompt": [str(place) for place in range(len(rows))], "first": [first for _, first, _ in rows],
         "second": [second for *_, second in rows]},
        schema=dict.fromkeys(("prompt", "first", "second"), pl.String),
    ).with_columns(constraints=rules_of(*([LOWERCASE] if ruled else [] for ruled, _, _ in rows)))  # fmt: skip
    found = scored_answers(services, None, asked)
    for (ruled, first, second), row in zip(rows, found.rows.to_dicts(), strict=True):
        margin = first.islower() - second.islower() if ruled else len(first) - len(second)
        assert (row["margin"], row["score_convention"]) == (margin, RULES_HOLD if ruled else "reward_difference")
    assert [int(prompt) for prompt, *_ in scorer.asked] == [place for place, row in enumerate(rows) if not row[0]]


def test_where_all_prompts_have_rules_no_model_is_loaded(tmp_path, nano_checkpoint):
    stated = active_settings()
    scorer = RewardScorer(shards=str(tmp_path), engine=stated.engine, scorer=stated.scorer)
    missing = dataclasses.replace(nano_checkpoint, weights=str(tmp_path / "no model"))
    compared = scorer.compare(missing, [])
    assert (len(compared.margins), compared.margins.dtype, compared.usage.readings) == (0, pl.Float64, 0)


def test_chosen_follows_all_rules_and_rejected_does_not_whatever_the_threshold():
    sides = pl.DataFrame({
        "chosen_response": ["a", "b", "c", "d", "e"], "rejected_response": ["r"] * 5, "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
    })  # fmt: skip
    asked = scored(sides, pl.Series([1.0, 1.0, 0.0, 9.0, 1.0]), pl.Series([0.0, 1.0, 1.0, 1.0, 0.0]))
    by_rules = pl.Series([RULES_HOLD] * 3 + ["reward_difference"] * 2)
    kept, dropped = select_pairs(asked.with_columns(score_convention=by_rules), 5, 1, 3, 9, 0)
    assert kept["chosen_response"].to_list() == ["a", "d"]
    assert (dropped["rules"], dropped["margin"]) == (2, 1)


def test_samples_and_rewrites_are_ranked_by_the_rules():
    answered = repeated_prompts(pl.DataFrame({"prompt_id": ["a"], "prompt": ["A?"]}), 3).with_columns(
        response=pl.Series(["LOUD", "Longer, and not small", "calm"]), rejected=pl.lit("four"),
        finish_reason=pl.lit("stop"), constraints=rules_of(*[[LOWERCASE]] * 3), is_own=False,
    )  # fmt: skip
    services = types.SimpleNamespace(scorer=PrefersLong())
    margins = scored_answers(services, None, beside_first(answered)).rows["margin"]
    assert with_ranks(answered, margins)["rank"].to_list() == [2, 3, 1]
    assert best_of_like_length(answered, margins, 2.0)["response"].to_list() == ["calm"]


# What the generator writes.

TEXT = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="<>"), min_size=1, max_size=9)
STATED = st.one_of(
    st.builds(lambda rule, value: {"rule": rule, "value": str(value)}, st.sampled_from([*COUNTING]), st.integers(0, 99)),
    st.builds(lambda rule, value: {"rule": rule, "value": value}, st.sampled_from([*COMPARING]), TEXT),
    st.builds(lambda rule: {"rule": rule, "value": ""}, st.sampled_from([*ALONE])),
)  # fmt: skip


@given(st.lists(STATED, max_size=3), TEXT, TEXT)
@settings(deadline=None)
def test_rules_and_question_are_read_back_as_they_were_learned(constraints, prompt, answer):
    written = generator_target(prompt, answer, constraints)
    assert (parse_question(written), parse_rules(written)) == (prompt, constraints)
    # Writing stops where the rules end.
    stopped = written.partition("</rules>" if constraints else "<solution>")[0] + ("</rules>" if constraints else "")
    assert (parse_question(stopped), parse_rules(stopped)) == (prompt, constraints)


@given(st.one_of(st.text(max_size=40), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.sampled_from([*COUNTING, "9" * 5000, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rule", "value"]), inner),
    max_leaves=6,
).map(json.dumps)))  # fmt: skip
@settings(deadline=None)
def test_whatever_stands_between_the_tags_is_rules_or_none(written):
    rules = parse_rules(f"OUTPUT\n<question>Why?</question>\n<rules>{written}</rules>")
    if rules is not None:
        assert rules_of(rules).to_list() == [rules]
        followed(rules, "An answer.")


@pytest.mark.parametrize("written", [
    "<rules>be brief</rules>", '<rules>[{"rule": "shorter"}]</rules>', '<rules>{"rule": "all_lowercase"}</rules>',
    '<rules>[{"rule": "words_at_most"}]</rules>', '<rules>[{"rule": "all_lowercase"}]', "</rules>", "<rules></rules>",
    '<rules>[{"rule": "words_at_most", "value": 12345678}]</rules>',
])  # fmt: skip
def test_a_prompt_whose_rules_do_not_parse_is_dropped_and_counted(written):
    text = f"OUTPUT\n<question>Why is the sky blue at noon?</question>\n{written}"
    knows, ignores = (prompt_filter(active_settings(), with_rules=with_rules) for with_rules in (True, False))
    assert knows.keep(text) is None
    assert knows.dropped == {"bad_rules": 1}
    assert ignores.keep(text) == "Why is the sky blue at noon?"
    assert prompt_filter(active_settings(), with_rules=True).keep(text.replace(written, "")) is not None


def test_without_rules_the_generator_is_asked_and_writes_as_before():
    assert generator_target("Why?", "So.") == "OUTPUT\n<question>Why?</question>\n<solution>So.</solution>"
    (plain,), (ruled,) = (generator_instruction(["pan"], with_rules) for with_rules in (False, True))
    assert "that says OUTPUT, the question between" in plain["content"]
    assert (
        "question tags, if a program can check what it asks, the rules between rules tags, the solution"
        in ruled["content"]
    )


@pytest.mark.parametrize(("rule", "value", "stated", "unstated"), [
    ("words_at_most", "9", "Why is the sky blue at noon? In nine words at most.", "Why is the sky blue at noon? In 19 words."),
    ("all_uppercase", "", "Why is the sky blue? Use CAPITAL letters only.", "Why is the sky blue, and who says so?"),
    ("contains", "blue", "Why is the sky so at noon? Use the word \"blue\".", "Why is the sky blue at noon? Just tell me."),
    ("avoids", "blue", "What is the sky like, without the word blue?", "What is the blue sky like at noon?"),
    ("starts_with", "Well,", "Why is the sky blue at noon? Begin with \"Well,\".", "Well, why is the sky blue at noon?"),
    ("in_order", "sea|sky", "Why is the sky blue like the sea? Name the sea first.", "Why is the sky blue at noon?"),
    ("is_one_of", "yes|no", "Is the sky blue at noon? Answer yes or no.", "Is the sky blue at noon, or yellow?"),
])  # fmt: skip
def test_a_prompt_that_does_not_state_its_rules_is_dropped_and_counted(rule, value, stated, unstated):
    trusting = prompt_filter(active_settings(), with_rules=True)
    knows = dataclasses.replace(prompt_filter(active_settings(), with_rules=True), language="en")
    written = json.dumps([{"rule": rule, "value": value}])
    assert knows.keep(f"<question>{stated}</question><rules>{written}</rules>") == stated
    assert knows.keep(f"<question>{unstated}</question><rules>{written}</rules>") is None
    assert knows.dropped == {"rules_not_stated": 1}
    assert trusting.keep(f"<question>{unstated}</question><rules>{written}</rules>") == unstated


@pytest.mark.parametrize(("prompt", "rule", "value"), [
    ("What is the capital of France?", "all_uppercase", ""),
    ("What is the capital of France?", "all_lowercase", ""),
    ("Write it without any capital letter.", "all_uppercase", ""),
    ("What did they have for supper?", "all_uppercase", ""),
    ("Describe a sunflower in the garden.", "all_lowercase", ""),
    ("What is the quotient of 12 and 4?", "in_quotes", ""),
    ("What do your eyes do at noon?", "is_one_of", "yes|no"),
    ("Name three fruits.", "json_object_with", "name"),
    ("Write JSON about surnames.", "json_object_with", "name"),
    ("Describe a watering cane.", "in_order", "a|can"),
    ("Mention the season.", "contains", "sea"),
    ('Do not use "cataract".', "avoids", "cat"),
])  # fmt: skip
def test_a_word_within_a_word_states_no_rule(prompt, rule, value):
    assert not is_stated(prompt, {"rule": rule, "value": value})


def test_most_rules_of_the_shipped_seed_are_stated_in_so_many_words():
    """Others follow from the prompt: the lines that it gives, the sum that it asks for."""
    rows = seed_rows("rules/train")
    stated = [is_stated(row["prompt"], rule) for row in rows for rule in read_constraints(row["constraints"])]
    assert len(stated) > 1000
    assert sum(stated) / len(stated) > 0.75


# The seed.


SHIPPED = seed_rows()
FOLLOWED = SHIPPED[1]["prompt"]  # The policy follows the rules of this one.


def seed_row(number, **more):
    return {"prompt": SHIPPED[number]["prompt"], "answer": f"calm words, number {number}", **more}


RULED = [seed_row(number, constraints=[{"rule": "all_lowercase"}]) for number in range(10)]
PLAIN = [seed_row(number) for number in range(10, 20)]


def verifier_settings(tmp_path, rows, scorer=None, nano_model="nano", **seed):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stated = nano_settings(Path(nano_model))
    stated["seed_data"] = {"train": {"path": "train.jsonl"}, "train_limit": None, **seed}
    stated["scorer"] = stated["scorer"] | {"kind": "verifier"} if scorer is None else scorer
    return load_settings(write_settings(tmp_path / "settings.yaml", stated))


def test_the_seed_holds_the_rules_of_the_rows_that_have_some(tmp_path):
    frame, bad = seed_table(verifier_settings(tmp_path, RULED + PLAIN))
    assert (bad, check(SeedPairs, frame)) == ([], None)
    rules = {
        row["line"]: row["constraints"] for row in frame.filter(~pl.col("split").is_in(["dev", "test"])).to_dicts()
    }
    assert rules == {line: [LOWERCASE] if line <= len(RULED) else [] for line in range(1, 21)}


def test_a_column_of_rules_is_not_read_without_a_verifier(tmp_path):
    bad_for_a_verifier = seed_row(30, constraints="short")
    stated = verifier_settings(tmp_path, [*RULED, bad_for_a_verifier], scorer=nano_settings(Path("nano"))["scorer"])
    frame, bad = seed_table(stated)
    assert bad == []
    assert frame["constraints"].list.len().sum() == 0


@pytest.mark.parametrize(("row", "reason"), [
    (seed_row(30, answer="Loud words", constraints=[{"rule": "all_lowercase"}]), "does not follow its own rule `all_lowercase`"),
    (seed_row(30, constraints=[{"rule": "all_lowercase"}, {"rule": "words_at_most", "value": 2}]),
     "does not follow its own rule `words_at_most 2`"),
    (seed_row(30, constraints=[{"rule": "shorter"}]), "there is no rule `shorter`"),
    (seed_row(30, constraints={"rule": "all_lowercase"}), "`constraints` is no list"),
    (seed_row(30, constraints=[{"rule": "words_at_most", "value": "few"}]), "needs a whole number as value, not 'few'"),
])  # fmt: skip
def test_bad_rules_and_gold_that_breaks_them_are_bad_rows(tmp_path, row, reason):
    stated = verifier_settings(tmp_path, [*RULED, row])
    # M_0 is not there at all: nothing was loaded before.
    for attempt in (print_check, check_before_run):
        with pytest.raises(SettingsError, match="1 seed rows cannot be used") as refused:
            attempt(stated, tmp_path / "home")
        assert "train line 11: " in str(refused.value)
        assert reason in str(refused.value)
    _, bad = seed_table(verifier_settings(tmp_path, [*RULED, row], on_bad_rows="drop"))
    assert [each.line for each in bad] == [11]


def test_a_verifier_without_rules_to_verify_is_refused(tmp_path):
    with pytest.raises(
        SettingsError, match=r"scorer\.kind is `verifier` and no row of .*train\.jsonl .* `constraints`"
    ):
        seed_table(verifier_settings(tmp_path, PLAIN))


def test_rules_in_a_parquet_file(tmp_path):
    rows = [row | {"constraints": [BRIEF, LOWERCASE | {"value": None}], "answer": "calm words"} for row in RULED]
    pl.DataFrame([*rows, *(row | {"constraints": None} for row in PLAIN)], infer_schema_length=None).write_parquet(
        tmp_path / "train.parquet"
    )
    frame, _ = seed_table(verifier_settings(tmp_path, PLAIN, train={"path": "train.parquet"}))
    assert {str(each) for each in frame["constraints"].to_list()} == {"[]", str([BRIEF, LOWERCASE])}


def test_a_verifier_trains_the_reward_model_of_its_preset(tmp_path):
    laptop = load_settings(preset_path("laptop"))
    changed = {"preset": "laptop", "scorer": {"kind": "verifier"}}
    stated = load_settings(write_settings(tmp_path / "mine.yaml", changed))
    assert stated.scorer == VerifierScorer(training=laptop.scorer.training, max_length=laptop.scorer.max_length)
    assert isinstance(laptop.scorer, TrainedScorer)
    assert (stated.judge, stated.trainings) == (laptop.judge, laptop.trainings)
    assert stated.scorer.convention == "reward_difference"


# The stages.


class StandIn:
    """In the place of the language model and the trainer: writes what it is told, and keeps what is learned."""

    def __init__(self, weights):
        self.weights, self.learned = weights, {}

    def answer(self, checkpoint, requests, sampling):
        rows = [(row_id, self.write(checkpoint.asset, row_id, messages[0]["content"])) for row_id, messages in requests]
        frame = pl.DataFrame(rows, schema={"id": pl.String, "text": pl.String}, orient="row")
        tokens = {name: pl.lit(3, pl.Int64) for name in ("input_tokens", "output_tokens")}
        return frame.with_columns(finish_reason=pl.lit("stop"), **tokens), Usage(len(rows), 0, 3, 4, 4, 0, 1.0)

    def write(self, asset, row_id, asked):
        if asset == "prompt_generator":
            number = int(row_id.partition(" ")[0].rpartition("-")[2])
            rules = [LOWERCASE, None, BRIEF, {"rule": "shorter"}][number % 4]
            tag = f"<rules>{json.dumps([rules])}</rules>" if rules else ""
            return f"OUTPUT\n<question>Say a thing or two about topic number {number}.</question>\n{tag}"
        if asset == "response_improver":
            return "Not CALM, at great length" if "number 6" in asked else "calm words"
        return (
            "calm words, too"
            if "number 4" in asked or FOLLOWED in asked
            else "Some LOUD words from M_0, more than three"
        )

    def train(self, kind, start, examples, training, directory, loss=None):
        asset = dg.AssetExecutionContext.get().asset_key.to_user_string()
        self.learned[asset] = examples
        shutil.copytree(self.weights, directory / "merged")
        return TrainingSummary(len(examples), 0, 0, 9, 1, 1.0, [{"loss": 1.0, "step": 1}])

    def model_copy(self, update):
        return self


@dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
def keyword_sets():
    sets = [{"keyword_set_id": f"keywords-{n}", "keywords": ["a"], "paragraph": "A.", "iteration": 1} for n in range(9)]
    return pl.DataFrame(sets)


@dg.asset(io_manager_key="tables")
def verifiable_instructions():
    return pl.DataFrame(schema={"prompt": pl.String})


@pytest.fixture
def iteration(tmp_path, nano_model, instance):
    """The stages from the seed to the pairs, with a generator that writes rules, good and bad ones."""
    services = services_in(tmp_path / "home", verifier_settings(tmp_path, RULED + PLAIN, nano_model=nano_model))
    stand_in, scorer = StandIn(nano_model), PrefersLong()
    services = dataclasses.replace(services, language_model=stand_in, trainer=stand_in, scorer=scorer)
    models = [stand_in_checkpoint(name, nano_model) for name in ("initial_policy", "reward_model")]
    stages = [
        seed_pairs, prompt_generator, synthetic_prompts, base_responses, rejected_responses, seed_responses,
        response_improver, refined_responses, preference_pairs,
    ]  # fmt: skip
    given_assets = [
        *models, stand_in_checkpoint("policy", nano_model, ITERATIONS), keyword_sets, verifiable_instructions,
        preference_history,
    ]  # fmt: skip
    result = run([*given_assets, *stages], instance, services, "0001")
    tables = {stage.name: result.output_for_node(stage.name) for stage in stages}
    return services, tables, recorded(services.metrics, "0001"), stand_in, scorer


@pytest.mark.parametrize("keeps", [False, True])
def test_rows_that_the_policy_answers_rightly_stay_where_the_setting_says_so(tmp_path, instance, nano_model, keeps):
    """Never those in which gold itself breaks a rule, or a scorer finds gold no better."""
    rows = [("better", RULES_HOLD, 1, 0), ("both right", RULES_HOLD, 1, 1), ("both wrong", RULES_HOLD, 0, 0),
            ("worse", RULES_HOLD, 0, 1), ("better", "reward_difference", 3, 1), ("equal", "reward_difference", 1, 1)]  # fmt: skip

    @dg.asset(io_manager_key="tables", partitions_def=ITERATIONS)
    def seed_responses():
        columns = ("answer", "score_convention", "answer_score", "response_score")
        frame = pl.DataFrame(
            rows, schema=dict.fromkeys(columns[:2], pl.String) | dict.fromkeys(columns[2:], pl.Float64), orient="row"
        )
        margin = pl.col("answer_score") - pl.col("response_score")
        return frame.with_columns(prompt=pl.lit("Why?"), response=pl.lit("So."), margin=margin, other_margin=margin)

    shared, trainer = active_settings(), RecordingTrainer()
    improver = shared.response_improver.model_copy(update={"margin_threshold": 0.0, "keep_right_answers": keeps})
    services = services_in(tmp_path, shared.model_copy(update={"response_improver": improver}))
    models = [stand_in_checkpoint("initial_policy", nano_model), stand_in_checkpoint("policy", nano_model, ITERATIONS)]
    services = dataclasses.replace(services, trainer=trainer)
    run([*models, seed_responses, response_improver], instance, services, "0001")
    assert [gold for _, gold in trainer.examples] == ["better", *["both right"] * keeps, "better"]
    kept = recorded(services.metrics, "0001").find("right_answers_kept")
    assert (kept and kept.value) == (1 if keeps else None)


def test_an_iteration_whose_scorer_is_a_verifier(iteration, instance):
    services, tables, measured, stand_in, scorer = iteration
    for schema, name in ((SeedPairs, "seed_pairs"), (SyntheticPrompts, "synthetic_prompts"),
                         (SeedResponses, "seed_responses"), (PreferencePairs, "preference_pairs")):  # fmt: skip
        assert check(schema, tables[name]) is None

    # G learns rules where a seed row has some.
    train = tables["seed_pairs"].filter(split="train")
    ruled = train.filter(pl.col("constraints").list.len() > 0)
    assert 0 < ruled.height < train.height
    targets = [target for _, target in stand_in.learned["prompt_generator"]]
    assert [parse_rules(text) for text in targets] == train["constraints"].to_list()
    assert all("between rules tags" in asked[0]["content"] for asked, _ in stand_in.learned["prompt_generator"])

    # It writes some itself; those that do not parse cost the prompt.
    prompts = tables["synthetic_prompts"]
    numbers = [int(each.rpartition("-")[2]) for each in prompts["keyword_set_id"]]
    assert numbers == [0, 1, 2, 4, 5, 6, 8]
    assert prompts["constraints"].to_list() == [[[LOWERCASE], [], [BRIEF]][number % 4] for number in numbers]
    assert measured.value("dropped", "bad_rules", asset="synthetic_prompts") == 2
    assert measured.find("with_rules", asset="synthetic_prompts").value == 5

    # The improver learns from rows whose gold follows the rules and the policy's answer does not.
    answers = tables["seed_responses"]
    by_rules = answers.filter(score_convention=RULES_HOLD)
    assert by_rules["prompt_id"].to_list() == ruled["prompt_id"].to_list()
    assert by_rules.select("answer_score", "response_score", "margin", "other_margin").row(0) == (1, 0, 1, 1)
    # The policy follows the rules of one row; by the threshold of -100 that row would stay.
    kept = answers.filter(~pl.col("response").str.contains("calm"))
    assert kept.height == answers.height - 1
    assert [gold for _, gold in stand_in.learned["response_improver"]] == kept["answer"].to_list()

    # What the improver rewrote stands beside what it made of it.
    for who, name in {"policy": "base_responses", "improver": "refined_responses"}.items():
        rows = zip(prompts["constraints"].to_list(), tables[name]["response"], strict=True)
        held = [all(followed(rules, text)) for rules, text in rows if rules]
        found = measured.find("rules_followed_share", who, asset="refined_responses")
        assert (found.value, found.n) == (sum(held) / 5, 5)
        assert sum(held) == {"policy": 1, "improver": 4}[who]

    # Of the pairs with rules, those stay whose chosen side alone follows them.
    pairs = tables["preference_pairs"]
    shown = {row["prompt"][0]["content"].rstrip(".").rpartition(" ")[2]: row for row in pairs.to_dicts()}
    assert shown.keys() == {"0", "1", "2", "5", "8"}
    assert {number for number, row in shown.items() if row["rules"]} == {"0", "2", "8"}
    for row in shown.values():
        assert row["score_convention"] == (RULES_HOLD if row["rules"] else "reward_difference")
        if row["rules"]:
            chosen, rejected = (all(followed(json.loads(row["rules"], object_hook=lambda rule: {"value": ""} | rule),
                                             row[side][0]["content"])) for side in ("chosen", "rejected"))  # fmt: skip
            assert (chosen, rejected, row["margin"]) == (True, False, 1.0)
    assert measured.value("dropped", "rules", asset="preference_pairs") == 2
    assert measured.find("with_rules", asset="preference_pairs").value == 3
    assert measured.find("mean_margin").n == 2
    asked = {prompt for prompt, *_ in scorer.asked}
    with_rules = {*ruled["prompt"], *prompts.filter(pl.col("constraints").list.len() > 0)["prompt"]}
    assert asked == {*train["prompt"], *prompts["prompt"]} - with_rules

    # All that shows a pair knows its rules.
    assert "rules" in links_of(services.graph)["preference_pairs"].facts
    (node,) = trace(services, instance, shown["2"]["pair_id"])
    (prompt,) = (below for below in node.made_from if below.kind == "prompt")
    assert node.facts["rules"] == prompt.facts["rules"] == '[{"rule": "words_at_most", "value": "3"}]'
    (plain,) = trace(services, instance, shown["1"]["pair_id"])
    assert "rules" not in plain.facts
    for form in ("trl", "llama-factory", "axolotl"):
        assert CONVERSIONS[form](shown["2"])["rules"] == node.facts["rules"]
    finished = FinishedIteration("0001", measured, 1.0, pairs, [], "reward", {}, {}, None)
    cells = {row.label: row.cells for row in report_rows([finished])}
    assert cells["synthetic prompts with rules"] == ("5",)
    assert cells["pairs kept whose prompt has rules"] == ("3",)
    assert cells["preference_pairs: rules"] == ("2",)


def test_the_card_says_what_rules_decided():
    rules = pl.Series(["", '[{"rule": "all_lowercase"}]'])
    pairs = some_pairs(1, 2).with_columns(score_convention=pl.Series(["reward_difference", RULES_HOLD]), rules=rules)
    stated = active_settings()
    verifier = VerifierScorer(training=stated.scorer.training, max_length=stated.scorer.max_length)

    def card(pairs, scorer):
        first = FinishedIteration("0001", Metrics(pl.DataFrame(schema=SCHEMA)), 1.0, pairs, [], "reward", {}, {}, None)
        data = CardData(
            repository=None, license_name=None, language="en", base_model="a model", base_model_id=None,
            base_model_name="model", iterations=[first], scorer=_scorer(stated.model_copy(update={"scorer": scorer})),
            sample="{}", verdicts={},
        )  # fmt: skip
        return dataset_card(data, pairs=pairs, columns={}, writers=[], ranked_samples=None, rewrites=1, own_answers=False,
                            settings={})  # fmt: skip

    with_rules, without = card(pairs, verifier), card(pairs.head(1), stated.scorer)
    assert "1 prompt states rules that a program checks" in with_rules
    assert "a program where a prompt states rules that it can check, elsewhere a reward model" in with_rules
    assert "`reward_difference`, `rules_hold`" in with_rules
    assert "a program" not in without
