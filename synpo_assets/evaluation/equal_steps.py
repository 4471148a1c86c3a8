"""A control of equal steps: what M_t would be if it had seen the pairs of iteration 1 alone.

Paper: none. The pairs accumulate, so M_4 takes four times the optimizer steps of M_1, and a rise over the iterations may
be one over steps.
Here: where `preference_optimization.equal_steps_control` is set. The control starts from M_0, as M_t does, and
is trained on the pairs of iteration 1 for as many steps as M_t took, with the same loss and schedule. It answers the
held-out prompts and the verifiable instructions; the judges compare its answers with those of M_0 and of M_t, and the
instructions that it follows are counted beside M_t's. How likely it finds gold is measured too: many passes over few pairs may
please rules and judges and forget what gold says, and then no single figure decides. If M_t does better than its control in none of
them, the later iterations added steps and nothing else. In iteration 1 the control is M_1 itself, and nothing is trained.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import dagster as dg
import polars as pl

from resources.common.errors import FinalError
from resources.models.likelihood import Likelihoods
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.evaluation.gold_comparison import gain_metric, gold_and_others, refuse_answers_of_another, style_gains
from synpo_assets.evaluation.instruction_following import ANSWERING_READS, instruction_answers, instruction_tokens
from synpo_assets.evaluation.win_rates import (
    JUDGING_READS,
    OUTCOME_COUNTS,
    doubted_rates,
    form_metrics,
    judged_by_all,
    rate_metrics,
    with_all_columns,
)
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.evaluation_schemas import (
    EqualSteps,
    EqualStepsGold,
    EqualStepsInstructions,
    VerifiableInstructions,
)
from synpo_assets.graph.metrics import EQUAL_STEPS, Metric, judge_doubt
from synpo_assets.graph.missing import controlled_sha
from synpo_assets.graph.partitions import iteration_of, partition_key
from synpo_assets.graph.presentation import (
    checkpoint_output,
    made_by,
    table_output,
    training_log,
    versions_table,
)
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.graph.used_settings import optimized_with, refuse_other_settings
from synpo_assets.method.cut import whole_answers
from synpo_assets.method.evaluation import win_rates
from synpo_assets.method.ranking import repeated_prompts
from synpo_assets.method.templates import prompt_requests
from synpo_assets.method.verifiable import shares_followed
from synpo_assets.stages.optimization import TRAINING_READS, USED_COLUMNS, loss_code, optimization_cost, versions_of
from synpo_assets.stages.scorers import comparison_tokens

# Whose answers the control's are compared with.
COMPARISONS = (("control", "initial"), ("control", "candidate"))


@Stage(
    group="optimization",
    checkpoint=True,
    work=("trains",),
    reads=TRAINING_READS,
    cost=lambda sizes: [dataclasses.replace(work, later_only=True) for work in optimization_cost(sizes)],
    code=loss_code,
)
def equal_steps_checkpoint(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    preference_history: pl.DataFrame,
    initial_policy: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[Checkpoint]:
    """The control: trained on the pairs of iteration 1 alone, for as many steps as M_t took.

    If M_t is no better than this, the later pairs added nothing to the steps.
    """
    if iteration_of(context) == 1:
        context.log.info("In iteration 1 the control of equal steps is M_1 itself: nothing is trained.")
        return checkpoint_output(context, services, model_checkpoint, **made_by(model_checkpoint))
    options, random_seed = optimized_with(model_checkpoint.manifest, services.settings), services.settings.random_seed
    pairs, steps = first_pairs(preference_history), steps_of(services, model_checkpoint)
    rows = pairs.select(*USED_COLUMNS).to_dicts()
    learned = versions_of(pairs)
    refuse_other_start(model_checkpoint, initial_policy, learned)
    made, summary = services.checkpoints.create(
        context,
        lambda directory: services.trainer.train(
            "preference", initial_policy, rows, options.training, directory, options.loss, steps
        ),
        parents={"start": initial_policy, "control of": model_checkpoint},
        trained_on=learned,
        settings={"preference_optimization": options.model_dump(), "steps": steps},
        random_seed=random_seed,
    )
    measured = [Metric("pairs_of_iteration", pairs.height, of=partition_key(1)), *metrics.training(summary)]
    shown = versions_table(context.instance, [("preference_pairs", partition_key(1))], learned, pairs=[pairs.height])
    return checkpoint_output(context, services, made, measured, trained_on=shown, **training_log(summary))


def _evaluation_cost(sizes: Sizes) -> list[Work]:
    compared = len(COMPARISONS) * comparison_tokens(sizes, sizes.judged, sizes.judged, judging=True)
    return [
        Work("generate", sizes.held_out_answers * sizes.judged, later_only=True),
        # By the scorer and by the independent judge.
        Work("score", 2 * sizes.held_out_answers * compared, later_only=True),
    ]


@Stage(
    EqualSteps,
    group="evaluation",
    work=("generates", "scores"),
    reads=JUDGING_READS,
    samplings=lambda settings: [settings.evaluation.sampling],
    cost=_evaluation_cost,
    made_from={"prompt_id": "evaluation"},
    deps=("reward_model", "judge_model"),
)
def equal_steps_evaluation(
    context: dg.AssetExecutionContext,
    equal_steps_checkpoint: Checkpoint,
    model_checkpoint: Checkpoint,
    evaluation: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """The control's held-out answers, compared with those of M_0 and M_t by each judge.

    M_t is better than its control where the interval of `win_rate of equal_steps over candidate` lies below one half. Otherwise
    the later pairs are not shown to add anything to as many steps.
    """
    refuse_answers_of_another(model_checkpoint, evaluation)
    refuse_control_of_another(equal_steps_checkpoint, model_checkpoint)
    refuse_other_settings(services, "evaluation", context.partition_key, JUDGING_READS)
    settings, control = services.settings, equal_steps_checkpoint
    asked = repeated_prompts(evaluation.filter(sample=1).select("prompt_id", "prompt"), settings.evaluation.samples)
    written, usage = services.language_model.answer(
        control, prompt_requests(asked, "sample_id"), settings.evaluation.sampling
    )
    answers = asked.select("prompt_id", "sample").with_columns(
        control_response=whole_answers(written), control_cut=written["finish_reason"] == "length"
    )
    texts = evaluation.join(answers, on=["prompt_id", "sample"], validate="1:1", maintain_order="left")
    labels, judged, judging = judged_by_all(services, texts, COMPARISONS)
    shas = {"control": control.sha, "candidate": model_checkpoint.sha}
    columns = [pl.lit(sha).alias(f"{name}_checkpoint_sha") for name, sha in shas.items()]
    frame = with_all_columns(texts.with_columns(*judged, *columns), EqualSteps)
    written = written.with_columns(asked.join(texts, on=["prompt_id", "sample"], maintain_order="left")["split"])
    measured = [
        *metrics.by_split(frame, lambda rows: _rate_metrics(rows, labels, settings.random_seed, control.sha)),
        *metrics.by_split(written, partial(form_metrics, EQUAL_STEPS, control.sha)),
        *metrics.generating(usage),
        *metrics.scoring(*judging),
    ]
    shown = doubted_rates(measured, judge_doubt(services.metrics))
    return table_output(context, services, frame, measured, **shown, **made_by(control))


@Stage(
    EqualStepsInstructions,
    group="evaluation",
    work=("generates",),
    reads=ANSWERING_READS,
    samplings=lambda settings: [settings.evaluation.sampling],
    cost=lambda sizes: [Work("generate", instruction_tokens(sizes), later_only=True)],
    made_from={"prompt_id": "instruction_following"},
)
def equal_steps_instructions(
    context: dg.AssetExecutionContext,
    equal_steps_checkpoint: Checkpoint,
    model_checkpoint: Checkpoint,
    instruction_following: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """Which of the verifiable instructions the control follows, compared with M_t; no judge has a say.

    `verifiable_gain` is M_t's share less the control's; with an interval that holds 0, the later pairs are not shown to add
    anything to the steps.
    """
    refuse_answers_of_another(model_checkpoint, instruction_following, "instruction_following")
    refuse_control_of_another(equal_steps_checkpoint, model_checkpoint)
    refuse_other_settings(services, "instruction_following", context.partition_key, ANSWERING_READS)
    stated = pl.selectors.by_name(*VerifiableInstructions.to_schema().columns, require_all=False)
    asked = instruction_following.filter(sample=1).select(stated)
    answers, usages = instruction_answers(services, {"control": equal_steps_checkpoint}, asked)
    columns = ("prompt_id", "sample", "candidate_response", "candidate_met", "candidate_checkpoint_sha", "iteration")
    frame = answers.join(
        instruction_following.select(columns), on=["prompt_id", "sample"], validate="1:1", maintain_order="left"
    ).with_columns(control_checkpoint_sha=pl.lit(equal_steps_checkpoint.sha))
    measured = [
        *metrics.by_split(frame, lambda rows: _following_metrics(rows, model_checkpoint.sha)),
        *metrics.generating(*usages),
    ]
    return table_output(
        context,
        services,
        frame.select(*EqualStepsInstructions.to_schema().columns),
        measured,
        **made_by(equal_steps_checkpoint),
    )


@Stage(
    EqualStepsGold,
    group="evaluation",
    work=("scores",),
    cost=lambda sizes: [Work("score", 2 * sizes.held_out * (sizes.asked + sizes.gold), later_only=True)],
    made_from={"prompt_id": "gold_comparison"},
)
def equal_steps_gold(
    context: dg.AssetExecutionContext,
    equal_steps_checkpoint: Checkpoint,
    model_checkpoint: Checkpoint,
    gold_comparison: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """How likely the control finds the held-out gold answers, compared with M_t; neither a judge nor a rule has a say.

    `gold_log_likelihood_gain` is M_t's less the control's: above 0, M_t finds gold likelier. Where it finds gold of other prompts
    likelier by as much, the control lost of all texts what M_t did not, and nothing is shown of content. Whether the control lost
    or only gained less is in `gold_comparison`, which has M_0.
    """
    refuse_answers_of_another(model_checkpoint, gold_comparison, "gold_comparison")
    refuse_control_of_another(equal_steps_checkpoint, model_checkpoint)
    if "candidate_other_log_likelihood" not in gold_comparison.columns:
        raise FinalError("An earlier version made `gold_comparison`: materialize it for this iteration again first.")
    control = equal_steps_checkpoint
    read = list[Likelihoods]()
    # In iteration 1 the control is M_1, which gold_comparison has asked.
    gold, others = (gold_comparison[f"candidate{of}_log_likelihood"] for of in ("", "_other"))
    if control.sha != model_checkpoint.sha:
        read.append(services.likelihood.measure(control, gold_and_others(gold_comparison)))
        both = pl.Series(read[0].per_token)
        gold, others = both.head(gold_comparison.height), both.tail(gold_comparison.height)
    frame = gold_comparison.with_columns(
        control_log_likelihood=gold,
        control_other_log_likelihood=others,
        control_checkpoint_sha=pl.lit(control.sha),
    ).select(*EqualStepsGold.to_schema().columns)
    measured = [
        *metrics.by_split(frame, lambda rows: _gold_metrics(rows, model_checkpoint.sha)),
        *metrics.reading(read),
    ]
    return table_output(context, services, frame, measured, **made_by(control))


def first_pairs(history: pl.DataFrame) -> pl.DataFrame:
    """The pairs of iteration 1 among those of all iterations so far."""
    first = history.filter(iteration=1)
    if first.is_empty():
        raise FinalError(
            "preference_optimization.equal_steps_control needs the pairs of iteration 1, and preference_history holds none: run "
            "iteration 1 first, then this one, or switch the control off."
        )
    return first


def steps_of(services: Services, made: Checkpoint) -> int:
    """The optimizer steps that M_t took, by its own log."""
    log = services.checkpoints.training_log(made.asset, made.partition)
    if not log:
        raise FinalError(
            f"{made.label} has no training log, so its steps are not known to the control of equal steps: materialize "
            f"{made.label} again."
        )
    return round(log[-1]["step"])


def refuse_other_start(made: Checkpoint, start: Checkpoint, learned: Mapping[str, str]) -> None:
    """Raises a sentence if M_t began with another model, or learned from other pairs of iteration 1, than its control would."""
    began, versions = made.manifest["parents"]["start"]["sha"], made.manifest["trained_on"]
    other = [label for label, version in learned.items() if versions.get(label, version) != version]
    if other or began != start.sha:
        what = f"another version of {other[0]}" if other else f"another model, {began[:16]},"
        raise FinalError(
            f"{made.label} was made from {what} than its control of equal steps would be now: materialize {made.label} and its "
            "evaluation again first."
        )


def refuse_control_of_another(control: Checkpoint, made: Checkpoint) -> None:
    """Raises a sentence if the control was made for another M_t than the one that was judged."""
    compared = controlled_sha(control.manifest)
    if compared != made.sha:
        raise FinalError(
            f"{control.label} is the control of {compared[:16]}, but {made.label} is {made.sha[:16]} by now: materialize "
            f"equal_steps_checkpoint of this iteration again first."
        )


def _rate_metrics(frame: pl.DataFrame, labels: Mapping[str, str], random_seed: int, sha: str) -> list[Metric]:
    """Win rates of the control over M_0 and over M_t, with their intervals and counts."""
    rates = win_rates(frame, labels, COMPARISONS, random_seed).iter_rows(named=True)
    return [metric for rate in rates for metric in rate_metrics(rate, EQUAL_STEPS, sha, OUTCOME_COUNTS)]


def _gold_metrics(frame: pl.DataFrame, sha: str) -> list[Metric]:
    """How likely the control finds gold, and how much likelier M_t does, per token; the same of gold of other prompts."""
    gains = frame["candidate_log_likelihood"] - frame["control_log_likelihood"]
    control, found = str(frame["control_checkpoint_sha"].first()), metrics.mean(frame["control_log_likelihood"])
    return [
        Metric("gold_log_likelihood", found, of=EQUAL_STEPS, n=frame.height, checkpoint_sha=control),
        gain_metric("gold_log_likelihood_gain", gains, EQUAL_STEPS, sha),
        *style_gains(frame, "control", EQUAL_STEPS, sha),
    ]


def _following_metrics(frame: pl.DataFrame, sha: str) -> list[Metric]:
    """The share of instructions that the control follows, and what M_t follows more."""
    shares = shares_followed(frame, ("candidate", "control"))
    gains = shares["candidate"] - shares["control"]
    control = str(frame["control_checkpoint_sha"].first())
    return [
        Metric(
            "verifiable_rate", metrics.mean(shares["control"]), of=EQUAL_STEPS, n=shares.height, checkpoint_sha=control
        ),
        gain_metric("verifiable_gain", gains, EQUAL_STEPS, sha, groups=shares["template"]),
    ]
