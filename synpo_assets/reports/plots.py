"""The pictures of the boosting report and of prompt_diversity, as small PNGs.

Iterations are ordered, so their colours are too: from dark to light in viridis, which people who are colour-blind can
read as well.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from synpo_assets.method.diversity import density
from synpo_assets.reports.rows import FinishedIteration, Plot, judge_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES, DOTS_PER_INCH = (6.4, 3.6), 100
BINS = 24
SHOWN_MARKERS = 20
SHOWN_NUMBERS = 4
SHOWN_KEYS = 8
SHOWN_PLACES, SMALLEST_MARGIN = 400, 0.02
# Orange, blue and grey stay apart for colour-blind eyes, and the lines differ too.
SOURCE_STYLES = {
    "synthetic": ("-", "#0072b2"), "seed": ("--", "#e69f00"), "self_instruct": ("-.", "#666666"),
}  # fmt: skip
INK, GRID = "#333333", "#dddddd"


def draw_plots(iterations: Sequence[FinishedIteration]) -> list[Plot]:
    """Reward curves (where rewards were recorded), margins, funnel and held-out results of the iterations."""
    keys = [iteration.key for iteration in iterations]
    which = f"iteration {keys[0]}" if len(keys) == 1 else f"iterations {', '.join(keys)}"
    logs = {iteration.key: iteration.rewards for iteration in iterations}
    plots = [
        _plot("margins", f"Score margins of the preference pairs of {which}.", margin_histogram(iterations)),
        _plot("funnel", f"Rows that each stage left, {which}.", stage_funnel(iterations)),
        _plot(
            "held_out", f"Held-out rewards, and win rates of M_t by each judge, {which}.", held_out_results(iterations)
        ),
    ]
    if any(logs.values()):
        text = f"Rewards of chosen and rejected answers over the training steps of {which}."
        plots.insert(0, _plot("rewards", text, reward_curves(logs)))
    return plots


def reward_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """SimPO's rewards of chosen (solid) and rejected (dashed) over training steps, one colour per iteration.

    Args:
        logs: By iteration, entries with step, rewards/chosen and rewards/rejected.

    Returns:
        A PNG.
    """
    figure = _figure()
    axes = figure.add_subplot()
    few = max(len(log) for log in logs.values()) <= SHOWN_MARKERS
    styles = {"chosen": "o-" if few else "-", "rejected": "x--" if few else "--"}
    for (key, log), colour in zip(logs.items(), _colours(len(logs)), strict=True):
        steps = [entry["step"] for entry in log]
        for side, style in styles.items():
            rewards = [entry[f"rewards/{side}"] for entry in log]
            axes.plot(steps, rewards, style, markersize=5, color=colour, linewidth=1.6)
        axes.plot([], [], "-", color=colour, linewidth=4, label=_shown_key(key, list(logs)))
    for side, style in styles.items():
        axes.plot([], [], style, markersize=5, color=INK, label=side)
    _count_in_whole_steps(axes)
    _finish(axes, "Rewards while training", "optimizer step", "reward (β times mean log-probability)")
    return _png(figure)


def margin_histogram(iterations: Sequence[FinishedIteration]) -> bytes:
    """How the margins of the kept pairs are distributed, one outline per iteration over the same bins, as a PNG."""
    figure = _figure()
    axes = figure.add_subplot()
    margins = {iteration.key: iteration.pairs["margin"].to_list() for iteration in iterations}
    everything = [margin for values in margins.values() for margin in values]
    bounds = (min(everything), max(everything))
    for (key, values), colour in zip(margins.items(), _colours(len(margins)), strict=True):
        axes.hist(
            values,
            bins=BINS,
            range=bounds,
            weights=[100 / len(values)] * len(values),
            color=colour,
            label=f"{_shown_key(key, list(margins))} (n = {len(values):,})",
            histtype="step",
            linewidth=1.8,
        )
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    _finish(axes, "Margins of the pairs kept", "score(chosen) - score(rejected)", "pairs (%)")
    return _png(figure)


def stage_funnel(iterations: Sequence[FinishedIteration]) -> bytes:
    """How many rows each stage left, as groups of bars with one bar per iteration, as a PNG."""
    figure = _figure()
    axes = figure.add_subplot()
    stages = list(iterations[0].funnel)
    thickness = 0.8 / len(iterations)
    keys = [iteration.key for iteration in iterations]
    for place, (iteration, colour) in enumerate(zip(iterations, _colours(len(iterations)), strict=True)):
        rows = [iteration.funnel[stage] or 0 for stage in stages]
        heights = [stage - 0.4 + thickness * (place + 0.5) for stage in range(len(stages))]
        bars = axes.barh(heights, rows, thickness * 0.9, color=colour, label=_shown_key(iteration.key, keys))
        if len(iterations) <= SHOWN_NUMBERS:
            axes.bar_label(bars, [f"{number:,}" for number in rows], padding=3, fontsize=7, color=INK)
    axes.set_yticks(range(len(stages)), stages)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _finish(axes, "Rows that each stage left", "rows", "")
    axes.grid(visible=False, axis="y")
    return _png(figure)


def held_out_results(iterations: Sequence[FinishedIteration]) -> bytes:
    """Mean reward of M_t between M_0 and gold, and its win rates by each judge with intervals, as a PNG."""
    figure = _figure()
    rewards, wins = figure.subplots(1, 2)
    numbers = [int(iteration.key) for iteration in iterations]

    def values(name: str) -> list[float]:
        found = [iteration.figure("evaluation", name) for iteration in iterations]
        return [float("nan") if value is None else value for value in found]

    # Orange, blue and grey stay apart for colour-blind eyes, and the markers differ too.
    for side, label, style, colour in (
        ("answer", "gold", "s:", "#e69f00"), ("policy", "M_t", "o-", "#0072b2"), ("initial", "M_0", "^--", "#666666"),
    ):  # fmt: skip
        rewards.plot(numbers, values(f"held_out_reward {side}"), style, label=label, color=colour, markersize=5)
    _win_rates(wins, iterations)
    wins.axhline(50, color=INK, linewidth=0.8, linestyle=":")
    wins.set_ylim(0, 100)
    for axes in (rewards, wins):
        axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
        _count_in_whole_steps(axes)
    _finish(rewards, "Held-out reward", "iteration", "mean reward", legend="")
    _finish(wins, "Win rate of M_t", "iteration", "prompts won (%), 95 % interval", legend=None)
    figure.legend(*wins.get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside lower center", ncols=2)
    return _png(figure)


def similarity_densities(iteration: int, similarities: Mapping[str, np.ndarray]) -> Plot:
    """How alike prompts are: the density of the prompts' mean similarities, one line per source, its mean dotted.

    Args:
        iteration: The iteration that is shown.
        similarities: By source, the mean similarity of each prompt to the others.
    """
    figure = _figure()
    axes = figure.add_subplot()
    everything = np.concatenate(list(similarities.values()))
    margin = 0.25 * (everything.max() - everything.min()) + SMALLEST_MARGIN
    places = np.linspace(everything.min() - margin, everything.max() + margin, SHOWN_PLACES)
    for name, values in similarities.items():
        style, colour = SOURCE_STYLES[name]
        axes.plot(places, density(values, places), style, color=colour, label=f"{name} (n = {len(values):,})")
        axes.axvline(values.mean(), color=colour, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    _finish(axes, "How alike prompts are", "mean cosine similarity to the others", "density", legend="prompts")
    text = f"Density of the prompts' mean cosine similarities to the others of their source, iteration {iteration}."
    return _plot("similarities", text, _png(figure))


def _win_rates(axes: "Axes", iterations: Sequence[FinishedIteration]) -> None:
    """A line with error bars for each judge's comparison with M_0, and for the independent judge's with M_{t-1}."""
    first, *others = judge_labels(iterations) or [""]
    shown = [
        (first, "initial", "M_0"),
        (first, "previous", "M_{t-1}"),
        *((label, "initial", "M_0") for label in others),
    ]
    # Orange, blues and grey stay apart for colour-blind eyes, and the markers differ too.
    styles = (("o-", "#0072b2"), ("v:", "#56b4e9"), ("^--", "#666666"), ("s-.", "#e69f00"))
    for place, (label, opponent, name) in enumerate(shown):
        rates = [
            (int(iteration.key), rate)
            for iteration in iterations
            for rate in iteration.win_rates
            if (rate["label"], rate["opponent"]) == (label, opponent) and rate["win_rate"] is not None
        ]
        style, colour = styles[place % len(styles)]
        # Side by side, so that the bars of one iteration do not cover each other.
        across = [number + 0.08 * (place - (len(shown) - 1) / 2) for number, _ in rates]
        up = [100 * rate["win_rate"] for _, rate in rates]
        bars = [[abs(100 * (rate[end] - rate["win_rate"])) for _, rate in rates] for end in ("low", "high")]
        axes.errorbar(
            across, up, bars, fmt=style, color=colour, markersize=4, linewidth=1.4, elinewidth=0.8, capsize=2,
            label=f"over {name}: {label}",
        )  # fmt: skip


def _plot(name: str, description: str, png: bytes) -> Plot:
    return Plot(name, description, f"data:image/png;base64,{base64.b64encode(png).decode()}")


def _figure() -> "Figure":
    # Not pyplot: it keeps every figure in a global list and asks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    # The lightest fifth of the scale is hard to see on white.
    return [colormaps["viridis"](0.8 * place / max(count - 1, 1)) for place in range(count)]


def _shown_key(key: str, keys: Sequence[str]) -> str:
    """The legend's label of an iteration; of many iterations only some get one (matplotlib skips a leading `_`)."""
    every = -(-len(keys) // SHOWN_KEYS)
    return key if keys.index(key) % every == 0 or key == keys[-1] else f"_{key}"


def _count_in_whole_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _finish(axes: "Axes", title: str, across: str, up: str, legend: str | None = "iteration") -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(across, fontsize=9, color=INK)
    axes.set_ylabel(up, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
    if legend is not None:
        axes.legend(
            title=legend, fontsize=8, title_fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )
