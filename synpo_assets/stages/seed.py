"""What the experiment starts from: M_0, the seed pairs, the keyword pool.

Paper (sections 2 and 3.1): M_0 is an SFT model; the seed is 18,000 prompts with gold answers; the keyword pool holds
keywords of 1,000,000 RefinedWeb paragraphs, three of one paragraph each.
Here: all three are settings. With `scorer.kind: verifier`, seed rows may have rules that a program checks, and gold must
follow its own. Held-out pairs that no training reads are required beside the seed; the paper validates on the seed itself,
by a metric that it does not state. They are split once more: the gate, and whoever searches for settings, reads dev; tables
report test. Some of the seed is set aside for a judge and a scorer that are trained here and share no data with any other
training. Where the paper drops a list of keywords that holds a personal name or a stopword, we drop the word.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from resources.common.processes import map_batches
from resources.models.context import ModelContext
from resources.models.model_source import fetch_initial_policy
from resources.settings.method import PublishedScorer
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.seed_source import read_rows
from resources.storage.tables import table_metadata
from synpo_assets.graph import metrics
from synpo_assets.graph.evaluation_schemas import VerifiableInstructions
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.presentation import checkpoint_output, streamed_output, table_output
from synpo_assets.graph.schemas import KeywordPool, SeedPairs
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.graph.tables import check
from synpo_assets.method.chat_rows import unwritable
from synpo_assets.method.keywords import Keywords, keyword_set, paragraph_keyword_sets, paragraphs_of
from synpo_assets.method.row_lengths import OVER_CONTEXT, Room, length_problem, rendering_problem
from synpo_assets.method.seed import (
    HELD_OUT,
    BadRow,
    most_frequent,
    overlapping_rows,
    rows_of_templates,
    sample,
    seed_rows,
    template_of,
)
from synpo_assets.method.verifiable import instruction_rows

# A second's work, so that a small corpus starts no processes.
PARAGRAPH_BATCH = 400
POOL_BATCH = 10_000
SHOWN_BAD_ROWS = 5
SHORTER = "The limits are max_new_tokens of responses, evaluation and response_improver. "
# What the context of M_0 has to hold after a prompt.
WRITTEN = ("responses.sampling.max_new_tokens", "evaluation.sampling.max_new_tokens")


@Stage(group="seed", checkpoint=True, once=True, reads=("initial_policy",), kinds=("huggingface",))
def initial_policy(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.Output[Checkpoint]:
    """M_0, the instruct model that every training run starts from (paper, section 3.1).

    `origin` says where its weights are from, and `sha` what exactly they are. Everything in this home is made from it.
    """
    settings = services.settings
    weights, origin = fetch_initial_policy(settings.initial_policy, settings.engine.trust_remote_code)
    adopted = services.checkpoints.adopt(context, weights, origin)
    return checkpoint_output(context, services, adopted, **{f"origin {key}": value for key, value in origin.items()})


@Stage(
    SeedPairs,
    group="seed",
    once=True,
    kinds=("polars",),
    reads=(
        "seed_data", "prompt_generator.decontamination_ngram", "scorer.kind", "judge.kind", *WRITTEN,
        "response_improver.sampling.max_new_tokens", "response_improver.damaged_copies", "preferences.chosen_from",
    ),
)  # fmt: skip
def seed_pairs(
    context: dg.AssetExecutionContext, initial_policy: Checkpoint, services: dg.ResourceParam[Services]
) -> dg.Output[pl.DataFrame]:
    """The seed: prompts with gold answers, rows for judge and scorer alone, and dev and test, which no training reads (3.1).

    `split_rows` counts the rows of each use, and `dropped_rows` names what was left out, by line.
    """
    frame, dropped = seed_table(services.settings, initial_policy.weights)
    splits = [
        Metric("split_rows", rows, of=split) for split, rows in frame["split"].value_counts(sort=True).iter_rows()
    ]
    measured = [*splits, *metrics.with_rules(frame), Metric("dropped", len(dropped))]
    return table_output(context, services, frame, measured, dropped_rows=_named(dropped))


@Stage(VerifiableInstructions, group="seed", once=True, kinds=("polars",), reads=("seed_data", *WRITTEN))
def verifiable_instructions(
    context: dg.AssetExecutionContext, initial_policy: Checkpoint, services: dg.ResourceParam[Services]
) -> dg.Output[pl.DataFrame]:
    """Instructions with constraints that a program can check; no training reads them.

    `constraints` counts the rules. Empty if no file is named.
    """
    frame, dropped = verifiable_table(services.settings, initial_policy.weights)
    rules = frame.explode("constraints").unnest("constraints").group_by("rule").len().sort("len", descending=True)
    measured, shown = [Metric("dropped", len(dropped))], {"constraints": table_metadata(rules)}
    return table_output(context, services, frame, measured, dropped_rows=_named(dropped), **shown)


@Stage(KeywordPool, group="seed", lazy=True, once=True, kinds=("polars",), reads=("keyword_pool",))
def keyword_pool(
    context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]
) -> Iterator[dg.Output[pl.LazyFrame]]:
    """The keyword pool K: keywords of one corpus paragraph each, streamed to disk (paper, section 2.1).

    Each row is a set of words that once stood together in a paragraph. They decide what the synthetic prompts are about.
    """
    pool = services.settings.keyword_pool
    rows, unusable = read_rows(pool.corpus, "keyword_pool.corpus", (pool.text_column,)), list[int]()
    keywords = Keywords(pool.language, pool.drop_personal_names)
    extracted = map_batches(
        functools.partial(keywords.of_each, count=pool.keywords_per_set * pool.sets_per_paragraph),
        _paragraphs(rows, pool.text_column, unusable),
        PARAGRAPH_BATCH,
        services.settings.engine.threads or os.cpu_count() or 1,
    )
    sets = paragraph_keyword_sets(extracted, pool.keywords_per_set, services.settings.random_seed)
    limited = itertools.islice(sets, pool.max_sets)
    with tempfile.TemporaryDirectory() as directory:
        version, rows_written = _write_batches(itertools.starmap(keyword_set, limited), Path(directory))
        measured = [Metric("rows", rows_written), Metric("dropped", len(unusable))]
        if unusable:
            named = ", ".join(map(str, unusable[:SHOWN_BAD_ROWS]))
            context.log.warning(
                f"{len(unusable)} rows of keyword_pool.corpus hold no text and were left out, the first in lines {named}."
            )
        frame = pl.scan_parquet(Path(directory) / "*.parquet")
        # Yielded, not returned: the table is stored while the batches still exist.
        yield streamed_output(context, services, frame, version, measured)


def _paragraphs(rows: Iterable[tuple[int, Mapping[str, Any]]], column: str, unusable: list[int]) -> Iterator[str]:
    """The paragraphs of corpus rows, each a paragraph or a document; the lines of those without one are added to `unusable`."""
    for line, row in rows:
        text = row.get(column)
        if isinstance(text, str) and text.strip() and unwritable(text) is None:
            yield from paragraphs_of(text)
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


def seed_table(settings: Settings, weights: str | None = None) -> tuple[pl.DataFrame, list[BadRow]]:
    """The validated seed, in the subsets that the settings ask for, and the rows that were dropped.

    Those that the context of M_0 does not hold are known only where its weights are here.
    """
    seed = settings.seed_data
    columns = (seed.prompt_column, seed.answer_column)
    # Streamed, so that cells which nothing reads are not held.
    train = read_rows(seed.train, "seed_data.train", columns)
    held_out = read_rows(seed.held_out, "seed_data.held_out", columns)
    good, bad = seed_rows(train, held_out, *columns, with_rules=settings.scorer.kind == "verifier")
    good, long = _that_fit(good, settings, weights)
    bad += long
    ngram, files = settings.prompt_generator.decontamination_ngram, [seed.train.path, seed.held_out.path]
    train_rows, held_out_rows = ([row for row in good if row["split"] == split] for split in ("train", "held_out"))
    instructions = _instructions(settings, weights)[0]
    asked = [row["prompt"] for row in held_out_rows]
    repeated = overlapping_rows(train_rows, asked, ngram, "held-out prompt")
    left = _without(train_rows, repeated)
    instructed = overlapping_rows(left, [row["prompt"] for row in instructions], ngram, "verifiable instruction")
    instructed += rows_of_templates(_without(left, instructed), instructions, "verifiable instruction")
    left = _without(left, instructed)
    if instructed and seed.verifiable is not None:
        files.append(seed.verifiable.path)
    evaluated, overlaps = _dev_and_test(held_out_rows, settings)
    bad += [*repeated, *instructed, *overlaps]
    if bad and seed.on_bad_rows == "refuse":
        raise SettingsError(
            f"{len(bad)} seed rows cannot be used ({_first(bad)}). {_remedy(long)}Correct {', '.join(files[:-1])} and "
            f"{files[-1]}, or set seed_data.on_bad_rows to `drop`."
        )
    if {row["split"] for row in evaluated} != set(HELD_OUT):
        shares = " and ".join(f"{sum(row['split'] == split for row in evaluated)} for {split}" for split in HELD_OUT)
        raise SettingsError(
            f"seed_data.held_out leaves {shares}, and at least one is needed for each.{most_frequent(bad)} Add held-out rows."
        )
    chosen: list[dict[str, Any]] = []
    for split, count in _split_sizes(settings, len(left), bad).items():
        rows = sample(left, count, f"{settings.random_seed}:{split}")
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


def _without(rows: list[dict[str, Any]], bad: Sequence[BadRow]) -> list[dict[str, Any]]:
    lines = {row.line for row in bad}
    return [row for row in rows if row["line"] not in lines]


def _dev_and_test(held_out: list[dict[str, Any]], settings: Settings) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """The held-out rows that are used, in two splits, and the dev rows that repeat a prompt of test and are left out."""
    rows = _with_splits(
        sample(held_out, settings.seed_data.held_out_limit, f"{settings.random_seed}:held_out"), settings
    )
    dev, test = ([row for row in rows if row["split"] == split] for split in HELD_OUT)
    ngram = settings.prompt_generator.decontamination_ngram
    overlaps = overlapping_rows(dev, [row["prompt"] for row in test], ngram, "test prompt")
    return _without(rows, overlaps), [dataclasses.replace(row, split="held_out") for row in overlaps]


def verifiable_table(settings: Settings, weights: str | None = None) -> tuple[pl.DataFrame, list[BadRow]]:
    """The validated verifiable instructions, none if `seed_data.verifiable` is not stated, and the rows that were dropped."""
    rows, bad = _instructions(settings, weights)
    rows = [row | {"template": template_of(row)} for row in rows]
    return pl.DataFrame(rows, schema=VerifiableInstructions.empty().schema), bad


def _instructions(settings: Settings, weights: str | None) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """The verifiable instructions, each with its line, split and template, and those that cannot be used."""
    source, bad = settings.seed_data.verifiable, list[BadRow]()
    if source is None:
        return [], bad
    rows, refused = instruction_rows(list(read_rows(source, "seed_data.verifiable", ("prompt", "constraints"))))
    rows, long = _that_fit([row | {"split": "verifiable"} for row in rows], settings, weights)
    bad = [*(BadRow("verifiable", line, reason) for line, reason in refused), *long]
    rows = _with_splits(
        sample(rows, settings.seed_data.verifiable_limit, f"{settings.random_seed}:verifiable"), settings
    )
    dev, test = ([row for row in rows if row["split"] == split] for split in HELD_OUT)
    if any(row["stated_split"] for row in rows):
        bad += rows_of_templates(dev, test, "test instruction")
    bad += [
        BadRow("verifiable", row["line"], f"its `split` is {row['split']!r} and not dev or test")
        for row in rows
        if row["split"] not in HELD_OUT
    ]
    rows = _without(rows, bad)
    if bad and (settings.seed_data.on_bad_rows == "refuse" or not rows):
        raise SettingsError(
            f"{len(bad)} instructions of {source.path} (seed_data.verifiable) cannot be used ({_first(bad)}). "
            f"{_remedy(long)}Correct the file"
            + (", or set seed_data.on_bad_rows to `drop`." if rows else ", in which no other is left.")
        )
    return rows, bad


def _that_fit(
    rows: list[dict[str, Any]], settings: Settings, weights: str | None
) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """The rows that fit into M_0's context and that its chat template leaves as they are, and the others."""
    if weights is None or not rows:
        return rows, []
    context, bad = ModelContext(weights, settings.engine.trust_remote_code), list[BadRow]()
    room = room_of(settings, context.length or sys.maxsize)
    for row in rows:
        problem = rendering_problem(row, context.rendered_otherwise) or length_problem(row, room, context.tokens)
        if problem is not None:
            bad.append(BadRow(row["split"], row["line"], problem))
    long = {(row.split, row.line) for row in bad}
    return [row for row in rows if (row["split"], row["line"]) not in long], bad


def _remedy(bad: Sequence[BadRow]) -> str:
    return SHORTER if any(OVER_CONTEXT in row.reason for row in bad) else ""


def room_of(settings: Settings, context: int) -> Room:
    """How many tokens there are, and how many of them are written."""
    answer = max(settings.responses.sampling.max_new_tokens, settings.evaluation.sampling.max_new_tokens)
    rewrite = settings.response_improver.sampling.max_new_tokens if settings.trains_improver else None
    return Room(context, answer, rewrite, bool(rewrite and settings.response_improver.damaged_copies))


def _named(rows: Sequence[BadRow]) -> str:
    """Bad rows by their lines, with reasons."""
    return "\n".join(f"{row.split} line {row.line}: {row.reason}" for row in rows) or "none"


def _first(rows: Sequence[BadRow]) -> str:
    return _named(rows[:SHOWN_BAD_ROWS]).replace("\n", "; ") + ("; …" if len(rows) > SHOWN_BAD_ROWS else "")


def _with_splits(rows: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Rows that evaluations read, each in the split that it states, the others in dev or test, of which both have some.

    Those of one template go together, unless all are of one: whoever knows one of them knows the others.
    """
    stated = {template_of(row): row["stated_split"] for row in rows if row.get("stated_split")}
    free = [row for row in rows if template_of(row) not in stated]
    group = template_of if len(set(map(template_of, free))) > 1 else (lambda row: row["prompt_id"])
    groups = list(dict.fromkeys(map(group, free)))
    count = min(max(round(settings.seed_data.dev_share * len(groups)), 1), max(len(groups) - 1, 0))
    dev = set(sample(groups, count, f"{settings.random_seed}:dev"))

    def split_of(row: dict[str, Any]) -> str:
        return row.get("stated_split") or stated.get(template_of(row)) or ("dev" if group(row) in dev else "test")

    return [row | {"split": split_of(row)} for row in rows]


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
            f"seed_data.train has {usable} usable rows; at least {least} are needed{whose}.{most_frequent(bad)}"
        )
    wanted = min(seed.train_limit or usable, usable)
    wishes = {split: limit or max(wanted // 4, 2) for split, limit in limits.items()}
    spare, aside = max(usable - wanted, usable // 2), dict[str, int]()
    # Who wants least goes first, so that nobody gets less than an equal share because another wants much.
    for split in sorted(wishes, key=lambda split: wishes[split]):
        aside[split] = min(wishes[split], (spare - sum(aside.values())) // (len(wishes) - len(aside)))
    return {"train": min(wanted, usable - sum(aside.values()))} | {split: aside[split] for split in wishes}
