"""The two sides of a pair, the paper's way: the response improver, the refined answers, and M_0's answers.

Paper (section 2.2, algorithm 1 lines 2 to 4): the policy M_{t-1} answers the seed prompts; where gold beats its answer
by a margin, (prompt, own answer) -> gold trains the response improver R_t, from M_0 in every iteration. R_t then
rewrites the policy's answers to the synthetic prompts. M_0's answers to them become the rejected side.
Here: the same, with `preferences.rejected_from` as a setting because the paper states it in two ways. At t = 1 the
policy is M_0, so its answers are found in the shards and not generated twice.
"""

import dagster as dg
import polars as pl

from resources.generation.language_model import LanguageModel
from resources.scoring.scorer import RewardScorer
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.training.trainer import Trainer, TrainingError
from synpo_assets.graph.partitions import GPU_POOL, ITERATIONS, checkpoint, iteration_of, table
from synpo_assets.graph.presentation import checkpoint_output, made_by, table_output, table_version, training_metadata
from synpo_assets.graph.schemas import RefinedResponses, Responses, SeedResponses
from synpo_assets.method import responses as response_method
from synpo_assets.method import templates
from synpo_assets.method.responses import response_table
from synpo_assets.method.templates import improver_instruction
from synpo_assets.stages.responses import answer_prompts


@dg.asset(
    partitions_def=ITERATIONS,
    **table(Responses, "responses", "preferences.rejected_from", "engine.dtype", "engine.kind", response_method),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def initial_responses(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    initial_policy: Checkpoint,
    policy: Checkpoint,
    language_model: LanguageModel,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """M_0's answers to the synthetic prompts: the rejected side in every iteration (algorithm 1, line 4)."""
    answerer = initial_policy if settings.preferences.rejected_from == "initial" else policy
    sampling = settings.responses.sampling
    frame, usage = answer_prompts(
        context, synthetic_prompts.select("prompt_id", "prompt"), answerer, language_model, sampling
    )
    return table_output(context, frame, **usage.metadata(), **made_by(answerer))


@dg.asset(
    partitions_def=ITERATIONS,
    **table(
        SeedResponses,
        "responses",
        "scorer.max_length",
        "scorer.pair_convention",
        "engine.dtype",
        "engine.kind",
        response_method,
    ),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def seed_responses(
    context: dg.AssetExecutionContext,
    seed_pairs: pl.DataFrame,
    policy: Checkpoint,
    reward_model: Checkpoint,
    language_model: LanguageModel,
    scorer: RewardScorer,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """M_{t-1}'s answers to the seed prompts, scored beside the gold answers (algorithm 1, line 2)."""
    seed = seed_pairs.filter(split="train").select("prompt_id", "prompt", "answer")
    frame, usage = answer_prompts(context, seed, policy, language_model, settings.responses.sampling)
    rows = frame.select("prompt", "answer", "response").rows()
    compared = scorer.compare(reward_model, rows, context.log.info)
    scored = frame.with_columns(
        answer_score=compared.first_scores,
        response_score=compared.second_scores,
        margin=compared.margins,
        scorer_sha=pl.lit(reward_model.sha),
    )
    better = (scored["margin"] > 0).mean()
    return table_output(
        context, scored, gold_better_share=better, **usage.metadata(), **compared.metadata(), **made_by(policy)
    )


@dg.asset(
    partitions_def=ITERATIONS,
    **checkpoint("response_improver.training", "response_improver.margin_threshold", "engine.dtype", templates),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def response_improver(
    context: dg.AssetExecutionContext,
    seed_responses: pl.DataFrame,
    initial_policy: Checkpoint,
    trainer: Trainer,
    checkpoints: dg.ResourceParam[CheckpointStore],
    settings: dg.ResourceParam[Settings],
) -> dg.Output[Checkpoint]:
    """R_t, fine-tuned from M_0 to turn the policy's own answer into the gold answer (algorithm 1, line 2)."""
    options = settings.response_improver
    valid = seed_responses.filter(pl.col("margin") > options.margin_threshold)
    if valid.is_empty():
        raise TrainingError(
            f"No gold answer beats the policy's own answer by more than response_improver.margin_threshold = "
            f"{options.margin_threshold}: lower it."
        )
    rows = valid.select("prompt", "response", "answer").rows()
    examples = [(improver_instruction(prompt, response), answer) for prompt, response, answer in rows]
    made, summary = checkpoints.create(
        context,
        lambda directory: trainer.supervised(initial_policy, examples, options.training, directory, context.log.info),
        parents={"start": initial_policy},
        trained_on={"seed_responses": table_version(seed_responses)},
        settings=options.training.model_dump(),
        random_seed=settings.random_seed,
    )
    return checkpoint_output(
        context, made, below_margin=seed_responses.height - valid.height, **training_metadata(summary)
    )


@dg.asset(
    partitions_def=ITERATIONS,
    **table(RefinedResponses, "response_improver.sampling", "engine.dtype", "engine.kind", templates, response_method),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def refined_responses(
    context: dg.AssetExecutionContext,
    base_responses: pl.DataFrame,
    response_improver: Checkpoint,
    language_model: LanguageModel,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """The policy's answers, rewritten by R_t: the chosen side (algorithm 1, line 3)."""
    base = base_responses.select("prompt_id", "prompt", pl.col("response_id").alias("base_response_id"), "response")
    rows = base.select("base_response_id", "prompt", "response").iter_rows()
    asked = ((response_id, improver_instruction(prompt, response)) for response_id, prompt, response in rows)
    sampling = settings.response_improver.sampling
    written, usage = language_model.answer(response_improver, asked, sampling, context.log.info)
    prompts = base.drop("response")
    frame = response_table(prompts, written, response_improver.sha, iteration_of(context))
    unchanged = (frame["response"] == base["response"].str.strip_chars()).mean()
    return table_output(context, frame, unchanged_share=unchanged, **usage.metadata(), **made_by(response_improver))
