"""The rows of the boosting report that ask no judge: instructions followed, and how near M_t's answers are to gold."""

from collections.abc import Callable, Iterator

from synpo_assets.graph.boosting import NULL_LABELS
from synpo_assets.graph.metrics import Metric, MetricName
from synpo_assets.graph.texts import MISSING, count_text, difference_text, gain_text, number_text, share_text
from synpo_assets.method.evaluation import LENGTH_BANDS
from synpo_assets.reports.finished import Cell, FinishedIteration, metric_cell, value_cell

SECTION = "Without a judge"
MODELS = {"candidate": "M_t", "initial": "M_0"}
GAINED = "M_t less M_0"


def likelihood_gains(of_gold: str, gained: str) -> dict[str, MetricName]:
    """What M_t finds likelier than another model does, by label: gold, its null that says how much is style, and what is left."""
    return {
        f"{of_gold}, {gained}": "gold_log_likelihood_gain",
        f"null: log-likelihood of gold of another prompt per token, {gained}": "other_gold_log_likelihood_gain",
        f"log-likelihood of gold, {gained}, less that null": "gold_log_likelihood_gain_beyond_other",
    }


# Of each measure of gold: what it is, its value of both models, and what of it M_t has more.
OF_GOLD: tuple[tuple[str, MetricName, dict[str, MetricName]], ...] = (
    (
        "log-likelihood of gold's text per token",
        "gold_log_likelihood",
        likelihood_gains("log-likelihood of gold's text per token", GAINED),
    ),
    (
        "log-likelihood of gold's end of turn",
        "gold_end_log_likelihood",
        {f"log-likelihood of gold's end of turn, {GAINED}": "gold_end_log_likelihood_gain"},
    ),
    (
        "similarity of the answers to gold",
        "gold_similarity",
        {f"similarity of the answers to gold, {GAINED}": "gold_similarity_gain"},
    ),
)


def without_a_judge() -> Iterator[tuple[str, str, Cell]]:
    """Section, label and cell of each row."""
    yield SECTION, "verifiable instructions", value_cell("instructions", count_text)
    for side, model in MODELS.items():
        yield SECTION, f"instructions followed by {model}", value_cell("verifiable_rate", share_text, side)
    for null, what in NULL_LABELS.items():
        yield SECTION, f"null: instructions followed by {what}", value_cell("verifiable_rate", share_text, null)
    label = "instructions followed, M_t less M_0, 95 % interval"
    yield SECTION, label, metric_cell("verifiable_gain", gain_text, "candidate", over="initial")
    for null, what in NULL_LABELS.items():
        label = f"instructions followed, M_t less {what}, 95 % interval"
        yield SECTION, label, metric_cell("verifiable_gain", gain_text, "candidate", over=null)
    for side, model in MODELS.items():
        yield SECTION, f"constraints met by {model}", value_cell("constraint_rate", share_text, side)
    for what, metric, gains in OF_GOLD:
        for side, model in MODELS.items():
            yield SECTION, f"{what}, {model}", value_cell(metric, number_text, side)
        for label, gain in gains.items():
            yield SECTION, f"{label}, 95 % interval", metric_cell(gain, difference_text, "candidate", over="initial")
    for band in LENGTH_BANDS:
        yield from _likeness_in(band)


def _likeness_in(band: str) -> Iterator[tuple[str, str, Cell]]:
    def cell(form: Callable[[Metric], str], metric: MetricName, of: str, over: str | None = None) -> Cell:
        def of_band(iteration: FinishedIteration) -> str:
            found = iteration.metrics.find(metric, of, over=over, by=band)
            return MISSING if found is None else f"{form(found)}, n = {count_text(found.n)}"

        return of_band

    what = f"similarity to gold, answers of {band}"
    for side, model in MODELS.items():
        yield SECTION, f"{what}, {model}", cell(lambda each: number_text(each.value), "gold_similarity", side)
    label = f"{what} by both, M_t less M_0, 95 % interval"
    yield SECTION, label, cell(difference_text, "gold_similarity_gain", "candidate", "initial")
