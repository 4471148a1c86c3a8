"""Servers that answer what nobody asked for, and keys and addresses that must not be shown."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from resources.common.errors import FinalError
from resources.common.outside_text import redacted
from resources.judging.server_judge import Verdict
from resources.judging.structured_chat import StructuredChat
from resources.settings.evaluation import JudgeServer
from resources.settings.machine import Server
from synpo_assets.method.outcomes import NO_VERDICT
from tests.test_evaluation import ROWS, asked, better, honest, verdicts
from tests.test_evaluation import serve as serve
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
    assert first_text(tmp_path / "c", faulty, nano_checkpoint, answered(token_ids=[10**9]))[0] == "fine"


@pytest.mark.parametrize("more", [{}, {"token_ids": [10**9]}])
def test_an_empty_answer_counts_its_end_as_tables_do(tmp_path, faulty, nano_checkpoint, more):
    fault = answered("", tokens=0, **more) | {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}
    text, usage = first_text(tmp_path, faulty, nano_checkpoint, fault)
    assert (text, usage.output_tokens) == ("", 1)
    assert usage.input_tokens > 1


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


@pytest.mark.parametrize("status", [200, 400])
def test_what_is_packed_is_not_unpacked(tmp_path, faulty, nano_checkpoint, status):
    with pytest.raises(FinalError, match="packed as gzip, which was not asked for"):
        first_text(tmp_path, faulty, nano_checkpoint, (status, {"content-encoding": "GZip"}, ""), attempts=1)
    assert faulty.encodings == ["identity"]


def test_an_answer_that_is_larger_than_any_is_not_read_to_its_end(tmp_path, faulty, nano_checkpoint, monkeypatch):
    monkeypatch.setattr("resources.generation.bounded_connection.MOST_BYTES", 5000)
    first_text(tmp_path / "a", faulty, nano_checkpoint)
    with pytest.raises(FinalError, match="more than 5,000 bytes"):
        first_text(tmp_path / "b", faulty, nano_checkpoint, answered("tea " * 2000), attempts=1)


@pytest.mark.parametrize("charset", ["hex", "rot13", "undefined"])
def test_an_encoding_that_is_none_of_texts_does_not_count(tmp_path, faulty, nano_checkpoint, charset):
    fault = (400, {"content-type": f"application/json; charset={charset}"}, "I will not do that")
    with pytest.raises(FinalError, match="It says: 400, I will not do that"):
        first_text(tmp_path, faulty, nano_checkpoint, fault)


@pytest.mark.parametrize("field", [{"max_model_len": "8192"}, {"parent": ["x"]}, {"max_model_len": True}])
def test_a_list_of_models_that_is_none_is_said_with_the_field(tmp_path, faulty, nano_checkpoint, field):
    faulty.models = [{"id": "nano", "owned_by": "vllm", **field}]
    with pytest.raises(FinalError, match=rf"data\.0\.{next(iter(field))}: Input should be a valid"):
        first_text(tmp_path, faulty, nano_checkpoint)


def test_names_of_models_do_not_carry_the_key(tmp_path, faulty, nano_checkpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    faulty.models = [{"id": f"{SECRET} \x1b[2J"}]
    with pytest.raises(FinalError, match=r"it has: \[OPENAI_API_KEY\] ⟨U\+001B⟩") as refused:
        first_text(tmp_path, faulty, nano_checkpoint)
    assert SECRET not in str(refused.value)
    faulty.models = [{"id": "nano", "owned_by": "vllm"}]
    with pytest.raises(FinalError, match=r"answers as \[OPENAI_API_KEY\] where nano was asked"):
        first_text(tmp_path, faulty, nano_checkpoint, answered() | {"model": SECRET})


def reply(content, index=0):
    return {"index": index, "message": {"content": content}}


def asked_once(tmp_path, faulty, fault):
    """What a judge says to one question, where the server answers so."""
    faulty.faults = [json.dumps(fault).encode()]
    server = JudgeServer(url=faulty.url, model="judge", attempts=1)
    return StructuredChat(server, Verdict, "verdict", {}, str(tmp_path), 9).ask({"question-1": "Which?"})


A, B = better("A"), better("B")


@pytest.mark.parametrize(("fault", "verdict"), [
    ({"choices": [reply(A[:-1] + "\ud800}")]}, "A"),
    ({"choices": [reply(better("A\ud800"))]}, None),
    ({"choices": [reply("a\ud800b")]}, None),
    ({"choices": [reply(B, 1), reply(A)]}, "A"),
    ({"choices": [{"index": 1}, reply(A)]}, "A"),
    ({"choices": [reply(A)], "usage": {}}, "A"),
    ({"choices": [reply(A)], "model": "judge-2024-08-06"}, "A"),
])  # fmt: skip
def test_of_what_a_judge_answers_the_choice_asked_for_is_read(tmp_path, faulty, fault, verdict):
    replies = asked_once(tmp_path, faulty, fault)
    found = replies.by_key["question-1"]
    assert (found and found.better, replies.usage.tokens) == (verdict, 0)


@pytest.mark.parametrize(("around", "verdict"), [
    ("```\n{}\n```", "A"), ("<think>\nB? {{}}\n</think>\n```json \n{}\n```", "A"), ("<think>{}", None), ("<think></think>{}", "A"),
    ("```" + "\n" * 60_000 + "x{}", None), ("<think>" * 60_000 + "{}", None), (" " * 3_000_000 + "{}", "A"),
])  # fmt: skip
def test_what_is_around_a_verdict_takes_no_time(tmp_path, faulty, around, verdict):
    """While a pattern is looked for, nothing else of the process is at work, not even what would end it."""
    began = time.process_time()
    found = asked_once(tmp_path, faulty, {"choices": [reply(around.format(A))]}).by_key["question-1"]
    assert (found and found.better) == verdict
    assert time.process_time() - began < 3


def test_a_long_refusal_is_shown_in_a_moment():
    began = time.process_time()
    assert len(redacted("x\x1b" * 10_000_000)) < 500
    assert time.process_time() - began < 1


@pytest.mark.parametrize("name", ["other", "judge-mini", "judge-2", ""])
def test_the_verdict_of_another_model_is_refused(tmp_path, faulty, name):
    with pytest.raises(FinalError, match=f"answers as {name} where judge was asked"):
        asked_once(tmp_path, faulty, {"choices": [reply(A)], "model": name})


def test_nonsense_of_a_judge_is_said_without_the_key(tmp_path, faulty, monkeypatch, said):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    asked_once(tmp_path, faulty, {"choices": [reply("x" * 175 + f" your key is Bearer {SECRET}")]})
    (line,) = [line for line in said if "are no verdict" in line]
    assert "such as that to question-1: 'xxx" in line
    assert "sk-S" not in line


@pytest.mark.parametrize(("fault", "bodies"), [
    ((400, {}, "it is filtered"), 1), ((422, {}, "it is filtered"), 1), (b'"it is filtered"', 1), ((500, {}, "it is filtered"), 3)
])  # fmt: skip
def test_a_question_that_the_server_refuses_has_no_verdict_and_stops_nothing(serve, tmp_path, said, fault, bodies):
    server = serve(honest)
    server.fault_of = lambda body: fault if "poor one" in str(body).split("good answer")[0] else None
    for asked_in_all in (5 + bodies, 5 + 2 * bodies):
        assert verdicts(asked(server, tmp_path, attempts=1)) == [NO_VERDICT, "loss", "tie"]
        assert len(server.bodies) == asked_in_all, "what is finished is kept, and only the other one asked for again"
    lines = [line for line in said if "1 of 6 replies of judge (on a server) are no verdict" in line]
    assert len(lines) == 2
    assert all("it is filtered" in line for line in lines)


def test_verdicts_are_kept_where_no_shard_was_full(serve, tmp_path):
    server = serve(honest)
    server.faults = [None] * 4 + [(401, {}, "no")]
    with pytest.raises(FinalError, match="It says: 401"):
        asked(server, tmp_path, concurrency=1).compare(ROWS)
    assert asked(server, tmp_path).compare(ROWS).usage.reused == 4


class Dripping(BaseHTTPRequestHandler):
    """Answers piece by piece, for longer than anybody waits."""

    begin, piece, pause = b"HTTP/1.1 200 OK\r\ncontent-length: 10000\r\n\r\n", b" ", 0.1

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = b'{"object": "list", "data": [{"id": "nano", "object": "model"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        try:
            self.wfile.write(self.begin)
            for _ in range(int(10 / self.pause)):
                self.wfile.write(self.piece)
                time.sleep(self.pause)
        except OSError:
            pass


class DrippingHeaders(Dripping):
    begin, piece = b"HTTP/1.1 200 OK\r\n", b"x-more: 1\r\n"


class Announcing(Dripping):
    begin, piece, pause = b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.001


@pytest.mark.parametrize(
    ("handler", "is_proxy"), [(Dripping, False), (DrippingHeaders, False), (Announcing, False), (DrippingHeaders, True)]
)
def test_a_server_that_answers_drop_by_drop_is_not_waited_for(
    tmp_path, nano_checkpoint, monkeypatch, handler, is_proxy
):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url, started = f"http://127.0.0.1:{server.server_port}", time.monotonic()
        if is_proxy:
            monkeypatch.setenv("HTTP_PROXY", url)
            url = "http://elsewhere.invalid"
        with pytest.raises(RuntimeError, match=r"did not complete a request in 2 tries.*too slowly"):
            asking(tmp_path, f"{url}/v1", timeout_seconds=0.5, attempts=2).answer(nano_checkpoint, PROMPTS[:1], PLAIN)
        assert time.monotonic() - started < 8
        server.shutdown()
