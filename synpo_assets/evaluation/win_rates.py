"""How M_t compares with M_0 and with M_{t-1} on held-out prompts, and the judge that says so.

Paper (section 3): AlpacaEval 2, Arena-Hard and MT-Bench with a GPT-4 judge, and the Open LLM leaderboard.
Here: the three models answer the held-out seed prompts. A judge that took no part in training compares the answers: a
reward model trained from M_0 on rows of the seed that nothing else reads, with another random seed. It needs no download,
but it learned from the same kind of data as the scorer and starts from the same model, so it is a weaker witness than
GPT-4; `judge.server` adds any model with OpenAI's chat API. The scorer's verdict stands beside theirs, marked as that of a
judge that took part in training. Win rates come with bootstrap intervals and, as in AlpacaEval 2, controlled for length.
"""

import dagster as dg
import polars as pl

from resources.generation.language_model import LanguageModel, Usage
from resources.judging.judge import Judge
from resources.judging.judge_choice import judge_scorer, open_judges
from resources.scoring.scorer import RewardScorer, ScoringUsage
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.storage.tables import table_metadata
from resources.training.trainer import Trainer
from synpo_assets.graph.partitions import GPU_POOL, ITERATIONS, checkpoint, iteration_of, table
from synpo_assets.graph.presentation import checkpoint_output, made_by, table_output, table_version, training_metadata
from synpo_assets.graph.schemas import Evaluation
from synpo_assets.method import evaluation as evaluation_method
from synpo_assets.method import quality as quality_method
from synpo_assets.method.evaluation import outcomes, win_rates
from synpo_assets.method.quality import answer_figures
from synpo_assets.method.templates import user_message
from synpo_assets.stages.preferences import answered_metadata, seed_answers

# Whose answers M_t's are compared with.
OPPONENTS = {"initial": "initial_response", "previous": "previous_response"}


@dg.asset(
    **checkpoint("judge.training", "judge.max_length", "responses", "engine.dtype", "engine.kind"),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def judge_model(
    context: dg.AssetExecutionContext,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    language_model: LanguageModel,
    trainer: Trainer,
    scorer: RewardScorer,
    checkpoints: dg.ResourceParam[CheckpointStore],
    settings: dg.ResourceParam[Settings],
) -> dg.Output[Checkpoint]:
    """The independent judge: gold over M_0's own answers, on rows of the seed that no other training reads."""
    sampling, training = settings.responses.sampling, settings.judge.training
    compared, usage = seed_answers(context, initial_policy, seed_pairs, "judge", language_model, sampling)
    pairs = compared.filter(split="judge").select("prompt", "answer", "response").rows()
    # Another seed than the scorer's, so that the two do not share their first weights and order of examples.
    other = trainer.model_copy(update={"random_seed": settings.random_seed + 1})
    made, summary = checkpoints.create(
        context,
        lambda directory: other.reward(initial_policy, pairs, training, directory, context.log.info),
        parents={"start": initial_policy},
        trained_on={"seed_pairs": table_version(seed_pairs)},
        settings=training.model_dump(),
        random_seed=other.random_seed,
    )
    held_out = compared.filter(split="held_out").select("prompt", "answer", "response").rows()
    judged = judge_scorer(settings.judge, scorer).compare(made, held_out, context.log.info)
    about = {"held_out_accuracy": (judged.margins > 0).mean(), "held_out_pairs": len(held_out)} | judged.metadata()
    return checkpoint_output(context, made, **about, **training_metadata(summary), **answered_metadata(usage))


@dg.asset(
    partitions_def=ITERATIONS,
    **table(
        Evaluation,
        "responses",
        "scorer.max_length",
        "scorer.pair_convention",
        "judge.max_length",
        "judge.server",
        "engine.dtype",
        "engine.kind",
        evaluation_method,
        quality_method,
    ),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def evaluation(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    policy: Checkpoint,
    initial_policy: Checkpoint,
    reward_model: Checkpoint,
    judge_model: Checkpoint,
    seed_pairs: pl.DataFrame,
    language_model: LanguageModel,
    scorer: RewardScorer,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """Held-out answers of M_t, compared with those of M_0 and M_{t-1} by each judge; rewards by the scorer."""
    models = {"policy": model_checkpoint, "previous": policy, "initial": initial_policy}
    texts, measured, answering = _answers(context, models, seed_pairs, language_model, settings)
    rewards, convention, scoring = _rewards(context, texts, scorer, reward_model)
    judges = open_judges(settings.judge, scorer, judge_model, reward_model)
    judged, judging = _judged(context, texts, judges)
    shas = {f"{name}_checkpoint_sha": pl.lit(model.sha) for name, model in models.items()}
    frame = texts.with_columns(*rewards, *judged, **shas, iteration=pl.lit(iteration_of(context), pl.Int64))
    frame = frame.with_columns(
        pl.lit(None, pl.String).alias(name) for name in Evaluation.to_schema().columns if name not in frame.columns
    ).select(*Evaluation.to_schema().columns)
    labels = {judge.name: judge.label for judge in judges}
    rates = win_rates(frame, labels, OPPONENTS, "policy_response", settings.random_seed)
    return table_output(
        context,
        frame,
        **_figures(rates),
        **{f"held_out_reward {side}": frame[f"{side}_score"].mean() for side in ("answer", "policy", "initial")},
        win_rates=table_metadata(rates),
        measured_without_a_judge=table_metadata(measured),
        **{f"mean_repetition {row['model']}": row["mean_repetition"] for row in measured.to_dicts()},
        **{f"cut_share {row['model']}": row["cut_share"] for row in measured.to_dicts()},
        judges="; ".join(labels.values()),
        held_out_prompts=frame.height,
        score_convention=convention,
        **answering.metadata(),
        **(scoring + judging).metadata(),
        **made_by(model_checkpoint),
    )


def _answers(
    context: dg.AssetExecutionContext,
    models: dict[str, Checkpoint],
    seed_pairs: pl.DataFrame,
    language_model: LanguageModel,
    settings: Settings,
) -> tuple[pl.DataFrame, pl.DataFrame, Usage]:
    """The held-out rows with the answers of each model, what can be measured of these without a judge, and their cost.

    M_0's and M_{t-1}'s were mostly written earlier.
    """
    held_out = seed_pairs.filter(split="held_out").select("prompt_id", "prompt", "answer")
    asked = [(prompt_id, user_message(prompt)) for prompt_id, prompt in held_out.select("prompt_id", "prompt").rows()]
    sampling = settings.responses.sampling
    written = {name: language_model.answer(model, asked, sampling, context.log.info) for name, model in models.items()}
    answers = {f"{name}_response": frame["text"] for name, (frame, _) in written.items()}
    first, *others = (usage for _, usage in written.values())
    measured = answer_figures({name: frame for name, (frame, _) in written.items()})
    return held_out.with_columns(**answers), measured, sum(others, first)


def _rewards(
    context: dg.AssetExecutionContext, texts: pl.DataFrame, scorer: RewardScorer, reward_model: Checkpoint
) -> tuple[list[pl.Series], str, ScoringUsage]:
    """The scorer's values of the gold answers, M_t's and M_0's, what their differences mean, and the cost."""
    policy, gold = (
        scorer.compare(reward_model, texts.select("prompt", side, "initial_response").rows(), context.log.info)
        for side in ("policy_response", "answer")
    )
    # Numbers of different comparisons have no common zero: all three are stated beside M_0's in the first one.
    values = {
        "answer_score": policy.second_scores + gold.margins,
        "policy_score": policy.first_scores,
        "initial_score": policy.second_scores,
    }
    return [value.alias(name) for name, value in values.items()], policy.convention, policy.usage + gold.usage


def _judged(
    context: dg.AssetExecutionContext, texts: pl.DataFrame, judges: list[Judge]
) -> tuple[list[pl.Series], ScoringUsage]:
    """What each judge says of M_t's answers beside those of each opponent, and the cost."""
    columns, usages = [], []
    for judge in judges:
        for opponent, column in OPPONENTS.items():
            compared = judge.compare(texts.select("prompt", "policy_response", column).rows(), context.log.info)
            columns.append(outcomes(compared.margins).alias(f"{judge.name}_over_{opponent}"))
            usages.append(compared.usage)
    return columns, sum(usages[1:], usages[0])


def _figures(rates: pl.DataFrame) -> dict[str, float | None]:
    """The win rates by name: those of the independent judge plainly, with the low end, those of the others with `by`."""
    named = {
        f"win_rate_over_{row['opponent']}" + ("" if row["judge"] == "judge" else f"_by_{row['judge']}"): row["win_rate"]
        for row in rates.to_dicts()
    }
    low = {f"win_rate_over_{row['opponent']}_low": row["low"] for row in rates.filter(judge="judge").to_dicts()}
    return named | low
