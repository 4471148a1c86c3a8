"""Questions to a model behind OpenAI's chat API, each answered by JSON of one form, and the replies kept in shards.

Structured output asks for a reply of that form. A server may ignore that or refuse the question, and a model may write
nonsense: such a reply is none, is counted as that, and is not kept, so that the next run asks again.
"""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

import polars as pl
from pydantic import BaseModel, ValidationError

from resources.common.outside_text import redacted
from resources.common.progress import Progress
from resources.generation.failures import RefusedError, few_refused
from resources.generation.server_answers import ChatAnswer
from resources.scoring.scorer import ScoringUsage
from resources.settings.evaluation import JudgeServer
from resources.storage.shards import Shards, in_shards

if TYPE_CHECKING:
    from resources.generation.server_connection import Client

logger = logging.getLogger("synpo.judging")

# The forms take a few dozen; a model that is not held to its schema may go on for ever.
LONGEST_REPLY = 256
KEPT_CHARACTERS = 2000
SHOWN_CHARACTERS = 200
# What a server without structured output puts before the reply; a chat template may have opened the thoughts itself.
THOUGHT, THOUGHT_ENDS = "<think>", "</think>"
REPLY_COLUMNS = {"key": pl.String, "reply": pl.String, "tokens": pl.Int64}
Form = TypeVar("Form", bound=BaseModel)


@dataclasses.dataclass(frozen=True)
class _Reply:
    key: str
    reply: str
    tokens: int
    refusal: RefusedError | None = None


@dataclasses.dataclass(frozen=True)
class Replies(Generic[Form]):
    """The reply to each question by its key, None where it is not of the form; and what the call cost."""

    by_key: dict[str, Form | None]
    usage: ScoringUsage


class StructuredChat(Generic[Form]):
    """Asks a server, and keeps what it says as RewardScorer keeps scores: in shards under a fingerprint."""

    def __init__(
        self,
        server: JudgeServer,
        form: type[Form],
        what: str,
        fingerprint: Mapping[str, str],
        shards: str,
        shard_rows: int,
    ) -> None:
        """Connects only when a reply is missing.

        A reply is a `what`, such as a verdict. It depends on the model, the fields of the request, the fingerprint, and the key
        of its question.
        """
        self.label = f"{server.model} (on a server)"
        self._server, self._form, self._what, self._shard_rows = server, form, what, shard_rows
        asked = {"judge": server.model} | ({"extra_body": server.extra_body} if server.extra_body else {})
        self.shards = Shards(shards, {**asked, **fingerprint}, f"{what}s by {server.model}", REPLY_COLUMNS)

    def ask(self, questions: Mapping[str, str]) -> Replies[Form]:
        """Asks each question, a text by its key, that has no finished reply."""
        started = time.monotonic()
        keys = pl.Series("key", list(questions), dtype=pl.String)
        # Homes made by earlier versions hold nonsense too.
        given = keys.to_frame().hstack(self.shards.rows(keys, self._without_nonsense)).drop_nulls()
        reused = given.height
        if missing := keys.filter(~keys.is_in(given["key"].implode())).to_list():
            given.extend(self._finish({key: questions[key] for key in missing}, reused))
        replies = {key: self._read(reply) for key, reply in given.select("key", "reply").rows()}
        if nonsense := [row for row in given.select("key", "reply").rows() if replies[row[0]] is None]:
            few = len(nonsense) < given.height / 2
            logger.log(
                logging.INFO if few else logging.WARNING,
                f"{len(nonsense)} of {given.height} replies of {self.label} are no {self._what} and are left out, such as that "
                f"to {nonsense[0][0]}: {redacted(nonsense[0][1], SHOWN_CHARACTERS)!r}. The next run asks for them again.",
            )
        usage = ScoringUsage(
            readings=len(keys),
            reused=reused,
            tokens=int(given["tokens"].sum()),
            prompts_cut=0,
            answers_cut=0,
            seconds=time.monotonic() - started,
        )
        return Replies(replies, usage)

    def _finish(self, questions: Mapping[str, str], reused: int) -> pl.DataFrame:
        """Asks for what is missing, and writes replies of the form as soon as a shard is full; every reply."""
        from resources.generation.server_connection import Client, side_by_side

        given = pl.DataFrame(schema=REPLY_COLUMNS)
        progress = Progress(len(questions), f"{self._what}s", logger)
        with progress, Client(self._server, "judge.server") as client:

            def answered() -> Iterator[list[_Reply]]:
                ask = functools.partial(self._reply, client)
                for batch in side_by_side(ask, questions.items(), self._server.concurrency):
                    progress.add(len(batch), sum(reply.tokens for reply in batch))
                    yield batch

            for shard in in_shards(few_refused(answered(), reused), self._shard_rows):
                replies = pl.DataFrame([vars(reply) for reply in shard], schema=REPLY_COLUMNS)
                if kept := self._without_nonsense(replies).to_dicts():
                    self.shards.write(kept)
                given.extend(replies)
        return given

    def _reply(self, client: "Client", question: tuple[str, str]) -> _Reply:
        """What the model wrote, or why it did not, and the tokens of question and reply."""
        key, text = question
        body = {
            "model": self._server.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": LONGEST_REPLY,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": self._what, "strict": True, "schema": self._form.model_json_schema()},
            },
        } | self._server.extra_body
        # A model may refuse a field whatever it says.
        body = {name: value for name, value in body.items() if value is not None}
        try:
            answer = client.ask("/chat/completions", body, ChatAnswer)
        except RefusedError as refusal:
            return _Reply(key, refusal.reason, 0, refusal)
        client.refuse_another(answer.model, self._server.model)
        content = (answer.choice.message.content or "").strip()
        content = content.rpartition(THOUGHT_ENDS)[2].strip() or content
        # Cut before anything is looked for in it: meanwhile nothing else of this process is at work.
        content = _bare(content[:KEPT_CHARACTERS])
        tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens if answer.usage else 0
        return _Reply(key, content, tokens)

    def _without_nonsense(self, replies: pl.DataFrame) -> pl.DataFrame:
        return replies.filter(
            pl.Series([self._read(reply) is not None for reply in replies["reply"]], dtype=pl.Boolean)
        )

    def _read(self, reply: str) -> Form | None:
        try:
            return self._form.model_validate_json(reply)
        except ValidationError:
            return None


def _bare(content: str) -> str:
    """The JSON object that a reply ends with, without the words or the fence around it; all of it where there is none."""
    said, decoder = content.rstrip("`\n "), json.JSONDecoder()
    # A thought that has no end holds no verdict.
    place = -1 if content.startswith(THOUGHT) else said.find("{")
    while place >= 0:
        try:
            _, end = decoder.raw_decode(said, place)
        except (ValueError, RecursionError):
            end = place + 1
        if end == len(said):
            return said[place:]
        place = said.find("{", end)
    return content
