"""Compares two answers to the same prompt; every finished shard of scores survives a crash and is found again."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import polars as pl

from resources.common.errors import FinalError
from resources.common.progress import Progress
from resources.models.batches import longest_first
from resources.models.device import DeviceResource, prepare_device, torch_dtype
from resources.scoring.pair_ranker import PairRanker
from resources.scoring.reward_model import RewardModel
from resources.scoring.scoring_model import Reading, ScoringModel
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.shards import Shards

REWARD_DIFFERENCE = "reward_difference"
BOTH_ORDERS = (("first", "second"), ("second", "first"))
# Which answers of a row are read together, for each convention.
READ_TOGETHER: dict[str, tuple[tuple[str, ...], ...]] = {
    REWARD_DIFFERENCE: (("first",), ("second",)),
    "mean_of_both_orders": BOTH_ORDERS,
    "sum_of_both_orders": BOTH_ORDERS,
    "one_order": (("first", "second"),),
}
SCORE_COLUMNS = {
    "key": pl.String,
    "scores": pl.List(pl.Float64),
    "tokens": pl.Int64,
    "prompt_cut": pl.Boolean,
    "answers_cut": pl.List(pl.Boolean),
}


@dataclasses.dataclass(frozen=True)
class ScoringUsage:
    """What one call cost.

    Attributes:
        readings: Different inputs of the model that the call needed: answers for a reward model, ordered pairs for a
            pair ranker.
        reused: Of these, found in finished shards.
        tokens: Tokens of all readings.
        prompts_cut: Rows whose prompt is too long, so that its end is unseen.
        answers_cut: Answers, two a row, whose end is unseen.
        seconds: Wall time of the call, loading the model included.
    """

    readings: int
    reused: int
    tokens: int
    prompts_cut: int
    answers_cut: int
    seconds: float

    def __add__(self, other: "ScoringUsage") -> "ScoringUsage":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return ScoringUsage(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def metadata(self) -> dict[str, Any]:
        """The figures as asset metadata."""
        figures = {f"scored_{name}": value for name, value in dataclasses.asdict(self).items() if name != "seconds"}
        figures |= {"scoring_seconds": round(self.seconds, 1)}
        if not self.reused:
            figures["scored_tokens_per_second"] = round(self.tokens / self.seconds, 1)
        return figures


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The scores of two answers to each prompt.

    Attributes:
        first_scores: A number per row, for the first answer; higher is better.
        second_scores: The same for the second answer.
        convention: What the difference of the two means; see `RewardScorer`.
        usage: What the call cost.
    """

    first_scores: pl.Series
    second_scores: pl.Series
    convention: str
    usage: ScoringUsage

    @property
    def margins(self) -> pl.Series:
        """How much better the first answer is: its score minus the other's, in the units of the convention."""
        return self.first_scores - self.second_scores

    def metadata(self) -> dict[str, Any]:
        """Convention and cost as asset metadata."""
        return self.usage.metadata() | {"score_convention": self.convention}


class RewardScorer(DeviceResource):
    """Compares answers with a reward model or a pair ranker.

    In every convention the margin of a row is its first score minus its second; 0 is a tie. The units differ, so a
    threshold belongs to a convention:

    - `reward_difference` (reward models): each answer is scored by itself, in the model's own units. Equal answers tie.
    - `one_order` (pair rankers): one reading of prompt, first and second answer. The difference is the logit of the
      first being better: 1 is a probability of 73 %. Equal answers need not tie, as a pair ranker may prefer a place.
    - `mean_of_both_orders`: the mean over this reading and the one with the answers exchanged, in the same units.
      Exchanging the answers exchanges the scores, and equal answers tie.
    - `sum_of_both_orders`: twice the mean. This is what llm-blender's `compare` gives and what the scores of its `rank`
      differ by (https://github.com/yuchenlin/LLM-Blender/blob/main/llm_blender/gpt_eval/utils.py, `max_logits`).

    Each different reading is scored once, however many rows contain it. Scores are kept as LanguageModel keeps
    completions: in shards under `shards`, in a folder named by everything that can change a score, where a reading is
    identified by its texts. Both orders are readings of their own, so the convention of a pair ranker does not count.
    """

    shards: str
    kind: Literal["trained", "pretrained", "pair_ranker"]
    pair_convention: Literal["mean_of_both_orders", "sum_of_both_orders", "one_order"]
    max_length: int

    @property
    def convention(self) -> str:
        """How scores become a margin."""
        return self.pair_convention if self.kind == "pair_ranker" else REWARD_DIFFERENCE

    def compare(
        self, reward_model: Checkpoint, rows: Iterable[tuple[str, str, str]], log: Callable[[str], None]
    ) -> Comparison:
        """Scores two answers to each prompt.

        Args:
            reward_model: A sequence classifier with one output, or a pair ranker, as `kind` says.
            rows: A prompt and two answers each.
            log: Receives progress sentences with count, rate and time left.

        Raises:
            FinalError: The model is of another kind, or the memory or the disk does not suffice.
        """
        started = time.monotonic()
        asked = pl.DataFrame(list(rows), schema=dict.fromkeys(("prompt", "first", "second"), pl.String), orient="row")
        needed = [readings(asked, sides) for sides in READ_TOGETHER[self.convention]]
        distinct = pl.concat(needed).unique("key", keep="first", maintain_order=True)
        shards = self.shards_of(reward_model)
        finished = shards.finished(distinct["key"])
        missing = distinct.filter(~pl.col("key").is_in(finished.implode()))
        if len(finished):
            log(f"{len(finished)} of {distinct.height} scores were finished earlier and are reused.")
        if missing.height:
            # Longest first keeps padding small, and what does not fit into memory shows at once.
            length = (
                pl.col("prompt").str.len_bytes() + pl.col("answers").list.eval(pl.element().str.len_bytes()).list.sum()
            )
            self._finish(reward_model, missing.sort(length, descending=True), shards, log)
        scored = shards.rows(distinct["key"])
        found = [frame.select("key").join(scored, on="key", how="left", maintain_order="left") for frame in needed]
        first, second = self._of_side("first", found), self._of_side("second", found)
        usage = ScoringUsage(
            readings=distinct.height,
            reused=len(finished),
            tokens=int(scored["tokens"].sum()),
            prompts_cut=int(first["prompt_cut"].sum()),
            answers_cut=int(first["cut"].sum()) + int(second["cut"].sum()),
            seconds=time.monotonic() - started,
        )
        return Comparison(first["score"], second["score"], self.convention, usage)

    def shards_of(self, reward_model: Checkpoint) -> Shards:
        """The finished scores of a model under these settings.

        Raises:
            FinalError: A GPU was asked for and there is none.
        """
        fingerprint = {
            "scorer": self.kind,
            "checkpoint": reward_model.sha,
            "max_length": self.max_length,
            "library": f"transformers {importlib.metadata.version('transformers')}",
            "device": prepare_device(self.engine),
            "dtype": str(torch_dtype(self.engine)),
        }
        return Shards(self.shards, fingerprint, f"scores by {reward_model.label}", SCORE_COLUMNS)

    def _finish(
        self, reward_model: Checkpoint, missing: pl.DataFrame, shards: Shards, log: Callable[[str], None]
    ) -> None:
        """Scores what is missing, and writes a shard as soon as it is full."""
        open_model = PairRanker if self.kind == "pair_ranker" else RewardModel
        model: ScoringModel = open_model(reward_model.weights, self.engine, self.max_length)
        progress = Progress(missing.height, "scores", log)
        for done in range(0, missing.height, self.engine.shard_rows):
            waiting = [model.read(*row) for row in missing.slice(done, self.engine.shard_rows).rows()]
            rows: list[dict[str, Any]] = []
            lengths = [len(reading.token_ids) for reading in waiting]
            for places in longest_first(lengths, self.engine.batch_tokens):
                batch = [waiting[place] for place in places]
                rows += _scored(model, batch)
                progress.add(len(batch), sum(len(reading.token_ids) for reading in batch))
            shards.write(rows)

    def _of_side(self, side: str, found: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """One answer's scores, taken together over the readings that contain it."""
        places = [
            (frame, sides.index(side))
            for frame, sides in zip(found, READ_TOGETHER[self.convention], strict=True)
            if side in sides
        ]
        parts = [
            frame.select(
                "prompt_cut", score=pl.col("scores").list.get(place), cut=pl.col("answers_cut").list.get(place)
            )
            for frame, place in places
        ]
        total = functools.reduce(operator.add, (part["score"] for part in parts))
        count = 1 if self.convention == "sum_of_both_orders" else len(parts)
        return parts[0].with_columns(score=total / count)


def readings(asked: pl.DataFrame, sides: Sequence[str]) -> pl.DataFrame:
    """What is read together: a row for each row asked, with key, prompt and the answers of these sides in this order."""
    frame = asked.select("prompt", answers=pl.concat_list(sides))
    keys = [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:32] for row in frame.iter_rows()]
    return frame.select(pl.Series("key", keys, dtype=pl.String), "prompt", "answers")


def _scored(model: ScoringModel, batch: Sequence[Reading]) -> list[dict[str, Any]]:
    """The rows of a shard for one batch."""
    import torch

    try:
        scores = model.score(batch)
    except torch.OutOfMemoryError as error:
        raise FinalError(
            f"The GPU's memory does not suffice for a batch of {len(batch)} texts to score: {' '.join(str(error).split())} "
            "Lower engine.batch_tokens or scorer.max_length. Finished shards are kept: run it again."
        ) from None
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
