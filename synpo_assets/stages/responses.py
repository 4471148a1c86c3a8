"""The policy's answers to the synthetic prompts, from which both ways to the two sides of a pair begin.

Paper (section 2.2, algorithm 1 line 3): M_{t-1} answers the synthetic prompts.
Here: the same. What becomes of the answers is the setting `preferences.chosen_from`, whose values are the names of two
modules, improver.py (the paper's way) and ranked_samples.py; algorithm.py takes one of them into the graph.
"""

import dagster as dg
import polars as pl

from resources.generation.language_model import Usage
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Work
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.schemas import Responses
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.responses import response_table
from synpo_assets.method.templates import prompt_requests


@Stage(
    Responses,
    group="responses",
    work=("generates",),
    reads=("responses",),
    samplings=lambda settings: [settings.responses.sampling],
    cost=lambda sizes: [Work("generate", sizes.prompts * sizes.written)],
    made_from={"prompt_id": "synthetic_prompts"},
)
def base_responses(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    policy: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """M_{t-1}'s answers to the synthetic prompts: what the improver rewrites, or the first of the ranked samples.

    Read the sample: this is how the model answers now. `cut_share` is the share that hit the token limit.
    """
    frame, usage = answer_prompts(context, services, synthetic_prompts.select("prompt_id", "prompt"), policy)
    return table_output(context, services, frame, metrics.generating(usage), **made_by(policy))


def answer_prompts(
    context: dg.AssetExecutionContext, services: Services, prompts: pl.DataFrame, answerer: Checkpoint
) -> tuple[pl.DataFrame, Usage]:
    """Answers prompts by themselves, each as one user turn; further columns of theirs stay."""
    written, usage = services.language_model.answer(
        answerer, prompt_requests(prompts), services.settings.responses.sampling
    )
    return response_table(prompts, written, answerer.sha, iteration_of(context)), usage
