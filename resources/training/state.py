"""Saved states of a training in progress: a killed training goes on from the newest one that is whole."""

import hashlib
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from pydantic import BaseModel, ValidationError

from resources.storage.files import DAMAGED, write_atomically

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger("synpo.training")

# The trainer keeps this many, so that a kill while one is written leaves the one before it.
KEPT_STATES = 2
MARKER = "complete.json"


class _Marker(BaseModel):
    """What a state was when all processes had written their part of it."""

    seconds: float  # Of training that led to it.
    files: dict[str, str]  # The hash of each file, by its name in the state.


def newest_state(directory: Path) -> tuple[Path | None, float]:
    """The newest complete state, and the seconds of training that led to it.

    States that were only half written are removed. A damaged one is set aside, so that the training goes on from the one before.
    """
    states = [place for place in directory.glob("checkpoint-*") if _step(place).isdecimal()]
    for state in sorted(states, key=lambda state: int(_step(state)), reverse=True):
        if state.is_dir() and not (state / MARKER).exists():
            _remove(state)
        elif problem := _problem(state):
            aside = state.with_name(f"step-{_step(state)}{DAMAGED}")
            if aside.exists() or aside.is_symlink():
                _remove(aside)
            state.rename(aside)
            logger.warning(
                f"The saved state {state} is not as it was written: {problem}. It is set aside as {aside.name}, and the training "
                "goes on from the state before it, or begins anew if there is none."
            )
        else:
            return state, _marker(state).seconds
    return None, 0.0


def _remove(state: Path) -> None:
    """Removes a state, or what lies in its place; of one that was moved elsewhere, the link to it."""
    if state.is_symlink() or state.is_file():
        state.unlink()
    else:
        shutil.rmtree(state)


def mark(state: Path, seconds: float) -> None:
    """Says that a state is complete, and what its files are now."""
    write_atomically(state / MARKER, _Marker(seconds=seconds, files=_hashes(state)).model_dump_json().encode())


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
                mark(Path(args.output_dir) / f"checkpoint-{state.global_step}", seconds)

    return Marking()


def _problem(state: Path) -> str | None:
    """What differs from the state that was marked; None if nothing does."""
    try:
        written, found = _marker(state).files, _hashes(state)
    except (OSError, ValidationError):
        return f"{MARKER} cannot be read"
    differing = [name for name, digest in written.items() if found.get(name) != digest]
    return f"{differing[0]} is gone or was altered" if differing else None


def _marker(state: Path) -> _Marker:
    return _Marker.model_validate_json((state / MARKER).read_bytes())


def _hashes(state: Path) -> dict[str, str]:
    hashes = {}
    for file in sorted(state.rglob("*")):
        if file.is_file() and file.name != MARKER:
            with file.open("rb") as opened:
                hashes[str(file.relative_to(state))] = hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()
    return hashes


def _step(state: Path) -> str:
    return state.name.rpartition("-")[2]
