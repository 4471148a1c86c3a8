"""What can be checked before any model is loaded: seed data, sizes, disk; and what a run will cost."""

import os
import random
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import polars as pl
from rich.console import Console
from rich.table import Table
from upath import UPath

from resources.judging.server_judge import load_template
from resources.models.device import prepare_device
from resources.models.model_source import (
    cached_initial_policy,
    fetch_embedding_model,
    fetch_initial_policy,
    fetch_reward_model,
)
from resources.settings.data import SeedData
from resources.settings.machine import Storage
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.seed_source import read_rows
from resources.training.processes import processes_to_start, refuse_missing_packages
from resources.training.state import KEPT_STATES
from synpo_assets.cli.calibration import Calibration, calibrate, known_calibration
from synpo_assets.cli.estimate import Kind, Rate, expected_work, parameter_count, rates_on_cpu, seconds
from synpo_assets.graph.schemas import VerifiableInstructions
from synpo_assets.method.prompts import words_of
from synpo_assets.method.seed import BadRow, overlapping_rows, seed_rows
from synpo_assets.method.verifiable import instruction_rows

SHOWN_BAD_ROWS = 5
CONNECT_SECONDS = 10
ROOM_WITHOUT_MODEL = 2_000_000_000
SEED_SCHEMA = {"prompt_id": pl.String, "prompt": pl.String, "answer": pl.String, "split": pl.String, "line": pl.Int64}


def seed_table(settings: Settings) -> tuple[pl.DataFrame, list[BadRow]]:
    """Reads and validates the seed, and takes the subsets that the settings ask for.

    Returns:
        The table of the asset `seed_pairs`, and the rows that were dropped.

    Raises:
        SettingsError: A file or column is missing, there are bad rows and `seed_data.on_bad_rows` is `refuse`, or the
            verifiable instructions cannot be used.
    """
    seed = settings.seed_data
    columns = (seed.prompt_column, seed.answer_column)
    train = list(read_rows(seed.train, "seed_data.train", columns))
    held_out = list(read_rows(seed.held_out, "seed_data.held_out", columns))
    good, bad = seed_rows(train, held_out, *columns)
    ngram, files = settings.prompt_generator.decontamination_ngram, [seed.train.path, seed.held_out.path]
    prompts = [row["prompt"] for row in good if row["split"] == "held_out"]
    overlaps = overlapping_rows(good, prompts, ngram, "held-out prompt")
    good, bad = _without(good, overlaps), bad + overlaps
    instructions = verifiable_table(settings)["prompt"].to_list()
    overlaps = overlapping_rows(good, instructions, ngram, "verifiable instruction")
    good, bad = _without(good, overlaps), bad + overlaps
    if overlaps and seed.verifiable is not None:
        files.append(seed.verifiable.path)
    if bad and seed.on_bad_rows == "refuse":
        shown = "; ".join(f"{row.split} line {row.line}: {row.reason}" for row in bad[:SHOWN_BAD_ROWS])
        raise SettingsError(
            f"{len(bad)} seed rows cannot be used ({shown}{'; …' if len(bad) > SHOWN_BAD_ROWS else ''}). Correct "
            f"{', '.join(files[:-1])} and {files[-1]}, or set seed_data.on_bad_rows to `drop`."
        )
    usable = {split: [row for row in good if row["split"] == split] for split in ("train", "held_out")}
    if len(usable["held_out"]) < 2:
        raise SettingsError(f"seed_data.held_out has {len(usable['held_out'])} usable rows; at least 2 are needed.")
    train_count, judge_count = _train_and_judge(seed, len(usable["train"]))
    trained_on = _sample(usable["train"], train_count, f"{settings.random_seed}:train")
    read = {row["prompt_id"] for row in trained_on}
    left = [row for row in usable["train"] if row["prompt_id"] not in read]
    set_aside = [row | {"split": "judge"} for row in _sample(left, judge_count, f"{settings.random_seed}:judge")]
    asked = _sample(usable["held_out"], seed.held_out_limit, f"{settings.random_seed}:held_out")
    return pl.DataFrame([*trained_on, *set_aside, *asked], schema=SEED_SCHEMA), bad


def _without(good: list[dict[str, Any]], overlaps: list[BadRow]) -> list[dict[str, Any]]:
    """The rows, less the training rows that overlap."""
    lines = {row.line for row in overlaps}
    return [row for row in good if row["split"] == "held_out" or row["line"] not in lines]


def verifiable_table(settings: Settings) -> pl.DataFrame:
    """Reads and validates the verifiable instructions.

    Returns:
        The table of the asset `verifiable_instructions`, without rows if `seed_data.verifiable` is not stated.

    Raises:
        SettingsError: The file or a column is missing, or a row cannot be used.
    """
    source, rows = settings.seed_data.verifiable, list[dict[str, Any]]()
    if source is not None:
        rows, bad = instruction_rows(list(read_rows(source, "seed_data.verifiable", ("prompt", "constraints"))))
        if bad:
            shown = "; ".join(bad[:SHOWN_BAD_ROWS])
            raise SettingsError(
                f"{len(bad)} instructions of {source.path} (seed_data.verifiable) cannot be used: {shown}."
            )
    return pl.DataFrame(rows, schema=VerifiableInstructions.empty().schema)


def _train_and_judge(seed: SeedData, usable: int) -> tuple[int, int]:
    """How many usable rows of the training file are trained on, and how many are set aside for the judge.

    Raises:
        SettingsError: There are too few rows for both.
    """
    if usable < 4:
        raise SettingsError(
            f"seed_data.train has {usable} usable rows; at least 4 are needed, 2 of them for the independent judge."
        )
    wanted = min(seed.train_limit or usable, usable)
    judge = min(seed.judge_limit or max(wanted // 4, 2), max(usable - wanted, usable // 2))
    return min(wanted, usable - judge), judge


def _sample(rows: list[dict[str, Any]], limit: int | None, random_seed: str) -> list[dict[str, Any]]:
    """A random subset in the original order; all rows without a limit."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place] for place in sorted(random.Random(random_seed).sample(range(len(rows)), limit))]


def shown_seed_prompts(settings: Settings, seed: pl.DataFrame) -> pl.DataFrame:
    """The rows of the train split whose prompt may be shown to M_0 when it writes the Self-Instruct baseline.

    Args:
        settings: The experiment.
        seed: The table of the asset `seed_pairs`.

    Raises:
        SettingsError: All prompts are too long.
    """
    most = settings.diversity.self_instruct_max_words
    train = seed.filter(split="train")
    shown = train.filter([len(words_of(prompt)) <= most for prompt in train["prompt"]])
    if shown.is_empty():
        raise SettingsError(
            f"No seed prompt has at most diversity.self_instruct_max_words = {most} words, so none can be shown to M_0 for "
            "the Self-Instruct baseline: raise it."
        )
    return shown


def check_before_run(settings: Settings, home: Path, iterations: int = 1) -> None:
    """Everything that can fail is tried before training: seed data, corpus, storage, disk, and getting M_0.

    Raises:
        SettingsError: A setting, a data file, the storage or the disk does not allow the run.
        resources.models.model_source.ModelSourceError: M_0 cannot be had.
        resources.models.chat.ChatTemplateError: M_0 has no chat template.
    """
    if not 1 <= iterations <= settings.max_iterations:
        raise SettingsError(
            f"--iterations {iterations} is not between 1 and max_iterations = {settings.max_iterations}: raise it in the "
            f"settings (for a home that exists, in {home / 'settings.yaml'})."
        )
    _check_data_and_training(settings)
    check_storage(settings.storage)
    check_disk(settings, home)
    fetch_initial_policy(settings.initial_policy, settings.engine.trust_remote_code)
    fetch_embedding_model(settings.diversity.embedding_model, settings.engine.trust_remote_code)
    if settings.scorer.kind != "trained":
        fetch_reward_model(settings.scorer, settings.engine.trust_remote_code)
    # Only now is the size of a model known that had to be downloaded.
    check_disk(settings, home)


def check_training(settings: Settings) -> None:
    """Checks that every training can be divided among its processes here, and that its packages are installed.

    Raises:
        resources.training.trainer.TrainingError: One cannot.
    """
    for training in settings.trainings:
        refuse_missing_packages(settings.training_processes, training)
        processes_to_start(settings.training_processes, training, settings.engine)


def _check_data_and_training(settings: Settings) -> tuple[pl.DataFrame, list[BadRow], int]:
    """Reads all data that the settings name; the seed, its rows that were dropped, and how many instructions there are."""
    seed, dropped = seed_table(settings)
    shown_seed_prompts(settings, seed)
    instructions = verifiable_table(settings).height
    next(read_rows(settings.keyword_pool.corpus, "keyword_pool.corpus", (settings.keyword_pool.text_column,)))
    check_training(settings)
    _check_judge(settings)
    return seed, dropped, instructions


def _check_judge(settings: Settings) -> None:
    """Reads the template of a server that judges; the server itself may be started later."""
    if settings.judge.server:
        load_template(settings.judge.server.template)


def check_storage(storage: Storage) -> None:
    """Connects to the database of the history, and writes and removes a file where artifacts are kept.

    Raises:
        SettingsError: A driver is not installed, or one of them does not answer or refuses.
    """
    if storage.dagster_database is not None:
        try:
            import dagster_postgres  # noqa: F401
            import psycopg2

            psycopg2.connect(storage.dagster_database, connect_timeout=CONNECT_SECONDS).close()
        except ImportError as error:
            raise SettingsError(
                f"storage.dagster_database needs {error.name}, which is not installed: pip install 'synpo[postgres]'."
            ) from None
        except psycopg2.Error as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"The database of storage.dagster_database cannot be used: {reason}") from None
    if storage.artifacts is not None:
        probe = UPath(storage.artifacts) / f".{uuid.uuid4().hex}.probe"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        # Each kind of object store has errors of its own, and a missing driver is one of them.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise SettingsError(
                f"{storage.artifacts} (storage.artifacts) cannot be written to: {reason}. Check the URL, the credentials "
                "and the endpoint; for S3, pip install 'synpo[s3]'."
            ) from None


def check_disk(settings: Settings, home: Path) -> int:
    """Compares the free space under the home with what the checkpoints of all iterations take.

    Returns:
        The bytes that will be needed.

    Raises:
        SettingsError: There is less.
    """
    needed = disk_needed(settings)
    if home.exists() and not home.is_dir():
        raise SettingsError(f"{home} is a file: name a directory with --home.")
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise SettingsError(f"{existing} cannot be written to: choose another directory with --home.")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SettingsError(
            f"{home} has {free / 1e9:.1f} GB free and the run needs about {needed / 1e9:.1f} GB: free some space, lower "
            "max_iterations, or choose another directory with --home."
        )
    return needed


def disk_needed(settings: Settings) -> int:
    """Bytes of all checkpoints and of one training's saved states, plus the download of M_0 if it is not here yet."""
    cached = cached_initial_policy(settings.initial_policy)
    if cached is None:
        return ROOM_WITHOUT_MODEL
    weights = sum(file.stat().st_size for file in cached.glob("*.safetensors"))
    # Generator, reward model and judge once, improver and policy per iteration; float32 takes twice the room of bfloat16.
    per_iteration = 2 if settings.trains_improver else 1
    checkpoints = 2 * weights * (3 + per_iteration * settings.max_iterations)
    # A saved state of a full training holds the weights and two moments of AdamW for each, in float32.
    is_full = any(training.lora is None for training in settings.trainings)
    return checkpoints + (KEPT_STATES * 3 * 2 * weights if is_full else 0)


def print_check(settings: Settings, home: Path, measure: bool = False) -> None:
    """Prints what was validated and what the run will cost; loads no model and writes nothing, unless asked to measure.

    Args:
        settings: The experiment.
        home: Its home; it need not exist.
        measure: Whether to measure first how fast this machine is, which takes a minute or two.

    Raises:
        SettingsError: A setting, a data file or the disk does not allow the run.
        resources.models.model_source.ModelSourceError: M_0 is needed to measure and cannot be had.
        FinalError: The settings do not fit this machine.
    """
    console = Console()
    seed, dropped, instructions = _check_data_and_training(settings)
    check_disk(settings, home)
    if measure:
        calibration: Calibration | None = calibrate(settings, seed, lambda line: console.print(line, markup=False))
    else:
        calibration = known_calibration(settings)
    # After the measurement, which downloads M_0: only then is its size known.
    disk = check_disk(settings, home)
    cached = cached_initial_policy(settings.initial_policy)
    device = prepare_device(settings.engine)
    counts = {split: seed.filter(split=split).height for split in ("train", "judge", "held_out")}
    where = f"on this machine, {cached}" if cached else "not on this machine yet: the first run downloads it"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("settings", f"valid (preset {settings.preset}), home {home}")
    shares = f"{counts['train']} train, {counts['judge']} for the judge, {counts['held_out']} held out"
    facts.add_row("seed", f"{shares}, {len(dropped)} dropped; {instructions} verifiable instructions")
    facts.add_row("M_0", f"{settings.initial_policy.name}, {where}")
    facts.add_row("device", f"{device}, {os.cpu_count()} cores")
    room = f"about {disk / 1e9:.1f} GB for all iterations" if cached else "unknown until M_0 is downloaded"
    facts.add_row("disk", room)
    console.print(facts, soft_wrap=True)
    console.print(_cost(settings, seed, instructions, *known_rates(calibration, cached, device)), soft_wrap=True)


def known_rates(
    calibration: Calibration | None, cached: Path | None, device: str
) -> tuple[Mapping[Kind, Rate] | None, str]:
    """How fast this machine is, and how that is known.

    Args:
        calibration: What was measured here, if anything was.
        cached: The directory of M_0, if it is on this machine.
        device: `cuda` or `cpu`.

    Returns:
        The rates, or None if they are unknown; and the end of a sentence that says where they come from.
    """
    if calibration is not None:
        rates = ", ".join(f"{kind} {rate.tokens_per_second:,.0f}" for kind, rate in calibration.rates.items())
        made_for = calibration.made_for
        return calibration.rates, (
            f"measured on this machine ({made_for['device']}) on {calibration.measured} with {made_for['model']['name']}, "
            f"in tokens/s: {rates}."
        )
    measuring = "`synpo check --calibrate` measures this machine."
    if device == "cpu" and cached is not None and cached.exists():
        return rates_on_cpu(parameter_count(cached)), (
            f"scaled by parameters from rates of SmolLM2-135M on two CPU cores. {measuring}"
        )
    return None, f"unknown. {measuring}"


def _cost(
    settings: Settings, seed: pl.DataFrame, instructions: int, rates: Mapping[Kind, Rate] | None, basis: str
) -> Table:
    work, last = expected_work(settings, seed, instructions), settings.max_iterations
    once, repeated = [item for item in work if item.once], [item for item in work if not item.once]
    # The last iteration is the longest: M_t is trained on the pairs of all iterations so far.
    phases = {"made once": (once, [1]), "iteration 1": (repeated, [1]), f"iteration {last}": (repeated, [last])}
    phases[f"all {last} iterations"] = (repeated, list(range(1, last + 1)))
    caption = f"Tokens are upper bounds (every completion as long as allowed). Minutes: {basis}"
    table = Table(title="Expected work", title_justify="left", caption=caption, caption_justify="left")
    for column in ("", "tokens written", "tokens trained on", "tokens scored", "minutes"):
        table.add_column(column, justify="right")
    for phase, (items, iterations) in phases.items():
        every = [(item, iteration) for item in items for iteration in iterations]
        tokens = [sum(item.in_iteration(t) for item, t in every if item.kind == kind) for kind in get_args(Kind)]
        minutes = "?" if rates is None else f"{sum(seconds(item, rates, t) for item, t in every) / 60:.0f}"
        table.add_row(phase, *(f"{count:,.0f}" for count in tokens), minutes)
    return table
