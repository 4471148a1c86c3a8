"""Generation by asking a server that runs already: vLLM's, or another with OpenAI's completions API."""

import logging
import shlex
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.common.errors import FinalError
from resources.common.outside_text import redacted
from resources.generation.adapters import adapter_of
from resources.generation.completions import completion, end_ids, longest_sequence
from resources.generation.engine import Completion, Request, Requests
from resources.generation.failures import RefusedError
from resources.generation.server_answers import ServedModel, TextAnswer
from resources.models.chat import load_tokenizer
from resources.settings.machine import Engine, Server
from resources.settings.method import Sampling
from resources.storage.checkpoint_store import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from resources.generation.server_connection import Client

logger = logging.getLogger("synpo.generation")

# A text may be cut into other tokens than those that were written, but not into twice as many.
ROOM = 2
MOST_CHARACTERS = 100
SERVE = "python -m vllm.entrypoints.openai.api_server --model {weights} --served-model-name {name}"


class ServerEngine:
    """Asks a running server for completions, several at a time.

    Prompts go as token ids, so the chat template is applied once, here. vLLM returns token ids, of which completions are
    made as for every other engine. Other servers get OpenAI's own fields only: they end a completion where they think
    right, and stop texts are cut off here, after they were written past.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Engine, server: Server) -> None:
        self._checkpoint, self._engine, self._server = checkpoint, engine, server

    def generate(self, requests: Requests, sampling: Sampling) -> Generator[list[Completion], None, None]:
        """Completes requests side by side and yields completions as they finish."""
        from resources.generation.server_connection import Client, side_by_side

        weights = self._checkpoint.weights
        tokenizer = load_tokenizer(weights, self._engine.trust_remote_code)
        ends = end_ids(tokenizer, _configured_ends(weights, self._engine.trust_remote_code))
        with Client(self._server) as client:
            name, model = self._model_on(client)
            # The owner and the length are what servers other than vLLM's may leave out.
            is_vllm = model.owned_by == "vllm"
            logger.info(f"The server calls {self._checkpoint.label} {name}; it is {'' if is_vllm else 'not '}vLLM.")
            if model.max_model_len:
                longest_sequence(requests, sampling, model.max_model_len)
            if sampling.top_k and not is_vllm:
                raise FinalError(
                    f"The server at {self._server.url} is not vLLM's, and OpenAI's API has no top_k: set sampling.top_k to 0 and "
                    "use top_p."
                )
            yield []

            def complete(request: Request) -> Completion:
                body = {
                    "model": name,
                    "prompt": request.token_ids,
                    "seed": request.seed,
                    "max_tokens": sampling.max_new_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    **(_vllm_fields(sampling, ends) if is_vllm else {}),
                }
                try:
                    answer = client.ask("/completions", body, TextAnswer)
                except RefusedError as refusal:
                    return Completion(request.key, "", len(request.token_ids), 1, "length", refusal)
                if is_vllm:
                    client.refuse_another(answer.model, name, dated=False)
                return _as_completion(request, answer, sampling, tokenizer, ends)

            yield from side_by_side(complete, requests, self._server.concurrency)

    def _model_on(self, client: "Client") -> tuple[str, ServedModel]:
        """The name under which the server has the checkpoint, and the entry that tells its length and owner."""
        served = client.served()
        label, sha = self._checkpoint.label, self._checkpoint.sha
        name = self._server.models.get(label, sha[:16])
        if name in served:
            # vLLM states the length with the model that an adapter belongs to.
            return name, served.get(served[name].parent or name, served[name])
        serve = SERVE.format(weights=shlex.quote(self._checkpoint.weights), name=shlex.quote(name))
        adapter = (
            adapter_of(self._checkpoint) if self._server.load_adapters and label not in self._server.models else None
        )
        if adapter is None:
            raise self._missing(label, name, served, serve)
        start = self._checkpoint.manifest["parents"]["start"]
        base = self._server.models.get(start["asset"], start["sha"][:16])
        if base not in served:
            serve = SERVE.format(weights=shlex.quote(adapter.base_weights), name=shlex.quote(base))
            rank = max(8, 1 << (adapter.rank - 1).bit_length())
            serve = f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {serve} --enable-lora --max-lora-rank {rank}"
            raise self._missing(f"{start['asset']}, which the adapter of {label} belongs to,", base, served, serve)
        if adapter.name not in served:
            client.load(adapter)
            logger.info(f"The server loaded the adapter of {label}.")
        return adapter.name, served[base]

    def _missing(self, what: str, name: str, served: Iterable[str], serve: str) -> FinalError:
        return FinalError(
            f"The server at {self._server.url} does not serve {what} under the name {name}; it has: "
            f"{redacted(', '.join(served)) or 'nothing'}. Serve it, for instance with `{serve}`, or state the name that it has "
            "there under engine.server.models."
        )


def _vllm_fields(sampling: Sampling, ends: list[int]) -> dict[str, Any]:
    return {
        "top_k": sampling.top_k,
        "stop": sampling.stop,
        "include_stop_str_in_output": True,
        "stop_token_ids": ends,
        "return_token_ids": True,
        # vLLM's server takes what is not stated from the model's generation config; our settings state all there is.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def _as_completion(
    request: Request,
    answer: TextAnswer,
    sampling: Sampling,
    tokenizer: "PreTrainedTokenizerBase",
    ends: list[int],
) -> Completion:
    choice, size = answer.choice, len(tokenizer)
    # What no tokenizer knows has no text, and what is more than was asked for was not asked for.
    if known := [token for token in choice.token_ids or () if 0 <= token < size][: sampling.max_new_tokens]:
        return completion(request.key, len(request.token_ids), known, sampling, tokenizer, ends)
    text, stopped = choice.text, choice.finish_reason != "length"
    written = tokenizer(text[: MOST_CHARACTERS * sampling.max_new_tokens], add_special_tokens=False).input_ids
    if len(written) > ROOM * sampling.max_new_tokens or len(text) > MOST_CHARACTERS * sampling.max_new_tokens:
        text, stopped = tokenizer.decode(written[: sampling.max_new_tokens], skip_special_tokens=True), False
    for stop in sampling.stop:
        if stop in text:
            text, stopped = text[: text.index(stop) + len(stop)], True
    return Completion(
        key=request.key,
        text=text,
        input_tokens=len(request.token_ids),
        # Its end is a token, whether the server counts it or not.
        output_tokens=min(max(1, answer.usage.completion_tokens), sampling.max_new_tokens),
        finish_reason="stop" if stopped else "length",
    )


def _configured_ends(weights: str, trust_remote_code: bool) -> int | list[int] | None:
    """`eos_token_id` of the model's generation config, which is its config where it has none of its own."""
    from transformers import AutoConfig, GenerationConfig

    if (Path(weights) / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(weights).eos_token_id
    config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)
    return GenerationConfig.from_model_config(config).eos_token_id
