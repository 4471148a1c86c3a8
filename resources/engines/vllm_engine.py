"""Generation with vLLM: on GPUs, split over them or one copy of the model on each; slowly on a CPU too."""

import multiprocessing
import os
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait

from resources.device import prepare_device, torch_dtype
from resources.engines.completions import longest_sequence
from resources.engines.interface import Completion, Request
from resources.engines.vllm_process import answer_in_this_process
from resources.errors import FinalError
from resources.settings import Engine, Sampling

# vLLM's core shares the process that it is called from: a core of its own would outlive a killed step and hold the GPU.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
# Without these, vLLM takes half of the memory for its cache and leaves all but one thread pinned to one core.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# torch.compile takes minutes to start there, and one process needs no collectives.
CPU_ARGUMENTS = {"enforce_eager": True, "distributed_executor_backend": "uni"}


class VllmEngine:
    """Answers with one or more copies of a model, each in a process of its own for the length of one call.

    When the call ends, so do the processes: that is the one sure way to get all GPU memory back for what follows in
    the same step. Weights hold merged adapters; vLLM's own adapters (`LoRARequest`) are not used.

    Args:
        weights: Directory of a model.
        engine: How models run here.
        log: Receives a sentence about what vLLM is started with.
    """

    def __init__(self, weights: str, engine: Engine, log: Callable[[str], None]) -> None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(weights, trust_remote_code=engine.trust_remote_code).get_text_config()
        self._context_length = config.max_position_embeddings
        self._engine, self._log = engine, log
        self._devices = device_groups(engine, _visible_devices(engine), config.num_attention_heads)
        self._arguments = {
            "model": weights,
            "dtype": str(torch_dtype(engine)).removeprefix("torch."),
            "load_format": "safetensors",
            "trust_remote_code": engine.trust_remote_code,
            "tensor_parallel_size": max(1, len(self._devices[0])),
            "max_num_batched_tokens": engine.batch_tokens,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        on_cpu = prepare_device(engine) == "cpu"
        defaults = ENVIRONMENT | CPU_ENVIRONMENT if on_cpu else ENVIRONMENT
        self._environment = {name: os.environ.get(name, value) for name, value in defaults.items()}
        if on_cpu:
            self._arguments |= CPU_ARGUMENTS
            self._environment["OMP_NUM_THREADS"] = str(engine.threads or os.cpu_count() or 1)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Generator[list[Completion], None, None]:
        """Completes requests on all copies side by side and yields completions as they finish.

        Args:
            requests: Prompts as token ids.
            sampling: How to sample.

        Raises:
            ValueError: A prompt and `max_new_tokens` together exceed the model's context.
            FinalError: An engine argument is unknown, or the memory does not suffice.
            RuntimeError: vLLM failed for another reason.
        """
        # No more of the context than this call can use: the cache then holds more sequences at a time.
        arguments = self._arguments | {"max_model_len": longest_sequence(requests, sampling, self._context_length)}
        groups = self._devices[: len(requests)]
        started_with = arguments | self._engine.vllm_arguments | self._environment
        self._log(f"vLLM starts, copies of the model: {len(groups)}, with {started_with}.")
        spawn = multiprocessing.get_context("spawn")
        processes, running = [], []
        try:
            for place, devices in enumerate(groups):
                environment = self._environment | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})
                share = requests[place :: len(groups)]
                reader, writer = spawn.Pipe(duplex=False)
                work = (writer, environment, arguments, self._engine.vllm_arguments, share, sampling)
                processes.append(spawn.Process(target=answer_in_this_process, args=work))
                processes[-1].start()
                writer.close()
                running.append(reader)
            while running:
                ready = wait(running)
                for reader in [reader for reader in running if reader in ready]:
                    completions = _received(reader)
                    if completions is None:
                        running.remove(reader)
                    else:
                        yield completions
        finally:
            for process in processes:
                process.terminate()
                process.join()


def device_groups(engine: Engine, devices: Sequence[str], heads: int) -> list[list[str]]:
    """Divides the visible devices among copies of the model.

    Args:
        engine: States `tensor_parallel_size` and `data_parallel_size`, or leaves them open.
        devices: The visible GPUs, as CUDA_VISIBLE_DEVICES names them; none on a CPU.
        heads: Attention heads of the model.

    Returns:
        The devices of each copy.

    Raises:
        FinalError: The sizes do not fit the model or the devices.
    """
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


def _visible_devices(engine: Engine) -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    import torch

    if prepare_device(engine) == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return named if named[0] else [str(number) for number in range(torch.cuda.device_count())]


def _received(reader: Connection) -> list[Completion] | None:
    """What a copy finished; None after its last completion."""
    try:
        message = reader.recv()
    except EOFError:
        raise RuntimeError(
            "A vLLM process ended in the middle of its work; was it killed, for want of memory? Finished shards are kept: "
            "run it again."
        ) from None
    if isinstance(message, Exception):
        raise message
    return message
