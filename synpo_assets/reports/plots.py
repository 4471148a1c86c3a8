"""The pictures of the boosting report.

Iterations are ordered, so older ones are fainter; the number at the end of a line is its iteration.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from resources.judging.judge_choice import INDEPENDENT
from synpo_assets.graph.boosting import FORMS
from synpo_assets.graph.drawing import BLUE, INK, ORANGE, PINK, Plot, finish, new_figure, plot_of
from synpo_assets.graph.metrics import Metric, MetricName
from synpo_assets.method.verifiable import BY_RULES
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.rows import judge_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 24
FAINTEST = 0.45
# Each point of a smoothed line is the mean of this share of the steps, around it.
SMOOTHED_SHARE = 8
HOW_TO_READ_REWARDS = (
    "Above zero the model being trained finds chosen answers likelier than rejected ones; a line that rises has learned to, "
    "also where it stays below zero. Each point is the mean over an eighth of the training, around it. Unit: {axis}."
)
STYLES = (("o-", BLUE), ("s--", ORANGE), ("^:", INK), ("v-.", PINK))


def draw_plots(iterations: Sequence[FinishedIteration]) -> list[Plot]:
    """Win rates first; then the reward margins of training (where rewards were recorded), margins of pairs, rewards, judges."""
    t = f"M_{iterations[-1].number}"
    logs = {iteration.number: iteration.rewards for iteration in iterations}
    plots = []
    if any(rate for line in _over_initial(iterations).values() for rate in line):
        text = (
            f"Win rates over M_0 by the independent judge on the test split, up to {t}: M_t, and what form alone wins."
        )
        plots.append(plot_of("win_rates", text, win_rates(iterations)))
    if any(logs.values()):
        reading = HOW_TO_READ_REWARDS.format(axis=iterations[-1].reward_axis)
        plots.append(plot_of("rewards", reading, reward_margins(logs)))
    text = f"Score margins of the preference pairs, up to iteration {iterations[-1].number}."
    plots.append(plot_of("margins", text, margin_histogram(iterations)))
    text = f"Mean reward by the scorer on the test split, up to {t}: M_t between M_0 and gold."
    plots.append(plot_of("held_out", text, held_out_rewards(iterations)))
    if any(rate for line in _other_judges(iterations).values() for rate in line):
        text = f"Win rates on the test split by each judge, up to {t}, over M_0 and over the model before."
        plots.append(plot_of("judges", text, _rates_figure("By each judge", iterations, _other_judges(iterations))))
    return plots


def win_rates(iterations: Sequence[FinishedIteration]) -> "Figure":
    """How often the independent judge prefers M_t, and M_0 in another form, to M_0."""
    return _rates_figure("Win rate over M_0", iterations, _over_initial(iterations))


def reward_margins(logs: Mapping[int, Sequence[Mapping[str, Any]]]) -> "Figure":
    """The reward of chosen less that of rejected over training steps, smoothed, one line per iteration."""
    figure = new_figure()
    axes = figure.add_subplot()
    for (number, log), strength in zip(logs.items(), _strengths(len(logs)), strict=True):
        if log:
            steps = [entry["step"] for entry in log]
            margins = smoothed([entry["rewards/chosen"] - entry["rewards/rejected"] for entry in log])
            axes.plot(steps, margins, "-", color=BLUE, alpha=strength, linewidth=1.8)
            axes.annotate(f" {number}", (steps[-1], margins[-1]), fontsize=10, color=INK, va="center")
    axes.axhline(0, color=INK, linewidth=1)
    axes.margins(x=0.08)
    _count_in_whole_steps(axes)
    finish(axes, "Reward margin while training", "optimizer step", "chosen less rejected")
    return figure


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value as the mean of those around it, an eighth of all.

    Examples:
        >>> smoothed([1.0, 2.0])
        [1.0, 2.0]
        >>> smoothed([0.0, 3.0] * 12)[1:4]
        [1.0, 2.0, 1.0]
    """
    window = max(1, len(values) // SMOOTHED_SHARE)
    return pl.Series(values, dtype=pl.Float64).rolling_mean(window, min_samples=1, center=True).to_list()


def margin_histogram(iterations: Sequence[FinishedIteration]) -> "Figure":
    """How the margins of the kept pairs that no rules decide are distributed, one outline per iteration over the same bins."""
    figure = new_figure()
    axes = figure.add_subplot()
    # Where rules decide, every margin is 1, in other units.
    margins = {iteration.number: iteration.pairs.filter(~BY_RULES)["margin"].to_list() for iteration in iterations}
    everything = [margin for values in margins.values() for margin in values]
    bounds = (min(everything), max(everything)) if everything else None
    for (number, values), strength in zip(margins.items(), _strengths(len(margins)), strict=True):
        axes.hist(
            values, bins=BINS, range=bounds, weights=[100 / max(len(values), 1)] * len(values), color=BLUE, alpha=strength,
            label=f"iteration {number} (n = {len(values):,})", histtype="step", linewidth=1.8,
        )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1)
    finish(axes, "Margins of the pairs kept", "score(chosen) - score(rejected)", "pairs (%)")
    return figure


def held_out_rewards(iterations: Sequence[FinishedIteration]) -> "Figure":
    """Mean reward of M_t between those of M_0 and gold."""
    figure = new_figure()
    axes = figure.add_subplot()
    numbers = [iteration.number for iteration in iterations]
    for side, label, (style, colour) in zip(
        ("candidate", "gold", "initial"), ("M_t", "gold", "M_0"), STYLES, strict=False
    ):
        values = [iteration.metrics.value("held_out_reward", side) for iteration in iterations]
        shown = [float("nan") if value is None else value for value in values]
        axes.plot(numbers, shown, style, label=label, color=colour, markersize=5)
    _by_iteration(axes, numbers)
    finish(axes, "Held-out reward, by the scorer", "iteration", "mean reward")
    return figure


Rates = Mapping[str, Sequence[Metric | None]]


def _over_initial(iterations: Sequence[FinishedIteration]) -> Rates:
    shown: dict[str, tuple[MetricName, str]] = {
        "M_t": ("win_rate", "candidate"), "M_t, length-controlled": ("length_controlled_win_rate", "candidate"),
        **{f"M_0 {form}": ("win_rate", form) for form in FORMS},
    }  # fmt: skip
    return {label: _rates(iterations, name, of, "initial", INDEPENDENT) for label, (name, of) in shown.items()}


def _other_judges(iterations: Sequence[FinishedIteration]) -> Rates:
    before = {"over M_t-1: independent judge": _rates(iterations, "win_rate", "candidate", "previous", INDEPENDENT)}
    return before | {
        f"over M_0: {label}": _rates(iterations, "win_rate", "candidate", "initial", label)
        for label in judge_labels(iterations)
    }


def _rates(
    iterations: Sequence[FinishedIteration], name: MetricName, of: str, over: str, by: str
) -> list[Metric | None]:
    found = (iteration.metrics.find(name, of, over=over, by=by) for iteration in iterations)
    return [rate if rate is not None and rate.value is not None else None for rate in found]


def _rates_figure(title: str, iterations: Sequence[FinishedIteration], lines: Rates) -> "Figure":
    """Win rates by iteration with their intervals, one line each."""
    figure = new_figure()
    axes = figure.add_subplot()
    numbers = [iteration.number for iteration in iterations]
    lines = {label: rates for label, rates in lines.items() if any(rates)}
    for place, (label, rates) in enumerate(lines.items()):
        known = [
            (number, rate.value, rate.low, rate.high)
            for number, rate in zip(numbers, rates, strict=True)
            if rate is not None and rate.value is not None
        ]
        values = [100 * value for _, value, _, _ in known]
        # Without a known end, a bar has no length.
        bars = [
            [100 * (value - (value if low is None else low)) for _, value, low, _ in known],
            [100 * ((value if high is None else high) - value) for _, value, _, high in known],
        ]
        # Side by side, so that the bars of one iteration do not cover each other.
        across = [number + 0.08 * (place - (len(lines) - 1) / 2) for number, *_ in known]
        style, colour = STYLES[place % len(STYLES)]
        axes.errorbar(
            across,
            values,
            bars,
            fmt=style,
            color=colour,
            markersize=4,
            linewidth=1.4,
            elinewidth=1,
            capsize=2,
            label=label,
        )
    axes.axhline(50, color=INK, linewidth=1)
    axes.set_ylim(0, 100)
    _by_iteration(axes, numbers)
    finish(axes, title, "iteration", "prompts won (%)")
    return figure


def _strengths(count: int) -> list[float]:
    """How strong the line of each iteration is: the newest is the strongest."""
    return [1 - (1 - FAINTEST) * (count - 1 - place) / max(count - 1, 1) for place in range(count)]


def _by_iteration(axes: "Axes", numbers: Sequence[int]) -> None:
    axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
    _count_in_whole_steps(axes)


def _count_in_whole_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
