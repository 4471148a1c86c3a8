"""The boosting report: figures by iteration as text, a few sample pairs, and the page that shows both."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

MISSING = "—"
SHOWN_CHARACTERS = 4000
FOLDER = Path(__file__).parent
GENERATED_BY = (
    "synthetic_prompts", "seed_responses", "base_responses", "initial_responses", "refined_responses", "evaluation",
    "instruction_following",
)  # fmt: skip
TRAINED_BY = ("response_improver", "model_checkpoint")
MEMORY = {
    "peak_memory_gb": "largest memory of a process, GB",
    "peak_gpu_memory_gb": "largest GPU memory of a process, GB",
}
PROMPT_SOURCES = {
    "synthetic": "synthetic prompts", "seed": "seed prompts", "self_instruct": "Self-Instruct prompts by M_0",
}  # fmt: skip
MODELS = {"policy": "M_t", "initial": "M_0"}
PROMOTED = {True: "yes", False: "no", None: MISSING}
LABELLED = {
    f"{kind} {source}": f"{kind} of {what}, named by a judge" for kind in ("topics", "intentions")
    for source, what in PROMPT_SOURCES.items()
}  # fmt: skip
# Without a GPU, or a judge that names topics, there is nothing to say about them.
NOT_EVERYWHERE = {*MEMORY.values(), *LABELLED.values()}
SCORED_BY = ("prompt_diversity", "seed_responses", "refined_responses", "preference_pairs", "evaluation")


@dataclasses.dataclass(frozen=True)
class FinishedIteration:
    """What is known of one finished iteration.

    Attributes:
        key: Its partition key, `0001`.
        metadata: Metadata values of the newest materialization, by asset.
        seconds: Wall time of its steps.
        pairs: Its table `preference_pairs`.
        training_log: What the trainer of M_t logged, thinned out, one entry per step; empty if it was not recorded.
        win_rates: The rows of `win_rates` (method/evaluation.py); empty if they were not recorded.
    """

    key: str
    metadata: Mapping[str, Mapping[str, Any]]
    seconds: float
    pairs: pl.DataFrame
    training_log: Sequence[Mapping[str, Any]]
    win_rates: Sequence[Mapping[str, Any]]

    def figure(self, asset: str, name: str) -> Any:
        """A value that an asset recorded, or None if it recorded none of that name."""
        return self.metadata[asset].get(name)

    def rows(self, asset: str) -> int | None:
        """How many rows a table has."""
        return self.figure(asset, "dagster/row_count")

    @property
    def promoted(self) -> bool | None:
        """Whether the gate let this M_t enter the next iteration; None if it judged another one, or none yet."""
        judged_this = self.figure("promotion", "checkpoint_sha") == self.figure("model_checkpoint", "sha")
        return self.figure("promotion", "promoted") if judged_this else None

    @property
    def rewards(self) -> list[Mapping[str, Any]]:
        """The logged steps that hold the rewards of chosen and rejected; the trainer's closing entry has none."""
        return [entry for entry in self.training_log if entry.get("rewards/chosen") is not None]

    @property
    def funnel(self) -> dict[str, int | None]:
        """Rows per stage, from the completions that were asked for a prompt to the pairs that were kept."""
        return {
            "prompts asked for": self.figure("synthetic_prompts", "keyword_sets_used"),
            "valid prompts": self.rows("synthetic_prompts"),
            "refined answers": self.rows("refined_responses"),
            "candidate pairs": self.figure("preference_pairs", "candidates"),
            "pairs kept": self.rows("preference_pairs"),
        }


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report's table.

    Attributes:
        section: Which part of the table it belongs to.
        label: What it shows, with its unit.
        cells: One text per iteration.
    """

    section: str
    label: str
    cells: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture of the report.

    Attributes:
        name: What it shows, in a word or two.
        description: The same in a sentence, for those who do not see it.
        data_uri: The PNG as a `data:` address.
    """

    name: str
    description: str
    data_uri: str


def report_rows(iterations: Sequence[FinishedIteration]) -> list[Row]:
    """The table by iteration: one row per figure, one cell per iteration, missing figures as a dash."""
    reasons = {
        asset: sorted(set().union(*(iteration.figure(asset, "dropped") or () for iteration in iterations)))
        for asset in ("synthetic_prompts", "preference_pairs")
    }
    columns = [_column(iteration, reasons, judge_labels(iterations)) for iteration in iterations]
    rows = [Row(section, label, tuple(column[section, label] for column in columns)) for section, label in columns[0]]
    return [row for row in rows if row.label not in NOT_EVERYWHERE or set(row.cells) != {MISSING}]


def judge_labels(iterations: Sequence[FinishedIteration]) -> list[str]:
    """The judges of the iterations, each once, the independent one first."""
    return list(dict.fromkeys(rate["label"] for iteration in iterations for rate in iteration.win_rates))


def rate_text(rate: Mapping[str, Any] | None) -> str:
    """A win rate with its interval, as far as it is known.

    Examples:
        >>> rate_text({"win_rate": 0.625, "low": 0.46875, "high": 0.78125})
        '62.5% (46.9 to 78.1)'
        >>> rate_text({"win_rate": 0.625, "low": None})
        '62.5%'
        >>> rate_text(None)
        '—'
    """
    if rate is None or rate["win_rate"] is None:
        return MISSING
    text = f"{rate['win_rate']:.1%}"
    return text if rate["low"] is None else f"{text} ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def gain_text(gain: float | None, low: float | None, high: float | None) -> str:
    """A difference of two shares with its interval, in percentage points.

    Examples:
        >>> gain_text(0.125, -0.0139, 0.25)
        '+12.5 points (-1.4 to +25.0)'
        >>> gain_text(None, None, None)
        '—'
    """
    if gain is None or low is None or high is None:
        return MISSING
    return f"{100 * gain:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def difference_text(difference: float | None, low: float | None, high: float | None) -> str:
    """A difference that is no share, with its interval.

    Examples:
        >>> difference_text(0.0494, 0.0228, 0.074)
        '+0.049 (+0.023 to +0.074)'
    """
    if difference is None or low is None or high is None:
        return MISSING
    return f"{difference:+.3f} ({low:+.3f} to {high:+.3f})"


def report_notes(iterations: Sequence[FinishedIteration], unfinished: Sequence[str]) -> list[str]:
    """Sentences about M_t that were not promoted, and about what the report leaves out."""
    notes = [
        f"model_checkpoint[{iteration.key}] recorded no rewards: its curves are missing."
        for iteration in iterations
        if not iteration.rewards
    ]
    notes += [iteration.figure("promotion", "verdict") for iteration in iterations if iteration.promoted is False]
    if unfinished:
        notes.append(f"Not finished, and therefore left out: iteration {', '.join(unfinished)}.")
    return notes


def sample_pairs(pairs: pl.DataFrame) -> list[dict[str, Any]]:
    """The pairs with the largest, the median and the smallest margin, fewer if there are fewer pairs.

    Returns:
        Rows with place, pair_id, margin, and for chosen and rejected the text and its score, and the prompt's text.
    """
    ordered = pairs.sort("margin", "pair_id", descending=[True, False])
    places = {"largest margin": 0, "median margin": pairs.height // 2, "smallest margin": pairs.height - 1}
    distinct = {place: name for name, place in reversed(places.items())}
    samples = []
    for place in sorted(distinct):
        row = ordered.row(place, named=True)
        texts = {side: row[side][-1]["content"] for side in ("prompt", "chosen", "rejected")}
        figures = {name: row[name] for name in ("pair_id", "margin", "chosen_score", "rejected_score")}
        samples.append({"place": distinct[place], **figures, **texts})
    return samples


def report_html(
    iterations: Sequence[FinishedIteration],
    plots: Sequence[Plot],
    notes: Sequence[str],
    visible: Callable[[str], str],
) -> str:
    """The report as one page without scripts, links or outside resources; every text in it is escaped.

    Args:
        iterations: The finished iterations, in order.
        plots: The pictures.
        notes: Sentences about what is missing.
        visible: Makes the control characters of generated text harmless.
    """
    environment = _environment()
    environment.filters["visible"] = visible
    return environment.get_template("boosting_report.html.jinja").render(
        keys=[iteration.key for iteration in iterations],
        rows=report_rows(iterations),
        plots=plots,
        notes=notes,
        judges=judge_labels(iterations),
        samples={iteration.key: sample_pairs(iteration.pairs) for iteration in reversed(iterations)},
    )


def shortened(text: str) -> str:
    """A text of at most `SHOWN_CHARACTERS` characters that says how many were left out."""
    left_out = len(text) - SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:SHOWN_CHARACTERS]}… ({left_out:,} more characters)"


def _column(
    iteration: FinishedIteration, reasons: Mapping[str, Sequence[str]], judges: Sequence[str]
) -> dict[tuple[str, str], str]:
    """The texts of one iteration by section and label, with lines for each reason to drop, by asset, and each judge."""
    figure, rows, funnel = iteration.figure, iteration.rows, iteration.funnel
    sections: dict[str, dict[str, str]] = {
        "Rows": {
            "keyword sets drawn": _count(rows("keyword_sets")),
            "keyword sets used": _count(funnel["prompts asked for"]),
            "synthetic prompts": _count(rows("synthetic_prompts")),
            "base responses (policy)": _count(rows("base_responses")),
            "initial responses (rejected side)": _count(rows("initial_responses")),
            "refined responses (chosen side)": _count(rows("refined_responses")),
            "candidate pairs": _count(funnel["candidate pairs"]),
            "pairs kept": _count(funnel["pairs kept"]),
            "pairs that M_t was trained on": _count(figure("model_checkpoint", "examples")),
        },
        "Pass rates": {
            "valid prompts per keyword set used": _ratio(funnel["valid prompts"], funnel["prompts asked for"]),
            "pairs kept per candidate": _ratio(funnel["pairs kept"], funnel["candidate pairs"]),
        },
        "Dropped": {
            f"{asset}: {reason.replace('_', ' ')}": _dropped(figure(asset, "dropped"), reason)
            for asset, possible in reasons.items()
            for reason in possible
        },
        "Prompts": {
            "prompts compared, of each source": _count(figure("prompt_diversity", "prompts_compared")),
            **{
                f"mean similarity of {what}": _number(figure("prompt_diversity", f"mean_similarity {source}"))
                for source, what in PROMPT_SOURCES.items()
            },
            **{label: _count(figure("prompt_diversity", name)) for name, label in LABELLED.items()},
        },
        "Pairs": {
            "mean margin of scores": _number(figure("preference_pairs", "mean_margin")),
            "chosen length / rejected length": _number(figure("preference_pairs", "chosen_to_rejected_length")),
            "chosen answers cut": _share(figure("preference_pairs", "chosen_cut_share")),
            "rejected answers cut": _share(figure("preference_pairs", "rejected_cut_share")),
            "reward margin at the last logged training step": _number(_last_reward_margin(iteration)),
        },
        "Held-out": {
            "prompts": _count(figure("evaluation", "held_out_prompts")),
            "mean reward of M_0, by the scorer": _number(figure("evaluation", "held_out_reward initial")),
            "mean reward of M_t, by the scorer": _number(figure("evaluation", "held_out_reward policy")),
            "mean reward of the gold answers, by the scorer": _number(figure("evaluation", "held_out_reward answer")),
            **_win_rates(iteration, judges),
            "repeated 3-grams in M_t's answers": _share(figure("evaluation", "mean_repetition policy")),
            "repeated 3-grams in M_0's answers": _share(figure("evaluation", "mean_repetition initial")),
            "answers of M_t cut": _share(figure("evaluation", "cut_share policy")),
            "answers of M_0 cut": _share(figure("evaluation", "cut_share initial")),
        },
        "Without a judge": {
            "verifiable instructions": _count(figure("instruction_following", "instructions")),
            **{
                f"instructions followed by {model}": _share(figure("instruction_following", f"verifiable_rate {side}"))
                for side, model in MODELS.items()
            },
            "instructions followed, M_t less M_0, 95 % interval": gain_text(
                *(figure("instruction_following", f"verifiable_gain{end}") for end in ("", "_low", "_high"))
            ),
            **{
                f"constraints met by {model}": _share(figure("instruction_following", f"constraint_rate {side}"))
                for side, model in MODELS.items()
            },
            **{
                f"log-likelihood of gold under {model}, per token": _number(
                    figure("gold_comparison", f"gold_log_likelihood {side}")
                )
                for side, model in MODELS.items()
            },
            "log-likelihood of gold, M_t less M_0, 95 % interval": difference_text(
                *(figure("gold_comparison", f"gold_log_likelihood_gain{end}") for end in ("", "_low", "_high"))
            ),
            **{
                f"likeness of {model}'s answers to gold": _number(figure("gold_comparison", f"gold_similarity {side}"))
                for side, model in MODELS.items()
            },
            "likeness to gold, M_t less M_0, 95 % interval": difference_text(
                *(figure("gold_comparison", f"gold_similarity_gain{end}") for end in ("", "_low", "_high"))
            ),
        },
        "Gate": {"M_t promoted to the next iteration": PROMOTED[iteration.promoted]},
        "Checkpoints": {
            "M_t": _sha(figure("model_checkpoint", "sha")),
            "policy that answered": _sha(figure("base_responses", "checkpoint_sha")),
            "model that wrote the chosen side": _sha(figure("refined_responses", "checkpoint_sha")),
            "scorer": _sha(figure("preference_pairs", "scorer_sha")),
        },
        "Work": {
            "tokens generated": _count(_total(iteration, GENERATED_BY, "generated_tokens")),
            "tokens trained on": _count(_total(iteration, TRAINED_BY, "tokens")),
            "tokens scored": _count(_total(iteration, SCORED_BY, "scored_tokens")),
            "seconds": _count(round(iteration.seconds)),
            **{label: _largest(iteration, name) for name, label in MEMORY.items()},
        },
    }
    return {(section, label): text for section, figures in sections.items() for label, text in figures.items()}


def _win_rates(iteration: FinishedIteration, judges: Sequence[str]) -> dict[str, str]:
    """What each judge says of M_t beside M_0 and M_{t-1}: the win rate with its interval, and the counts behind it."""
    rates = {(rate["label"], rate["opponent"]): rate for rate in iteration.win_rates}
    lines = {}
    for judge in judges:
        for opponent, shown in (("initial", "M_0"), ("previous", "M_{t-1}")):
            rate = rates.get((judge, opponent))
            counts = [str(rate[name]) for name in ("wins", "ties", "losses", "no_verdict")] if rate else [MISSING]
            compared = f"{judge}, over {shown}"
            lines[f"{compared}: win rate, 95 % interval"] = rate_text(rate)
            lines[f"{compared}: length-controlled win rate"] = _share(rate["length_controlled"] if rate else None)
            lines[f"{compared}: wins, ties, losses, no verdict"] = ", ".join(counts)
    return lines


def _dropped(dropped: Mapping[str, int] | None, reason: str) -> str:
    return MISSING if dropped is None else _count(dropped.get(reason, 0))


def _last_reward_margin(iteration: FinishedIteration) -> float | None:
    return iteration.rewards[-1]["rewards/margins"] if iteration.rewards else None


def _total(iteration: FinishedIteration, assets: Iterable[str], name: str) -> int:
    return sum(iteration.figure(asset, name) or 0 for asset in assets)


def _largest(iteration: FinishedIteration, name: str) -> str:
    """The largest figure of this name that an asset of the iteration recorded."""
    figures = [about[name] for about in iteration.metadata.values() if name in about]
    return f"{max(figures):.2f}" if figures else MISSING


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def _ratio(part: int | None, whole: int | None) -> str:
    return _share(part / whole) if part is not None and whole else MISSING


def _sha(value: str | None) -> str:
    return MISSING if value is None else value[:16]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shortened"] = shortened
    return environment
