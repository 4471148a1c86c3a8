"""Scores answers with a reward model: a sequence classifier with one output."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from resources.chat import answer_ids, load_tokenizer, prompt_ids
from resources.checkpoint_store import Checkpoint
from resources.device import DeviceResource, prepare_device, torch_dtype

LOG_EVERY_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of answers, and what they cost.

    Attributes:
        values: One number per answer, in the order asked.
        cut: Answers whose end was unseen, because prompt and answer exceed `max_length`.
        tokens: Tokens read.
        seconds: Wall time, loading the model included.
    """

    values: list[float]
    cut: int
    tokens: int
    seconds: float

    def metadata(self) -> dict[str, Any]:
        """The cost as asset metadata."""
        return {"scored_answers": len(self.values), "scored_cut": self.cut, "scored_tokens": self.tokens,
                "scoring_seconds": round(self.seconds, 1)}  # fmt: skip


class RewardScorer(DeviceResource):
    """Gives each (prompt, answer) one number; higher is better.

    A margin is the difference of two such numbers for the same prompt, each scored once and by itself. This
    convention is stored with the pairs as `reward_difference`.
    """

    max_length: int

    def score(self, reward_model: Checkpoint, rows: Sequence[tuple[str, str]], log: Callable[[str], None]) -> Scores:
        """Scores answers.

        Args:
            reward_model: A sequence-classification checkpoint with one label.
            rows: Pairs of a prompt and an answer.
            log: Receives progress sentences.

        Raises:
            ValueError: The model gives more than one number per answer.
        """
        import torch
        from transformers import AutoModelForSequenceClassification

        started = reported = time.monotonic()
        device = prepare_device(self.engine)
        tokenizer = load_tokenizer(reward_model.weights, self.engine.trust_remote_code)
        model = AutoModelForSequenceClassification.from_pretrained(
            reward_model.weights,
            dtype=torch_dtype(self.engine),
            use_safetensors=True,
            trust_remote_code=self.engine.trust_remote_code,
        ).to(device)
        model.eval()
        if model.config.pad_token_id is None:
            # Without it a classifier cannot tell where the shorter rows of a batch end.
            model.config.pad_token_id = tokenizer.pad_token_id
        users = [[{"role": "user", "content": prompt}] for prompt, _ in rows]
        token_ids = [
            prompt_ids(tokenizer, user) + answer_ids(tokenizer, user, answer)
            for user, (_, answer) in zip(users, rows, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda row: len(token_ids[row]), reverse=True)
        scores = [0.0] * len(rows)
        done = 0
        while done < len(order):
            longest = min(len(token_ids[order[done]]), self.max_length)
            batch = order[done : done + max(1, self.engine.batch_tokens // longest)]
            padded = tokenizer.pad(
                {"input_ids": [token_ids[row][: self.max_length] for row in batch]},
                padding_side="right",
                return_tensors="pt",
            ).to(device)
            with torch.inference_mode():
                logits = model(**padded).logits
            if logits.numel() != len(batch):
                raise ValueError(
                    f"The reward model {reward_model.weights} gives {logits.numel() // len(batch)} numbers per answer: choose "
                    "one with a single output in scorer.name."
                )
            for row, logit in zip(batch, logits.flatten().tolist(), strict=True):
                scores[row] = logit
            done += len(batch)
            now = time.monotonic()
            if now - reported > LOG_EVERY_SECONDS or done == len(order):
                reported = now
                left = (now - started) / done * (len(order) - done)
                log(f"{done} of {len(order)} answers scored, {left:.0f} s left.")
        return Scores(
            values=scores,
            cut=sum(len(ids) > self.max_length for ids in token_ids),
            tokens=sum(min(len(ids), self.max_length) for ids in token_ids),
            seconds=time.monotonic() - started,
        )
