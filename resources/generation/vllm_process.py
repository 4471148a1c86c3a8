"""One copy of a model in vLLM, in a process of its own."""

import dataclasses
import os
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from resources.common.errors import FinalError
from resources.common.processes import end_with_this_parent
from resources.generation.adapters import Adapter
from resources.generation.completions import completion, end_ids
from resources.generation.engine import Completion
from resources.models.chat import load_tokenizer
from resources.models.device import gpu_bytes_here
from resources.settings.method import Sampling
from resources.settings.sections import nearest

# How vLLM and CUDA say that there is too little of it; they speak of memory in other errors too.
OUT_OF_MEMORY = ("out of memory", "free memory", "available memory", "not enough gpu memory", "kv cache is needed")


@dataclasses.dataclass(frozen=True)
class Ended:
    """The last message of a copy."""

    gpu_bytes: int  # The most that it reserved of a GPU; copies that are split over several GPUs do not count theirs.


def answer_in_this_process(
    parent: Connection,
    environment: dict[str, str],
    arguments: dict[str, Any],
    given: dict[str, Any],
    adapter: Adapter | None,
    sampling: Sampling,
) -> None:
    """Loads the model, answers, and sends completions as they finish, then that it ended; or an error, if there is one.

    The first list is empty: it tells that the model is loaded. A number asks for so many more requests, of which the
    parent sends a list; an empty one is the last. `arguments` are ours and `given` the user's, `engine.vllm_arguments`.
    """
    end_with_this_parent()
    # An interrupt of the terminal reaches this process too; its parent then ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= environment
    # vLLM's own calls of what PyTorch deprecates say nothing to the reader of a run.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        for completions in _completions(parent, arguments, given, adapter, sampling):
            parent.send(completions)
        parent.send(Ended(gpu_bytes_here()))
    except FinalError as error:
        # Those of other arguments do not survive the way to another process.
        parent.send(FinalError(str(error)))
    except Exception as error:
        traceback.print_exc()
        parent.send(_explained(error))


def _completions(
    parent: Connection, arguments: dict[str, Any], given: dict[str, Any], adapter: Adapter | None, sampling: Sampling
) -> Iterator[list[Completion]]:
    from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext

    refuse_arguments(given, arguments, [field.name for field in dataclasses.fields(EngineArgs)])
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments, **given), usage_context=UsageContext.LLM_CLASS)
    tokenizer = load_tokenizer(arguments["model"], arguments["trust_remote_code"])
    ends = end_ids(tokenizer, engine.model_config.try_get_generation_config().get("eos_token_id"))
    lora = LoRARequest(adapter.name, adapter.number, adapter.directory) if adapter else None
    yield []
    # vLLM's own loop, one step at a time, so that completions leave as they finish. Twice as many requests as run at a
    # time keep its queue from running dry; adding all at once would hold up the first step and fill the memory.
    room = 2 * engine.vllm_config.scheduler_config.max_num_seqs
    asked = last = False
    while True:
        unfinished = engine.get_num_unfinished_requests()
        if not asked and not last and unfinished < room:
            parent.send(room - unfinished)
            asked = True
        # Without work there is nothing to do but wait for it.
        if asked and (parent.poll() or not unfinished):
            requests, asked = parent.recv(), False
            last = not requests
            for request in requests:
                parameters = SamplingParams(
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    seed=request.seed,
                    stop=sampling.stop,
                    include_stop_str_in_output=True,
                    stop_token_ids=ends,
                    # Only stop texts need the text while it is written.
                    detokenize=bool(sampling.stop),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                # Token ids are taken as they are: no second BOS is put before them.
                (prompt,) = engine.renderer.render_cmpl([TokensPrompt(prompt_token_ids=request.token_ids)])
                engine.add_request(str(request.key), prompt, parameters, lora_request=lora)
        if last and not engine.has_unfinished_requests():
            return
        if finished := engine.step():
            for output in finished:
                if output.outputs[0].finish_reason not in ("stop", "length"):
                    raise RuntimeError(f"it ended a completion with `{output.outputs[0].finish_reason}`.")
            yield [
                completion(
                    int(output.request_id),
                    len(output.prompt_token_ids),
                    list(output.outputs[0].token_ids),
                    sampling,
                    tokenizer,
                    ends,
                )
                for output in finished
            ]


def refuse_arguments(given: dict[str, Any], own: dict[str, Any], known: Sequence[str]) -> None:
    """Refuses arguments of `engine.vllm_arguments` that are unknown to vLLM, or that are the engine's own to set."""
    for name in given:
        if name in own or name.startswith("data_parallel"):
            raise FinalError(
                f"engine.vllm_arguments.{name} is set by the engine itself, from the other settings of the section `engine` "
                "and the lengths in use: remove it."
            )
        if name not in known:
            raise FinalError(f"engine.vllm_arguments.{name} is no argument of vLLM{nearest(name, known)}")


def _explained(error: Exception) -> Exception:
    import torch

    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or any(phrase in reason.lower() for phrase in OUT_OF_MEMORY):
        return FinalError(
            f"vLLM's memory does not suffice. It says: {reason} Lower engine.batch_tokens, sampling.max_new_tokens or "
            "engine.vllm_arguments.gpu_memory_utilization (what vLLM takes of each GPU), or raise "
            "engine.tensor_parallel_size. Finished shards are kept: run it again."
        )
    # pydantic's errors are ValueErrors too; what vLLM finds wrong with its arguments it would find wrong again.
    if isinstance(error, ValueError):
        return FinalError(
            f"vLLM refuses what it is started with. It says: {reason} Change engine.vllm_arguments, or the setting of the "
            "section `engine` that it names."
        )
    return RuntimeError(f"vLLM failed: {reason}")
