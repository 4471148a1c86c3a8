"""A chosen side near the policy: the best of several rewrites of each answer, among those of like length.

Paper (section 2.2, algorithm 1 line 3): R_t rewrites each answer once.
Here: the same by default. Where `response_improver.samples` is more than 1, R_t rewrites each answer as many times, and the best by
the scorer is chosen among those whose length is that of the rejected answer, within `response_improver.max_length_ratio`;
if there is none, the nearest in length. A single rewrite is often far from what the policy would write, and longer or shorter
than the rejected answer: preference optimization then learns length before content, and every pair pulls with full weight.
R_t has learned to change answers, and may change right ones too: with `response_improver.own_answers` what M_{t-1} answered is
chosen where it is above every rewrite, by the rules of the prompt, or by the scorer and no less alike in length. At t = 1 it is
the rejected answer, and is not.
The first sample is the one in refined_responses. As for ranked samples, the scorer gives margins over the first sample, so
that a pair ranker needs no reading of every two.
"""

import dagster as dg
import polars as pl

from resources.generation.language_model import Usage
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output, writers_table
from synpo_assets.graph.schemas import RefinedResponses
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.ranking import beside_first, best_of_like_length, is_rejected, repeated_prompts
from synpo_assets.method.responses import response_table
from synpo_assets.method.templates import rewrite_requests
from synpo_assets.stages.scorers import comparison_tokens, margin_over_first, reads_answers_alone, scored_answers


def _cost(sizes: Sizes) -> list[Work]:
    """The first rewrite is made before; the others are written here, and all are read, the policy's answer if it may be chosen."""
    options = sizes.settings.response_improver
    further, length = options.samples - 1, options.sampling.max_new_tokens
    reading = further * comparison_tokens(sizes, length, length)
    of_own = comparison_tokens(sizes, sizes.written, length)
    if reads_answers_alone(sizes.settings):
        reading, of_own = options.samples * (sizes.asked + length), sizes.asked + sizes.written
    return [
        Work("generate", sizes.prompts * further * length),
        Work("score", sizes.prompts * reading),
        Work("score", sizes.prompts * of_own * options.own_answers, later_only=True),
    ]


@Stage(
    RefinedResponses,
    group="responses",
    side="chosen_responses",
    work=("generates", "scores"),
    reads=(
        "response_improver.sampling", "response_improver.samples", "response_improver.max_length_ratio",
        "response_improver.own_answers",
        "scorer.convention", "scorer.max_length",
    ),
    samplings=lambda settings: [settings.response_improver.sampling],
    cost=_cost,
    made_from={"base_response_id": "base_responses"},
)  # fmt: skip
def best_rewrites(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    base_responses: pl.DataFrame,
    refined_responses: pl.DataFrame,
    rejected_responses: pl.DataFrame,
    response_improver: Checkpoint,
    reward_model: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """The best of R_t's rewrites of each answer that is about as long as the rejected one: the chosen side.

    Read the sample: each rewrite should say the same better, not longer. `like_length_share` says for how many prompts the
    chosen one is of like length, `own_answer_share` for how many it is the policy's own answer.
    """
    options, columns = services.settings.response_improver, RefinedResponses.to_schema().columns
    further, usage = _further_rewrites(context, services, base_responses, response_improver)
    rewrites = pl.concat([_numbered(refined_responses, 1), further.select(*columns, "sample")])
    own = _numbered(base_responses.with_columns(base_response_id="response_id"), options.samples + 1)
    candidates = _candidates(
        rewrites, own if options.own_answers else own.clear(), synthetic_prompts, rejected_responses
    )
    compared = scored_answers(services, reward_model, beside_first(candidates))
    best = best_of_like_length(candidates, compared.rows["margin"], options.max_length_ratio)
    measured = [
        Metric("samples_per_prompt", options.samples),
        Metric("like_length_share", metrics.mean(best["is_alike"]), n=best.height),
        *([Metric("own_answer_share", metrics.mean(best["is_own"]), n=best.height)] if options.own_answers else []),
        margin_over_first(best),
        *metrics.generating(usage),
        *metrics.scoring(compared.usage),
    ]
    writers = writers_table(services.checkpoints, {"chosen": best["checkpoint_sha"]})
    shown = {"score_convention": compared.conventions, "checkpoints": writers, **made_by(response_improver)}
    return table_output(context, services, best.select(*columns), measured, **shown)


def _numbered(answers: pl.DataFrame, sample: int) -> pl.DataFrame:
    return answers.select(*RefinedResponses.to_schema().columns, sample=pl.lit(sample, pl.Int64))


def _candidates(
    rewrites: pl.DataFrame, own: pl.DataFrame, prompts: pl.DataFrame, rejected_responses: pl.DataFrame
) -> pl.DataFrame:
    """What can be chosen, with the rules of its prompt and the rejected answer; an own answer that is the rejected one cannot."""
    rejected = rejected_responses.select("prompt_id", rejected="response")
    beside = prompts.select("prompt_id", "constraints").join(rejected, on="prompt_id")
    candidates = pl.concat([rewrites.with_columns(is_own=False), own.with_columns(is_own=True)])
    candidates = candidates.join(beside, on="prompt_id", maintain_order="left")
    return candidates.filter(~(pl.col("is_own") & is_rejected()))


def _further_rewrites(
    context: dg.AssetExecutionContext, services: Services, base_responses: pl.DataFrame, response_improver: Checkpoint
) -> tuple[pl.DataFrame, Usage]:
    """The rewrites of each answer after the first, with the number of the sample."""
    options = services.settings.response_improver
    base = base_responses.select("prompt_id", "prompt", "response", base_response_id="response_id")
    further = repeated_prompts(base, options.samples, "base_response_id").filter(pl.col("sample") > 1)
    requests = rewrite_requests(further, "sample_id")
    written, usage = services.language_model.answer(response_improver, requests, options.sampling)
    rewritten = response_table(further.drop("response"), written, response_improver.sha, iteration_of(context))
    return rewritten, usage
