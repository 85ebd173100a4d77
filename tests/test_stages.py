"""Stages run in order, are recorded, and go on after an interruption; the quickstart's and the family's are valid."""

import importlib
import json
import shlex
from pathlib import Path

import pytest
import tiny
import tyro

from scripts import family, quickstart
from scripts.lab import notices
from scripts.lab.commands import ROOT
from scripts.lab.stages import Stages, run_stage, shell_path
from shared import UserError
from shared.command import check_arguments


@pytest.fixture
def command_lines(tmp_path: Path) -> list[str]:
    """Three command lines: the first and the last leave a file in their output directory, the second fails."""
    succeeds = tmp_path / "succeeds.py"
    succeeds.write_text("import pathlib, sys; pathlib.Path(sys.argv[2], 'done').write_text('')\n")
    fails = tmp_path / "fails.py"
    fails.write_text("raise SystemExit(7)\n")

    lines = []
    for name, script in (("a", succeeds), ("b", fails), ("c", succeeds)):
        directory = tmp_path / name
        directory.mkdir()
        lines.append(f"{script} --output-dir {directory}")
    return lines


def recorded(record: Path) -> list[str]:
    return [stage["command"] for stage in json.loads(record.read_text())["commands"]]


def test_a_failing_stage_ends_the_program_with_its_exit_code(command_lines: list[str], tmp_path: Path, capfd) -> None:
    stages = Stages(tmp_path / "record.json", command_lines)
    with pytest.raises(SystemExit) as stopped:
        stages.run()

    assert stopped.value.code == 7
    assert recorded(stages.record) == [f"python {command_lines[0]}"]
    captured = capfd.readouterr()
    assert f"$ python {command_lines[0]}\n" in captured.out
    assert captured.err.endswith(f"stopped, exit code 7 from: python {command_lines[1]}\n")


def test_a_stage_that_a_signal_ends_gives_the_code_of_a_shell(tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text("import os; os.kill(os.getpid(), 9)\n")
    with pytest.raises(SystemExit) as stopped:
        run_stage(str(script))
    assert stopped.value.code == 128 + 9


def test_stages_go_on_behind_the_last_finished_one(command_lines: list[str], tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    with pytest.raises(SystemExit):
        Stages(record, command_lines).run()
    (tmp_path / "a" / "done").unlink()
    (tmp_path / "b" / "half").write_text("left by the interrupted stage")

    again = Stages(record, command_lines)
    assert again.resume()
    assert not (tmp_path / "b").exists()
    Path(shlex.split(command_lines[1])[0]).write_text("")  # no longer fails
    again.run()

    assert recorded(record) == [f"python {line}" for line in command_lines]
    assert not (tmp_path / "a" / "done").exists()
    assert (tmp_path / "c" / "done").exists()
    assert again.seconds == pytest.approx(sum(stage["seconds"] for stage in again.finished))


def test_stages_of_other_commands_start_from_the_beginning(command_lines: list[str], tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert not Stages(record, command_lines).resume()
    with pytest.raises(SystemExit):
        Stages(record, command_lines).run()

    assert not Stages(record, ["other.py", *command_lines]).resume()
    assert not Stages(record, []).resume()
    assert (tmp_path / "b").exists()


def test_results_stand_beside_the_commands(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "record.json", [])
    stages.write_record(numbers=[1, 2], text="β")
    expected = {"commands": [], "seconds": 0, "numbers": [1, 2], "text": "β"}
    assert json.loads(stages.record.read_text(encoding="utf-8")) == expected


def test_paths_are_written_relative_to_the_repository() -> None:
    assert shell_path(ROOT / "runs" / "a b") == "'runs/a b'"
    assert shell_path(Path("/elsewhere/x")) == "/elsewhere/x"


# ---------------------------------------------------------------- the quickstart and the family


@pytest.mark.parametrize(
    "lines", [quickstart.command_lines("runs/q", 3), family.command_lines("runs/f", family.Args(seed=3))]
)
def test_every_command_line_is_one_that_its_program_takes(lines: list[str]) -> None:
    for line in lines:
        script, *arguments = shlex.split(line)
        assert (tiny.ROOT / script).exists()
        if script == "scripts/notices.py":
            continue  # its sub-commands have no single Args
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        args = tyro.cli(module.Args, args=arguments)
        check_arguments(args)
        assert getattr(args, "seed", 3) in (3, 4, 5)  # members of the ensemble have seeds of their own


def test_every_algorithm_is_in_the_family() -> None:
    trained = {training.algorithm for training in family.POLICIES.values()}
    algorithms = {path.stem for path in (tiny.ROOT / "algos").glob("*.py")}
    assert algorithms - trained == {"__init__", "sft", "rm", "token_dpo_beam"}


def test_quickstart_removes_only_what_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("mine")
    with pytest.raises(UserError, match="pairs.jsonl is there, but not from a quickstart"):
        quickstart.start_over(tmp_path)

    (tmp_path / quickstart.RECORD).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sft").mkdir()
    quickstart.start_over(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_family_refuses_a_directory_that_is_not_its_own(tmp_path: Path) -> None:
    record = tmp_path / family.RECORD
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is not from this program"):
        family.start_over(tmp_path, record)

    record.write_text("{}")
    family.start_over(tmp_path, record)
    assert list(tmp_path.iterdir()) == []


def test_the_ensemble_learns_from_thirds_of_the_rankings(tmp_path: Path) -> None:
    family.write_rankings(tmp_path, family.Args(max_rows=12))
    ranked = tiny.read_jsonl(tmp_path / "ranked.jsonl")
    assert len(ranked) == 12
    for row in ranked:
        notices.check_row(row, 8)
        assert len(set(row["completions"])) == 8
    for i in range(3):
        third = tiny.read_jsonl(tmp_path / f"third_{i}.jsonl")
        assert len(third) == 4
        assert all(row in ranked for row in third)


def test_accuracies_of_reward_models_by_hand() -> None:
    prompt = "we lost a lamp. it was at the school in may. the tag says five. please call anna. summary:"
    rows = [
        {"prompt": prompt, "chosen": "lost lamp", "rejected": "lost", "scores": [[1, 2, 0, 5], [0, 3, 0, 4]]},
        {"prompt": prompt, "chosen": "in may", "rejected": "at school", "scores": [[1, 2, 3, 4], [5, 1, 2, 3]]},
    ]
    numbers = family.reward_model_accuracies(rows, seed=0)
    means = {name: number["mean"] for name, number in numbers.items()}

    # rewards 1 and -0.5, then 1 and 1: σ(1.5) = 0.817574, σ(0) = 0.5
    ceiling = pytest.approx((0.817574 + 0.5) / 2, abs=1e-6)
    assert means == {"rm": 0.5, "rm_0": 0.5, "rm_1": 0.5, "rm_2": 1.0, "ceiling": ceiling}
