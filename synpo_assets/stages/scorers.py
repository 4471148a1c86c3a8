"""The scorer F that filters pairs, and the judge that takes no part in training.

Paper (section 2.3): PairRM or ArmoRM score the two sides of a pair; GPT-4 judges the result (section 3).
Here: by default the scorer is a Bradley-Terry reward model trained on the seed (gold over M_0's own answer), which needs no
download; PairRM and ArmoRM are settings. The judge is such a model too, always trained here, on rows of the seed that
nothing else reads and with another random seed, so that the two do not share first weights and order of examples.
"""

import dagster as dg
import polars as pl

from resources.generation.language_model import Usage
from resources.judging.judge_choice import judge_scorer
from resources.scoring.published import fetch_reward_model
from resources.scoring.scorer import SCORERS, RewardScorer
from resources.settings.settings import Settings
from resources.settings.training import Training
from resources.storage.checkpoint_store import Checkpoint
from resources.training.job import TrainingSummary
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work, training_work
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.presentation import checkpoint_output, training_log
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.cut import whole_answers
from synpo_assets.method.seed import HELD_OUT
from synpo_assets.method.templates import prompt_requests
from synpo_assets.stages.training import train_from_initial


def reads_answers_alone(settings: Settings) -> bool:
    """Whether the scorer reads one answer at a time, so that an answer which it has read is not read again."""
    return SCORERS[settings.scorer.kind].answers_per_reading == 1


def comparison_tokens(sizes: Sizes, first: float, second: float, judging: bool = False) -> float:
    """Tokens that the scorer reads to compare two answers of some lengths, for pairs or to judge models."""
    scorer, lengths = sizes.settings.scorer, {"first": first, "second": second}
    convention = SCORERS[scorer.kind].conventions[scorer.judging_convention if judging else scorer.convention]
    return sum(sizes.asked + sum(lengths[side] for side in sides) for sides in convention.readings)


def _reward_model_cost(sizes: Sizes) -> list[Work]:
    scorer, length = sizes.settings.scorer, 2 * sizes.asked + sizes.gold + sizes.written
    training = [training_work(scorer.training, sizes.train, length)] if scorer.kind == "trained" else []
    return [
        *training,
        Work("generate", (sizes.train + sizes.held_out) * sizes.written),
        Work("score", sizes.held_out * comparison_tokens(sizes, sizes.gold, sizes.written)),
    ]


@Stage(
    group="seed",
    checkpoint=True,
    once=True,
    work=("generates", "trains", "scores"),
    reads=("scorer", "responses"),
    samplings=lambda settings: [settings.responses.sampling],
    cost=_reward_model_cost,
)
def reward_model(
    context: dg.AssetExecutionContext,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[Checkpoint]:
    """The scorer F: trained on gold over M_0's own answers, or a published reward model (paper, section 2.3)."""
    settings = services.settings
    compared, usage = _seed_answers(services, initial_policy, seed_pairs, "train")
    if settings.scorer.kind == "trained":
        made, summary = _train(
            context, services, initial_policy, seed_pairs, compared, settings.scorer.training, settings.random_seed
        )
    else:
        weights, origin = fetch_reward_model(settings.scorer, settings.engine.trust_remote_code)
        made, summary = services.checkpoints.adopt(context, weights, origin), None
    return _scorer_output(context, services, made, summary, services.scorer, compared, usage)


def _judge_model_cost(sizes: Sizes) -> list[Work]:
    length = 2 * sizes.asked + sizes.gold + sizes.written
    return [
        training_work(sizes.settings.judge.training, sizes.judge, length),
        Work("generate", sizes.judge * sizes.written),
        Work("score", sizes.held_out * length),
    ]


@Stage(
    group="seed",
    checkpoint=True,
    once=True,
    work=("generates", "trains", "scores"),
    reads=("judge.training", "judge.max_length", "responses"),
    samplings=lambda settings: [settings.responses.sampling],
    cost=_judge_model_cost,
)
def judge_model(
    context: dg.AssetExecutionContext,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[Checkpoint]:
    """The independent judge: gold over M_0's own answers, on rows of the seed that no other training reads."""
    settings = services.settings
    compared, usage = _seed_answers(services, initial_policy, seed_pairs, "judge")
    made, summary = _train(
        context, services, initial_policy, seed_pairs, compared, settings.judge.training, settings.random_seed + 1
    )
    judge = judge_scorer(settings.judge, services.scorer)
    return _scorer_output(context, services, made, summary, judge, compared, usage)


def _seed_answers(
    services: Services, initial_policy: Checkpoint, seed_pairs: pl.DataFrame, split: str
) -> tuple[pl.DataFrame, Usage]:
    """M_0's own answers (`response`): to one split, on which gold is learned over them, and to the held-out prompts."""
    compared = seed_pairs.filter(pl.col("split").is_in([split, *HELD_OUT]))
    sampling = services.settings.responses.sampling
    written, usage = services.language_model.answer(initial_policy, prompt_requests(compared), sampling)
    return compared.with_columns(response=whole_answers(written)), usage


def _train(
    context: dg.AssetExecutionContext,
    services: Services,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    compared: pl.DataFrame,
    training: Training,
    random_seed: int,
) -> tuple[Checkpoint, TrainingSummary]:
    """A reward model from M_0 on gold over its own answers."""
    pairs = compared.filter(~pl.col("split").is_in(HELD_OUT)).select("prompt", "answer", "response").rows()
    return train_from_initial(
        context, services, "reward", initial_policy, pairs, training, random_seed, seed_pairs=seed_pairs
    )


def _scorer_output(
    context: dg.AssetExecutionContext,
    services: Services,
    made: Checkpoint,
    summary: TrainingSummary | None,
    scorer: RewardScorer,
    compared: pl.DataFrame,
    usage: Usage,
) -> dg.Output[Checkpoint]:
    """The model with its accuracy on held-out pairs that it was not trained on."""
    held_out = compared.filter(pl.col("split").is_in(HELD_OUT)).select("prompt", "answer", "response").rows()
    judged = scorer.compare(made, held_out)
    measured = [
        Metric("held_out_accuracy", metrics.mean(judged.margins > 0), n=len(held_out)),
        *metrics.generating(usage),
        *(metrics.training(summary) if summary else []),
        *metrics.scoring(judged.usage),
    ]
    shown = training_log(summary) if summary else {}
    return checkpoint_output(context, services, made, measured, score_convention=judged.convention, **shown)
