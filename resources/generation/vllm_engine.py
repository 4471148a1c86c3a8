"""Generation with vLLM: on GPUs, split over them or one copy of the model on each; slowly on a CPU too."""

import itertools
import logging
import math
import multiprocessing
import os
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import get_args

from resources.common.errors import FinalError
from resources.generation.adapters import adapter_of
from resources.generation.completions import longest_sequence
from resources.generation.engine import Completion, Requests
from resources.generation.vllm_process import Ended, answer_in_this_process
from resources.models.context import context_length, text_config
from resources.models.device import GPU_BYTES_ELSEWHERE, dtype_name, prepare_device, release_gpu_memory, visible_gpus
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from resources.storage.checkpoint_store import Checkpoint

logger = logging.getLogger("synpo.generation")

# vLLM's core shares the process that it is called from: a core of its own would outlive a killed step and hold the GPU.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
# Without these, vLLM takes half of the memory for its cache and leaves all but one thread pinned to one core.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# torch.compile takes minutes to start there, and one process needs no collectives. A prompt that is read in two steps sets
# the random stream of its request back (GPUModelRunner._bookkeeping_sync), which PyTorch can do on GPUs only.
CPU_ARGUMENTS = {"enforce_eager": True, "distributed_executor_backend": "uni", "enable_chunked_prefill": False}
# New tokens for one copy, at most, below which compiling and recording CUDA graphs, most of a minute, is not earned back. An
# estimate: with graphs a token costs some 30 microseconds less, and answers end at about half of their limit.
WORTH_COMPILING = 1_000_000


class VllmEngine:
    """Answers with one or more copies of a model, each in a process of its own for the length of one call.

    When the call ends, so do the processes: that is the one sure way to get all GPU memory back for what follows in
    the same step.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Engine) -> None:
        self._adapter = adapter_of(checkpoint) if engine.adapters == "request" else None
        weights = self._adapter.base_weights if self._adapter else checkpoint.weights
        config = text_config(weights, engine.trust_remote_code)
        self._context_length = context_length(config)
        self._engine = engine
        self._devices = device_groups(engine, visible_gpus(engine), config.num_attention_heads)
        self._arguments = {
            "model": weights,
            "dtype": dtype_name(engine),
            "load_format": "safetensors",
            "trust_remote_code": engine.trust_remote_code,
            "tensor_parallel_size": max(1, len(self._devices[0])),
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self._adapter:
            self._arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting_rank(self._adapter.rank)}
        on_cpu = prepare_device(engine) == "cpu"
        defaults = ENVIRONMENT | CPU_ENVIRONMENT if on_cpu else ENVIRONMENT
        self._environment = {name: os.environ.get(name, value) for name, value in defaults.items()}
        if on_cpu:
            self._arguments |= CPU_ARGUMENTS
            self._environment["OMP_NUM_THREADS"] = str(engine.threads or os.cpu_count() or 1)

    def generate(self, requests: Requests, sampling: Sampling) -> Generator[list[Completion], None, None]:
        """Completes requests on all copies side by side and yields completions as they finish."""
        # No more of the context than this call can use: the cache then holds more sequences at a time.
        longest = longest_sequence(requests, sampling, self._context_length)
        step_tokens = max(self._engine.batch_tokens, longest)
        arguments = self._arguments | {"max_model_len": longest, "max_num_batched_tokens": step_tokens}
        groups = self._devices[: len(requests)]
        if "enforce_eager" not in arguments | self._engine.vllm_arguments:
            new_tokens = len(requests) * sampling.max_new_tokens // len(groups)
            arguments["enforce_eager"] = new_tokens < WORTH_COMPILING
        started_with = arguments | self._engine.vllm_arguments | self._environment
        logger.info(f"vLLM starts, copies of the model: {len(groups)}, with {started_with}.")
        release_gpu_memory()
        spawn = multiprocessing.get_context("spawn")
        processes, running = [], []
        try:
            for devices in groups:
                environment = self._environment | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})
                mine, theirs = spawn.Pipe()
                work = (theirs, environment, arguments, self._engine.vllm_arguments, self._adapter, sampling)
                processes.append(spawn.Process(target=answer_in_this_process, args=work))
                processes[-1].start()
                theirs.close()
                running.append(mine)
            yield from _fed(running, requests)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _fed(running: list[Connection], requests: Requests) -> Generator[list[Completion], None, None]:
    """Hands requests to the copies as they ask for more, and yields what they finish."""
    waiting, left, copies = iter(requests), len(requests), len(running)
    while running:
        ready = wait(running)
        for connection in [connection for connection in running if connection in ready]:
            message = _received(connection)
            if isinstance(message, Ended):
                running.remove(connection)
                GPU_BYTES_ELSEWHERE.append(message.gpu_bytes)
            elif isinstance(message, int):
                # Towards the end the shares grow small, so that all copies end at about the same time.
                share = list(itertools.islice(waiting, min(message, math.ceil(left / copies))))
                left -= len(share)
                connection.send(share)
            else:
                yield message


def fitting_rank(rank: int) -> int:
    """The smallest rank that vLLM's LoRA kernels are made for and that holds an adapter of the given rank."""
    from vllm.config.lora import MaxLoRARanks

    return min(known for known in get_args(MaxLoRARanks) if known >= rank)


def device_groups(engine: Engine, devices: Sequence[str], heads: int) -> list[list[str]]:
    """Divides the visible GPUs, as CUDA_VISIBLE_DEVICES names them, among copies of the model; a CPU has none."""
    split, copies = engine.tensor_parallel_size, engine.data_parallel_size
    if split is None:
        split = max(1, len(devices) // copies) if copies else 1
    if heads % split:
        raise FinalError(
            f"The model has {heads} attention heads, which engine.tensor_parallel_size = {split} does not divide: choose a "
            "size that does."
        )
    copies = copies or max(1, len(devices) // split)
    if split * copies > len(devices) and (devices or split > 1):
        raise FinalError(
            f"engine.tensor_parallel_size = {split} times engine.data_parallel_size = {copies} needs {split * copies} GPUs and "
            f"{len(devices)} are visible: lower one of them, or leave both out to use all there are."
        )
    return [list(devices[place * split : (place + 1) * split]) for place in range(copies)]


def _received(connection: Connection) -> list[Completion] | int | Ended:
    """What a copy finished, for how many more requests it has room, or that it is done."""
    try:
        message = connection.recv()
    except EOFError:
        raise RuntimeError(
            "A vLLM process ended in the middle of its work; was it killed, for want of memory? Finished shards are kept: "
            "run it again."
        ) from None
    if isinstance(message, Exception):
        raise message
    return message
