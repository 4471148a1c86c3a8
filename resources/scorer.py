"""Scores answers with a reward model: a sequence classifier with one output."""

import time
from collections.abc import Callable, Sequence

import dagster as dg

from resources.chat import answer_ids, load_tokenizer, prompt_ids
from resources.checkpoint_store import Checkpoint
from resources.device import prepare_device, torch_dtype
from resources.settings import Engine

LOG_EVERY_SECONDS = 10


class RewardScorer(dg.ConfigurableResource):
    """Gives each (prompt, answer) one number; higher is better.

    A margin is the difference of two such numbers for the same prompt, each scored once and by itself. This
    convention is stored with the pairs as `reward_difference`.
    """

    engine: Engine
    max_length: int
    trust_remote_code: bool = False

    def score(
        self, reward_model: Checkpoint, rows: Sequence[tuple[str, str]], log: Callable[[str], None]
    ) -> tuple[list[float], int]:
        """Scores answers.

        Args:
            reward_model: A sequence-classification checkpoint with one label.
            rows: Pairs of a prompt and an answer.
            log: Receives progress sentences.

        Returns:
            The scores in the given order, and how many rows were cut at `max_length` so that their end was unseen.
        """
        import torch
        from transformers import AutoModelForSequenceClassification

        device = prepare_device(self.engine)
        tokenizer = load_tokenizer(reward_model.weights)
        model = AutoModelForSequenceClassification.from_pretrained(
            reward_model.weights,
            dtype=torch_dtype(self.engine),
            use_safetensors=True,
            trust_remote_code=self.trust_remote_code,
        ).to(device)
        model.eval()
        users = [[{"role": "user", "content": prompt}] for prompt, _ in rows]
        token_ids = [
            prompt_ids(tokenizer, user) + answer_ids(tokenizer, answer)
            for user, (_, answer) in zip(users, rows, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda row: len(token_ids[row]), reverse=True)
        scores = [0.0] * len(rows)
        started = reported = time.monotonic()
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
                logits = model(**padded).logits[:, 0].float().tolist()
            for row, logit in zip(batch, logits, strict=True):
                scores[row] = logit
            done += len(batch)
            now = time.monotonic()
            if now - reported > LOG_EVERY_SECONDS or done == len(order):
                reported = now
                left = (now - started) / done * (len(order) - done)
                log(f"{done} of {len(order)} answers scored, {left:.0f} s left.")
        return scores, sum(len(ids) > self.max_length for ids in token_ids)
