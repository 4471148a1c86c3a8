"""What can be checked before any model is loaded: seed data, sizes, disk; and what a run will cost."""

import itertools
import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import polars as pl
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from resources.common.text import duration, labelled, one_line
from resources.judging.server_judge import load_template
from resources.models.device import cpu_multiplies_bfloat16, dtype_name, prepare_device
from resources.models.model_source import (
    cached_initial_policy,
    fetch_embedding_model,
    fetch_initial_policy,
    refuse_without_classifier,
)
from resources.models.weights import parameter_count, weight_files
from resources.scoring.published import fetch_reward_model
from resources.settings.files import refuse_earlier_version
from resources.settings.machine import Storage
from resources.settings.method import PublishedScorer
from resources.settings.sections import SettingsError, nearest
from resources.settings.settings import Settings
from resources.storage.files import storage_root, write_atomically
from resources.storage.seed_source import read_rows
from resources.storage.tables import ParquetTables
from resources.training.memory import refuse_too_little_memory
from resources.training.processes import processes_to_start, refuse_missing_packages
from resources.training.state import KEPT_STATES
from synpo_assets.algorithm import sides_of, stages_of
from synpo_assets.cli.calibration import Calibration, calibrate, known_calibration
from synpo_assets.cli.estimate import Rate, expected_work, rates_on_cpu, seconds, sizes_of
from synpo_assets.evaluation.benchmarks import questions_of
from synpo_assets.evaluation.diversity import shown_seed_prompts
from synpo_assets.graph.cost import Kind, Sizes
from synpo_assets.graph.outlook import EXPECTED_FILE
from synpo_assets.method.gate import gate_power
from synpo_assets.method.keywords import Keywords, paragraphs_of
from synpo_assets.method.prompts import is_language
from synpo_assets.method.seed import HELD_OUT, BadRow
from synpo_assets.method.verifiable import has_rules
from synpo_assets.stages.optimization import optimization_cost
from synpo_assets.stages.reviews import check_verdicts
from synpo_assets.stages.seed import seed_table, verifiable_table

CONNECT_SECONDS = 10
ROOM_WITHOUT_MODEL = 2_000_000_000
# Of so many texts fewer are in another language by mistake.
TRIED_TEXTS, LEAST_SHARE = 100, 0.05


def check_before_run(settings: Settings, home: Path, iterations: int = 1) -> tuple[pl.DataFrame, int]:
    """Everything that can fail is tried before training: seed data, corpus, storage, disk, and getting M_0.

    Returns the seed, and how many instructions there are.
    """
    if not 1 <= iterations <= settings.max_iterations:
        raise SettingsError(
            f"--iterations {iterations} is not between 1 and max_iterations = {settings.max_iterations}: raise it in the "
            f"settings (for a home that exists, in {home / 'settings.yaml'})."
        )
    check_data_and_training(settings)
    check_storage(settings.storage)
    check_reviews(settings, home)
    check_disk(settings, home)
    initial, _ = fetch_initial_policy(settings.initial_policy, settings.engine.trust_remote_code, compares=False)
    # What its context does not hold, and what its training takes, is known only now.
    seed, _, instructions = read_seed(settings, initial)
    refuse_too_little_memory(settings, initial)
    for section, chosen in (("scorer", settings.scorer), ("judge", settings.judge)):
        if chosen.kind in ("trained", "verifier") and not settings.engine.trust_remote_code:
            refuse_without_classifier(initial, section)
    fetch_embedding_model(settings.diversity.embedding_model, settings.engine.trust_remote_code, compares=False)
    if isinstance(settings.scorer, PublishedScorer):
        fetch_reward_model(settings.scorer, settings.engine.trust_remote_code, compares=False)
    if settings.judge.kind != "trained":
        fetch_reward_model(settings.judge.scorer, settings.engine.trust_remote_code, "judge", compares=False)
    # Only now is the size of a model known that had to be downloaded.
    check_disk(settings, home)
    refuse_small_budget(sizes_of(settings, seed, instructions))
    return seed, instructions


def read_seed(settings: Settings, initial: Path | None) -> tuple[pl.DataFrame, list[BadRow], int]:
    """The seed, its rows that were dropped, and how many instructions there are, less what M_0's context does not hold."""
    weights = str(initial) if initial else None
    seed, dropped = seed_table(settings, weights)
    shown_seed_prompts(settings, seed)
    return seed, dropped, verifiable_table(settings, weights)[0].height


def check_reviews(settings: Settings, home: Path) -> str | None:
    """What the verdicts of people are about, as a sentence; refuses a file of them that is wrong."""
    return check_verdicts(settings, ParquetTables(f"{settings.storage.root(home)}/tables"), sides_of(settings))


def check_training(settings: Settings) -> None:
    """Checks that every training can be divided among its processes here, and that its packages are installed."""
    for _, training in settings.trainings:
        refuse_missing_packages(settings.training_processes, training)
        processes_to_start(settings.training_processes, training, settings.engine)


def check_data_and_training(settings: Settings) -> tuple[pl.DataFrame, list[BadRow], int]:
    """Reads all data that the settings name; the seed, its rows that were dropped, and how many instructions there are."""
    seed, dropped, instructions = read_seed(settings, None)
    refuse_other_languages(settings, seed)
    questions_of(settings.benchmarks)
    check_training(settings)
    # The server that judges may be started later; its template is read now.
    if settings.judge.server:
        load_template(settings.judge.server.template)
    _check_server(settings)
    return seed, dropped, instructions


def refuse_other_languages(settings: Settings, seed: pl.DataFrame) -> None:
    """Raises a sentence if corpus or seed are not in the languages that are stated: hardly a keyword or prompt would be left."""
    pool, generator = settings.keyword_pool, settings.prompt_generator
    rows = read_rows(pool.corpus, "keyword_pool.corpus", (pool.text_column,))
    documents = (text for _, row in rows if isinstance(text := row.get(pool.text_column), str))
    paragraphs = list(itertools.islice(itertools.chain.from_iterable(map(paragraphs_of, documents)), TRIED_TEXTS))
    prompts = seed.filter(split="train")["prompt"].head(TRIED_TEXTS).to_list()
    keywords = Keywords(pool.language, pool.drop_personal_names)
    for texts, least, of in (
        (paragraphs, pool.keywords_per_set, "paragraphs of keyword_pool.corpus"),
        (prompts, settings.keywords_from_seed_prompt, "prompts of seed_data.train"),
    ):
        found = _suitable((len(keywords.of(text, least)) >= least for text in texts), len(texts))
        if found < LEAST_SHARE * len(texts) or not texts:
            raise SettingsError(
                f"Only {found} of the first {len(texts)} {of} have {least} keywords in the language `{pool.language}`: state the "
                "language of seed and corpus in keyword_pool.language (of those without spaces zh, ja and th can be used), or "
                "take longer texts."
            )
    if (language := generator.language) is not None:
        found = _suitable((is_language(text, language) for text in prompts), len(prompts))
        if found < LEAST_SHARE * len(prompts):
            raise SettingsError(
                f"prompt_generator.language is `{language}`, and {found} of the first {len(prompts)} prompts of seed_data.train "
                "are in it, so new prompts would be dropped: state the language of the seed there, or null to keep all."
            )


def _suitable(each: Iterable[bool], of: int) -> int:
    """How many of some texts are suitable, counted up to those that are enough: to look at the rest would take seconds."""
    return sum(itertools.islice(filter(None, each), math.ceil(LEAST_SHARE * of)))


def _check_server(settings: Settings) -> None:
    """Checks that the server has names for checkpoints that there are."""
    known = [stage.name for stage in stages_of(settings) if stage.checkpoint and not stage.state]
    for label in settings.engine.server.models if settings.engine.server else ():
        asset, _ = labelled(label)
        if asset not in known:
            raise SettingsError(
                f"engine.server.models: {label!r} is not a checkpoint that generates{nearest(asset, known)}"
            )


def check_storage(storage: Storage) -> None:
    """Connects to the database of the history; writes and removes a file where artifacts are kept, and looks who made them."""
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
            reason = one_line(str(error))
            raise SettingsError(f"The database of storage.dagster_database cannot be used: {reason}") from None
    if storage.artifacts is not None:
        probe = storage_root(storage.artifacts) / f".{uuid.uuid4().hex}.probe"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        # Each kind of object store has errors of its own, and a missing driver is one of them.
        except Exception as error:
            reason = one_line(str(error))
            raise SettingsError(
                f"{storage.artifacts} (storage.artifacts) cannot be written to: {reason}. Check the URL, the credentials "
                "and the endpoint; for S3, pip install 'synpo[s3]'."
            ) from None
        refuse_earlier_version(storage_root(storage.artifacts))


def check_disk(settings: Settings, home: Path) -> int:
    """Compares the free space under the home with what is left to write of all iterations; returns the bytes of that."""
    if home.exists() and not home.is_dir():
        raise SettingsError(f"{home} is a file: name a directory with --home.")
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise SettingsError(f"{existing} cannot be written to: choose another directory with --home.")
    files = (file.lstat() for file in (home / "checkpoints").rglob("*.safetensors"))
    written = sum(status.st_size for status in files if stat.S_ISREG(status.st_mode))
    needed, free = max(0, disk_needed(settings) - written), shutil.disk_usage(existing).free
    if free < needed:
        raise SettingsError(
            f"{home} has {decimal(free)} free and the run needs about {decimal(needed)}: free some space, lower "
            "max_iterations, or choose another directory with --home."
        )
    return needed


def disk_needed(settings: Settings) -> int:
    """Bytes of all checkpoints and of the training at work, plus the download of M_0 if it is not here yet."""
    cached = cached_initial_policy(settings.initial_policy)
    if cached is None:
        return ROOM_WITHOUT_MODEL
    weights = sum(file.stat().st_size for file in weight_files(cached))
    # Generator, reward model and judge once, improver, policy and candidates per iteration.
    per_iteration = 1 + settings.trains_improver + settings.preference_optimization.equal_steps_control
    search = settings.preference_optimization.search
    candidates = search.candidates * (1 if search.when == "first" else settings.max_iterations) if search else 0
    # M_0 mostly lies there in bfloat16; float32 takes twice its room, as do exact weights until rounded ones are made of them.
    stored = weights if dtype_name(settings.engine) == "bfloat16" else 2 * weights
    checkpoints = stored * (3 + per_iteration * settings.max_iterations + candidates) + 2 * weights
    # A saved state of a full training holds the weights and two moments of AdamW for each, in float32.
    is_full = any(training.lora is None for _, training in settings.trainings)
    return checkpoints + (KEPT_STATES * 3 * 2 * weights if is_full else 0)


def refuse_small_budget(sizes: Sizes) -> None:
    """Raises a sentence if the training of one candidate takes longer than its search may, as far as rates are known."""
    search, (rates, basis) = sizes.settings.preference_optimization.search, rates_here(sizes.settings)
    if search is None or search.max_minutes is None or rates is None:
        return
    needed = sum(seconds(work, rates) for work in optimization_cost(sizes))
    if needed > 60 * search.max_minutes:
        raise SettingsError(
            f"preference_optimization.search.max_minutes is {search.max_minutes:g}, and the training of one candidate takes about "
            f"{duration(needed)} ({basis.rstrip('.')}): raise it, or lower preferences.pairs_per_iteration or "
            "preference_optimization.training.epochs."
        )


def keep_expected_seconds(settings: Settings, home: Path, seed: pl.DataFrame, instructions: int) -> None:
    """Writes into the home how long each asset will take in each iteration, which its runs tell; nothing if unknown."""
    rates, _ = rates_here(settings)
    if rates is None:
        return
    expected = dict[str, list[float]]()
    for stage, work in expected_work(sizes_of(settings, seed, instructions)):
        before = expected.get(stage.name, [0.0] * settings.max_iterations)
        expected[stage.name] = [known + seconds(work, rates, t) for t, known in enumerate(before, start=1)]
    write_atomically(home / EXPECTED_FILE, json.dumps(expected, indent=1).encode())


def print_check(settings: Settings, home: Path, measure: bool = False) -> None:
    """Prints what was validated and what the run will cost; loads no model and writes nothing, unless asked to measure."""
    console = Console(soft_wrap=True, markup=False)
    seed, dropped, instructions = check_data_and_training(settings)
    reviewed = check_reviews(settings, home)
    check_disk(settings, home)
    if measure:
        calibrate(settings, seed)
    # After the measurement, which downloads M_0: only then is its size known.
    disk = check_disk(settings, home)
    cached = cached_initial_policy(settings.initial_policy)
    if cached is not None:
        initial, _ = fetch_initial_policy(settings.initial_policy, settings.engine.trust_remote_code, compares=False)
        seed, dropped, instructions = read_seed(settings, initial)
        refuse_too_little_memory(settings, initial)
    counts = dict.fromkeys(("train", "scorer", "judge", *HELD_OUT), 0) | dict(seed["split"].value_counts().iter_rows())
    named = "" if str(cached) == settings.initial_policy.name else f"{settings.initial_policy.name}, "
    where = f"on this machine, {cached}" if cached else "not on this machine yet: the first run downloads it"
    sizes = sizes_of(settings, seed, instructions)
    refuse_small_budget(sizes)
    facts = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    facts.add_row("settings", f"valid (preset {settings.preset}), home {home}")
    aside = "".join(f", {counts[split]} for the {split}" for split in ("scorer", "judge") if counts[split])
    shares = f"{counts['train']} train{aside}, {counts['dev']} dev, {counts['test']} test"
    ruled = f" {count} rows with rules;" if (count := has_rules(seed).sum()) else ""
    facts.add_row("seed", f"{shares}, {len(dropped)} dropped;{ruled} {instructions} verifiable instructions")
    if reviewed:
        facts.add_row("reviewed", reviewed)
    facts.add_row("gate", gate_power(counts["dev"], settings.gate.minimum, settings.gate.error_rate))
    facts.add_row("M_0", f"{named}{where}")
    facts.add_row("device", f"{prepare_device(settings.engine)}, {os.cpu_count()} cores")
    if settings.cost.budget_seconds is not None:
        facts.add_row(
            "budget", f"{settings.cost.stop_after}, for all runs of the home together; then no further step begins"
        )
    facts.add_row("disk", f"about {decimal(disk)} for all iterations" if cached else "unknown until M_0 is downloaded")
    console.print(facts)
    console.print(_cost(sizes, *rates_here(settings)))


def rates_here(settings: Settings) -> tuple[Mapping[Kind, Rate] | None, str]:
    """The `known_rates` of this machine with the settings."""
    cached = cached_initial_policy(settings.initial_policy)
    dtype = dtype_name(settings.engine)
    is_known = prepare_device(settings.engine) == "cpu" and (dtype == "float32" or cpu_multiplies_bfloat16())
    return known_rates(known_calibration(settings), cached, dtype if is_known else None)


def known_rates(
    calibration: Calibration | None, cached: Path | None, dtype: str | None
) -> tuple[Mapping[Kind, Rate] | None, str]:
    """How fast this machine is, None if that is unknown; and the end of a sentence that says how it is known.

    Args:
        dtype: The number format, on a CPU that is like those of the table of known rates; None on other devices.
    """
    if calibration is not None:
        rates = ", ".join(f"{kind} {rate.tokens_per_second:,.0f}" for kind, rate in calibration.rates.items())
        place, model = calibration.made_for["device"], calibration.made_for["model"]["name"]
        basis = f"measured on this machine ({place}) on {calibration.measured} with {model}, in tokens/s: {rates}."
        return calibration.rates, basis
    measuring = "`synpo check --calibrate` measures this machine."
    if dtype is not None and cached is not None and cached.exists():
        basis = f"scaled by parameters from rates of SmolLM2-135M in {dtype} on two CPU cores. {measuring}"
        return rates_on_cpu(parameter_count(cached), dtype), basis
    return None, f"unknown. {measuring}"


def _cost(sizes: Sizes, rates: Mapping[Kind, Rate] | None, basis: str) -> Table:
    work, last = expected_work(sizes), sizes.settings.max_iterations
    once, repeated = ([item for stage, item in work if stage.once == made_once] for made_once in (True, False))
    # The last iteration is the longest: M_t is trained on the pairs of all iterations so far.
    phases = {"made once": (once, [1]), "iteration 1": (repeated, [1]), f"iteration {last}": (repeated, [last])}
    phases[f"all {last} iterations"] = (repeated, list(range(1, last + 1)))
    caption = f"Tokens are upper bounds (every completion as long as allowed). Time: {basis}"
    table = Table(title="Expected work", title_justify="left", caption=caption, caption_justify="left")
    cost = sizes.settings.cost
    money = ["cost"] if cost.per_hour else []
    for column in ("", "tokens written", "tokens trained on", "tokens scored", "time", *money):
        table.add_column(column, justify="right")
    for phase, (items, iterations) in phases.items():
        every = [(item, iteration) for item in items for iteration in iterations]
        tokens = [sum(item.in_iteration(t) for item, t in every if item.kind == kind) for kind in get_args(Kind)]
        taken = None if rates is None else sum(seconds(item, rates, t) for item, t in every)
        times = ["?"] * (1 + len(money)) if taken is None else [duration(taken), cost.money(taken)][: 1 + len(money)]
        table.add_row(phase, *(f"{count:,.0f}" for count in tokens), *times)
    return table
