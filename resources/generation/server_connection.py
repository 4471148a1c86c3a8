"""OpenAI's client as this project uses it: its pauses are logged and end when it is closed; errors become sentences.

Importing it takes a second, because of the client: it belongs inside the function that needs it.
"""

import concurrent.futures
import contextlib
import itertools
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import httpx2
import openai

from resources.common.errors import FinalError
from resources.common.text import visible
from resources.generation.adapters import Adapter
from resources.settings.machine import ServerAccess

logger = logging.getLogger("synpo.generation")

CONNECT_SECONDS = 10
# The list of models needs no computing: a server that keeps it back hangs.
LIST_SECONDS = 30
LOG_EVERY_SECONDS = 10
# What no answer needs: a completion of a million tokens with their ids.
MOST_BYTES = 32_000_000
MOST_TOKENS = 2**31
LOAD_ADAPTER = "/load_lora_adapter"
# Besides 5xx, what passes by itself: request timeout, conflict, too many requests.
PASSING = (408, 409, 429)
Asked = TypeVar("Asked")
Got = TypeVar("Got")


class Client(openai.OpenAI):
    """Asks again by itself what may pass. Threads may share it."""

    def __init__(self, server: ServerAccess, setting: str = "engine.server") -> None:
        """Connects with the first request; messages name the setting."""
        self._server, self._setting = server, setting
        self._closed, self._logged = threading.Event(), -float(LOG_EVERY_SECONDS)
        super().__init__(
            base_url=server.url,
            # Its servers want some key even where none is checked.
            api_key=api_key() or "none",
            timeout=openai.Timeout(server.timeout_seconds, connect=min(CONNECT_SECONDS, server.timeout_seconds)),
            max_retries=server.attempts - 1,
            # A redirect would take the prompts to another server.
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False, event_hooks={"request": [_note_start], "response": [self._bound, _examine]}
            ),
        )

    def close(self) -> None:
        """Ends pauses and lets no request begin any more."""
        self._closed.set()
        super().close()

    def _sleep_for_retry(self, *, retries_taken: int, max_retries: int, options: Any, response: Any) -> None:
        # The client's own is a time.sleep, which closing cannot end, and its log names neither server nor reason.
        headers = None if response is None else response.headers
        try:
            pause = self._calculate_retry_timeout(max_retries - retries_taken, options, headers)
        except OverflowError:
            # The server asks for a pause until a year that no calendar has.
            pause = self._calculate_retry_timeout(max_retries - retries_taken, options, None)
        if time.monotonic() - self._logged >= LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            error = sys.exception() if response is None else self._make_status_error_from_response(response)
            logger.info(
                f"The server at {self._server.url} did not complete a request, try {retries_taken + 1} of "
                f"{max_retries + 1}, the next in {pause:.0f} s. {_said(error)}"
            )
        if self._closed.wait(pause):
            raise concurrent.futures.CancelledError

    def _bound(self, response: httpx2.Response) -> None:
        """Lets an answer take no longer in all than the settings say, however its bytes come, and be no larger than one can be."""
        deadline = response.request.extensions["started"] + self._server.timeout_seconds
        response.stream = _BoundedStream(response.stream, deadline, response.request)

    def served(self) -> dict[str, openai.types.Model]:
        """What the server serves, by name."""
        with self.errors_explained():
            models = self.models.list(timeout=min(LIST_SECONDS, self._server.timeout_seconds))
        return {model.id: model for model in models.data}

    def load(self, adapter: Adapter) -> None:
        """Has a vLLM server load an adapter."""
        body = {"lora_name": adapter.name, "lora_path": adapter.directory}
        with self.errors_explained():
            try:
                self.post(LOAD_ADAPTER, body=body, cast_to=str)
            except openai.APIStatusError as error:
                if _may_pass(error) and error.status_code != 500:
                    raise
                raise FinalError(
                    f"The server at {self._server.url} did not load the adapter in {adapter.directory}. {_said(error)} "
                    "It must be vLLM's, see the same files, and run with --enable-lora, a --max-lora-rank of at least "
                    f"{adapter.rank} and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
                ) from None

    @contextlib.contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Around requests.

        Raises:
            FinalError: The server refuses the key or a request, or does not answer as OpenAI's API does.
            RuntimeError: It stays down, overloaded or failing for all tries.
        """
        try:
            yield
        except openai.APIError as error:
            raise self._explained(error) from None

    def _explained(self, error: openai.APIError) -> Exception:
        where, status = f"The server at {self._server.url}", getattr(error, "status_code", None)
        if isinstance(error.__cause__, httpx2.DecodingError) or isinstance(error, openai.APIResponseValidationError):
            return FinalError(
                f"{self._server.url} does not answer as OpenAI's completions API does: "
                f"{_shortened(str(error.body or error.__cause__))} Is {self._setting}.url the base URL of the server, with /v1 at "
                "its end? Finished shards are kept."
            )
        if _may_pass(error):
            # Fewer than all where the server asks for a pause of more than two minutes.
            tries = 1 + int(error.request.headers["x-stainless-retry-count"])
            return RuntimeError(
                f"{where} did not complete a request in {'one try' if tries == 1 else f'{tries} tries'}. {_said(error)} "
                f"Finished shards are kept: run it again when the server is well. {self._setting}.attempts and "
                f"{self._setting}.timeout_seconds say how long to wait for it, and a lower {self._setting}.concurrency asks "
                "less of it at a time."
            )
        if status in (401, 403):
            cure = "Put a key that it accepts into the environment variable OPENAI_API_KEY."
        elif status == 404:
            cure = (
                f"Is {self._setting}.url its base URL, with /v1 at its end? If it was started again in the meantime, adapters that "
                "were loaded are gone: run it again."
            )
        else:
            cure = "It would refuse the same request again: change the settings, or the server."
        return FinalError(f"{where} refuses a request. {_said(error)} {cure} Finished shards are kept.")


def api_key() -> str:
    """The key in OPENAI_API_KEY without white space around it; empty if there is none.

    Raises:
        FinalError: It holds what no key can hold; the message does not repeat it.
    """
    key = _stated_key()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise FinalError(
            "The environment variable OPENAI_API_KEY holds a character that no key has, such as a line end or a blank inside: set "
            "it anew."
        )
    return key


def _stated_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


class _BoundedStream(httpx2.SyncByteStream):
    def __init__(self, stream: Any, deadline: float, request: httpx2.Request) -> None:
        self._stream, self._deadline, self._request = stream, deadline, request

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._stream:
            size += len(part)
            if time.monotonic() > self._deadline:
                raise httpx2.ReadTimeout("the answer came too slowly", request=self._request)
            if size > MOST_BYTES:
                raise httpx2.DecodingError(f"more than {MOST_BYTES:,} bytes", request=self._request)
            yield part

    def close(self) -> None:
        self._stream.close()


def _note_start(request: httpx2.Request) -> None:
    request.extensions["started"] = time.monotonic()


def side_by_side(
    ask: Callable[[Asked], Got], asked: Iterable[Asked], concurrency: int
) -> Generator[list[Got], None, None]:
    """Asks in threads, and takes the next questions only as earlier ones are answered; closing it ends the work.

    An error of `ask` ends it too. The threads do not hold up the end of the process: a server that hangs would, for as long as
    a request may take.
    """
    questions: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Got | Exception] = queue.SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        while (question := questions.get()) is not None and not closed.is_set():
            try:
                answers.put(ask(question))
            except Exception as error:
                answers.put(error)

    waiting, under_way = iter(asked), 0

    def hand_out(number: int) -> int:
        taken = list(itertools.islice(waiting, number))
        for question in taken:
            questions.put(question)
        return len(taken)

    try:
        for number in range(concurrency):
            threading.Thread(target=work, name=f"server-request-{number}", daemon=True).start()
        # As many again wait in line, so that no thread idles while a shard is written.
        under_way = hand_out(2 * concurrency)
        while under_way:
            done = [answers.get()]
            while not answers.empty():
                done.append(answers.get())
            yield [answer for answer in done if not isinstance(answer, Exception)]
            for answer in done:
                if isinstance(answer, Exception):
                    raise answer
            under_way += hand_out(len(done)) - len(done)
    finally:
        closed.set()
        for _ in range(concurrency):
            questions.put(None)


def _examine(response: httpx2.Response) -> None:
    """Refuses what lacks what is read of it: the client itself takes any answer with status 200, and would not ask again."""
    path = response.request.url.path
    if path.endswith(LOAD_ADAPTER):
        # Of an adapter that does not fit, vLLM says 500, and would say so again. The client obeys this header.
        if response.status_code == 500:
            response.headers["x-should-retry"] = "false"
        return
    if not response.is_success:
        return
    response.read()
    try:
        if _is_complete(path, response.json()):
            return
    # The last is for JSON that is nested too deeply.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
        pass
    if path.endswith("/models"):
        # Not asked again: it is the first thing that is asked, and most likely the URL is not the base URL.
        raise openai.APIResponseValidationError(response, response.text)
    # An answer that was cut off is no valid JSON, and an overloaded gateway may say so with status 200.
    raise httpx2.DecodingError(response.text, request=response.request)


def _is_complete(path: str, answer: Any) -> bool:
    """May also raise what reading an incomplete answer raises."""
    if path.endswith("/models"):
        return all(isinstance(model["id"], str) for model in answer["data"])
    usage = answer.get("usage")
    choice = next(each for each in answer["choices"] if each.get("index", 0) == 0)
    is_counted = usage and all(
        isinstance(usage[name], int) and 0 <= usage[name] < MOST_TOKENS
        for name in ("prompt_tokens", "completion_tokens")
    )
    if path.endswith("/chat/completions"):
        # No text where the model refused; some servers count nothing.
        return isinstance(choice["message"].get("content"), str | None) and (is_counted or not usage)
    are_ids = all(isinstance(token, int) for token in choice.get("token_ids") or ())
    is_known = choice.get("finish_reason") in ("stop", "length", None)
    return isinstance(choice["text"], str) and is_known and is_counted and are_ids


def _may_pass(error: openai.APIError) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code in PASSING or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def _said(error: BaseException | None) -> str:
    """What the server said, or why nothing came, as a sentence."""
    if isinstance(error, openai.APIStatusError):
        said = error.body.get("message", error.body) if isinstance(error.body, dict) else error
        return _shortened(f"It says: {error.status_code}, {said}")
    if isinstance(error, httpx2.DecodingError):
        return _shortened(f"It answers: {error}")
    return _shortened(f"No answer came: {error} {(error and error.__cause__) or ''}")


def _shortened(text: str) -> str:
    """What a server says, fit for a log: in one line, without escape sequences, and without the key if it repeats it."""
    if key := _stated_key():
        text = text.replace(key, "[OPENAI_API_KEY]")
    text = visible(" ".join(text.split()))
    text = text if len(text) <= 400 else text[:400] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."
