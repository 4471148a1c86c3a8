"""Compares two answers to the same prompt; every finished shard of scores survives a crash and is found again."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import polars as pl

from resources.common.progress import Progress
from resources.models.batches import longest_first, tokens_at_a_time
from resources.models.device import DeviceResource, memory_explained, prepare_device, stated_attention, torch_dtype
from resources.scoring.pair_ranker import PairRanker
from resources.scoring.reward_model import RewardModel
from resources.scoring.scoring_model import Convention, Reading, ScoringModel
from resources.settings.method import Scorer
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.shards import Shards, in_shards

logger = logging.getLogger("synpo.scoring")

SCORERS: dict[str, type[ScoringModel]] = {
    "trained": RewardModel, "verifier": RewardModel, "pretrained": RewardModel, "pair_ranker": PairRanker,
}  # fmt: skip
SCORE_COLUMNS = {
    "key": pl.String,
    "scores": pl.List(pl.Float64),
    "tokens": pl.Int64,
    "prompt_cut": pl.Boolean,
    "answers_cut": pl.List(pl.Boolean),
}


@dataclasses.dataclass(frozen=True)
class ScoringUsage:
    """What one call cost."""

    readings: int  # Different inputs of the model: answers, or ordered pairs for a pair ranker.
    reused: int  # Of these readings, found in finished shards.
    tokens: int
    prompts_cut: int  # Rows whose prompt is too long, so that its end is unseen.
    answers_cut: int  # Answers, two a row, whose end is unseen.
    seconds: float

    def __add__(self, other: "ScoringUsage") -> "ScoringUsage":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return ScoringUsage(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The scores of two answers to each prompt, a number per row; higher is better."""

    first_scores: pl.Series
    second_scores: pl.Series
    convention: str  # What the difference of the two means; see `RewardScorer`.
    usage: ScoringUsage

    @property
    def margins(self) -> pl.Series:
        """How much better the first answer is: its score minus the other's, in the units of the convention."""
        return self.first_scores - self.second_scores


class RewardScorer(DeviceResource):
    """Compares answers with a reward model or a pair ranker.

    In every convention the margin of a row is its first score minus its second; 0 is a tie. The units differ, so a
    threshold belongs to a convention; the model's class says what they mean.

    Each different reading is scored once, however many rows contain it. Scores are kept as LanguageModel keeps
    completions: in shards under `shards`, in a folder named by everything that can change a score, where a reading is
    identified by its texts. Both orders are readings of their own, so the convention of a pair ranker does not count.
    """

    shards: str
    scorer: Scorer

    def compare(
        self, reward_model: Checkpoint, rows: Iterable[tuple[str, str, str]], judging: bool = False
    ) -> Comparison:
        """Scores two answers to each prompt.

        Args:
            judging: Whether models are judged by it. A pair ranker is then asked in both orders, whatever the scorer's
                setting for pairs is: where one side always stands first, a preference for a place would be a win.
        """
        started = time.monotonic()
        asked = pl.DataFrame(list(rows), schema=dict.fromkeys(("prompt", "first", "second"), pl.String), orient="row")
        name = self.scorer.judging_convention if judging else self.scorer.convention
        convention = SCORERS[self.scorer.kind].conventions[name]
        needed = [readings(asked, sides) for sides in convention.readings]
        distinct = pl.concat(needed).unique("key", keep="first", maintain_order=True)
        shards = self.shards_of(reward_model)
        finished = shards.finished(distinct["key"])
        missing = distinct.filter(~pl.col("key").is_in(finished.implode()))
        if len(finished):
            logger.info(f"{len(finished)} of {distinct.height} scores were finished earlier and are reused.")
        if missing.height:
            # Longest first keeps padding small, and what does not fit into memory shows at once.
            length = (
                pl.col("prompt").str.len_bytes() + pl.col("answers").list.eval(pl.element().str.len_bytes()).list.sum()
            )
            self._finish(reward_model, missing.sort(length, descending=True), shards)
        scored = distinct.select("key").hstack(shards.rows(distinct["key"]))
        found = [frame.select("key").join(scored, on="key", how="left", maintain_order="left") for frame in needed]
        first, second = (_of_side(side, found, convention) for side in ("first", "second"))
        usage = ScoringUsage(
            readings=distinct.height,
            reused=len(finished),
            tokens=int(scored["tokens"].sum()),
            prompts_cut=int(first["prompt_cut"].sum()),
            answers_cut=int(first["cut"].sum()) + int(second["cut"].sum()),
            seconds=time.monotonic() - started,
        )
        return Comparison(first["score"], second["score"], name, usage)

    def opened(self, reward_model: Checkpoint) -> ScoringModel:
        """The model that scores, loaded for this call alone."""
        return SCORERS[self.scorer.kind](reward_model.weights, self.engine, self.scorer.max_length)

    def shards_of(self, reward_model: Checkpoint) -> Shards:
        """The finished scores of a model under these settings."""
        fingerprint = {
            "scorer": self.scorer.kind,
            "checkpoint": reward_model.sha,
            "max_length": self.scorer.max_length,
            "library": f"transformers {importlib.metadata.version('transformers')}",
            "device": prepare_device(self.engine),
            "dtype": str(torch_dtype(self.engine)),
            **stated_attention(self.engine),
            "head": "float32",
        }
        return Shards(self.shards, fingerprint, f"scores by {reward_model.label}", SCORE_COLUMNS)

    def _finish(self, reward_model: Checkpoint, missing: pl.DataFrame, shards: Shards) -> None:
        """Scores what is missing, and writes a shard as soon as it is full."""
        model, batch_tokens = self.opened(reward_model), tokens_at_a_time(self.engine)
        with Progress(missing.height, "scores", logger) as progress:

            def scored() -> Iterator[list[dict[str, Any]]]:
                for done in range(0, missing.height, self.engine.shard_rows):
                    waiting = [model.read(*row) for row in missing.slice(done, self.engine.shard_rows).rows()]
                    lengths = [len(reading.token_ids) for reading in waiting]
                    for places in longest_first(lengths, batch_tokens):
                        batch = [waiting[place] for place in places]
                        rows = _scored(model, batch)
                        progress.add(len(batch), sum(lengths[place] for place in places))
                        yield rows

            for shard in in_shards(scored(), self.engine.shard_rows):
                shards.write(shard)


def _of_side(side: str, found: Sequence[pl.DataFrame], convention: Convention) -> pl.DataFrame:
    """One answer's scores, taken together over the readings that contain it."""
    places = [
        (frame, sides.index(side)) for frame, sides in zip(found, convention.readings, strict=True) if side in sides
    ]
    parts = [
        frame.select("prompt_cut", score=pl.col("scores").list.get(place), cut=pl.col("answers_cut").list.get(place))
        for frame, place in places
    ]
    total = functools.reduce(operator.add, (part["score"] for part in parts))
    return parts[0].with_columns(score=total / (1 if convention.is_sum else len(parts)))


def readings(asked: pl.DataFrame, sides: Sequence[str]) -> pl.DataFrame:
    """What is read together: a row for each row asked, with key, prompt and the answers of these sides in this order."""
    frame = asked.select("prompt", answers=pl.concat_list(sides))
    keys = [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:32] for row in frame.iter_rows()]
    return frame.select(pl.Series("key", keys, dtype=pl.String), "prompt", "answers")


def _scored(model: ScoringModel, batch: Sequence[Reading]) -> list[dict[str, Any]]:
    """The rows of a shard for one batch."""
    with memory_explained(
        f"a batch of {len(batch)} texts to score",
        "Lower engine.batch_tokens or scorer.max_length. Finished shards are kept: run it again.",
    ):
        scores = model.score(batch)
    return [
        {
            "key": reading.key,
            "scores": values,
            "tokens": len(reading.token_ids),
            "prompt_cut": reading.prompt_cut,
            "answers_cut": reading.answers_cut,
        }
        for reading, values in zip(batch, scores, strict=True)
    ]
