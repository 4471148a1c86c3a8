"""What the experiment starts from: M_0, the seed pairs, the keyword pool.

Paper (sections 2 and 3.1): M_0 is an SFT model; the seed is 18,000 prompts with gold answers; the keyword pool holds
keywords of 1,000,000 RefinedWeb paragraphs, three of one paragraph each.
Here: all three are settings. A held-out split that no training reads is required beside the seed, because the paper
does not say what its runs were validated on; some of the seed is set aside for a judge that shares no data with any
other training. Where the paper drops a list of keywords that holds a personal name or
a stopword, we drop the word.
"""

import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import polars as pl

from resources.models.model_source import fetch_initial_policy
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.storage.seed_source import read_rows
from synpo_assets.cli.preflight import seed_table
from synpo_assets.graph.partitions import checkpoint, table
from synpo_assets.graph.presentation import checkpoint_output, table_output
from synpo_assets.graph.schemas import KeywordPool, SeedPairs, check
from synpo_assets.method import keywords as keyword_method
from synpo_assets.method import seed as seed_method
from synpo_assets.method.keywords import Keywords, keyword_set, paragraph_keyword_sets

POOL_BATCH = 10_000


@dg.asset(**checkpoint("initial_policy"), kinds={"huggingface"})
def initial_policy(
    context: dg.AssetExecutionContext,
    checkpoints: dg.ResourceParam[CheckpointStore],
    settings: dg.ResourceParam[Settings],
) -> dg.Output[Checkpoint]:
    """M_0, the instruct model that every training run starts from (paper, section 3.1)."""
    weights, origin = fetch_initial_policy(settings.initial_policy, settings.engine.trust_remote_code)
    adopted = checkpoints.adopt(context, weights, origin)
    return checkpoint_output(context, adopted, **{f"origin {key}": value for key, value in origin.items()})


@dg.asset(**table(SeedPairs, "seed_data", "prompt_generator.decontamination_ngram", seed_method), kinds={"polars"})
def seed_pairs(context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings]) -> dg.Output[pl.DataFrame]:
    """The seed: prompts with gold answers, rows for the judge alone, and held-out ones that no training reads (3.1)."""
    frame, dropped = seed_table(settings)
    counts = {
        f"{split} rows": frame.filter(pl.col("split") == split).height for split in ("train", "judge", "held_out")
    }
    reasons = "\n".join(f"{row.split} line {row.line}: {row.reason}" for row in dropped) or "none"
    return table_output(context, frame, **counts, dropped=len(dropped), dropped_rows=reasons)


@dg.asset(**table(KeywordPool, "keyword_pool", keyword_method, lazy=True), kinds={"polars"})
def keyword_pool(settings: dg.ResourceParam[Settings]) -> Iterator[dg.Output[pl.LazyFrame]]:
    """The keyword pool K: keywords of one corpus paragraph each, streamed to disk (paper, section 2.1)."""
    pool = settings.keyword_pool
    rows = read_rows(pool.corpus, "keyword_pool.corpus", (pool.text_column,))
    paragraphs = (text for _, row in rows if isinstance(text := row.get(pool.text_column), str) and text.strip())
    sets = paragraph_keyword_sets(
        paragraphs,
        Keywords(pool.language, pool.drop_personal_names),
        pool.keywords_per_set,
        pool.sets_per_paragraph,
        settings.random_seed,
    )
    limited = itertools.islice(sets, pool.max_sets)
    with tempfile.TemporaryDirectory() as directory:
        version = _write_batches((keyword_set(*found) for found in limited), Path(directory))
        frame = pl.scan_parquet(Path(directory) / "*.parquet")
        # Yielded, not returned: the table is stored while the batches still exist.
        yield dg.Output(frame, data_version=dg.DataVersion(version))


def _write_batches(rows: Iterator[dict[str, object]], directory: Path) -> str:
    """Validates and writes the pool in batches; returns the hash of all ids."""
    columns: dict[str, pl.DataType] = {
        "keyword_set_id": pl.String(),
        "keywords": pl.List(pl.String),
        "paragraph": pl.String(),
    }
    digest = hashlib.sha256()
    number = 0
    while (batch := pl.DataFrame(list(itertools.islice(rows, POOL_BATCH)), schema=columns)).height:
        if problem := check(KeywordPool, batch):
            raise dg.Failure(problem)
        digest.update("".join(batch["keyword_set_id"]).encode())
        batch.write_parquet(directory / f"{number:06d}.parquet")
        number += 1
    if not number:
        raise dg.Failure("No paragraph of keyword_pool.corpus has enough keywords for one set: use longer paragraphs.")
    return digest.hexdigest()[:16]
