"""The rows that the trainers read: exact token ids, as generation uses them, cut to the longest length allowed."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resources.models.chat import Message, answer_ids, prompt_ids, prompt_text
from resources.settings.training import PreferenceTraining, Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """What one training run reads.

    Attributes:
        rows: One per example or pair that can be used.
        examples: Examples that there were before.
        truncated: Examples (or sides of pairs) that were cut.
        tokens: Tokens of one pass over the rows.
    """

    rows: list[dict[str, Any]]
    examples: int
    truncated: int
    tokens: int


def supervised_rows(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[tuple[Sequence[Message], str]], training: Training
) -> TrainingRows:
    """Rows of SFT: token ids of prompt and answer, the prompt masked.

    Args:
        tokenizer: The model's tokenizer.
        examples: Chat messages, and the answer to learn.
        training: States the longest length.
    """
    rows, truncated = [], 0
    for messages, answer in examples:
        prompt, completion = prompt_ids(tokenizer, messages), answer_ids(tokenizer, messages, answer)
        truncated += len(prompt) + len(completion) > training.max_length
        token_ids = (prompt + completion)[: training.max_length]
        if answer.strip() and len(token_ids) > len(prompt):
            mask = [0] * len(prompt) + [1] * (len(token_ids) - len(prompt))
            rows.append({"input_ids": token_ids, "completion_mask": mask})
    return TrainingRows(rows, len(examples), truncated, sum(len(row["input_ids"]) for row in rows))


def preference_rows(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[dict[str, Any]], training: PreferenceTraining
) -> TrainingRows:
    """Rows of SimPO and DPO: text and token ids of prompt, chosen and rejected.

    Args:
        tokenizer: The model's tokenizer.
        pairs: Rows with prompt, chosen and rejected as chat messages, and the finish reasons of both answers.
        training: States the longest lengths.
    """
    rows, truncated = [], 0
    for pair in pairs:
        row, cut = preference_row(tokenizer, pair, training)
        if row["chosen"].strip() and row["rejected"].strip():
            rows.append(row)
            truncated += cut
    lengths = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    return TrainingRows(rows, len(pairs), truncated, sum(lengths))


def preference_row(
    tokenizer: "PreTrainedTokenizerBase", pair: dict[str, Any], training: PreferenceTraining
) -> tuple[dict[str, Any], int]:
    """Text and token ids of one pair, each part cut to its longest length, and how many parts were cut."""
    prompt = prompt_ids(tokenizer, pair["prompt"])
    row: dict[str, Any] = {
        "prompt": prompt_text(tokenizer, pair["prompt"]),
        "prompt_ids": prompt[-training.max_prompt_length :],
    }
    cut = int(len(prompt) > training.max_prompt_length)
    for side in ("chosen", "rejected"):
        row[side] = pair[side][-1]["content"]
        finished = pair[f"{side}_finish_reason"] == "stop"
        token_ids = answer_ids(tokenizer, pair["prompt"], row[side], finished)
        cut += len(token_ids) > training.max_completion_length
        row[f"{side}_ids"] = token_ids[: training.max_completion_length]
    return row, cut


def reward_rows(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[str, str, str]], training: Training
) -> TrainingRows:
    """Rows of the reward model: token ids of the prompt with the better and with the worse answer.

    Args:
        tokenizer: The model's tokenizer.
        pairs: Prompt, better answer, worse answer.
        training: States the longest length.
    """
    rows, truncated = [], 0
    for prompt, better, worse in pairs:
        messages = [{"role": "user", "content": prompt}]
        asked = prompt_ids(tokenizer, messages)
        sides = [asked + answer_ids(tokenizer, messages, answer) for answer in (better, worse)]
        truncated += sum(len(side) > training.max_length for side in sides)
        if better.strip() and worse.strip() and len(asked) < training.max_length:
            cut = [side[: training.max_length] for side in sides]
            rows.append({"chosen_ids": cut[0], "rejected_ids": cut[1]})
    return TrainingRows(rows, len(pairs), truncated, sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows))
