"""Curves of one or many training runs, also of runs that go on: a PNG, and a web page that needs no network.

Runs of one algorithm that differ in their seed alone are one curve: their mean, and a band from the smallest to the
largest value at each step. Solid lines are training, where each point is the mean over the groups since the line of
the log before it. Dashed lines are held-out rows. docs/metrics.md explains the metrics.

Algorithms share axes where their numbers can be compared: accuracies, log-probs, and rewards of one unit. Each
algorithm has other axes for its loss. scripts/evaluate.py answers which policy is better.

    python scripts/plot.py runs/dpo-0 runs/dpo-1 runs/ipo-0 --metrics rewards/accuracies logps/chosen
"""

import html
import io
import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from scripts.lab import plots
from scripts.lab.commands import checked_command
from scripts.lab.curves import Band, Curve, group_seeds
from scripts.lab.logged import MOST_TELLING, OF_THE_RUN, axes_of, bare, is_reward, reward_scale, unit
from scripts.lab.runs import HELD_OUT, RunLog, read_run
from shared import StorageError, UserError
from shared.files import replacing, storage_errors, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 6  # of a picture whose metrics are not given
COLUMNS = 3
PANEL_WIDTH = 4.0  # inches
PANEL_HEIGHT = 2.7
LEGEND_ROW_HEIGHT = 0.2
DPI = 100  # of the PNG
SVG_DPI = 72  # matplotlib's, for which nothing can be chosen
MAX_ROWS = 200  # of a table on the page, and hover fields of a panel
LEGEND_ROWS = 3  # or more, if labels are long
LEGEND_WIDTH = 110  # characters of the labels side by side
RANGE_LABEL = "band: smallest to largest value of the seeds"
MARK = "Runs"  # the entry of a PNG, and of the page, that says which runs it shows


@dataclass(kw_only=True)
class Args:
    """Plot the curves of training runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """output directories of the runs, such as `runs/dpo-0 runs/dpo-1`"""
    metrics: tuple[str, ...] = ()
    """metrics to show, such as `loss rewards/margins`, held-out rows beside training; `eval/loss` shows held-out rows
    alone; default: those that the runs share, in at most six panels"""
    output: Path | None = None
    """html file to write; the same picture is written beside it as .png; default: curves.html in the directory of the
    run, or in the directory that holds all runs; a picture of other runs is not overwritten"""


@dataclass
class Panel:
    """A metric of curves that share axes."""

    metric: str
    title: str
    unit: str
    curves: list[Curve]

    @property
    def sets(self) -> dict[str, str]:
        """The metric's name for each set of rows that is shown."""
        if self.metric.startswith(HELD_OUT):
            return {"held out": self.metric}
        return {"training": self.metric, "held out": HELD_OUT + self.metric}


# ---------------------------------------------------------------- runs


def read_runs(paths: Iterable[Path]) -> list[RunLog]:
    """What the runs have left. Raises UserError if there is no run, one is given twice, or nothing is logged."""
    runs: list[RunLog] = []
    for path in paths:
        for run in runs:
            if run.path.resolve() == path.resolve():
                raise UserError(f"{path}: given twice")
        runs.append(read_run(path))
    if not runs:
        raise UserError("no run to plot; give the output directories of one or more runs, before --metrics")
    if not any(run.lines for run in runs):
        raise UserError(f"{runs[0].path}: nothing is logged yet; a line comes every --log-every steps")
    return runs


def remarks(curves: list[Curve], panels: list[Panel]) -> list[str]:
    """What a reader of the picture has to know of these runs."""
    texts = []
    for curve in curves:
        reached = [run.step for run in curve.runs]
        for run in curve.runs:
            if run.state != "done" or run.step < run.last_step:
                texts.append(f"{run.path}: {run.state}, logged up to step {run.step} of {run.last_step}.")
        if len(set(reached)) > 1:
            texts.append(f"{curve.label}: a mean is shown at the steps that all runs have logged.")

    for panel in panels:
        missing = [curve.label for curve in curves if not _shows(curve, panel.metric)]
        if missing:
            texts.append(f"{panel.metric}: not logged by {'; '.join(missing)}.")
        scales = {str(reward_scale(curve.runs[0].args)) for curve in panel.curves}
        if is_reward(panel.metric) and len(scales) > 1:
            texts.append(f"{panel.metric}: β or τ differs, and so does the unit; accuracies and logps can be compared.")
    return list(dict.fromkeys(texts))


# ---------------------------------------------------------------- panels


def make_panels(curves: list[Curve], metrics: tuple[str, ...]) -> list[Panel]:
    """The panels, in the order of the metrics. Raises UserError for a metric that no run has logged."""
    if not metrics:
        return default_panels(curves)
    panels = []
    for metric in dict.fromkeys(metrics):
        if not any(_shows(curve, metric) for curve in curves):
            known = ", ".join(sorted(all_metrics(curves)))
            raise UserError(f"--metrics {metric}: no run has logged it; there are {known}")
        panels += panels_of(metric, curves)
    return panels


def all_metrics(curves: list[Curve]) -> list[str]:
    """What any of the runs has logged, without the marks of held-out rows."""
    names: dict[str, None] = {}
    for curve in curves:
        for run in curve.runs:
            names |= dict.fromkeys(bare(metric) for metric in run.metrics)
    return list(names)


def default_panels(curves: list[Curve]) -> list[Panel]:
    """The metrics that all curves share, the most telling ones first, as long as there is room for their panels."""
    names = [name for name in all_metrics(curves) if name not in OF_THE_RUN]
    known = [name for name in MOST_TELLING if name in names]
    others = [name for name in names if name not in MOST_TELLING]

    started = [curve for curve in curves if any(run.lines for run in curve.runs)]
    panels: list[Panel] = []
    for metric in known + others:
        if all(_shows(curve, metric) for curve in started):
            more = panels_of(metric, curves)
            if len(panels) + len(more) <= MAX_PANELS:
                panels += more
    if not panels:
        raise UserError("the runs share no metric that fits into six panels; choose some with --metrics")
    return panels


def panels_of(metric: str, curves: list[Curve]) -> list[Panel]:
    """A panel for each group of curves that may be compared by the metric."""
    by_axes: dict[str, list[Curve]] = {}
    for curve in curves:
        if _shows(curve, metric):
            by_axes.setdefault(axes_of(metric, curve.algorithm), []).append(curve)

    panels = []
    for group in by_axes.values():
        title = metric
        algorithms = dict.fromkeys(curve.algorithm for curve in group)
        if len(by_axes) > 1:
            title += f" of {', '.join(algorithms)}"
        panels.append(Panel(metric, title, unit(metric, group[0].algorithm), group))
    return panels


def _shows(curve: Curve, metric: str) -> bool:
    return curve.has(metric) or curve.has(HELD_OUT + metric)


# ---------------------------------------------------------------- the picture


def make_figure(panels: list[Panel], curves: list[Curve]) -> tuple["Figure", list["Axes"]]:
    """The panels with one legend below them, and the axes of each panel."""
    columns = min(COLUMNS, len(panels))
    if len(panels) == 4:
        columns = 2
    names: list[Any] = list(range(len(panels)))
    while len(names) % columns:
        names.append(".")
    mosaic = [names[start : start + columns] for start in range(0, len(names), columns)]

    legend_height = LEGEND_ROW_HEIGHT * legend_rows([curve.label for curve in curves])
    size = (PANEL_WIDTH * max(columns, 2), PANEL_HEIGHT * len(mosaic) + legend_height)
    figure, all_axes = plots.canvas(mosaic, size)
    figure.set_dpi(SVG_DPI)
    color_of = dict(zip([curve.label for curve in curves], plots.colors(len(curves)), strict=True))
    for i, panel in enumerate(panels):
        for curve in panel.curves:
            plot_curve(all_axes[i], panel, curve, color_of[curve.label])
        all_axes[i].grid(axis="y", color="#e4e4e4", linewidth=0.8)
        all_axes[i].set_axisbelow(True)
        plots.label_axes(all_axes[i], plots.plain_text(panel.title), "optimizer step", panel.unit)
    add_legend(figure, panels, color_of)
    return figure, [all_axes[i] for i in range(len(panels))]


def plot_curve(axes: "Axes", panel: Panel, curve: Curve, color: str) -> None:
    """Training as a solid line, held-out rows as a dashed one with points, each with the band of its runs."""
    styles = {"training": "-", "held out": "--"}
    for rows, metric in panel.sets.items():
        band = curve.band(metric)
        if not band.steps:
            continue
        marker = ""
        if rows == "held out" or len(band.steps) == 1:
            marker = "o"
        axes.plot(band.steps, band.mean, styles[rows], color=color, linewidth=1.5, marker=marker, markersize=3)
        if len(curve.runs) > 1:
            axes.fill_between(band.steps, band.low, band.high, color=color, alpha=0.15, linewidth=0)
            if len(band.steps) == 1:
                axes.vlines(band.steps, band.low, band.high, color=color, alpha=0.3)


def legend_rows(labels: list[str]) -> int:
    """The rows of the legend: so many that its columns fit side by side."""
    longest = max(map(len, labels))
    rows = LEGEND_ROWS
    while rows < len(labels) and -(-len(labels) // rows) * longest > LEGEND_WIDTH:
        rows += 1
    return rows


def add_legend(figure: "Figure", panels: list[Panel], color_of: dict[str, str]) -> None:
    """What the colours, the strokes and the bands mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    strokes: list[Any] = []
    for label, color in color_of.items():
        strokes.append(Line2D([], [], color=color, linewidth=2.5, label=plots.plain_text(label)))

    styles: list[Any] = [Line2D([], [], color=plots.GREY, label="training")]
    shown = [(curve, panel) for panel in panels for curve in panel.curves]
    if any(curve.has(panel.sets["held out"]) for curve, panel in shown):
        styles.append(Line2D([], [], color=plots.GREY, linestyle="--", marker="o", markersize=3, label="held out"))
    if any(len(curve.runs) > 1 for curve, _ in shown):
        styles.append(Patch(color=plots.GREY, alpha=0.15, label=RANGE_LABEL))

    rows = legend_rows(list(color_of))
    handles: list[Any] = []
    for column in (strokes, styles):
        handles += column
        while len(handles) % rows:  # a legend is filled column by column
            handles.append(Line2D([], [], linestyle="none", label=" "))
    columns = len(handles) // rows
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def to_png(figure: "Figure", mark: str) -> bytes:
    """The picture in 256 colours, with a text in it that says which runs it shows."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    picture = Image.open(file).convert("RGB")

    info = PngInfo()
    info.add_text(MARK, mark)
    file = io.BytesIO()
    picture.quantize(256).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


# ---------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light; }
body { max-width: 1240px; margin: 0 auto; padding: 24px 20px 64px; color: #222; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; } h2 { font-size: 20px; margin-top: 36px; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
.hover { fill: transparent; } .hover:hover { fill: rgba(0, 0, 0, 0.08); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #666; }
th, td { text-align: left; padding: 3px 16px 3px 0; border-bottom: 1px solid #e4e4e4; font-size: 14px; }
summary { cursor: pointer; padding: 4px 0; }
"""


def page(curves: list[Curve], panels: list[Panel], notes: list[str], mark: str) -> str:
    """The whole page as HTML: the picture, the runs, and the numbers."""
    figure, all_axes = make_figure(panels, curves)
    svg = plots.to_svg(figure)
    hover = "".join(hover_fields(figure, axes, panel) for axes, panel in zip(all_axes, panels, strict=True))
    names = ", ".join(panel.title for panel in panels)
    label = html.escape(f"Curves of {names}; the numbers are in the tables below", quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).replace("</svg>", f"{hover}</svg>")
    title = html.escape(", ".join(curve.label for curve in curves))
    tables = "".join(metric_table(panel) for panel in panels)
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="{MARK}" content="{html.escape(mark, quote=True)}">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>Solid: training, the mean over the groups since the line of the log before. Dashed: held-out rows. Where a curve has
several runs, the line is their mean and the band goes from the smallest to the largest. docs/metrics.md explains the
metrics, and scripts/evaluate.py answers which policy is better.</p>
{svg}
{paragraphs}
<h2>Runs</h2>
{runs_table(curves)}
<h2>Numbers</h2>
{tables}
</body></html>
"""


def hover_fields(figure: "Figure", axes: "Axes", panel: Panel) -> str:
    """Invisible fields over a panel, one for each step, that show its values when the mouse points at them."""
    bands = panel_bands(panel)
    steps = thinned(sorted({step for band in bands.values() for step in band.steps}))
    box = axes.get_window_extent()
    page_height = figure.get_figheight() * SVG_DPI
    centres = [float(axes.transData.transform((step, 0))[0]) for step in steps]
    edges = [box.x0]
    edges += [(left + right) / 2 for left, right in zip(centres, centres[1:], strict=False)]
    edges.append(box.x1)

    fields = []
    for i, step in enumerate(steps):
        lines = [f"step {step}"]
        for name, band in bands.items():
            value = value_text(band, step)
            if value:
                lines.append(f"{name}: {value}")
        text = html.escape("\n".join(lines))
        place = f'x="{edges[i]:.1f}" y="{page_height - box.y1:.1f}"'
        extent = f'width="{edges[i + 1] - edges[i]:.1f}" height="{box.height:.1f}"'
        fields.append(f'<rect class="hover" {place} {extent}><title>{text}</title></rect>')
    return "".join(fields)


def panel_bands(panel: Panel) -> dict[str, Band]:
    """The numbers of a panel, by the label of the curve and the set of rows."""
    bands = {}
    for curve in panel.curves:
        for rows, metric in panel.sets.items():
            if curve.has(metric):
                bands[f"{curve.label}, {rows}"] = curve.band(metric)
    return bands


def thinned(steps: list[int]) -> list[int]:
    """At most MAX_ROWS of the steps, evenly, with the last one."""
    stride = -(-len(steps) // MAX_ROWS)
    return steps[::-1][:: max(1, stride)][::-1]


def value_text(band: Band, step: int) -> str:
    """The mean at a step, and the range where it is one; empty if there is no value."""
    i = bisect_left(band.steps, step)
    if step not in band.steps[i : i + 1]:
        return ""
    text = f"{band.mean[i]:.5g}"
    if band.low[i] < band.high[i]:
        text += f" ({band.low[i]:.5g} to {band.high[i]:.5g})"
    return text


def runs_table(curves: list[Curve]) -> str:
    """Which runs each curve is made of, and how they stand."""
    rows = []
    for curve in curves:
        for run in curve.runs:
            cells = [curve.label, str(run.path), curve.differences, str(run.args.get("seed"))]
            rows.append([*cells, run.state, f"{run.step} of {run.last_step}"])
    return table(
        "How the runs of each curve stand.", ["curve", "run", "what differs", "seed", "state", "last step logged"], rows
    )


def metric_table(panel: Panel) -> str:
    """The numbers of a panel, folded away."""
    bands = panel_bands(panel)
    steps = sorted({step for band in bands.values() for step in band.steps})
    rows = []
    for step in thinned(steps):
        cells = [value_text(band, step) for band in bands.values()]
        rows.append([str(step), *cells])

    caption = "Means; of several runs the smallest and the largest value in brackets."
    if len(rows) < len(steps):
        caption += f" {len(rows)} of {len(steps)} steps; all are in metrics.jsonl."
    summary = html.escape(", ".join(filter(None, [panel.title, panel.unit])))
    return f"<details><summary>{summary}</summary>{table(caption, ['step', *bands], rows)}</details>"


def table(caption: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table whose first column and first row are headings."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        body += f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>'
    return f'<div class="scroll"><table><caption>{caption}</caption><tr>{head}</tr>{body}</table></div>'


# ---------------------------------------------------------------- output


def output_files(args: Args) -> tuple[Path, Path]:
    """The page and the picture to write. Raises UserError for another ending than .html."""
    output = args.output
    if output is None:
        parents = [path.resolve().parent for path in args.runs]
        directory = Path(os.path.relpath(os.path.commonpath(parents)))
        if len(args.runs) == 1:
            directory = args.runs[0]
        output = directory / "curves.html"
    if output.suffix != ".html":
        raise UserError(f"--output {output}: must end in .html; the .png is written beside it")
    return output, output.with_suffix(".png")


def mark_of(paths: Iterable[Path], output: Path) -> str:
    """The runs of a picture, as seen from its directory."""
    directory = output.resolve().parent
    return json.dumps(sorted(os.path.relpath(path.resolve(), directory) for path in paths))


def mark_in(path: Path) -> str | None:
    """The runs that an earlier page or picture shows; None if the file is something else."""
    content = path.read_bytes()
    if path.suffix == ".png":
        from PIL import Image

        try:
            return Image.open(io.BytesIO(content)).info.get(MARK)
        except OSError:  # not a picture
            return None
    match = re.search(f'<meta name="{MARK}" content="([^"]*)">', content.decode(errors="replace"))
    if match is None:
        return None
    return html.unescape(match[1])


def check_free(path: Path, mark: str) -> None:
    """Raises UserError if the file holds something else than a picture of the same runs."""
    try:
        if path.exists() and mark_in(path) != mark:
            raise UserError(f"{path}: is there, and not a picture of these runs; give another --output, or delete it")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def main(args: Args) -> None:
    """Write the picture and the page, and print what they show."""
    plots.require_matplotlib()
    runs = read_runs(args.runs)
    page_file, picture_file = output_files(args)
    mark = mark_of(args.runs, page_file)
    check_free(page_file, mark)
    check_free(picture_file, mark)

    curves = group_seeds(runs)
    panels = make_panels(curves, args.metrics)
    notes = remarks(curves, panels)
    try:
        with storage_errors(page_file):
            page_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(page_file, page(curves, panels, notes, mark))
        figure, _ = make_figure(panels, curves)
        with storage_errors(picture_file), replacing(picture_file) as temporary:
            temporary.write_bytes(to_png(figure, mark))
    except StorageError as error:
        raise UserError(str(error)) from None

    for curve in curves:
        print(f"{curve.label}: {len(curve.runs)} run(s), seed {', '.join(map(str, curve.seeds))}")
    for note in notes:
        print(note)
    print(f"{page_file} and {picture_file.name} written")


if __name__ == "__main__":
    checked_command(main, Args)
