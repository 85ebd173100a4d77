"""What the commands' plots share: matplotlib, which is optional, colours, axes, and SVG for a web page."""

import importlib.util
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shared import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#AA4499"
GREY = "#666666"


def require_matplotlib() -> None:
    """Raises UserError if matplotlib is not installed. Call it before anything expensive."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('the pictures need matplotlib: pip install -e ".[plot]"')


def canvas(mosaic: Sequence[Sequence[Any]], size: tuple[float, float]) -> tuple["Figure", dict[Any, "Axes"]]:
    """A figure that needs no display, and its axes by their names in `mosaic`; `size` is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)

    panels: dict[Any, Axes] = figure.subplot_mosaic([list(row) for row in mosaic])
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def label_axes(axes: "Axes", title: str, x_label: str, y_label: str) -> None:
    """Set the title and the labels with their units; add a legend if a plot has a label."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)

    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(fontsize=8, frameon=False)


def to_svg(figure: "Figure") -> str:
    """The figure as inline SVG. It scales with the page and refers to nothing outside it; its text stays text."""
    import matplotlib

    file = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)

    text = file.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # HTML knows the namespaces, and the style sheet gives the size
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
