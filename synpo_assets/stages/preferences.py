"""Preference pairs: the two sides of each prompt, scored, filtered and sampled.

Paper (section 2.3, algorithm 1 line 4): chosen is the refined answer, rejected is M_0's; a pair is kept if the scorer
(PairRM or ArmoRM) prefers chosen by a margin, and data with more than half of repetition is dropped; 10,000 survivors are
drawn at random per iteration.
Here: the same, of whatever two sides `preferences.chosen_from` makes; it is chosen that may not repeat itself. Pairs with a
side that was cut at the token limit are dropped as well (see method/cut.py). Where a prompt has rules (`scorer.kind:
verifier`), a pair is kept if chosen follows all of them and rejected does not. Pairs whose sides differ too much in length
can be dropped too (`preferences.max_length_ratio`), so that length tells them apart less. People may read what is left
(reviews.py). The repetition measure is ours, and so is the convention that says what a margin of PairRM is, since the paper
leaves both open.
"""

import dagster as dg
import polars as pl

from resources.common.errors import FinalError
from resources.settings.method import Preferences
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from synpo_assets.graph import metrics
from synpo_assets.graph.cost import Sizes, Work
from synpo_assets.graph.lineage import median_pair
from synpo_assets.graph.metrics import Metric
from synpo_assets.graph.partitions import iteration_of
from synpo_assets.graph.presentation import table_output, writers_table
from synpo_assets.graph.schemas import PreferencePairs
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import Stage
from synpo_assets.method.pairs import as_preferences, join_sides, select_pairs
from synpo_assets.method.reviews import apply_outcomes
from synpo_assets.method.verifiable import BY_RULES
from synpo_assets.stages.loop import report_history
from synpo_assets.stages.scorers import Scored, comparison_tokens, reads_answers_alone, scored_answers

# Which column says which checkpoint wrote a side, or scored both.
WRITER_COLUMNS = {"chosen": "chosen_checkpoint_sha", "rejected": "rejected_checkpoint_sha", "scorer": "scorer_sha"}
# The file of verdicts decides `pair_verdicts`, of which the rows of an iteration decide its pairs.
PAIR_READS = tuple(f"preferences.{name}" for name in Preferences.model_fields if name != "reviewed")


def _cost(sizes: Sizes) -> list[Work]:
    """Ranked samples have been read one by one already, unless the scorer reads two at a time."""
    if not sizes.settings.trains_improver and reads_answers_alone(sizes.settings):
        return []
    return [Work("score", sizes.prompts * comparison_tokens(sizes, sizes.written, sizes.written))]


@Stage(
    PreferencePairs,
    group="preferences",
    work=("scores",),
    # Whether one rewrite is chosen or the best of several: it decides which table the chosen side is read from.
    reads=(*PAIR_READS, "response_improver.samples", "scorer.convention", "scorer.max_length"),
    cost=_cost,
    deps_where_made=("pair_verdicts",),
    made_from={
        "prompt_id": "synthetic_prompts",
        "chosen_response_id": "chosen_responses",
        "rejected_response_id": "rejected_responses",
    },
)
def preference_pairs(
    context: dg.AssetExecutionContext,
    synthetic_prompts: pl.DataFrame,
    chosen_responses: pl.DataFrame,
    rejected_responses: pl.DataFrame,
    preference_history: pl.DataFrame,
    reward_model: Checkpoint,
    services: dg.ResourceParam[Services],
) -> dg.Output[pl.DataFrame]:
    """This iteration's pairs: chosen over rejected answer, scored, filtered, sampled (algorithm 1, line 4).

    Read `median_pair` and the sample: the chosen answer should be the better one for a reason that you can name. `dropped` says
    how many pairs each filter took, and `statistics` how long both sides are.
    """
    joined = join_sides(chosen_responses, rejected_responses)
    scored, compared = scored_sides(services, reward_model, joined, synthetic_prompts)
    kept, dropped = kept_pairs(services, context.partition_key, scored)
    frame = as_preferences(kept).with_columns(
        iteration=pl.lit(iteration_of(context), pl.Int64),
        scorer_sha=pl.lit(reward_model.sha),
    )
    frame = frame.select(*PreferencePairs.to_schema().columns)
    report_history(context, services, preference_history, frame)
    measured = [
        Metric("candidate_pairs", joined.height),
        *(Metric("dropped", count, of=reason) for reason, count in dropped.items()),
        *_pair_metrics(kept),
        *metrics.scoring(compared.usage),
    ]
    return table_output(
        context,
        services,
        frame,
        measured,
        checkpoints=writers_table(services.checkpoints, {role: frame[name] for role, name in WRITER_COLUMNS.items()}),
        score_convention=compared.conventions,
        median_pair=median_pair(context, services, frame),
    )


def scored_sides(
    services: Services, scorer: Checkpoint, joined: pl.DataFrame, prompts: pl.DataFrame
) -> tuple[pl.DataFrame, Scored]:
    """Both sides of each pair with the scores that F, or the rules of the prompt, give them."""
    joined = joined.join(prompts.select("prompt_id", "constraints"), on="prompt_id", maintain_order="left")
    asked = joined.select("prompt", "constraints", first="chosen_response", second="rejected_response")
    compared = scored_answers(services, scorer, asked)
    scores = compared.rows.rename({"first_score": "chosen_score", "second_score": "rejected_score"})
    return joined.hstack(scores), compared


def kept_pairs(services: Services, partition: str, scored: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The pairs that pass every filter and the verdicts of people, and how many each took.

    Raises:
        FinalError: No pair is left to learn from.
    """
    options = services.settings.preferences
    kept, dropped = select_pairs(
        scored,
        options.margin_threshold,
        options.max_repetition,
        options.repetition_ngram,
        options.pairs_per_iteration,
        services.settings.random_seed,
        options.max_length_ratio,
    )
    if options.reviewed:
        kept, dropped["people"] = apply_outcomes(kept, services.tables.read("pair_verdicts", partition))
    if kept.is_empty():
        raise FinalError(f"None of {scored.height} pairs was kept: {dropped}. {_remedy(services.settings)}")
    return kept, dropped


def _remedy(settings: Settings) -> str:
    """What to change where no pair was kept, by the filter that dropped most."""
    writer = "response_improver" if settings.trains_improver else "responses"
    writers = "response_improver.sampling.max_new_tokens and responses" if settings.trains_improver else "responses"
    samples = "response_improver.samples" if settings.trains_improver else "preferences.ranked_samples"
    return (
        f"If `margin` dropped most, lower preferences.margin_threshold; if `cut` did, raise {writers}.sampling.max_new_tokens; if "
        "`repetition` did, preferences.max_repetition; if `rules` did, write more seed rows with such rules, or raise "
        f"{samples}; if `equal_sides` did, {writer}.sampling.temperature; if `length` did, preferences.max_length_ratio; if "
        "`people` did, the file of preferences.reviewed leaves no pair to learn from."
    )


def _pair_metrics(kept: pl.DataFrame) -> list[Metric]:
    by_scorer = kept.filter(~BY_RULES)
    lengths = kept.select(pl.col("chosen_response", "rejected_response").str.len_chars().mean()).row(0)
    return [
        # A margin of rules is in other units.
        Metric("mean_margin", metrics.mean(by_scorer["margin"]), n=by_scorer.height),
        *metrics.with_rules(kept),
        Metric("chosen_to_rejected_length", lengths[0] / max(lengths[1], 1), n=kept.height),
    ]
