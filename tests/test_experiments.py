"""Findings with intervals, the verdicts that follow from them, a program of experiments, and its rows on the page."""

import importlib
import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import pytest
import tiny
import torch
import tyro

from scripts import results
from scripts.lab import pipeline
from scripts.lab.claim_files import finding_text, read_results
from scripts.lab.claims import Finding, given, instead, judged, reported
from scripts.lab.experiments import (
    Args,
    Reproduction,
    Study,
    above_by_interval,
    below_by_interval,
    between_by_interval,
    experiments_command,
    reported_with_interval,
    reproduction_of,
)
from scripts.lab.pipeline import Plan, Stage
from scripts.lab.statistics import mean_over_seeds
from scripts.lab.worlds import world_a, world_c
from shared import UserError
from shared.command import check_arguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBER = {"mean": 0.31, "interval": (0.12, 0.5)}


# ---------------------------------------------------------------- findings and verdicts


@pytest.mark.parametrize(
    "finding, expected, holds",
    [
        (above_by_interval("x", 0.11, NUMBER), "> 0.11", True),
        (above_by_interval("x", 0.12, NUMBER), "> 0.12", False),
        (above_by_interval("x", 0.2, NUMBER), "> 0.2", False),  # the mean is, the interval is not
        (below_by_interval("x", 0.51, NUMBER), "< 0.51", True),
        (below_by_interval("x", 0.4, NUMBER), "< 0.4", False),
        (between_by_interval("x", 0, 1, NUMBER), "in [0, 1]", True),
        (between_by_interval("x", 0.2, 1, NUMBER), "in [0.2, 1]", False),
        (between_by_interval("x", 0, 0.4, NUMBER), "in [0, 0.4]", False),
        (reported_with_interval("x", NUMBER), "", None),
    ],
)
def test_a_finding_holds_if_its_whole_interval_does(finding: Finding, expected: str, holds: bool | None) -> None:
    assert finding == Finding("x", expected, "0.31 [0.12, 0.50]", holds, "paper", (0.12, 0.5))


HOLDS = above_by_interval("a", 0, NUMBER)
FAILS = above_by_interval("b", 1, NUMBER)


@pytest.mark.parametrize(
    "findings, verdict",
    [
        ([HOLDS], "reproduced"),
        ([HOLDS, HOLDS, reported("x", 1), reported_with_interval("y", NUMBER)], "reproduced"),
        ([HOLDS, judged("exact", "> 0", 1, True)], "reproduced"),
        ([HOLDS, judged("exact", "> 0", -1, False)], "partly"),
        ([HOLDS, FAILS], "partly"),
        ([FAILS], "not reproduced"),
        ([FAILS, FAILS, instead(HOLDS), given(HOLDS)], "not reproduced"),
        ([HOLDS, given(HOLDS)], "reproduced"),
        ([HOLDS, given(FAILS)], "partly"),
    ],
)
def test_the_verdict_follows_from_the_findings(findings: list[Finding], verdict: str) -> None:
    assert reproduction_of(findings).value == verdict


@pytest.mark.parametrize(
    "findings",
    [[], [reported_with_interval("x", NUMBER)], [judged("x", "> 0", 1, True)], [given(HOLDS)], [instead(HOLDS)]],
)
def test_no_verdict_without_an_interval(findings: list[Finding]) -> None:
    with pytest.raises(ValueError, match="a number with an interval"):
        reproduction_of([*findings, reported("y", 1)])


def test_what_fails_is_said_on_its_line() -> None:
    assert finding_text(HOLDS) == "a: 0.31 [0.12, 0.50] (expected > 0)"
    assert finding_text(FAILS) == "b: 0.31 [0.12, 0.50] (expected > 1: no)"


# ---------------------------------------------------------------- a program


DRAW = """
import json, pathlib, random, sys
_, out, shift, seed = sys.argv
random.seed(f"{shift} {seed}")
numbers = [random.gauss(float(shift), 1) for _ in range(200)]
pathlib.Path(out).mkdir()
(pathlib.Path(out) / "numbers.json").write_text(json.dumps(numbers))
"""


class Numbers(NamedTuple):
    high: Stage
    low: Stage


def numbers(plan: Plan, seed: int) -> Numbers:
    high = plan.stage(f"high/{seed}", f"scripts/draw.py {{out}} 0.5 {seed}")
    low = plan.stage(f"low/{seed}", f"scripts/draw.py {{out}} 0 {seed}")
    return Numbers(high, low)


def more(plan: Plan, seed: int) -> Stage:
    return plan.stage(f"more/{seed}", f"scripts/draw.py {{out}} 0.001 {seed}")


def values_of(stage: Stage) -> torch.Tensor:
    return torch.tensor(json.loads((stage / "numbers.json").path.read_text()))


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Study]:
    """Two experiments, of which one finds nothing and is not quick, on stages that write random numbers."""
    path = tmp_path / "root" / "scripts" / "draw.py"
    path.parent.mkdir(parents=True)
    path.write_text(DRAW)
    monkeypatch.setattr(pipeline, "ROOT", tmp_path / "root")
    handler = signal.getsignal(signal.SIGTERM)
    study = Study("small", "A small paper")

    @study.experiment("E1", "Fig 1", numbers, quick=True)
    def high_is_above_low(runs: list[Numbers]) -> Iterator[Finding]:
        """Sums are popular.

        Two hundred numbers of each.
        """
        differences = [values_of(run.high) - values_of(run.low) for run in runs]
        yield above_by_interval("difference", 0, mean_over_seeds(differences))

    @study.experiment("E2", "Fig 2", more)
    def more_is_far_above_zero(runs: list[Stage]) -> Iterator[Finding]:
        """Sums are large.

        Larger shifts were tried | none helped.
        """
        yield above_by_interval("mean", 0.5, mean_over_seeds([values_of(run) for run in runs]))

    @study.figure("All numbers.", numbers, quick=True)
    def histogram(runs: list[Numbers]) -> "Figure":
        from scripts.lab.plots import canvas

        figure, panels = canvas(["a"], (3, 2))
        for run in runs:
            panels["a"].hist(values_of(run.high))
        return figure

    yield study
    signal.signal(signal.SIGTERM, handler)


def arguments(tmp_path: Path, **changes: Any) -> Args:
    return Args(runs_dir=tmp_path / "runs", output_dir=tmp_path / "results", **changes)


def test_a_study_is_run_judged_and_written(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    experiments_command(study, arguments(tmp_path))
    printed = capsys.readouterr().out
    assert "9/9" in printed
    assert "E2    Fig 2                    not reproduced   Sums are large." in printed

    written = json.loads((tmp_path / "results" / "small_world.json").read_text())
    assert written["seeds"] == [0, 1, 2]
    assert [experiment["verdict"] for experiment in written["experiments"]] == ["reproduced", "not reproduced"]
    (finding,) = written["experiments"][0]["findings"]
    low, high = finding["interval"]
    assert 0 < low < 0.5 < high < 1
    (figure,) = written["figures"]
    assert figure == {"file": "small_world_histogram.png", "caption": "All numbers."}
    assert (tmp_path / "results" / figure["file"]).stat().st_size > 1_000


def test_quick_is_one_seed_of_the_quick_experiments(study: Study, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    experiments_command(study, arguments(tmp_path, quick=True))
    written = json.loads((tmp_path / "results" / "small_world.json").read_text())
    assert written["seeds"] == [0]
    assert [experiment["number"] for experiment in written["experiments"]] == ["E1"]
    assert sorted(path.name for path in (tmp_path / "runs").glob("*/*.json")) == ["0.json", "0.json"]


def test_a_single_experiment_runs_its_own_stages_and_writes_nothing(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    experiments_command(study, arguments(tmp_path, experiment="E2", seeds=(4,)))
    printed = capsys.readouterr().out
    assert "E2, Fig 2: Sums are large.\nLarger shifts were tried" in printed
    assert printed.endswith("not reproduced\n")
    assert [path.name for path in (tmp_path / "runs").glob("*") if path.is_dir()] == ["more"]
    assert not (tmp_path / "results").exists()


def test_the_plan_is_printed_and_nothing_runs(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    experiments_command(study, arguments(tmp_path, plan=True, seeds=(7,)))
    directory = tmp_path / "runs"
    assert capsys.readouterr().out.splitlines() == [
        f"python scripts/draw.py {directory}/high/7 0.5 7",
        f"python scripts/draw.py {directory}/low/7 0 7",
        f"python scripts/draw.py {directory}/more/7 0.001 7",
    ]
    assert not directory.exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"experiment": "E3"}, "the experiments on A small paper are E1, E2"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"seeds": ()}, "at least one seed"),
    ],
)
def test_mistakes_in_the_arguments(study: Study, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiments_command(study, arguments(tmp_path, **changes))


# ---------------------------------------------------------------- the page


def write_papers(directory: Path, experiments: list[dict] | None) -> None:
    """The file of a paper with one claim and two statements that are left to experiments, and that of these."""
    elsewhere = {"section": "Tests", "where": "Fig 1", "statement": "From the list.", "reason": "needs models"}
    paper = {
        "paper": "A small paper",
        "arxiv": "0000.00000",
        "command": "python scripts/papers/small.py",
        "claims": [
            {
                "number": "T1",
                "section": "Sums",
                "where": "Eq 1",
                "statement": "2 = 2.",
                "remark": "",
                "verdict": "holds",
                "findings": [judged("two", "2", 2, True)._asdict()],
            }
        ],
        "elsewhere": [{**elsewhere, "number": "E1"}, {**elsewhere, "number": "E2"}],
        "figures": [{"file": "small_sums.png", "caption": "Sums."}],
    }
    (directory / "small.json").write_text(json.dumps(paper))
    if experiments is not None:
        world = {
            "command": "python scripts/experiments/small.py",
            "seeds": [0, 1, 2],
            "experiments": experiments,
            "figures": [{"file": "small_world_bars.png", "caption": "Bars."}],
        }
        (directory / "small_world.json").write_text(json.dumps(world))


def tried(number: str, verdict: Reproduction, findings: list[Finding]) -> dict:
    return {
        "number": number,
        "where": "§1",
        "statement": f"Of {number}.",
        "remark": f"What was tried for {number}.",
        "verdict": verdict.value,
        "findings": [finding._asdict() for finding in findings],
    }


def page_of(directory: Path) -> str:
    page = directory / "results.md"
    results.main(results.Args(results_dir=directory, output=page))
    return page.read_text(encoding="utf-8")


def test_the_page_without_experiments(tmp_path: Path) -> None:
    write_papers(tmp_path, None)
    text = page_of(tmp_path)
    assert "| A small paper | 3 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 2 |" in text
    assert (
        "| T1 | Eq 1 | 2 = 2. | two: 2.0000 (expected 2) | holds | `python scripts/papers/small.py --claim T1` |"
        in text
    )
    assert "| E1 | Fig 1 | From the list. | needs models | not checked here |  |" in text
    assert "seeds 0" not in text


def test_an_experiment_takes_the_place_of_its_statement(tmp_path: Path) -> None:
    experiments = [
        tried("E2", Reproduction.PARTLY, [HOLDS, FAILS]),
        tried("E1", Reproduction.REPRODUCED, [HOLDS]),
    ]
    write_papers(tmp_path, experiments)
    text = page_of(tmp_path)
    assert "| A small paper | 3 | 1 | 0 | 0 | 0 | 1 | 1 | 0 | 0 |" in text
    command = "python scripts/experiments/small.py --experiment"
    first = f"| E1 | §1 | Of E1. | {finding_text(HOLDS)} | reproduced | `{command} E1` |"
    remark = "What was tried for E2."
    second = (
        f"| E2 | §1 | Of E2. | {finding_text(HOLDS)}<br>{finding_text(FAILS)}<br>{remark} | partly | `{command} E2` |"
    )
    assert f"{first}\n{second}\n" in text
    assert "experiments, seeds 0, 1, 2: `python scripts/experiments/small.py`" in text
    assert text.index("small_sums.png") < text.index("small_world_bars.png") < text.index("### Sums")
    assert "From the list." not in text


def test_an_experiment_without_its_statement_is_an_error(tmp_path: Path) -> None:
    write_papers(tmp_path, [tried("T1", Reproduction.REPRODUCED, [HOLDS])])
    with pytest.raises(UserError, match="leaves no statement T1"):
        page_of(tmp_path)

    (tmp_path / "small.json").unlink()
    with pytest.raises(UserError, match=r"no small.json beside small_world.json; scripts/papers/small.py writes it"):
        page_of(tmp_path)


# ---------------------------------------------------------------- the programs


PROGRAMS = sorted(path.stem for path in (tiny.ROOT / "scripts/experiments").glob("[!_]*.py"))


def study_of(program: str) -> Study:
    return importlib.import_module(f"scripts.experiments.{program}").STUDY


def check_command_lines(plan: Plan) -> None:
    """Every command line is one that its program takes. Of several that differ by numbers alone, one is checked."""
    different = {re.sub(r"[\d.]+", "0", stage.template): stage for stage in plan.stages.values()}
    for stage in different.values():
        script, *words = shlex.split(stage.command)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        arguments = get_type_hints(module.main)["args"]  # with sub-commands, a union
        check_arguments(tyro.cli(arguments, args=words))


def test_the_command_lines_of_the_worlds(tmp_path: Path) -> None:
    plan = Plan(tmp_path)
    for seed in (0, 1):
        assert world_a(plan, seed) == world_a(plan, seed)
        world_c(plan, seed)
    assert len(plan.stages) == 8
    check_command_lines(plan)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_command_lines_of_a_program(program: str, tmp_path: Path) -> None:
    study = study_of(program)
    plan = Plan(tmp_path)
    for stages in {chosen.stages for chosen in (*study.experiments, *study.figures)}:  # type: ignore[attr-defined]
        stages(plan, 3)
    check_command_lines(plan)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_experiments_are_statements_of_the_paper(program: str) -> None:
    """Their numbers are left to experiments, each once, and every one says how it is tried."""
    study = study_of(program)
    paper = importlib.import_module(f"scripts.papers.{study.paper}").PAPER
    numbers = [experiment.number for experiment in study.experiments]
    assert study.paper == program
    assert study.title == paper.title
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) <= {statement.number for statement in paper.elsewhere}
    assert all(experiment.statement and experiment.remark for experiment in study.experiments)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_result_file_has_the_experiments_of_the_code(program: str) -> None:
    study = study_of(program)
    (world,) = [paper["world"] for paper in read_results(tiny.ROOT / "results") if paper["paper"] == study.title]
    written = [(row["number"], row["where"], row["statement"], row["remark"]) for row in world["experiments"]]
    assert written == [(one.number, one.where, one.statement, one.remark) for one in study.experiments]
