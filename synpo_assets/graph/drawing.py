"""How plots are drawn: SVGs without a display, in one style, that take the colours of the page that they stand in."""

import base64
import dataclasses
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# So wide that 10 points are still read on a phone.
INCHES = (4.6, 3.2)
# Two labels of this many characters stand beside each other.
LONG_LABEL = 27
INK, GRID = "#333333", "#dddddd"
# What is looked at, and what it is compared with: apart for colour-blind eyes, and seen on white and on black.
BLUE, ORANGE, PINK = "#0d7fc0", "#d55e00", "#c2679f"


@dataclasses.dataclass(frozen=True)
class Plot:
    """An SVG, with its name in a word or two, and a sentence for those who do not see it."""

    name: str
    description: str
    svg: str

    @property
    def data_uri(self) -> str:
        """As a picture with colours of its own, for pages that do not set them."""
        own = self.svg.replace("<svg ", f'<svg style="color: {INK}; background: white" ', 1)
        return f"data:image/svg+xml;base64,{base64.b64encode(own.encode()).decode()}"


def new_figure() -> "Figure":
    """An empty figure."""
    # Not pyplot: it keeps every figure in a global list and asks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=INCHES, layout="constrained", facecolor="none")


def plot_of(name: str, description: str, figure: "Figure") -> Plot:
    """A drawn figure as a plot."""
    from matplotlib import rc_context

    file = io.StringIO()
    # The salt makes ids that no other plot on a page has, and the same ones each time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    # Ink and grid are the page's.
    return Plot(name, description, svg.replace(INK, "currentColor").replace(GRID, f"var(--line, {GRID})"))


def finish(axes: "Axes", title: str, across: str, up: str) -> None:
    """Titles, labels, grid and, below it, the legend in the one style."""
    axes.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(across, fontsize=10, color=INK)
    axes.set_ylabel(up, fontsize=10, color=INK)
    axes.tick_params(labelsize=10, colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    figure, (handles, labels) = axes.figure, axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles, labels, fontsize=10, frameon=False, labelcolor=INK,
            loc="outside lower left", ncols=1 if max(map(len, labels)) > LONG_LABEL else 2, columnspacing=1, handlelength=1.6,
        )  # fmt: skip
