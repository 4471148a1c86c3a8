"""A model behind OpenAI's chat API as judge: it is shown both answers, in both orders."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jinja2
import jinja2.meta
import polars as pl
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict

from resources.common.errors import FinalError
from resources.common.text import visible
from resources.judging.structured_chat import StructuredChat
from resources.models.bounded import OutOfBoundsError, within_bounds, within_time
from resources.scoring.scorer import Comparison, readings
from resources.scoring.scoring_model import BOTH_ORDERS
from resources.settings.evaluation import JudgeServer
from resources.settings.sections import SettingsError

SHIPPED_TEMPLATE = Path(__file__).parent / "comparison.jinja"
# No filter that only lays out a text, such as `upper` or `trim`, changes these.
SAMPLE = {"prompt": "10-46-52", "answer_a": "81-28-73", "answer_b": "65-90-37"}
# A template may do other things on long texts.
LONG_SAMPLE = {name: sample * 2000 for name, sample in SAMPLE.items()}
LONGEST_REQUEST = 2_000_000
CONVENTION = "share_of_both_orders"
# What a verdict says of the answer that was shown first.
POINTS = {"A": 1.0, "tie": 0.5, "B": 0.0}


class Verdict(BaseModel):
    """The reply that is asked for."""

    model_config = ConfigDict(extra="forbid")

    better: Literal["A", "B", "tie"]


class ServerJudge:
    """Asks a server which of two answers is better, once in each order.

    The first answer gets 1 if it wins in both orders, 0 if it loses in both, and 0.5 if there is a tie or the orders
    disagree, because the model then went by the place. Where one of the two replies is no verdict, the row has none, and
    counts for neither side.

    Verdicts are kept in shards under a fingerprint of model and template.
    """

    name = "server"

    def __init__(self, server: JudgeServer, shards: str, shard_rows: int) -> None:
        """Reads the template; connects only when a verdict is missing."""
        self._template, text = load_template(server.template)
        self._file = server.template or SHIPPED_TEMPLATE
        fingerprint = {"template": hashlib.sha256(text.encode()).hexdigest()[:16]}
        self._chat = StructuredChat(server, Verdict, "verdict", fingerprint, shards, shard_rows)
        self.label, self.shards = self._chat.label, self._chat.shards

    def compare(self, rows: Sequence[tuple[str, str, str]]) -> Comparison:
        """Asks about each row in both orders."""
        asked = pl.DataFrame(list(rows), schema=dict.fromkeys(("prompt", "first", "second"), pl.String), orient="row")
        needed = [readings(asked, sides) for sides in BOTH_ORDERS]
        questions = {
            key: self._question(prompt, answer_a, answer_b)
            for key, prompt, (answer_a, answer_b) in pl.concat(needed).iter_rows()
        }
        replies = self._chat.ask(questions)
        points = {key: None if verdict is None else POINTS[verdict.better] for key, verdict in replies.by_key.items()}
        first, exchanged = (pl.Series([points[key] for key in frame["key"]], dtype=pl.Float64) for frame in needed)
        agreed = _over_both_orders(first, 1 - exchanged)
        return Comparison(agreed, 1 - agreed, CONVENTION, replies.usage)

    def _question(self, prompt: str, answer_a: str, answer_b: str) -> str:
        try:
            with within_time():
                return self._template.render(prompt=prompt, answer_a=answer_a, answer_b=answer_b)
        # A template may compute anything.
        except Exception as error:
            raise FinalError(
                f"The template {self._file} (judge.server.template) fails on the prompt {prompt[:60]!r}: {_reason(error)}. "
                "Correct the file."
            ) from None


def load_template(path: str | None) -> tuple[jinja2.Template, str]:
    """The template of the request and its text; the shipped one for None."""
    file = Path(path) if path else SHIPPED_TEMPLATE
    cannot_be_used = f"The template {file} (judge.server.template) cannot be used"
    # What is no file, such as a pipe, may never end.
    if not file.is_file():
        raise SettingsError(f"{cannot_be_used}: it is no file. Name a jinja file, or remove the setting.")
    try:
        within_bounds(lambda: max(map(len, _tried(_read(file)[0]))) <= LONGEST_REQUEST)
        template, text, names = _read(file)
    except Exception as error:
        raise SettingsError(f"{cannot_be_used}: {_reason(error)}. Correct the file.") from None
    if names != set(SAMPLE):
        raise SettingsError(
            f"The template {file} (judge.server.template) uses {', '.join(sorted(names)) or 'no variables'}: it must show "
            f"{', '.join(sorted(SAMPLE))}, and has nothing else to show."
        )
    try:
        shown, _ = _tried(template)
    # A template may compute anything.
    except Exception as error:
        raise SettingsError(f"{cannot_be_used}: {_reason(error)}. Correct the file.") from None
    if hidden := [name for name, sample in SAMPLE.items() if sample not in shown]:
        raise SettingsError(f"{cannot_be_used}: it names {', '.join(hidden)} but does not show the text as it is.")
    return template, text


def _read(file: Path) -> tuple[jinja2.Template, str, set[str]]:
    """A template, its text and the variables that it uses."""
    # The texts are for a model, not for a browser.
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
    text = file.read_text(encoding="utf-8")
    return environment.from_string(text), text, jinja2.meta.find_undeclared_variables(environment.parse(text))


def _tried(template: jinja2.Template) -> tuple[str, str]:
    """The requests on short and on long texts."""
    return template.render(SAMPLE), template.render(LONG_SAMPLE)


def _reason(error: Exception) -> str:
    """What an error says, on one line."""
    if isinstance(error, OutOfBoundsError):
        return f"it {error}"
    is_plain = isinstance(error, OSError | UnicodeDecodeError | jinja2.TemplateSyntaxError)
    return visible(" ".join((str(error) if is_plain else f"{type(error).__name__}: {error}").split()))


def _over_both_orders(points: pl.Series, exchanged: pl.Series) -> pl.Series:
    """The first answer's points: those of both orders if they agree, a tie if they do not, none if one is missing."""
    orders = pl.DataFrame({"one": points, "other": exchanged})
    agreed = pl.when(pl.col("one") == pl.col("other")).then("one").otherwise(0.5)
    is_missing = pl.col("one").is_null() | pl.col("other").is_null()
    return orders.select(points=pl.when(~is_missing).then(agreed))["points"]
