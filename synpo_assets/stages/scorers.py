"""The scorer F that filters pairs, and the judge that takes no part in training.

Paper (section 2.3): PairRM or ArmoRM score the two sides of a pair; GPT-4 judges the result (section 3).
Here: by default the scorer is a Bradley-Terry reward model trained on the seed, which needs no download; PairRM and ArmoRM
are settings. The judge is such a model too, with another random seed, or a published reward model. What is trained here
reads rows of the seed that nothing else reads:

- The judge, because it must not share data with what it judges.
- The scorer, because it also filters the improver's examples (improver.py): on its own training rows nearly all gold passes,
  and the filter says nothing. Two half scorers, each for the rows that the other was trained on, would read every row, but
  they cost a second training and a second checkpoint, have half the rows each, and their scores are in different units. So
  rows of its own it is: they are lost to generator and improver. Where `train_limit` leaves rows unused, they cost nothing.

With `scorer.kind: verifier` a program decides where a prompt has rules (method/verifiable.py), and the trained reward model
elsewhere. The judge stays what it is: a program that checks rules takes part in training, and judges nothing else.

Both learn that gold is better than M_0's answer, than gold of another prompt, and than damaged gold; what was cut is
trimmed first. On held-out pairs of each kind their accuracy is reported beside that of judges that cannot read.
"""

import dataclasses

import dagster as dg
import polars as pl

from resources.judging.judge_choice import judge_scorer
from resources.scoring.published import fetch_reward_model
from resources.scoring.scorer import SCORERS, RewardScorer, ScoringUsage
from resources.settings.method import PublishedScorer, Scorer
from resources.settings.settings import Settings
from resources.settings.training import Training
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work, training_work
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.presentation import checkpoint_output, training_log
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.damage import DAMAGES
from synpo_assets.method.judging import TRAINED_PAIRS, accuracy_by_kind, held_out_pairs, training_pairs
from synpo_assets.method.seed import IS_HELD_OUT
from synpo_assets.method.templates import prompt_requests
from synpo_assets.method.verifiable import RULES_HOLD, has_rules, rule_scores
from synpo_assets.stages.training import train_on_table

# The columns of the accuracy of judges that cannot read, and what they are called.
NULLS = {"length_alone": "length alone", "ending_alone": "ending alone"}


@dataclasses.dataclass(frozen=True)
class Scored:
    """What F says of two answers to each prompt, and what that cost."""

    rows: pl.DataFrame  # first_score, second_score, margin and score_convention, in the order asked.
    usage: ScoringUsage

    @property
    def conventions(self) -> str:
        """What the margins are, as the UI shows it."""
        return ", ".join(self.rows["score_convention"].unique().sort())


def scored_answers(services: Services, reward_model: Checkpoint, asked: pl.DataFrame) -> Scored:
    """F: compares the answers `first` and `second` to each prompt, by its `constraints` where it has some, else by the scorer."""
    ruled, order = has_rules(asked), pl.int_range(asked.height, eager=True)
    compared = services.scorer.compare(reward_model, asked.filter(~ruled).select("prompt", "first", "second").rows())
    by_scorer = pl.DataFrame({"first_score": compared.first_scores, "second_score": compared.second_scores})
    by_rules = rule_scores(asked.filter(ruled))
    found = pl.concat([
        by_scorer.with_columns(place=order.filter(~ruled), score_convention=pl.lit(compared.convention)),
        by_rules.with_columns(place=order.filter(ruled), score_convention=pl.lit(RULES_HOLD)),
    ])  # fmt: skip
    margin = pl.col("first_score") - pl.col("second_score")
    return Scored(found.sort("place").drop("place").with_columns(margin=margin), compared.usage)


def reads_answers_alone(settings: Settings) -> bool:
    """Whether the scorer reads one answer at a time, so that an answer which it has read is not read again."""
    return SCORERS[settings.scorer.kind].answers_per_reading == 1


def comparison_tokens(sizes: Sizes, first: float, second: float, judging: bool = False) -> float:
    """Tokens that the scorer reads to compare two answers of some lengths, for pairs or to judge models."""
    scorer, lengths = sizes.settings.scorer, {"first": first, "second": second}
    convention = SCORERS[scorer.kind].conventions[scorer.judging_convention if judging else scorer.convention]
    return sum(sizes.asked + sum(lengths[side] for side in sides) for sides in convention.readings)


def _made_cost(sizes: Sizes, training: Training | None, rows: int, scoring: float) -> list[Work]:
    """What it takes to train a model on so many rows of the seed, and to try it on the held-out ones.

    M_0 answers the held-out ones once for scorer and judge.
    """
    length = 2 * sizes.asked + sizes.gold + sizes.written
    trained = [training_work(training, TRAINED_PAIRS * rows, length)] if training else []
    return [*trained, Work("generate", (rows + sizes.held_out / 2) * sizes.written), Work("score", scoring)]


def _reward_model_cost(sizes: Sizes) -> list[Work]:
    scorer = sizes.settings.scorer
    training = None if isinstance(scorer, PublishedScorer) else scorer.training
    if reads_answers_alone(sizes.settings):
        return _made_cost(sizes, training, sizes.scorer, _held_out_tokens(sizes))
    pairs = 2 * comparison_tokens(sizes, sizes.gold, sizes.written, judging=True)
    pairs += (1 + len(DAMAGES)) * comparison_tokens(sizes, sizes.gold, sizes.gold, judging=True)
    return _made_cost(sizes, training, sizes.scorer, sizes.held_out * pairs)


def _held_out_tokens(sizes: Sizes) -> float:
    """What a reward model reads of the held-out pairs: M_0's answers whole and trimmed, gold, another gold and its damages."""
    return sizes.held_out * (2 * (sizes.asked + sizes.written) + (2 + len(DAMAGES)) * (sizes.asked + sizes.gold))


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
    """The scorer F: trained on rows of the seed of its own, or a published reward model (paper, section 2.3).

    `held_out_accuracy` says how often it prefers the better answer of pairs that it has not seen, by kind; one half is
    guessing, and a filter that guesses is none.
    """
    scorer, random_seed = services.settings.scorer, services.settings.random_seed
    return _made(context, services, initial_policy, seed_pairs, "scorer", scorer, services.scorer, random_seed)


def _judge_model_cost(sizes: Sizes) -> list[Work]:
    judge = sizes.settings.judge
    training = judge.training if judge.kind == "trained" else None
    return _made_cost(sizes, training, sizes.judge, _held_out_tokens(sizes))


@Stage(
    group="seed",
    checkpoint=True,
    once=True,
    work=("generates", "trains", "scores"),
    reads=("judge.scorer", "responses"),
    samplings=lambda settings: [settings.responses.sampling],
    cost=_judge_model_cost,
)
def judge_model(
    context: dg.AssetExecutionContext,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[Checkpoint]:
    """The independent judge: trained on rows of the seed that no other training reads, or a published reward model.

    `held_out_accuracy` of pairs of which both answers ended says whether its win rates mean anything. If its interval holds one
    half, they are not shown.
    """
    judge, random_seed = services.settings.judge, services.settings.random_seed + 1
    reader = judge_scorer(judge, services.scorer)
    return _made(context, services, initial_policy, seed_pairs, "judge", judge.scorer, reader, random_seed)


def _made(
    context: dg.AssetExecutionContext,
    services: Services,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    section: str,
    scorer: Scorer,
    reader: RewardScorer,
    random_seed: int,
) -> dg.Output[Checkpoint]:
    """A reward model from M_0 on gold over worse answers, or the published one that the section of the settings names.

    With its accuracy on held-out pairs of each kind, which it was not trained on; `reader` compares them with it.
    """
    # The rows of scorer and judge in one batch, which takes little longer than one of them: the other stage finds the answers.
    asked = seed_pairs.filter(pl.col("split") != "train")
    sampling, summary = services.settings.responses.sampling, None
    written, usage = services.language_model.answer(initial_policy, prompt_requests(asked), sampling)
    answered = asked.with_columns(response=written["text"].str.strip_chars(), cut=written["finish_reason"] == "length")
    if isinstance(scorer, PublishedScorer):
        weights, origin = fetch_reward_model(scorer, services.settings.engine.trust_remote_code, section)
        made = services.checkpoints.adopt(context, weights, origin)
    else:
        pairs = training_pairs(answered.filter(split=section), random_seed)
        made, summary = train_on_table(
            context, services, "reward", initial_policy, pairs, scorer.training, random_seed, seed_pairs=seed_pairs
        )
    held_out = held_out_pairs(answered.filter(IS_HELD_OUT), services.settings.random_seed)
    judged = reader.compare(made, held_out.select("prompt", "better", "worse").rows(), judging=True)
    accuracy = accuracy_by_kind(held_out, judged.margins)
    measured = [
        *_accuracy_metrics(accuracy),
        *metrics.generating(usage),
        *(metrics.training(summary) if summary else []),
        *metrics.scoring(judged.usage),
    ]
    shown = {"held_out_accuracy": table_metadata(accuracy)} | (training_log(summary) if summary else {})
    return checkpoint_output(context, services, made, measured, score_convention=judged.convention, **shown)


def _accuracy_metrics(accuracy: pl.DataFrame) -> list[Metric]:
    measured = []
    for row in accuracy.iter_rows(named=True):
        whose = {"of": row["kind"], "n": row["pairs"]}
        measured.append(Metric("held_out_accuracy", row["accuracy"], low=row["low"], high=row["high"], **whose))
        measured += [Metric("held_out_accuracy", row[column], by=label, **whose) for column, label in NULLS.items()]
    return measured


def margin_over_first(taken: pl.DataFrame) -> Metric:
    """Mean margin by the scorer of the samples taken over the first ones; where rules decide, it is in other units."""
    by_scorer = taken.filter(~has_rules(taken))
    return Metric("mean_margin_over_first_sample", metrics.mean(by_scorer["margin_over_first"]), n=by_scorer.height)
