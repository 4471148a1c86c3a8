"""The rows of the boosting report about the improver as an editor: what it was trained on, and what became of damaged answers."""

from collections.abc import Iterator

from synpo_assets.graph.evaluation_schemas import EDIT_SHARES
from synpo_assets.graph.metrics import MetricName
from synpo_assets.graph.texts import MISSING, count_text, gain_text, rate_text
from synpo_assets.method.damage import DAMAGES
from synpo_assets.reports.finished import Cell, FinishedIteration, metric_cell, value_cell

SECTION = "The improver as an editor"
ORIGINS = {"own_answers": "the policy's own answers", "damaged_gold": "damaged gold"}
EDITED = {
    "right": "made right (gold)", "nearer": "brought nearer to gold", "left": "left as they are",
    "worse": "made worse, or changed without getting nearer",
}  # fmt: skip


def edit_lines() -> Iterator[tuple[str, str, Cell]]:
    """Section, label and cell of each row."""
    for origin, what in ORIGINS.items():
        yield SECTION, f"examples of R_t: {what}", value_cell("examples", count_text, origin)
    for outcome, what in EDITED.items():
        share, gain = EDIT_SHARES[outcome]
        for damage in (None, *DAMAGES):
            label = f"damaged held-out answers {what}" if damage is None else f"{damage.replace('_', ' ')}: {what}"
            yield SECTION, f"{label}, by R_t and by M_0, 95 % intervals", _both(share, damage)
            if damage is None:
                yield (
                    SECTION,
                    f"{label}, R_t less M_0, 95 % interval",
                    metric_cell(gain, gain_text, "improver", over="initial"),
                )


def _both(share: MetricName, damage: str | None) -> Cell:
    def cell(iteration: FinishedIteration) -> str:
        ours, theirs = (iteration.metrics.find(share, model, by=damage) for model in ("improver", "initial"))
        if ours is None:
            return MISSING
        return f"{rate_text(ours)}, {rate_text(theirs)}, {count_text(ours.n)} prompts"

    return cell
