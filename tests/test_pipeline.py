"""Stages as processes of tiny scripts: what is repeated after which change, and what a failure or a kill leaves."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.lab import pipeline
from scripts.lab.pipeline import Plan, Stage, clock, imported_files, meaning, seconds_to_the_end
from shared import UserError

# Each script notes when it started and ended. `number` holds what the next one reads.
SCRIPTS = {
    "shared/__init__.py": "",
    "shared/noting.py": """
import os, pathlib, sys, time

def arguments():
    return dict(zip(sys.argv[1::2], sys.argv[2::2]))

def note(text):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{text} {time.monotonic()}\\n")
""",
    "shared/factor.py": "def factor():\n    return 2\n",
    "scripts/__init__.py": "",
    "scripts/lab/__init__.py": "",
    "scripts/lab/multiply.py": """
'A text that stands alone.'
from shared import factor

def twice(x):
    return factor.factor() * x
""",
    "scripts/make.py": """
import pathlib, time
from shared.noting import arguments, note

given = arguments()
out = pathlib.Path(given["--output-dir"])
note(f"start {out.name}")
out.mkdir()
time.sleep(float(given.get("--seconds", 0)))
(out / "number").write_text(given["--number"])
note(f"end {out.name}")
""",
    "scripts/double.py": """
import pathlib
from shared.noting import arguments, note

def main():
    from scripts.lab.multiply import twice
    given = arguments()
    out = pathlib.Path(given["--output"]).parent
    note(f"start {out.name}")
    out.mkdir()
    (out / "number").write_text(str(twice(int(pathlib.Path(given["--rows"]).read_text()))))
    note(f"end {out.name}")

main()
""",
    "scripts/fail.py": """
import pathlib, sys
out = pathlib.Path(sys.argv[1])
out.mkdir()
(out / "half").write_text("written before the failure")
print("something\\nis wrong with the rows")
raise SystemExit(3)
""",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small project whose scripts the stages run."""
    for name, text in SCRIPTS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    monkeypatch.setattr(pipeline, "POLL", 0.01)
    monkeypatch.setattr(pipeline, "LIBRARIES", ())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def small_plan(root: Path, number: int = 5) -> Plan:
    """`make` and `other` write a number each, and `double` doubles that of `make`."""
    plan = Plan(root / "runs")
    make = plan.stage("make", f"scripts/make.py --output-dir {{out}} --number {number}")
    plan.stage("other", "scripts/make.py --output-dir {out} --number 7")
    plan.stage("deep/double", "scripts/double.py --rows {rows} --output {out}/number", rows=make / "number")
    return plan


def started(root: Path) -> list[str]:
    """The stages that have started since the last call, by name of their directories."""
    notes = root / "notes"
    lines = notes.read_text().splitlines() if notes.exists() else []
    notes.unlink(missing_ok=True)
    return sorted(line.split()[1] for line in lines if line.startswith("start"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ---------------------------------------------------------------- what is repeated


def test_a_stage_reads_what_another_has_made(root: Path) -> None:
    plan = small_plan(root)
    plan.run(jobs=2)
    assert (root / "runs/deep/double/number").read_text() == "10"
    assert started(root) == ["double", "make", "other"]

    record = json.loads((root / "runs/deep/double.json").read_text())
    double = plan.stages["deep/double"]
    assert record["command"] == f"python {double.command}" == plan.command_lines()[2]
    assert record["key"] == double.key
    assert record["seconds"] > 0
    assert (root / "runs/deep" / record["log"]).read_text().startswith(f"$ python {double.command}\n")


def test_nothing_is_repeated_without_a_change(root: Path) -> None:
    small_plan(root).run(jobs=2)
    started(root)
    small_plan(root).run(jobs=2)
    assert started(root) == []


CHANGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a comment": (
        lambda root: replace(root / "shared/factor.py", "def factor():\n", "# a remark\n\n\ndef factor():  # two\n"),
        [],
    ),
    "a docstring": (lambda root: replace(root / "scripts/lab/multiply.py", "A text", "Another text"), []),
    "a new docstring": (
        lambda root: replace(root / "shared/factor.py", "def factor():\n", 'def factor():\n    """Two."""\n'),
        [],
    ),
    "a script": (lambda root: replace(root / "scripts/double.py", "main()\n", "main()\nprint(1)\n"), ["double"]),
    "what a function imports": (lambda root: replace(root / "shared/factor.py", "2", "3"), ["double"]),
    "a package": (lambda root: (root / "scripts/lab/__init__.py").write_text("x = 1\n"), ["double"]),
    "what all import": (
        lambda root: replace(root / "shared/noting.py", "import os", "import os, re"),
        ["double", "make", "other"],
    ),
    "a file that none imports": (lambda root: (root / "shared/unused.py").write_text("x = 1\n"), []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_repeats(root: Path, change: str) -> None:
    small_plan(root).run(jobs=2)
    started(root)
    edit, expected = CHANGES[change]
    edit(root)
    small_plan(root).run(jobs=2)
    assert started(root) == expected


def test_a_flag_repeats_its_stage_and_what_depends_on_it(root: Path) -> None:
    small_plan(root).run(jobs=2)
    started(root)
    small_plan(root, number=6).run(jobs=2)
    assert started(root) == ["double", "make"]
    assert (root / "runs/deep/double/number").read_text() == "12"


def test_another_version_of_a_library_repeats_everything(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small_plan(root).stages
    monkeypatch.setattr(pipeline, "library_versions", lambda: ["a version of tomorrow"])
    after = small_plan(root).stages
    assert all(before[name].key != after[name].key for name in before)


def test_a_key_holds_no_path_of_the_machine(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    here = small_plan(root).stages
    there = small_plan(tmp_path_factory.mktemp("elsewhere")).stages
    assert {name: stage.key for name, stage in here.items()} == {name: stage.key for name, stage in there.items()}


def test_a_directory_that_is_gone_is_made_again(root: Path) -> None:
    small_plan(root).run(jobs=2)
    started(root)
    (root / "runs/other/number").unlink()
    (root / "runs/other").rmdir()
    small_plan(root).run(jobs=2)
    assert started(root) == ["other"]


def test_imports_are_followed_into_functions_and_packages(root: Path) -> None:
    expected = {name for name in SCRIPTS if name not in ("scripts/make.py", "scripts/fail.py")}
    assert imported_files("scripts/double.py") == expected
    assert imported_files("shared/factor.py") == {"shared/factor.py"}


def test_what_a_text_means() -> None:
    assert meaning("x = 1") == meaning("# one\nx=1  # two\n")
    assert meaning('class A:\n    x = 1\n    """a help text"""\n') == meaning("class A:\n    x = 1\n")
    assert meaning('x = "a"') != meaning('x = "b"')
    assert meaning("x = 1") != meaning("x = 2")


# ---------------------------------------------------------------- mistakes in a plan


def test_the_same_stage_twice_is_one(root: Path) -> None:
    plan = small_plan(root)
    again = plan.stage("other", "scripts/make.py --output-dir {out} --number 7")
    assert again is plan.stages["other"]
    with pytest.raises(ValueError, match="another one of that name"):
        plan.stage("other", "scripts/make.py --output-dir {out} --number 8")


def test_placeholders_and_inputs_match(root: Path) -> None:
    plan = small_plan(root)
    make = plan.stages["make"]
    with pytest.raises(ValueError, match="in its command line"):
        plan.stage("x", "scripts/double.py --rows {row} --output {out}/number", rows=make / "number")
    with pytest.raises(ValueError, match="in its command line"):
        plan.stage("x", "scripts/make.py --output-dir runs/x")


def test_directories_do_not_lie_in_each_other(root: Path) -> None:
    plan = small_plan(root)
    for name in ("make/more", "deep"):
        with pytest.raises(ValueError, match="in that of another stage"):
            plan.stage(name, "scripts/make.py --output-dir {out} --number 1")


# ---------------------------------------------------------------- at a time, in order


def spans(root: Path) -> dict[str, tuple[float, float]]:
    """When each stage started and ended."""
    times: dict[str, dict[str, float]] = {}
    for line in (root / "notes").read_text().splitlines():
        event, name, moment = line.split()
        times.setdefault(name, {})[event] = float(moment)
    return {name: (moments["start"], moments["end"]) for name, moments in times.items()}


def test_two_stages_run_at_a_time_and_each_after_its_inputs(root: Path) -> None:
    plan = Plan(root / "runs")
    for i in range(4):
        made = plan.stage(f"{i}", f"scripts/make.py --output-dir {{out}} --number {i} --seconds 0.3")
        plan.stage(f"double{i}", "scripts/double.py --rows {rows}/number --output {out}/number", rows=made)
    plan.run(jobs=2)

    times = spans(root)
    most = 0
    for start, _ in times.values():
        most = max(most, sum(other_start <= start < other_end for other_start, other_end in times.values()))
    assert most == 2
    for i in range(4):
        assert times[f"{i}"][1] <= times[f"double{i}"][0]


def test_the_longest_way_to_the_end_starts_first(root: Path) -> None:
    plan = small_plan(root)
    stages = list(plan.stages.values())
    make, other, double = stages
    seconds = {make: 1.0, other: 4.0, double: 5.0}
    assert seconds_to_the_end(stages, seconds) == {make: 6.0, other: 4.0, double: 5.0}

    for stage in stages:
        stage.write_record("an old key", seconds[stage])
    plan.run(jobs=1)
    times = spans(root)
    assert sorted(times, key=lambda name: times[name]) == ["make", "double", "other"]


def test_what_is_left_by_former_records(root: Path, capsys: pytest.CaptureFixture) -> None:
    plan = small_plan(root)
    for name, seconds in {"make": 60, "other": 500, "deep/double": 70}.items():
        plan.stages[name].write_record("an old key", seconds)
    plan.run(jobs=2)
    printed = capsys.readouterr().out
    assert printed.startswith("0 of 3 stages are finished; 8:20 left by former records\n")  # 500 s, not 630 / 2
    assert "3/3" in printed
    assert clock(59.7) == "1:00"


# ---------------------------------------------------------------- failure and interruption


def test_a_failure_starts_no_other_stage_and_says_how_to_repeat_it(root: Path, capsys: pytest.CaptureFixture) -> None:
    def plan_with_failure() -> Plan:
        plan = Plan(root / "runs")
        failing = plan.stage("failing", "scripts/fail.py {out}")
        plan.stage("long", "scripts/make.py --output-dir {out} --number 1 --seconds 0.5")
        plan.stage("unrelated", "scripts/make.py --output-dir {out} --number 2")
        plan.stage("after", "scripts/double.py --rows {rows} --output {out}/number", rows=failing / "half")
        return plan

    plan = plan_with_failure()
    with pytest.raises(SystemExit) as stopped:
        plan.run(jobs=2)
    assert stopped.value.code == 1
    assert started(root) == ["long"]  # it was already running, and is finished
    assert plan.stages["long"].is_finished()
    error = capsys.readouterr().err
    assert "    is wrong with the rows\n" in error
    assert "failing.log" in error
    assert f"python {plan.stages['failing'].command}" in error

    replace(root / "scripts/fail.py", "written before the failure", "4")
    replace(root / "scripts/fail.py", "raise SystemExit(3)\n", "")
    plan_with_failure().run(jobs=2)
    assert started(root) == ["after", "unrelated"]
    assert (root / "runs/after/number").read_text() == "8"


def slow_plan(root: Path) -> Plan:
    """`first` is soon finished, `second` takes a second and leaves half of its work until then."""
    plan = Plan(root / "runs")
    first = plan.stage("first", "scripts/make.py --output-dir {out} --number 1")
    waits = "scripts/make.py --output-dir {out} --number 2 --seconds 1"
    plan.stage("second", f"{waits} --rows {{rows}}", rows=first)
    return plan


def at_work(root: Path) -> multiprocessing.process.BaseProcess:
    """A process that runs `slow_plan`, and is at `second`."""
    process = multiprocessing.get_context("fork").Process(target=slow_plan(root).run, args=(2,))
    process.start()
    wait_until((root / "runs/second").exists)
    return process


def killed(root: Path, number: int) -> None:
    """Run `slow_plan` in a process of its own and send it a signal while `second` runs."""
    process = at_work(root)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_ends_its_processes_and_goes_on_where_it_stopped(root: Path, number: int) -> None:
    killed(root, number)
    if number == signal.SIGKILL:
        wait_until(lambda: not is_locked(root / "runs"))
    plan = slow_plan(root)
    assert plan.stages["first"].is_finished()
    assert not plan.stages["second"].is_finished()
    assert not (root / "runs/second/number").exists()
    assert started(root) == ["first", "second"]

    plan.run(jobs=2)  # the lock is free: no process has been left behind
    assert started(root) == ["second"]
    assert (root / "runs/second/number").read_text() == "2"


def test_a_program_at_work_keeps_others_away(root: Path) -> None:
    process = at_work(root)
    with pytest.raises(UserError, match="another run is at work there"):
        slow_plan(root).run(jobs=2)
    process.join()
    assert process.exitcode == 0
    assert (root / "runs/second/number").read_text() == "2"


def test_the_end_of_the_process_that_starts_stages_is_said(root: Path) -> None:
    with pipeline.only_one_in(root) as lock:
        server = pipeline._Server(lock)
    server.process.kill()
    server.process.wait()
    with pytest.raises(UserError, match="was killed"):
        server.start(["scripts/make.py"], root / "log")
    server.close()


def is_locked(directory: Path) -> bool:
    try:
        with pipeline.only_one_in(directory):
            return False
    except UserError:
        return True


def test_an_old_key_does_not_outlive_what_it_stood_for(root: Path) -> None:
    """After a failed repetition with other code the files are gone; the old code does not bring the record back."""
    small_plan(root).run(jobs=2)
    with open(root / "scripts/double.py", "a") as file:
        file.write("raise SystemExit(1)\n")
    with pytest.raises(SystemExit):
        small_plan(root).run(jobs=2)

    replace(root / "scripts/double.py", "raise SystemExit(1)\n", "")
    double: Stage = small_plan(root).stages["deep/double"]
    assert not double.is_finished()
    assert double.read_record()["seconds"] > 0
