"""Whether M_t becomes the policy of the next iteration: the gate.

Paper (section 3): four iterations, "until performance no longer improves"; people watch the benchmarks. Its own runs show
why one metric is not enough: Arena-Hard falls at iteration 4 while AlpacaEval rises, and GSM8k of Mistral falls by nine
points.
Here: the section `gate` of the settings holds limits for several metrics of the dev split. By default M_t must be better
than M_0 at equal length, and better than M_{t-1}, each by the low end of an interval: a model that did not change passes
in a share of gate.error_rate at most, and in more where a search chose it as the best of several on the same prompts. A
judge that is right about held-out gold no more often than chance has measured nothing. Where all metrics keep to their
limits, M_t is reported as `policy[t+1]`; where one does not, or was not measured, nothing is reported and the next
iteration refuses with the sentence that stands here. The verdict is data: a refused M_t stays, and may be judged again
under other limits.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import dagster as dg
import polars as pl

from resources.common.errors import FinalError
from resources.common.text import asset_label
from resources.judging.judge_choice import INDEPENDENT, TOOK_PART
from resources.settings.evaluation import RULE_GAIN, Gate, GateMetric
from resources.storage.checkpoint_store import Checkpoint
from resources.training.history import last_quarter
from synpo_assets.graph.boosting import boosting_table
from synpo_assets.graph.evaluation_schemas import Promotion
from synpo_assets.graph.history import input_version_of, made_again
from synpo_assets.graph.metrics import Metric, Metrics, judge_doubt, recorded
from synpo_assets.graph.partitions import iteration_of, partition_key
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.gate import gate_power, gate_rows, verdict
from synpo_assets.method.judging import doubt
from synpo_assets.method.length_control import (
    TOO_FEW_ALIKE,
    alike_in_length,
    is_extrapolated,
    length_controlled_interval,
)
from synpo_assets.method.outcomes import NO_VERDICT, win_rate_interval
from synpo_assets.stages.loop import next_policy, report_policy

# Metrics that are the independent judge's word.
BY_JUDGE: frozenset[str] = frozenset({
    "win_rate_over_initial", "win_rate_over_initial_low", "win_rate_over_previous", "win_rate_over_previous_low",
    "length_controlled_win_rate_over_initial", "length_controlled_win_rate_over_initial_low",
})  # fmt: skip
CONTROLLED = "length_controlled_win_rate_over_initial"
CONTROLLED_LOW = f"{CONTROLLED}_low"
NOT_CONTROLLED = (
    f"{TOO_FEW_ALIKE}: more held-out prompts are needed (seed_data.held_out, held_out_limit), or a limit of another "
    "metric"
)
# Metrics of prompt_diversity.
OF_PROMPTS: frozenset[GateMetric] = frozenset({"prompt_similarity", "prompt_similarity_to_seed"})


@Stage(
    Promotion,
    group="evaluation",
    kinds=("polars",),
    reads=("gate",),
    deps=("model_checkpoint", "evaluation", "instruction_following", "gold_comparison", "prompt_diversity"),
    code=lambda settings: [doubt],
)
def promotion(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.Output[pl.DataFrame]:
    """Each metric of M_t that the gate limits; if all pass, M_t is reported as the policy of the next iteration.

    One row for each limit, with the value and whether it passes. Not promoted is a result and no failure: the check `promoted`
    turns yellow, and the next iteration refuses with the reason.
    """
    gate, judged = services.settings.gate, services.checkpoints.current("model_checkpoint", context.partition_key)
    measured, doubted = recorded(services.metrics, context.partition_key), judge_doubt(services.metrics)
    refuse_other_evaluation(measured, judged)
    refuse_other_pairs(context.instance, judged)
    if OF_PROMPTS & (gate.minimum.keys() | gate.maximum.keys()):
        refuse_other_prompts(context.instance, judged)
    answers = services.tables.read("evaluation", context.partition_key).filter(split="dev")
    values = gate_metrics(measured) | lowest_rates(answers, gate.error_rate, services.settings.random_seed)
    values |= training_metrics(services.checkpoints.training_log("model_checkpoint", context.partition_key))
    rows = judged_by_gate(gate, values, doubted)
    sentence = verdict(rows, judged.label, asset_label("policy", partition_key(iteration_of(context) + 1)))
    promoted = all(row["passed"] for row in rows)
    if promoted:
        report_policy(context, services, judged)
    (context.log.info if promoted else context.log.warning)(sentence)
    frame = pl.DataFrame(
        [{**row, "checkpoint_sha": judged.sha, "iteration": iteration_of(context)} for row in rows],
        schema=Promotion.empty().schema,
    )
    power = gate_power(answers["prompt_id"].n_unique(), gate.minimum, gate.error_rate)
    outcome = Metric("promoted", float(promoted), of="candidate", checkpoint_sha=judged.sha)
    boosting = boosting_table(context, services, [outcome], doubted)
    shown = {"boosting": boosting, "verdict": sentence, "next": next_policy(context), "power": power}
    return table_output(context, services, frame, [outcome], **shown, **made_by(judged))


def judged_by_gate(gate: Gate, values: Mapping[str, float | None], doubted: str | None) -> list[dict[str, Any]]:
    """A row for each limit of the gate, with the value and whether it passes; `doubted` is why the judge's word says nothing."""
    unmeasured = {name: NOT_CONTROLLED for name in (CONTROLLED, CONTROLLED_LOW) if values[name] is None}
    # A judge that cannot judge has measured nothing.
    unmeasured |= dict.fromkeys(BY_JUDGE, doubted.rstrip(".")) if doubted else {}
    return gate_rows({**values, **dict.fromkeys(unmeasured)}, gate.minimum, gate.maximum, unmeasured)


def refuse_other_evaluation(measured: Metrics, judged: Checkpoint) -> None:
    """Raises a sentence if the newest evaluation, or another measurement of M_t, is not of this checkpoint."""
    if "evaluation" not in measured.assets:
        label = asset_label("evaluation", judged.partition)
        raise FinalError(f"{judged.label} was not evaluated, so the gate cannot judge it: materialize {label} first.")
    # What was not measured at all is the gate's to judge.
    of_another = measured.frame.filter(
        (pl.col("asset") != "promotion") & (pl.col("of") == "candidate") & (pl.col("checkpoint_sha") != judged.sha)
    )
    for asset, sha in of_another.select("asset", "checkpoint_sha").unique("asset", maintain_order=True).iter_rows():
        label = asset_label(asset, judged.partition)
        raise FinalError(
            f"{label} is about {sha[:16]}, but {judged.label} is {judged.sha[:16]} by now: materialize {label} again."
        )


def refuse_other_pairs(instance: dg.DagsterInstance, judged: Checkpoint) -> None:
    """Raises a sentence if pairs were made again after M_t was trained on them."""
    learned = judged.manifest["trained_on"]
    history, evaluation = (asset_label(name, judged.partition) for name in ("preference_history", "evaluation"))
    for label, version in made_again(instance, learned).items():
        raise FinalError(
            f"{judged.label} was trained on version {learned[label]} of {label}, which has version {version} by now: "
            f"materialize {history}, {judged.label} and {evaluation} again."
        )


def refuse_other_prompts(instance: dg.DagsterInstance, judged: Checkpoint) -> None:
    """Raises a sentence if the prompts whose diversity was measured are not those that were answered."""
    measured, answered = (
        input_version_of(instance, asset, judged.partition, "synthetic_prompts")
        for asset in ("prompt_diversity", "base_responses")
    )
    if None not in (measured, answered) and measured != answered:
        diversity, answers, prompts = (
            asset_label(name, judged.partition) for name in ("prompt_diversity", "base_responses", "synthetic_prompts")
        )
        raise FinalError(
            f"{diversity} is about another version of {prompts} than {answers} answers: materialize the older of the two again, "
            "and what follows from it."
        )


def gate_metrics(measured: Metrics) -> dict[str, float | None]:
    """The metrics of an iteration that the gate may judge, those of held-out prompts on dev; None where one was not recorded."""
    value = partial(measured.value, split="dev")
    wins = {"of": "candidate", "over": "initial", "by": INDEPENDENT}
    lengths = [value("mean_characters", side) for side in ("candidate", "initial")]
    alike, seed_alike = value("mean_similarity", "synthetic"), value("mean_similarity", "seed")
    after, before = value("held_out_reward", "candidate"), value("held_out_reward", "initial")
    of_rules = {f"{RULE_GAIN}{gain.by}": gain.value for gain in measured.every("rule_rate_gain", split="dev")}
    return of_rules | {
        "win_rate_over_initial": value("win_rate", **wins),
        CONTROLLED: value("length_controlled_win_rate", **wins),
        "length_ratio": lengths[0] / lengths[1] if lengths[0] is not None and lengths[1] else None,
        "win_rate_over_previous": value("win_rate", "candidate", over="previous", by=INDEPENDENT),
        "win_rate_over_initial_by_scorer": value("win_rate", "candidate", over="initial", by=TOOK_PART),
        "held_out_reward_gain": None if after is None or before is None else after - before,
        "verifiable_rate_gain": value("verifiable_gain", "candidate", over="initial"),
        "gold_log_likelihood_gain": value("gold_log_likelihood_gain", "candidate", over="initial"),
        "gold_similarity_gain": value("gold_similarity_gain", "candidate", over="initial"),
        "mean_repetition": value("mean_repetition", "candidate"),
        "cut_share": value("cut_share", "candidate"),
        "prompt_similarity": alike,
        "prompt_similarity_to_seed": alike / seed_alike if alike is not None and seed_alike else None,
        "mean_margin": value("mean_margin"),
        "chosen_to_rejected_length": value("chosen_to_rejected_length"),
        "pairs_kept": value("rows", asset="preference_pairs"),
    }


def lowest_rates(answers: pl.DataFrame, error_rate: float, random_seed: int) -> dict[str, float | None]:
    """The low ends of M_t's win rates by the independent judge, which a model that is no better passes this rarely."""
    initial, previous, prompts = answers["judge_over_initial"], answers["judge_over_previous"], answers["prompt_id"]
    lengths, others = (answers[f"{side}_response"].str.len_chars().cast(pl.Int64) for side in ("candidate", "initial"))
    known = prompts.filter(initial != NO_VERDICT).n_unique()
    coverage, extrapolated = (
        1 - 2 * error_rate,
        is_extrapolated(alike_in_length(initial, lengths, others, prompts), known),
    )
    intervals = {
        "win_rate_over_initial_low": (initial, win_rate_interval(initial, prompts, coverage)),
        "win_rate_over_previous_low": (previous, win_rate_interval(previous, prompts, coverage)),
        CONTROLLED_LOW: (
            initial,
            None
            if extrapolated
            else length_controlled_interval(initial, lengths, others, random_seed, prompts, coverage),
        ),
    }
    # With a continuity correction, without which an unchanged model passes more often at some numbers of prompts with a verdict.
    return {
        name: ends[0] - 0.5 / prompts.filter(judged != NO_VERDICT).n_unique() if ends else None
        for name, (judged, ends) in intervals.items()
    }


def training_metrics(log: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What the last quarter of M_t's training says of it."""
    return {"reward_accuracy": last_quarter(entry.get("rewards/accuracies") for entry in log)}
