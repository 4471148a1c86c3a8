"""The policy's answers to the synthetic prompts, from which both ways to the two sides of a pair begin.

Paper (section 2.2, algorithm 1 line 3): M_{t-1} answers the synthetic prompts.
Here: the same. What becomes of the answers is the setting `preferences.chosen_from`, whose values are the names of two
modules, improver.py (the paper's way) and ranked_samples.py; stages.py takes one of them into the graph.
"""

import dagster as dg
import polars as pl

from resources.generation.language_model import LanguageModel, Usage
from resources.settings.method import Sampling
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.graph.partitions import GPU_POOL, ITERATIONS, iteration_of, table
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.schemas import Responses
from synpo_assets.method import responses as response_method
from synpo_assets.method.responses import response_table
from synpo_assets.method.templates import user_message


@dg.asset(
    partitions_def=ITERATIONS,
    **table(Responses, "responses", "engine.dtype", "engine.kind", response_method),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def base_responses(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    policy: Checkpoint,
    language_model: LanguageModel,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """M_{t-1}'s answers to the synthetic prompts: what the improver rewrites, or the first of the ranked samples."""
    sampling = settings.responses.sampling
    frame, usage = answer_prompts(
        context, synthetic_prompts.select("prompt_id", "prompt"), policy, language_model, sampling
    )
    return table_output(context, frame, **usage.metadata(), **made_by(policy))


def answer_prompts(
    context: dg.AssetExecutionContext,
    prompts: pl.DataFrame,
    answerer: Checkpoint,
    language_model: LanguageModel,
    sampling: Sampling,
) -> tuple[pl.DataFrame, Usage]:
    """Answers prompts by themselves, each as one user turn."""
    rows = prompts.select("prompt_id", "prompt").iter_rows()
    asked = ((prompt_id, user_message(prompt)) for prompt_id, prompt in rows)
    written, usage = language_model.answer(answerer, asked, sampling, context.log.info)
    return response_table(prompts, written, answerer.sha, iteration_of(context)), usage
