"""lm-eval, and the question files of benchmarks that others judge."""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import polars as pl

from resources.common.errors import FinalError
from resources.common.progress import Progress
from resources.common.text import one_line
from resources.models.bounded import OutOfBoundsError, within_time
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
                found = _run(model, manager, task, options, self.engine.trust_remote_code)
            finished.write([{"key": _key(task), "found": json.dumps(found, default=float)}])
            logger.info(f"{checkpoint.label}: {_key(task)} took {time.monotonic() - started:.0f} s.")
        return list(zip(options.tasks, map(json.loads, finished.rows(keys)["found"]), strict=True))

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


def open_tasks(options: Benchmarks, trust_code: bool) -> "TaskManager":
    """Finds the tasks of the settings, and their data, before any model is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise FinalError("benchmarks.tasks needs lm-eval: install the extra `benchmarks`, or remove the setting.")
    folder = options.task_folder
    if folder and not (Path(folder).is_dir() and any(Path(folder).rglob("*.yaml"))):
        raise FinalError(f"The folder {folder} (benchmarks.task_folder) holds no .yaml file: name one with task files.")
    from lm_eval.tasks import TaskManager

    names = [task.name for task in options.tasks]
    with _guarded(folder, trust_code) as refusals:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not refusals and set(names) - set(manager.all_tasks):
            # lm-eval's own are thousands of files, which take long to read.
            manager = TaskManager(include_path=folder)
    if refusals:
        raise refusals[0]
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise FinalError(
            f"lm-eval knows no task `{unknown[0]}` (benchmarks.tasks): correct the name, or add its file to "
            "benchmarks.task_folder."
        )
    for name in names:
        _try_task(manager, name, folder, trust_code)
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


def _try_task(manager: "TaskManager", name: str, folder: str | None, trust_code: bool) -> None:
    try:
        with _inside(folder), _guarded(folder, trust_code):
            manager.load([name])
    except FinalError:
        raise
    except ConnectionError as error:
        raise RuntimeError(f"The data of `{name}` (benchmarks.tasks) cannot be had: {_line(error)}") from None
    # A task file may call any code.
    except Exception as error:
        raise FinalError(f"The task `{name}` (benchmarks.tasks) cannot be loaded: {_line(error)}") from None


def _run(
    model: "LM | None", manager: "TaskManager", task: BenchmarkTask, options: Benchmarks, trust_code: bool
) -> dict[str, Any]:
    import lm_eval

    with _inside(options.task_folder), _guarded(options.task_folder, trust_code):
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


@contextlib.contextmanager
def _guarded(folder: str | None, trust_code: bool) -> Iterator[list[FinalError]]:
    """Within it, lm-eval runs no code that a file of the folder names or holds, if there is a folder that is not trusted.

    What is refused is also put on the list: lm-eval passes over a file that fails while it looks for tasks.
    """
    refusals: list[FinalError] = []
    if folder is None or trust_code:
        yield refusals
        return
    import jinja2
    import lm_eval.api.task
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.tasks import _yaml_loader

    own, templates = Path(_yaml_loader.__file__).resolve().parent, lm_eval.utils.env
    own_constructor, own_metric = _yaml_loader._mk_function_ctor, lm_eval.api.task.get_metric

    def refuse(what: str) -> None:
        refusals.append(
            FinalError(f"{what}. Read the files, then set engine.trust_remote_code to true, or remove what runs code.")
        )
        raise refusals[-1]

    def constructor(base: Path, resolve: bool) -> Callable[..., Any]:
        if base.is_relative_to(own):
            return own_constructor(base, resolve)
        return lambda _, node: refuse(
            f"{node.start_mark.name} (benchmarks.task_folder) runs Python code by `!function`"
        )

    def metric(name: str, is_of_evaluate: bool = False) -> Any:
        # The library `evaluate` takes a name as a Python file, here or on the hub.
        if is_of_evaluate or name not in lm_eval.api.registry.metric_registry:
            refuse(
                f"A task of {folder} (benchmarks.task_folder) has the metric `{name}`, which is Python code that is not lm-eval's"
            )
        return own_metric(name)

    class Bounded(jinja2.Template):
        def render(self, *values: Any, **named: Any) -> str:
            try:
                with within_time():
                    return super().render(*values, **named)
            except OutOfBoundsError as error:
                raise FinalError(
                    f"A template in a task of {folder} (benchmarks.task_folder) {error}: correct it."
                ) from None

    sandbox = SandboxedEnvironment(undefined=templates.undefined, keep_trailing_newline=templates.keep_trailing_newline)
    sandbox.template_class = Bounded
    sandbox.filters.update(templates.filters)
    with (
        mock.patch.object(_yaml_loader, "_mk_function_ctor", constructor),
        mock.patch.object(lm_eval.api.task, "get_metric", metric),
        mock.patch.object(lm_eval.utils, "env", sandbox),
    ):
        yield refusals


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(str(error), 300)}"
