"""Command lines that depend on each other's files, run several at a time, and not repeated while nothing has changed.

A stage is a command line with a directory of its own, `{out}`. It names files of other stages by placeholders:

    plan = Plan(Path("runs/reproduce"))
    world = plan.stage("world/0", "scripts/notices.py world --output-dir {out} --seed 0")
    sft = plan.stage(
        "sft/0",
        "algos/sft.py --model {base} --train-data {rows} --output-dir {out}",
        base=world / "base",
        rows=world / "sft.jsonl",
    )
    plan.run(jobs=2)

`sft.path` is its directory, runs/reproduce/sft/0. Beside it lie its log, sft/0.log, and its record, sft/0.json. A stage
is finished if the record has its key. The key is a hash of

- the command line with its placeholders, and the keys of the stages whose files it names,
- the code of the script and of all it imports from this project, without comments and docstrings,
- the versions of torch and transformers.

Whatever else a directory holds, from other settings or from a stage that failed or was killed, is removed before its
stage runs again.
"""

import ast
import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from scripts.lab import stage_server
from scripts.lab.commands import ROOT
from scripts.lab.stages import shell_path
from shared import UserError
from shared.files import write_json

ROOMS = ("algos", "shared", "scripts")  # the packages whose code counts
OUT = "out"  # the placeholder of a stage's own directory
POLL = 0.05  # seconds between two looks at the processes
LAST_LINES = 20  # of the log of a stage that failed
LIBRARIES = stage_server.LIBRARIES  # imported once for all stages
# One thread each: the stages fill the cores. Threads that wait by spinning would slow down everything else.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}


@dataclass(eq=False)
class Stage:
    """A command line, its own directory, and what it needs of other stages."""

    name: str
    template: str  # the command line with placeholders, without `python`
    inputs: dict[str, "Artifact"]
    path: Path  # its directory
    key: str

    def __truediv__(self, file: str) -> "Artifact":
        return Artifact(self, file)

    @property
    def command(self) -> str:
        """The command line as it can be typed in the repository root behind `python`."""
        paths = {OUT: shell_path(self.path)}
        for name, artifact in self.inputs.items():
            paths[name] = shell_path(artifact.path)
        return re.sub(r"{([^{}]+)}", lambda match: paths[match[1]], self.template)

    @property
    def log(self) -> Path:
        return Path(f"{self.path}.log")

    @property
    def record(self) -> Path:
        return Path(f"{self.path}.json")

    def read_record(self) -> dict[str, Any]:
        """What the last run of a stage of this name has left; empty if there was none."""
        if not self.record.exists():
            return {}
        return json.loads(self.record.read_text(encoding="utf-8"))

    def write_record(self, key: str | None, seconds: float | None) -> None:
        """Write the record of a stage that has finished, or with the key None, of one that has not."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        contents = {"command": f"python {self.command}", "key": key, "seconds": seconds, "log": self.log.name}
        write_json(self.record, contents)

    def is_finished(self) -> bool:
        return self.read_record().get("key") == self.key and self.path.exists()


class Artifact(NamedTuple):
    """A file or directory that a stage makes."""

    stage: Stage
    file: str  # relative to the stage's directory

    @property
    def path(self) -> Path:
        return self.stage.path / self.file


Input = Stage | Artifact  # a stage stands for its whole directory


class Plan:
    """Stages by their names, each after those that it needs."""

    directory: Path
    stages: dict[str, Stage]
    code_hashes: dict[str, str]  # of each script

    def __init__(self, directory: Path):
        self.directory = directory.resolve()
        self.stages = {}
        self.code_hashes = {}

    def stage(self, name: str, command: str, **inputs: Input) -> Stage:
        """Add a stage, or return the one of that name if it is the same.

        Placeholders and inputs have to match. Raises ValueError if they don't, or if another stage has the name.
        """
        artifacts = {}
        for placeholder, made in inputs.items():
            artifacts[placeholder] = made / "." if isinstance(made, Stage) else made
        placeholders = set(re.findall(r"{([^{}]+)}", command))
        if placeholders != {OUT, *artifacts}:
            raise ValueError(f"stage {name}: {sorted(placeholders)} in its command line, but {sorted(artifacts)} given")

        if name in self.stages:
            known = self.stages[name]
            if (known.template, known.inputs) != (command, artifacts):
                raise ValueError(f"stage {name}: there is another one of that name")
            return known

        script = command.split(maxsplit=1)[0]
        if script not in self.code_hashes:
            self.code_hashes[script] = code_hash(script)
        key = key_of(command, artifacts, self.code_hashes[script])
        stage = Stage(name, command, artifacts, self.directory / name, key)
        if any(other.path in stage.path.parents or stage.path in other.path.parents for other in self.stages.values()):
            raise ValueError(f"stage {name}: its directory would lie in that of another stage, or around it")
        self.stages[name] = stage
        return stage

    def command_lines(self) -> list[str]:
        """All command lines, each after those that it needs."""
        return [f"python {stage.command}" for stage in self.stages.values()]

    def run(self, jobs: int) -> None:
        """Run the stages that are not finished, `jobs` at a time.

        If one fails, no other is started; its last lines are shown, and the program exits with code 1. Raises UserError
        if another program works in the same directory.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with only_one_in(self.directory) as lock:
            _Progress(list(self.stages.values()), jobs, lock).run()


@contextmanager
def only_one_in(directory: Path) -> Iterator[int]:
    """Lock a directory, and yield the lock's file descriptor. Processes that inherit it hold the lock too.

    Raises UserError if it is locked.
    """
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another run is at work there") from None
        yield file.fileno()


# ---------------------------------------------------------------- keys


def key_of(command: str, inputs: dict[str, Artifact], code: str) -> str:
    """The hash of all that the files of a stage depend on, in hexadecimal. `code` is the hash of its code."""
    parts = [command, code, *library_versions()]
    for placeholder, artifact in sorted(inputs.items()):
        parts += [placeholder, artifact.stage.key, artifact.file]
    return hash_of(parts)


@functools.cache
def library_versions() -> list[str]:
    """The versions of the libraries that decide the numbers."""
    return [version("torch"), version("transformers")]


def hash_of(parts: Iterable[str]) -> str:
    """The SHA-256 of texts, of which each may contain anything."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def code_hash(script: str) -> str:
    """The hash of the code of a script, given by its path from the root, and of all that it imports."""
    parts = []
    for path in sorted(imported_files(script)):
        parts += [path, meaning((ROOT / path).read_text(encoding="utf-8"))]
    return hash_of(parts)


def imported_files(script: str) -> set[str]:
    """The files of this project that a script imports, directly and indirectly, and the script, from the root."""
    files: set[str] = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.add(path)
            for name in imported_names((ROOT / path).read_text(encoding="utf-8")):
                waiting += module_files(name)
    return files


def module_files(name: str) -> Iterator[str]:
    """The files that an import of a dotted name loads from this project, those of its packages too."""
    parts = name.split(".")
    if parts[0] not in ROOMS:
        return
    for i in range(len(parts)):
        stem = "/".join(parts[: i + 1])
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if (ROOT / path).exists():
                yield path


@functools.cache
def imported_names(source: str) -> list[str]:
    """The names that a source text imports anywhere: "shared.files.fsync" of `from shared.files import fsync`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@functools.cache
def meaning(source: str) -> str:
    """A source text as a tree, without comments, layout, and texts that stand alone, such as docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr):
        return False
    return isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)


# ---------------------------------------------------------------- running


class _Running(NamedTuple):
    pid: int
    started: float


class _Server:
    """The process that starts the stages (stage_server.py), with one thread for each of them."""

    def __init__(self, lock: int):
        """`lock`: the file descriptor of a lock that the stages are to hold too."""
        # As a file it would put its directory before Python's own modules, of which one is named `statistics` too.
        source = Path(stage_server.__file__).read_text(encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, *LIBRARIES],
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=[lock],
        )

    def start(self, arguments: list[str], log: Path) -> int:
        """The number of a new process, which appends to an existing log."""
        return self.ask({"start": arguments, "log": str(log)})

    def exit_code_of(self, pid: int) -> int | None:
        """None of a process that still runs."""
        return self.ask({"exit_code_of": pid})

    def ask(self, request: dict) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        answer = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise UserError("the process that starts the stages was killed: is there enough memory?")
        return json.loads(answer)

    def close(self) -> None:
        """End all stages that still run."""
        self.process.communicate()


class _Progress:
    """The stages of a plan on their way: some finished, some running, the others waiting."""

    def __init__(self, stages: list[Stage], jobs: int, lock: int):
        self.jobs = jobs
        self.server = _Server(lock)
        self.num_stages = len(stages)
        self.seconds = expected_seconds(stages)
        self.path_seconds = seconds_to_the_end(stages, self.seconds)
        self.waiting = [stage for stage in stages if not stage.is_finished()]
        self.waiting.sort(key=lambda stage: -self.path_seconds[stage])
        self.running: dict[Stage, _Running] = {}
        self.failed: list[Stage] = []
        self.started = time.monotonic()

    def run(self) -> None:
        """Run all that is waiting. Whatever ends this, no process is left behind."""
        num_finished = self.num_stages - len(self.waiting)
        print(f"{num_finished} of {self.num_stages} stages are finished{self.time_left()}", flush=True)
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            while self.running or (self.waiting and not self.failed):
                self.start()
                self.show_running()
                time.sleep(POLL)
                self.collect()
        finally:
            self.server.close()

        if self.failed:
            for stage in self.failed:
                print(failure_text(stage), file=sys.stderr)
            raise SystemExit(1)

    def start(self) -> None:
        """Start stages whose inputs are finished, the longest way to the end first, while there is room."""
        unfinished = {*self.waiting, *self.running}
        for stage in list(self.waiting):
            if len(self.running) == self.jobs or self.failed:
                return
            if not any(artifact.stage in unfinished for artifact in stage.inputs.values()):
                self.waiting.remove(stage)
                self.running[stage] = _Running(self.process_of(stage), time.monotonic())

    def process_of(self, stage: Stage) -> int:
        """Start a stage with an empty place."""
        stage.write_record(None, stage.read_record().get("seconds"))
        shutil.rmtree(stage.path, ignore_errors=True)
        stage.log.write_text(f"$ python {stage.command}\n", encoding="utf-8")
        return self.server.start(shlex.split(stage.command), stage.log)

    def collect(self) -> None:
        """Record the stages that have ended."""
        for stage, (pid, started) in list(self.running.items()):
            exit_code = self.server.exit_code_of(pid)
            if exit_code is None:
                continue

            del self.running[stage]
            seconds = time.monotonic() - started
            if exit_code == 0:
                self.seconds[stage] = seconds
                stage.write_record(stage.key, seconds)
                self.show_finished(stage)
            else:
                self.failed.append(stage)
                show_line(f"{stage.name} has failed; the stages that run now are the last ones\n")

    def show_finished(self, stage: Stage) -> None:
        """One line on a stage that has finished."""
        count = self.num_stages - len(self.waiting) - len(self.running) - len(self.failed)
        elapsed = clock(time.monotonic() - self.started)
        line = f"{elapsed}  {count}/{self.num_stages}  {stage.name}: {self.seconds[stage]:.0f} s{self.time_left()}"
        show_line(f"{line}\n")

    def show_running(self) -> None:
        """What runs now, on the last line of a terminal."""
        if sys.stdout.isatty():
            now = time.monotonic()
            parts = [f"{stage.name} {now - started:.0f} s" for stage, (_, started) in self.running.items()]
            line = "running: " + ", ".join(parts)
            show_line(line[: shutil.get_terminal_size().columns - 1])

    def time_left(self) -> str:
        """How long the rest will take by former records, as the end of a line; empty if there are none."""
        now = time.monotonic()
        seconds = sum(self.seconds[stage] for stage in self.waiting)
        for stage, (_, started) in self.running.items():
            seconds += max(0, self.seconds[stage] - (now - started))

        longest_path = max((self.path_seconds[stage] for stage in self.waiting), default=0)
        seconds = max(seconds / self.jobs, longest_path)
        if seconds == 0:
            return ""
        return f"; {clock(seconds)} left by former records"


def expected_seconds(stages: Iterable[Stage]) -> dict[Stage, float]:
    """The seconds of each stage's last run; for one that has never run, the mean of all others."""
    seconds = {stage: stage.read_record().get("seconds") for stage in stages}
    known = [value for value in seconds.values() if value is not None]
    mean = sum(known) / max(1, len(known))

    expected = {}
    for stage, value in seconds.items():
        expected[stage] = mean if value is None else value
    return expected


def seconds_to_the_end(stages: list[Stage], seconds: dict[Stage, float]) -> dict[Stage, float]:
    """For each stage the time from its start to the end of all that depends on it, with enough processes."""
    longest = dict.fromkeys(stages, 0.0)
    for stage in reversed(stages):  # those that depend on it come after a stage
        longest[stage] += seconds[stage]
        for artifact in stage.inputs.values():
            before = artifact.stage
            longest[before] = max(longest[before], longest[stage])
    return longest


def failure_text(stage: Stage) -> str:
    """What a user needs to know of a stage that has failed."""
    lines = stage.log.read_text(encoding="utf-8", errors="replace").splitlines()
    shown = "\n".join(f"    {line}" for line in lines[-LAST_LINES:])
    by_hand = f"rm -rf {shell_path(stage.path)}; OMP_NUM_THREADS=1 python {stage.command}"
    return f"\n{shown}\n\nstage {stage.name} has failed; its log: {shell_path(stage.log)}; by hand:\n\n    {by_hand}"


def show_line(text: str) -> None:
    """Print a text; on a terminal it replaces the last line."""
    if sys.stdout.isatty():
        text = f"\r\x1b[K{text}"
    print(text, end="", flush=True)


def clock(seconds: float) -> str:
    """A time as minutes and seconds, "3:05"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
