"""Whether M_t becomes the policy of the next iteration: the gate.

Paper (section 3): four iterations, "until performance no longer improves"; people watch the benchmarks. Its own runs show
why one figure is not enough: Arena-Hard falls at iteration 4 while AlpacaEval rises, and GSM8k of Mistral falls by nine
points.
Here: the section `gate` of the settings holds limits for several figures. Where all keep to them, M_t is reported as
`policy[t+1]`; where one does not, or was not measured, nothing is reported and the next iteration refuses with the
sentence that stands here. The verdict is data: a refused M_t stays, and may be judged again under other limits.
"""

import dagster as dg
import polars as pl
from dagster import DagsterInstance

from resources.common.errors import FinalError
from resources.common.text import asset_label
from resources.settings.evaluation import GateMetric
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from synpo_assets.graph.history import data_version_of, input_version_of, metadata_of
from synpo_assets.graph.partitions import ITERATIONS, iteration_of, partition_key, table
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.schemas import Promotion
from synpo_assets.method import gate as gate_method
from synpo_assets.method.gate import judge, verdict
from synpo_assets.stages.loop import report_policy

# Which assets measure M_t, and record of which checkpoint.
MEASURED_BY = ("evaluation", "instruction_following", "gold_comparison")
# Figures of prompt_diversity.
OF_PROMPTS: frozenset[GateMetric] = frozenset({"prompt_similarity", "prompt_similarity_to_seed"})


@dg.asset(
    partitions_def=ITERATIONS,
    deps=[
        "model_checkpoint",
        "evaluation",
        "instruction_following",
        "gold_comparison",
        "preference_pairs",
        "prompt_diversity",
    ],
    **table(Promotion, "gate", gate_method),
)
def promotion(
    context: dg.AssetExecutionContext,
    checkpoints: dg.ResourceParam[CheckpointStore],
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """Each figure of M_t that the gate limits; if all pass, M_t is reported as the policy of the next iteration."""
    judged = checkpoints.current("model_checkpoint", context.partition_key)
    refuse_other_evaluation(context.instance, judged)
    refuse_other_pairs(context.instance, judged)
    if OF_PROMPTS & (settings.gate.minimum.keys() | settings.gate.maximum.keys()):
        refuse_other_prompts(context.instance, judged)
    rows = judge(gate_figures(context.instance, context.partition_key), settings.gate.minimum, settings.gate.maximum)
    sentence = verdict(rows, judged.label, asset_label("policy", partition_key(iteration_of(context) + 1)))
    promoted = all(row["passed"] for row in rows)
    if promoted:
        report_policy(context, judged)
    (context.log.info if promoted else context.log.warning)(sentence)
    frame = pl.DataFrame(
        [{**row, "checkpoint_sha": judged.sha, "iteration": iteration_of(context)} for row in rows],
        schema=Promotion.empty().schema,
    )
    return table_output(context, frame, promoted=promoted, verdict=sentence, **made_by(judged))


def refuse_other_evaluation(instance: DagsterInstance, judged: Checkpoint) -> None:
    """Raises a sentence if the newest evaluation, or another measurement of M_t, is not of this checkpoint.

    Raises:
        FinalError: There is no evaluation, or one of them is of a checkpoint that was made before.
    """
    measured = {
        asset_label(asset, judged.partition): metadata_of(instance, asset, judged.partition).get("checkpoint_sha")
        for asset in MEASURED_BY
    }
    label = asset_label("evaluation", judged.partition)
    if measured[label] is None:
        raise FinalError(f"{judged.label} was not evaluated, so the gate cannot judge it: materialize {label} first.")
    for label, sha in measured.items():
        # What was not measured at all is the gate's to judge.
        if sha not in (None, judged.sha):
            raise FinalError(
                f"{label} is about {sha[:16]}, but {judged.label} is {judged.sha[:16]} by now: materialize {label} again."
            )


def refuse_other_pairs(instance: DagsterInstance, judged: Checkpoint) -> None:
    """Raises a sentence if the pairs of the iteration were made again after M_t was trained on them.

    Raises:
        FinalError: It names both versions.
    """
    label = asset_label("preference_pairs", judged.partition)
    learned = judged.manifest["trained_on"].get(label)
    version = data_version_of(instance, "preference_pairs", judged.partition)
    if version not in (None, learned):
        evaluation = asset_label("evaluation", judged.partition)
        raise FinalError(
            f"{judged.label} was trained on version {learned} of {label}, which has version {version} by now: materialize "
            f"{judged.label} and {evaluation} again."
        )


def refuse_other_prompts(instance: DagsterInstance, judged: Checkpoint) -> None:
    """Raises a sentence if the prompts whose diversity was measured are not those that were answered.

    Raises:
        FinalError: It names both assets.
    """
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


def gate_figures(instance: DagsterInstance, partition: str) -> dict[GateMetric, float | None]:
    """The figures of an iteration that the gate may judge; None where one was not recorded."""
    read = ("evaluation", "instruction_following", "gold_comparison", "preference_pairs", "prompt_diversity")
    evaluation, following, gold, pairs, diversity = (metadata_of(instance, asset, partition) for asset in read)
    alike, seed_alike = (diversity.get(f"mean_similarity {source}") for source in ("synthetic", "seed"))
    return {
        "win_rate_over_initial": evaluation.get("win_rate_over_initial"),
        "win_rate_over_initial_low": evaluation.get("win_rate_over_initial_low"),
        "win_rate_over_previous": evaluation.get("win_rate_over_previous"),
        "win_rate_over_initial_by_scorer": evaluation.get("win_rate_over_initial_by_scorer"),
        "held_out_reward_gain": _gain(evaluation, "held_out_reward"),
        "verifiable_rate_gain": _gain(following, "verifiable_rate"),
        "gold_log_likelihood_gain": _gain(gold, "gold_log_likelihood"),
        "gold_similarity_gain": _gain(gold, "gold_similarity"),
        "mean_repetition": evaluation.get("mean_repetition policy"),
        "cut_share": evaluation.get("cut_share policy"),
        "prompt_similarity": alike,
        "prompt_similarity_to_seed": alike / seed_alike if alike is not None and seed_alike else None,
        "mean_margin": pairs.get("mean_margin"),
        "chosen_to_rejected_length": pairs.get("chosen_to_rejected_length"),
        "pairs_kept": pairs.get("dagster/row_count"),
    }


def _gain(figures: dict[str, float | None], name: str) -> float | None:
    """M_t's figure less that of M_0."""
    after, before = (figures.get(f"{name} {model}") for model in ("policy", "initial"))
    return None if after is None or before is None else after - before
