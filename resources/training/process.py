"""One of several processes that train side by side, as accelerate starts it: `python -m resources.training.process STATE`."""

import json
import sys
from pathlib import Path

from resources.common.processes import end_with_this_parent
from resources.training.job import TrainingError, TrainingJob
from resources.training.processes import FAILURE, JOB, ROWS


def main(state: Path) -> None:
    """Takes part in the training run whose job and rows lie in a directory.

    Args:
        state: The directory; a reason to fail is written there too.
    """
    end_with_this_parent()
    from accelerate import PartialState
    from datasets import load_from_disk

    from resources.storage.files import write_atomically
    from resources.training.run import train

    job = TrainingJob.model_validate_json((state / JOB).read_text())
    try:
        train(job, load_from_disk(str(state / ROWS)), _say)
    except Exception as error:
        is_final = isinstance(error, TrainingError)
        reason = error.description if isinstance(error, TrainingError) else f"{type(error).__name__}: {error}"
        # The process that fails first has the reason; the others only see that it is gone.
        if not (state / FAILURE).exists():
            write_atomically(state / FAILURE, json.dumps({"reason": reason, "is_final": is_final}).encode())
        raise
    PartialState().destroy_process_group()


def _say(sentence: str) -> None:
    sys.stdout.write(sentence + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
