"""Preference pairs in the forms that other trainers read: one pure function per form, from one row to one row.

Paper: nothing; it trains with its own code. Here: a row of the table `preference_pairs` is in TRL's form already; the
others rename what TRL calls prompt, chosen and rejected. Ids, scores, iteration and checkpoints go along wherever a
trainer takes columns by name and passes over the rest.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

Row = dict[str, Any]
Trainer = Literal["trl", "llama-factory", "axolotl", "openai"]
Format = Literal[Trainer, "review", "gguf"]

MESSAGES = ("prompt", "chosen", "rejected")
# https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md: the default tags of the sharegpt format.
SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


def llama_factory_row(row: Mapping[str, Any]) -> Row:
    """A ranking row of the sharegpt format: the answers are single messages, the prompt ends with the user's turn.

    Source: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md (sharegpt format, preference dataset); its
    loader drops every column that `dataset_info.json` does not name.

    Examples:
        >>> llama_factory_row({
        ...     "pair_id": "pair-1",
        ...     "prompt": [{"role": "user", "content": "Why?"}],
        ...     "chosen": [{"role": "assistant", "content": "Because."}],
        ...     "rejected": [{"role": "assistant", "content": "No."}],
        ... })  # doctest: +NORMALIZE_WHITESPACE
        {'conversations': [{'from': 'human', 'value': 'Why?'}],
         'chosen': {'from': 'gpt', 'value': 'Because.'},
         'rejected': {'from': 'gpt', 'value': 'No.'},
         'pair_id': 'pair-1'}
    """
    turns = {name: [_sharegpt(message) for message in row[name]] for name in MESSAGES}
    return {
        "conversations": turns["prompt"],
        "chosen": turns["chosen"][-1],
        "rejected": turns["rejected"][-1],
        **_about(row),
    }


def axolotl_row(row: Mapping[str, Any]) -> Row:
    """A row of the strategy `chat_template.default`: the answers are single messages.

    Source: https://docs.axolotl.ai/docs/rlhf.html#chat_template.default; the strategy reads three fields of a row, and the
    trainer under it is TRL's. Answers are trimmed: the strategy looks them up in the text that the chat template makes, and
    where the template trims them (as Llama 3's does) an answer with white space around it would come out empty.

    Examples:
        >>> axolotl_row({
        ...     "pair_id": "pair-1",
        ...     "prompt": [{"role": "user", "content": "Why?"}],
        ...     "chosen": [{"role": "assistant", "content": "Because."}],
        ...     "rejected": [{"role": "assistant", "content": "No. "}],
        ... })  # doctest: +NORMALIZE_WHITESPACE
        {'messages': [{'role': 'user', 'content': 'Why?'}],
         'chosen': {'role': 'assistant', 'content': 'Because.'},
         'rejected': {'role': 'assistant', 'content': 'No.'},
         'pair_id': 'pair-1'}
    """
    return {
        "messages": row["prompt"],
        **{side: {**row[side][-1], "content": row[side][-1]["content"].strip()} for side in ("chosen", "rejected")},
        **_about(row),
    }


def openai_row(row: Mapping[str, Any]) -> Row:
    """A line of OpenAI's preference fine-tuning, without anything else: it documents three fields and no others.

    Source: https://developers.openai.com/api/docs/guides/direct-preference-optimization.

    Examples:
        >>> openai_row({
        ...     "pair_id": "pair-1",
        ...     "prompt": [{"role": "user", "content": "Why?"}],
        ...     "chosen": [{"role": "assistant", "content": "Because."}],
        ...     "rejected": [{"role": "assistant", "content": "No."}],
        ... })  # doctest: +NORMALIZE_WHITESPACE
        {'input': {'messages': [{'role': 'user', 'content': 'Why?'}]},
         'preferred_output': [{'role': 'assistant', 'content': 'Because.'}],
         'non_preferred_output': [{'role': 'assistant', 'content': 'No.'}]}
    """
    return {
        "input": {"messages": row["prompt"]},
        "preferred_output": row["chosen"],
        "non_preferred_output": row["rejected"],
    }


def dataset_info(name: str, file: str) -> dict[str, Any]:
    """What `dataset_info.json` says about a file of `llama_factory_row`s; the configuration names it under `dataset:`.

    Source: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md.

    Examples:
        >>> dataset_info("synpo", "pairs.jsonl")["synpo"]["file_name"]
        'pairs.jsonl'
    """
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    return {name: {"file_name": file, "formatting": "sharegpt", "ranking": True, "columns": columns}}


def axolotl_dataset(file: str) -> dict[str, Any]:
    """The part of an Axolotl configuration that reads a file of `axolotl_row`s.

    Source: https://docs.axolotl.ai/docs/rlhf.html#chat_template.default.

    Examples:
        >>> axolotl_dataset("/data/pairs.jsonl")["datasets"][0]["path"]
        '/data/pairs.jsonl'
    """
    dataset = {
        "path": file,
        "ds_type": "json",
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "messages",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles": {"user": ["user"], "assistant": ["assistant"], "system": ["system"]},
    }
    return {"rl": "dpo", "chat_template": "tokenizer_default", "datasets": [dataset]}


CONVERSIONS: Mapping[Trainer, Callable[[Mapping[str, Any]], Row]] = {
    # https://huggingface.co/docs/trl/dataset_formats#preference: the trainers take three columns and ignore the others.
    "trl": dict,
    "llama-factory": llama_factory_row,
    "axolotl": axolotl_row,
    "openai": openai_row,
}


def _sharegpt(message: Mapping[str, str]) -> dict[str, str]:
    return {"from": SHAREGPT_ROLES[message["role"]], "value": message["content"]}


def _about(row: Mapping[str, Any]) -> Row:
    return {name: value for name, value in row.items() if name not in MESSAGES}
