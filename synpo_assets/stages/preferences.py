"""Preference pairs and the scorer that filters them.

Paper (section 2.3, algorithm 1 line 4): chosen is the refined answer, rejected is M_0's; a pair is kept if the scorer
(PairRM or ArmoRM) prefers chosen by a margin and chosen does not repeat itself by more than half; 10,000 survivors are
drawn at random per iteration.
Here: the same, of whatever two sides `preferences.chosen_from` makes. By default the scorer is a Bradley-Terry reward
model trained on the seed (gold over M_0's own answer), which needs no download; PairRM and ArmoRM are settings. The
repetition measure is ours, and so is the convention that says what a margin of PairRM is, since the paper leaves both open.
"""

from typing import Any

import dagster as dg
import polars as pl

from resources.common.errors import FinalError
from resources.generation.language_model import LanguageModel, Usage
from resources.models.model_source import fetch_reward_model
from resources.scoring.scorer import RewardScorer
from resources.settings.method import Sampling
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.training.trainer import Trainer
from synpo_assets.graph.history import metadata_of
from synpo_assets.graph.partitions import GPU_POOL, ITERATIONS, checkpoint, iteration_of, table
from synpo_assets.graph.presentation import (
    checkpoint_output,
    checkpoints_table,
    table_output,
    table_version,
    training_metadata,
)
from synpo_assets.graph.schemas import PreferencePairs
from synpo_assets.method import pairs as pair_method
from synpo_assets.method.pairs import as_preferences, join_sides, select_pairs
from synpo_assets.method.templates import user_message
from synpo_assets.stages.loop import report_history


@dg.asset(**checkpoint("scorer", "responses", "engine.dtype", "engine.kind"), pool=GPU_POOL, kinds={"huggingface"})
def reward_model(
    context: dg.AssetExecutionContext,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    language_model: LanguageModel,
    trainer: Trainer,
    scorer: RewardScorer,
    checkpoints: dg.ResourceParam[CheckpointStore],
    settings: dg.ResourceParam[Settings],
) -> dg.Output[Checkpoint]:
    """The scorer F: trained on gold over M_0's own answers, or a published reward model (paper, section 2.3)."""
    sampling = settings.responses.sampling
    compared, usage = seed_answers(context, initial_policy, seed_pairs, "train", language_model, sampling)
    training = settings.scorer.training
    if settings.scorer.kind != "trained" or training is None:
        made = checkpoints.adopt(context, *fetch_reward_model(settings.scorer, settings.engine.trust_remote_code))
        about = {}
    else:
        pairs = compared.filter(split="train").select("prompt", "answer", "response").rows()
        made, summary = checkpoints.create(
            context,
            lambda directory: trainer.reward(initial_policy, pairs, training, directory, context.log.info),
            parents={"start": initial_policy},
            trained_on={"seed_pairs": table_version(seed_pairs)},
            settings=training.model_dump(),
            random_seed=settings.random_seed,
        )
        about = training_metadata(summary)
    held_out = compared.filter(split="held_out").select("prompt", "answer", "response").rows()
    judged = scorer.compare(made, held_out, context.log.info)
    about |= {"held_out_accuracy": (judged.margins > 0).mean(), "held_out_pairs": len(held_out)} | judged.metadata()
    return checkpoint_output(context, made, **about, **answered_metadata(usage))


def seed_answers(
    context: dg.AssetExecutionContext,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    split: str,
    language_model: LanguageModel,
    sampling: Sampling,
) -> tuple[pl.DataFrame, Usage]:
    """M_0's own answers, as the column `response`, to one split of the seed and to the held-out prompts, and their cost.

    A reward model learns gold over these on the split; on the held-out prompts it is tested.
    """
    compared = seed_pairs.filter(pl.col("split").is_in([split, "held_out"]))
    asked = [(prompt_id, user_message(prompt)) for prompt_id, prompt in compared.select("prompt_id", "prompt").rows()]
    written, usage = language_model.answer(initial_policy, asked, sampling, context.log.info)
    return compared.with_columns(response=written["text"].str.strip_chars()), usage


def answered_metadata(usage: Usage) -> dict[str, Any]:
    """Tokens of M_0's answers, without seconds and rate, which would replace those of a training."""
    return {name: usage.metadata()[name] for name in ("input_tokens", "output_tokens", "generated_tokens")}


@dg.asset(
    partitions_def=ITERATIONS,
    **table(PreferencePairs, "preferences", "scorer.max_length", "scorer.pair_convention", "engine.dtype", pair_method),
    pool=GPU_POOL,
    kinds={"polars"},
)
def preference_pairs(
    context: dg.AssetExecutionContext,
    refined_responses: pl.DataFrame,
    initial_responses: pl.DataFrame,
    preference_history: pl.DataFrame,
    reward_model: Checkpoint,
    scorer: RewardScorer,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """This iteration's pairs: refined over rejected answer, scored, filtered, sampled (algorithm 1, line 4)."""
    options = settings.preferences
    joined = join_sides(refined_responses, initial_responses)
    rows = joined.select("prompt", "chosen_response", "rejected_response").rows()
    compared = scorer.compare(reward_model, rows, context.log.info)
    scored = joined.with_columns(chosen_score=compared.first_scores, rejected_score=compared.second_scores)
    kept, dropped = select_pairs(
        scored,
        options.margin_threshold,
        options.max_repetition,
        options.repetition_ngram,
        options.pairs_per_iteration,
        settings.random_seed,
    )
    if kept.is_empty():
        writer = "response_improver" if settings.trains_improver else "responses"
        raise FinalError(
            f"None of {joined.height} pairs was kept: {dropped}. If `margin` dropped most, lower preferences.margin_threshold; if "
            f"`equal_sides` did, raise {writer}.sampling.temperature."
        )
    frame = as_preferences(kept).with_columns(
        iteration=pl.lit(iteration_of(context), pl.Int64),
        scorer_sha=pl.lit(reward_model.sha),
        score_convention=pl.lit(compared.convention),
    )
    frame = frame.select(*PreferencePairs.to_schema().columns)
    report_history(context, preference_history, frame)
    lengths = kept.select(pl.col("chosen_response", "rejected_response").str.len_chars().mean()).row(0)
    return table_output(
        context,
        frame,
        candidates=joined.height,
        dropped=dg.MetadataValue.json(dropped),
        checkpoints=_checkpoints(context, reward_model),
        scorer_sha=reward_model.sha,
        **compared.metadata(),
        mean_margin=kept["margin"].mean(),
        chosen_cut_share=(kept["chosen_finish_reason"] == "length").mean(),
        rejected_cut_share=(kept["rejected_finish_reason"] == "length").mean(),
        chosen_to_rejected_length=lengths[0] / max(lengths[1], 1),
    )


def _checkpoints(context: dg.AssetExecutionContext, scorer: Checkpoint) -> dg.MarkdownMetadataValue:
    """Which checkpoints wrote the two sides, as their tables recorded it, and which one scored them."""
    rows = [("scorer", scorer.label, scorer.sha, scorer.manifest["run_id"])]
    for side, asset in (("chosen", "refined_responses"), ("rejected", "initial_responses")):
        about = metadata_of(context.instance, asset, context.partition_key)
        rows.append((side, about["checkpoint"], about["checkpoint_sha"], about["checkpoint_run"]))
    return checkpoints_table(rows)
