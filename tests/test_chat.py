"""Chat templates are rendered once and give one BOS at most."""

import pytest

from resources.models.chat import ChatTemplateError, answer_ids, end_of_turn_id, load_tokenizer, prompt_ids, prompt_text
from tests.nano import nano_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer():
    return nano_tokenizer()


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

    tokenizer = nano_tokenizer()
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
    tokenizer = nano_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


def test_a_missing_chat_template_is_refused(tmp_path):
    tokenizer = nano_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        load_tokenizer(str(tmp_path))


def test_an_answer_that_was_cut_is_not_closed(tokenizer):
    assert answer_ids(tokenizer, HELLO, "fine", finished=False) == tokenizer("fine").input_ids


def test_the_end_of_turn_is_found_when_it_is_not_the_eos():
    tokenizer = nano_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_answer_is_tokenized_as_it_follows_the_prompt():
    """Tokenizers that put a mark before every text must not put it between prompt and answer."""
    from tokenizers import normalizers

    tokenizer = nano_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Prepend("_")
    alone = tokenizer("fine").input_ids
    ids = answer_ids(tokenizer, HELLO, "fine", finished=False)
    assert tokenizer.decode(alone) == "_fine"
    assert tokenizer.decode(ids).removeprefix("_") in ("fine", "_fine")
    whole = tokenizer(prompt_text(tokenizer, HELLO) + "fine", add_special_tokens=False).input_ids
    assert prompt_ids(tokenizer, HELLO) + ids == whole
