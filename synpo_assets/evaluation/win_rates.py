"""How M_t compares with M_0 and with M_{t-1} on held-out prompts, and the judge that says so.

Paper (section 3): AlpacaEval 2, Arena-Hard and MT-Bench with a GPT-4 judge, and the Open LLM leaderboard.
Here: the three models answer the held-out seed prompts. A judge that took no part in training compares the answers: by
default a reward model trained from M_0 on rows of the seed that nothing else reads, with another random seed. It needs no
download, but it learned from the same kind of data as the scorer and starts from the same model, so it is a weaker witness than
GPT-4; `judge.server` adds any model with OpenAI's chat API. The scorer's verdict is shown with theirs, marked as that of a
judge that took part in training. A judge that reads two answers together reads them in both orders. Win rates come with
intervals over prompts; as in AlpacaEval 2, controlled for length; and for the prompts where neither M_t's nor M_0's answer
was was cut at the token limit. Where the independent judge is not right about held-out gold more often than chance (scorers.py), a
sentence stands in place of its win rates.
"""

from collections.abc import Mapping, Sequence

import dagster as dg
import polars as pl

from resources.generation.language_model import Usage
from resources.judging.judge import Judge
from resources.judging.judge_choice import INDEPENDENT, open_judges
from resources.scoring.scorer import ScoringUsage
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.metrics import ENDING_COUNTS, Metric, MetricName
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.schemas import Evaluation
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.evaluation import outcomes, win_rates, wins_by_ending
from synpo_assets.method.quality import answer_figures
from synpo_assets.method.templates import prompt_requests
from synpo_assets.stages.scorers import comparison_tokens, judge_doubt, reads_answers_alone

# Whose answers the candidate's are compared with.
OPPONENTS = {"initial": "initial_response", "previous": "previous_response"}


def _cost(sizes: Sizes) -> list[Work]:
    """The scorer reads the answers of M_t and M_0 and gold; the judge has read those of M_0 and M_{t-1} before."""
    alone = reads_answers_alone(sizes.settings)
    written = comparison_tokens(sizes, sizes.written, sizes.written, judging=True)
    gold = sizes.asked + sizes.gold if alone else comparison_tokens(sizes, sizes.gold, sizes.written, judging=True)
    previous = [] if alone else [Work("score", sizes.held_out * written, later_only=True)]
    return [
        Work("generate", sizes.held_out * sizes.written),
        Work("score", sizes.held_out * (written + gold)),
        Work("score", sizes.held_out * (sizes.asked + sizes.written)),
        *previous,
    ]


@Stage(
    Evaluation,
    group="evaluation",
    work=("generates", "scores"),
    reads=("responses", "scorer.judging_convention", "scorer.max_length", "judge.max_length", "judge.server"),
    samplings=lambda settings: [settings.responses.sampling],
    cost=_cost,
    made_from={"prompt_id": "seed_pairs"},
    deps=("reward_model", "judge_model"),
)
def evaluation(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    policy: Checkpoint,
    initial_policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """Held-out answers of M_t, compared with those of M_0 and M_{t-1} by each judge; rewards by the scorer."""
    models = {"candidate": model_checkpoint, "previous": policy, "initial": initial_policy}
    texts, measured = _answers(services, models, seed_pairs)
    scorers = {name: services.checkpoints.current(name, None) for name in ("judge_model", "reward_model")}
    rewards, convention, rewarding = _rewards(services, texts, scorers["reward_model"])
    judges = open_judges(services.settings.judge, services.scorer, **scorers)
    judged, judging = _judged(texts, judges)
    shas = {f"{name}_checkpoint_sha": pl.lit(model.sha) for name, model in models.items()}
    frame = texts.with_columns(*rewards, *judged, **shas, iteration=pl.lit(iteration_of(context), pl.Int64))
    frame = frame.with_columns(
        pl.lit(None, pl.String).alias(name) for name in Evaluation.to_schema().columns if name not in frame.columns
    ).select(*Evaluation.to_schema().columns)
    labels = {judge.name: judge.label for judge in judges}
    rates = win_rates(frame, labels, OPPONENTS, "candidate_response", services.settings.random_seed)
    # What people look for comes first.
    by_ending = wins_by_ending(frame, labels)
    measured = [
        *_held_out_metrics(frame, rates, model_checkpoint.sha),
        *_ending_metrics(by_ending, model_checkpoint.sha),
        *measured,
    ]
    measured += metrics.scoring(sum(judging, rewarding))
    tables = {"win_rates": table_metadata(rates), "wins_by_ending": table_metadata(by_ending)}
    shown = tables | {"judges": "; ".join(labels.values()), "score_convention": convention}
    if sentence := judge_doubt(services):
        labels_of_rates = [each.label for each in measured if each.by == INDEPENDENT and "win_rate" in each.metric]
        shown |= {key: sentence for label in labels_of_rates for key in (label, f"{label}: 95 % interval")}
    return table_output(context, services, frame, measured, **shown, **made_by(model_checkpoint))


def _answers(
    services: Services, models: Mapping[str, Checkpoint], seed_pairs: pl.DataFrame
) -> tuple[pl.DataFrame, list[Metric]]:
    """The held-out rows with the answers of each model, most of them written earlier, and what needs no judge to measure."""
    held_out = seed_pairs.filter(split="held_out").select("prompt_id", "prompt", "answer")
    requests = prompt_requests(held_out)
    sampling, usages, written = services.settings.responses.sampling, list[Usage](), dict[str, pl.DataFrame]()
    for name, model in models.items():
        written[name], usage = services.language_model.answer(model, requests, sampling)
        usages.append(usage)
    measured = []
    names: tuple[MetricName, ...] = ("mean_characters", "mean_repetition", "cut_share")
    for row in answer_figures(written).iter_rows(named=True):
        whose = {"of": row["model"], "n": held_out.height, "checkpoint_sha": models[row["model"]].sha}
        measured += [Metric(name, row[name], **whose) for name in names]
    measured += metrics.generating(*usages)
    columns = {f"{name}_response": frame["text"] for name, frame in written.items()}
    columns |= {f"{name}_cut": written[name]["finish_reason"] == "length" for name in ("candidate", "initial")}
    return held_out.with_columns(**columns), measured


def _rewards(
    services: Services, texts: pl.DataFrame, reward_model: Checkpoint
) -> tuple[list[pl.Series], str, ScoringUsage]:
    """The scorer's values of the gold answers, M_t's and M_0's, what their differences mean, and the cost."""
    candidate, gold = (
        services.scorer.compare(reward_model, texts.select("prompt", side, "initial_response").rows(), judging=True)
        for side in ("candidate_response", "answer")
    )
    # Numbers of different comparisons have no common zero: all three are stated relative to M_0's in the first one.
    values = {
        "answer_score": candidate.second_scores + gold.margins,
        "candidate_score": candidate.first_scores,
        "initial_score": candidate.second_scores,
    }
    return [value.alias(name) for name, value in values.items()], candidate.convention, candidate.usage + gold.usage


def _judged(texts: pl.DataFrame, judges: Sequence[Judge]) -> tuple[list[pl.Series], list[ScoringUsage]]:
    """What each judge says of M_t's answers compared with those of each opponent, and the cost."""
    columns, usages = [], []
    for judge in judges:
        for opponent, column in OPPONENTS.items():
            compared = judge.compare(texts.select("prompt", "candidate_response", column).rows())
            columns.append(outcomes(compared.margins).alias(f"{judge.name}_over_{opponent}"))
            usages.append(compared.usage)
    return columns, usages


def _held_out_metrics(frame: pl.DataFrame, rates: pl.DataFrame, sha: str) -> list[Metric]:
    """Mean rewards, and win rates with their intervals and counts."""
    sides = {"gold": "answer", "candidate": "candidate", "initial": "initial"}
    measured = [Metric("held_out_prompts", frame.height)]
    measured += [
        Metric("held_out_reward", metrics.mean(frame[f"{column}_score"]), of=side, n=frame.height)
        for side, column in sides.items()
    ]
    for rate in rates.iter_rows(named=True):
        who = {"of": "candidate", "over": rate["opponent"], "by": rate["label"], "checkpoint_sha": sha}
        measured += [
            Metric("win_rate", rate["win_rate"], low=rate["low"], high=rate["high"], n=rate["prompts"], **who),
            Metric(
                "length_controlled_win_rate", rate["length_controlled"], low=rate["length_controlled_low"],
                high=rate["length_controlled_high"], n=rate["prompts"], **who,
            ),
            Metric("pairs_alike_in_length", rate["alike_in_length"], n=rate["prompts"], **who),
            Metric("wins", rate["wins"], **who),
            Metric("ties", rate["ties"], **who),
            Metric("losses", rate["losses"], **who),
            Metric("no_verdicts", rate["no_verdict"], **who),
        ]  # fmt: skip
    return measured


def _ending_metrics(by_ending: pl.DataFrame, sha: str) -> list[Metric]:
    """Wins, ties and losses by which answers ended, and the win rate where both did."""
    measured = []
    for row in by_ending.iter_rows(named=True):
        who = {"of": "candidate", "over": "initial", "by": row["label"], "checkpoint_sha": sha}
        if row["ended"] == "both_ended":
            rate = {name: row[name] for name in ("low", "high")}
            measured.append(Metric("win_rate_both_ended", row["win_rate"], n=row["prompts"], **rate, **who))
        counts = (row[outcome] for outcome in ("wins", "ties", "losses"))
        measured += [
            Metric(name, count, **who) for name, count in zip(ENDING_COUNTS[row["ended"]], counts, strict=True)
        ]
    return measured
