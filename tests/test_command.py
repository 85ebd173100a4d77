"""The command line: arguments, ranges, configuration files."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from algos import dpo, sft
from shared import UserError
from shared.command import NAMES_ELSEWHERE, check_arguments, flag_of, parse_arguments

REQUIRED = ["--model", "m", "--train-data", "d", "--output-dir", "o"]
DEFAULTS = dpo.Args(model="m", train_data="d", output_dir="o")


class Parse:
    """Reads the arguments of dpo, or of another algorithm, from a command line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch

    def __call__(self, *line: str, args: type = dpo.Args) -> Any:
        self.monkeypatch.setattr(sys, "argv", ["dpo.py", *line])
        return parse_arguments(args, "Title.\n\nMore.")


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    return Parse(monkeypatch)


def test_arguments_as_users_write_them(parse: Parse) -> None:
    args = parse(*REQUIRED, "--lr", "1e-4", "--batch_size", "8", "--no-shuffle", "--max-steps=3")
    assert args.learning_rate == 1e-4
    assert args.batch_size == 8
    assert args.shuffle is False
    assert args.max_steps == 3


def test_learning_rate_has_its_whole_name_too(parse: Parse) -> None:
    args = parse(*REQUIRED, "--learning-rate", "2")
    assert args.learning_rate == 2


@pytest.mark.parametrize(
    "line, shown",
    [
        (["--bet", "0.5"], "--bet"),
        (["--beta", "abc"], "abc"),
        (["--lr-schedule", "cubic"], "constant"),
        (["--nothing"], "--nothing"),
    ],
)
def test_unknown_arguments_end_with_exit_code_2(
    parse: Parse, capsys: pytest.CaptureFixture[str], line: list[str], shown: str
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*REQUIRED, *line)
    assert end.value.code == 2
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, flag",
    [
        (["--train-data", "e"], "--train-data"),
        (["--beta", "1", "--beta=1"], "--beta"),
        (["--lr", "1", "--learning_rate", "1"], "--learning-rate"),
    ],
)
def test_a_flag_that_is_given_twice(parse: Parse, line: list[str], flag: str) -> None:
    with pytest.raises(UserError, match=f"^{flag}: is given twice"):
        parse(*REQUIRED, *line)


@pytest.mark.parametrize(
    "line, message",
    [
        (["--model_name_or_path", "m"], "--model-name-or-path: there is no such flag; --model$"),
        (["--num-train-epochs=3"], "no such flag; --epochs$"),
        (["--warmup_ratio", "0.1"], "no such flag; --warmup-steps$"),
        (["--loss-type", "ipo"], "no such flag; each loss has a file"),
    ],
)
def test_names_of_other_projects_are_answered_with_ours(parse: Parse, line: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(*REQUIRED, *line)


def test_names_elsewhere_stand_for_flags_that_there_are() -> None:
    fields = {flag_of(field.name) for field in dataclasses.fields(dpo.Args)}
    for here in NAMES_ELSEWHERE.values():
        for flag in re.findall(r"--[a-z-]+", here):
            assert flag in fields
    assert fields.isdisjoint(NAMES_ELSEWHERE)


def test_help_shows_the_details_and_the_rows(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "Title." in shown
    assert "More." in shown
    for path in sorted((tiny.ROOT / "algos").glob("[a-z]*.py")):
        assert "Rows (docs/rows.md): " in path.read_text(), path


def assert_out_of_range(name: str, value: float) -> None:
    flag = "--" + name.replace("_", "-")
    args = dataclasses.replace(DEFAULTS, **{name: value})
    with pytest.raises(UserError, match=f"{flag} {value}: must be a finite number"):
        check_arguments(args)


@pytest.mark.parametrize(
    "name", ["beta", "learning_rate", "batch_size", "micro_batch_tokens", "epochs", "max_grad_norm"]
)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_numbers_out_of_range(name: str, value: float) -> None:
    assert_out_of_range(name, value)


@pytest.mark.parametrize("name, value", [("beta", 0), ("label_smoothing", 2), ("max_steps", 0), ("max_length", 0)])
def test_other_numbers_out_of_range(name: str, value: float) -> None:
    assert_out_of_range(name, value)


def test_a_number_without_a_range_must_be_finite() -> None:
    @dataclasses.dataclass
    class Fork:
        margin: float = math.nan

    with pytest.raises(UserError, match="--margin nan: must be a finite number"):
        check_arguments(Fork())


def test_defaults_are_in_range() -> None:
    check_arguments(DEFAULTS)


def test_config_replays_and_flags_override(parse: Parse, tmp_path: Path) -> None:
    before = parse(*REQUIRED, "--beta", "0.3", "--lr", "1e-6")
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"args": dataclasses.asdict(before), "steps": 1}))
    replayed = parse("--config", str(path), "--beta", "0.4")
    assert replayed == dataclasses.replace(before, beta=0.4)


def test_config_of_another_algorithm(parse: Parse, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"args": dataclasses.asdict(DEFAULTS), "steps": 1}))
    with pytest.raises(UserError, match="not a run.json of this algorithm"):
        parse("--config", str(path), args=sft.Args)
    path.write_text(json.dumps({"algorithm": "ipo", "args": dataclasses.asdict(DEFAULTS)}))
    with pytest.raises(UserError, match="it is one of ipo"):
        parse("--config", str(path))
