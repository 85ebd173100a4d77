"""Run command lines one after another, record each with its seconds, and go on where an interrupted run stopped."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.lab.commands import ROOT
from shared.files import write_json


def run_stage(command: str) -> dict:
    """Run one command line with this Python in the repository root, and show it and its output.

    Returns the command and its seconds. If the command fails, this program ends with the same exit code.
    """
    print(f"\n$ python {command}", flush=True)
    started = time.perf_counter()
    # Threads that wait by spinning make a step ten times slower as soon as anything else needs a core: spin briefly.
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}
    code = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, env=environment).returncode

    if code != 0:
        print(f"{Path(sys.argv[0]).name}: stopped, exit code {code} from: python {command}", file=sys.stderr)
        if code < 0:  # ended by a signal; a shell reports it as 128 plus its number
            code = 128 - code
        raise SystemExit(code)
    return {"command": f"python {command}", "seconds": time.perf_counter() - started}


def shell_path(path: Path) -> str:
    """`path`, absolute, as a command line in the repository root writes it."""
    if path.is_relative_to(ROOT):
        path = path.relative_to(ROOT)
    return shlex.quote(str(path))


class Stages:
    """Command lines that run one after another, and the JSON file that records the finished ones.

    The record also marks its directory as the calling command's own.
    """

    record: Path
    commands: list[str]  # without the leading `python`
    finished: list[dict]  # command and seconds, for each stage that has run

    def __init__(self, record: Path, commands: Sequence[str]):
        self.record = record
        self.commands = list(commands)
        self.finished = []

    @property
    def seconds(self) -> float:
        """Time of all finished stages together."""
        return sum(stage["seconds"] for stage in self.finished)

    def resume(self) -> bool:
        """Skip the stages that an interrupted run of the same commands has recorded; returns whether there are any.

        Removes the output directory of the stage that was interrupted.
        """
        if not self.record.exists():
            return False

        contents = json.loads(self.record.read_text(encoding="utf-8"))
        recorded = contents.get("commands", [])
        expected = [f"python {command}" for command in self.commands[: len(recorded)]]
        if [stage["command"] for stage in recorded] != expected:
            return False

        self.finished = recorded
        if 0 < len(recorded) < len(self.commands):
            remove_output_directory(self.commands[len(recorded)])
        return len(recorded) > 0

    def run(self) -> None:
        """Run all stages that are not finished, and record each as it finishes."""
        for command in self.commands[len(self.finished) :]:
            self.finished.append(run_stage(command))
            self.write_record()

    def write_record(self, **results: Any) -> None:
        """Write the finished commands, their seconds in all, and `results`, which may replace the seconds."""
        contents = {"commands": self.finished, "seconds": self.seconds, **results}
        write_json(self.record, contents)


def remove_output_directory(command: str) -> None:
    """Remove the directory after `--output-dir` in a command line, if it names one."""
    arguments = shlex.split(command)
    if "--output-dir" in arguments:
        directory = arguments[arguments.index("--output-dir") + 1]
        shutil.rmtree(ROOT / directory, ignore_errors=True)
