"""Answers prompts with a checkpoint; every finished shard of completions survives a crash and is found again."""

import contextlib
import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import polars as pl
from upath import UPath

from resources.chat import Message, load_tokenizer, prompt_ids
from resources.checkpoint_store import Checkpoint
from resources.device import DeviceResource
from resources.engines.choice import engine_fingerprint, open_engine
from resources.engines.interface import Completion, Request
from resources.files import json_sha256, opened_atomically, write_atomically
from resources.settings import Sampling

LOG_EVERY_SECONDS = 10
COMPLETION_COLUMNS = {
    "key": pl.String,
    "text": pl.String,
    "input_tokens": pl.Int64,
    "output_tokens": pl.Int64,
    "finish_reason": pl.String,
}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one call cost.

    Attributes:
        rows: Completions returned.
        reused: Of these, read from finished shards instead of generated.
        input_tokens: Prompt tokens of all rows.
        output_tokens: Tokens written in all rows.
        generated_tokens: Tokens written in this call.
        seconds: Wall time of this call, loading the model included.
    """

    rows: int
    reused: int
    input_tokens: int
    output_tokens: int
    generated_tokens: int
    seconds: float

    def __add__(self, other: "Usage") -> "Usage":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Usage(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def metadata(self) -> dict[str, Any]:
        """The figures as asset metadata."""
        figures: dict[str, Any] = dataclasses.asdict(self) | {"seconds": round(self.seconds, 1)}
        if self.generated_tokens:
            figures["tokens_per_second"] = round(self.generated_tokens / self.seconds, 1)
        return figures


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
        self,
        checkpoint: Checkpoint,
        prompts: Sequence[tuple[str, Sequence[Message]]],
        sampling: Sampling,
        log: Callable[[str], None],
    ) -> tuple[pl.DataFrame, Usage]:
        """Answers each prompt once.

        Args:
            checkpoint: The model that answers.
            prompts: Pairs of an id and chat messages. The id takes part in the seed, so equal prompts under
                different ids get different answers.
            sampling: How to sample.
            log: Receives progress sentences with count, rate and time left.

        Returns:
            One row per prompt in the given order, with columns id, text, input_tokens, output_tokens and
            finish_reason; and what the call cost.
        """
        started = time.monotonic()
        tokenizer = load_tokenizer(checkpoint.weights, self.engine.trust_remote_code)
        requests = [self._request(row_id, prompt_ids(tokenizer, messages)) for row_id, messages in prompts]
        folder = self._shard_folder(checkpoint, sampling)
        finished = _read_shards(folder, {request.key for request in requests})
        missing = list({r.key: r for r in requests if r.key not in finished}.values())
        if finished:
            log(f"{len(finished)} of {len(requests)} completions were finished earlier and are reused.")
        if missing:
            engine = open_engine(checkpoint.weights, self.engine, log)
            with contextlib.closing(engine.generate(missing, sampling)) as batches:
                for shard in _shards(_with_progress(batches, len(missing), log), self.engine.shard_rows):
                    _write_shard(folder, shard)
                    finished |= {completion.key: dataclasses.asdict(completion) for completion in shard}
        rows = [finished[request.key] for request in requests]
        generated = {request.key for request in missing}
        usage = Usage(
            rows=len(rows),
            reused=len(rows) - len(generated),
            input_tokens=sum(row["input_tokens"] for row in rows),
            output_tokens=sum(row["output_tokens"] for row in rows),
            generated_tokens=sum(finished[key]["output_tokens"] for key in generated),
            seconds=time.monotonic() - started,
        )
        frame = pl.DataFrame(rows, schema=COMPLETION_COLUMNS).drop("key")
        return frame.insert_column(0, pl.Series("id", [row_id for row_id, _ in prompts], dtype=pl.String)), usage

    def _request(self, row_id: str, token_ids: list[int]) -> Request:
        digest = hashlib.sha256(json.dumps([self.random_seed, row_id, token_ids]).encode()).digest()
        return Request(key=digest.hex()[:32], token_ids=token_ids, seed=int.from_bytes(digest[:8], "big") >> 1)

    def _shard_folder(self, checkpoint: Checkpoint, sampling: Sampling) -> UPath:
        what = {
            "checkpoint": checkpoint.sha,
            "sampling": sampling.model_dump(),
            **engine_fingerprint(self.engine),
        }
        folder = UPath(self.shards) / json_sha256(what)[:16]
        description = folder / "fingerprint.json"
        if not description.exists():
            write_atomically(description, json.dumps(what | {"made_for": checkpoint.label}, indent=2).encode())
        return folder


def _shards(batches: Iterator[list[Completion]], size: int) -> Iterator[list[Completion]]:
    waiting: list[Completion] = []
    for batch in batches:
        waiting += batch
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def _read_shards(folder: UPath, keys: set[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.parquet")):
        with path.open("rb") as file:
            rows = pl.read_parquet(file).filter(pl.col("key").is_in(list(keys))).to_dicts()
        found |= {row["key"]: row for row in rows}
    return found


def _write_shard(folder: UPath, completions: Sequence[Completion]) -> None:
    table = pl.DataFrame([dataclasses.asdict(completion) for completion in completions], schema=COMPLETION_COLUMNS)
    with opened_atomically(folder / f"{uuid.uuid4().hex}.parquet") as file:
        table.write_parquet(file)


def _with_progress(
    batches: Iterator[list[Completion]], total: int, log: Callable[[str], None]
) -> Iterator[list[Completion]]:
    started = reported = time.monotonic()
    count = tokens = 0
    for batch in batches:
        if not batch:
            # The model is loaded only now; the rate is of generation.
            started = reported = time.monotonic()
            continue
        count += len(batch)
        tokens += sum(completion.output_tokens for completion in batch)
        now = time.monotonic()
        if now - reported >= LOG_EVERY_SECONDS or count == total:
            reported = now
            left = (now - started) / count * (total - count)
            log(f"{count} of {total} completions, {tokens / (now - started):.0f} tokens/s, {left:.0f} s left.")
        yield batch
