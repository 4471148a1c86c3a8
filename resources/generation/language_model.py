"""Answers prompts with a checkpoint; every finished shard of completions survives a crash and is found again."""

import array
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import polars as pl

from resources.common.progress import Progress
from resources.generation.engine import Completion, GenerationEngine, Requests
from resources.generation.engine_choice import engine_fingerprint, open_engine
from resources.generation.failures import few_refused
from resources.models.chat import Message, load_tokenizer, prompt_ids
from resources.models.device import DeviceResource
from resources.settings.method import Sampling
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.shards import Shards, in_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("synpo.generation")

RENDERED_AT_A_TIME = 1024
COMPLETION_COLUMNS = {
    "key": pl.UInt64,
    "text": pl.String,
    "input_tokens": pl.Int64,
    "output_tokens": pl.Int64,
    "finish_reason": pl.String,
}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one call cost."""

    rows: int
    reused: int  # Of these rows, read from finished shards.
    input_tokens: int
    output_tokens: int
    generated_tokens: int  # Written in this call.
    cut: int  # Of these rows, those that stopped at the token limit.
    seconds: float  # Loading the model included.
    refused: int = 0  # Of those cut, the ones that a server does not answer.

    def __add__(self, other: "Usage") -> "Usage":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Usage(*(a + b for a, b in zip(mine, theirs, strict=True)))


class LanguageModel(DeviceResource):
    """Generates answers in shards.

    A shard is a parquet file under `shards` (a directory, or a URL that fsspec knows), in a folder named by the
    fingerprint of everything that can change a completion: weights, sampling settings, engine and number format. Inside
    the folder a completion is identified by its rendered prompt and seed. A second call with the same fingerprint reads
    what is there and generates the rest; another fingerprint has another folder, so results never mix.
    """

    shards: str
    random_seed: int

    def answer(
        self, checkpoint: Checkpoint, prompts: Iterable[tuple[str, Sequence[Message]]], sampling: Sampling
    ) -> tuple[pl.DataFrame, Usage]:
        """Answers each prompt once, as chat messages under an id.

        The id takes part in the seed, so equal prompts under different ids get different answers. A prompt that a server refuses
        counts as cut with an empty text, which is not kept.

        Returns:
            One row per prompt in the given order, with columns id, text, input_tokens, output_tokens and
            finish_reason; and what the call cost.
        """
        started = time.monotonic()
        tokenizer = load_tokenizer(checkpoint.weights, self.engine.trust_remote_code)
        shards = self.shards_of(checkpoint, sampling)
        # Not in memory, of which the answers take enough.
        with tempfile.TemporaryFile() as token_ids:
            asked = self._rendered(tokenizer, prompts, token_ids)
            finished = shards.finished(asked["key"])
            if len(finished):
                logger.info(f"{len(finished)} of {asked.height} completions were finished earlier and are reused.")
            is_missing = pl.col("key").is_first_distinct() & ~pl.col("key").is_in(finished.implode())
            # The requests end with the call, before the answers take their place.
            refused = self._finish(
                checkpoint, Requests(asked.drop("id").filter(is_missing), token_ids), sampling, shards, len(finished)
            )
        asked = asked.select("id", "key")
        completions = shards.rows(asked["key"], _without_broken_characters)
        is_reused = asked["key"].is_in(finished.implode())
        generated = completions["output_tokens"].filter(~is_reused & asked["key"].is_first_distinct())
        if refused:
            empty = pl.DataFrame([vars(each) for each in refused], schema=COMPLETION_COLUMNS)
            # Another run may have got its answer meanwhile.
            completions = (
                asked.join(empty, on="key", how="left", maintain_order="left").drop("id", "key").update(completions)
            )
            reasons = [each.refusal.reason for each in refused if each.refusal]
            of = asked.filter(pl.col("key") == refused[0].key)["id"][0]
            logger.warning(
                f"{len(refused)} of {asked.height} prompts get no answer of {checkpoint.label}, such as {of}: "
                f"{reasons[0]} Each counts as cut at once, with an empty text, and is asked again when its table is made again."
            )
        if unanswered := completions["text"].null_count():
            raise RuntimeError(f"The engine did not answer {unanswered} of {asked.height} prompts: run it again.")
        answered = asked.select("id").hstack(completions)
        return answered, Usage(
            rows=answered.height,
            reused=int(is_reused.sum()),
            input_tokens=int(answered["input_tokens"].sum()),
            output_tokens=int(answered["output_tokens"].sum()),
            generated_tokens=int(generated.sum()),
            cut=int((answered["finish_reason"] == "length").sum()),
            seconds=time.monotonic() - started,
            refused=len(refused),
        )

    def _finish(
        self, checkpoint: Checkpoint, requests: Requests, sampling: Sampling, shards: Shards, finished: int
    ) -> list[Completion]:
        """Generates what is missing, and writes a shard as soon as it is full; those that were refused."""
        refused: list[Completion] = []
        if not len(requests):
            return refused
        # Around the loading of the model, which may take minutes, and the first batch.
        with Progress(len(requests), "completions", logger) as progress:
            engine = self.opened(checkpoint)
            with contextlib.closing(engine.generate(requests, sampling)) as batches:
                for shard in in_shards(few_refused(_counted(batches, progress), finished), self.engine.shard_rows):
                    refused += [completion for completion in shard if completion.refusal]
                    if written := [vars(completion) for completion in shard if not completion.refusal]:
                        shards.write(written)
        return refused

    def opened(self, checkpoint: Checkpoint) -> GenerationEngine:
        """The engine that generates with a checkpoint, opened for this call alone."""
        return open_engine(checkpoint, self.engine)

    def shards_of(self, checkpoint: Checkpoint, sampling: Sampling) -> Shards:
        """The finished completions of a checkpoint under these settings."""
        fingerprint = {
            "checkpoint": checkpoint.sha,
            "sampling": sampling.model_dump(),
            # Earlier versions had 128, as text.
            "key_bits": 64,
            **engine_fingerprint(self.engine, checkpoint.label),
        }
        return Shards(self.shards, fingerprint, checkpoint.label, COMPLETION_COLUMNS)

    def _rendered(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Iterable[tuple[str, Sequence[Message]]],
        token_ids: IO[bytes],
    ) -> pl.DataFrame:
        """The key that identifies the completion of each prompt, and where in the file its tokens are written."""
        schema: dict[str, Any] = {"id": pl.String, "key": pl.UInt64, "start": pl.Int64, "length": pl.Int64}
        rendered, waiting, start = pl.DataFrame(schema=schema), iter(prompts), 0
        while block := list(itertools.islice(waiting, RENDERED_AT_A_TIME)):
            rows = []
            for row_id, messages in block:
                tokens = prompt_ids(tokenizer, messages)
                rows.append((row_id, self._key(row_id, tokens), start, len(tokens)))
                start += token_ids.write(array.array("i", tokens))
            rendered.extend(pl.DataFrame(rows, schema=schema, orient="row"))
        token_ids.flush()
        return rendered

    def _key(self, row_id: str, token_ids: list[int]) -> int:
        written = json.dumps([self.random_seed, row_id, token_ids])
        return int.from_bytes(hashlib.sha256(written.encode()).digest()[:8], "big")


def _without_broken_characters(rows: pl.DataFrame) -> pl.DataFrame:
    """Leaves out what stands for bytes that are no character, as where a limit cuts one in two.

    Nobody wrote it, and nobody shall learn it.
    """
    broken = rows["text"].str.contains("\ufffd", literal=True).any()
    # What is written anew takes more memory.
    return rows.with_columns(pl.col("text").str.replace_all("\ufffd", "", literal=True)) if broken else rows


def _counted(batches: Iterator[list[Completion]], progress: Progress) -> Iterator[list[Completion]]:
    for batch in batches:
        if not batch:
            # The model is loaded only now; the rate is of generation.
            progress.restart()
            continue
        progress.add(len(batch), sum(completion.output_tokens for completion in batch))
        yield batch
