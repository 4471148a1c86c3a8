"""Chat templates are rendered once and give one BOS at most."""

import copy
import functools
import json
import os
import shutil
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.common.errors import ModelSourceError
from resources.models.bounded import OutOfBoundsError, within_bounds
from resources.models.chat import (
    ChatTemplateError,
    answer_ids,
    end_of_turn_id,
    load_tokenizer,
    prompt_ids,
    prompt_text,
    turns_text,
)
from resources.models.chat_template import refuse_other_text, with_stated_template
from resources.models.model_source import check_tokenizer, fetch_initial_policy
from resources.settings.data import InitialPolicy
from tests.nano import copy_that_adds_bos, nano_tokenizer

nano_tokenizer_once = functools.cache(nano_tokenizer)
HELLO = [{"role": "user", "content": "hello"}]


def own_tokenizer():
    """One that a test may change; to train it takes longer than to copy it."""
    return copy.deepcopy(nano_tokenizer_once())


@pytest.fixture
def tokenizer():
    return nano_tokenizer_once()


def test_the_rendered_prompt_ends_where_the_assistant_starts(tokenizer):
    assert prompt_text(tokenizer, HELLO) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt_ids(tokenizer, HELLO)) == prompt_text(tokenizer, HELLO)


def test_an_answer_ends_with_one_end_of_turn_token(tokenizer):
    ids = answer_ids(tokenizer, HELLO, "fine")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert ids[-1] == end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def adding_bos(template):
    """A tokenizer that puts a BOS before every text by itself, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = own_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    bos = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}",
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}",
])  # fmt: skip
def test_there_is_exactly_one_bos_whether_template_or_tokenizer_writes_it(template):
    tokenizer = adding_bos(template)
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    ids = prompt_ids(tokenizer, HELLO)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_is_invented_for_a_tokenizer_without_one(tokenizer):
    assert tokenizer.bos_token is None
    assert prompt_ids(tokenizer, HELLO)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_template_without_end_of_turn_falls_back_to_eos():
    tokenizer = own_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


SPELLED = st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "assistant\n", "x", " ", "é"])).map(
    "".join
)


@given(SPELLED, SPELLED)
def test_control_tokens_that_are_written_out_stay_text(question, answer):
    tokenizer = nano_tokenizer_once()
    control, asked = set(tokenizer.all_special_ids) | {1}, [{"role": "user", "content": question}]
    ids = prompt_ids(tokenizer, asked)
    # Those of the template: two turns opened, one closed.
    assert [token for token in ids if token in control] == [
        token for token in prompt_ids(tokenizer, HELLO) if token in control
    ]
    assert tokenizer.decode(ids) == prompt_text(tokenizer, asked)
    written = answer_ids(tokenizer, asked, answer, finished=False)
    assert control.isdisjoint(written)
    assert tokenizer.decode(written) == answer


def test_the_lengths_of_what_holds_no_control_token_are_the_tokenizers_own(tokenizer):
    text = prompt_text(tokenizer, HELLO)
    assert prompt_ids(tokenizer, HELLO) == tokenizer(text, add_special_tokens=False).input_ids


def test_a_missing_chat_template_is_refused(tmp_path):
    tokenizer = own_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ChatTemplateError, match=r"has no chat template.*named in scorer\.name"):
        check_tokenizer(tmp_path, False, "scorer")


def test_an_answer_that_was_cut_is_not_closed(tokenizer):
    assert answer_ids(tokenizer, HELLO, "fine", finished=False) == tokenizer("fine").input_ids


def test_the_end_of_turn_is_found_when_it_is_not_the_eos():
    tokenizer = own_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_answer_is_tokenized_as_it_follows_the_prompt():
    """Tokenizers that put a mark before every text must not put it between prompt and answer."""
    from tokenizers import normalizers

    tokenizer = own_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Prepend("_")
    alone = tokenizer("fine").input_ids
    ids = answer_ids(tokenizer, HELLO, "fine", finished=False)
    assert tokenizer.decode(alone) == "_fine"
    assert tokenizer.decode(ids).removeprefix("_") in ("fine", "_fine")
    whole = tokenizer(prompt_text(tokenizer, HELLO) + "fine", add_special_tokens=False).input_ids
    assert prompt_ids(tokenizer, HELLO) + ids == whole


# A system turn of our own.


@pytest.fixture
def with_prompt(nano_model, tmp_path, monkeypatch):
    """M_0 with a system prompt, for a chat template; and its tokenizer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fetched(text, template=None, **stated):
        directory = tmp_path / "model"
        shutil.copytree(nano_model, directory, dirs_exist_ok=True)
        if template:
            (directory / "chat_template.jinja").write_text(template)
        source = InitialPolicy(source="directory", name=str(directory), system_prompt=text, **stated)
        return fetch_initial_policy(source, trust_remote_code=False)

    return fetched


@pytest.mark.parametrize(
    "text", ["Be brief.", "Say \"no\" and 'yes'.\nUse {{ braces }}, {% tags %} and ünïcode \\n.", ""]
)
def test_a_system_prompt_stands_in_every_chat_that_has_none(with_prompt, nano_model, text):
    directory, origin = with_prompt(text)
    tokenizer = load_tokenizer(str(directory))
    system = f"<|im_start|>system\n{text}<|im_end|>\n"
    assert prompt_text(tokenizer, HELLO) == system + prompt_text(load_tokenizer(str(nano_model)), HELLO)
    own = [{"role": "system", "content": "mine"}, *HELLO]
    assert prompt_text(tokenizer, own) == prompt_text(load_tokenizer(str(nano_model)), own)
    assert answer_ids(tokenizer, HELLO, "fine")[-1] == end_of_turn_id(tokenizer)
    assert origin["system_prompt"] == text
    assert with_prompt(text)[0] == directory
    assert with_prompt(f"{text} Or not.")[0] != directory


@pytest.mark.parametrize(("template", "reason"), [
    ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x",
     "System role not supported"),
    ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", "it does not show it"),
])  # fmt: skip
def test_a_template_that_takes_no_system_turn_is_named(with_prompt, template, reason):
    with pytest.raises(
        ChatTemplateError, match=rf"takes no system turn \({reason}\): remove initial_policy.system_prompt"
    ):
        with_prompt("Be brief.", template)


TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
INSTRUCTIONS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}"
    "<|im_end|>{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>"
    "\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + TURNS + OPENED


@pytest.mark.parametrize(("template", "problem"), [
    (TURNS, "a prompt is"),  # The generation prompt is ignored.
    (THINKING, "a prompt is"),
    (TURNS.replace("<|im_end|>", "</turn>") + OPENED, "it closes an answer with '</turn>"),
    (TURNS.replace("<|im_end|>", " <|im_end|>") + OPENED, "it closes an answer with ' <.im_end.>.n', which does not begin"),
    (TURNS.replace("{{ m['content'] }}", "{{ m['content'] }}" * 2) + OPENED, "a prompt is .*the answered one is .*answeranswer"),
], ids=["no generation prompt", "open think block", "end that is no token", "space before the end", "twice"])  # fmt: skip
def test_a_template_that_renders_other_text_than_is_trained_is_refused(with_prompt, template, problem):
    with pytest.raises(
        ChatTemplateError, match=f"renders other text than would be trained: {problem}.*template_arguments"
    ):
        with_prompt(None, template)


@pytest.mark.parametrize(("template", "reason"), [
    ("{% for m in messages %}", "Unexpected end of template"), ("{{ say() }}", "'say' is undefined"),
    ("{% if messages[0]['role'] != 'system' %}{{ raise_exception('Say who you are.') }}{% endif %}x", "Say who you are"),
    ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"), ("{{ 1 + 'a' }}", "TypeError: unsupported"),
    ("{{ range(10 ** 9) }}", "OverflowError: Range too big"), pytest.param("{{ " + "(" * 20_000, "RecursionError: ", id="nested"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: "),
    (r"{{ raise_exception('\x1b]0;title\x07') }}", "⟨U.001B⟩]0;title⟨U.0007⟩"),
])  # fmt: skip
def test_a_template_that_fails_is_refused_with_its_reason(with_prompt, template, reason):
    with pytest.raises(
        ChatTemplateError, match=rf"no question with its answer: {reason}.*initial_policy.system_prompt"
    ):
        with_prompt(None, template)


@pytest.mark.parametrize(("file", "changes", "words"), [
    ("tokenizer_config.json", {"pad_token": "[PAD]"}, r"uses the token 1021 to pad rows .* has 1021 tokens"),
    ("config.json", {"pad_token_id": 32000}, r"uses the token 32000"),
    ("config.json", {"pad_token_id": [0]}, r"cannot be loaded: Validation error for field 'pad_token_id'"),
    ("tokenizer_config.json", {"pad_token": None, "eos_token": None}, r"neither an eos_token nor a pad_token: name one"),
])  # fmt: skip
def test_tokens_that_the_model_does_not_have_are_refused(nano_model, tmp_path, file, changes, words):
    place = shutil.copytree(nano_model, tmp_path / "model") / file
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    with pytest.raises((ModelSourceError, ChatTemplateError), match=words):
        fetch_initial_policy(InitialPolicy(source="directory", name=str(place.parent)), trust_remote_code=False)


def test_a_template_without_any_end_of_an_answer_is_refused():
    tokenizer = own_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = None, "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(
        ChatTemplateError, match="closes an answer with no control token, and its tokenizer has no eos_token"
    ):
        answer_ids(tokenizer, HELLO, "fine")


def test_text_before_the_bos_is_refused(nano_model, tmp_path):
    directory = copy_that_adds_bos(nano_model, tmp_path / "model")
    refuse_other_text(directory, trust_remote_code=False)
    template = directory / "chat_template.jinja"
    template.write_text(f"Hello {template.read_text()}")
    with pytest.raises(ChatTemplateError, match=r"it writes <\|endoftext\|> elsewhere than once at the start"):
        refuse_other_text(directory, trust_remote_code=False)


@pytest.mark.parametrize(("template", "stated"), [
    (TURNS + OPENED, {}), (INSTRUCTIONS, {}), (THINKING, {"template_arguments": {"enable_thinking": False}}), (DATED, {}),
], ids=["ChatML", "space before the answer", "empty think block", "date"])  # fmt: skip
def test_what_is_trained_is_what_the_template_renders(with_prompt, template, stated):
    directory, _ = with_prompt(None, template, **stated)
    tokenizer = load_tokenizer(str(directory))

    @given(question=st.text("ab \n<|im_end|>", min_size=1), answer=st.text("ab \n", min_size=1).filter(str.strip))
    @settings(max_examples=20)
    def is_what_it_renders(question, answer):
        asked = [{"role": "user", "content": question.replace("<|im_end|>", "")}]
        trained = prompt_ids(tokenizer, asked) + answer_ids(tokenizer, asked, answer.strip())
        whole = turns_text(tokenizer, [*asked, {"role": "assistant", "content": answer.strip()}])
        assert tokenizer(whole, add_special_tokens=False).input_ids[: len(trained)] == trained

    is_what_it_renders()


def test_a_bos_that_opens_every_turn_is_no_fault(nano_model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(nano_model, directory)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(directory)
    assert load_tokenizer(str(directory)).bos_token == "<|im_start|>"
    refuse_other_text(directory, trust_remote_code=False)


def test_a_model_with_a_system_prompt_has_the_files_that_its_directory_has_now(with_prompt, tmp_path):
    with_prompt("Be brief.")
    added = tmp_path / "model" / "tokens.txt"
    for change in (added.touch, added.unlink):
        change()
        directory, _ = with_prompt("Be brief.")
        assert sorted(file.name for file in directory.iterdir() if file.exists()) == sorted(
            os.listdir(tmp_path / "model")
        )


def test_the_date_is_the_settings(with_prompt):
    directory, _ = with_prompt(None, DATED, template_date="2024-02-29")
    assert "Today is 29 Feb 2024." in prompt_text(load_tokenizer(str(directory)), HELLO)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGUSR2])
def test_a_trial_that_is_killed_from_outside_says_nothing_of_what_is_tried(tmp_path, times, how):
    def is_small():
        (tmp_path / str(os.getpid())).touch()
        if len(list(tmp_path.iterdir())) <= times:
            os.kill(os.getpid(), how)
        return True

    if times == 1:
        within_bounds(is_small)
    else:
        with pytest.raises(OutOfBoundsError, match=f"is ended by signal {how}$"):
            within_bounds(is_small)
    assert len(list(tmp_path.iterdir())) == 2


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "words"), [
    (LOOP, "does not end"),
    ("{% set n = namespace(t='x') %}{% for a in range(40) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}", "(without|not) end"),
    ("{{ 'x' * 200001 }}", "grows without end"),
    (f"{TURNS}{{% if add_generation_prompt %}}{LOOP}{{% endif %}}", "does not end"),
    (f"{TURNS}{{% if not add_generation_prompt and messages|length == 1 %}}{LOOP}{{% endif %}}", "does not end"),
    (f"{TURNS}{{% if messages[0]['content']|length > 40 %}}{LOOP}{{% endif %}}", "does not end"),
    (f"{TURNS}{{% if messages[0]['role'] == 'system' %}}{LOOP}{{% else %}}{{{{ 1 / 0 }}}}{{% endif %}}", "does not end"),
    (f"{TURNS}{{% if deep is defined %}}{LOOP}{{% endif %}}", "does not end"),
])  # fmt: skip
def test_a_template_that_loops_or_grows_is_refused(tmp_path, nano_model, monkeypatch, template, words):
    monkeypatch.setattr("resources.models.bounded.CPU_SECONDS", 1)
    directory = shutil.copytree(nano_model, tmp_path / "model")
    (directory / "chat_template.jinja").write_text(template)
    source = InitialPolicy(source="directory", name=str(directory), template_arguments={"deep": True})
    with pytest.raises(ChatTemplateError, match=words):
        with_stated_template(directory, source, tmp_path, False)


@pytest.mark.parametrize(("does", "words"), [
    (LOOP, "does not end on a conversation that begins with '.x1b four'"),
    ("{{ 1 / 0 }}", "fails on a conversation: ZeroDivisionError"),
])  # fmt: skip
def test_a_template_that_loops_or_fails_on_one_prompt_alone_ends_in_a_sentence(monkeypatch, does, words):
    monkeypatch.setattr("resources.models.bounded.CPU_SECONDS", 0.3)
    tokenizer, before = own_tokenizer(), signal.getsignal(signal.SIGVTALRM)
    tokenizer.chat_template = f"{TURNS}{{% if messages[0]['content']|length == 6 %}}{does}{{% endif %}}"
    assert prompt_ids(tokenizer, HELLO)
    with pytest.raises(ChatTemplateError, match=f"chat template of .* {words}.*[cC]orrect its"):
        prompt_ids(tokenizer, [{"role": "user", "content": "\x1b four"}])
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) == before
