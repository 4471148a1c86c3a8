"""How a training went, as a picture: its loss and, where two answers are compared, how often and how far the better one wins."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import polars as pl

from synpo_assets.graph.drawing import BLUE, INK, ORANGE, finish, new_figure, plot_of

# The running mean takes about this share of all steps together.
SMOOTHED_SHARE = 0.1
# What the trainers call the share of comparisons that the better answer wins, and by how much it does.
ACCURACY, MARGIN = ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")


def training_curves(history: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """Loss, margin and accuracy over the steps, faint as logged and strong as a running mean, with how to read them."""
    logged = pl.DataFrame(history, infer_schema_length=None)
    panels: list[tuple[str, str, float | None]] = [("Loss", "loss", None)]
    for title, names, chance in (("Reward margin", MARGIN, 0.0), ("Reward accuracy", ACCURACY, 0.5)):
        panels += [(title, name, chance) for name in names if name in logged.columns]
    figure, steps = new_figure(), max(1, round(SMOOTHED_SHARE * logged.height))
    for axes, (title, name, line) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = logged.select("step", pl.col(name).cast(pl.Float64)).drop_nulls()
        axes.plot(
            rows["step"], rows[name], color=BLUE, linewidth=0.8, alpha=0.35, marker="." if rows.height < 3 else None
        )
        axes.plot(rows["step"], rows[name].ewm_mean(span=steps), color=ORANGE, linewidth=1.8)
        if line is not None:
            axes.axhline(line, color=INK, linewidth=0.8, linestyle=":")
        finish(axes, title, "optimizer step", "")
    sentence = "The loss should fall and level out."
    if steps > 1:
        sentence += f" The strong lines are running means over about {steps} steps."
    if len(panels) > 1:
        sentence += (
            " The margin is by how much the better answer is ahead, the accuracy how often it is: both should rise, and end "
            "above the dotted line."
        )
    plot = plot_of("curves", "Loss and rewards of the training over its steps.", figure)
    return dg.MetadataValue.md(f"{sentence}\n\n![{plot.description}]({plot.data_uri})")
