"""What a training run is: where it starts, its settings and processes; what it hands back, and how it can fail."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from resources.common.errors import FinalError
from resources.models.device import prepare_device, torch_dtype
from resources.settings.machine import Engine
from resources.settings.training import PreferenceTraining, Training
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import json_sha256

DECIDING_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")

Kind = Literal["supervised", "preference", "reward"]


class TrainingError(FinalError):
    """Training cannot start or has diverged; the message says which setting to change."""


@dataclasses.dataclass(frozen=True)
class TrainingSummary:
    """What a training run did.

    Attributes:
        examples: Examples (or pairs) trained on.
        dropped: Examples left out because their completion was empty or did not fit at all.
        truncated: Examples (or sides of pairs) that were cut to the longest length allowed.
        tokens: Tokens of all passes over the data.
        steps: Optimizer steps.
        seconds: Wall time, loading included, and that of earlier runs up to the state that this one went on from.
        history: What the trainer logged, one entry per logged step.
    """

    examples: int
    dropped: int
    truncated: int
    tokens: int
    steps: int
    seconds: float
    history: list[dict[str, float]]

    def metadata(self) -> dict[str, Any]:
        """The figures as asset metadata, with the last logged loss."""
        losses = [entry["loss"] for entry in self.history if "loss" in entry]
        figures = {key: value for key, value in dataclasses.asdict(self).items() if key != "history"}
        figures |= {"seconds": round(self.seconds, 1), "tokens_per_second": round(self.tokens / self.seconds, 1)}
        return figures | {"final_loss": losses[-1]}


class TrainingJob(BaseModel):
    """All that a process needs to know to take its part in a training run, except the rows.

    Attributes:
        kind: Which trainer, and so which columns the rows have.
        name: What trackers call the run.
        start: Directory of the weights to start from.
        training: Its settings.
        engine: How models run; its threads are those of one process.
        random_seed: The seed of data order, dropout and new layers.
        processes: Processes that train side by side.
        launched: Whether accelerate starts them; if not, the step's own process trains alone.
        save_every_steps: Optimizer steps between two saved states.
        report_to: The tracker, or `none`.
        state: Local directory of the saved states.
        resume_from: The saved state to go on from.
        seconds_before: Seconds of training that led to that state.
        directory: Where the results go.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    name: str
    start: str
    training: PreferenceTraining | Training
    engine: Engine
    random_seed: int
    processes: int
    launched: bool
    save_every_steps: int
    report_to: str
    state: Path
    resume_from: Path | None
    seconds_before: float
    directory: Path

    @property
    def accumulation_steps(self) -> int:
        """Forward passes of each process in one optimizer step: batch_size counts the examples of all processes."""
        return self.training.batch_size // (self.training.micro_batch_size * self.processes)


def fingerprint(
    kind: Kind,
    start: Checkpoint,
    rows: Sequence[Mapping[str, Any]],
    training: Training,
    engine: Engine,
    random_seed: int,
    processes: int,
    accelerate_config: str | None,
) -> str:
    """What decides the result of a training run, as 16 hex digits.

    Args:
        kind: Which trainer.
        start: The checkpoint it starts from.
        rows: What it is trained on.
        training: Its settings.
        engine: States device and number format.
        random_seed: Its seed.
        processes: Processes that train side by side.
        accelerate_config: Path of the file that chooses how they share the work, or None.
    """
    deciding = {
        "kind": kind,
        "start": start.sha,
        "rows": [json_sha256(row) for row in rows],
        "training": training.model_dump(),
        "device": prepare_device(engine),
        "dtype": str(torch_dtype(engine)),
        "random_seed": random_seed,
        "processes": processes,
        "accelerate_config": accelerate_config and Path(accelerate_config).read_text(),
        "libraries": {name: importlib.metadata.version(name) for name in DECIDING_LIBRARIES},
    }
    return json_sha256(deciding)[:16]
