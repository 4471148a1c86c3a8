"""The pictures of the boosting report, as small PNGs.

Iterations are ordered, so their colours are too: from dark to light in viridis, which people who are colour-blind can
read as well.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from synpo_assets.graph.drawing import INK, Plot, finish, new_figure, plot_of
from synpo_assets.graph.metrics import MetricName
from synpo_assets.method.verifiable import BY_RULES
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.rows import judge_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 24
SHOWN_MARKERS = 20
SHOWN_NUMBERS = 4
SHOWN_KEYS = 8


def draw_plots(iterations: Sequence[FinishedIteration]) -> list[Plot]:
    """Reward curves (where rewards were recorded), margins, funnel and held-out results of the iterations."""
    keys = [iteration.key for iteration in iterations]
    which = f"iteration {keys[0]}" if len(keys) == 1 else f"iterations {', '.join(keys)}"
    logs = {iteration.key: iteration.rewards for iteration in iterations}
    plots = []
    if any(logs.values()):
        text = f"Rewards of chosen and rejected answers over the training steps of {which}."
        plots.append(plot_of("rewards", text, reward_curves(logs, iterations[-1].reward_axis)))
    text = f"Held-out rewards, and win rates of M_t by each judge, {which}."
    return [
        *plots,
        plot_of("margins", f"Score margins of the preference pairs of {which}.", margin_histogram(iterations)),
        plot_of("funnel", f"Rows that each stage left, {which}.", stage_funnel(iterations)),
        plot_of("held_out", text, held_out_results(iterations)),
    ]


def reward_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], axis: str) -> "Figure":
    """The rewards of chosen (solid) and rejected (dashed) over training steps, one colour per iteration."""
    figure = new_figure()
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
    finish(axes, "Rewards while training", "optimizer step", axis)
    return figure


def margin_histogram(iterations: Sequence[FinishedIteration]) -> "Figure":
    """How the margins of the kept pairs that no rules decide are distributed, one outline per iteration over the same bins."""
    figure = new_figure()
    axes = figure.add_subplot()
    # Where rules decide, every margin is 1, in other units.
    margins = {iteration.key: iteration.pairs.filter(~BY_RULES)["margin"].to_list() for iteration in iterations}
    everything = [margin for values in margins.values() for margin in values]
    bounds = (min(everything), max(everything)) if everything else None
    for (key, values), colour in zip(margins.items(), _colours(len(margins)), strict=True):
        axes.hist(
            values,
            bins=BINS,
            range=bounds,
            weights=[100 / max(len(values), 1)] * len(values),
            color=colour,
            label=f"{_shown_key(key, list(margins))} (n = {len(values):,})",
            histtype="step",
            linewidth=1.8,
        )
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    finish(axes, "Margins of the pairs kept", "score(chosen) - score(rejected)", "pairs (%)")
    return figure


def stage_funnel(iterations: Sequence[FinishedIteration]) -> "Figure":
    """How many rows each stage left, as groups of bars with one bar per iteration."""
    figure = new_figure()
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
    finish(axes, "Rows that each stage left", "rows", "")
    axes.grid(visible=False, axis="y")
    return figure


def held_out_results(iterations: Sequence[FinishedIteration]) -> "Figure":
    """Mean reward of M_t between M_0 and gold, and its win rates by each judge with intervals."""
    figure = new_figure()
    rewards, wins = figure.subplots(1, 2)
    numbers = [int(iteration.key) for iteration in iterations]

    def values(metric: MetricName, of: str) -> list[float]:
        measured = [iteration.metrics.value(metric, of) for iteration in iterations]
        return [float("nan") if value is None else value for value in measured]

    # Orange, blue and grey stay apart for colour-blind eyes, and the markers differ too.
    for side, label, style, colour in (
        ("gold", "gold", "s:", "#e69f00"), ("candidate", "M_t", "o-", "#0072b2"), ("initial", "M_0", "^--", "#666666"),
    ):  # fmt: skip
        rewards.plot(numbers, values("held_out_reward", side), style, label=label, color=colour, markersize=5)
    _win_rates(wins, iterations)
    wins.axhline(50, color=INK, linewidth=0.8, linestyle=":")
    wins.set_ylim(0, 100)
    for axes in (rewards, wins):
        axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
        _count_in_whole_steps(axes)
    finish(rewards, "Held-out reward", "iteration", "mean reward", legend="")
    finish(wins, "Win rate of M_t", "iteration", "prompts won (%), 95 % interval", legend=None)
    figure.legend(*wins.get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside lower center", ncols=2)
    return figure


def _win_rates(axes: "Axes", iterations: Sequence[FinishedIteration]) -> None:
    """A line with error bars for each judge's comparison with M_0, and for the independent judge's with M_{t-1}."""
    first, *others = judge_labels(iterations) or [""]
    shown = [(first, "initial", "M_0"), (first, "previous", "M_{t-1}")]
    shown += [(label, "initial", "M_0") for label in others]
    # Orange, blues and grey stay apart for colour-blind eyes, and the markers differ too.
    styles = (("o-", "#0072b2"), ("v:", "#56b4e9"), ("^--", "#666666"), ("s-.", "#e69f00"))
    for place, (label, opponent, name) in enumerate(shown):
        rates = [
            (int(iteration.key), rate.value, rate.low, rate.high)
            for iteration in iterations
            if (rate := iteration.metrics.find("win_rate", "candidate", over=opponent, by=label)) is not None
            and rate.value is not None and rate.low is not None and rate.high is not None
        ]  # fmt: skip
        style, colour = styles[place % len(styles)]
        # Side by side, so that the bars of one iteration do not cover each other.
        across = [number + 0.08 * (place - (len(shown) - 1) / 2) for number, *_ in rates]
        up = [100 * value for _, value, _, _ in rates]
        bars = [
            [100 * (value - low) for _, value, low, _ in rates],
            [100 * (high - value) for _, value, _, high in rates],
        ]
        axes.errorbar(
            across, up, bars, fmt=style, color=colour, markersize=4, linewidth=1.4, elinewidth=0.8, capsize=2,
            label=f"over {name}: {label}",
        )  # fmt: skip


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
