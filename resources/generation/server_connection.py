"""The way to a server with OpenAI's API: what passes is tried again, the rest is said in sentences."""

import concurrent.futures
import email.utils
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tenacity
from pydantic import BaseModel, Field, ValidationError

from resources.common.errors import FinalError
from resources.generation.adapters import Adapter
from resources.settings.machine import ServerAccess

if TYPE_CHECKING:
    import openai

CONNECT_SECONDS = 10
# The list of models needs no computing: a server that keeps it back hangs.
LIST_SECONDS = 30
LONGEST_PAUSE_SECONDS = 60
LOG_EVERY_SECONDS = 10
# Besides 5xx, what passes by itself: request timeout, conflict, too many requests.
PASSING = (408, 409, 429)
Answer = TypeVar("Answer", bound=BaseModel)
Asked = TypeVar("Asked")
Got = TypeVar("Got")


class ServedModel(BaseModel):
    """An entry of the server's list of models; the last two fields are vLLM's own."""

    id: str
    owned_by: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ServedModels(BaseModel):
    """The server's list of models."""

    data: list[ServedModel]


class Choice(BaseModel):
    """What the server says that its model wrote; the token ids only if it is vLLM."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: list[int] | None = None


class TokenCounts(BaseModel):
    """Tokens of the prompt and of what was written."""

    prompt_tokens: int
    completion_tokens: int


class TextCompletion(BaseModel):
    """The server's answer to one prompt."""

    choices: list[Choice] = Field(min_length=1)
    usage: TokenCounts


class UnexpectedAnswerError(ValueError):
    """An answer with status 200 that is not what OpenAI's API says; the text is the answer."""


class Connection:
    """The way to a server: tries again what may pass, and says the rest in sentences. Threads may share it."""

    def __init__(self, server: ServerAccess, log: Callable[[str], None], setting: str = "engine.server") -> None:
        """Connects with the first request.

        Args:
            server: Address, timeout and number of tries.
            log: Receives a sentence about a pause, not more often than every ten seconds.
            setting: The setting that names the server, for messages.
        """
        import openai

        self._server, self._log, self._setting = server, log, setting
        self._client = openai.OpenAI(
            base_url=server.url,
            # Its servers want some key even where none is checked.
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=openai.Timeout(server.timeout_seconds, connect=min(CONNECT_SECONDS, server.timeout_seconds)),
            max_retries=0,
        )
        self._closed = threading.Event()
        self._logging, self._logged = threading.Lock(), -float(LOG_EVERY_SECONDS)
        self._tries = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(server.attempts),
            wait=self._pause,
            retry=tenacity.retry_if_exception(_may_pass),
            sleep=tenacity.sleep_using_event(self._closed),
            before_sleep=self._report,
            reraise=True,
        )

    def close(self) -> None:
        """Ends pauses and lets no request begin any more."""
        self._closed.set()
        self._client.close()

    def models(self) -> list[ServedModel]:
        """What the server serves.

        Raises:
            FinalError: It refuses the key, or does not speak OpenAI's API.
            RuntimeError: It does not answer.
        """
        timeout = min(LIST_SECONDS, self._server.timeout_seconds)
        answer = self._ask(lambda: self._client.get("/models", cast_to=object, options={"timeout": timeout}))
        try:
            return _parsed(answer, ServedModels).data
        except UnexpectedAnswerError as error:
            # Tried once: it is the first thing that is asked, and most likely the URL is not the base URL.
            raise self._unexpected(error) from None

    def post(self, path: str, body: Mapping[str, Any], answer: type[Answer]) -> Answer:
        """Posts one request and reads its answer.

        Raises:
            FinalError: The server refuses the request, or does not answer as OpenAI's API does.
            RuntimeError: It does not answer.
        """
        return self._ask(lambda: _parsed(self._client.post(path, body=body, cast_to=object), answer))

    def load(self, adapter: Adapter) -> None:
        """Has a vLLM server load an adapter.

        Raises:
            FinalError: The server cannot.
            RuntimeError: It does not answer.
        """
        import openai

        body = {"lora_name": adapter.name, "lora_path": adapter.directory}

        def load() -> object:
            try:
                return self._client.post("/load_lora_adapter", body=body, cast_to=object)
            except openai.APIStatusError as error:
                # Of an adapter that does not fit, vLLM says 500, and would say so again.
                if _may_pass(error) and error.status_code != 500:
                    raise
                raise FinalError(
                    f"The server at {self._server.url} did not load the adapter in {adapter.directory}. {_said(error)} "
                    "It must be vLLM's, see the same files, and run with --enable-lora, a --max-lora-rank of at least "
                    f"{adapter.rank} and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
                ) from None

        self._ask(load)

    def _ask(self, call: Callable[[], Got]) -> Got:
        import openai

        def once() -> Got:
            if self._closed.is_set():
                raise concurrent.futures.CancelledError
            return call()

        try:
            return self._tries(once)
        except ValueError as error:
            raise self._unexpected(error) from None
        except openai.APIError as error:
            raise self._explained(error) from None

    def _unexpected(self, error: ValueError) -> FinalError:
        return FinalError(
            f"{self._server.url} does not answer as OpenAI's completions API does: {_shortened(str(error))} Is "
            f"{self._setting}.url the base URL of the server, with /v1 at its end? Finished shards are kept."
        )

    def _explained(self, error: "openai.APIError") -> Exception:
        where, status = f"The server at {self._server.url}", _status(error)
        if _may_pass(error):
            tries = "one try" if self._server.attempts == 1 else f"{self._server.attempts} tries"
            return RuntimeError(
                f"{where} did not complete a request in {tries}. {_said(error)} Finished shards are kept: run it "
                f"again when the server is well. {self._setting}.attempts and {self._setting}.timeout_seconds say how long to "
                f"wait for it, and a lower {self._setting}.concurrency asks less of it at a time."
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

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next try: growing and partly random, or what the server asks for if that is longer."""
        growing = tenacity.wait_exponential_jitter(max=LONGEST_PAUSE_SECONDS)(state)
        return max(growing, min(_retry_after(_error(state)), self._server.timeout_seconds))

    def _report(self, state: tenacity.RetryCallState) -> None:
        with self._logging:
            now = time.monotonic()
            if now - self._logged < LOG_EVERY_SECONDS:
                return
            self._logged = now
        self._log(
            f"The server at {self._server.url} did not complete a request, try {state.attempt_number} of "
            f"{self._server.attempts}, the next in {state.upcoming_sleep:.0f} s. {_said(_error(state))}"
        )


def side_by_side(
    ask: Callable[[Asked], Got], asked: Iterable[Asked], concurrency: int
) -> Generator[list[Got], None, None]:
    """Asks in threads, and takes the next questions only as earlier ones are answered; closing it ends the work.

    The threads do not hold up the end of the process: a server that hangs would, for as long as a request may take.

    Args:
        ask: Asks one question; its error ends the work.
        asked: The questions.
        concurrency: How many are under way at a time.
    """
    questions: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Got | Exception] = queue.SimpleQueue()

    def work() -> None:
        while (question := questions.get()) is not None:
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
        with suppress(queue.Empty):
            while True:
                questions.get_nowait()
        for _ in range(concurrency):
            questions.put(None)


def _parsed(answer: object, expected: type[Answer]) -> Answer:
    try:
        return expected.model_validate(answer)
    except ValidationError:
        raise UnexpectedAnswerError(str(answer)) from None


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error; None if there was no answer."""
    import openai

    return error.status_code if isinstance(error, openai.APIStatusError) else None


def _may_pass(error: BaseException) -> bool:
    import openai

    # An answer that was cut off is no valid JSON, and an overloaded gateway may say so with status 200.
    if isinstance(error, openai.APIConnectionError | ValueError):
        return True
    status = _status(error)
    return status is not None and (status in PASSING or status >= 500)


def _said(error: BaseException | None) -> str:
    """What the server said, or why nothing came, as a sentence."""
    import openai

    if not isinstance(error, openai.APIStatusError):
        what = "It answers" if isinstance(error, ValueError) else "No answer came"
        return _shortened(f"{what}: {error} {error.__cause__ or ''}" if error else "")
    said = error.body.get("message", error.body) if isinstance(error.body, dict) else error
    return _shortened(f"It says: {error.status_code}, {said}")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= 400 else text[:400] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."


def _retry_after(error: BaseException | None) -> float:
    """Seconds that the server asks to wait for, as a number or a date; 0 if it does not ask."""
    import openai

    header = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    try:
        return float(header)
    except ValueError:
        date = email.utils.parsedate_tz(header)
        return email.utils.mktime_tz(date) - time.time() if date else 0.0
