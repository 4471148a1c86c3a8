"""The rows that the trainers read: exact token ids, as generation uses them, cut to the longest length allowed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resources.models.chat import Message, answer_ids, prompt_ids, prompt_text
from resources.settings.training import PreferenceTraining, Training
from resources.training.job import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IGNORED = -100


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """What one training run reads."""

    rows: list[dict[str, Any]]
    examples: int  # That there were before.
    truncated: int  # Examples, or prompts and sides of pairs, among the rows.
    tokens: int  # Of one pass over the rows.


def supervised_rows(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[tuple[Sequence[Message], str]], training: Training
) -> TrainingRows:
    """Rows of SFT, of chat messages and the answer to learn: token ids of both, the prompt masked."""
    rows, truncated = list[dict[str, Any]](), 0
    for messages, answer in examples:
        prompt, completion = prompt_ids(tokenizer, messages), answer_ids(tokenizer, messages, answer)
        token_ids = (prompt + completion)[: training.max_length]
        if answer.strip() and len(token_ids) > len(prompt):
            mask = [0] * len(prompt) + [1] * (len(token_ids) - len(prompt))
            rows.append({"input_ids": token_ids, "completion_mask": mask, "length": len(token_ids)})
            truncated += len(prompt) + len(completion) > training.max_length
    return TrainingRows(rows, len(examples), truncated, sum(len(row["input_ids"]) for row in rows))


def preference_rows(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[dict[str, Any]], training: PreferenceTraining
) -> TrainingRows:
    """Rows of preference optimisation: text and token ids of prompt, chosen and rejected.

    Each pair has these as chat messages, and the finish reasons of both answers.
    """
    rows, truncated = [], 0
    for pair in pairs:
        row, cut = preference_row(tokenizer, pair, training)
        if row["chosen"].strip() and row["rejected"].strip():
            rows.append(row)
            truncated += cut
    return TrainingRows(rows, len(pairs), truncated, sum(row["length"] for row in rows))


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
    longest = training.max_completion_length or training.max_length - len(row["prompt_ids"])
    answers = {side: pair[side][-1]["content"] for side in ("chosen", "rejected")}
    finished = [pair[f"{side}_finish_reason"] == "stop" for side in answers]
    sides, truncated = _sides(tokenizer, pair["prompt"], list(answers.values()), finished, longest)
    cut += truncated
    row |= answers | {f"{side}_ids": token_ids for side, token_ids in zip(answers, sides, strict=True)}
    row["length"] = 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    return row, cut


def _sides(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    answers: Sequence[str],
    finished: Sequence[bool],
    longest: int,
) -> tuple[list[list[int]], int]:
    """Token ids of two answers to one prompt, each cut to a length, and how many of them were cut.

    Where one of them is, neither has its end of turn: one with it beside one without would teach to end.
    """
    ended = zip(answers, finished, strict=True)
    sides = [answer_ids(tokenizer, messages, answer, is_finished) for answer, is_finished in ended]
    cut = sum(len(side) > longest for side in sides)
    if cut:
        sides = [answer_ids(tokenizer, messages, answer, finished=False)[:longest] for answer in answers]
    return sides, cut


def reward_rows(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[str, str, str]], training: Training
) -> TrainingRows:
    """Rows of the reward model, of prompt, better and worse answer: token ids of the prompt with each answer."""
    rows, truncated = list[dict[str, Any]](), 0
    for prompt, better, worse in pairs:
        messages = [{"role": "user", "content": prompt}]
        asked = prompt_ids(tokenizer, messages)
        longest = max(0, training.max_length - len(asked))
        sides, cut = _sides(tokenizer, messages, (better, worse), (True, True), longest)
        if better.strip() and worse.strip() and longest:
            chosen, rejected = (asked + side for side in sides)
            rows.append({"chosen_ids": chosen, "rejected_ids": rejected, "length": len(chosen) + len(rejected)})
            truncated += cut
    return TrainingRows(rows, len(pairs), truncated, sum(row["length"] for row in rows))


ROWS_OF: Mapping[Kind, Callable[..., TrainingRows]] = {
    "supervised": supervised_rows,
    "preference": preference_rows,
    "reward": reward_rows,
}


class GroupedByLength:
    """Mixed into TRL's trainers: a sampler by length reads lengths that trainers drop as an unused column."""

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(self.train_dataset)  # type: ignore[misc]


class ExactTokenIds:
    """Mixed into those of TRL's trainers that tokenize rows themselves: they take the ids that generation uses.

    TRL 1.16 would close every answer with the EOS token, also those that were cut and those that already end their turn with
    another token, and it may put a BOS before prompts that generation renders without one.
    """

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
        """Lays out prompt and answers as the trainer's collator expects them, the prompt masked in the labels."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{side}_labels"] = [IGNORED] * len(prompt) + answer
        return row
