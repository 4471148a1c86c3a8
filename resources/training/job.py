"""What a training run is: where it starts, its settings and processes; what it hands back, and how it can fail."""

import dataclasses
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from resources.common.errors import FinalError
from resources.settings.machine import Engine
from resources.settings.training import Loss, PreferenceTraining, Training

Kind = Literal["supervised", "preference", "reward"]
SUMMARY = "training_summary.json"


class TrainingError(FinalError):
    """Training cannot start or has diverged; the message says which setting to change."""


@dataclasses.dataclass(frozen=True)
class SurvivingUpdate:
    """How much of an update reaches whoever reads the weights."""

    share: float  # The projection of the change that is read on the update: 1 if all of it is left.
    changed_weights: float  # The share of the updated weights that are read as another number than before.


@dataclasses.dataclass(frozen=True)
class TrainingSummary:
    """What a training run did."""

    examples: int
    dropped: int  # Their completion was empty or did not fit at all.
    truncated: int  # Examples, or prompts and sides of pairs, of those that are left.
    tokens: int  # Of all passes over the data.
    steps: int
    seconds: float  # Loading included, and earlier runs up to the state that this one went on from.
    history: list[dict[str, float]]
    surviving: SurvivingUpdate | None = None  # None if nothing was updated.
    tracked: str | None = None  # Where a tracker shows it: an address, or a command; None without a tracker.

    def keep(self, directory: Path) -> None:
        """Writes it beside what was trained."""
        (directory / SUMMARY).write_bytes(TypeAdapter(TrainingSummary).dump_json(self))

    @staticmethod
    def kept(directory: Path) -> "TrainingSummary":
        """What was written there."""
        return TypeAdapter(TrainingSummary).validate_json((directory / SUMMARY).read_bytes())


class TrainingJob(BaseModel):
    """All that a process needs to know to take its part in a training run, except the rows."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    name: str
    start: str
    training: PreferenceTraining | Training
    loss: Loss | None
    engine: Engine  # Its threads are those of one process.
    in_bfloat16: bool  # Products; the weights are in float32.
    random_seed: int
    steps: int | None  # Of the optimizer; None: as many as training.epochs make.
    processes: int
    launched: bool  # By accelerate; if not, the step's own process trains alone.
    # As CUDA_VISIBLE_DEVICES names it; empty on a CPU. None: no other training is at work beside it.
    own_gpu: str | None
    gradient_checkpointing: bool
    padding_free: bool
    save_every_steps: int
    report_to: str
    state: Path
    resume_from: Path | None
    seconds_before: float  # Of the training that led to `resume_from`.
    directory: Path

    @property
    def accumulation_steps(self) -> int:
        """Forward passes of each process in one optimizer step: batch_size counts the examples of all processes."""
        return self.training.batch_size // (self.training.micro_batch_size * self.processes)
