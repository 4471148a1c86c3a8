"""The same held-out prompts, answered by M_0 and by every M_t."""

import dataclasses
from collections.abc import Sequence

import polars as pl

from synpo_assets.method.outcomes import NO_VERDICT
from synpo_assets.reports.finished import FinishedIteration

SHOWN_PROMPTS = 4
VERDICTS = {
    "win": "preferred to M_0's", "tie": "as good as M_0's", "loss": "M_0's is preferred", NO_VERDICT: "no verdict",
}  # fmt: skip
READ = ("iteration", "prompt_id", "prompt", "answer", "initial_response", "candidate_response", "judge_over_initial")


@dataclasses.dataclass(frozen=True)
class Answers:
    """A held-out prompt with all answers to it.

    Attributes:
        models: Of each M_t, the newest first: its name, its answer, and what the independent judge says of it; None if that
            judge is in doubt.
    """

    prompt: str
    gold: str
    initial: str
    models: list[tuple[str, str, str | None]]


def same_prompts(evaluated: pl.LazyFrame | None, iterations: Sequence[FinishedIteration]) -> list[Answers]:
    """A few prompts of the test split: the first by id, which is a hash of their text, so that nobody chose them."""
    if evaluated is None:
        return []
    rows = evaluated.filter(split="test", sample=1).select(READ).collect()
    newest = rows.filter(iteration=iterations[-1].number).sort("prompt_id").head(SHOWN_PROMPTS)
    return [_answers(row, rows.filter(prompt_id=row["prompt_id"]), iterations) for row in newest.iter_rows(named=True)]


def _answers(row: dict[str, str], same: pl.DataFrame, iterations: Sequence[FinishedIteration]) -> Answers:
    models = []
    for iteration in reversed(iterations):
        for answer in same.filter(iteration=iteration.number).iter_rows(named=True):
            verdict = None if iteration.judge_doubt else VERDICTS[answer["judge_over_initial"]]
            models.append((f"M_{iteration.number}", answer["candidate_response"], verdict))
    return Answers(row["prompt"], row["answer"], row["initial_response"], models)
