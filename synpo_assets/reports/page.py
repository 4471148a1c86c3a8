"""The page of the boosting report, without scripts, links or outside resources: the newest iteration first."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from resources.common.text import visible
from synpo_assets.graph.drawing import Plot
from synpo_assets.graph.metrics import Metrics
from synpo_assets.graph.texts import count_text, rate_text, share_text
from synpo_assets.method.judging import KINDS
from synpo_assets.method.pairs import middle_pair
from synpo_assets.reports.answers import Answers
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.rows import Row, judge_labels
from synpo_assets.reports.search import HEAD, candidate_rows, metric_name, recorded_search
from synpo_assets.reports.verdict import cards, verdict
from synpo_assets.stages.scorers import NULLS

FOLDER = Path(__file__).parent
SHOWN_CHARACTERS = 4000


@dataclasses.dataclass(frozen=True)
class Page:
    """What the report shows.

    Attributes:
        notes: Sentences about what is missing.
        judging: How often judge and scorer are right about held-out pairs, by kind.
        identity: Which experiment it is, by name.
        settings: The settings that matter most, by dotted name.
        answers: The same held-out prompts, answered by all models.
    """

    iterations: Sequence[FinishedIteration]
    rows: Sequence[Row]
    plots: Mapping[str, Plot]
    notes: Sequence[str]
    judging: Sequence[Sequence[str]]
    identity: Mapping[str, str]
    settings: Mapping[str, str]
    answers: Sequence[Answers]

    def html(self) -> str:
        """The report as one page without scripts, links or outside resources; every text in it is escaped."""
        newest = self.iterations[-1]
        sections: dict[str, list[tuple[str, Sequence[str]]]] = {}
        for row in self.rows:
            sections.setdefault(row.section, []).append((row.label, row.cells))
        return (
            _environment()
            .get_template("boosting_report.html.jinja")
            .render(
                page=self,
                verdict=verdict(newest),
                cards=cards(newest),
                models=[f"M_{iteration.number}" for iteration in reversed(self.iterations)],
                sections=sections,
                funnel=funnel_rows(self.iterations),
                judges=judge_labels(self.iterations),
                searches={
                    each.number: search
                    for each in reversed(self.iterations)
                    if (search := recorded_search(each.manifest))
                },
                search_head=HEAD,
                samples={iteration.number: sample_pairs(iteration.pairs) for iteration in reversed(self.iterations)},
            )
        )


def funnel_rows(iterations: Sequence[FinishedIteration]) -> list[tuple[str, list[str]]]:
    """What each stage left in each iteration, and what share of the stage before that is."""
    names = list(iterations[0].funnel)
    rows = []
    for before, name in zip([None, *names], names, strict=False):
        counts = [(each.funnel[name], each.funnel[before] if before else None) for each in iterations]
        shares = [f" ({share_text(left / of)})" if left is not None and of else "" for left, of in counts]
        cells = [f"{count_text(left)}{share}" for (left, _), share in zip(counts, shares, strict=True)]
        rows.append((name, cells))
    return rows


def sample_pairs(pairs: pl.DataFrame) -> list[dict[str, Any]]:
    """The pairs with the largest, the median and the smallest margin, fewer if there are fewer pairs.

    Returns:
        Rows with place, pair_id, margin, for chosen and rejected the text and its score, and the prompt's text and rules.
    """
    ordered = pairs.sort("margin", "pair_id")
    of_place = {
        "largest margin": ordered.row(-1, named=True),
        "median margin": middle_pair(pairs),
        "smallest margin": ordered.row(0, named=True),
    }
    samples: dict[str, dict[str, Any]] = {}
    for place, row in of_place.items():
        texts = {side: row[side][-1]["content"] for side in ("prompt", "chosen", "rejected")}
        figures = {name: row[name] for name in ("pair_id", "margin", "chosen_score", "rejected_score", "rules")}
        samples.setdefault(row["pair_id"], {"place": place, **figures, **texts})
    return list(samples.values())


def judging_rows(once: Metrics) -> list[tuple[str, ...]]:
    """By kind of held-out pairs: their number, how often judge and scorer are right, and who cannot read."""
    rows = []
    for kind, label in KINDS.items():
        judge, scorer = (once.find("held_out_accuracy", kind, asset=asset) for asset in ("judge_model", "reward_model"))
        if judge is not None:
            nulls = (once.find("held_out_accuracy", kind, by=by, asset="judge_model") for by in NULLS.values())
            shares = map(rate_text, (judge, scorer, *nulls))
            rows.append((label, count_text(judge.n), *shares))
    return rows


def shortened(text: str) -> str:
    """A text of at most `SHOWN_CHARACTERS` characters that says how many were left out."""
    left_out = len(text) - SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:SHOWN_CHARACTERS]}… ({left_out:,} more characters)"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shortened": shortened, "visible": visible}
    environment.filters |= {"candidate_rows": candidate_rows, "metric_name": metric_name}
    return environment
