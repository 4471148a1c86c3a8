"""What the experiment starts from: M_0, the seed pairs, the keyword pool.

Paper (sections 2 and 3.1): M_0 is an SFT model; the seed is 18,000 prompts with gold answers; the keyword pool holds
keywords of 1,000,000 RefinedWeb paragraphs, three of one paragraph each.
Here: all three are settings. With `scorer.kind: verifier`, seed rows may have rules that a program checks, and gold must
follow its own. Held-out pairs that no training reads are required beside the seed, because the paper does not
say what its runs were validated on. They are split once more: the gate, and whoever searches for settings, reads dev; tables
report test. Some of the seed is set aside for a judge and a scorer that are trained here and share no data with any other
training. Where the paper drops a list of keywords that holds a personal name or
a stopword, we drop the word.
"""

import collections
import dataclasses
import hashlib
import itertools
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from resources.models.model_source import fetch_initial_policy
from resources.settings.method import PublishedScorer
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.seed_source import read_rows
from resources.storage.tables import table_metadata
from synpo_assets.graph import metrics
from synpo_assets.graph.evaluation_schemas import VerifiableInstructions
from synpo_assets.graph.metrics import Metric, record
from synpo_assets.graph.presentation import checkpoint_output, table_output
from synpo_assets.graph.schemas import KeywordPool, SeedPairs
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.graph.tables import check
from synpo_assets.method.chat_rows import unwritable
from synpo_assets.method.keywords import Keywords, keyword_set, paragraph_keyword_sets
from synpo_assets.method.seed import HELD_OUT, BadRow, overlapping_rows, seed_rows
from synpo_assets.method.verifiable import instruction_rows

POOL_BATCH = 10_000
SHOWN_BAD_ROWS = 5


@Stage(group="seed", checkpoint=True, once=True, reads=("initial_policy",), kinds=("huggingface",))
def initial_policy(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.Output[Checkpoint]:
    """M_0, the instruct model that every training run starts from (paper, section 3.1)."""
    settings = services.settings
    weights, origin = fetch_initial_policy(settings.initial_policy, settings.engine.trust_remote_code)
    adopted = services.checkpoints.adopt(context, weights, origin)
    return checkpoint_output(context, services, adopted, **{f"origin {key}": value for key, value in origin.items()})


@Stage(
    SeedPairs,
    group="seed",
    once=True,
    kinds=("polars",),
    reads=("seed_data", "prompt_generator.decontamination_ngram", "scorer.kind", "judge.kind"),
)
def seed_pairs(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.Output[pl.DataFrame]:
    """The seed: prompts with gold answers, rows for judge and scorer alone, and dev and test, which no training reads (3.1)."""
    frame, dropped = seed_table(services.settings)
    splits = [
        Metric("split_rows", rows, of=split) for split, rows in frame["split"].value_counts(sort=True).iter_rows()
    ]
    reasons = "\n".join(f"{row.split} line {row.line}: {row.reason}" for row in dropped) or "none"
    measured = [*splits, *metrics.with_rules(frame), Metric("dropped", len(dropped))]
    return table_output(context, services, frame, measured, dropped_rows=reasons)


@Stage(VerifiableInstructions, group="seed", once=True, kinds=("polars",), reads=("seed_data",))
def verifiable_instructions(
    context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]
) -> dg.Output[pl.DataFrame]:
    """Instructions with constraints that a program can check; no training reads them."""
    frame = verifiable_table(services.settings)
    rules = frame.explode("constraints").unnest("constraints").group_by("rule").len().sort("len", descending=True)
    return table_output(context, services, frame, constraints=table_metadata(rules))


@Stage(KeywordPool, group="seed", lazy=True, once=True, kinds=("polars",), reads=("keyword_pool",))
def keyword_pool(
    context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]
) -> Iterator[dg.Output[pl.LazyFrame]]:
    """The keyword pool K: keywords of one corpus paragraph each, streamed to disk (paper, section 2.1)."""
    pool = services.settings.keyword_pool
    rows, unusable = read_rows(pool.corpus, "keyword_pool.corpus", (pool.text_column,)), list[int]()
    sets = paragraph_keyword_sets(
        _paragraphs(rows, pool.text_column, unusable),
        Keywords(pool.language, pool.drop_personal_names),
        pool.keywords_per_set,
        pool.sets_per_paragraph,
        services.settings.random_seed,
    )
    limited = itertools.islice(sets, pool.max_sets)
    with tempfile.TemporaryDirectory() as directory:
        version, rows_written = _write_batches(itertools.starmap(keyword_set, limited), Path(directory))
        record(services.metrics, "keyword_pool", None, [Metric("rows", rows_written), Metric("dropped", len(unusable))])
        if unusable:
            named = ", ".join(map(str, unusable[:SHOWN_BAD_ROWS]))
            context.log.warning(
                f"{len(unusable)} rows of keyword_pool.corpus hold no text and were left out, the first in lines {named}."
            )
        frame = pl.scan_parquet(Path(directory) / "*.parquet")
        # Yielded, not returned: the table is stored while the batches still exist.
        yield dg.Output(frame, data_version=dg.DataVersion(version))


def _paragraphs(rows: Iterable[tuple[int, Mapping[str, Any]]], column: str, unusable: list[int]) -> Iterator[str]:
    """The paragraphs of corpus rows; the lines of those without one are added to `unusable`."""
    for line, row in rows:
        text = row.get(column)
        if isinstance(text, str) and text.strip() and unwritable(text) is None:
            yield text
        else:
            unusable.append(line)


def _write_batches(rows: Iterator[dict[str, object]], directory: Path) -> tuple[str, int]:
    """Validates and writes the pool in batches; returns the hash of all ids, and their number."""
    schema, digest = KeywordPool.empty().schema, hashlib.sha256()
    number = rows_written = 0
    while (batch := pl.DataFrame(list(itertools.islice(rows, POOL_BATCH)), schema=schema)).height:
        if problem := check(KeywordPool, batch):
            raise dg.Failure(problem)
        digest.update("".join(batch["keyword_set_id"]).encode())
        batch.write_parquet(directory / f"{number:06d}.parquet")
        number, rows_written = number + 1, rows_written + batch.height
    if not number:
        raise dg.Failure("No paragraph of keyword_pool.corpus has enough keywords for one set: use longer paragraphs.")
    return digest.hexdigest()[:16], rows_written


def seed_table(settings: Settings) -> tuple[pl.DataFrame, list[BadRow]]:
    """The validated seed, in the subsets that the settings ask for, and the rows that were dropped."""
    seed = settings.seed_data
    columns = (seed.prompt_column, seed.answer_column)
    # Streamed, so that cells which nothing reads are not held.
    train = read_rows(seed.train, "seed_data.train", columns)
    held_out = read_rows(seed.held_out, "seed_data.held_out", columns)
    good, bad = seed_rows(train, held_out, *columns, with_rules=settings.scorer.kind == "verifier")
    ngram, files = settings.prompt_generator.decontamination_ngram, [seed.train.path, seed.held_out.path]
    prompts = [row["prompt"] for row in good if row["split"] == "held_out"]
    instructions = verifiable_table(settings)["prompt"].to_list()
    for texts, kind in ((prompts, "held-out prompt"), (instructions, "verifiable instruction")):
        overlaps = overlapping_rows(good, texts, ngram, kind)
        lines = {row.line for row in overlaps}
        good = [row for row in good if row["split"] == "held_out" or row["line"] not in lines]
        bad += overlaps
    if overlaps and seed.verifiable is not None:
        files.append(seed.verifiable.path)
    usable = {split: [row for row in good if row["split"] == split] for split in ("train", "held_out")}
    evaluated, overlaps = _dev_and_test(usable["held_out"], settings)
    bad += overlaps
    if bad and seed.on_bad_rows == "refuse":
        shown = "; ".join(f"{row.split} line {row.line}: {row.reason}" for row in bad[:SHOWN_BAD_ROWS])
        raise SettingsError(
            f"{len(bad)} seed rows cannot be used ({shown}{'; …' if len(bad) > SHOWN_BAD_ROWS else ''}). Correct "
            f"{', '.join(files[:-1])} and {files[-1]}, or set seed_data.on_bad_rows to `drop`."
        )
    if {row["split"] for row in evaluated} != set(HELD_OUT):
        raise SettingsError(
            f"seed_data.held_out has {len(evaluated)} usable rows; at least 2 are needed, one for dev and one for test."
        )
    left, chosen = usable["train"], list[dict[str, Any]]()
    for split, count in _split_sizes(settings, len(left), bad).items():
        rows = _sample(left, count, f"{settings.random_seed}:{split}")
        chosen += [row | {"split": split} for row in rows]
        read = {row["prompt_id"] for row in rows}
        left = [row for row in left if row["prompt_id"] not in read]
    if settings.scorer.kind == "verifier" and not any(row["constraints"] for row in chosen if row["split"] == "train"):
        raise SettingsError(
            f"scorer.kind is `verifier` and no row of {seed.train.path} that generator and improver are trained on has "
            "`constraints`, so there is nothing to verify: add the column, raise seed_data.train_limit, or set scorer.kind to "
            "`trained`."
        )
    return pl.DataFrame([*chosen, *evaluated], schema=SeedPairs.empty().schema), bad


def _dev_and_test(held_out: list[dict[str, Any]], settings: Settings) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """The held-out rows that are used, in two splits, and the dev rows that repeat a prompt of test and are left out."""
    rows = _with_splits(
        _sample(held_out, settings.seed_data.held_out_limit, f"{settings.random_seed}:held_out"), settings
    )
    dev, test = ([row for row in rows if row["split"] == split] for split in HELD_OUT)
    ngram = settings.prompt_generator.decontamination_ngram
    overlaps = overlapping_rows(dev, [row["prompt"] for row in test], ngram, "test prompt")
    lines = {row.line for row in overlaps}
    kept = [row for row in rows if row["line"] not in lines]
    return kept, [dataclasses.replace(row, split="held_out") for row in overlaps]


def verifiable_table(settings: Settings) -> pl.DataFrame:
    """The validated verifiable instructions; none if `seed_data.verifiable` is not stated."""
    source, rows = settings.seed_data.verifiable, list[dict[str, Any]]()
    if source is not None:
        rows, bad = instruction_rows(list(read_rows(source, "seed_data.verifiable", ("prompt", "constraints"))))
        if bad:
            shown = "; ".join(bad[:SHOWN_BAD_ROWS])
            raise SettingsError(
                f"{len(bad)} instructions of {source.path} (seed_data.verifiable) cannot be used: {shown}."
            )
    return pl.DataFrame(_with_splits(rows, settings), schema=VerifiableInstructions.empty().schema)


def _with_splits(rows: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Rows that evaluations read, each in dev or test; both have some where there are two rows or more."""
    count = min(max(round(settings.seed_data.dev_share * len(rows)), 1), max(len(rows) - 1, 0))
    dev = {row["prompt_id"] for row in _sample(rows, count, f"{settings.random_seed}:dev")}
    return [row | {"split": "dev" if row["prompt_id"] in dev else "test"} for row in rows]


def _most_frequent(bad: Sequence[BadRow]) -> str:
    """Why most rows were dropped, by one of them; nothing if none was."""
    kinds = collections.Counter(row.reason.partition("'")[0] for row in bad)
    if not kinds:
        return ""
    kind, count = kinds.most_common(1)[0]
    example = next(row for row in bad if row.reason.startswith(kind))
    return f" {len(bad)} were dropped, {count} of them like {example.split} line {example.line}: {example.reason}."


def _split_sizes(settings: Settings, usable: int, bad: Sequence[BadRow]) -> dict[str, int]:
    """How many usable rows of the training file are trained on, and how many are set aside for a judge and a scorer."""
    seed, limits = settings.seed_data, dict[str, int | None]()
    if settings.judge.kind == "trained":
        limits["judge"] = seed.judge_limit
    if not isinstance(settings.scorer, PublishedScorer):
        limits["scorer"] = seed.scorer_limit
    if usable < (least := max(4, 4 * len(limits))):
        whose = ", 2 of them for ".join(["", *(f"the {split}" for split in limits)])
        raise SettingsError(
            f"seed_data.train has {usable} usable rows; at least {least} are needed{whose}.{_most_frequent(bad)}"
        )
    wanted = min(seed.train_limit or usable, usable)
    wishes = {split: limit or max(wanted // 4, 2) for split, limit in limits.items()}
    spare, aside = max(usable - wanted, usable // 2), dict[str, int]()
    # Who wants least goes first, so that nobody gets less than an equal share because another wants much.
    for split in sorted(wishes, key=lambda split: wishes[split]):
        aside[split] = min(wishes[split], (spare - sum(aside.values())) // (len(wishes) - len(aside)))
    return {"train": min(wanted, usable - sum(aside.values()))} | {split: aside[split] for split in wishes}


def _sample(rows: list[dict[str, Any]], limit: int | None, random_seed: str) -> list[dict[str, Any]]:
    """A random subset in the original order; all rows without a limit."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place] for place in sorted(random.Random(random_seed).sample(range(len(rows)), limit))]
