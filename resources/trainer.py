"""Training with TRL and PEFT: supervised fine-tuning, SimPO, and the reward model."""

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.chat import Message, answer_ids, load_tokenizer, prompt_ids, prompt_text
from resources.checkpoint_store import Checkpoint
from resources.device import DeviceResource, prepare_device, torch_dtype
from resources.errors import FinalError
from resources.settings import PreferenceTraining, Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

LOG_EVERY_SECONDS = 10


class TrainingError(FinalError):
    """Training cannot start or has diverged; the message says which setting to change."""


@dataclasses.dataclass(frozen=True)
class TrainingSummary:
    """What a training run did.

    Attributes:
        examples: Examples (or pairs) trained on.
        dropped: Examples left out because their completion was empty or did not fit at all.
        truncated: Examples (or sides of pairs) that were cut to the longest length allowed.
        tokens: Tokens of all passes over the data.
        steps: Optimizer steps.
        seconds: Wall time, loading included.
        history: What the trainer logged, one entry per logged step.
    """

    examples: int
    dropped: int
    truncated: int
    tokens: int
    steps: int
    seconds: float
    history: list[dict[str, float]]

    def metadata(self) -> dict[str, Any]:
        """The figures as asset metadata, with the last logged loss."""
        losses = [entry["loss"] for entry in self.history if "loss" in entry]
        figures = {key: value for key, value in dataclasses.asdict(self).items() if key != "history"}
        figures |= {"seconds": round(self.seconds, 1), "tokens_per_second": round(self.tokens / self.seconds, 1)}
        return figures | {"final_loss": losses[-1]}


class Trainer(DeviceResource):
    """Trains a model from a checkpoint and writes adapter, merged weights, tokenizer and log into a directory."""

    random_seed: int

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
        from trl import SFTConfig, SFTTrainer

        from resources.cpu_sft import CpuSFTTrainer

        trainer_class = CpuSFTTrainer if prepare_device(self.engine) == "cpu" else SFTTrainer
        tokenizer = load_tokenizer(start.weights, self.engine.trust_remote_code)
        examples = self._subset(examples, training.max_examples)
        rows, truncated = [], 0
        for messages, answer in examples:
            prompt, completion = prompt_ids(tokenizer, messages), answer_ids(tokenizer, messages, answer)
            truncated += len(prompt) + len(completion) > training.max_length
            token_ids = (prompt + completion)[: training.max_length]
            if answer.strip() and len(token_ids) > len(prompt):
                mask = [0] * len(prompt) + [1] * (len(token_ids) - len(prompt))
                rows.append({"input_ids": token_ids, "completion_mask": mask})
        return self._train(
            trainer_class, SFTConfig, start, tokenizer, rows, training, directory, log,
            model=self._load(start, training, "causal"),
            task="CAUSAL_LM",
            options={"max_length": None, "completion_only_loss": True},
            counts=(len(examples), truncated, sum(len(row["input_ids"]) for row in rows)),
        )  # fmt: skip

    def preference(
        self,
        start: Checkpoint,
        pairs: Sequence[dict[str, Any]],
        training: PreferenceTraining,
        directory: Path,
        log: Callable[[str], None],
    ) -> TrainingSummary:
        """Optimises preferences with SimPO, which needs no reference model.

        Args:
            start: The checkpoint to start from.
            pairs: Rows with prompt, chosen and rejected as chat messages, and chosen_finish_reason and
                rejected_finish_reason: an answer that was cut is not closed with the end-of-turn token.
            training: Its settings.
            directory: Empty directory for the results.
            log: Receives progress sentences.
        """
        from trl.experimental.cpo import CPOConfig

        from resources.simpo import SimPOTrainer

        tokenizer = load_tokenizer(start.weights, self.engine.trust_remote_code)
        pairs = self._subset(pairs, training.max_examples)
        rows, truncated = [], 0
        for pair in pairs:
            row, cut = _preference_row(tokenizer, pair, training)
            if row["chosen"].strip() and row["rejected"].strip():
                rows.append(row)
                truncated += cut
        lengths = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
        return self._train(
            SimPOTrainer, CPOConfig, start, tokenizer, rows, training, directory, log,
            model=self._load(start, training, "causal"),
            task="CAUSAL_LM",
            options={
                "max_length": training.max_length,
                "loss_type": "simpo",
                "remove_unused_columns": False,
                # Anything above zero adds a likelihood term that SimPO does not have.
                "cpo_alpha": 0.0,
                "beta": training.beta,
                "simpo_gamma": training.gamma,
            },
            counts=(len(pairs), truncated, sum(lengths)),
        )  # fmt: skip

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
        from trl import RewardConfig, RewardTrainer

        tokenizer = load_tokenizer(start.weights, self.engine.trust_remote_code)
        pairs = self._subset(pairs, training.max_examples)
        rows, truncated = [], 0
        for prompt, better, worse in pairs:
            messages = [{"role": "user", "content": prompt}]
            asked = prompt_ids(tokenizer, messages)
            sides = [asked + answer_ids(tokenizer, messages, answer) for answer in (better, worse)]
            truncated += sum(len(side) > training.max_length for side in sides)
            if better.strip() and worse.strip() and len(asked) < training.max_length:
                cut = [side[: training.max_length] for side in sides]
                rows.append({"chosen_ids": cut[0], "rejected_ids": cut[1]})
        return self._train(
            RewardTrainer, RewardConfig, start, tokenizer, rows, training, directory, log,
            model=self._load(start, training, "reward"),
            task="SEQ_CLS",
            options={"max_length": None},
            counts=(len(pairs), truncated, sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)),
        )  # fmt: skip

    def _subset(self, examples: Sequence[Any], limit: int | None) -> Sequence[Any]:
        """A random subset in the original order; all of them without a limit."""
        if limit is None or limit >= len(examples):
            return examples
        chosen = sorted(random.Random(f"{self.random_seed}:subset").sample(range(len(examples)), limit))
        return [examples[place] for place in chosen]

    def _load(self, start: Checkpoint, training: Training, kind: str) -> "PreTrainedModel":
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

        prepare_device(self.engine)
        # The new output layer of a reward model is drawn at random.
        set_seed(self.random_seed)
        # Small steps vanish when bfloat16 weights are updated themselves; adapters are kept in float32 by PEFT.
        dtype = torch.float32 if training.lora is None else torch_dtype(self.engine)
        options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": self.engine.trust_remote_code}
        if kind == "causal":
            return AutoModelForCausalLM.from_pretrained(start.weights, **options)
        return AutoModelForSequenceClassification.from_pretrained(start.weights, num_labels=1, **options)

    def _train(
        self,
        trainer_class: Any,
        config_class: Any,
        start: Checkpoint,
        tokenizer: "PreTrainedTokenizerBase",
        rows: list[dict[str, Any]],
        training: Training,
        directory: Path,
        log: Callable[[str], None],
        *,
        model: "PreTrainedModel",
        task: str,
        options: dict[str, Any],
        counts: tuple[int, int, int],
    ) -> TrainingSummary:
        from datasets import Dataset
        from transformers import PrinterCallback

        started = time.monotonic()
        if not rows:
            raise TrainingError(
                f"None of the {counts[0]} examples fits into training.max_length = {training.max_length} tokens: raise it."
            )
        device = prepare_device(self.engine)
        steps = math.ceil(math.ceil(len(rows) / training.batch_size) * training.epochs)
        config = config_class(
            output_dir=str(directory / "trainer"),
            learning_rate=training.learning_rate,
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=training.batch_size // training.micro_batch_size,
            # Rounded down: the first warm-up step has learning rate 0, and a run of one step must learn something.
            warmup_steps=int(steps * training.warmup_ratio),
            lr_scheduler_type=training.scheduler,
            seed=self.random_seed,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            gradient_checkpointing=device == "cuda",
            dataloader_pin_memory=device == "cuda",
            logging_steps=1,
            # The default replaces a NaN loss in the log by an earlier value: divergence would go unseen.
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        trainer = trainer_class(
            model=model,
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            peft_config=_lora(model, training, task),
            callbacks=[_progress_callback(log)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        _save(trainer.model, tokenizer, directory, adapter=training.lora is not None)
        (directory / "trainer_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
        return TrainingSummary(
            examples=len(rows),
            dropped=counts[0] - len(rows),
            truncated=counts[1],
            tokens=round(counts[2] * training.epochs),
            steps=trainer.state.global_step,
            seconds=time.monotonic() - started,
            history=history,
        )


def _preference_row(
    tokenizer: "PreTrainedTokenizerBase", pair: dict[str, Any], training: PreferenceTraining
) -> tuple[dict[str, Any], int]:
    """Text and token ids of one pair, each part cut to its longest length, and how many parts were cut."""
    prompt = prompt_ids(tokenizer, pair["prompt"])
    row: dict[str, Any] = {
        "prompt": prompt_text(tokenizer, pair["prompt"]),
        "prompt_ids": prompt[-training.max_prompt_length :],
    }
    cut = int(len(prompt) > training.max_prompt_length)
    for side in ("chosen", "rejected"):
        row[side] = pair[side][-1]["content"]
        finished = pair[f"{side}_finish_reason"] == "stop"
        token_ids = answer_ids(tokenizer, pair["prompt"], row[side], finished)
        cut += len(token_ids) > training.max_completion_length
        row[f"{side}_ids"] = token_ids[: training.max_completion_length]
    return row, cut


def _lora(model: "PreTrainedModel", training: Training, task: str) -> Any:
    from peft import LoraConfig

    if training.lora is None:
        return None
    layers = model.config.num_hidden_layers
    first = 0 if training.lora.last_layers is None else max(0, layers - training.lora.last_layers)
    return LoraConfig(
        task_type=task,
        r=training.lora.rank,
        lora_alpha=training.lora.alpha,
        lora_dropout=training.lora.dropout,
        target_modules="all-linear"
        if first == 0
        else rf".*layers\.({'|'.join(map(str, range(first, layers)))})\..*_proj",
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def _save(model: Any, tokenizer: "PreTrainedTokenizerBase", directory: Path, adapter: bool) -> None:
    """Saves the adapter, if there is one, and the weights that generate."""
    if adapter:
        model.save_pretrained(directory / "adapter")
        model = model.merge_and_unload()
    model.save_pretrained(directory / "merged")
    tokenizer.save_pretrained(directory / "merged")


def _progress_callback(log: Callable[[str], None]) -> "TrainerCallback":
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Logs steps with rate and time left, and stops on a loss that is not a number."""

        started = reported = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = self.reported = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(float(loss)):
                raise TrainingError(
                    f"The training loss became {loss} at step {state.global_step}: the run has diverged and nothing was "
                    "saved. Lower training.learning_rate (or beta, for SimPO)."
                )
            now = time.monotonic()
            if now - self.reported > LOG_EVERY_SECONDS or state.global_step == state.max_steps:
                self.reported = now
                pace = (now - self.started) / state.global_step
                left = pace * (state.max_steps - state.global_step)
                log(
                    f"Step {state.global_step} of {state.max_steps}, loss {float(loss):.3f}, {pace:.1f} s/step, {left:.0f} s left."
                )

    return Progress()
