"""The first screen of the boosting report: what the newest iteration shows, in a sentence or two and four cards.

They claim no more than intervals show. A judge prefers M_t if a 95 % interval lies above one half, for answers as they are and
for answers of equal length, and above what M_0's own answers win in another form; and if the judge is right about gold more
often than length alone. That M_t is better takes a figure without a judge besides: more instructions followed than by M_0 and by
every null. That it is worse takes an interval below one half, also at equal length, such a judge, and fewer instructions followed
than by M_0.
"""

import dataclasses

from resources.judging.judge_choice import INDEPENDENT
from synpo_assets.graph.boosting import (
    AT_CHANCE,
    FORMS,
    NULL_LABELS,
    PROMOTED,
    gains_over_nulls,
    instructions_gain,
    win_rate,
)
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


def verdict(newest: FinishedIteration) -> tuple[str, str]:
    """Whether the newest M_t is better than M_0, as far as the test split shows it, and what a program says without a judge."""
    return _by_judge(newest), _without_judge(newest)


def _by_judge(newest: FinishedIteration) -> str:
    t, rate, controlled = f"M_{newest.number}", win_rate(newest.metrics), win_rate(newest.metrics, controlled=True)
    if newest.judge_doubt is not None:
        return f"Whether {t} is better than M_0 is not known. {newest.judge_doubt}"
    if rate is None or rate.low is None or rate.high is None:
        return f"Whether {t} is better than M_0 is not known: no independent judge's win rate with an interval was recorded."
    found = f"the independent judge prefers its answers in {rate_text(rate)} of {rate.n} test prompts"
    if rate.low <= HALF <= rate.high:
        return f"{t} is not shown to be better than M_0: {found}, and the interval includes one half."
    wins_less = rate.high < HALF
    by_length = f"{t} wins {'less' if wins_less else 'more'} often than M_0, and length may be all of it: {found}"
    if controlled is None or controlled.low is None or controlled.high is None:
        return f"{by_length}, and too few of them are of like length."
    equal = f"at equal length in {rate_text(controlled)}"
    if controlled.high >= HALF if wins_less else controlled.low <= HALF:
        return f"{by_length}, {equal}, which does not lie {'below' if wins_less else 'above'} one half."
    if newest.no_better_than_length is not None:
        return f"{by_length}, {equal}. {newest.no_better_than_length}"
    if wins_less:
        return (
            f"{t} is worse than M_0: {found}, {equal}."
            if _follows_less(newest)
            else f"A judge prefers M_0 to {t}, and nothing else shows that it is worse: {found}, {equal}."
        )
    if (null := _null_not_beaten(newest)) is not None:
        return f"{t} wins more often than M_0, and form may be all of it: {found}, {equal}, and {null}."
    preferred = f"{found}, {equal}, and more often than M_0's own answers {_beaten(newest)}"
    return (
        f"{t} is better than M_0: {preferred}."
        if _follows_more(newest)
        else f"A judge prefers {t} to M_0, and nothing else shows that it is better: {preferred}."
    )


def _without_judge(newest: FinishedIteration) -> str:
    gain, over_nulls = instructions_gain(newest.metrics), gains_over_nulls(newest.metrics)
    if gain is None or gain.value is None:
        return "No figure without a judge was recorded."
    null = "".join(f", and with {NULL_LABELS[str(each.over)]}, {gain_text(each)}" for each in over_nulls[:1])
    followed = f"Without a judge, instructions followed compared with M_0: {gain_text(gain)}"
    if _follows_less(newest):
        return f"{followed}: fewer."
    is_certain = over_nulls and all(each.low is not None for each in (gain, *over_nulls))
    return f"{followed}{null}{': no gain is shown' if is_certain and not _follows_more(newest) else ''}."


def _follows_more(newest: FinishedIteration) -> bool:
    """Whether M_t follows more instructions than M_0 and than every null."""
    gains = [instructions_gain(newest.metrics), *gains_over_nulls(newest.metrics)]
    return len(gains) > 1 and all(gain is not None and gain.low is not None and gain.low > 0 for gain in gains)


def _follows_less(newest: FinishedIteration) -> bool:
    """Whether M_t follows fewer instructions than M_0."""
    gain = instructions_gain(newest.metrics)
    return gain is not None and gain.high is not None and gain.high < 0


def _null_not_beaten(newest: FinishedIteration) -> str | None:
    """The first form of M_0's answers than which M_t is not shown to win more often over M_0; None if there is none."""
    for null, gain in _gains_over_forms(newest).items():
        # Of answers of one sentence there is nothing to leave out, and nothing to compare with.
        if null == "trimmed" and gain is not None and not gain.n:
            continue
        if gain is None or gain.value is None:
            return f"it was not compared with M_0's own answers, {FORMS[null]}"
        more = f"{gain_text(gain)} more, over {gain.n} prompts"
        if gain.low is None:
            return f"M_t has over M_0's own answers, {FORMS[null]}, {more}"
        if gain.low <= 0:
            return f"M_0's own answers, {FORMS[null]}, win so often that M_t has {more}"
    return None


def _beaten(newest: FinishedIteration) -> str:
    """The forms of M_0's answers that M_t was compared with."""
    return " and ".join(FORMS[null] for null, gain in _gains_over_forms(newest).items() if gain and gain.n)


def _gains_over_forms(newest: FinishedIteration) -> dict[str, Metric | None]:
    find = newest.metrics.find
    return {null: find("win_rate_gain", "candidate", over=null, by=INDEPENDENT) for null in FORMS}


def cards(newest: FinishedIteration) -> list[Card]:
    """The win rate over M_0 as it is and at equal length, instructions followed, and whether M_t was promoted."""
    gain, over_nulls = instructions_gain(newest.metrics), gains_over_nulls(newest.metrics)
    null = "".join(f"; less {NULL_LABELS[str(each.over)]} {gain_text(each)}" for each in over_nulls[:1])
    return [
        _card("Win rate over M_0", win_rate(newest.metrics), newest),
        _card("The same at equal length", win_rate(newest.metrics, controlled=True), newest),
        Card("Instructions followed", *_parts(gain_text(gain), f"M_t less M_0, checked by a program{null}")),
        Card("Promoted", PROMOTED[newest.metrics.promoted], "by the gate, on the dev split"),
    ]


def _card(label: str, rate: Metric | None, newest: FinishedIteration) -> Card:
    if newest.judge_doubt is not None:
        return Card(label, MISSING, AT_CHANCE)
    is_certain = rate is not None and rate.low is not None
    return Card(label, *_parts(rate_text(rate), "95 % interval" if is_certain else "no interval"))


def _parts(text: str, what: str) -> tuple[str, str]:
    """The value of a text such as `62.5% (46.9 to 78.1)`, and its interval with what it is."""
    value, _, interval = text.rstrip(")").partition(" (")
    return value, f"{interval}, {what}" if interval else what
