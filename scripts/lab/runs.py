"""What a training run has left in its directory so far: run.json, metrics.jsonl and status.json."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shared import UserError

HELD_OUT = "eval/"  # before the name of a metric over held-out rows


@dataclass
class RunLog:
    """A run, whether it has ended or goes on."""

    path: Path
    algorithm: str
    args: dict[str, Any]
    data: dict[str, str]  # the hash of the rows of each set
    last_step: int  # that the run is to reach
    state: str  # as in status.json
    lines: list[dict]  # of metrics.jsonl

    @property
    def step(self) -> int:
        """The last step that has a line, 0 if there is none."""
        return max((line["step"] for line in self.lines), default=0)

    @cached_property
    def metrics(self) -> list[str]:
        """The names of all that is logged, in the order of the log; those over held-out rows begin with `eval/`."""
        names: dict[str, None] = {}
        for line in self.lines:
            names |= dict.fromkeys(line)
        names.pop("step", None)
        return list(names)


def read_run(path: Path) -> RunLog:
    """What the run in a directory has left. Raises UserError if there is none, or its files cannot be read."""
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give the --output-dir of a run")
    if not (path / "run.json").exists():
        raise UserError(f"{path}: has no run.json, so it is not the --output-dir of a run whose steps have begun")

    run = read_json(path / "run.json")
    state = "state unknown"
    if (path / "status.json").exists():
        state = read_json(path / "status.json").get("state", state)
    try:
        return RunLog(
            path=path,
            algorithm=run["algorithm"],
            args=run["args"],
            data={name: report["sha256"] for name, report in run["data"].items()},
            last_step=run["steps"],
            state=state,
            lines=read_log(path / "metrics.jsonl"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / 'run.json'}: not a run.json of algos/ ({type(error).__name__}: {error})") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_log(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without a last one that is only half written.

    Raises UserError if the file cannot be read, or another line is not a line of a log.
    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None

    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            is_line = isinstance(line["step"], int)
        except (ValueError, KeyError, TypeError):
            is_line = False
        if is_line:
            lines.append(line)
        elif number < len(texts):  # the run is writing the last one, or was killed there
            raise UserError(f"{path}, line {number}: not a JSON object with a `step`")
    return lines


def series(lines: list[dict], metric: str) -> dict[int, float]:
    """The value of a metric at each step where it was logged; NaN where it was not a finite number."""
    values = {}
    for line in lines:
        if metric in line:
            value = line[metric]
            if value is None:  # JSON has no NaN
                value = math.nan
            values[line["step"]] = value
    return values
