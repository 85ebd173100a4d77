"""Runs as curves: runs that differ in their seed alone are one curve, with their mean and their range at each step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.lab.runs import RunLog, series
from shared.run import FREE_ON_RESUME

# These do not change what a run computes, or differ between the runs of one curve by intention.
# The intervals of the log stay, because a line is a mean over the groups since the line before.
NO_SETTINGS = {*FREE_ON_RESUME, "seed"} - {"log_every", "eval_every", "model", "reference", "train_data", "eval_data"}


@dataclass
class Curve:
    """Runs of one algorithm with the same settings and rows."""

    label: str
    runs: list[RunLog]
    differences: str = ""  # the settings that differ between this curve and others

    @property
    def algorithm(self) -> str:
        return self.runs[0].algorithm

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.runs[0])

    @property
    def seeds(self) -> list[Any]:
        return [run.args.get("seed") for run in self.runs]

    def has(self, metric: str) -> bool:
        """Whether any of the runs has logged the metric."""
        return any(metric in run.metrics for run in self.runs)

    def band(self, metric: str) -> "Band":
        """The mean and the range of the runs that have logged the metric, at the steps that all of them have."""
        all_values = [series(run.lines, metric) for run in self.runs if metric in run.metrics]
        band = Band([], [], [], [])
        if not all_values:
            return band
        common = set(all_values[0]).intersection(*all_values)
        for step in sorted(common):
            at_step = [values[step] for values in all_values]
            band.steps.append(step)
            band.mean.append(sum(at_step) / len(at_step))
            band.low.append(min(at_step))
            band.high.append(max(at_step))
        return band


@dataclass
class Band:
    """At each step the mean of some runs, and the smallest and the largest of their values."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def settings_of(run: RunLog) -> dict[str, Any]:
    """The arguments that decide which curve a run belongs to."""
    return {name: value for name, value in run.args.items() if name not in NO_SETTINGS}


def group_seeds(runs: list[RunLog]) -> list[Curve]:
    """The runs as curves, in their order, with labels that tell them apart."""
    curves: list[Curve] = []
    for run in runs:
        for curve in curves:
            first = curve.runs[0]
            is_alike = first.algorithm == run.algorithm and first.data == run.data
            if is_alike and curve.settings == settings_of(run):
                curve.runs.append(run)
                break
        else:
            curves.append(Curve("", [run]))
    _label(curves)
    return curves


def _label(curves: list[Curve]) -> None:
    """Label curves by algorithm and by the settings that differ, and by directories where that is not enough.

    What differs between algorithms alone is in `differences`, because their names already tell these curves apart.
    """
    for curve in curves:
        siblings = [other for other in curves if other.algorithm == curve.algorithm]
        names = _differing(siblings)
        curve.label = ", ".join([curve.algorithm, *_shown(curve, names)])
        more = [name for name in _differing(curves) if name not in names]
        curve.differences = ", ".join(_shown(curve, names + more))

    labels = [curve.label for curve in curves]
    for curve in curves:
        if labels.count(curve.label) > 1:
            directories = [str(run.path) for run in curve.runs]
            curve.label += f" ({', '.join(directories)})"


def _differing(curves: list[Curve]) -> list[str]:
    """The settings that all curves have, and that differ between some of them."""
    names = []
    first = curves[0].settings
    for name, value in first.items():
        others = [curve.settings for curve in curves]
        if all(name in settings for settings in others) and any(settings[name] != value for settings in others):
            names.append(name)
    return names


def _shown(curve: Curve, names: list[str]) -> list[str]:
    texts = []
    for name in names:
        value = curve.settings[name]
        if isinstance(value, float):
            value = f"{value:g}"
        elif isinstance(value, str) and "/" in value:
            value = Path(value).name
        texts.append(f"{name} {value}")
    return texts
