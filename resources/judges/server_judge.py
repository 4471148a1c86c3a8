"""A model behind OpenAI's chat API as judge: it is shown both answers, in both orders.

Structured output asks for one of three replies. A server may ignore that, and a model may write nonsense: such a reply is
no verdict, and is counted as that.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.meta
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resources.engines.server_connection import Connection, TokenCounts, side_by_side
from resources.progress import Progress
from resources.scorer import BOTH_ORDERS, Comparison, ScoringUsage, readings
from resources.settings import JudgeServer, SettingsError
from resources.shards import Shards

SHIPPED_TEMPLATE = Path(__file__).parent / "comparison.jinja"
TEMPLATE_NAMES = {"prompt", "answer_a", "answer_b"}
CONVENTION = "share_of_both_orders"
# A verdict takes a dozen; a model that is not held to the schema may go on for ever.
LONGEST_REPLY = 256
SHOWN_CHARACTERS = 200
# What a verdict says of the answer that was shown first.
POINTS = {"A": 1.0, "tie": 0.5, "B": 0.0}
VERDICT_COLUMNS = {"key": pl.String, "points": pl.Float64, "reply": pl.String, "tokens": pl.Int64}


class Verdict(BaseModel):
    """The reply that is asked for."""

    model_config = ConfigDict(extra="forbid")

    better: Literal["A", "B", "tie"]


class ChatMessage(BaseModel):
    """What the model wrote; nothing if it refused."""

    content: str | None = None


class ChatChoice(BaseModel):
    """One reply."""

    message: ChatMessage


class ChatCompletion(BaseModel):
    """The server's answer to one request."""

    choices: list[ChatChoice] = Field(min_length=1)
    usage: TokenCounts | None = None


class ServerJudge:
    """Asks a server which of two answers is better, once in each order.

    The first answer gets 1 if it wins in both orders, 0 if it loses in both, and 0.5 if there is a tie or the orders
    disagree, because the model then went by the place. Where one of the two replies is no verdict, the row has none.

    Verdicts are kept as RewardScorer keeps scores: in shards under a fingerprint of model and template.
    """

    name = "server"

    def __init__(self, server: JudgeServer, shards: str, shard_rows: int) -> None:
        """Reads the template; connects only when a verdict is missing.

        Args:
            server: Address, model and template.
            shards: Where finished verdicts are kept.
            shard_rows: Verdicts per file.

        Raises:
            SettingsError: The template cannot be used.
        """
        self.label = f"{server.model} (on a server)"
        self._server, self._shard_rows = server, shard_rows
        self._template, text = load_template(server.template)
        fingerprint = {"judge": server.model, "template": hashlib.sha256(text.encode()).hexdigest()[:16]}
        self.shards = Shards(shards, fingerprint, f"verdicts by {server.model}", VERDICT_COLUMNS)

    def compare(self, rows: Sequence[tuple[str, str, str]], log: Callable[[str], None]) -> Comparison:
        """Asks about each row in both orders.

        Args:
            rows: A prompt and two answers each.
            log: Receives progress sentences, and what a reply without a verdict said.

        Raises:
            FinalError: The server refuses the key or a request, or does not have the model.
            RuntimeError: It stays down, overloaded or failing for all of `judge.server.attempts`.
        """
        started = time.monotonic()
        asked = pl.DataFrame(list(rows), schema=dict.fromkeys(("prompt", "first", "second"), pl.String), orient="row")
        needed = [readings(asked, sides) for sides in BOTH_ORDERS]
        distinct = pl.concat(needed).unique("key", keep="first", maintain_order=True)
        finished = self.shards.finished(distinct["key"])
        missing = distinct.filter(~pl.col("key").is_in(finished.implode()))
        if missing.height:
            self._finish(missing, log)
        given = self.shards.rows(distinct["key"])
        if nonsense := given.filter(pl.col("points").is_null())["reply"].to_list():
            log(
                f"{len(nonsense)} of {given.height} replies of {self.label} are no verdict and count for neither side, such as "
                f"{nonsense[0]!r}."
            )
        first, exchanged = (
            frame.select("key").join(given, on="key", how="left", maintain_order="left")["points"] for frame in needed
        )
        points = _over_both_orders(first, 1 - exchanged)
        usage = ScoringUsage(
            readings=distinct.height,
            reused=len(finished),
            tokens=int(given["tokens"].sum()),
            prompts_cut=0,
            answers_cut=0,
            seconds=time.monotonic() - started,
        )
        return Comparison(points, 1 - points, CONVENTION, usage)

    def _finish(self, missing: pl.DataFrame, log: Callable[[str], None]) -> None:
        """Asks for what is missing, and writes a shard as soon as it is full."""
        progress = Progress(missing.height, "verdicts", log)
        with contextlib.closing(Connection(self._server, log, "judge.server")) as connection:

            def ask(row: tuple[str, str, list[str]]) -> dict[str, Any]:
                key, prompt, (answer_a, answer_b) = row
                text = self._template.render(prompt=prompt, answer_a=answer_a, answer_b=answer_b)
                return {"key": key, **_reply(connection.post("/chat/completions", self._request(text), ChatCompletion))}

            for done in range(0, missing.height, self._shard_rows):
                rows: list[dict[str, Any]] = []
                asked = missing.slice(done, self._shard_rows).rows()
                for batch in side_by_side(ask, asked, self._server.concurrency):
                    rows += batch
                    progress.add(len(batch), sum(row["tokens"] for row in batch))
                self.shards.write(rows)

    def _request(self, text: str) -> dict[str, Any]:
        schema = {"name": "verdict", "strict": True, "schema": Verdict.model_json_schema()}
        return {
            "model": self._server.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": LONGEST_REPLY,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }


def load_template(path: str | None) -> tuple[jinja2.Template, str]:
    """The template of the request and its text; the shipped one for None.

    Raises:
        SettingsError: The file is missing or is no template, or does not show the prompt and both answers.
    """
    file = Path(path) if path else SHIPPED_TEMPLATE
    # The texts are for a model, not for a browser.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    try:
        text = file.read_text(encoding="utf-8")
        names = jinja2.meta.find_undeclared_variables(environment.parse(text))
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise SettingsError(f"The template {file} (judge.server.template) cannot be used: {error}") from None
    if names != TEMPLATE_NAMES:
        raise SettingsError(
            f"The template {file} (judge.server.template) uses {', '.join(sorted(names)) or 'no variables'}: it must show "
            f"{', '.join(sorted(TEMPLATE_NAMES))}, and has nothing else to show."
        )
    return environment.from_string(text), text


def _reply(answer: ChatCompletion) -> dict[str, Any]:
    """What a reply says, how it said it, and its tokens; no points where it is no verdict."""
    content = (answer.choices[0].message.content or "").strip()
    tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens if answer.usage else 0
    try:
        points = POINTS[Verdict.model_validate_json(content).better]
    except ValidationError:
        points = None
    return {"points": points, "reply": content[:SHOWN_CHARACTERS], "tokens": tokens}


def _over_both_orders(points: pl.Series, exchanged: pl.Series) -> pl.Series:
    """The first answer's points: those of both orders if they agree, a tie if they do not, none if one is missing."""
    orders = pl.DataFrame({"one": points, "other": exchanged})
    agreed = pl.when(pl.col("one") == pl.col("other")).then("one").otherwise(0.5)
    is_missing = pl.col("one").is_null() | pl.col("other").is_null()
    return orders.select(points=pl.when(~is_missing).then(agreed))["points"]
