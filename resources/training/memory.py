"""What a training takes of a GPU's memory at least, worked out before anything is made or loaded."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.filesize import decimal

from resources.models.device import prepare_device
from resources.models.weights import parameter_count
from resources.settings.settings import Settings
from resources.settings.training import PreferenceTraining, Training, TrainingProcesses
from resources.training.job import TrainingError
from resources.training.processes import processes_to_start

# Of each weight: float32 itself, its gradient and AdamW's two moments. Frozen, it is in bfloat16 or in 4 bits.
TRAINED_BYTES, FROZEN_BYTES, FOUR_BIT_BYTES = 16.0, 2.0, 0.5
# A logit and its gradient, in bfloat16.
LOGIT_BYTES = 4
SHARDED_STAGE = 3


def refuse_too_little_memory(settings: Settings, initial: Path) -> None:
    """Raises a sentence if a training certainly does not fit a GPU of this machine; on a CPU, or without an answer, none.

    Args:
        settings: The experiment.
        initial: The weights that training starts from.
    """
    if prepare_device(settings.engine) == "cpu" or (available := _gpu_bytes()) is None:
        return
    weights, vocabulary = parameter_count(initial), _vocabulary(initial)
    for name, training in _trainings(settings):
        processes, _ = processes_to_start(settings.training_processes, training, settings.engine)
        pieces = processes if _shards(settings.training_processes) else 1
        needed = least_bytes(training, weights, vocabulary, pieces)
        if needed > available:
            raise TrainingError(
                f"The training of {name} takes at least {decimal(needed)} of each GPU, for {weights / 1e9:.2f} billion weights "
                f"in {pieces} pieces and micro_batch_size = {training.micro_batch_size}, and the smallest GPU here has "
                f"{decimal(available)}: split the model over more GPUs (training_processes.accelerate_config, such as "
                "resources/deployment/fsdp_8_gpus.yaml), train adapters (training.lora, with load_in_4bit if need be), or lower "
                "micro_batch_size and max_length."
            )


def least_bytes(training: Training, weights: int, vocabulary: int, pieces: int) -> int:
    """What each GPU holds at least: the weights with all that training keeps of them, and the logits of a micro batch.

    Activations, adapters and buffers come on top, so what does not fit by this certainly does not fit.

    Args:
        training: The training.
        weights: The parameters of the model.
        vocabulary: The tokens of the model; 0 where it gives no logits.
        pieces: The GPUs that share the weights, as with FSDP or ZeRO-3.
    """
    lora = training.lora
    each = TRAINED_BYTES if lora is None else FOUR_BIT_BYTES if lora.load_in_4bit else FROZEN_BYTES
    sequences = training.micro_batch_size * (2 if isinstance(training, PreferenceTraining) else 1)
    return round(weights * each / pieces) + sequences * training.max_length * vocabulary * LOGIT_BYTES


def _trainings(settings: Settings) -> Iterator[tuple[str, Training]]:
    """The trainings whose logits and weights are those of M_0, by the section of the settings."""
    yield "prompt_generator", settings.prompt_generator.training
    if settings.trains_improver:
        yield "response_improver", settings.response_improver.training
    yield "preference_optimization", settings.preference_optimization.training


def _vocabulary(weights: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(weights).get_text_config().vocab_size)


def _shards(options: TrainingProcesses) -> bool:
    """Whether the processes share the weights; each has all of them otherwise."""
    if options.accelerate_config is None:
        return False
    config: dict[str, Any] = yaml.safe_load(Path(options.accelerate_config).read_text())
    deepspeed = config.get("deepspeed_config") or {}
    # A file of DeepSpeed's own may say anything; it is not refused.
    return (
        config.get("distributed_type") == "FSDP"
        or deepspeed.get("zero_stage") == SHARDED_STAGE
        or "deepspeed_config_file" in deepspeed
    )


def _gpu_bytes() -> int | None:
    """The memory of the smallest GPU here by its driver, which PyTorch would only tell by taking some; None if it says nothing."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        return min(int(line) for line in answer.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
