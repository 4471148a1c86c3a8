"""Is it boosting? The headline figures of each iteration in a short table, which the UI shows without a click."""

from collections.abc import Sequence

import dagster as dg

from resources.judging.judge_choice import INDEPENDENT
from synpo_assets.graph.metrics import Metric, MetricName, Metrics, recorded
from synpo_assets.graph.services import Services
from synpo_assets.graph.texts import MISSING, gain_text, rate_text

# The UI shows markdown of less than 1,000 characters in place.
SHOWN_ITERATIONS = 6
# In place of a win rate; a sentence says it in full.
AT_CHANCE = "judge at chance"
# What follows instructions and shows no skill (method/verifiable.py).
NULL_LABELS = {
    "prompt_as_answer": "their own prompts, given as answers",
    "first_sentence": "the first sentences of M_0's answers",
    "as_brief": "M_0's answers, cut to as many words as M_t's",
    "another_answer": "M_t's answers to other instructions",
}
# What form alone wins over M_0: its own answers.
FORMS = {"trimmed": "cut to half of their sentences", "verbose": "given when it is asked for long ones"}
PROMOTED = {True: "yes", False: "no", None: MISSING}


def boosting_table(
    context: dg.AssetExecutionContext, services: Services, measured: Sequence[Metric], doubt: str | None
) -> dg.MarkdownMetadataValue:
    """The newest iterations with what the test split says of each M_t, what the running asset has just measured included.

    Args:
        doubt: Why the win rates say nothing, as a sentence; None if they do.
    """
    asset, running = context.asset_key.to_user_string(), context.partition_key
    keys = sorted({*services.metrics.partitions(), running})
    found = {key: recorded(services.metrics, key) for key in keys}
    found[running] = found[running].with_metrics_of(asset, running, measured)
    lines = [
        "| iteration | win rate over M_0 | length-controlled | instructions | over null | promoted |",
        "|---|---|---|---|---|---|",
    ]
    evaluated = [key for key in keys if found[key].candidate]
    lines += [_line(key, found[key], doubt) for key in evaluated[-SHOWN_ITERATIONS:]]
    note = (
        doubt
        or "Test split, independent judge, 95 % intervals; instructions: M_t less M_0; over null: M_t less one that it does not "
        "beat, or the strongest."
    )
    return dg.MetadataValue.md("\n".join([*lines, "", note]))


def win_rate(measured: Metrics, controlled: bool = False) -> Metric | None:
    """How often the independent judge prefers M_t's answers to M_0's, as it is or for answers of equal length."""
    name: MetricName = "length_controlled_win_rate" if controlled else "win_rate"
    return measured.find(name, "candidate", over="initial", by=INDEPENDENT)


def instructions_gain(measured: Metrics) -> Metric | None:
    """How many more of the verifiable instructions M_t follows than M_0; None where another M_t was measured."""
    return measured.of_its_candidate.find("verifiable_gain", "candidate", over="initial")


def gains_over_nulls(measured: Metrics) -> list[Metric]:
    """How many more of them M_t follows than each null, one that it is not shown to beat first, then the strongest.

    None where another M_t was measured.
    """
    gains = [
        each
        for each in measured.of_its_candidate.every("verifiable_gain")
        if each.over in NULL_LABELS and each.value is not None
    ]
    return sorted(gains, key=lambda gain: (gain.low is not None and gain.low > 0, gain.value))


def _line(key: str, measured: Metrics, doubt: str | None) -> str:
    rates = [AT_CHANCE if doubt else rate_text(win_rate(measured, controlled)) for controlled in (False, True)]
    gains = map(gain_text, (instructions_gain(measured), next(iter(gains_over_nulls(measured)), None)))
    return f"| {' | '.join([key, *rates, *gains, PROMOTED[measured.promoted]])} |"
