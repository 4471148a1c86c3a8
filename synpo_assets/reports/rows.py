"""The rows of the boosting report: metrics by iteration, as text."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Unpack

from resources.judging.judge_choice import INDEPENDENT
from resources.training.history import last_quarter
from synpo_assets.graph.boosting import AT_CHANCE, FORMS, PROMOTED
from synpo_assets.graph.metrics import ENDING_COUNTS, Metric, MetricName, Which
from synpo_assets.graph.texts import (
    MISSING,
    count_text,
    difference_text,
    estimate_text,
    gain_text,
    number_text,
    rate_text,
    share_text,
)
from synpo_assets.graph.used_settings import differing_settings
from synpo_assets.method.diversity import SOURCES
from synpo_assets.method.judging import ANOTHER_GOLD
from synpo_assets.method.length_control import FEWEST_ALIKE, is_extrapolated
from synpo_assets.method.reviews import OUTCOMES
from synpo_assets.reports.edits import edit_lines
from synpo_assets.reports.finished import Cell, FinishedIteration, metric_cell, value_cell
from synpo_assets.reports.search import chosen_text, chosen_value_text
from synpo_assets.reports.without_judge import MODELS, likelihood_gains, without_a_judge

PROMPT_SOURCES = dict(zip(SOURCES, ("synthetic prompts", "seed prompts", "Self-Instruct prompts by M_0"), strict=True))
OPPONENT_LABELS = {"initial": "M_0", "previous": "M_t-1"}
ENDED_LABELS = {
    "both_ended": "both ended", "only_candidate_ended": "only M_t ended", "only_initial_ended": "only M_0 ended",
    "neither_ended": "neither ended",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report's table."""

    section: str
    label: str
    cells: tuple[str, ...]


Format = Callable[[float | None], str]
# The section of what iterations were made with, where they are not alike in it.
DIFFERING = "Settings that differ"


def report_rows(iterations: Sequence[FinishedIteration]) -> list[Row]:
    """The table by iteration: a row per metric, a cell per iteration, what is missing as a dash; empty rows are left out."""
    rows = [
        Row(section, label, tuple(cell(iteration) for iteration in iterations))
        for section, label, cell in _lines(iterations)
    ]
    differing = differing_settings((iteration.settings for iteration in iterations), in_all=True)
    settings = [Row(DIFFERING, name, tuple(values)) for name, values in differing.items()]
    return settings + [row for row in rows if set(row.cells) != {MISSING}]


def judge_labels(iterations: Sequence[FinishedIteration]) -> list[str]:
    """The judges of the iterations, each once, the independent one first."""
    rates = (rate for iteration in iterations for rate in iteration.metrics.every("win_rate"))
    return list(dict.fromkeys(str(rate.by) for rate in rates))


def report_notes(iterations: Sequence[FinishedIteration], unfinished: Sequence[str]) -> list[str]:
    """Sentences about M_t that were not promoted, win rates that would be extrapolated, and what the report leaves out."""
    notes = [
        f"model_checkpoint[{iteration.key}] has no training log with rewards: its curves are missing."
        for iteration in iterations
        if not iteration.rewards
    ]
    notes += dict.fromkeys(iteration.judge_doubt for iteration in iterations if iteration.judge_doubt)
    for iteration in iterations:
        notes += dict.fromkeys(_extrapolations(iteration))
    notes += [iteration.refusal for iteration in iterations if iteration.refusal]
    if unfinished:
        notes.append(f"Not finished, and therefore left out: iteration {', '.join(unfinished)}.")
    return notes


def _extrapolations(iteration: FinishedIteration) -> Iterator[str]:
    """Sentences about length-controlled win rates that hardly any pair of answers of equal length stands behind."""
    for alike in iteration.metrics.every("pairs_alike_in_length"):
        if alike.of == "candidate" and alike.value is not None and is_extrapolated(alike.value, alike.n or 0):
            yield (
                f"Iteration {iteration.key}, M_t over {OPPONENT_LABELS[str(alike.over)]}: {alike.value:.0f} of {alike.n} pairs of "
                f"answers are alike in length (ratio 0.8 to 1.25), fewer than {FEWEST_ALIKE} and than half, so the "
                "length-controlled win rate would be extrapolated and is left out."
            )


def _lines(iterations: Sequence[FinishedIteration]) -> Iterator[tuple[str, str, Cell]]:
    """Section, label and cell of each row."""
    yield from _counted_rows(iterations)
    yield from _prompts()
    yield from _pairs(judge_labels(iterations))
    yield from _held_out(judge_labels(iterations))
    yield "Search", "values chosen among the candidates", lambda iteration: chosen_text(iteration.manifest)
    yield "Search", "the same on dev, 95 % interval", lambda iteration: chosen_value_text(iteration.manifest)
    for judge in judge_labels(iterations):
        for opponent, shown in {"initial": "M_0", "candidate": "M_t"}.items():
            label = f"{judge}, the pairs of iteration 1 for as many steps over {shown}: win rate, 95 % interval"
            yield "Equal steps", label, metric_cell("win_rate", rate_text, "equal_steps", over=opponent, by=judge)
    label = "instructions followed by the model of the pairs of iteration 1 for as many steps"
    yield "Equal steps", label, value_cell("verifiable_rate", share_text, "equal_steps")
    label = "instructions followed, M_t less that model, 95 % interval"
    yield "Equal steps", label, metric_cell("verifiable_gain", gain_text, "candidate", over="equal_steps")
    for label, metric in likelihood_gains("log-likelihood of gold per token", "M_t less that model").items():
        gain = metric_cell(metric, difference_text, "candidate", over="equal_steps")
        yield "Equal steps", f"{label}, 95 % interval", gain
    yield from without_a_judge()
    yield from edit_lines()
    yield "Gate", "M_t promoted to the next iteration", lambda iteration: PROMOTED[iteration.metrics.promoted]
    yield from _checkpoints_and_work()


def _counted_rows(iterations: Sequence[FinishedIteration]) -> Iterator[tuple[str, str, Cell]]:
    for asset, label in {
        "keyword_sets": "keyword sets drawn", "synthetic_prompts": "synthetic prompts", "base_responses": "base responses",
        "rejected_responses": "rejected responses", "refined_responses": "refined responses (chosen side)",
        "best_rewrites": "best of several rewrites (chosen side)",
        "chosen_responses": "ranked samples (chosen side)", "preference_pairs": "pairs kept",
    }.items():  # fmt: skip
        yield "Rows", label, value_cell("rows", count_text, asset=asset)
    yield "Rows", "examples of R_t that the policy answers rightly", value_cell("right_answers_kept", count_text)
    yield "Rows", "chosen side: the policy's own answers, share", value_cell("own_answer_share", share_text)
    yield "Rows", "synthetic prompts with rules", value_cell("with_rules", count_text, asset="synthetic_prompts")
    yield "Rows", "pairs kept whose prompt has rules", value_cell("with_rules", count_text, asset="preference_pairs")
    yield "Rows", "candidate pairs", value_cell("candidate_pairs", count_text)
    yield "Rows", "pairs that M_t was trained on", value_cell("examples", count_text, asset="model_checkpoint")
    yield "Rows", "optimizer steps of M_t", value_cell("training_steps", count_text, asset="model_checkpoint")
    funnel = (("valid prompts", "prompts asked for", "valid prompts per keyword set used"),
              ("pairs kept", "candidate pairs", "pairs kept per candidate"))  # fmt: skip
    for part, whole, label in funnel:
        yield "Pass rates", label, _ratio(part, whole)
    for who, label in {"policy": "M_{t-1}'s answers follow", "improver": "R_t's first rewrites follow"}.items():
        yield "Pass rates", f"prompts whose rules {label}", value_cell("rules_followed_share", share_text, who)
    for asset in ("synthetic_prompts", "preference_pairs"):
        reasons = {str(each.of) for iteration in iterations for each in iteration.metrics.every("dropped", asset)}
        for reason in sorted(reasons):
            yield (
                "Dropped",
                f"{asset}: {reason.replace('_', ' ')}",
                value_cell("dropped", count_text, reason, asset=asset),
            )
    generating = {asset for iteration in iterations for asset in iteration.metrics.assets_with("cut_share")}
    for asset in sorted(generating):
        yield "Cut at the token limit", asset, value_cell("cut_share", share_text, asset=asset)


def _prompts() -> Iterator[tuple[str, str, Cell]]:
    yield "Prompts", "prompts compared, of each source", value_cell("prompts_compared", count_text)
    for source, what in PROMPT_SOURCES.items():
        yield (
            "Prompts",
            f"mean similarity of {what}, 95 % interval",
            metric_cell("mean_similarity", estimate_text, source),
        )
    for source, what in PROMPT_SOURCES.items():
        label = f"{what} likelier under M_0 than their words shuffled, 95 % interval"
        yield "Prompts", label, metric_cell("ordered_share", rate_text, source)
        label = f"the same of {what} whose words were shuffled"
        yield "Prompts", label, value_cell("shuffled_ordered_share", share_text, source)
    for source, what in PROMPT_SOURCES.items():
        label = f"{what} that can be answered, by a judge's word, 95 % interval"
        yield "Prompts", label, metric_cell("answerable_share", rate_text, source)
    for metric in ("topics", "intentions"):
        for source, what in PROMPT_SOURCES.items():
            yield "Prompts", f"{metric} of {what}, named by a judge", value_cell(metric, count_text, source)


def _pairs(judges: Sequence[str]) -> Iterator[tuple[str, str, Cell]]:
    for whose, what in {"gold": "gold answers", ANOTHER_GOLD: "gold answers of other prompts"}.items():
        label = f"{what} that pass the improver's filter, 95 % interval"
        yield "Pairs", label, metric_cell("passing_share", rate_text, whose)
    yield "Pairs", "mean margin of scores", value_cell("mean_margin", number_text)
    for outcome in OUTCOMES:
        yield "Pairs", f"pairs {outcome} by people", value_cell("verdicts", count_text, outcome)
    for judge in judges:
        label = f"{judge}: agreement with people, 95 % interval, pairs"
        yield "Pairs", label, metric_cell("agreement_rate", _rate_of_pairs, "people", by=judge)
    yield "Pairs", "chosen length / rejected length", value_cell("chosen_to_rejected_length", number_text)
    yield "Pairs", "reward margin, last quarter of training", _last_quarter("rewards/margins", number_text)
    yield "Pairs", "reward accuracy, last quarter of training", _last_quarter("rewards/accuracies", share_text)


def _held_out(judges: Sequence[str]) -> Iterator[tuple[str, str, Cell]]:
    yield "Held-out", "prompts of the test split, which all of this is of", value_cell("held_out_prompts", count_text)
    yield (
        "Held-out",
        "prompts of the dev split, which the gate reads",
        value_cell("held_out_prompts", count_text, split="dev"),
    )
    for side, what in {"initial": "M_0", "candidate": "M_t", "gold": "the gold answers"}.items():
        yield "Held-out", f"mean reward of {what}, by the scorer", value_cell("held_out_reward", number_text, side)
    for judge in judges:
        for opponent, shown in OPPONENT_LABELS.items():
            yield from _win_rates(judge, opponent, f"{judge}, over {shown}")
        for model, shown in ((form, f"M_0 {form}, over M_0") for form in FORMS):
            who = {"of": model, "over": "initial", "by": judge}
            yield "Held-out", f"{judge}, {shown}: win rate, 95 % interval", metric_cell("win_rate", rate_text, **who)
            less = metric_cell("win_rate_gain", gain_text, "candidate", over=model, by=judge)
            yield (
                "Held-out",
                f"{judge}, M_t over M_0, less {shown}, over the same prompts: win rate, 95 % interval",
                less,
            )
            label = f"{judge}, {shown}: length-controlled win rate, 95 % interval"
            yield "Held-out", label, metric_cell("length_controlled_win_rate", rate_text, **who)
    for side, model in MODELS.items():
        yield "Held-out", f"repeated 3-grams in {model}'s answers", value_cell("mean_repetition", share_text, side)
        yield "Held-out", f"answers of {model} cut", value_cell("cut_share", share_text, side)
    for judge in judges:
        yield from _wins_by_ending(judge)


def _checkpoints_and_work() -> Iterator[tuple[str, str, Cell]]:
    yield "Checkpoints", "M_t", lambda iteration: _sha(iteration.metrics.candidate)
    update = value_cell("surviving_update", share_text, asset="model_checkpoint")
    yield "Checkpoints", "update of M_t left in the number format of generation", update
    yield (
        "Checkpoints",
        "policy that answered",
        lambda it: _sha(it.manifest.get("parents", {}).get("policy", {}).get("sha")),
    )
    for side in ("chosen", "rejected"):
        yield "Checkpoints", f"model that wrote the {side} side", _of_pairs(f"{side}_checkpoint_sha")
    yield "Checkpoints", "scorer", _of_pairs("scorer_sha")
    totals: dict[str, MetricName] = {
        "generated": "generated_tokens", "trained on": "trained_tokens", "scored": "scored_tokens",
    }  # fmt: skip
    for what, metric in totals.items():
        yield "Work", f"tokens {what}", _total(metric)
    yield "Work", "seconds", lambda iteration: count_text(round(iteration.seconds))
    yield "Work", "cost", lambda iteration: iteration.cost or MISSING
    yield "Work", "largest memory of a process, GB", _largest("peak_memory_gb")
    yield "Work", "largest GPU memory of a process, GB", _largest("peak_gpu_memory_gb")


def _win_rates(judge: str, opponent: str, compared: str) -> Iterator[tuple[str, str, Cell]]:
    """What a judge says of M_t compared with an opponent: the win rate with its interval, and the counts behind it."""
    where = {"of": "candidate", "over": opponent, "by": judge}

    def rate(iteration: FinishedIteration) -> str:
        doubted = judge == INDEPENDENT and iteration.judge_doubt is not None
        return AT_CHANCE if doubted else rate_text(iteration.metrics.find("win_rate", **where))

    yield "Held-out", f"{compared}: win rate, 95 % interval", rate
    # What a cut answer loses is no matter of content.
    label = f"{compared}: win rate where both answers ended, 95 % interval"
    yield "Held-out", label, metric_cell("win_rate_both_ended", _rate_of_some, **where)
    label = f"{compared}: length-controlled win rate, 95 % interval"
    yield "Held-out", label, metric_cell("length_controlled_win_rate", rate_text, **where)
    label = f"{compared}: pairs alike in length (ratio 0.8 to 1.25)"
    yield "Held-out", label, value_cell("pairs_alike_in_length", count_text, **where)
    yield (
        "Held-out",
        f"{compared}: wins, ties, losses, no verdict",
        _counts(("wins", "ties", "losses", "no_verdicts"), **where),
    )


def _rate_of_some(rate: Metric | None) -> str:
    """A win rate of some of the prompts, with how many these are."""
    return MISSING if rate is None or rate.value is None else f"{rate_text(rate)}, {count_text(rate.n)} prompts"


def _counts(names: Sequence[MetricName], of: str, **which: Unpack[Which]) -> Cell:
    def cell(iteration: FinishedIteration) -> str:
        values = [iteration.metrics.value(name, of, **which) for name in names]
        return MISSING if values[0] is None else ", ".join(map(count_text, values))

    return cell


def _wins_by_ending(judge: str) -> Iterator[tuple[str, str, Cell]]:
    """What a judge says of M_t compared with M_0, by which of the two answers ended by itself."""
    for ended, names in ENDING_COUNTS.items():
        label = f"{judge}, over M_0, {ENDED_LABELS[ended]}: wins, ties, losses"
        yield "Wins by ending", label, _counts(names, "candidate", over="initial", by=judge)


def total(iteration: FinishedIteration, metric: MetricName) -> float:
    """The sum of a metric over all assets of an iteration."""
    return sum(each.value or 0 for each in iteration.metrics.every(metric))


def _ratio(part: str, whole: str) -> Cell:
    def cell(iteration: FinishedIteration) -> str:
        rows, of_all = iteration.funnel[part], iteration.funnel[whole]
        return share_text(rows / of_all if rows is not None and of_all else None)

    return cell


def _last_quarter(name: str, form: Format) -> Cell:
    return lambda iteration: form(last_quarter(entry.get(name) for entry in iteration.training_log))


def _total(metric: MetricName) -> Cell:
    return lambda iteration: count_text(total(iteration, metric))


def _largest(metric: MetricName) -> Cell:
    def cell(iteration: FinishedIteration) -> str:
        values = [each.value for each in iteration.metrics.every(metric) if each.value is not None]
        return f"{max(values):.2f}" if values else MISSING

    return cell


def _rate_of_pairs(rate: Metric | None) -> str:
    return f"{rate_text(rate)} of {rate.n}" if rate and rate.value is not None else MISSING


def _of_pairs(column: str) -> Cell:
    return lambda iteration: ", ".join(map(_sha, iteration.pairs[column].unique(maintain_order=True)))


def _sha(value: str | None) -> str:
    return MISSING if value is None else value[:16]
