"""Saved states of a training in progress: a killed training goes on from the newest complete one."""

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from resources.common.progress import Progress
from resources.storage.files import file_xxh128, replace_directory, write_atomically

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger("synpo.training")

# The trainer keeps this many, so that a kill while one is written, or damage to it, leaves the one before it.
KEPT_STATES = 2
MARKER = "complete.json"


class _Marker(BaseModel):
    seconds: float
    files: dict[str, str]  # XXH3 with 128 bits of each, by its place in the state.


def newest_state(directory: Path) -> tuple[Path | None, float]:
    """The newest complete state, and the seconds of training that led to it.

    Those that were only half written are removed. One that is not as it was written is set aside, and the one before it taken.
    """
    states = [state for state in directory.glob("checkpoint-*") if state.is_dir() and _step(state).isdecimal()]
    for state in sorted(states, key=lambda state: int(_step(state)), reverse=True):
        if not (state / MARKER).exists():
            shutil.rmtree(state)
        elif (marker := _intact(state)) is not None:
            return state, marker.seconds
        else:
            # Under a name that the trainer does not take for a state of its own.
            aside = state.with_name(f"damaged-{state.name}")
            replace_directory(state, aside)
            logger.warning(
                f"The state of this training after step {_step(state)} is not as it was written, so the disk damaged it: it is "
                f"set aside as {aside}, and the training goes on from the state before it, or anew if there is none."
            )
    return None, 0.0


def _step(state: Path) -> str:
    return state.name.rpartition("-")[2]


def _intact(state: Path) -> _Marker | None:
    """The marker of a state all of whose files are as they were written."""
    try:
        marker = _Marker.model_validate_json((state / MARKER).read_bytes())
        return marker if _checksums(state) == marker.files else None
    except (OSError, ValidationError):
        return None


def _checksums(state: Path) -> dict[str, str]:
    with Progress(None, "Reading the saved state for its checksums", logger):
        return {
            file.relative_to(state).as_posix(): file_xxh128(file)
            for file in sorted(state.rglob("*"))
            if file.is_file() and file != state / MARKER
        }


def marking_callback(seconds_before: float) -> "TrainerCallback":
    """Marks a state as complete when all processes have written their part of it.

    The order in which the trainer writes its files differs between one process, DDP, FSDP and DeepSpeed, so the presence
    of one of them tells nothing.
    """
    from transformers import TrainerCallback

    class Marking(TrainerCallback):
        """Writes the marker last."""

        started = time.monotonic()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.distributed_state.wait_for_everyone()
            if state.is_world_process_zero:
                seconds = seconds_before + time.monotonic() - self.started
                saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                marker = _Marker(seconds=seconds, files=_checksums(saved))
                write_atomically(saved / MARKER, marker.model_dump_json().encode())

    return Marking()
