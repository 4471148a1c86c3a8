"""The two sides of a pair without an improver: the best and the worst of several answers of the policy.

Paper (section 2.2): the response improver R_t writes the chosen side. The introduction sets this apart from methods that
sample several answers of the model itself and have a reward model rank them.
Here: that other way, an ablation (`preferences.chosen_from: ranked_samples`). M_{t-1} answers each synthetic prompt
`preferences.ranked_samples` times, the scorer ranks the answers, the best is chosen and the worst rejected. The tables
keep the names that they have in improver.py, so that all that follows is the same. The first sample is the answer in
base_responses, and both assets find the samples and their scores in the same shards: nothing is made twice. The ranks go
by margins over the first sample; a pair ranker therefore reads the best and the worst side by side only in preference_pairs.
Samples that were cut take no rank.
"""

import dagster as dg
import polars as pl

from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.schemas import RefinedResponses, Responses
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.ranking import beside_first, repeated_prompts, with_ranks
from synpo_assets.method.responses import response_table
from synpo_assets.method.templates import prompt_requests
from synpo_assets.stages.scorers import comparison_tokens, margin_over_first, reads_answers_alone, scored_answers

READS = ("responses", "preferences.ranked_samples", "scorer.convention", "scorer.max_length")
# Which sample is taken, by the columns of `with_ranks`.
BEST, WORST = pl.lit(1), pl.col("worst")


def _cost(sizes: Sizes) -> list[Work]:
    """The first sample is the base response; the others are written and read here, once for both sides."""
    further = sizes.settings.preferences.ranked_samples - 1
    reading = further * comparison_tokens(sizes, sizes.written, sizes.written)
    if reads_answers_alone(sizes.settings):
        reading = (further + 1) * (sizes.asked + sizes.written)
    return [Work("generate", sizes.prompts * further * sizes.written), Work("score", sizes.prompts * reading)]


@Stage(
    RefinedResponses,
    group="responses",
    work=("generates", "scores"),
    reads=READS,
    samplings=lambda settings: [settings.responses.sampling],
    cost=_cost,
    made_from={"base_response_id": "base_responses"},
)
def chosen_responses(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    base_responses: pl.DataFrame,
    policy: Checkpoint,
    reward_model: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """The best of M_{t-1}'s answers to each prompt by the scorer: the chosen side.

    Read the sample beside `rejected_responses`, of the same model: the scorer's taste is all that tells them apart.
    """
    return _ranked(context, BEST, RefinedResponses, synthetic_prompts, base_responses, policy, reward_model, services)


@Stage(
    Responses,
    group="responses",
    work=("generates", "scores"),
    reads=READS,
    samplings=lambda settings: [settings.responses.sampling],
    made_from={"prompt_id": "synthetic_prompts"},
)
def rejected_responses(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    base_responses: pl.DataFrame,
    policy: Checkpoint,
    reward_model: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """The worst of M_{t-1}'s answers to each prompt by the scorer: the rejected side.

    Read the sample beside `chosen_responses`, of the same model: the scorer's taste is all that tells them apart.
    """
    return _ranked(context, WORST, Responses, synthetic_prompts, base_responses, policy, reward_model, services)


def _ranked(
    context: dg.AssetExecutionContext,
    rank: pl.Expr,
    schema: type[Responses],
    synthetic_prompts: pl.DataFrame,
    base_responses: pl.DataFrame,
    policy: Checkpoint,
    reward_model: Checkpoint,
    services: Services,
) -> dg.Output[pl.DataFrame]:
    """The samples that hold one rank, and what sampling and scoring all of them cost."""
    samples, sampling = services.settings.preferences.ranked_samples, services.settings.responses.sampling
    prompts = base_responses.select("prompt_id", "prompt", base_response_id="response_id").join(
        synthetic_prompts.select("prompt_id", "constraints"), on="prompt_id", maintain_order="left"
    )
    repeated = repeated_prompts(prompts, samples)
    written, usage = services.language_model.answer(policy, prompt_requests(repeated, "sample_id"), sampling)
    answered = response_table(repeated, written, policy.sha, iteration_of(context))
    compared = scored_answers(services, reward_model, beside_first(answered))
    taken = with_ranks(answered, compared.rows["margin"]).filter(pl.col("rank") == rank)
    measured = [
        Metric("samples_per_prompt", samples),
        margin_over_first(taken),
        *metrics.generating(usage),
        *metrics.scoring(compared.usage),
    ]
    frame = taken.select(*schema.to_schema().columns)
    return table_output(context, services, frame, measured, score_convention=compared.conventions, **made_by(policy))
