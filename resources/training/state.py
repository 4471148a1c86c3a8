"""Saved states of a training in progress: a killed training goes on from the newest complete one."""

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.storage.files import write_atomically

if TYPE_CHECKING:
    from transformers import TrainerCallback

# The trainer keeps this many, so that a kill while one is written leaves the one before it.
KEPT_STATES = 2
MARKER = "complete.json"


def newest_state(directory: Path) -> tuple[Path | None, float]:
    """The newest complete state, and the seconds of training that led to it; those that were only half written are removed."""
    complete = []
    for state in directory.glob("checkpoint-*"):
        if (state / MARKER).exists():
            complete.append(state)
        else:
            shutil.rmtree(state)
    if not complete:
        return None, 0.0
    newest = max(complete, key=lambda state: int(state.name.rpartition("-")[2]))
    return newest, json.loads((newest / MARKER).read_text())["seconds"]


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
                write_atomically(saved / MARKER, json.dumps({"seconds": seconds}).encode())

    return Marking()
