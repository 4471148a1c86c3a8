"""Whether scorer and judge are of the same opinion as the people who read pairs.

Paper: no such measure.
Here: where `preferences.reviewed` names a file of verdicts. Each judge compares the two answers of the pairs in which people
prefer one, a pair ranker in both orders. The share on which it agrees, a tie counting half, says how far its margins and win
rates can be trusted on the model's own answers; on gold they may be easier. People read what the scorer's filter left, so
that its agreement is that within its own choice.
"""

import dagster as dg
import polars as pl

from resources.judging.judge_choice import open_judges
from resources.scoring.scorer import ScoringUsage
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.evaluation_schemas import VerdictAgreement
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import table_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.outcomes import NO_VERDICT, outcomes, win_rate, win_rate_interval
from synpo_assets.stages.scorers import comparison_tokens


def _cost(sizes: Sizes) -> list[Work]:
    """At most all pairs are read, by the scorer and by the independent judge."""
    pairs = sizes.settings.preferences.pairs_per_iteration
    return [Work("score", 2 * pairs * comparison_tokens(sizes, sizes.written, sizes.written, judging=True))]


@Stage(
    VerdictAgreement,
    group="evaluation",
    work=("scores",),
    reads=("scorer.judging_convention", "scorer.max_length", "judge.max_length", "judge.server"),
    cost=_cost,
    made_from={"pair_id": "pair_verdicts"},
)
def verdict_agreement(
    context: dg.AssetExecutionContext,
    pair_verdicts: pl.DataFrame,
    judge_model: Checkpoint,
    reward_model: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """How often each judge prefers the answer that people prefer; pairs on which they say tie, neither or both are left out.

    If the interval of `agreement_rate` holds one half, the judge may be guessing on answers of these models.
    """
    preferred = pair_verdicts.filter(pl.col("outcome") != "dropped")
    rows = preferred.select("prompt", "chosen", "rejected").rows()
    sign = pl.when(preferred["outcome"] == "flipped").then(-1.0).otherwise(1.0)
    frames: list[pl.DataFrame] = [VerdictAgreement.empty()]
    measured, usages = list[Metric](), list[ScoringUsage]()
    for judge in open_judges(services.settings.judge, services.scorer, judge_model, reward_model) if rows else []:
        compared = judge.compare(rows)
        agreed = preferred.select("pair_id", margin=compared.margins * preferred.select(sign).to_series())
        said = outcomes(agreed["margin"])
        low, high = win_rate_interval(said) or (None, None)
        counted = int((said != NO_VERDICT).sum())
        measured.append(
            Metric("agreement_rate", win_rate(said), "people", by=judge.label, low=low, high=high, n=counted)
        )
        usages.append(compared.usage)
        frame = agreed.with_columns(
            judge=pl.lit(judge.label), outcome=said, iteration=pl.lit(iteration_of(context), pl.Int64)
        )
        frames.append(frame.select(*VerdictAgreement.to_schema().columns))
    if usages:
        measured += metrics.scoring(*usages)
    return table_output(context, services, pl.concat(frames), measured)
