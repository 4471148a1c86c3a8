"""How M_t compares with M_0 and with M_{t-1} on held-out prompts, and the judge that says so.

Paper (section 3): AlpacaEval 2, Arena-Hard and MT-Bench with a GPT-4 judge, and the Open LLM leaderboard.
Here: the three models answer the held-out seed prompts, with a sampling of their own and as often as `evaluation.samples`
says. A judge that took no part in training compares the answers: by default a reward model trained from M_0 on rows of the
seed that nothing else reads, with another random seed. It needs no download, but it learned from the same kind of data as the
scorer and starts from the same model, so it is a weaker witness than GPT-4; `judge.server` adds any model with OpenAI's chat
API. The scorer's verdict is shown with theirs, marked as that of a judge that took part in training. A judge that reads two
answers together reads them in both orders. Where the independent judge is not right about held-out gold more often than
chance (scorers.py), a sentence stands in place of its win rates. Win rates come with intervals over prompts; as in
AlpacaEval 2, controlled for length; and for the prompts where neither M_t's nor M_0's answer was cut at the token limit. Also
as in AlpacaEval 2, two rows beside those of M_t show what form alone wins: M_0's answers trimmed to the first half of their
sentences, and M_0's answers when it is asked for long ones. All is measured on two splits: the gate reads dev, tables report
test.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import dagster as dg
import polars as pl

from resources.generation.language_model import Usage
from resources.judging.judge import Judge
from resources.judging.judge_choice import INDEPENDENT, open_judges
from resources.scoring.scorer import ScoringUsage
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from synpo_assets.evaluation.gold_comparison import gain_metric
from synpo_assets.graph import metrics
from synpo_assets.graph.boosting import FORMS, boosting_table
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.evaluation_schemas import Evaluation
from synpo_assets.graph.metrics import ENDING_COUNTS, Metric, MetricName, judge_doubt
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.graph.tables import Table
from synpo_assets.method.cut import first_half, whole_answers
from synpo_assets.method.evaluation import outcome_name, points_over_null, win_rates, wins_by_ending
from synpo_assets.method.outcomes import outcomes
from synpo_assets.method.quality import answer_figures
from synpo_assets.method.ranking import repeated_prompts
from synpo_assets.method.seed import IS_HELD_OUT
from synpo_assets.method.templates import prompt_requests, verbose_message
from synpo_assets.stages.scorers import comparison_tokens, reads_answers_alone

# Whose answers are compared with whose.
COMPARISONS = (("candidate", "initial"), ("candidate", "previous"), *((form, "initial") for form in FORMS))

# What decides answers to held-out prompts, and what all judges say of them.
JUDGING_READS = (
    "evaluation.sampling",
    "evaluation.samples",
    "scorer.judging_convention",
    "scorer.max_length",
    "judge.max_length",
    "judge.server",
)
OUTCOME_COUNTS: tuple[tuple[MetricName, str], ...] = (("wins", "wins"), ("ties", "ties"), ("losses", "losses"))
EVERY_COUNT: tuple[tuple[MetricName, str], ...] = (
    ("pairs_alike_in_length", "alike_in_length"), *OUTCOME_COUNTS, ("no_verdicts", "no_verdict"),
)  # fmt: skip


def _cost(sizes: Sizes) -> list[Work]:
    """The scorer reads the answers of M_t and M_0 and gold; the judge has read those of M_0 and M_{t-1} before."""
    alone, answers = reads_answers_alone(sizes.settings), sizes.held_out_answers
    written = comparison_tokens(sizes, sizes.judged, sizes.judged, judging=True)
    gold = sizes.asked + sizes.gold if alone else comparison_tokens(sizes, sizes.gold, sizes.judged, judging=True)
    previous = [] if alone else [Work("score", answers * written, later_only=True)]
    return [
        Work("generate", answers * sizes.judged),
        Work("score", answers * (written + gold)),
        Work("score", answers * (sizes.asked + sizes.judged)),
        *previous,
    ]


@Stage(
    Evaluation,
    group="evaluation",
    work=("generates", "scores"),
    reads=JUDGING_READS,
    samplings=lambda settings: [settings.evaluation.sampling],
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
    """Held-out answers of M_t, compared with those of M_0 and M_{t-1} by each judge; rewards by the scorer.

    A judge prefers M_t where the interval of its win rate over M_0 lies above one half, also at equal length, and above what
    M_0's own answers win in another form: `win_rate_gain` is M_t's win rate less that null's, over the same prompts.
    """
    models = {"candidate": model_checkpoint, "previous": policy, "initial": initial_policy}
    texts, by_split, usage = _answers(services, models, seed_pairs)
    rewards, convention, rewarding = _rewards(services, texts)
    labels, judged, judging = judged_by_all(services, texts, COMPARISONS)
    shas = {f"{name}_checkpoint_sha": pl.lit(model.sha) for name, model in models.items()}
    frame = texts.with_columns(*rewards, *judged, **shas, iteration=pl.lit(iteration_of(context), pl.Int64))
    frame = with_all_columns(frame, Evaluation)
    random_seed = services.settings.random_seed
    counted = {
        str(split): {
            "win_rates": win_rates(rows, labels, COMPARISONS, random_seed), "wins_by_ending": wins_by_ending(rows, labels),
        }
        for (split,), rows in frame.group_by("split")
    }  # fmt: skip
    # What people look for comes first.
    measured = metrics.by_split(
        frame, lambda rows: held_out_metrics(rows, counted[rows["split"][0]], model_checkpoint.sha)
    )
    measured += [*by_split, *metrics.generating(usage), *metrics.scoring(rewarding, *judging)]
    doubt = judge_doubt(services.metrics)
    boosting, tables = boosting_table(context, services, measured, doubt), _tables(counted["test"], doubt)
    shown = {"boosting": boosting, **tables, "judges": "; ".join(labels.values()), "score_convention": convention}
    shown |= doubted_rates(measured, doubt)
    return table_output(context, services, frame, measured, **shown, **made_by(model_checkpoint))


def _answers(
    services: Services, models: Mapping[str, Checkpoint], seed_pairs: pl.DataFrame
) -> tuple[pl.DataFrame, list[Metric], Usage]:
    """The held-out rows with the answers of each model, what needs no judge to measure, and the cost."""
    options = services.settings.evaluation
    held_out = seed_pairs.filter(IS_HELD_OUT).select("prompt_id", "split", "prompt", "answer")
    frame = repeated_prompts(held_out, options.samples)
    asked = list(prompt_requests(frame, "sample_id"))
    wordier = [
        (f"{row_id} verbose", verbose_message(prompt)) for row_id, prompt in frame.select("sample_id", "prompt").rows()
    ]
    # In one batch, and before M_{t-1}, which is M_0 at first.
    both, cost = services.language_model.answer(models["initial"], [*asked, *wordier], options.sampling)
    answered = {"initial": both.head(frame.height), "verbose": both.tail(frame.height)}
    # What was asked to be long may be cut; that is no fault of the token limit, and counts nowhere.
    cut = answered["initial"]["finish_reason"].to_list().count("length")
    cost = dataclasses.replace(cost, rows=frame.height, cut=cut)
    for name in ("candidate", "previous"):
        answered[name], usage = services.language_model.answer(models[name], asked, options.sampling)
        cost += usage
    columns = {f"{name}_response": whole_answers(answers) for name, answers in answered.items()}
    columns["trimmed_response"] = pl.Series(map(first_half, columns["initial_response"]), dtype=pl.String)
    columns |= {f"{name}_cut": answers["finish_reason"] == "length" for name, answers in answered.items()}
    # Where there is nothing to leave out, nothing is compared.
    columns["trimmed_cut"] = columns["trimmed_response"] == ""
    measured = [
        metric
        for name, model in models.items()
        for metric in metrics.by_split(
            answered[name].with_columns(frame["split"]), partial(form_metrics, name, model.sha)
        )
    ]
    return frame.with_columns(**columns), measured, cost


def form_metrics(model: str, sha: str, answers: pl.DataFrame) -> list[Metric]:
    """What can be said of a model's answers without asking any model."""
    found, names = answer_figures(answers), tuple[MetricName, ...](("mean_characters", "mean_repetition", "cut_share"))
    return [Metric(name, found[name], of=model, n=answers.height, checkpoint_sha=sha) for name in names]


def _rewards(services: Services, texts: pl.DataFrame) -> tuple[list[pl.Series], str, ScoringUsage]:
    """The scorer's values of the gold answers, M_t's and M_0's, what their differences mean, and the cost."""
    reward_model = services.checkpoints.current("reward_model", None)
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


def _tables(counted: Mapping[str, pl.DataFrame], doubt: str | None) -> dict[str, dg.TableMetadataValue]:
    """What the judges say, as tables; without the rates of the independent judge where it is in doubt, whose counts stay."""
    rates = pl.col(pl.Float64)
    certain = pl.when(pl.col("label") != INDEPENDENT).then(rates) if doubt else rates
    return {name: table_metadata(table.with_columns(certain)) for name, table in counted.items()}


def doubted_rates(measured: Sequence[Metric], doubt: str | None) -> dict[str, str]:
    """What stands in the metadata in place of the independent judge's rates where it cannot judge."""
    rates = [each.label for each in measured if doubt and each.by == INDEPENDENT and "win_rate" in each.metric]
    return dict.fromkeys(rates, str(doubt))


def judged_by_all(
    services: Services, texts: pl.DataFrame, comparisons: Sequence[tuple[str, str]]
) -> tuple[dict[str, str], list[pl.Series], list[ScoringUsage]]:
    """The labels of all judges of the settings by their names, what each says of the answers compared, and the cost."""
    scorers = {name: services.checkpoints.current(name, None) for name in ("judge_model", "reward_model")}
    judges = open_judges(services.settings.judge, services.scorer, **scorers)
    return {judge.name: judge.label for judge in judges}, *judged_by(judges, texts, comparisons)


def judged_by(
    judges: Sequence[Judge], texts: pl.DataFrame, comparisons: Sequence[tuple[str, str]]
) -> tuple[list[pl.Series], list[ScoringUsage]]:
    """What each judge says of the answers compared, and the cost; where nothing is left of a cut answer, no verdict."""
    columns, usages = [], []
    for judge in judges:
        for model, opponent in comparisons:
            compared = judge.compare(texts.select("prompt", f"{model}_response", f"{opponent}_response").rows())
            left = [~texts[f"{name}_cut"] | (texts[f"{name}_response"] != "") for name in (model, opponent)]
            margins = pl.select(pl.when(left[0] & left[1]).then(compared.margins)).to_series()
            columns.append(outcomes(margins).alias(outcome_name(judge.name, model, opponent)))
            usages.append(compared.usage)
    return columns, usages


def with_all_columns(frame: pl.DataFrame, schema: type[Table]) -> pl.DataFrame:
    """The columns of a schema, in order; those of a judge that was not asked are empty."""
    columns = schema.to_schema().columns
    missing = [pl.lit(None, pl.String).alias(name) for name in columns if name not in frame.columns]
    return frame.with_columns(missing).select(*columns)


def held_out_metrics(frame: pl.DataFrame, counted: Mapping[str, pl.DataFrame], sha: str) -> list[Metric]:
    """Of one split: win rates with their intervals and counts, also by ending, and mean rewards."""
    sides, prompts = {"gold": "answer", "candidate": "candidate", "initial": "initial"}, frame["prompt_id"].n_unique()
    measured = [Metric("held_out_prompts", prompts)]
    for rate in counted["win_rates"].iter_rows(named=True):
        # M_t's sha with M_t alone: the other answers are M_0's.
        model = rate["model"]
        measured += rate_metrics(rate, model, sha if model == "candidate" else None, EVERY_COUNT)
    for rate in counted["win_rates"].filter(pl.col("model").is_in(list(FORMS))).iter_rows(named=True):
        more, null = points_over_null(frame, rate["judge"], rate["model"]), rate["model"]
        measured.append(gain_metric("win_rate_gain", more["gain"], null, sha, rate["label"], more["prompt_id"]))
    rewards = [
        Metric("held_out_reward", metrics.mean(frame[f"{column}_score"]), of=side, n=prompts)
        for side, column in sides.items()
    ]
    return [*measured, *rewards, *_ending_metrics(counted["wins_by_ending"], sha)]


def rate_metrics(
    rate: Mapping[str, Any], model: str, sha: str | None, counts: Sequence[tuple[MetricName, str]]
) -> list[Metric]:
    """A row of `win_rates`: both rates with their intervals, and counts, each by the column that holds it."""
    who = {"of": model, "over": rate["opponent"], "by": rate["label"], "checkpoint_sha": sha}
    rates: tuple[tuple[MetricName, str, str, str], ...] = (
        ("win_rate", "win_rate", "low", "high"),
        ("length_controlled_win_rate", "length_controlled", "length_controlled_low", "length_controlled_high"),
    )
    return [
        *(
            Metric(name, rate[value], low=rate[low], high=rate[high], n=rate["prompts"], **who)
            for name, value, low, high in rates
        ),
        *(
            Metric(name, rate[column], n=rate["prompts"] if name == "pairs_alike_in_length" else None, **who)
            for name, column in counts
        ),
    ]


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
