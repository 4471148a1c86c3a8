"""OpenAI's client as this project uses it: its pauses are logged and end when it is closed; errors become sentences.

Importing it takes a second, because of the client: it belongs inside the function that needs it.
"""

import concurrent.futures
import contextlib
import itertools
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import httpx2
import openai
from pydantic import BaseModel, ValidationError

from resources.common.errors import FinalError
from resources.common.outside_text import redacted, stated_key
from resources.generation.adapters import Adapter
from resources.generation.bounded_connection import bound
from resources.generation.failures import RefusedError, UnansweredError
from resources.generation.server_answers import ChatAnswer, ModelList, ServedModel, TextAnswer
from resources.settings.machine import ServerAccess

logger = logging.getLogger("synpo.generation")

CONNECT_SECONDS = 10
# The list of models needs no computing: a server that keeps it back hangs.
LIST_SECONDS = 30
LOG_EVERY_SECONDS = 10
# Too many requests: so many times the client's own pause, and so many seconds at most.
TOO_MANY, PAUSED_LONGER, LONGEST_PAUSE = 429, 8, 60
LOAD_ADAPTER = "/load_lora_adapter"
# Besides 5xx, what passes by itself: request timeout, conflict, too many requests.
PASSING = (408, 409, 429)
# Of what is asked, and not of who asks: a filter of contents or too long a prompt.
ABOUT_THE_PROMPT = (400, 413, 422)
# The shortest question.
YES = [{"role": "user", "content": "Yes?"}]
# The path of the completions is the end of that of chats.
FORMS: dict[str, type[BaseModel]] = {
    "/models": ModelList,
    "/chat/completions": ChatAnswer,
    "/completions": TextAnswer,
}
AGAIN = "It would refuse the same request again: change the settings, or the server."
# What OpenAI adds to a name that stands for the newest of several models.
DATE = r"(-\d{4,}(-\d\d)*)?"
Form = TypeVar("Form", bound=BaseModel)
Asked = TypeVar("Asked")
Got = TypeVar("Got")


class Client(openai.OpenAI):
    """Asks again by itself what may pass. Threads may share it."""

    def __init__(self, server: ServerAccess, setting: str = "engine.server") -> None:
        """Connects with the first request; messages name the setting."""
        self._server, self._setting = server, setting
        self._closed, self._logged = threading.Event(), -float(LOG_EVERY_SECONDS)
        # A redirect would take the prompts to another server.
        try:
            client = openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"response": [_examine]})
        except (ImportError, ValueError, OSError) as error:
            raise FinalError(
                f"No connection can be made as the environment asks. {_sentence(str(error))} Look at HTTP_PROXY, HTTPS_PROXY, "
                "ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR."
            ) from None
        bound(client)
        super().__init__(
            base_url=server.url,
            # Its servers want some key even where none is checked.
            api_key=api_key() or "none",
            timeout=openai.Timeout(server.timeout_seconds, connect=min(CONNECT_SECONDS, server.timeout_seconds)),
            max_retries=server.attempts - 1,
            http_client=client,
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
        if response is not None and response.status_code == TOO_MANY and "retry-after" not in response.headers:
            # Limits are mostly by the minute; the client's own pauses are over in a quarter of one.
            pause = min(LONGEST_PAUSE, pause * PAUSED_LONGER)
        if time.monotonic() - self._logged >= LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            error = sys.exception() if response is None else self._make_status_error_from_response(response)
            logger.info(
                f"The server at {self._server.url} did not complete a request, try {retries_taken + 1} of "
                f"{max_retries + 1}, the next in {pause:.0f} s. {_said(error)}"
            )
        if self._closed.wait(pause):
            raise concurrent.futures.CancelledError

    def served(self) -> dict[str, ServedModel]:
        """What the server serves, by name."""
        with self.errors_explained():
            seconds = min(LIST_SECONDS, self._server.timeout_seconds)
            response = self.get("/models", cast_to=httpx2.Response, options={"timeout": seconds})
        return {model.id: model for model in response.extensions["answer"].data}

    def ask(self, path: str, body: Mapping[str, Any], form: type[Form]) -> Form:
        """What is answered to a prompt.

        Raises:
            RefusedError: This one gets no answer.
        """
        try:
            answer = self._answer(path, body)
        except UnansweredError as failure:
            if not failure.may_be_the_prompt or not self._answers_a_word(path, body):
                raise
            # Once more: until a moment ago the server itself may not have been well.
            try:
                answer = self._answer(path, body)
            except UnansweredError as again:
                raise RefusedError(str(again), again.reason, may_pass=True) from None
        assert isinstance(answer, form)
        if isinstance(answer, TextAnswer) and answer.choice.finish_reason == "content_filter":
            reason = "It withholds the answer: content_filter."
            raise RefusedError(
                f"The server at {self._server.url} refuses a request. {reason} {AGAIN} Finished shards are kept.",
                reason,
            )
        return answer

    def _answer(self, path: str, body: Mapping[str, Any], options: openai.RequestOptions | None = None) -> Any:
        with self.errors_explained():
            return self.post(path, body=body, cast_to=httpx2.Response, options=options or {}).extensions["answer"]

    def _answers_a_word(self, path: str, body: Mapping[str, Any]) -> bool:
        """Whether the server answers the shortest prompt: then it is the longer one that it does not get by with."""
        word: dict[str, Any] = {"prompt": body["prompt"][:1]} if "prompt" in body else {"messages": YES}
        word |= {"max_tokens": 1} if "max_tokens" in body else {}
        try:
            seconds = min(LIST_SECONDS, self._server.timeout_seconds)
            self._answer(path, {**body, **word}, {"max_retries": 0, "timeout": seconds})
        except (UnansweredError, FinalError):
            return False
        return True

    def refuse_another(self, answered: str | None, asked: str, dated: bool = True) -> None:
        """Refuses the answer of another model than was asked, for whose it would be taken; some servers name none."""
        if answered == asked or (dated and (answered is None or re.fullmatch(re.escape(asked) + DATE, answered))):
            return
        raise FinalError(
            f"The server at {self._server.url} answers as {redacted(str(answered), 80)} where {asked} was asked, whose text it "
            "would be taken for: ask the server itself, and no gateway that chooses a model, or state the name that it answers by."
        )

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
            RefusedError: The server refuses this request, or does not answer it as OpenAI's API does.
            FinalError: It refuses the key or the model, or is no such server.
            UnansweredError: It stays down, overloaded or failing for all tries.
        """
        try:
            yield
        except openai.APIError as error:
            raise self._explained(error) from None

    def _explained(self, error: openai.APIError) -> Exception:
        where, status = f"The server at {self._server.url}", getattr(error, "status_code", None)
        if isinstance(error.__cause__, httpx2.DecodingError) or isinstance(error, openai.APIResponseValidationError):
            said = _sentence(str(error.body or error.__cause__))
            return RefusedError(
                f"{self._server.url} does not answer as OpenAI's completions API does: {said} Is {self._setting}.url the base URL "
                "of the server, with /v1 at its end? Finished shards are kept.",
                f"It answers: {said}",
            )
        if _may_pass(error):
            # Fewer than all where the server asks for a pause of more than two minutes.
            tries = 1 + int(error.request.headers["x-stainless-retry-count"])
            return UnansweredError(
                f"{where} did not complete a request in {'one try' if tries == 1 else f'{tries} tries'}. {_said(error)} "
                f"Finished shards are kept: run it again when the server is well. {self._setting}.attempts and "
                f"{self._setting}.timeout_seconds say how long to wait for it, and a lower {self._setting}.concurrency asks "
                "less of it at a time.",
                _said(error),
                # That it crashed, hung or broke off. What tells of load or of a gateway holds for every prompt.
                may_be_the_prompt=status in (None, 500),
            )
        if status in (401, 403):
            cure = "Put a key that it accepts into the environment variable OPENAI_API_KEY."
        elif status == 404:
            cure = (
                f"Is {self._setting}.url its base URL, with /v1 at its end? If it was started again in the meantime, adapters that "
                "were loaded are gone: run it again."
            )
        else:
            has_fields = hasattr(self._server, "extra_body")
            cure = f"{AGAIN} {self._setting}.extra_body states other fields of a request." if has_fields else AGAIN
        sentence = f"{where} refuses a request. {_said(error)} {cure} Finished shards are kept."
        return RefusedError(sentence, _said(error)) if status in ABOUT_THE_PROMPT else FinalError(sentence)


def api_key() -> str:
    """The key in OPENAI_API_KEY without white space around it; empty if there is none.

    Raises:
        FinalError: It holds what no key can hold; the message does not repeat it.
    """
    key = stated_key()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise FinalError(
            "The environment variable OPENAI_API_KEY holds a character that no key has, such as a line end or a blank inside: set "
            "it anew."
        )
    return key


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
    # Whatever else the server says: in some encodings there is no text.
    response.encoding = "utf-8"
    path = response.request.url.path
    if path.endswith(LOAD_ADAPTER):
        # Of an adapter that does not fit, vLLM says 500, and would say so again. The client obeys this header.
        if response.status_code == 500:
            response.headers["x-should-retry"] = "false"
        return
    if not response.is_success:
        return
    response.read()
    form = next(form for end, form in FORMS.items() if path.endswith(end))
    try:
        response.extensions["answer"] = form.model_validate(response.json())
        return
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, in {response.text}"
    # The last is for JSON that is nested too deeply.
    except (ValueError, RecursionError):
        text = response.text
    if form is ModelList:
        # Not asked again: it is the first thing that is asked, and most likely the URL is not the base URL.
        raise openai.APIResponseValidationError(response, text)
    # An answer that was cut off is no valid JSON, and an overloaded gateway may say so with status 200.
    raise httpx2.DecodingError(text, request=response.request)


def _may_pass(error: openai.APIError) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code in PASSING or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def _said(error: BaseException | None) -> str:
    """What the server said, or why nothing came, as a sentence."""
    if isinstance(error, openai.APIStatusError):
        stated = error.body.get("message") if isinstance(error.body, dict) else None
        said = stated or error.body or error
        return _sentence(f"It says: {error.status_code}, {said}")
    if isinstance(error, httpx2.DecodingError):
        return _sentence(f"It answers: {error}")
    return _sentence(f"No answer came: {error} {(error and error.__cause__) or ''}")


def _sentence(text: str) -> str:
    text = redacted(text)
    return text if text.endswith((".", "!", "?")) else text + "."
