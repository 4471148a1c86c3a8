"""The two sides of a pair without an improver: the best and the worst of several answers of the policy.

Paper (section 2.2): the response improver R_t writes the chosen side. The introduction sets this apart from methods that
sample several answers of the model itself and have a reward model rank them.
Here: that other way, an ablation (`preferences.chosen_from: ranked_samples`). M_{t-1} answers each synthetic prompt
`preferences.ranked_samples` times, the scorer ranks the answers, the best is chosen and the worst rejected. The tables
keep the names that they have in improver.py, so that all that follows is the same. The first sample is the answer in
base_responses, and both assets find the samples and their scores in the same shards: nothing is made twice. The ranks go
by margins over the first sample; a pair ranker therefore reads the best and the worst side by side only in preference_pairs.
"""

import dagster as dg
import polars as pl

from resources.generation.language_model import LanguageModel
from resources.scoring.scorer import RewardScorer
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.graph.partitions import GPU_POOL, ITERATIONS, iteration_of, table
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.schemas import RefinedResponses, Responses
from synpo_assets.method import ranking as ranking_method
from synpo_assets.method import responses as response_method
from synpo_assets.method.ranking import beside_first, repeated_prompts, with_ranks
from synpo_assets.method.responses import response_table
from synpo_assets.method.templates import user_message

DECIDED_BY = (
    "responses", "preferences.ranked_samples", "scorer.max_length", "scorer.pair_convention", "engine.dtype", "engine.kind",
    ranking_method, response_method,
)  # fmt: skip
BEST = 1


@dg.asset(partitions_def=ITERATIONS, **table(RefinedResponses, *DECIDED_BY), pool=GPU_POOL, kinds={"huggingface"})
def refined_responses(
    context: dg.AssetExecutionContext,
    base_responses: pl.DataFrame,
    policy: Checkpoint,
    reward_model: Checkpoint,
    language_model: LanguageModel,
    scorer: RewardScorer,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """The best of M_{t-1}'s answers to each prompt by the scorer: the chosen side."""
    return _ranked(
        context, BEST, RefinedResponses, base_responses, policy, reward_model, language_model, scorer, settings
    )


@dg.asset(partitions_def=ITERATIONS, **table(Responses, *DECIDED_BY), pool=GPU_POOL, kinds={"huggingface"})
def initial_responses(
    context: dg.AssetExecutionContext,
    base_responses: pl.DataFrame,
    policy: Checkpoint,
    reward_model: Checkpoint,
    language_model: LanguageModel,
    scorer: RewardScorer,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """The worst of M_{t-1}'s answers to each prompt by the scorer: the rejected side."""
    worst = settings.preferences.ranked_samples
    return _ranked(context, worst, Responses, base_responses, policy, reward_model, language_model, scorer, settings)


def _ranked(
    context: dg.AssetExecutionContext,
    rank: int,
    schema: type[Responses],
    base_responses: pl.DataFrame,
    policy: Checkpoint,
    reward_model: Checkpoint,
    language_model: LanguageModel,
    scorer: RewardScorer,
    settings: Settings,
) -> dg.Output[pl.DataFrame]:
    """The samples that hold one rank, and what sampling and scoring all of them cost."""
    prompts = base_responses.select("prompt_id", "prompt", base_response_id="response_id")
    repeated = repeated_prompts(prompts, settings.preferences.ranked_samples)
    asked = ((row_id, user_message(text)) for row_id, text in repeated.select("sample_id", "prompt").iter_rows())
    written, usage = language_model.answer(policy, asked, settings.responses.sampling, context.log.info)
    answered = response_table(repeated, written, policy.sha, iteration_of(context))
    compared = scorer.compare(reward_model, beside_first(answered).rows(), context.log.info)
    taken = with_ranks(answered, compared.margins).filter(rank=rank)
    return table_output(
        context,
        taken.select(*schema.to_schema().columns),
        samples_per_prompt=settings.preferences.ranked_samples,
        mean_margin_over_first_sample=taken["margin_over_first"].mean(),
        **usage.metadata(),
        **compared.metadata(),
        **made_by(policy),
    )
