"""One of several processes that train side by side, as accelerate starts it: `python -m resources.training.process STATE`."""

import json
import logging
import sys
from pathlib import Path

from resources.common.errors import FinalError
from resources.common.processes import end_with_this_parent
from resources.training.job import TrainingJob
from resources.training.live import print_observed
from resources.training.processes import FAILURE, JOB, ROWS


def main(state: Path) -> None:
    """Takes part in the training run whose job and rows lie in a directory; a reason to fail is written there too."""
    end_with_this_parent()
    logger = logging.getLogger("synpo")
    logger.setLevel(logging.INFO)
    # The step's process, which started this one, reads the lines from there.
    logger.addHandler(logging.StreamHandler(sys.stdout))
    from accelerate import PartialState
    from datasets import load_from_disk

    from resources.storage.files import write_atomically
    from resources.training.run import train

    job = TrainingJob.model_validate_json((state / JOB).read_text())
    try:
        train(job, load_from_disk(str(state / ROWS)), print_observed)
    except Exception as error:
        is_final = isinstance(error, FinalError)
        reason = error.description if isinstance(error, FinalError) else f"{type(error).__name__}: {error}"
        # The process that fails first has the reason; the others only see that it is gone.
        if not (state / FAILURE).exists():
            write_atomically(state / FAILURE, json.dumps({"reason": reason, "is_final": is_final}).encode())
        raise
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
