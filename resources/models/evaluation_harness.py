"""lm-eval, and the question files of benchmarks that others judge."""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from resources.common.errors import FinalError
from resources.common.progress import Progress
from resources.models.device import DeviceResource, prepare_device, torch_dtype
from resources.settings.evaluation import Benchmarks, BenchmarkTask
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import file_sha256, json_sha256
from resources.storage.seed_source import json_lines
from resources.storage.shards import Shards

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

logger = logging.getLogger("synpo.models")

SCORE_COLUMNS = {"key": pl.String, "found": pl.String}


class EvaluationHarness(DeviceResource):
    """Runs lm-eval on checkpoints, on this machine and with transformers, whatever engine generates elsewhere.

    What was found is kept under `scores`, task by task, in a folder named by the fingerprint of everything that can change it:
    M_0 is evaluated once for all iterations, and a run that was killed goes on with the task that it was at.
    """

    scores: str

    def evaluate(
        self, checkpoint: Checkpoint, manager: "TaskManager", options: Benchmarks
    ) -> list[tuple[BenchmarkTask, dict[str, Any]]]:
        """Runs the tasks of the settings, or reads what was found earlier: lm-eval's `results` and `n-samples` of each."""
        finished = self._finished(checkpoint, options)
        keys = pl.Series([_key(task) for task in options.tasks])
        missing = [task for task in options.tasks if _key(task) not in set(finished.finished(keys))]
        if len(missing) < len(options.tasks):
            logger.info(
                f"{checkpoint.label}: {len(options.tasks) - len(missing)} of {len(options.tasks)} tasks are reused."
            )
        model = self._load(checkpoint, options) if missing else None
        for task in missing:
            started = time.monotonic()
            with Progress(None, f"{checkpoint.label}: {_key(task)}", logger):
                found = _run(model, manager, task, options)
            finished.write([{"key": _key(task), "found": json.dumps(found, default=float)}])
            logger.info(f"{checkpoint.label}: {_key(task)} took {time.monotonic() - started:.0f} s.")
        known = dict(finished.rows(keys).select("key", "found").iter_rows())
        return [(task, json.loads(known[_key(task)])) for task in options.tasks]

    def _finished(self, checkpoint: Checkpoint, options: Benchmarks) -> Shards:
        folder = Path(options.task_folder) if options.task_folder else None
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder else []
        fingerprint = {
            "checkpoint": checkpoint.sha,
            "limit": options.limit,
            "dtype": str(torch_dtype(self.engine)),
            "task_folder": json_sha256({str(file.relative_to(str(folder))): file_sha256(file) for file in files}),
            **{name: importlib.metadata.version(name) for name in ("lm_eval", "transformers")},
        }
        return Shards(self.scores, fingerprint, checkpoint.label, SCORE_COLUMNS)

    def _load(self, checkpoint: Checkpoint, options: Benchmarks) -> "LM":
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=checkpoint.weights,
            device=prepare_device(self.engine),
            dtype=torch_dtype(self.engine),
            batch_size=options.batch_size,
            trust_remote_code=self.engine.trust_remote_code,
        )


# By this tag lm-eval imports a module beside the task file.
RUNS_CODE = "!function"


def open_tasks(options: Benchmarks, trust_code: bool) -> "TaskManager":
    """Finds the tasks of the settings, and their data, before any model is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise FinalError("benchmarks.tasks needs lm-eval: install the extra `benchmarks`, or remove the setting.")
    folder = options.task_folder
    if folder and not (Path(folder).is_dir() and any(Path(folder).rglob("*.yaml"))):
        raise FinalError(f"The folder {folder} (benchmarks.task_folder) holds no .yaml file: name one with task files.")
    files = Path(folder).rglob("*.yaml") if folder and not trust_code else []
    for file in (file for file in files if RUNS_CODE in file.read_text("utf-8", "ignore")):
        raise FinalError(
            f"{file} (benchmarks.task_folder) runs Python code by `{RUNS_CODE}`. Read it, then set "
            "engine.trust_remote_code to true, or remove the file."
        )
    from lm_eval.tasks import TaskManager

    names = [task.name for task in options.tasks]
    manager = TaskManager(include_path=folder, include_defaults=False)
    if set(names) - set(manager.all_tasks):
        # lm-eval's own are thousands of files, which take long to read.
        manager = TaskManager(include_path=folder)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise FinalError(
            f"lm-eval knows no task `{unknown[0]}` (benchmarks.tasks): correct the name, or add its file to "
            "benchmarks.task_folder."
        )
    for name in names:
        _try_task(manager, name, folder)
    return manager


def read_questions(
    file: str, setting: str, problem: Callable[[object, list[dict[str, Any]]], str | None]
) -> list[dict[str, Any]]:
    """The rows of a question file, a JSON list (.json) or one object a line.

    `problem` says what is wrong with a row that follows other rows, or None.
    """
    path = Path(file)
    if not path.is_file():
        raise FinalError(f"The file {path} ({setting}) does not exist: name the benchmark's question file.")
    is_list = path.suffix == ".json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8-sig")) if is_list else list(json_lines(path))
    except (ValueError, RecursionError) as error:
        raise FinalError(f"The file {path} ({setting}) is not valid JSON: {error}") from None
    if not isinstance(stated, list) or not stated:
        raise FinalError(f"The file {path} ({setting}) holds no list of questions: name the benchmark's question file.")
    numbered = list(enumerate(stated, start=1)) if is_list else stated
    rows = [row for _, row in numbered]
    for place, (number, row) in enumerate(numbered):
        if wrong := problem(row, rows[:place]):
            raise FinalError(
                f"{'Row' if is_list else 'Line'} {number} of {path} ({setting}) {wrong}: name the benchmark's own question file, "
                "unchanged."
            )
    return rows


def _key(task: BenchmarkTask) -> str:
    return f"{task.name} with {task.shots} shots"


def _try_task(manager: "TaskManager", name: str, folder: str | None) -> None:
    try:
        with _inside(folder):
            manager.load([name])
    except ConnectionError as error:
        raise RuntimeError(f"The data of `{name}` (benchmarks.tasks) cannot be had: {_line(error)}") from None
    # A task file may call any code.
    except Exception as error:
        raise FinalError(f"The task `{name}` (benchmarks.tasks) cannot be loaded: {_line(error)}") from None


def _run(model: "LM | None", manager: "TaskManager", task: BenchmarkTask, options: Benchmarks) -> dict[str, Any]:
    import lm_eval

    with _inside(options.task_folder):
        found = lm_eval.simple_evaluate(
            model,
            tasks=[task.name],
            num_fewshot=task.shots,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
        )
    return {name: found[name] for name in ("results", "n-samples")}


def _inside(folder: str | None) -> contextlib.AbstractContextManager[None]:
    """Where `data_files` of a task file are looked for: datasets takes them as relative to the working directory."""
    return contextlib.chdir(folder) if folder else contextlib.nullcontext()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
