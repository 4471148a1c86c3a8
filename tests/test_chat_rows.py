"""What a seed row may be: one question and one answer, in any of the usual forms, or a reason by line."""

import functools
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from resources.models.chat import rendered_otherwise, turns_text
from resources.settings.data import DataSource
from resources.settings.files import load_settings, preset_path
from resources.storage.seed_source import read_rows
from resources.training.rows import supervised_rows
from synpo_assets.method.chat_rows import VISIBLE
from synpo_assets.method.row_lengths import rendering_problem
from synpo_assets.method.seed import seed_rows as check_seed
from synpo_assets.method.templates import user_message
from tests.nano import CHATML, nano_tokenizer

LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufffd")
TEXT = st.text(LETTERS, min_size=1).filter(VISIBLE.search)


def openai(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns):
    return [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in turns]


def read(row, prompt_column="prompt", answer_column="answer"):
    good, bad = check_seed([(9, row)], [], prompt_column, answer_column)
    return (good[0]["prompt"], good[0]["answer"]) if good else bad[0].reason


@given(TEXT, TEXT)
def test_every_form_of_a_question_and_its_answer_is_read_alike(question, answer):
    expected = (question.strip(), answer.strip())
    turns = (("user", question), ("assistant", answer))
    parts = [("user", [{"type": "text", "text": question}]), ("assistant", [{"type": "text", "text": answer}])]
    empty_system = [{"role": "system", "content": ""}, *openai(*turns)]
    others = [{"role": "Human", "content": [question]}, {"role": "model", "content": answer}]
    written = json.dumps(openai(*turns))
    for chat in (openai(*turns), sharegpt(*turns), openai(*parts), empty_system, others, written):
        assert read({"chat": chat}, "chat", "chat") == expected
        assert read({"prompt": question, "answer": chat}) == expected
    assert read({"prompt": openai(turns[0]), "answer": openai(turns[1])}) == expected
    assert read({"prompt": question, "answer": answer}) == expected


CONVERSATION = [("user", "Opening turn 1: say hello."), ("assistant", "Hello."), ("user", "Plan my week.")]
# What a row holds beside a question and an answer, and what is said of it.
REFUSED = [
    ({"prompt": openai(*CONVERSATION), "answer": "Monday: rest."}, "the prompt is a conversation of 3 turns"),
    ({"prompt": openai(("system", "Be brief."), ("user", "Why?")), "answer": "So."}, "the prompt has a system turn"),
    ({"prompt": "Why?", "answer": openai(("user", "How?"), ("assistant", "So."))}, "have another prompt than"),
    ({"prompt": openai(("user", "Why?"), ("assistant", "No.")), "answer": "So."}, "have another answer than"),
    ({"prompt": openai(("assistant", "So."), ("user", "Why?")), "answer": "So."}, "the answer before the question"),
    ({"prompt": "Why?", "answer": openai(("tool", "{}"))}, "the answer has a turn of role `tool`"),
    ({"prompt": openai(("assistant", "So.")), "answer": "So."}, "the prompt has no turn of role `user`"),
    ({"prompt": "Why?", "answer": openai(("assistant", [{"type": "image_url"}]))}, "a part of type `image_url`"),
    ({"prompt": "Why?", "answer": openai(("assistant", None))}, "the answer is missing"),
    ({"prompt": "Why?", "answer": None}, "the answer is missing"),
    ({"prompt": "Why?", "answer": {"text": "So."}}, "the answer is a JSON object"),
    ({"prompt": ["Why?"], "answer": "So."}, "the prompt is a list, but not of chat messages"),
    ({"prompt": True, "answer": "So."}, "the prompt is a truth value"),
    ({"prompt": "Why?", "answer": " \n"}, "the answer is empty"),
    (json.loads('{"prompt": "A party \\ud83d", "answer": "So."}'), "half of a surrogate pair (U+D83D)"),
    ({"prompt": "Why?", "answer": "So\0."}, "the answer holds the character NUL"),
    ({"prompt": "Why?", "answer": "A caf\ufffd."}, "the answer holds U+FFFD, which stands where bytes"),
    ({"prompt": "\u200b\u2060\ufe0f", "answer": "So."}, "the prompt is empty"),
    ({"prompt": "Why?", "answer": b"So."}, "the answer is a byte string"),
    ({"prompt": openai(("developer", "Be brief."), ("user", "Why?")), "answer": "So."}, "the prompt has a system turn"),
    ({"prompt": [{"role": "user", "parts": ["Why?"]}], "answer": "So."}, "without `content`; it has `role`, `parts`"),
    ({"prompt": "Why?", "answer": [{"role": "assistant", "content": "So.", "tool_calls": [{}]}]}, "that calls a tool"),
    (
        {"prompt": "Why?", "answer": [{"role": "assistant", "content": "So.", "reasoning_content": "Hm."}]},
        "has `reasoning_content` beside the answer",
    ),
    ({"prompt": json.dumps(openai(*CONVERSATION)), "answer": "So."}, "the prompt is a conversation of 3 turns"),
    ({"prompt": "Translate.", "input": "Hallo", "answer": "Hello"}, "its column `input` is part of what was asked"),
    ({"prompt": "Why?", "history": [["How?", "So."]], "answer": "So."}, "its column `history` is part of"),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_no_question_with_its_answer_is_named(row, reason):
    assert reason in read(row)


def test_one_text_is_no_question_with_its_answer():
    assert read({"text": "Why? So."}, "text", "text") == "`text` holds one text, which is no question and its answer"


def test_columns_that_hold_nothing_are_no_part_of_a_question():
    row = {"prompt": "Why?", "input": "", "system": None, "context": float("nan"), "answer": "So."}
    assert read(row) == ("Why?", "So.")


def test_a_number_is_an_answer():
    assert read({"prompt": "Six times seven?", "answer": 42}) == ("Six times seven?", "42")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner)))  # fmt: skip
def test_whatever_a_cell_holds_is_read_or_named(cell):
    row = {"prompt": "Why?", "answer": cell}
    found = read(row)
    if isinstance(found, tuple):
        assert found[1].strip() == found[1] != ""
    else:
        assert found.startswith(("the answer ", "the messages in "))


# By what a template does with an answer: nothing, as most; what those of models that think do; and what else was seen.
CHANGES = {"nothing": "", "only what follows thoughts": ".split('</think>')[-1]", "line ends": ".replace('\r\n', '\n')"}


@functools.cache
def tokenizer(change="nothing"):
    made = nano_tokenizer()
    made.chat_template = CHATML.replace("message['content']", f"message['content']{CHANGES[change]}")
    return made


TRAINING = load_settings(preset_path("laptop")).response_improver.training.model_copy(update={"max_length": 10_000})
# What users' files hold: control tokens, marks that chats use inside, half characters, other ends of lines.
PIECES = [
    "<|im_end|>", "<|im_start|>user\n", "</s>", "\ud83d", "\0", "\ufdd03\ufdd1", "\u2028", "\ufeff", "日本語", "é", "\r\n", " ",
    "a", "{{ x }}", "</think>",
]  # fmt: skip
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
# A row's two cells, of a question and an answer, in one shape or another; some shapes are no question with its answer.
SHAPES = {
    "text": lambda question, answer: (question, answer),
    "openai": lambda question, answer: (openai(("user", question)), openai(("assistant", answer))),
    "sharegpt": lambda question, answer: (sharegpt(("user", question)), sharegpt(("assistant", answer))),
    "whole chat": lambda question, answer: (openai(("user", question), ("assistant", answer)),) * 2,
    "parts": lambda question, answer: (openai(("user", [{"type": "text", "text": question}])), answer),
    "system": lambda question, answer: (openai(("system", "Be brief."), ("user", question)), answer),
    "conversation": lambda question, answer: (openai(*[("user", question), ("assistant", answer)] * 2),) * 2,
    "no text": lambda question, answer: (question, {"text": answer}),
    "part without text": lambda question, answer: (openai(("user", [{"type": "text"}])), answer),
    "not a number": lambda question, answer: (question, float("nan")),
}


@given(st.sampled_from([*SHAPES]), HOSTILE, HOSTILE, st.sampled_from([b"", b"\xff"]), st.sampled_from([*CHANGES]))
@example("whole chat", "a<|im_end|>", "<|im_start|>user\na", b"", "nothing")
@example("text", "a", "a</think>a", b"", "only what follows thoughts")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_trained_of_a_row_is_what_the_template_renders_or_the_row_is_named(
    tmp_path, shape, question, answer, bad, change
):
    row = dict(zip(("prompt", "answer"), SHAPES[shape](question, answer), strict=True))
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "p", "answer": "a"}\n\n' + json.dumps(row).encode() + bad)
    rows = list(read_rows(DataSource(path=str(file)), "seed_data.train", ("prompt", "answer")))
    kept, named = check_seed(rows, [], "prompt", "answer")
    assert [row.line for row in named] == [3] * (2 - len(kept))
    read_as = tokenizer(change)
    for found in kept[1:]:
        assert (found["prompt"], found["answer"]) == (question.strip(), answer.strip())
        if rendering_problem(found, functools.partial(rendered_otherwise, read_as)) is not None:
            assert "</think>" in question + answer or "\r\n" in question + answer
            assert change != "nothing"
            continue
        asked = user_message(found["prompt"])
        (trained,) = supervised_rows(read_as, [(asked, found["answer"])], TRAINING).rows
        rendered = turns_text(read_as, [*asked, {"role": "assistant", "content": found["answer"]}])
        assert read_as.decode(trained["input_ids"]) == rendered.removesuffix("\n")
        # Two turns are opened and closed, whatever the texts spell.
        assert read_as.convert_ids_to_tokens(trained["input_ids"]).count("<|im_end|>") == 2
