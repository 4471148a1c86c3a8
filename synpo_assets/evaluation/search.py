"""Hyperparameter search: several candidates are trained on the same pairs, and the best on dev becomes M_t.

Paper (section 3): beta is searched over {2, 4, 6, 8, 10, 12} with gamma = 1.6; by which metric, it does not say.
Here: where `preference_optimization.search` names settings with lists of values. Every candidate is a checkpoint. It answers
the dev prompts, and the independent judge compares its answers with M_0's, as in `evaluation`; or its share of the verifiable
instructions of dev counts. Rows of the test split are left out before anything else is done. The learning rate comes first,
then the loss: SimPO's authors (https://github.com/princeton-nlp/SimPO#hyperparameter-tuning) call the learning rate the most
critical, advise to try 3e-7, 5e-7 and 1e-6 where resources allow, then beta up to 10, then gamma at 0 to 1 times beta.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import dagster as dg
import polars as pl

from resources.common.errors import FinalError
from resources.common.text import asset_label
from resources.settings.search import Search
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from resources.training.history import last_quarter
from synpo_assets.evaluation.candidates import CANDIDATES, METRICS, Candidate, Searching, best_of
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work, training_work
from synpo_assets.graph.metrics import Metric, judge_doubt
from synpo_assets.graph.partitions import iteration_of, partition_key
from synpo_assets.graph.presentation import checkpoints_table, table_output
from synpo_assets.graph.schemas import SearchCandidates
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.stages.optimization import (
    TRAINING_READS,
    loss_code,
    optimization_cost,
    optimized,
    optimized_output,
    pairs_of,
)

SHOWN = ("settings", "metric", "value", "low", "high", "n", "loss", "reward_accuracy", "minutes", "chosen", "left_out")


def search_of(settings: Settings) -> Search:
    """The search, without which there are no such stages."""
    assert settings.preference_optimization.search is not None
    return settings.preference_optimization.search


def _cost(sizes: Sizes) -> list[Work]:
    """Each candidate is trained, answers the dev prompts, and is judged beside M_0."""
    settings, options, search = sizes.settings, sizes.settings.preference_optimization, search_of(sizes.settings)
    pairs, length = settings.preferences.pairs_per_iteration, 2 * (sizes.asked + sizes.written)
    tried = [options.with_values(each) for each in itertools.islice(search.possible, search.candidates)]
    trained = [training_work(each.training, pairs, length, accumulates=options.accumulate) for each in tried]
    asked = settings.evaluation.samples * sizes.held_out
    if search.metric == "instructions":
        asked = settings.evaluation.instruction_samples * sizes.instructions
    answers = search.candidates * round(settings.seed_data.dev_share * asked)
    scored = [] if search.metric == "instructions" else [Work("score", answers * (sizes.asked + sizes.judged))]
    every = [*trained, Work("generate", answers * sizes.judged), *scored]
    return [dataclasses.replace(each, first_only=search.when == "first") for each in every]


@Stage(
    SearchCandidates,
    group="optimization",
    work=("generates", "scores", "trains"),
    reads=(
        *TRAINING_READS, "preference_optimization.search", "evaluation.sampling", "evaluation.samples",
        "evaluation.instruction_samples", "judge.max_length",
    ),
    samplings=lambda settings: [settings.evaluation.sampling],
    cost=_cost,
    code=loss_code,
    deps=("judge_model",),
)  # fmt: skip
def search_candidates(
    context: dg.AssetExecutionContext,
    preference_pairs: pl.DataFrame,
    preference_history: pl.DataFrame,
    initial_policy: Checkpoint,
    policy: Checkpoint,
    seed_pairs: pl.DataFrame,
    verifiable_instructions: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """The candidates for M_t, trained on the same pairs and measured on dev (paper, section 3)."""
    options, search = services.settings.preference_optimization, search_of(services.settings)
    if search.when == "first" and iteration_of(context) > 1:
        frame = _of_first(services)
        context.log.info(f"The search was made in iteration 1: M_t takes {chosen_of(frame)['settings']}.")
        return table_output(context, services, frame, search=table_metadata(frame.select(SHOWN)))
    refuse_doubtful_metric(services)
    pairs, dev_only = pairs_of(options, preference_pairs, preference_history), pl.col("split") == "dev"
    dev, instructions = (table.filter(dev_only) for table in (seed_pairs, verifiable_instructions))
    searching = Searching(context, services, search, (initial_policy, policy), pairs, dev, instructions)
    found = searching.candidates()
    best = refuse_without_best(found)
    frame = _table(found, best, METRICS[search.metric], iteration_of(context))
    made = [(each.text, each.made) for each in found if each.made]
    context.log.info(f"Of {len(made)} candidates the best has {best.text}.")
    summaries = [each.summary for each in found if each.summary]
    measured = [
        Metric("trained_tokens", sum(summary.tokens for summary in summaries)),
        Metric("training_seconds", round(sum(summary.seconds for summary in summaries), 1)),
        *metrics.generating(*searching.generated),
        *(metrics.scoring(*searching.scored) if searching.scored else []),
    ]
    links = checkpoints_table((text, each.label, each.sha, each.manifest["run_id"]) for text, each in made)
    shown = {"chosen": best.text, "search": table_metadata(frame.select(SHOWN)), "checkpoints": links}
    return table_output(context, services, frame, measured, **shown)


def _later_training(sizes: Sizes) -> list[Work]:
    """M_t is one of the candidates; after a search in the first iteration alone, it is trained in the others."""
    later = search_of(sizes.settings).when == "first"
    return [dataclasses.replace(work, later_only=True) for work in optimization_cost(sizes)] if later else []


@Stage(
    group="optimization",
    checkpoint=True,
    work=("trains",),
    reads=(*TRAINING_READS, "preference_optimization.search"),
    cost=_later_training,
    code=loss_code,
)
def model_checkpoint(
    context: dg.AssetExecutionContext,
    preference_pairs: pl.DataFrame,
    preference_history: pl.DataFrame,
    initial_policy: Checkpoint,
    policy: Checkpoint,
    search_candidates: pl.DataFrame,
    services: dg.ResourceParam[Services],
) -> dg.Output[Checkpoint]:
    """M_t: the best candidate of the search, or trained with the values that a search in iteration 1 chose."""
    chosen = chosen_of(search_candidates)
    searched_in = asset_label(CANDIDATES, partition_key(chosen["iteration"]))
    options = services.settings.preference_optimization.with_values(json.loads(chosen["settings"]))
    pairs = pairs_of(options, preference_pairs, preference_history)
    is_candidate = chosen["iteration"] == iteration_of(context)
    candidate = services.checkpoints.current(CANDIDATES, chosen["candidate"]) if is_candidate else None
    record = {"asset": searched_in, "candidates": search_candidates.drop("iteration").to_dicts()}
    made, summary = optimized(
        context, services, options, (initial_policy, policy), pairs, candidate=candidate, search=record
    )
    # The work of a candidate was counted where it was trained.
    training = [each for each in metrics.training(summary) if candidate is None or each.metric not in metrics.WORK]
    shown = {"searched_in": searched_in, "search": table_metadata(search_candidates.select(SHOWN))}
    return optimized_output(context, services, made, training, summary, pairs, **shown)


def chosen_of(frame: pl.DataFrame) -> dict[str, Any]:
    """The row of the candidate that became M_t."""
    return frame.row(by_predicate=pl.col("chosen"), named=True)


def refuse_doubtful_metric(services: Services) -> None:
    """Raises a sentence if candidates would be chosen by the word of a judge that cannot judge."""
    search, doubted = search_of(services.settings), judge_doubt(services.metrics)
    if search.metric != "instructions" and doubted:
        raise FinalError(
            f"preference_optimization.search.metric is `{search.metric}`, which is the independent judge's word. {doubted} A "
            "search would choose by chance: set the metric to `instructions`, give the judge more rows "
            "(seed_data.judge_limit), or leave the search out."
        )


def refuse_without_best(found: Sequence[Candidate]) -> Candidate:
    """The best candidate; raises a sentence if none was trained and measured."""
    best = best_of(found)
    if best is None:
        reasons = dict.fromkeys(str(each.left_out) for each in found)
        raise FinalError(f"None of {len(found)} candidates can become M_t: {'; '.join(reasons)}")
    return best


def _of_first(services: Services) -> pl.DataFrame:
    first = partition_key(1)
    if first not in services.tables.partitions(CANDIDATES):
        raise FinalError(
            f"preference_optimization.search.when is `first`, and there was no search in iteration 1: materialize "
            f"{asset_label(CANDIDATES, first)} and what follows from it, or set it to `each_iteration`."
        )
    return services.tables.read(CANDIDATES, first)


def _table(found: Sequence[Candidate], best: Candidate, metric: str, iteration: int) -> pl.DataFrame:
    rows = []
    for each in found:
        history, measured = each.summary.history if each.summary else [], each.measured
        rows.append({
            "candidate": each.name, "settings": json.dumps(each.tried), "metric": metric,
            "value": measured and measured.value, "low": measured and measured.low, "high": measured and measured.high,
            "n": measured and measured.n, "loss": last_quarter(entry.get("loss") for entry in history),
            "reward_accuracy": last_quarter(entry.get("rewards/accuracies") for entry in history),
            "minutes": each.summary and each.summary.seconds / 60, "chosen": each is best, "left_out": each.left_out,
            "checkpoint_sha": each.made and each.made.sha, "iteration": iteration,
        })  # fmt: skip
    return pl.DataFrame(rows, schema=SearchCandidates.empty().schema)
