"""What is measured of M_t without a judge: rules that a program checks, likelihood of gold, and likeness to it."""

import json
import random
import time

import polars as pl
import pytest

from resources.models.likelihood import AnswerLikelihood
from resources.settings.files import load_settings
from resources.settings.machine import Engine
from resources.settings.sections import SettingsError
from synpo_assets.evaluation.gold_comparison import OTHER_ANSWER, gold_metrics, refuse_answers_of_another
from synpo_assets.evaluation.instruction_following import following_metrics
from synpo_assets.graph.evaluation_schemas import InstructionFollowing, VerifiableInstructions
from synpo_assets.graph.metrics import Metric, recorded
from synpo_assets.graph.tables import check
from synpo_assets.method.cut import first_half, whole_sentences
from synpo_assets.method.damage import all_damages
from synpo_assets.method.evaluation import LENGTH_BANDS, length_bands, mean_gain, points_over_null
from synpo_assets.method.outcomes import NO_VERDICT
from synpo_assets.method.rules import ALONE, COMPARING, COUNTING, RULES, constraints_problem, meets, read_constraints
from synpo_assets.method.verifiable import as_brief, first_sentence, rates_by_rule
from synpo_assets.stages.seed import seed_table, verifiable_table
from tests.nano import seed_rows, write_settings
from tests.stand_ins import services_in

# For each rule an answer that meets it and one that does not; several where the border matters.
CASES = [
    ("words_at_most", "3", "Three - short words!", "These are four words"),
    ("words_at_least", "3", "Three short words", "Two words"),
    ("sentences_at_most", "1", 'He said "Pi is 3.14."', "One. Two"),
    ("sentences_at_most", "2", "Is it? Yes!", "One. Two. Three."),
    ("sentences_at_most", "1", "Dr. Smith paid 3.5 dollars, e.g. for tea.", "He said “Go.” Then he left."),
    ("lines_exactly", "2", "one\n\ntwo", "one"),
    ("dashes_exactly", "2", "Here:\n- one\n\u2013two", "- one\n- two\n- three"),
    ("dashes_exactly", "2", "- **one**\n- two\n---", "1. one\n* two"),
    ("question_marks_exactly", "1", "Why?", "Why? How?"),
    ("contains", "salt", "Salt, of course.", "The salty sea"),
    ("avoids", "sand", "A sandy beach", "Sand."),
    ("avoids_text", ",", "No pause", "A pause, here"),
    ("starts_with", "yes", '"Yes, they can."', "Well, yes"),
    ("starts_with", "Yes!", "Yes, they can.", "Yesterday I ate"),
    ("ends_with", "safe travels", "Go well. Safe travels!", "Safe travels, friend"),
    ("ends_with", "The end!", "So it was. *The End.*", "It may bend. On the weekend"),
    ("is_one_of", "yes|no", "No.", "Maybe"),
    ("is_one_of", "My answer is yes.|My answer is no.", "My answer is yes.", "My answer is maybe."),
    ("is_one_of", "Yes! | No! |?", "no", "!"),
    ("all_lowercase", "", "all small.", "Not all"),
    ("all_uppercase", "", "LOUD 1!", "LOUD but not"),
    ("in_quotes", "", '"Good day."', 'He said "hi"'),
    ("json_object_with", "a", '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("json_object_with", "a", '{"b": 2, "a": null}', '["a"]'),
    ("json_list_of", "2", "[1, 2]", "[1, 2, 3]"),
    ("json_list_of", "2", "[{}, {}]", '{"a": 1, "b": 2}'),
    ("json_list_of", "1", "[[1]]", "[" * 100_000),
    ("numbered_exactly", "2", "So:\n1. one\n 2) two", "1. one\n2. two\n3. three"),
    ("numbered_exactly", "2", "1. in 2024\n2. two", "2. two\n1. one"),
    ("comma_items_exactly", "3", "salt, oil, bread", "salt, oil and bread"),
    ("comma_items_exactly", "2", "salt, oil", "salt,\noil"),
    ("in_order", "ant|bee|cat", "Ant, then bee.\nThe cat!", "bee, ant, cat"),
    ("in_order", "ant|bee", "ant bee", "ants, bees"),
    # Not by trying all ways to choose the places.
    ("in_order", "|".join("a" * 30), "a " * 30, "a " * 29 + "b " * 9_000),
    # Marks and words of other scripts.
    ("sentences_at_most", "1", "今天天气很好。", "今天天气很好。我们去公园吧\uff01"),
    ("sentences_at_most", "1", "मैं घर जाता हूँ।", "मैं घर जाता हूँ। वह आता है।"),
    ("sentences_at_most", "1", "أين أنت؟", "أين أنت؟ أنا هنا."),
    ("question_marks_exactly", "1", "你好吗\uff1f", "你好。"),
    ("question_marks_exactly", "1", "أين أنت؟", "أنا هنا."),
    ("comma_items_exactly", "3", "苹果、梨\uff0c李子", "苹果\uff0c梨"),
    ("numbered_exactly", "2", "1、苹果\n2、梨", "1、苹果\n3、梨"),
    ("numbered_exactly", "2", "\u0661. تفاح\n٢. كمثرى", "\u0661. تفاح"),
    # Texts that are marks, or have some at their ends.
    ("contains", "%", "5% of it", "five percent"),
    ("contains", "5%", "Some 5%", "Some 15%"),
    ("contains", "?", "Is it so?", "It is so."),
    ("avoids", ",", "One and two.", "One, two."),
    ("avoids", "!", "Great.", "Great!"),
    ("avoids", "#", "title", "#title"),
    ("starts_with", "*", "* pears", "- pears"),
    ("ends_with", "?", "Is it so?", "It is so."),
    ("ends_with", "...", "And so on...", "And so on."),
    ("is_one_of", "?|!", "?", "."),
    ("in_order", ",|!", "One, two!", "One! two,"),
    ("contains", "苹果", "我爱苹果。", "我爱水果。"),
    ("contains", "काम", "यह काम है।", "यह कामना है।"),
    ("contains", "हिन्द", "जय हिन्द!", "हिन्दी"),
    ("avoids", "糖", "没有盐。", "没有糖。"),
    ("starts_with", "是", "「是的\uff0c可以。」", "不是。"),
    ("starts_with", "Claro", "¡Claro que sí!", "Sí, claro"),
    ("ends_with", "再见", "我走了\uff0c再见。", "再见\uff0c我走了。"),
    ("is_one_of", "是|否", "是。", "也许。"),
    ("in_quotes", "", "「早上好」", "他说「好」"),
    ("in_quotes", "", "« Bonjour »", "Bonjour"),
    ("in_order", "盐|糖", "先放盐再放糖", "先放糖再放盐"),
]


@pytest.mark.parametrize(("rule", "value", "good", "bad"), CASES)
def test_a_rule_tells_good_from_bad(rule, value, good, bad):
    assert meets(rule, value, good)
    assert not meets(rule, value, bad)


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_answer_meets_nothing(rule):
    assert not meets(rule, "1", " \n")


def test_every_rule_has_a_case():
    assert {rule for rule, *_ in CASES} == RULES.keys()


@pytest.mark.parametrize(("rule", "value", "read"), [
    ("in_order", "a | b", "a|b"), ("is_one_of", " yes | no ", "yes|no"), ("contains", " apple ", "apple"),
    ("contains", "a | b", "a | b"),
    ("json_object_with", " a", "a"), ("words_at_most", 3, "3"), ("avoids_text", ", ", ", "), ("in_quotes", None, ""),
])  # fmt: skip
def test_blanks_around_a_value_do_not_count(rule, value, read):
    assert constraints_problem([{"rule": rule, "value": value}]) is None
    assert read_constraints([{"rule": rule, "value": value}]) == [{"rule": rule, "value": read}]


def test_a_value_of_blanks_alone_is_none():
    assert "needs a text" in constraints_problem([{"rule": "contains", "value": "  "}])


def test_the_difference_has_an_interval_and_rules_are_shown_apart():
    constraints = [{"rule": "contains", "value": "a"}, {"rule": "json_list_of", "value": "3"}]
    answered = pl.DataFrame(
        {
            "prompt_id": [str(place) for place in range(20)],
            "template": [str(place) for place in range(20)],
            "constraints": [constraints] * 20,
            # A list of three, in which there is an a, is what no other prompt is.
            "prompt": ['["a", "b", "c"]'] + ["Write a list."] * 19,
            "sample": 1,
            # Of M_t's answers one would do for every prompt, and none of M_0's would if it were shorter.
            "candidate_response": ['["a", "b", "c"]'] + ["A word."] * 19,
            "initial_response": ["No. And a word more."] * 20,
            "candidate_met": [[True, True]] * 15 + [[True, False]] * 5,
            "initial_met": [[True, True]] * 5 + [[False, True]] * 15,
        }
    )
    *rates, gain, over_prompt, over_sentence, over_brief, over_another = [
        each for each in following_metrics(answered, "sha")[1:] if each.by is None
    ]
    assert [(rate.metric, rate.of, rate.value) for rate in rates] == [
        ("verifiable_rate", "candidate", 0.75), ("verifiable_rate", "initial", 0.25),
        ("verifiable_rate", "prompt_as_answer", 0.05), ("verifiable_rate", "first_sentence", 0.0),
        ("verifiable_rate", "as_brief", 0.0), ("verifiable_rate", "another_answer", 0.05),
        ("constraint_rate", "candidate", 0.875), ("constraint_rate", "initial", 0.625),
    ]  # fmt: skip
    assert gain == Metric(
        "verifiable_gain", 0.5, "candidate", "initial", low=gain.low, high=gain.high, n=20, checkpoint_sha="sha"
    )
    assert 0.2 < gain.low < 0.5 < gain.high < 0.8
    nulls = [over_prompt, over_sentence, over_brief, over_another]
    assert [(each.over, each.value) for each in nulls] == [
        ("prompt_as_answer", pytest.approx(0.7)), ("first_sentence", 0.75), ("as_brief", 0.75), ("another_answer", 0.7),
    ]  # fmt: skip
    assert all(0.4 < each.low < each.value < each.high <= 1 for each in nulls)
    # Of two templates one is learned and the other not: that says nothing of a third, and hardly more if there are six.
    for templates in (["other"] * 5 + ["one"] * 10 + ["other"] * 5, list("abcdef" * 3 + "ab")):
        of_few = answered.with_columns(template=pl.Series(templates))
        of_templates = next(each for each in following_metrics(of_few, "sha") if each.metric == "verifiable_gain")
        assert (of_templates.value, of_templates.n) == (0.5, len(set(templates)))
        interval = (of_templates.low, of_templates.high)
        assert interval == (None, None) if len(set(templates)) == 2 else 0 < interval[0] < 0.5 < interval[1] < 1
    assert rates_by_rule(answered).rows() == [("contains", 20, 1.0, 0.25), ("json_list_of", 20, 0.75, 1.0)]
    of_rules = [each for each in following_metrics(answered, "sha") if each.by is not None]
    assert [(each.metric, each.of, each.by, each.value, each.n) for each in of_rules] == [
        ("rule_rate", "candidate", "contains", 1.0, 20), ("rule_rate", "initial", "contains", 0.25, 20),
        ("rule_rate_gain", "candidate", "contains", 0.75, 20), ("rule_rate", "candidate", "json_list_of", 0.75, 20),
        ("rule_rate", "initial", "json_list_of", 1.0, 20), ("rule_rate_gain", "candidate", "json_list_of", -0.25, 20),
    ]  # fmt: skip


@pytest.mark.parametrize("of", [".", "\n", " ", "1", "?", "\u3002", '"', "-", ". ", "a", "\u0301", "[", "|", ","])
def test_an_answer_that_repeats_one_mark_takes_no_rule_long(of):
    values = dict.fromkeys(COUNTING, "2") | dict.fromkeys(COMPARING, "a|b") | dict.fromkeys(ALONE, "")
    for text in (of * 50_000 + "x", f"```\n{of * 50_000}x"):
        began = time.process_time()
        for rule, value in values.items():
            meets(rule, value, text)
        for helper in (first_sentence, whole_sentences, first_half):
            helper(text)
        as_brief(text, 3)
        assert time.process_time() - began < 3


def test_a_number_that_is_no_count_is_read_as_text():
    assert not meets("numbered_exactly", "2", f"{'1' * 5_000}. one\n2. two")
    assert all_damages(f"Wait {'9' * 5_000} minutes. Then go.\n{'1' * 5_000}. Tea", "Other.", seed=0)


def test_without_instructions_the_metrics_are_missing():
    empty = InstructionFollowing.empty()
    count, *found = following_metrics(empty, "sha")
    assert count.value == 0
    assert {(metric.value, metric.low, metric.high) for metric in found} == {(None, None, None)}


BAD_INSTRUCTIONS = [
    ({"prompt": "", "constraints": []}, "the prompt is empty"),
    ({"prompt": "Say hi."}, "`constraints` is no list, or empty"),
    ({"prompt": "Say hi.", "constraints": ["short"]}, "a constraint is no object with a `rule`"),
    ({"prompt": "Say hi.", "constraints": [{"rule": "shorter"}]}, "there is no rule `shorter`"),
    ({"prompt": "Say hi.", "constraints": [{"rule": "words_at_most"}]}, "needs a whole number as value, not None"),
    ({"prompt": "Say hi.", "constraints": [{"rule": "words_at_most", "value": "²"}]}, "needs a whole number as value"),
    ({"prompt": "Say hi.", "constraints": [{"rule": "contains", "value": ""}]}, "needs a text as value"),
    (
        {"prompt": "Say hi.", "constraints": [{"rule": "contains", "value": "a" * 1_001}]},
        "is longer than 1,000 characters",
    ),
    (
        {"prompt": "Say \0.", "constraints": [{"rule": "words_at_most", "value": 1}]},
        "the prompt holds the character NUL",
    ),
    ({"prompt": "Say \ud83d.", "constraints": [{"rule": "words_at_most", "value": 1}]}, "half of a surrogate pair"),
    ({"prompt": "Say \ufdd0.", "constraints": [{"rule": "words_at_most", "value": 1}]}, "holds U+FDD0"),
    (b'{"prompt": "caf\xe9"}', "the line is no JSON object in UTF-8"),
]


def with_instructions(tmp_path, *rows, **more):
    file = tmp_path / "instructions.jsonl"
    file.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    seed = {"verifiable": {"path": "instructions.jsonl"}} | more
    return load_settings(write_settings(tmp_path / "mine.yaml", {"preset": "laptop", "seed_data": seed}))


@pytest.mark.parametrize(("row", "reason"), BAD_INSTRUCTIONS)
def test_a_bad_instruction_is_refused_with_its_line(tmp_path, row, reason):
    good = {"prompt": "Say a word.", "constraints": [{"rule": "words_at_most", "value": 1}]}
    settings = with_instructions(tmp_path, good, row)
    with pytest.raises(SettingsError, match=r"seed_data\.verifiable") as refused:
        verifiable_table(settings)
    assert "line 2" in str(refused.value)
    assert reason in str(refused.value)
    kept, dropped = verifiable_table(with_instructions(tmp_path, good, row, on_bad_rows="drop"))
    assert kept["prompt"].to_list() == ["Say a word."]
    assert [row.line for row in dropped] == [2]


def test_where_no_instruction_is_left_the_file_is_refused_even_if_bad_rows_are_dropped(tmp_path):
    with pytest.raises(
        SettingsError, match=r"line 1: the prompt is empty\). Correct the file, in which no other is left"
    ):
        verifiable_table(with_instructions(tmp_path, BAD_INSTRUCTIONS[0][0], on_bad_rows="drop"))
    with pytest.raises(
        SettingsError, match=r"None of the first 1 rows of .* \(seed_data.verifiable\) is a JSON object"
    ):
        verifiable_table(with_instructions(tmp_path, b"caf\xe9", on_bad_rows="drop"))


def test_training_prompts_that_overlap_with_an_instruction_are_refused_or_dropped(tmp_path):
    laptop = load_settings(write_settings(tmp_path / "x.yaml", {"preset": "laptop"}))
    prompts = seed_table(laptop)[0].filter(split="train").sort(pl.col("prompt").str.len_chars())["prompt"]
    constraints = [{"rule": "json_list_of", "value": 3}]
    instructions = [{"prompt": text, "constraints": constraints} for text in (prompts[0], f"In JSON: {prompts[-1]}")]
    settings = with_instructions(tmp_path, *instructions)
    with pytest.raises(SettingsError, match=r"2 seed rows cannot be used") as refused:
        seed_table(settings)
    said = str(refused.value)
    assert f"it has the words of the verifiable instruction {prompts[0][:80]!r}" in said
    assert "words in a row (prompt_generator.decontamination_ngram) with the verifiable instruction 'In JSON: " in said
    assert f"and {tmp_path / 'instructions.jsonl'}, or set seed_data.on_bad_rows" in said
    assert "held-out prompt" not in said
    seed = settings.seed_data.model_copy(update={"on_bad_rows": "drop"})
    kept, dropped = seed_table(settings.model_copy(update={"seed_data": seed}))
    assert len(dropped) == 2
    assert not {prompts[0], prompts[-1]} & set(kept["prompt"])


def instruction(number, **stated):
    """An instruction like no other, and what its row states."""
    return {"prompt": f"Say {'word ' * number}", "constraints": [{"rule": "words_at_most", "value": number}]} | stated


def test_instructions_keep_the_split_that_they_state(tmp_path):
    rows = [instruction(1, split="test"), instruction(2, split="dev"), instruction(3, split="test"), instruction(4)]
    table = verifiable_table(with_instructions(tmp_path, *rows))[0]
    assert table["split"].to_list()[:3] == ["test", "dev", "test"]
    assert table["split"].to_list()[3] in ("dev", "test")


@pytest.mark.parametrize(("rows", "reason"), [
    ([instruction(1, split="train"), instruction(2)], r"verifiable line 1: its `split` is 'train' and not dev or test"),
    ([instruction(1, split="dev", template="list/1"), instruction(2, split="test", template="list/1")],
     r"dev line 1: its template 'list/1' is also that of a test instruction"),
])  # fmt: skip
def test_a_wrong_split_and_a_template_of_both_splits_are_named(tmp_path, rows, reason):
    with pytest.raises(SettingsError, match=reason):
        verifiable_table(with_instructions(tmp_path, *rows))


def test_a_template_may_be_whatever_json_holds(tmp_path):
    rows = [instruction(1, split="dev", template=["list", 1]), instruction(2, split="test", template=["list", 1])]
    with pytest.raises(SettingsError, match=r"its template \['list', 1\] is also that of a test instruction"):
        verifiable_table(with_instructions(tmp_path, *rows))


def test_instructions_of_one_template_are_drawn_into_one_split(tmp_path):
    rows = [instruction(number, template=f"list/{number % 4}") for number in range(1, 41)]
    table = verifiable_table(with_instructions(tmp_path, *rows))[0]
    dev, test = (set(table.filter(split=split)["template"]) for split in ("dev", "test"))
    assert dev
    assert test
    assert dev.isdisjoint(test)


def test_a_template_that_all_share_does_not_keep_them_together(tmp_path):
    rows = [instruction(number, template="chat") for number in range(1, 9)]
    assert verifiable_table(with_instructions(tmp_path, *rows))[0]["split"].unique().sort().to_list() == ["dev", "test"]


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("seed", range(4))
def test_an_instruction_goes_where_another_one_of_its_template_is_stated_to(tmp_path, seed, split):
    rows = [instruction(1, template="a", split=split), *(instruction(number, template="a") for number in (2, 3))]
    others = [instruction(number) for number in range(4, 9)]
    settings = with_instructions(tmp_path, *rows, *others).model_copy(update={"random_seed": seed})
    table = verifiable_table(settings)[0]
    assert table["split"].to_list()[:3] == [split] * 3
    assert set(table["split"].to_list()) == {"dev", "test"}


@pytest.mark.parametrize("template", ["list/1", "", " ", 1, ["list", 1], "\ud800", False])
def test_instructions_of_one_template_are_one_group_whatever_names_it(tmp_path, template):
    rows = [instruction(number, split="test", template=template) for number in (1, 2)]
    alone = [instruction(number, split="test") for number in (3, 4)]
    frame, _ = verifiable_table(with_instructions(tmp_path, *rows, *alone, instruction(5, split="dev")))
    assert check(VerifiableInstructions, frame) is None
    assert frame.filter(split="test")["template"].n_unique() == 3


def test_a_seed_row_made_of_the_template_of_an_instruction_is_named(tmp_path):
    rows = [json.dumps(row | {"template": f"list/{place}"}) for place, row in enumerate(seed_rows())]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    of_a_template = instruction(1, split="dev", template="list/1")
    settings = with_instructions(tmp_path, of_a_template, train={"path": "train.jsonl"})
    with pytest.raises(
        SettingsError, match=r"train line 2: its template 'list/1' is also that of a verifiable instruction"
    ):
        seed_table(settings)


def test_no_instructions_are_no_error(tmp_path):
    settings = load_settings(
        write_settings(tmp_path / "mine.yaml", {"preset": "laptop", "seed_data": {"verifiable": None}})
    )
    assert verifiable_table(settings)[0].is_empty()


def test_the_likelihood_is_what_transformers_calls_the_loss_of_the_text_and_of_the_end_of_turn(nano_checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    from resources.models.chat import answer_ids, end_of_turn_id, load_tokenizer, prompt_ids

    rows = [
        ("Why?", "Because it is so."),
        ("Name a colour that you like.", "Blue"),
        ("Why?", "No reason at all, really."),
    ]
    # Small batches too: each row is padded differently.
    alone = AnswerLikelihood(engine=Engine(threads=1, batch_tokens=64, dtype="float32")).measure(nano_checkpoint, rows)
    found = AnswerLikelihood(engine=Engine(threads=1, dtype="float32")).measure(nano_checkpoint, rows)
    assert found.per_token == pytest.approx(alone.per_token, abs=1e-5)
    assert found.end == pytest.approx(alone.end, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(nano_checkpoint.weights)
    tokenizer = load_tokenizer(nano_checkpoint.weights)
    for (prompt, answer), per_token, end in zip(rows, found.per_token, found.end, strict=True):
        messages = [{"role": "user", "content": prompt}]
        asked = prompt_ids(tokenizer, messages)
        text = answer_ids(tokenizer, messages, answer, finished=False)
        closing = [end_of_turn_id(tokenizer)]
        parts = [
            (per_token, [-100] * len(asked) + text + [-100]),
            (end, [-100] * len(asked + text) + closing),
        ]
        for measured, labels in parts:
            with torch.inference_mode():
                loss = model(input_ids=torch.tensor([asked + text + closing]), labels=torch.tensor([labels])).loss
            assert measured == pytest.approx(-float(loss), abs=1e-4)


def compared_with_gold(*rows):
    """Rows of M_t's and M_0's similarity and ratio of length; the likelihoods are those of a model that learned to stop."""
    columns = ("candidate_similarity", "initial_similarity", "candidate_length_ratio", "initial_length_ratio")
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.Float64), orient="row").with_columns(
        candidate_log_likelihood=-2.0, initial_log_likelihood=-2.0,
        candidate_other_log_likelihood=-4.0, initial_other_log_likelihood=-4.0,
        candidate_end_log_likelihood=-0.5, initial_end_log_likelihood=-3.0,
        answer=pl.Series([f"gold {row}" for row in range(len(rows))], dtype=pl.String),
    )  # fmt: skip


def test_a_model_that_only_learned_to_end_its_turn_gains_nothing_on_the_text():
    found = {metric.metric: metric for metric in gold_metrics(compared_with_gold((0.5, 0.5, 1.0, 1.0)), "sha")}
    assert found["gold_log_likelihood_gain"].value == 0
    gain = found["gold_end_log_likelihood_gain"]
    assert (gain.of, gain.over, gain.value, gain.low, gain.high) == ("candidate", "initial", 2.5, None, None)
    assert (gain.n, gain.checkpoint_sha) == (1, "sha")


def test_what_a_model_learned_of_the_style_of_gold_alone_is_no_gain_beyond_the_null():
    frame = compared_with_gold(*[(0.5, 0.5, 1.0, 1.0)] * 6)
    styled = frame.with_columns(candidate_log_likelihood=-1.5, candidate_other_log_likelihood=-3.5)
    expected = {"gold_log_likelihood_gain": 0.5, "other_gold_log_likelihood_gain": 0.5,
                "gold_log_likelihood_gain_beyond_other": 0.0}  # fmt: skip
    found = {metric.metric: metric for metric in gold_metrics(styled, "sha")}
    assert {name: found[name].value for name in expected} == expected
    learned = styled.with_columns(candidate_other_log_likelihood=pl.Series([-4.0, -4.5, -3.5] * 2))
    gain = {metric.metric: metric for metric in gold_metrics(learned, "sha")}["gold_log_likelihood_gain_beyond_other"]
    assert (gain.of, gain.over, gain.value, gain.n, gain.checkpoint_sha) == ("candidate", "initial", 0.5, 6, "sha")
    assert gain.low < 0.5 < gain.high


def test_gold_of_another_prompt_is_of_the_same_split_and_one_prompt_alone_has_none():
    held_out = pl.DataFrame({"split": ["test", "dev", "test", "dev", "test"], "answer": ["a", "b", "c", "d", "e"]})
    assert held_out.with_columns(other=OTHER_ANSWER)["other"].to_list() == ["e", "d", "a", "b", "c"]
    alike = compared_with_gold(*[(0.5, 0.5, 1.0, 1.0)] * 3).with_columns(answer=pl.lit("yes"))
    for frame in (compared_with_gold((0.5, 0.5, 1.0, 1.0)), alike):
        measured = {each.metric for each in gold_metrics(frame, "sha")}
        assert not {"other_gold_log_likelihood_gain", "gold_log_likelihood_gain_beyond_other"} & measured


def test_likeness_that_rose_with_length_alone_has_not_risen_in_any_band():
    short, alike = LENGTH_BANDS[:2]
    # M_0 answers half of the prompts far too briefly; M_t answers those at gold's length, and nothing else is another.
    frame = compared_with_gold((0.75, 0.25, 1.0, 0.4), (0.75, 0.75, 2.0, 0.5), (0.25, 0.25, 0.1, 0.1))
    found = [metric for metric in gold_metrics(frame, "sha") if metric.metric.startswith("gold_similarity")]
    overall = {(metric.metric, metric.of): metric.value for metric in found if metric.by is None}
    assert overall["gold_similarity", "candidate"] > overall["gold_similarity", "initial"]
    assert overall["gold_similarity_gain", "candidate"] > 0
    assert [(metric.by, metric.metric, metric.of, metric.value, metric.n) for metric in found if metric.by] == [
        (short, "gold_similarity", "candidate", 0.25, 1), (short, "gold_similarity", "initial", 0.25, 2),
        (short, "gold_similarity_gain", "candidate", 0.0, 1),
        (alike, "gold_similarity", "candidate", 0.75, 2), (alike, "gold_similarity", "initial", 0.75, 1),
        (alike, "gold_similarity_gain", "candidate", 0.0, 1),
    ]  # fmt: skip


def test_a_band_without_answers_has_no_row():
    found = [metric for metric in gold_metrics(compared_with_gold((0.5, 0.5, 3.0, 1.0)), "sha") if metric.by]
    assert [(metric.by, metric.metric, metric.of) for metric in found] == [
        (LENGTH_BANDS[1], "gold_similarity", "initial"), (LENGTH_BANDS[2], "gold_similarity", "candidate")
    ]  # fmt: skip


def test_the_bounds_belong_to_the_middle_band():
    ratios = {0.0: 0, 0.4999: 0, 0.5: 1, 1.0: 1, 2.0: 1, 2.0001: 2}
    assert length_bands(pl.Series(list(ratios))).to_list() == [LENGTH_BANDS[place] for place in ratios.values()]


def test_both_models_are_measured_in_each_iteration(nano_run):
    settings = load_settings(nano_run.home / "settings.yaml")
    services = services_in(nano_run.home, settings)
    tables = services.tables
    assert tables.scan("verifiable_instructions").collect().height == settings.seed_data.verifiable_limit
    for key in ("0001", "0002"):
        following, gold = tables.read("instruction_following", key), tables.read("gold_comparison", key)
        evaluated, metrics = tables.read("evaluation", key), recorded(services.metrics, key)
        assert (
            following["candidate_checkpoint_sha"].unique().to_list()
            == evaluated["candidate_checkpoint_sha"].unique().to_list()
        )
        for row in following.to_dicts():
            for side in ("candidate", "initial"):
                expected = [meets(each["rule"], each["value"], row[f"{side}_response"]) for each in row["constraints"]]
                assert row[f"{side}_met"] == expected
        assert metrics.value("instructions") * metrics.value("samples_each") == following.filter(split="test").height
        rate = following.filter(split="test")["candidate_met"].list.all().mean()
        assert metrics.value("verifiable_rate", "candidate") == pytest.approx(rate)
        gain = metrics.find("verifiable_gain", "candidate", over="initial")
        # Models of this size may follow the same instructions, and then there is no interval.
        assert gain.low is None or gain.low <= gain.value <= gain.high
        assert gold["prompt_id"].to_list() == evaluated["prompt_id"].to_list()
        assert gold["candidate_similarity"].is_between(-1.001, 1.001).all()
        assert (
            gold["initial_log_likelihood"].to_list()
            == tables.read("gold_comparison", "0001")["initial_log_likelihood"].to_list()
        )
        gold, evaluated = gold.filter(split="test"), evaluated.filter(split="test")
        after, before = (metrics.value("gold_log_likelihood", side) for side in ("candidate", "initial"))
        assert after == pytest.approx(gold["candidate_log_likelihood"].mean())
        gain = metrics.find("gold_log_likelihood_gain", "candidate", over="initial")
        assert gain.value == pytest.approx(after - before, abs=1e-8)
        # Of three prompts there is no interval.
        assert (gold.height, gain.low, gain.high) == (3, None, None)
        other = metrics.find("other_gold_log_likelihood_gain", "candidate", over="initial")
        expected = (gold["candidate_other_log_likelihood"] - gold["initial_other_log_likelihood"]).mean()
        assert other.value == pytest.approx(expected, abs=1e-8)
        beyond = metrics.find("gold_log_likelihood_gain_beyond_other", "candidate", over="initial")
        assert beyond.value == pytest.approx(gain.value - other.value, abs=1e-8)
        assert gold.filter(pl.col("candidate_log_likelihood") == pl.col("candidate_other_log_likelihood")).is_empty()
        gain = metrics.find("gold_end_log_likelihood_gain", "candidate", over="initial")
        expected = (gold["candidate_end_log_likelihood"] - gold["initial_end_log_likelihood"]).mean()
        assert gain.value == pytest.approx(expected, abs=1e-8)
        gain = metrics.find("gold_similarity_gain", "candidate", over="initial")
        assert gain.value is not None
        for side in ("candidate", "initial"):
            in_bands = [each for each in metrics.every("gold_similarity") if each.of == side and each.by]
            assert sum(each.n for each in in_bands) == gold.height
            lengths = evaluated[f"{side}_response"].str.len_chars() / evaluated["answer"].str.len_chars()
            assert gold[f"{side}_length_ratio"].to_list() == lengths.to_list()


def test_answers_of_another_checkpoint_are_refused(nano_checkpoint):
    evaluation = pl.DataFrame({"candidate_checkpoint_sha": ["f" * 64]})
    with pytest.raises(Exception, match="materialize `evaluation` of this iteration again"):
        refuse_answers_of_another(nano_checkpoint, evaluation)


@pytest.mark.parametrize("templates", [6, 10, 45])
def test_the_interval_of_a_gain_covers_that_of_other_templates(templates):
    """Instructions of one template are followed, or not, together; a bootstrap over ten of them covers 87 %."""
    draw, covered, tries = random.Random(templates), 0, 400
    for _ in range(tries):
        values, groups = [], []
        for template in range(templates):
            true = draw.gauss(0.2, 0.3)
            values += [true + draw.gauss(0, 0.2) for _ in range(draw.randint(2, 14))]
            groups += [template] * (len(values) - len(groups))
        _, low, high = mean_gain(pl.Series(values), pl.Series(groups))
        covered += low <= 0.2 <= high
    assert 0.91 <= covered / tries <= 0.99


def test_a_null_is_beaten_over_the_prompts_of_both_alone():
    frame = pl.DataFrame({
        "prompt_id": list("abcdd"), "judge_over_initial": ["win", "win", NO_VERDICT, "loss", "tie"],
        "judge_trimmed_over_initial": ["win", NO_VERDICT, "win", "win", "loss"],
    })  # fmt: skip
    assert points_over_null(frame, "judge", "trimmed").rows() == [("a", 0.0), ("d", -1.0), ("d", 0.5)]
