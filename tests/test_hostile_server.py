"""Servers that answer what nobody asked for, and keys and addresses that must not be shown."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from resources.common.errors import FinalError
from resources.settings.machine import Server
from tests.test_generation import PROMPTS
from tests.test_server_engine import PLAIN, asking
from tests.test_server_engine import faulty as faulty

pytestmark = pytest.mark.usefixtures("short_pauses")
SECRET = "sk-SECRETKEY"


def answered(text="fine", index=0, tokens=7, **more):
    choice = {"index": index, "text": text, "finish_reason": "stop", **more}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}}


def first_text(tmp_path, faulty, checkpoint, *faults, **server):
    faulty.faults = [json.dumps(fault).encode() if isinstance(fault, dict) else fault for fault in faults]
    frame, usage = asking(tmp_path, faulty.url, concurrency=1, **server).answer(checkpoint, PROMPTS[:1], PLAIN)
    return frame["text"][0], usage


@pytest.mark.parametrize("key", [f"{SECRET}\n", f" {SECRET} ", f"{SECRET}\r\n"])
def test_white_space_around_a_key_does_not_count(tmp_path, faulty, nano_checkpoint, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    first_text(tmp_path, faulty, nano_checkpoint)
    assert faulty.keys == [f"Bearer {SECRET}"]


@pytest.mark.parametrize("key", [f"{SECRET}\nx", f"{SECRET}\x07", f"{SECRET} x", f"{SECRET}…"])
def test_a_key_that_can_be_none_is_refused_without_repeating_it(tmp_path, faulty, nano_checkpoint, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(FinalError, match="OPENAI_API_KEY holds a character that no key has") as refused:
        first_text(tmp_path, faulty, nano_checkpoint)
    assert SECRET not in str(refused.value)


def test_a_key_that_the_server_repeats_and_its_escape_sequences_are_not_shown(
    tmp_path, faulty, nano_checkpoint, monkeypatch, said
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    echo = {}, f"your key was Bearer {SECRET} \x1b]0;PWNED\x07\x1b[2J"
    with pytest.raises(FinalError, match=r"your key was Bearer \[OPENAI_API_KEY\]") as refused:
        first_text(tmp_path, faulty, nano_checkpoint, (500, *echo), (400, *echo), attempts=2)
    for text in (str(refused.value), *said):
        assert SECRET not in text
        assert "\x1b" not in text


@pytest.mark.parametrize(
    "url", ["http://user:SECRETPW@host/v1", "http://host/v1?api-key=SECRETPW", "http://a\nSECRETPW", "ftp://h"]
)
def test_an_address_with_a_secret_in_it_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match="keys belong into OPENAI_API_KEY") as refused:
        Server(url=url)
    assert "SECRETPW" not in str(refused.value.errors(include_input=False))


@pytest.mark.parametrize("fault", [
    answered(tokens=-5), answered(tokens=2**70), answered(index=1), answered(token_ids=[1.5]),
], ids=["negative count", "count beyond all", "another choice", "fractions of tokens"])  # fmt: skip
def test_what_is_no_answer_is_asked_again(tmp_path, faulty, nano_checkpoint, fault):
    assert first_text(tmp_path, faulty, nano_checkpoint, fault)[0] == faulty.text
    assert len(faulty.bodies) == 2


def test_what_is_more_than_was_asked_for_is_cut(tmp_path, faulty, nano_checkpoint):
    text, usage = first_text(tmp_path, faulty, nano_checkpoint, answered("tea " * 300_000, tokens=900))
    assert 0 < len(text) < 200
    assert usage.output_tokens <= PLAIN.max_new_tokens
    assert usage.cut == 1


def test_half_characters_and_tokens_that_nobody_knows_are_left_out(tmp_path, faulty, nano_checkpoint):
    assert first_text(tmp_path / "a", faulty, nano_checkpoint, answered("a\ud800b"))[0] == "ab"
    fault = answered(token_ids=[10**9, -1, 2**40, 70, *[71] * 5000])
    text, usage = first_text(tmp_path / "b", faulty, nano_checkpoint, fault)
    assert usage.output_tokens <= PLAIN.max_new_tokens
    assert len(text) < 200


def test_the_answer_of_another_model_is_refused(tmp_path, faulty, nano_checkpoint):
    faulty.models = [{"id": "nano", "object": "model", "owned_by": "vllm"}]
    with pytest.raises(FinalError, match="answers as another where nano was asked"):
        first_text(tmp_path, faulty, nano_checkpoint, answered() | {"model": "another"})


def test_prompts_do_not_follow_a_redirect(tmp_path, faulty, nano_checkpoint):
    elsewhere = {"location": "http://127.0.0.1:1/v1/completions"}
    with pytest.raises(FinalError, match="It says: 307"):
        first_text(tmp_path, faulty, nano_checkpoint, (307, elsewhere, "over there"))


def test_a_pause_beyond_all_calendars_is_an_ordinary_one(tmp_path, faulty, nano_checkpoint):
    fault = (429, {"retry-after": "Mon, 01 Jan 99999999999 00:00:00 GMT"}, "later")
    assert first_text(tmp_path, faulty, nano_checkpoint, fault)[0] == faulty.text


class Dripping(BaseHTTPRequestHandler):
    """Answers one byte after the other, for longer than anybody waits."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = b'{"object": "list", "data": [{"id": "nano", "object": "model"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.send_response(200)
        self.send_header("content-length", "10000")
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(0.1)
        except OSError:
            pass


def test_a_server_that_answers_drop_by_drop_is_not_waited_for(tmp_path, nano_checkpoint):
    with ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"did not complete a request in 2 tries.*too slowly"):
            asking(tmp_path, f"http://127.0.0.1:{server.server_port}/v1", timeout_seconds=0.5, attempts=2).answer(
                nano_checkpoint, PROMPTS[:1], PLAIN
            )
        assert time.monotonic() - started < 8
        server.shutdown()
