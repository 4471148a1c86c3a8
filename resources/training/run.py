"""One training run with TRL and PEFT, as each of its processes runs it."""

import json
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.common.progress import is_silent, say_in_silence, tell
from resources.common.text import duration
from resources.models.chat import load_tokenizer
from resources.models.device import loading_options, memory_explained, prepare_device, torch_dtype
from resources.storage.checkpoint_store import TRAINING_LOG
from resources.storage.manifests import ADAPTER, MERGED
from resources.training.job import TrainingError, TrainingJob
from resources.training.live import PROJECT, Observe, observing_callback
from resources.training.losses import loss_module, pairs_text
from resources.training.rows import GroupedByLength
from resources.training.state import KEPT_STATES, marking_callback

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

logger = logging.getLogger("synpo.training")

# While one thread loads a model, transformers changes how all are made: of two that load at once, one may get empty weights, and
# so does whatever is made later.
LOADING = threading.Lock()


def train(job: TrainingJob, dataset: "Dataset", observe: Observe) -> None:
    """Trains, and saves the history and the adapter, or without adapters the weights, into the job's directory.

    `observe` is told of the loss now and then.
    """
    from transformers import PrinterCallback

    device = prepare_device(job.engine)
    trainer_class, config_class, options = _trainer(job, device)
    training = job.training
    steps = job.steps or math.ceil(math.ceil(len(dataset) / training.batch_size) * training.epochs)
    # Before the model: with DeepSpeed or FSDP, these arguments decide how it is loaded.
    config = config_class(**_arguments(job, device, steps), **options)
    with memory_explained(
        f"training (micro_batch_size = {training.micro_batch_size}, max_length = {training.max_length})",
        "Set training_processes.gradient_checkpointing to true, which goes on from what is saved. Or, to begin anew: lower "
        "training.micro_batch_size or training.max_length, train adapters (training.lora, with load_in_4bit if need be), "
        "or split the model over several GPUs with FSDP or DeepSpeed through training_processes.accelerate_config.",
    ):
        with LOADING:
            model = load_model(job, quantized=True)
            trainer = type(trainer_class.__name__, (GroupedByLength, trainer_class), {})(
                model=model,
                args=config,
                processing_class=_tokenizer(job),
                train_dataset=dataset,
                peft_config=_lora(job, model),
                callbacks=[
                    _progress_callback(job),
                    observing_callback(observe, job.report_to),
                    marking_callback(job.seconds_before),
                ],
            )
        trainer.remove_callback(PrinterCallback)
        if training.lora is not None and training.lora.load_in_4bit:
            _adapters_in_float32(trainer.model)
        trainer.train(resume_from_checkpoint=job.resume_from and str(job.resume_from))
        _save(trainer, job)


def _arguments(job: TrainingJob, device: str, steps: int) -> dict[str, Any]:
    """The arguments of all kinds of training, for so many steps of the optimizer."""
    training = job.training
    return {
        "output_dir": str(job.state),
        "learning_rate": training.learning_rate,
        "num_train_epochs": training.epochs,
        "max_steps": job.steps or -1,
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": job.accumulation_steps,
        # Rounded down: the first warm-up step has learning rate 0, and a run of one step must learn something.
        "warmup_steps": int(steps * training.warmup_ratio),
        "lr_scheduler_type": training.scheduler,
        "seed": job.random_seed,
        "bf16": job.in_bfloat16,
        "use_cpu": device == "cpu",
        # With FSDP, accelerate's own activation checkpointing takes its place: both together are refused.
        "gradient_checkpointing": job.gradient_checkpointing
        and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") != "true",
        "train_sampling_strategy": "group_by_length" if training.group_by_length else "random",
        "dataloader_pin_memory": device == "cuda",
        "logging_steps": 1,
        # The default replaces a NaN loss in the log by an earlier value: divergence would go unseen.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if steps >= job.save_every_steps else "no",
        "save_steps": job.save_every_steps,
        "save_total_limit": KEPT_STATES,
        "report_to": job.report_to,
        "run_name": job.name,
        "project": PROJECT,
        "disable_tqdm": True,
    }


def load_model(job: TrainingJob, *, quantized: bool) -> "PreTrainedModel":
    """Loads the weights that a job starts from; only if `quantized` may they be held in 4 bits, as its settings say."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, set_seed

    # The new output layer of a reward model is drawn at random.
    set_seed(job.random_seed)
    lora, number_format = job.training.lora, torch_dtype(job.engine)
    # Small steps vanish when bfloat16 weights are updated themselves; adapters are kept in float32 by PEFT.
    options = loading_options(job.engine) | {"dtype": torch.float32 if lora is None else number_format}
    if quantized and lora is not None and lora.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=number_format,
            # FSDP shards only what is stored as floating-point numbers.
            bnb_4bit_quant_storage=number_format,
        )
    if job.kind == "reward":
        from resources.models.classifier import new_head

        classifier = AutoModelForSequenceClassification.from_pretrained(job.start, num_labels=1, **options)
        classifier.config.get_text_config().pad_token_id = _tokenizer(job).pad_token_id
        new_head(classifier)
        return classifier
    return AutoModelForCausalLM.from_pretrained(job.start, **options)


def merge_adapter(job: TrainingJob) -> None:
    """Adds the trained adapter to the weights it was trained on, as they were before any quantization."""
    import torch
    from peft import PeftModel

    from resources.training.rounding import merge_rounding_at_random

    # Candidates that train side by side are merged by one process, which would crowd the first GPU.
    device = "cpu" if job.own_gpu else prepare_device(job.engine)
    with LOADING:
        adapted = PeftModel.from_pretrained(load_model(job, quantized=False).to(device), job.directory / ADAPTER)
    if torch_dtype(job.engine) == torch.bfloat16:
        merge_rounding_at_random(adapted, job.random_seed)
        merged = adapted.unload()
    else:
        merged = adapted.merge_and_unload()
    merged.save_pretrained(job.directory / MERGED)
    _tokenizer(job).save_pretrained(job.directory / MERGED)


def round_weights(job: TrainingJob) -> Path | None:
    """Where all weights were trained and bfloat16 is read: rounds them at random, and says where the exact ones are."""
    import torch

    from resources.training.rounding import round_saved_weights

    if torch_dtype(job.engine) != torch.bfloat16:
        return None
    merged, exact = job.directory / MERGED, job.directory / "exact"
    merged.rename(exact)
    round_saved_weights(exact, merged, job.random_seed)
    return exact


def _tokenizer(job: TrainingJob) -> "PreTrainedTokenizerBase":
    """The tokenizer of the start; for a reward model it pads with a token at which no answer ends."""
    tokenizer = load_tokenizer(job.start, job.engine.trust_remote_code)
    if job.kind == "reward":
        from resources.models.classifier import silent_id

        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(silent_id(tokenizer))
    return tokenizer


def _trainer(job: TrainingJob, device: str) -> tuple[Any, Any, dict[str, Any]]:
    """TRL's trainer for a kind of training, the class of its arguments, and the arguments of this kind alone."""
    if job.kind == "reward":
        from trl import RewardConfig, RewardTrainer

        return RewardTrainer, RewardConfig, {"max_length": None}
    if job.loss is not None:
        return loss_module(job.loss.kind).trainer(job.loss, job.training)
    from trl import SFTConfig, SFTTrainer

    from resources.training.cpu_sft import CpuSFTTrainer

    alone_on_cpu = device == "cpu" and not job.launched
    options = {"max_length": None, "completion_only_loss": True, "padding_free": job.padding_free}
    return CpuSFTTrainer if alone_on_cpu else SFTTrainer, SFTConfig, options


def _lora(job: TrainingJob, model: "PreTrainedModel") -> Any:
    from peft import LoraConfig

    from resources.models.classifier import HEAD

    lora = job.training.lora
    if lora is None:
        return None
    return LoraConfig(
        task_type="SEQ_CLS" if job.kind == "reward" else "CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.last_layers is None else _linear_in_last_layers(model, lora.last_layers),
        modules_to_save=[HEAD] if job.kind == "reward" else None,
    )


def _linear_in_last_layers(model: Any, count: int) -> list[str]:
    """The names of the linear modules in the last layers, whatever the family calls its modules."""
    import torch
    from transformers.pytorch_utils import Conv1D

    length = model.config.get_text_config().num_hidden_layers
    modules = dict(model.named_modules())
    layers = next(
        name for name, module in modules.items() if isinstance(module, torch.nn.ModuleList) and len(module) == length
    )
    last = tuple(f"{layers}.{place}." for place in range(max(0, length - count), length))
    linear = (torch.nn.Linear, Conv1D)
    return [name for name, module in modules.items() if name.startswith(last) and isinstance(module, linear)]


def _adapters_in_float32(model: Any) -> None:
    """Undoes TRL's conversion of adapters on 4-bit weights to bfloat16, in which small steps vanish."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _save(trainer: Any, job: TrainingJob) -> None:
    """Saves adapter or weights; every process takes part, because each may hold a piece of them."""
    folder = job.directory / (MERGED if job.training.lora is None else ADAPTER)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        # A pickle with paths of this run, which would make equal weights differ.
        (folder / "training_args.bin").unlink()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        (job.directory / TRAINING_LOG).write_text("".join(json.dumps(entry) + "\n" for entry in history))


def _progress_callback(job: TrainingJob) -> "TrainerCallback":
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Logs steps with rate and time left, and stops on a loss that is not a number."""

        started = 0.0
        first_step = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.monotonic()
            self.first_step = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(float(loss)):
                raise TrainingError(
                    f"The training loss became {loss} at step {state.global_step}: the run has diverged and nothing was "
                    "saved. Lower training.learning_rate (or loss.beta, for SimPO)."
                )
            logged, shown = time.monotonic(), f"{float(loss):.3f}{pairs_text(job.loss, logs or {})}"
            step, steps = state.global_step, state.max_steps
            pace = (logged - self.started) / (step - self.first_step)

            def line() -> str:
                left = max(0.0, pace * (steps - step) - (time.monotonic() - logged))
                return f"Step {step} of {steps}, loss {shown}, {pace:.1f} s/step, {duration(left)} left."

            say_in_silence(line)
            if (is_silent() or step == steps) and state.is_world_process_zero:
                tell(logger, line())

    return Progress()
