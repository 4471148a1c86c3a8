"""Training with TRL and PEFT: supervised fine-tuning, SimPO, and the reward model."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import dagster as dg
from pydantic import PrivateAttr

from resources.common.text import asset_label
from resources.models.chat import Message, load_tokenizer
from resources.models.device import DeviceResource
from resources.settings.training import PreferenceTraining, Training, TrainingProcesses
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import write_atomically
from resources.training.job import Kind, TrainingError, TrainingJob, TrainingSummary, fingerprint
from resources.training.processes import processes_to_start, refuse_missing_packages, run_in_processes
from resources.training.rows import TrainingRows, preference_rows, reward_rows, supervised_rows
from resources.training.run import HISTORY, merge_adapter, read_history, train
from resources.training.state import newest_state

DESCRIPTION = "description.json"


class Trainer(DeviceResource):
    """Trains a model from a checkpoint and writes adapter, merged weights, tokenizer and log into a directory.

    A training that was killed goes on from its newest saved state when the same training is asked for again. States are
    kept until the step ends, because until then the result can still be lost.
    """

    random_seed: int
    processes: TrainingProcesses
    states: str
    _finished: list[tuple[Path, IO[str]]] = PrivateAttr(default_factory=list)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Called by Dagster at the end of each step: removes the states of trainings whose result was kept."""
        for state, history in self._finished:
            # A result that was thrown away has no name any more; one that was kept has, wherever it was moved to.
            with history:
                is_kept = os.fstat(history.fileno()).st_nlink > 0
            if is_kept:
                shutil.rmtree(state, ignore_errors=True)
        self._finished.clear()

    def supervised(
        self,
        start: Checkpoint,
        examples: Sequence[tuple[Sequence[Message], str]],
        training: Training,
        directory: Path,
        log: Callable[[str], None],
    ) -> TrainingSummary:
        """Fine-tunes on completions; the prompt is masked.

        Args:
            start: The checkpoint to start from.
            examples: Chat messages, and the answer to learn.
            training: Its settings.
            directory: Empty directory for the results.
            log: Receives progress sentences.
        """
        tokenizer = load_tokenizer(start.weights, self.engine.trust_remote_code)
        rows = supervised_rows(tokenizer, self._subset(examples, training.max_examples), training)
        return self._train("supervised", start, rows, training, directory, log)

    def preference(
        self,
        start: Checkpoint,
        pairs: Sequence[dict[str, Any]],
        training: PreferenceTraining,
        directory: Path,
        log: Callable[[str], None],
    ) -> TrainingSummary:
        """Optimises preferences with SimPO, which needs no reference model, or with DPO against the start.

        Args:
            start: The checkpoint to start from.
            pairs: Rows with prompt, chosen and rejected as chat messages, and chosen_finish_reason and
                rejected_finish_reason: an answer that was cut is not closed with the end-of-turn token.
            training: Its settings.
            directory: Empty directory for the results.
            log: Receives progress sentences.
        """
        tokenizer = load_tokenizer(start.weights, self.engine.trust_remote_code)
        rows = preference_rows(tokenizer, self._subset(pairs, training.max_examples), training)
        return self._train("preference", start, rows, training, directory, log)

    def reward(
        self,
        start: Checkpoint,
        pairs: Sequence[tuple[str, str, str]],
        training: Training,
        directory: Path,
        log: Callable[[str], None],
    ) -> TrainingSummary:
        """Trains a Bradley-Terry reward model: a classifier with one output.

        Args:
            start: The checkpoint whose layers it starts from.
            pairs: Prompt, better answer, worse answer.
            training: Its settings.
            directory: Empty directory for the results.
            log: Receives progress sentences.
        """
        tokenizer = load_tokenizer(start.weights, self.engine.trust_remote_code)
        rows = reward_rows(tokenizer, self._subset(pairs, training.max_examples), training)
        return self._train("reward", start, rows, training, directory, log)

    def _subset(self, examples: Sequence[Any], limit: int | None) -> Sequence[Any]:
        """A random subset in the original order; all of them without a limit."""
        if limit is None or limit >= len(examples):
            return examples
        chosen = sorted(random.Random(f"{self.random_seed}:subset").sample(range(len(examples)), limit))
        return [examples[place] for place in chosen]

    def _train(
        self,
        kind: Kind,
        start: Checkpoint,
        prepared: TrainingRows,
        training: Training,
        directory: Path,
        log: Callable[[str], None],
    ) -> TrainingSummary:
        from datasets import Dataset

        started = time.monotonic()
        if not prepared.rows:
            raise TrainingError(
                f"None of the {prepared.examples} examples can be trained on: either all answers are empty, or none fits into "
                f"training.max_length = {training.max_length} tokens with its prompt: then raise it."
            )
        job = self._job(kind, start, prepared, training, directory)
        if job.resume_from is not None:
            step = job.resume_from.name.rpartition("-")[2]
            log(f"Training goes on after step {step}, from the state that an earlier run saved.")
        dataset = Dataset.from_list(prepared.rows)
        if job.launched:
            run_in_processes(job, dataset, self.processes.accelerate_config, log)
        else:
            train(job, dataset, log)
        if training.lora is not None:
            merge_adapter(job)
        self._finished.append((job.state, (directory / HISTORY).open()))
        history = read_history(directory)
        return TrainingSummary(
            examples=len(prepared.rows),
            dropped=prepared.examples - len(prepared.rows),
            truncated=prepared.truncated,
            tokens=round(prepared.tokens * training.epochs),
            steps=round(history[-1]["step"]),
            seconds=job.seconds_before + time.monotonic() - started,
            history=history,
        )

    def _job(
        self, kind: Kind, start: Checkpoint, prepared: TrainingRows, training: Training, directory: Path
    ) -> TrainingJob:
        """Decides how to train, and opens the directory of the states."""
        refuse_missing_packages(self.processes, training)
        processes, launched = processes_to_start(self.processes, training, self.engine)
        state = Path(self.states) / fingerprint(
            kind, start, prepared.rows, training, self.engine, self.random_seed, processes,
            self.processes.accelerate_config,
        )  # fmt: skip
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
            engine=self.engine.model_copy(update={"threads": threads}),
            random_seed=self.random_seed,
            processes=processes,
            launched=launched,
            save_every_steps=self.processes.save_every_steps,
            report_to=self.processes.report_to,
            state=state,
            resume_from=resume_from,
            seconds_before=seconds_before,
            directory=directory,
        )


def _asset_in_progress() -> str | None:
    """How people name the asset whose step this is; None outside of Dagster."""
    try:
        context = dg.AssetExecutionContext.get()
    except dg.DagsterInvariantViolationError:
        return None
    return asset_label(context.asset_key.to_user_string(), context.partition_key if context.has_partition_key else None)
