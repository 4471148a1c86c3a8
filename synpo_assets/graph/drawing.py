"""How plots are drawn: small PNGs without a display, in one style, as data addresses for pages and metadata."""

import base64
import dataclasses
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES, DOTS_PER_INCH = (6.4, 3.6), 100
INK, GRID = "#333333", "#dddddd"


@dataclasses.dataclass(frozen=True)
class Plot:
    """A PNG as a `data:` address, with its name in a word or two, and a sentence for those who do not see it."""

    name: str
    description: str
    data_uri: str


def new_figure() -> "Figure":
    """An empty figure."""
    # Not pyplot: it keeps every figure in a global list and asks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")


def plot_of(name: str, description: str, figure: "Figure") -> Plot:
    """A drawn figure as a plot."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Plot(name, description, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")


def finish(axes: "Axes", title: str, across: str, up: str, legend: str | None = "iteration") -> None:
    """Titles, labels, grid and legend in the one style."""
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
