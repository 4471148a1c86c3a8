"""The first screen of the boosting report: what the newest iteration shows, in a sentence and four cards.

A sentence claims no more than an interval shows: that M_t is better takes a 95 % interval that lies above one half, for
answers as they are and for answers of equal length, by a judge that does not also prefer M_0's answers cut to half.
"""

import dataclasses

from resources.judging.judge_choice import INDEPENDENT
from synpo_assets.graph.boosting import AT_CHANCE, PROMOTED, instructions_gain, win_rate
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.texts import MISSING, gain_text, rate_text
from synpo_assets.reports.finished import FinishedIteration

HALF = 0.5


@dataclasses.dataclass(frozen=True)
class Card:
    """A headline figure."""

    label: str
    value: str
    detail: str


def verdict(newest: FinishedIteration) -> str:
    """Whether the newest M_t is better than M_0, as far as the independent judge's win rates on the test split show it."""
    t, rate, controlled = f"M_{newest.number}", win_rate(newest.metrics), win_rate(newest.metrics, controlled=True)
    if newest.judge_doubt is not None:
        return f"Whether {t} is better than M_0 is not known. {newest.judge_doubt}"
    if rate is None or rate.low is None or rate.high is None:
        return f"Whether {t} is better than M_0 is not known: no independent judge's win rate with an interval was recorded."
    found = f"the independent judge prefers its answers in {rate_text(rate)} of {rate.n} test prompts"
    if rate.high < HALF:
        return f"{t} is worse than M_0: {found}, and the interval lies below one half."
    if rate.low <= HALF:
        return f"{t} is not shown to be better than M_0: {found}, and the interval includes one half."
    if controlled is None or controlled.low is None or newest.extrapolated:
        return f"{t} wins more often than M_0, and length may be all of it: {found}, and too few of them are of like length."
    equal = f"at equal length in {rate_text(controlled)}"
    if (null := _trimmed_wins(newest)) is not None:
        return f"{t} wins more often than M_0, and form may be all of it: {found}, {equal}, and {null}."
    if controlled.low > HALF:
        return f"{t} is better than M_0: {found}, {equal}, and both intervals lie above one half."
    return (
        f"{t} wins more often than M_0, and length may be all of it: {found}, {equal}, which does not exclude one half."
    )


def _trimmed_wins(newest: FinishedIteration) -> str | None:
    """What the judge says of M_0's own answers cut to half, if it prefers these, which nobody would call better."""
    rate = newest.metrics.find("win_rate", "trimmed", over="initial", by=INDEPENDENT)
    if rate is None or rate.low is None or rate.low <= HALF:
        return None
    return f"M_0's own answers, cut to half of their sentences, win in {rate_text(rate)} of {rate.n}"


def cards(newest: FinishedIteration) -> list[Card]:
    """The win rate over M_0 as it is and at equal length, instructions followed, and whether M_t was promoted."""
    gain = instructions_gain(newest.metrics)
    extrapolated = ", extrapolated" if newest.extrapolated else ""
    return [
        _card("Win rate over M_0", win_rate(newest.metrics), newest),
        _card("The same at equal length", win_rate(newest.metrics, controlled=True), newest, extrapolated),
        Card("Instructions followed", *_parts(gain_text(gain), "M_t less M_0, checked by a program")),
        Card("Promoted", PROMOTED[newest.metrics.promoted], "by the gate, on the dev split"),
    ]


def _card(label: str, rate: Metric | None, newest: FinishedIteration, remark: str = "") -> Card:
    if newest.judge_doubt is not None:
        return Card(label, MISSING, AT_CHANCE)
    return Card(label, *_parts(rate_text(rate), f"95 % interval{remark}"))


def _parts(text: str, what: str) -> tuple[str, str]:
    """The value of a text such as `62.5% (46.9 to 78.1)`, and its interval with what it is."""
    value, _, interval = text.rstrip(")").partition(" (")
    return value, f"{interval}, {what}" if interval else what
