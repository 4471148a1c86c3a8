"""Asset checks: blocking where going on would waste a GPU, warnings where people should look.

Paper: none; it watches AlpacaEval between iterations. Here: the schema of a table is checked before it is written
(tables.py); these checks judge what was written, per iteration, each time it is materialized. Thresholds are the section
`checks` of the settings. A blocking check that failed ends its iteration, and the next one refuses to start.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from resources.common.text import asset_label
from resources.judging.judge_choice import INDEPENDENT, TOOK_PART
from resources.models.weights import tensors_not_finite
from resources.settings.settings import Settings
from resources.training.history import last_quarter
from resources.training.losses import sigmoid_argument
from synpo_assets.graph.metrics import judge_doubt, mean, recorded
from synpo_assets.graph.partitions import iterations, partition_key, partition_of
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.graph.used_settings import optimized_with
from synpo_assets.method.quality import REPETITION_NGRAM, length_ratio, mean_repetition, mean_word_overlap
from synpo_assets.method.saturation import saturation
from synpo_assets.method.verifiable import BY_RULES

# Partitions of asset checks are marked preview; the pinned Dagster minor version is the one they were tested with.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

MORE_PAIRS = (
    "`dropped` of preference_pairs says which filter took most: let it take less, write more prompts "
    "(prompt_generator.prompts_per_iteration), or lower the limit."
)
CHOOSE_SAMPLES = (
    "Give R_t more seed rows with rules, train it on right answers too (response_improver.keep_right_answers), or let own "
    "answers be chosen where they are better (response_improver.samples and own_answers, or preferences.chosen_from: "
    "ranked_samples). The best of several rewrites may still be better than what was rewritten."
)
LEAST_SURVIVING_UPDATE = 0.9
RAISE_LEARNING_RATE = (
    "Raise learning_rate in the section `training` of what was trained, or take more steps, or read with "
    "engine.dtype: float32."
)
BLOCKING = ("enough_pairs", "no_empty_side", "finite_weights")
Results = Iterator[dg.AssetCheckResult]


def synthetic_prompts_checks(context: dg.AssetCheckExecutionContext, services: Services, stage: Stage) -> Results:
    """Whether the generator still writes new prompts."""
    limits, measured = services.settings.checks, recorded(services.metrics, context.partition_key)
    asset = "synthetic_prompts"
    used = measured.value("keyword_sets_used", asset=asset) or 1
    rate = (measured.value("dropped", "near_duplicate", asset=asset) or 0) / used
    most = limits.max_near_duplicate_rate
    shown: dict[str, Any] = {"near_duplicate_rate": rate, "most_allowed": most}
    yield _result("few_near_duplicates", rate <= most, **shown, setting="checks.max_near_duplicate_rate")
    here, first = (
        mean_word_overlap(services.tables.read(asset, key)["prompt"].to_list(), services.settings.random_seed)
        for key in (context.partition_key, partition_key(1))
    )
    most = first * limits.max_similarity_growth
    shown = {"mean_word_overlap": here, "in_iteration_1": first, "most_allowed": most}
    yield _result("varied_prompts", here <= most, **shown, setting="checks.max_similarity_growth")


def preference_pairs_checks(context: dg.AssetCheckExecutionContext, services: Services, stage: Stage) -> Results:
    """Whether the pairs are worth training on."""
    limits, options = services.settings.checks, services.settings.preferences
    pairs = services.tables.read("preference_pairs", context.partition_key)
    chosen, rejected = (_texts(pairs[side]) for side in ("chosen", "rejected"))
    least = limits.min_pairs_share * options.pairs_per_iteration
    shown: dict[str, Any] = {"pairs": pairs.height, "least_allowed": least, "setting": "checks.min_pairs_share"}
    yield _result("enough_pairs", pairs.height >= least, **shown, remedy=MORE_PAIRS)
    empty = sum(not text.strip() for text in chosen + rejected)
    yield _result("no_empty_side", empty == 0, empty_answers=empty)
    # Where rules decide, margins are 1, or -1 where people exchanged the sides.
    margin, least = mean(pairs.filter(~BY_RULES)["margin"]), limits.min_mean_margin
    shown = {"mean_margin": margin, "least_allowed": least, "setting": "checks.min_mean_margin"}
    yield _result("score_margin", margin is None or margin >= least, **shown)
    ratio, most = length_ratio(chosen, rejected), limits.max_length_ratio
    within = 1 / most <= ratio <= most
    shown = {"chosen_to_rejected_length": ratio, "least_allowed": 1 / most, "most_allowed": most}
    yield _result("length_ratio", within, **shown, setting="checks.max_length_ratio")
    repeated, most = mean_repetition(chosen, REPETITION_NGRAM), limits.max_mean_repetition
    shown = {"mean_repetition": repeated, "most_allowed": most, "setting": "checks.max_mean_repetition"}
    yield _result("repetition", repeated <= most, **shown)


def refined_responses_checks(context: dg.AssetCheckExecutionContext, services: Services, stage: Stage) -> Results:
    """Whether R_t makes answers better, by the one thing that no model has to judge."""
    measured = recorded(services.metrics, context.partition_key)
    sides = [measured.find("rules_followed_share", who, asset=stage.name) for who in ("policy", "improver")]
    policy, improver = (side.value if side else None for side in sides)
    shown = {
        "of_what_it_rewrote": policy,
        "of_its_rewrites": improver,
        "prompts_with_rules": sides[0].n if sides[0] else 0,
    }
    better = policy is None or improver is None or improver >= policy
    yield _result("rewrites_follow_rules", better, **shown, remedy=CHOOSE_SAMPLES)


def trained_weights_checks(context: dg.AssetCheckExecutionContext, services: Services, stage: Stage) -> Results:
    """Whether a model can be used, and whether it differs from the one that it was trained from."""
    asset, partition = stage.name, partition_of(context)
    checkpoint = services.checkpoints.current(asset, partition)
    broken = tensors_not_finite(Path(checkpoint.weights))
    yield _result("finite_weights", not broken, tensors_not_finite=len(broken), sha=checkpoint.sha)
    left, least = recorded(services.metrics, partition).value("surviving_update", asset=asset), LEAST_SURVIVING_UPDATE
    survives = left is None or left >= least
    yield _result("update_survives", survives, surviving_update=left, least_allowed=least, remedy=RAISE_LEARNING_RATE)


def model_checkpoint_checks(context: dg.AssetCheckExecutionContext, services: Services, stage: Stage) -> Results:
    """Whether the training of M_t still told pairs apart."""
    limits, preferences = services.settings.checks, services.settings.preferences
    manifest = services.checkpoints.manifest("model_checkpoint", context.partition_key) or {}
    loss = optimized_with(manifest, services.settings).loss
    log = services.checkpoints.training_log("model_checkpoint", context.partition_key)
    accuracy = last_quarter(entry.get("rewards/accuracies") for entry in log)
    argument = last_quarter(sigmoid_argument(loss, entry) for entry in log)
    reason = saturation(accuracy, argument, limits.min_reward_accuracy, limits.min_sigmoid_argument)
    shown: dict[str, Any] = {"reward_accuracy": accuracy, "sigmoid_argument": argument}
    if reason is not None:
        ways = "response_improver.samples, or preferences.chosen_from: ranked_samples"
        nearer = "" if preferences.chosen_from == "ranked_samples" else f" ({ways})"
        shown["warning"] = (
            f"The training of {asset_label('model_checkpoint', context.partition_key)} is saturated: over its last quarter "
            f"{reason}. preference_optimization.loss.beta then changes little: choose answers that are nearer to the policy"
            f"{nearer}, take fewer steps (preference_optimization.training.epochs), or lower "
            "preference_optimization.training.learning_rate."
        )
        context.log.warning(shown["warning"])
    shown |= {"least_accuracy": limits.min_reward_accuracy, "least_argument": limits.min_sigmoid_argument}
    shown["setting"] = "checks.min_reward_accuracy, checks.min_sigmoid_argument"
    yield _result("loss_not_saturated", reason is None, **shown)


def evaluation_checks(context: dg.AssetCheckExecutionContext, services: Services, stage: Stage) -> Results:
    """Whether training moved the policy where it was meant to go."""
    limits = services.settings.checks
    measured = recorded(services.metrics, context.partition_key)
    who = {"of": "candidate", "over": "initial"}
    wins, by_scorer = (measured.value("win_rate", **who, by=judge) for judge in (INDEPENDENT, TOOK_PART))
    least, doubt = limits.min_win_rate, judge_doubt(services.metrics)
    won = doubt is None and wins is not None and wins >= least
    shown: dict[str, Any] = {
        "win_rate": wins if doubt is None else doubt,
        "by_the_scorer": by_scorer,
        "least_allowed": least,
    }
    yield _result("win_rate", won, **shown, setting="checks.min_win_rate")
    repeated, before = (measured.value("mean_repetition", side) for side in ("candidate", "initial"))
    most = limits.max_mean_repetition
    shown = {"mean_repetition": repeated, "of_the_initial_policy": before, "most_allowed": most}
    looping = repeated is None or repeated > most
    yield _result("answers_without_loops", not looping, **shown, setting="checks.max_mean_repetition")


def promotion_checks(context: dg.AssetCheckExecutionContext, services: Services, stage: Stage) -> Results:
    """Whether M_t goes on: a refusal is a result and no fault, but it is the first thing that people look for."""
    found = recorded(services.metrics, context.partition_key).value("promoted", "candidate", asset=stage.name)
    reasons = services.tables.read(stage.name, context.partition_key)["reason"].drop_nulls().to_list()
    yield _result("promoted", found == 1, reasons="; ".join(reasons) or "none")


def answers_ended_checks(context: dg.AssetCheckExecutionContext, services: Services, stage: Stage) -> Results:
    """Whether most answers ended by themselves: what is cut is trimmed, and its pair is dropped (method/cut.py)."""
    most, partition = services.settings.checks.max_cut_share, partition_of(context)
    cut = recorded(services.metrics, partition).value("cut_share", asset=stage.name)
    shown: dict[str, Any] = {"cut_share": cut, "most_allowed": most, "setting": "checks.max_cut_share"}
    ended = cut is None or cut <= most
    if not ended:
        shown["warning"] = (
            f"{cut:.1%} of the answers of {asset_label(stage.name, partition)} were cut at the token limit: raise "
            f"{stage.sampling_setting(services.settings)}.max_new_tokens, or have the prompts ask for short answers."
        )
        context.log.warning(shown["warning"])
    yield _result("answers_ended", ended, **shown)


@dataclasses.dataclass(frozen=True)
class CheckGroup:
    """Checks that are made together of one asset."""

    make: Callable[[dg.AssetCheckExecutionContext, Services, Stage], Results]
    concerns: Callable[[Stage, Settings], bool]
    descriptions: Mapping[str, str]  # By name.


def _named(name: str) -> Callable[[Stage, Settings], bool]:
    return lambda stage, settings: stage.name == name


CHECKS = (
    CheckGroup(
        synthetic_prompts_checks,
        _named("synthetic_prompts"),
        {
            "few_near_duplicates": "Share of written prompts that repeat an earlier one.",
            "varied_prompts": "Similarity of two prompts, compared with iteration 1.",
        },
    ),
    CheckGroup(
        preference_pairs_checks,
        _named("preference_pairs"),
        {
            "enough_pairs": "Enough pairs to train on.",
            "no_empty_side": "A tripwire behind the filter: SimPO divides by an answer's length.",
            "score_margin": "Mean of score(chosen) - score(rejected).",
            "length_ratio": "Characters of chosen over rejected answers: length is an easy reward.",
            "repetition": "Mean share of repeated word n-grams in chosen answers.",
        },
    ),
    CheckGroup(
        refined_responses_checks,
        _named("refined_responses"),
        {
            "rewrites_follow_rules": "Share of prompts with rules whose first rewrite follows them, and whose rewritten answer did."
        },
    ),
    CheckGroup(
        trained_weights_checks,
        lambda stage, settings: stage.checkpoint and "trains" in stage.work,
        {
            "finite_weights": "No NaN and no infinity in the weights.",
            "update_survives": "How much of the training's update is left in the number format that generation reads.",
        },
    ),
    CheckGroup(
        model_checkpoint_checks,
        _named("model_checkpoint"),
        {"loss_not_saturated": "Reward accuracy and argument of the loss's sigmoid over the last quarter of training."},
    ),
    CheckGroup(
        evaluation_checks,
        _named("evaluation"),
        {
            "win_rate": "Win rate of M_t over M_0 on the test prompts, by the independent judge.",
            "answers_without_loops": "Mean share of repeated word n-grams in M_t's answers.",
        },
    ),
    CheckGroup(promotion_checks, _named("promotion"), {"promoted": "M_t keeps to the limits of the gate."}),
    CheckGroup(
        answers_ended_checks,
        lambda stage, settings: stage.sampling_setting(settings) is not None,
        {"answers_ended": "Share of answers that were cut at the token limit."},
    ),
)


def checks_of(stages: Sequence[Stage], settings: Settings) -> list[dg.AssetChecksDefinition]:
    """The checks of an experiment, those of one asset in one step."""
    made = [stage for stage in stages if not stage.needs(settings)]
    concerning = {stage: [each for each in CHECKS if each.concerns(stage, settings)] for stage in made}
    return [_checks(stage, settings, checks) for stage, checks in concerning.items() if checks]


def _checks(stage: Stage, settings: Settings, parts: Sequence[CheckGroup]) -> dg.AssetChecksDefinition:
    partitions = None if stage.once else iterations(settings)
    specs = [
        dg.AssetCheckSpec(
            name, asset=stage.name, description=description, blocking=name in BLOCKING, partitions_def=partitions
        )
        for part in parts
        for name, description in part.descriptions.items()
    ]

    @dg.multi_asset_check(name=f"{stage.name}_checks", specs=specs)
    def checks(context: dg.AssetCheckExecutionContext, services: dg.ResourceParam[Services]) -> Results:
        for part in parts:
            yield from part.make(context, services, stage)

    return checks


def _result(name: str, passed: bool, remedy: str | None = None, **shown: Any) -> dg.AssetCheckResult:
    if remedy and not passed:
        shown["remedy"] = remedy
    severity = dg.AssetCheckSeverity.ERROR if name in BLOCKING else dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(check_name=name, passed=bool(passed), severity=severity, metadata=shown)


def _texts(messages: pl.Series) -> list[str]:
    return [row[-1]["content"] for row in messages.to_list()]
