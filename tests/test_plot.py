"""scripts/plot.py: what is plotted is what was logged, seeds are one curve, runs that go on, the page, and mistakes."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from scripts import plot
from scripts.lab.curves import group_seeds
from scripts.lab.logged import bare
from scripts.lab.runs import read_run
from shared import UserError

DPO = {"beta": 0.1, "learning_rate": 1e-4, "train_data": "rows/pairs.jsonl", "log_every": 2, "eval_every": 4}


def make_lines(offset: float = 0.0, steps: int = 8) -> list[dict]:
    """Lines of a log as a run writes them: training every second step, held-out rows every fourth."""
    lines = []
    for step in range(2, steps + 1, 2):
        values = {"loss": 1 / step + offset, "rewards/accuracies": 0.5 + step / 100 + offset}
        lines.append({"step": step, **values, "rewards/margins": offset, "learning_rate": 1e-4})
        if step % 4 == 0:
            lines.append({"step": step, "eval/loss": 2 / step + offset, "eval/rewards/accuracies": 0.6})
    return lines


def write_run(path: Path, lines: list[dict], algorithm: str = "dpo", state: str = "done", **args: Any) -> Path:
    """The directory of a run of 8 steps."""
    path.mkdir(parents=True)
    all_args = {**DPO, "seed": 0, **args, "output_dir": str(path)}
    data = {"train": {"sha256": "abc", "rows": 3}}
    run = {"algorithm": algorithm, "args": all_args, "data": data, "steps": 8}
    (path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (path / "status.json").write_text(json.dumps({"state": state, "step": 8, "reason": ""}), encoding="utf-8")
    tiny.write_jsonl(path / "metrics.jsonl", lines)
    return path


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Three runs that differ in their seed, and one with another β."""
    paths = []
    for seed, offset in enumerate((0.0, 0.3, 0.9)):
        paths.append(write_run(tmp_path / f"dpo-{seed}", make_lines(offset), seed=seed))
    paths.append(write_run(tmp_path / "other", make_lines(), beta=0.5))
    return paths


def plot_runs(paths: list[Path], output: Path, *metrics: str) -> str:
    """Run the command in this process; returns the page."""
    plot.main(plot.Args(runs=tuple(paths), metrics=metrics, output=output))
    return output.read_text(encoding="utf-8")


def plotted(paths: list[Path], metric: str) -> Any:
    """The axes of a metric's only panel."""
    curves = group_seeds([read_run(path) for path in paths])
    panels = plot.make_panels(curves, (metric,))
    _, (axes,) = plot.make_figure(panels, curves)
    return axes


# ---------------------------------------------------------------- what is plotted


def test_mean_and_band_are_those_of_the_logs(seeds: list[Path]) -> None:
    axes = plotted(seeds[:3], "loss")
    training, held_out = axes.lines
    for step, value in training.get_xydata():
        assert value == pytest.approx(1 / step + 0.4)
    assert list(training.get_xdata()) == [2, 4, 6, 8]
    for step, value in held_out.get_xydata():
        assert value == pytest.approx(2 / step + 0.4)
    assert list(held_out.get_xdata()) == [4, 8]

    band, held_out_band = axes.collections
    (path,) = band.get_paths()
    corners = {(int(step), round(value, 9)) for step, value in path.vertices}
    for step in (2, 4, 6, 8):
        assert (step, round(1 / step, 9)) in corners
        assert (step, round(1 / step + 0.9, 9)) in corners
    assert held_out_band.get_paths()[0].get_extents().height == pytest.approx(0.25 + 0.9)


def test_held_out_rows_have_the_colour_of_their_training(seeds: list[Path]) -> None:
    axes = plotted(seeds, "loss")
    training, held_out, other, other_held_out = axes.lines
    assert training.get_color() == held_out.get_color() != other.get_color() == other_held_out.get_color()
    assert training.get_linestyle() == other.get_linestyle() == "-"
    assert held_out.get_linestyle() == other_held_out.get_linestyle() == "--"
    assert len(axes.collections) == 2  # one run has no band


def test_held_out_rows_alone(seeds: list[Path]) -> None:
    (line,) = plotted(seeds[:1], "eval/loss").lines
    assert line.get_linestyle() == "--"
    assert list(line.get_ydata()) == [0.5, 0.25]


def test_a_value_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    lines = make_lines()
    lines[0]["loss"] = None
    line, _ = plotted([write_run(tmp_path / "run", lines)], "loss").lines
    assert math.isnan(line.get_ydata()[0])
    assert line.get_ydata()[1] == 0.25


# ---------------------------------------------------------------- curves


def labels(paths: list[Path]) -> list[str]:
    return [curve.label for curve in group_seeds([read_run(path) for path in paths])]


def test_runs_that_differ_in_their_seed_are_one_curve(seeds: list[Path]) -> None:
    assert labels(seeds) == ["dpo, beta 0.1", "dpo, beta 0.5"]
    curves = group_seeds([read_run(path) for path in seeds])
    assert [curve.seeds for curve in curves] == [[0, 1, 2], [0]]


@pytest.mark.parametrize(
    "args, label",
    [
        ({"train_data": "other/swapped.jsonl"}, "train_data swapped.jsonl"),
        ({"learning_rate": 2e-3}, "learning_rate 0.002"),
        ({"log_every": 1}, "log_every 1"),
    ],
)
def test_labels_are_what_differs(tmp_path: Path, args: dict, label: str) -> None:
    first = write_run(tmp_path / "a", make_lines())
    second = write_run(tmp_path / "b", make_lines(), seed=1, **args)
    assert labels([first, second])[1] == f"dpo, {label}"


def test_what_differs_between_algorithms_is_not_in_the_label(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", make_lines())
    second = write_run(tmp_path / "b", make_lines(), algorithm="ipo", tau=0.1, learning_rate=3e-5)
    assert labels([first, second]) == ["dpo", "ipo"]
    page = plot_runs([first, second], tmp_path / "c.html")
    assert "<td>learning_rate 3e-05</td>" in page


def test_arguments_that_change_no_result_separate_nothing(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", make_lines())
    second = write_run(tmp_path / "b", make_lines(), seed=1, micro_batch_tokens=3, save_every=7, resume=True)
    assert labels([first, second]) == ["dpo"]


def test_other_rows_under_the_same_name_are_another_curve(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", make_lines())
    second = write_run(tmp_path / "b", make_lines(), seed=1)
    text = (second / "run.json").read_text(encoding="utf-8")
    (second / "run.json").write_text(text.replace("abc", "def"), encoding="utf-8")
    assert labels([first, second]) == [f"dpo ({first})", f"dpo ({second})"]


def test_algorithms_share_axes_where_their_units_agree(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, make_lines(), algorithm=name) for name in ("dpo", "exo", "ipo", "fork")]
    curves = group_seeds([read_run(path) for path in paths])

    def sharing(metric: str) -> list[list[str]]:
        return [[curve.algorithm for curve in panel.curves] for panel in plot.make_panels(curves, (metric,))]

    assert sharing("rewards/accuracies") == [["dpo", "exo", "ipo", "fork"]]
    assert sharing("rewards/margins") == [["dpo", "exo"], ["ipo"], ["fork"]]
    assert sharing("loss") == [["dpo"], ["exo"], ["ipo"], ["fork"]]


def test_default_metrics_are_shared_and_fit_into_six_panels(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "dpo", make_lines())]
    curves = group_seeds([read_run(path) for path in paths])
    titles = [panel.title for panel in plot.make_panels(curves, ())]
    assert titles == ["loss", "rewards/accuracies", "rewards/margins"]

    lines = [{"step": 1, "loss": 1.0, "grad_norm": 2.0}]
    paths.append(write_run(tmp_path / "sft", lines, algorithm="sft"))
    curves = group_seeds([read_run(path) for path in paths])
    assert [panel.title for panel in plot.make_panels(curves, ())] == ["loss of dpo", "loss of sft"]


# ---------------------------------------------------------------- runs that go on


def test_a_run_that_goes_on(tmp_path: Path, seeds: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "going", make_lines(0.1, steps=4), state="running", seed=7)
    (path / "status.json").unlink()
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "loss": 0.4')

    page = plot_runs([seeds[0], path], tmp_path / "c.html", "loss")
    said = capsys.readouterr().out
    assert f"{path}: state unknown, logged up to step 4 of 8" in said
    assert "at the steps that all runs have logged" in said
    assert str(path) in page
    assert list(plotted([seeds[0], path], "loss").lines[0].get_xdata()) == [2, 4]
    assert list(plotted([path], "loss").lines[0].get_xdata()) == [2, 4]


def test_a_run_without_a_line_yet(tmp_path: Path, seeds: list[Path]) -> None:
    path = write_run(tmp_path / "new", [], state="running", seed=7)
    assert list(plotted([seeds[0], path], "loss").lines[0].get_xdata()) == [2, 4, 6, 8]
    with pytest.raises(UserError, match="new: nothing is logged yet"):
        plot_runs([path], tmp_path / "c.html")


def test_a_run_that_was_resumed_with_another_interval(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [{"step": 4, "loss": 0.5}, {"step": 5, "loss": 0.25}, {"step": 6, "loss": 0.75}])
    (line,) = plotted([path], "loss").lines
    assert line.get_xydata().tolist() == [[4, 0.5], [5, 0.25], [6, 0.75]]


def test_a_real_run(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(8, seed=0, path=rows)
    run = tmp_path / "run"
    options: dict[str, Any] = {"model": model, "train_data": rows, "eval_data": rows, "batch_size": 4}
    lines = tiny.run("algos/dpo.py", run, log_every=1, eval_every=2, **options)
    last_line = tiny.read_log(run).splitlines()[-1]
    assert "docs/metrics.md" in last_line
    assert "scripts/evaluate.py" in last_line

    training, held_out = plotted([run], "loss").lines
    assert list(training.get_ydata()) == [line["loss"] for line in lines]
    assert list(training.get_xdata()) == [1, 2]
    assert len(held_out.get_xdata()) > 0

    documentation = (tiny.ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for metric in read_run(run).metrics:
        assert f"`{bare(metric)}`" in documentation, metric


# ---------------------------------------------------------------- the page


def test_the_page_is_self_contained_and_names_all_runs(tmp_path: Path, seeds: list[Path]) -> None:
    hostile = write_run(tmp_path / "<script> $x$ &", make_lines(), beta=9.0)
    page = plot_runs([*seeds, hostile], tmp_path / "c.html", "loss", "rewards/margins")
    assert "<script" not in page.lower()
    assert not re.search(r"https?:|//\w|src=|@import|url\((?!#)", page)
    assert page.count("<svg") == page.count("</svg>") == 1
    for path in seeds:
        assert f"<td>{path}</td>" in page
    assert "&lt;script&gt; $x$ &amp;</td>" in page
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")

    table = page[page.index("<summary>loss") :]
    assert '<th scope="row">8</th><td>0.525 (0.125 to 1.025)</td>' in table
    assert "step 8\ndpo, beta 0.1, training: 0.525 (0.125 to 1.025)" in page
    assert "rewards/margins: β or τ differs" in page
    assert "loss: β" not in page


def test_hover_fields_lie_over_their_panel(tmp_path: Path, seeds: list[Path]) -> None:
    page = plot_runs(seeds, tmp_path / "c.html", "loss")
    corners = re.search(r'id="axes_1">.*?<path d="M (\S+) (\S+) L (\S+) (\S+) L (\S+) (\S+)', " ".join(page.split()))
    assert corners is not None
    left, bottom, right, _, _, top = map(float, corners.groups())
    fields = re.findall(r'<rect class="hover" x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)">', page)
    assert len(fields) == 4
    x = left
    for field in fields:
        field_x, y, width, height = map(float, field)
        assert field_x == pytest.approx(x, abs=0.2)
        assert y == pytest.approx(top, abs=0.2)
        assert height == pytest.approx(bottom - top, abs=0.2)
        x = field_x + width
    assert x == pytest.approx(right, abs=0.2)


def test_a_long_run_has_short_tables(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0} for step in range(1, 1001)]
    page = plot_runs([write_run(tmp_path / "run", lines)], tmp_path / "c.html")
    assert page.count('<th scope="row">1000</th>') == 1
    assert "200 of 1000 steps" in page
    assert page.count('class="hover"') == 200


# ---------------------------------------------------------------- output and mistakes


def test_only_a_picture_of_the_same_runs_is_replaced(tmp_path: Path, seeds: list[Path]) -> None:
    output = tmp_path / "pictures" / "c.html"
    plot_runs(seeds[:2], output)
    plot_runs([seeds[1], seeds[0]], output, "loss")
    before = output.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="c.html: is there, and not a picture of these runs"):
        plot_runs(seeds, output)
    assert output.read_text(encoding="utf-8") == before

    output.unlink()
    with pytest.raises(UserError, match="c.png: is there, and not a picture of these runs"):
        plot_runs(seeds, output)
    (tmp_path / "d.png").write_bytes(b"something else")
    with pytest.raises(UserError, match="d.png: is there"):
        plot_runs(seeds, tmp_path / "d.html")


def test_where_the_picture_goes_by_default(seeds: list[Path]) -> None:
    assert plot.output_files(plot.Args(runs=(seeds[0],)))[0] == seeds[0] / "curves.html"
    page, picture = plot.output_files(plot.Args(runs=tuple(seeds)))
    assert page.resolve() == (seeds[0].parent / "curves.html").resolve()
    assert picture == page.with_suffix(".png")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: shutil.rmtree(path), "run: no such directory"),
        (lambda path: (path / "run.json").unlink(), "run: has no run.json"),
        (lambda path: (path / "run.json").write_text("{}"), "run.json: not a run.json of algos/"),
        (lambda path: (path / "run.json").write_text("{"), "run.json: cannot be read"),
        (lambda path: (path / "metrics.jsonl").unlink(), "metrics.jsonl: cannot be read"),
        (lambda path: (path / "metrics.jsonl").write_text("{}\n{}\n"), "metrics.jsonl, line 1: not a JSON object"),
    ],
)
def test_a_directory_without_a_run(tmp_path: Path, change: Any, message: str) -> None:
    path = write_run(tmp_path / "run", make_lines())
    change(path)
    with pytest.raises(UserError, match=message):
        plot_runs([path], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_mistakes_on_the_command_line(tmp_path: Path, seeds: list[Path]) -> None:
    with pytest.raises(UserError, match="--metrics los: no run has logged it; there are learning_rate, loss, rewards"):
        plot_runs(seeds, tmp_path / "c.html", "los")
    with pytest.raises(UserError, match="dpo-0: given twice"):
        plot_runs([seeds[0], seeds[0].parent / "." / "dpo-0"], tmp_path / "c.html")
    with pytest.raises(UserError, match="c.txt: must end in .html"):
        plot_runs(seeds, tmp_path / "c.txt")
    with pytest.raises(UserError, match="no run to plot"):
        plot_runs([], tmp_path / "c.html")

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        plot_runs(seeds, tmp_path / "file" / "c.html")
