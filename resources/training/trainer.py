"""Training with TRL and PEFT: supervised fine-tuning, preference optimisation, and the reward model."""

import importlib.metadata
import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import dagster as dg
from pydantic import PrivateAttr

from resources.common.progress import Progress
from resources.common.text import asset_label
from resources.models.chat import load_tokenizer
from resources.models.device import (
    DeviceResource,
    prepare_device,
    stated_attention,
    torch_dtype,
    trains_in_bfloat16,
    visible_gpus,
)
from resources.settings.training import Loss, Training, TrainingProcesses
from resources.storage.checkpoint_store import TRAINING_LOG, Checkpoint
from resources.storage.files import json_sha256, write_atomically
from resources.storage.manifests import ADAPTER, MERGED
from resources.training.job import Kind, TrainingError, TrainingJob, TrainingSummary
from resources.training.live import TRACKED, observe_asset
from resources.training.memory import keeps_activations
from resources.training.processes import least_share, processes_to_start, refuse_missing_packages, run_in_processes
from resources.training.rows import ROWS_OF, TrainingRows
from resources.training.run import merge_adapter, round_weights, train
from resources.training.state import newest_state

logger = logging.getLogger("synpo.training")

DESCRIPTION = "description.json"
DECIDING_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


class Trainer(DeviceResource):
    """Trains a model from a checkpoint and writes adapter, merged weights, tokenizer and log into a directory.

    A training that was killed goes on from its newest saved state when the same training is asked for again. States are
    kept until the step ends, because until then the result can still be lost.
    """

    random_seed: int
    processes: TrainingProcesses
    states: str
    # Where others train beside it: the GPU that it has to itself, as CUDA_VISIBLE_DEVICES names it; empty on a CPU.
    own_gpu: str | None = None
    _finished: list[tuple[Path, IO[str]]] = PrivateAttr(default_factory=list)

    def forget_finished(self) -> None:
        """Called at the end of each step: removes the states of trainings whose result was kept."""
        for state, history in self._finished:
            # A result that was thrown away has no name any more; one that was kept has, wherever it was moved to.
            with history:
                is_kept = os.fstat(history.fileno()).st_nlink > 0
            if is_kept:
                shutil.rmtree(state, ignore_errors=True)
        self._finished.clear()

    def side_by_side(self, wanted: int | None) -> "list[Trainer]":
        """Trainers that can be at work at once, each in a process and on a GPU of its own; itself where there is but one.

        Args:
            wanted: How many. None: as many as there are GPUs, unless the settings spread one training over several of them.
        """
        gpus = visible_gpus(self.engine)
        count = wanted or (1 if self.processes.spreads else max(1, len(gpus)))
        if count == 1:
            return [self]
        if gpus and count > len(gpus):
            raise TrainingError(
                f"{count} trainings are to run side by side and {len(gpus)} GPUs are visible: lower "
                "preference_optimization.search.parallel, or leave it out to use all there are."
            )
        threads = self.engine.threads if gpus else max(1, (self.engine.threads or os.cpu_count() or 1) // count)
        alone = {
            "processes": self.processes.model_copy(update={"processes": 1}),
            "engine": self.engine.model_copy(update={"threads": threads}),
        }
        return [self.model_copy(update={**alone, "own_gpu": gpus[place] if gpus else ""}) for place in range(count)]

    def train(
        self,
        kind: Kind,
        start: Checkpoint,
        examples: Sequence[Any],
        training: Training,
        directory: Path,
        loss: Loss | None = None,
        steps: int | None = None,
    ) -> TrainingSummary:
        """Trains, and leaves the results in an empty directory.

        Args:
            kind: `supervised` fine-tunes on completions, the prompt masked. `preference` optimises preferences with a loss.
                `reward` trains a Bradley-Terry reward model, a classifier with one output on the layers of the start.
            examples: For `supervised`, chat messages and the answer to learn. For `preference`, rows with prompt, chosen and
                rejected as chat messages, and the finish reasons of both answers: one that was cut is not closed with the
                end-of-turn token. For `reward`, prompt, better answer and worse answer.
            steps: Optimizer steps, in place of as many as training.epochs make; warm-up and schedule follow them.
        """
        from datasets import Dataset

        from resources.training.surviving import surviving_update

        started = time.monotonic()
        tokenizer = load_tokenizer(start.weights, self.engine.trust_remote_code)
        prepared = ROWS_OF[kind](tokenizer, self._subset(examples, training.max_examples), training)
        if not prepared.rows:
            raise TrainingError(
                f"None of the {prepared.examples} examples can be trained on: either all answers are empty, or none fits into "
                f"training.max_length = {training.max_length} tokens with its prompt: then raise it."
            )
        job = self._job(kind, start, prepared, training, loss, steps, directory)
        if job.resume_from is not None:
            step = job.resume_from.name.rpartition("-")[2]
            logger.info(f"Training goes on after step {step}, from the state that an earlier run saved.")
        dataset = Dataset.from_list(prepared.rows)
        observe_loss, tracked = observe_asset(), list[str]()

        def observe(values: Mapping[str, float | str]) -> None:
            tracked.extend(str(value) for name, value in values.items() if name == TRACKED)
            observe_loss(values)

        with Progress(None, "Training", logger):
            if job.launched:
                run_in_processes(job, dataset, self.processes.accelerate_config, observe)
            else:
                train(job, dataset, observe)
        with Progress(None, "Merging and measuring what was trained", logger):
            if training.lora is None:
                adapter, exact = None, round_weights(job)
            else:
                merge_adapter(job)
                adapter, exact = directory / ADAPTER, None
            dtype = torch_dtype(self.engine)
            surviving = surviving_update(Path(job.start), directory / MERGED, adapter, dtype, exact)
            if exact is not None:
                shutil.rmtree(exact)
        log = directory / TRAINING_LOG
        self._finished.append((job.state, log.open()))
        history = [json.loads(line) for line in log.read_text().splitlines()]
        passes = training.epochs if steps is None else steps / math.ceil(len(prepared.rows) / training.batch_size)
        return TrainingSummary(
            examples=len(prepared.rows),
            dropped=prepared.examples - len(prepared.rows),
            truncated=prepared.truncated,
            tokens=round(prepared.tokens * passes),
            steps=round(history[-1]["step"]),
            seconds=job.seconds_before + time.monotonic() - started,
            history=history,
            surviving=surviving,
            tracked=tracked[0] if tracked else None,
        )

    def _subset(self, examples: Sequence[Any], limit: int | None) -> Sequence[Any]:
        """A random subset in the original order; all of them without a limit."""
        if limit is None or limit >= len(examples):
            return examples
        chosen = sorted(random.Random(f"{self.random_seed}:subset").sample(range(len(examples)), limit))
        return [examples[place] for place in chosen]

    def _job(
        self,
        kind: Kind,
        start: Checkpoint,
        prepared: TrainingRows,
        training: Training,
        loss: Loss | None,
        steps: int | None,
        directory: Path,
    ) -> TrainingJob:
        """Decides how to train, and opens the directory of the states."""
        refuse_missing_packages(self.processes, training)
        processes, launched = processes_to_start(self.processes, training, self.engine)
        accelerate_config = self.processes.accelerate_config
        deciding = {
            "kind": kind,
            "start": start.sha,
            "rows": [json_sha256(row) for row in prepared.rows],
            "training": training.model_dump(),
            "loss": loss and loss.model_dump(),
            "device": (device := prepare_device(self.engine)),
            "dtype": str(torch_dtype(self.engine)),
            **stated_attention(self.engine),
            "in_bfloat16": (in_bfloat16 := trains_in_bfloat16(self.engine, device)),
            "random_seed": self.random_seed,
            "steps": steps,
            "processes": processes,
            "accelerate_config": accelerate_config and Path(accelerate_config).read_text(),
            "libraries": {name: importlib.metadata.version(name) for name in DECIDING_LIBRARIES},
        }
        state = Path(self.states) / json_sha256(deciding)[:16]
        asset = _asset_in_progress()
        description = {"asset": asset, "kind": kind, "start": start.label}
        description["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_atomically(state / DESCRIPTION, json.dumps(description, indent=2).encode())
        resume_from, seconds_before = newest_state(state)
        threads = max(1, (self.engine.threads or os.cpu_count() or 1) // processes)
        return TrainingJob(
            kind=kind,
            name=asset or f"{kind} from {start.label}",
            start=start.weights,
            training=training,
            loss=loss,
            engine=self.engine.model_copy(update={"threads": threads}),
            in_bfloat16=in_bfloat16,
            random_seed=self.random_seed,
            steps=steps,
            processes=processes,
            launched=launched or self.own_gpu is not None,
            own_gpu=self.own_gpu,
            gradient_checkpointing=self._gradient_checkpointing(training, Path(start.weights), processes),
            padding_free=self._padding_free(),
            save_every_steps=self.processes.save_every_steps,
            report_to=self.processes.report_to,
            state=state,
            resume_from=resume_from,
            seconds_before=seconds_before,
            directory=directory,
        )

    def _gradient_checkpointing(self, training: Training, start: Path, processes: int) -> bool:
        stated = self.processes.gradient_checkpointing
        if stated is not None or prepare_device(self.engine) == "cpu":
            return bool(stated)
        return not keeps_activations(self.engine, training, start, least_share(self.processes, processes))

    def _padding_free(self) -> bool:
        stated = self.processes.padding_free
        return stated if stated is not None else (self.engine.attention or "").startswith("flash_attention")


def _asset_in_progress() -> str | None:
    """How people name the asset whose step this is; None outside of Dagster."""
    try:
        context = dg.AssetExecutionContext.get()
    except dg.DagsterInvariantViolationError:
        return None
    return asset_label(context.asset_key.to_user_string(), context.partition_key if context.has_partition_key else None)
