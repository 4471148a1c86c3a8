"""How fast this machine is with the model, engine and training of the settings, measured in a minute or two."""

import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import platformdirs
import polars as pl
from pydantic import BaseModel, ValidationError

from resources.generation.language_model import LanguageModel
from resources.models.device import device_name, prepare_device, torch_dtype
from resources.models.model_source import fetch_initial_policy
from resources.scoring.scorer import RewardScorer
from resources.settings.method import TrainedScorer
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import json_sha256, temporary_directory_beside, write_atomically
from resources.storage.manifests import MERGED
from resources.training.trainer import Trainer
from synpo_assets.cli.estimate import Kind, Rate
from synpo_assets.method.templates import user_message

# Enough to fill a batch: a GPU answers hundreds of prompts in the time of one.
ANSWERS = {"cpu": 40, "cuda": 256}
STEPS = 3
SHORTEST_SECONDS = 1e-3


class Calibration(BaseModel):
    """What was measured, and the model, processor and settings that the rates belong to."""

    made_for: dict[str, Any]
    measured: date
    rates: dict[Kind, Rate]


def known_calibration(settings: Settings) -> Calibration | None:
    """The rates that were measured on this machine for such settings; None if there are none."""
    file = _file(_deciding(settings))
    try:
        return Calibration.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def calibrate(settings: Settings, seed: pl.DataFrame) -> Calibration:
    """Measures how fast M_0 answers seed prompts, trains and scores here, and keeps the result in the user's cache.

    Everything is measured twice, with little and with more work: the difference is the rate, and what is left is what a stage
    takes to start, mostly the loading and saving of the model. M_0 is downloaded if need be.
    """
    server = settings.engine.server
    if server is not None and "initial_policy" not in server.models:
        raise SettingsError(
            "To measure a server, its name for M_0 is needed, because no checkpoint has been made yet: state it under "
            "engine.server.models.initial_policy."
        )
    # SimPO lives in trl.experimental, which is why trl is pinned exactly.
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = os.environ["TQDM_DISABLE"] = "1"
    weights, _ = fetch_initial_policy(settings.initial_policy, settings.engine.trust_remote_code)
    initial = Checkpoint("initial_policy", None, "calibration", str(weights), str(weights))
    deciding = _deciding(settings)
    # Beside the result, because a trained model may be too large for the disk of temporary files.
    with _progress_on_stdout(), temporary_directory_beside(_file(deciding)) as temporary:
        generate, pairs = _generation(settings, seed, initial, temporary)
        train, reward_model = _training(settings, pairs, initial, temporary)
        score = _scoring(settings, pairs, reward_model, temporary)
    rates: dict[Kind, Rate] = {"generate": generate, "train": train, "score": score}
    calibration = Calibration(made_for=deciding, measured=date.today(), rates=rates)
    write_atomically(_file(deciding), calibration.model_dump_json(indent=2).encode())
    return calibration


@contextlib.contextmanager
def _progress_on_stdout() -> Iterator[None]:
    """Shows what the resources say; in a run, Dagster does."""
    logger, handler = logging.getLogger("synpo"), logging.StreamHandler(sys.stdout)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _generation(
    settings: Settings, seed: pl.DataFrame, initial: Checkpoint, temporary: Path
) -> tuple[Rate, list[dict[str, Any]]]:
    """The rate of writing, and pairs of the gold answers over those just written."""
    model = LanguageModel(shards=str(temporary / "shards"), engine=settings.engine, random_seed=settings.random_seed)
    rows = itertools.cycle(seed.filter(split="train").select("prompt", "answer").rows())
    chosen = list(itertools.islice(rows, ANSWERS[prepare_device(settings.engine)]))
    requests = [(str(number), user_message(prompt)) for number, (prompt, _) in enumerate(chosen)]
    sampling = settings.responses.sampling
    start = model.answer(initial, requests[:1], sampling.model_copy(update={"max_new_tokens": 1}))[1].seconds
    written, usage = model.answer(initial, requests, sampling)
    pairs = [
        {
            "prompt": user_message(prompt),
            "chosen": [{"role": "assistant", "content": gold}],
            "rejected": [{"role": "assistant", "content": own}],
            "chosen_finish_reason": "stop",
            "rejected_finish_reason": "stop",
        }
        for (prompt, gold), own in zip(chosen, written["text"], strict=True)
    ]
    return _rate(1, start, usage.generated_tokens, usage.seconds), pairs


def _training(
    settings: Settings, pairs: list[dict[str, Any]], initial: Checkpoint, temporary: Path
) -> tuple[Rate, Checkpoint]:
    """The rate of the preference optimisation, and a reward model after one step."""
    optimization = settings.preference_optimization
    training = optimization.training.model_copy(update={"epochs": 1, "max_examples": None})
    processes = settings.training_processes.model_copy(update={"report_to": "none"})
    trainer = Trainer(
        engine=settings.engine, random_seed=settings.random_seed, processes=processes, states=str(temporary / "states")
    )
    places = {name: temporary / name for name in ("reward_model", "one_step", "more_steps")}
    for place in places.values():
        place.mkdir()
    rows = list(itertools.islice(itertools.cycle(pairs), STEPS * training.batch_size))
    first = rows[: training.batch_size]
    # It comes first, so that the import of libraries, which a run does beforehand, is not part of what is measured.
    trainer.train("reward", initial, _texts(first), training, places["reward_model"])
    one = trainer.train("preference", initial, first, training, places["one_step"], optimization.loss)
    more = trainer.train("preference", initial, rows, training, places["more_steps"], optimization.loss)
    place = places["reward_model"]
    reward_model = Checkpoint("reward_model", None, "calibration", str(place / MERGED), str(place))
    return _rate(one.tokens, one.seconds, more.tokens, more.seconds), reward_model


def _scoring(settings: Settings, pairs: list[dict[str, Any]], reward_model: Checkpoint, temporary: Path) -> Rate:
    scored = TrainedScorer(training=settings.preference_optimization.training, max_length=settings.scorer.max_length)
    scorer = RewardScorer(shards=str(temporary / "shards"), engine=settings.engine, scorer=scored)
    start = scorer.compare(reward_model, _texts(pairs[:1])).usage
    usage = scorer.compare(reward_model, _texts(pairs[1:])).usage
    return _rate(start.tokens, start.seconds, usage.tokens, usage.seconds)


def _texts(pairs: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs]


def _rate(tokens: int, seconds: float, more_tokens: int, more_seconds: float) -> Rate:
    """The rate between two measurements of different size, and what remains of the smaller one."""
    rate = (more_tokens - tokens) / max(more_seconds - seconds, SHORTEST_SECONDS)
    return Rate(tokens_per_second=round(rate, 1), start_seconds=round(max(seconds - tokens / rate, 0.0), 1))


def _deciding(settings: Settings) -> dict[str, Any]:
    """Everything that decides how fast this machine is with the settings."""
    nothing = Checkpoint("initial_policy", None, "", "", "")
    model = LanguageModel(shards="", engine=settings.engine, random_seed=settings.random_seed)
    lora = settings.preference_optimization.training.lora
    return {
        "model": settings.initial_policy.model_dump(exclude_none=True),
        "engine": settings.engine.model_dump(exclude={"shard_rows", "trust_remote_code"}, exclude_none=True),
        # Which engine `auto` means here, its version, and the sampling: all that has a part in finding completions again.
        "generation": model.shards_of(nothing, settings.responses.sampling).folder.name,
        "device": device_name(settings.engine),
        "dtype": str(torch_dtype(settings.engine)),
        "training": "full" if lora is None else lora.model_dump(exclude_none=True),
        "processes": settings.training_processes.model_dump(include={"processes", "accelerate_config"}),
    }


def _file(deciding: dict[str, Any]) -> Path:
    return Path(platformdirs.user_cache_dir("synpo")) / "rates" / f"{json_sha256(deciding)[:16]}.json"
