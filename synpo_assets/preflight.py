"""What can be checked before any model is loaded: seed data, sizes, disk; and what a run will cost."""

import random
import shutil
from pathlib import Path

import polars as pl

from resources.model_source import cached_initial_policy, fetch_initial_policy
from resources.seed_source import read_rows
from resources.settings import Settings, SettingsError
from synpo_assets.method.seed import BadRow, seed_rows

SHOWN_BAD_ROWS = 5
ROOM_WITHOUT_MODEL = 2_000_000_000
SEED_SCHEMA = {"prompt_id": pl.String, "prompt": pl.String, "answer": pl.String, "split": pl.String, "line": pl.Int64}


def seed_table(settings: Settings) -> tuple[pl.DataFrame, list[BadRow]]:
    """Reads and validates the seed, and takes the subsets that the settings ask for.

    Returns:
        The table of the asset `seed_pairs`, and the rows that were dropped.

    Raises:
        SettingsError: A file or column is missing, or there are bad rows and `seed_data.on_bad_rows` is `refuse`.
    """
    seed = settings.seed_data
    columns = (seed.prompt_column, seed.answer_column)
    train = list(read_rows(seed.train, "seed_data.train", columns))
    held_out = list(read_rows(seed.held_out, "seed_data.held_out", columns))
    good, bad = seed_rows(train, held_out, *columns)
    if bad and seed.on_bad_rows == "refuse":
        shown = "; ".join(f"{row.split} line {row.line}: {row.reason}" for row in bad[:SHOWN_BAD_ROWS])
        raise SettingsError(
            f"{len(bad)} seed rows cannot be used ({shown}{'; …' if len(bad) > SHOWN_BAD_ROWS else ''}). Correct "
            f"{seed.train.path} and {seed.held_out.path}, or set seed_data.on_bad_rows to `drop`."
        )
    rows = []
    for split, limit in (("train", seed.train_limit), ("held_out", seed.held_out_limit)):
        of_split = [row for row in good if row["split"] == split]
        if len(of_split) < 2:
            raise SettingsError(f"seed_data.{split} has {len(of_split)} usable rows; at least 2 are needed.")
        chosen = range(len(of_split))
        if limit is not None and limit < len(of_split):
            chosen = sorted(random.Random(f"{settings.random_seed}:{split}").sample(chosen, limit))
        rows += [of_split[place] for place in chosen]
    return pl.DataFrame(rows, schema=SEED_SCHEMA), bad


def check_before_run(settings: Settings, home: Path) -> None:
    """Everything that can fail is tried before training: seed data, corpus, disk, and getting M_0.

    Raises:
        SettingsError: A setting, a data file or the disk does not allow the run.
        resources.model_source.ModelSourceError: M_0 cannot be had.
        resources.chat.ChatTemplateError: M_0 has no chat template.
    """
    seed_table(settings)
    next(read_rows(settings.keyword_pool.corpus, "keyword_pool.corpus", (settings.keyword_pool.text_column,)))
    check_disk(settings, home)
    fetch_initial_policy(settings.initial_policy)


def check_disk(settings: Settings, home: Path) -> int:
    """Compares the free space under the home with what the checkpoints of all iterations take.

    Returns:
        The bytes that will be needed.

    Raises:
        SettingsError: There is less.
    """
    needed = disk_needed(settings)
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SettingsError(
            f"{home} has {free / 1e9:.1f} GB free and the run needs about {needed / 1e9:.1f} GB: free some space, lower "
            "max_iterations, or choose another directory with --home."
        )
    return needed


def disk_needed(settings: Settings) -> int:
    """Bytes of all checkpoints of the experiment, plus the download of M_0 if it is not on this machine yet."""
    cached = cached_initial_policy(settings.initial_policy)
    if cached is None:
        return ROOM_WITHOUT_MODEL
    weights = sum(file.stat().st_size for file in cached.glob("*.safetensors"))
    # Generator and reward model once, improver and policy per iteration; float32 takes twice the room of bfloat16.
    return 2 * weights * (2 + 2 * settings.max_iterations)
