"""What a training takes of a GPU's memory at least, worked out before anything is made or a model is loaded."""

from pathlib import Path

from rich.filesize import decimal

from resources.models.context import text_config
from resources.models.device import told_by_driver, visible_gpus
from resources.models.weights import parameter_count
from resources.settings.machine import Engine
from resources.settings.settings import Settings
from resources.settings.training import PreferenceTraining, Training
from resources.training.job import TrainingError
from resources.training.processes import least_share, processes_to_start

# Of each weight: float32 itself, its gradient and AdamW's two moments. Frozen, it is in bfloat16 or in 4 bits.
TRAINED_BYTES, FROZEN_BYTES, FOUR_BIT_BYTES = 16.0, 2.0, 0.5
# A logit and its gradient, in bfloat16.
LOGIT_BYTES = 4
# Of each token, layer and hidden unit, in bfloat16 (Korthikanti et al., arXiv 2205.05198, without attention scores).
ACTIVATION_BYTES = 34
# The share of a GPU that may be spoken for: libraries, adapters and buffers take the rest.
ROOM = 0.7


def refuse_too_little_memory(settings: Settings, initial: Path) -> None:
    """Raises a sentence if a training cannot fit a GPU of this machine; not on a CPU, nor where the driver does not answer."""
    if (available := _gpu_bytes(settings.engine)) is None:
        return
    weights, tokens = parameter_count(initial), text_config(initial, settings.engine.trust_remote_code).vocab_size
    for name, training in settings.trainings:
        processes, _ = processes_to_start(settings.training_processes, training, settings.engine)
        share = least_share(settings.training_processes, processes)
        # A reward model gives no logits of tokens.
        needed = least_bytes(training, weights, 0 if name in ("scorer", "judge") else tokens, share)
        if needed > available:
            raise TrainingError(
                f"The training of {name} takes at least {decimal(needed)} of each GPU, for {share:.0%} of {weights / 1e9:.2f} "
                f"billion weights and micro_batch_size = {training.micro_batch_size} examples of max_length = "
                f"{training.max_length} tokens, and the smallest GPU here has {decimal(available)}: split the model over more GPUs "
                "(training_processes.accelerate_config, such as resources/deployment/fsdp_8_gpus.yaml), train adapters "
                "(training.lora, with load_in_4bit if need be), or lower micro_batch_size and max_length."
            )


def least_bytes(training: Training, weights: int, vocabulary: int, share: float) -> int:
    """What each GPU holds at least: the weights with all that training keeps of them, and the logits of a micro batch.

    Activations, adapters and buffers come on top. Examples are taken to be as long as `max_length` allows.

    Args:
        vocabulary: The tokens of the model; 0 where it gives no logits.
        share: The share of the weights that each GPU holds.
    """
    lora = training.lora
    each = TRAINED_BYTES if lora is None else FOUR_BIT_BYTES if lora.load_in_4bit else FROZEN_BYTES
    return round(weights * each * share) + _sequences(training) * training.max_length * vocabulary * LOGIT_BYTES


def keeps_activations(engine: Engine, training: Training, start: Path, share: float) -> bool:
    """Whether the activations of a micro batch fit the GPUs here beside all else, so that none need be computed twice.

    Args:
        share: The share of the weights that each GPU holds.
    """
    if (available := _gpu_bytes(engine)) is None:
        return False
    config = text_config(start, engine.trust_remote_code)
    layers, width = config.num_hidden_layers, config.hidden_size
    activations = _sequences(training) * training.max_length * layers * width * ACTIVATION_BYTES
    needed = least_bytes(training, parameter_count(start), config.vocab_size, share) + activations
    return bool(needed < ROOM * available)


def _sequences(training: Training) -> int:
    return training.micro_batch_size * (2 if isinstance(training, PreferenceTraining) else 1)


def _gpu_bytes(engine: Engine) -> int | None:
    """The memory of the smallest GPU of this process; None where there is none, or where the driver says nothing."""
    told = told_by_driver("memory.total", tuple(visible_gpus(engine)))
    return None if told is None else int(min(told)) << 20
