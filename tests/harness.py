"""Runs in processes of their own, to be damaged, stopped and killed, and what they leave.

A run is forked from a server that has imported torch and transformers once. It is a real process that runs the real
file, with an exit code and signals of its own, but it starts in one second instead of five.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import tiny

DPO = "algos/dpo.py"
TIMES = ("seconds", "tokens_per_second")
PRELOAD = [
    "shared.model",
    "shared.run",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.run",
]
context = multiprocessing.get_context("forkserver")
started: list["Started"] = []  # ended after each test


class Started:
    """A run that goes on: one process, or one per rank."""

    def __init__(self, out: Path, log: Path, processes: list):
        self.out = out
        self.log_file = log
        self.processes = processes

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    @property
    def log(self) -> str:
        """What it has printed."""
        if not self.log_file.exists():
            return ""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def status(self) -> Any:
        """What status.json says, or None if there is none."""
        path = self.out / "status.json"
        if not path.is_file():
            return None
        return json.loads(path.read_text())

    def send(self, number: int) -> None:
        """A signal to every process that has not ended by itself."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def until(self, condition: Callable[[], object] | str, seconds: float = 60) -> None:
        """Wait until a condition holds, or a text is printed, while the run goes on."""

        def holds() -> bool:
            if isinstance(condition, str):
                return condition in self.log
            return bool(condition())

        deadline = time.monotonic() + seconds
        while not holds():
            assert self.running, f"the run ended before what was waited for\n{self.log[-3000:]}"
            assert time.monotonic() < deadline, f"not in {seconds} s\n{self.log[-3000:]}"
            time.sleep(0.001)

    def end(self, seconds: float = 120) -> int | None:
        """The exit code, or of several processes the first that is not 0. None if the run had to be killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            remaining = deadline - time.monotonic()
            process.join(max(0, remaining))
        if self.running:
            self.kill()
            return None

        for process in self.processes:
            if process.exitcode != 0:
                return process.exitcode
        return 0

    def kill(self) -> None:
        """SIGKILL to all processes that are left, workers of torchrun included."""
        for pid in workers(self.out):
            os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.join()


# ---------------------------------------------------------------- start


def start(
    out: Path,
    script: str = DPO,
    processes: int = 1,
    torchrun: bool = False,
    hook: Callable[[], None] | None = None,
    beside: Path | None = None,
    flag: str = "output_dir",
    place: list[str] | None = None,
    **options: object,
) -> Started:
    """Start a run; log and cache lie beside `out`, or beside another path. `hook` runs in its process first.

    flag: the one that `out` is given by. place: options of torchrun instead of --standalone.
    """
    beside = beside or out
    log = Path(f"{beside}.log")
    log.unlink(missing_ok=True)

    workers_of_torchrun = 1
    variables_of_ranks: list[dict[str, str]] = [{}]
    if torchrun:
        workers_of_torchrun = processes
    elif processes > 1:
        variables_of_ranks = _process_group(processes)
    command = tiny.command(str(tiny.ROOT / script), workers_of_torchrun, {flag: out, **options})
    line = command[1:]  # without the interpreter
    if place is not None:
        line = ["-m", "torch.distributed.run", *place, *line[line.index(str(tiny.ROOT / script)) :]]

    with mock.patch.dict(os.environ, tiny.environment(Path(f"{beside}.cache"))):
        context.set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()
        environment = dict(os.environ)

    ranks = []
    for variables in variables_of_ranks:
        process = context.Process(target=_run, args=(line, log, environment | variables, hook))
        process.start()
        ranks.append(process)
    started.append(Started(out, log, ranks))
    return started[-1]


def start_nodes(out: Path, nodes: int, processes: int, rendezvous: str, **options: Any) -> list[Started]:
    """Start a run on several machines, which all are this one: a torchrun each, with so many processes each.

    rendezvous: how they meet, "static" or "c10d".
    """
    port = _free_port()
    machines = []
    for node in range(nodes):
        place = ["--nnodes", str(nodes), "--nproc-per-node", str(processes)]
        if rendezvous == "static":
            place += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        else:
            place += ["--rdzv-backend", rendezvous, "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run"]
        machines.append(start(out, place=place, beside=Path(f"{out}.node-{node}"), **options))
    return machines


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    return port


def _process_group(processes: int) -> list[dict[str, str]]:
    """The environment variables of each rank, by which torchrun and every other launcher describe a process group."""
    port = _free_port()
    variables_of_ranks = []
    for rank in range(processes):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        variables_of_ranks.append(variables)
    return variables_of_ranks


def _run(line: list[str], log: Path, environment: dict[str, str], hook: Callable[[], None] | None) -> None:
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(log.parent)
    if hook:
        hook()
    if line[0] == "-m":
        sys.argv = line[1:]
        runpy.run_module(line[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = line
        runpy.run_path(line[0], run_name="__main__")


def run(out: Path, seconds: float = 120, code: int = 0, **options: Any) -> Started:
    """A run to its end, which must have this exit code."""
    ended = start(out, **options)
    actual = ended.end(seconds)
    assert actual == code, f"exit code {actual}, not {code}\n{ended.log[-3000:]}"
    if code != 1:
        assert "Traceback" not in ended.log, ended.log[-3000:]
    return ended


def refused(out: Path, *words: str, state: str | None = "refused", **options: Any) -> None:
    """A run that ends before its first step with exit code 2 and one line that holds `words`.

    If it was to go on from another run, that one's status stays.
    """
    status = out / "status.json"
    before = None
    if options.get("resume") and status.exists():
        before = status.read_bytes()
    ended = run(out, code=2, **options)
    check_message(ended, *words)
    assert not re.search("^step 1/", ended.log, re.M)
    if before is not None:
        assert status.read_bytes() == before
    elif state:
        assert ended.status["state"] == state, ended.status
        assert ended.status["step"] == 0, ended.status


def check_message(ended: Started, *words: str) -> None:
    """One line says how the run ended, and holds `words`."""
    (message,) = re.findall(r"\w\.py: (.*)", ended.log)
    for word in words:
        assert word in message, (message, words)


def workers(out: Path) -> list[int]:
    """The processes that torchrun started for a run."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if str(out).encode() in line and b"torch.distributed.run" not in line:
            pids.append(int(folder.name))
    return sorted(pids)


# ---------------------------------------------------------------- what a run leaves


def lines(out: Path) -> list[dict]:
    """The whole lines of metrics.jsonl, without the values that a clock gave."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    timeless = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            values = json.loads(line)
            timeless.append({name: value for name, value in values.items() if name not in TIMES})
    return timeless


def values_of(out: Path, name: str) -> list[float]:
    """One metric in every line of metrics.jsonl."""
    return [line[name] for line in lines(out)]


def weights(out: Path) -> bytes:
    """The exported weights."""
    return (out / "model.safetensors").read_bytes()


def same(out: Path, through: Path) -> None:
    """Bitwise as the run that nothing happened to."""
    assert lines(out) == lines(through)
    assert weights(out) == weights(through)


def close(out: Path, through: Path, losses: float = 1e-6) -> None:
    """Other summation orders, the same run: relative differences of losses, and to 1e-4 of gradient norms."""
    assert values_of(out, "step") == values_of(through, "step")
    for name, limit in (("loss", losses), ("grad_norm", 1e-4)):
        gaps = tiny.differences(values_of(out, name), values_of(through, name))
        assert max(gaps) <= limit, (name, gaps)


def checkpoints(out: Path) -> list[str]:
    """The names in checkpoints/."""
    return sorted(path.name for path in (out / "checkpoints").glob("*"))


def files(out: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    contents = {}
    for path in out.rglob("*"):
        if path.is_file() and path.name != ".lock":
            contents[str(path.relative_to(out))] = path.read_bytes()
    return contents


def cut(through: Path, out: Path, step: int) -> Path:
    """A copy of a finished run as it was when it was killed behind this step."""
    later_checkpoints = [f"step-{later:06d}" for later in range(step + 1, 100)]
    shutil.copytree(through, out, ignore=shutil.ignore_patterns(*later_checkpoints))
    for name in ("model.safetensors", "config.json", "status.json"):
        (out / name).unlink()
    return out
