"""Which processor and number format the models use."""

import contextlib
import functools
import gc
import importlib.util
import os
import platform
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from resources.common.errors import FinalError
from resources.common.text import one_line
from resources.settings.machine import Engine

if TYPE_CHECKING:
    import torch

ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
# The compute capability of the first of NVIDIA's GPUs that multiply bfloat16 (Ampere); T4 has 7.5, V100 7.0.
BFLOAT16_CAPABILITY = 8.0
# What processes that this one started, and that have ended, reserved of a GPU.
GPU_BYTES_ELSEWHERE: list[int] = []
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class DeviceResource(BaseModel):
    """What computes with models, on the device that the settings choose."""

    model_config = ConfigDict(frozen=True)

    engine: Engine


def prepare_device(engine: Engine) -> str:
    """Chooses `cuda` or `cpu`, refuses a GPU that is not there, and sets the number of CPU threads."""
    import torch
    import transformers

    # A freshly drawn output layer and missing optional files are reported at length on every load.
    transformers.logging.set_verbosity_error()
    # TRL still uses option names that transformers has renamed; the warnings say nothing to the reader of a run.
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(engine.threads or os.cpu_count() or 1)
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise FinalError("engine.device is `cuda` but torch sees no GPU: set it to `auto` or `cpu`.")
    device = "cuda" if engine.device != "cpu" and torch.cuda.is_available() else "cpu"
    _refuse_missing_attention(engine, device)
    return device


def _refuse_missing_attention(engine: Engine, device: str) -> None:
    package = ATTENTION_PACKAGES.get(engine.attention or "")
    if package is None:
        return
    if device == "cpu":
        raise FinalError(
            f"engine.attention is `{engine.attention}`, which runs on a GPU, and models run on a CPU: leave it out."
        )
    if importlib.util.find_spec(package) is None:
        raise FinalError(
            f"engine.attention is `{engine.attention}`, and the package {package} is not installed: install it, or leave the "
            "setting out."
        )


@contextlib.contextmanager
def memory_explained(purpose: str, cure: str) -> Iterator[None]:
    """Turns the GPU's running out of memory into a sentence that says for what, and what to change."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FinalError(f"The GPU's memory does not suffice for {purpose}: {one_line(str(error))} {cure}") from None


def release_gpu_memory() -> None:
    """Gives the GPU what this process no longer uses of its memory, before another process is to work there."""
    import torch

    if torch.cuda.is_initialized():
        # Trainers hold their models in cycles.
        gc.collect()
        torch.cuda.empty_cache()


def torch_dtype(engine: Engine) -> "torch.dtype":
    """The number format of weights and activations; see `engine.dtype`."""
    import torch

    if engine.dtype != "auto":
        return getattr(torch, engine.dtype)
    # A stated device need not be in this machine: with engine.ray it is that of the workers.
    device = prepare_device(engine) if engine.device == "auto" else engine.device
    capable = multiplies_bfloat16(device) if engine.ray is None else device == "cuda"
    return torch.bfloat16 if capable else torch.float32


def dtype_name(engine: Engine) -> str:
    """The name of `torch_dtype`, as settings and engines spell it."""
    return str(torch_dtype(engine)).removeprefix("torch.")


def trains_in_bfloat16(engine: Engine, device: str) -> bool:
    """Whether the products of a training are computed in bfloat16, beside what is trained in float32 (autocast)."""
    return engine.dtype != "float32" and multiplies_bfloat16(device)


def multiplies_bfloat16(device: str) -> bool:
    """Whether this machine's CPU, or each GPU of this process, has instructions for it."""
    if device == "cpu":
        return cpu_multiplies_bfloat16()
    told = told_by_driver("compute_cap", tuple(_gpu_names()))
    return told is None or min(told) >= BFLOAT16_CAPABILITY


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16: with them they take half the time, else ten times as long."""
    import torch

    # Not every torch in our range tells.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)


def loading_options(engine: Engine) -> dict[str, Any]:
    """How `from_pretrained` loads a model: safe files, the number format, and what the settings say of attention and code."""
    options = {"dtype": torch_dtype(engine), "use_safetensors": True, "trust_remote_code": engine.trust_remote_code}
    return options | ({} if engine.attention is None else {"attn_implementation": engine.attention})


def stated_attention(engine: Engine) -> dict[str, str]:
    """What a fingerprint says of attention, whose kinds round differently: nothing where it is left to the model."""
    return {} if engine.attention is None else {"attention": engine.attention}


def visible_gpus(engine: Engine) -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them; none where models run on a CPU."""
    return [] if prepare_device(engine) == "cpu" else _gpu_names()


def _gpu_names() -> list[str]:
    import torch

    named, count = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","), torch.cuda.device_count()
    return named[:count] if named[0] else [str(number) for number in range(count)]


@functools.cache
def told_by_driver(field: str, gpus: tuple[str, ...]) -> list[float] | None:
    """A number of each of these GPUs, such as `memory.total` in MiB; None if there is none, or if the driver says nothing.

    PyTorch would only tell by taking some of their memory. The driver does not know all names that CUDA takes, such as those of
    parts of a GPU: then it is that of all GPUs of this machine.
    """
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    for more in ([f"--id={','.join(gpus)}"], []) if gpus else ():
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            answer = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60, check=True).stdout
            return [float(line) for line in answer.split()] or None
    return None


def peak_memory() -> dict[str, float]:
    """The most memory that this process has needed so far; in a run each step is a process of its own.

    Returns:
        `peak_memory_gb`: the largest resident set, in 10^9 bytes, of this process or of any one process that it started
        and that has ended; sets of several processes are not added up. A forked process starts to count anew.
        `peak_gpu_memory_gb`, where PyTorch has used a GPU: the most that this process, or a copy of vLLM that it started,
        reserved on any one GPU. What further training processes take there is not in it.
    """
    # A program inherits the record of the process that started it (getrusage(2)), which therefore has to be counted too.
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    figures = {"peak_memory_gb": round(largest * RSS_UNIT / 1e9, 2)}
    if reserved := max(gpu_bytes_here(), *GPU_BYTES_ELSEWHERE, 0):
        figures["peak_gpu_memory_gb"] = round(reserved / 1e9, 2)
    return figures


def gpu_bytes_here() -> int:
    """The most that PyTorch has reserved of any one GPU in this process."""
    # A process that has not loaded PyTorch has used no GPU, and loading it here would be what takes most memory.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max(torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count()))


def device_name(engine: Engine) -> str:
    """The processor that models run on, as its maker names it, and how many there are of it."""
    import torch

    if prepare_device(engine) == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"
