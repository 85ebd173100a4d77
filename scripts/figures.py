"""What the scripts' pictures share: matplotlib, without which a script that draws ends before it computes, and axes."""

import importlib.util

from shared import UserError

# Okabe and Ito's colours, which stay apart for colour-blind readers
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#666666"


def check() -> None:
    """Raises UserError where nothing can draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('the pictures need matplotlib: pip install "cleanpo[plot]"')


def canvas(mosaic: list[list[str]], size: tuple[float, float]):
    """A figure without a display, and its axes by letter."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(mosaic)
    for one in axes.values():
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label(axes, title: str, x: str, y: str) -> None:
    """Title, labels with units, and a legend where there is something to tell apart."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
