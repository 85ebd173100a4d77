"""Means over seeds and prompts with their intervals, in the figures of the experiments."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scripts.lab.frontier import Curve
from scripts.lab.statistics import mean_over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOK: dict[str, Any] = {"fmt": "o-", "markersize": 3.5, "linewidth": 1, "elinewidth": 0.8, "capsize": 1.5}


def bars_of(numbers: Sequence[dict]) -> list[list[float]]:
    """How far the intervals reach below and above the means, as matplotlib wants it."""
    below = []
    above = []
    for number in numbers:
        low, high = number["interval"]
        below.append(number["mean"] - low)
        above.append(high - number["mean"])
    return [below, above]


def draw_numbers(axes: "Axes", x: Sequence[float], numbers: Sequence[dict], **look: Any) -> None:
    """Means with their intervals over x. `look` goes to matplotlib's errorbar, beside or in the place of LOOK."""
    means = [number["mean"] for number in numbers]
    axes.errorbar(x, means, yerr=bars_of(numbers), **{**LOOK, **look})


def draw_curve(axes: "Axes", curves: Sequence[Curve], **look: Any) -> None:
    """The mean of the seeds' curves, with the intervals of both coordinates."""
    kls = _points([curve.kls for curve in curves])
    values = _points([curve.values for curve in curves])
    means = [number["mean"] for number in kls]
    draw_numbers(axes, means, values, xerr=bars_of(kls), **look)


def _points(of_seeds: Sequence[Tensor]) -> list[dict]:
    """The mean of each point of curves (points, prompts), with its interval."""
    numbers = []
    for values in zip(*of_seeds, strict=True):
        numbers.append(mean_over_seeds(list(values)))
    return numbers


def legend_below(figure: "Figure", panels: Iterable["Axes"], columns: int) -> None:
    """One legend below all panels, which have the same labels, in the place of one in each of them."""
    handles: list[Any] = []
    labels: list[str] = []
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        legend = axes.get_legend()
        if legend is not None:
            legend.remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
