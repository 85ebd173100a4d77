"""Runs in processes of their own, to be damaged, stopped and killed, and what they leave.

A run is forked from a server that has imported torch and transformers once: a real process that runs the real file,
with an exit code and signals of its own, in one second instead of five.
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
from unittest import mock

import worlds

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
    """A run that goes on: one process, or one per rank. `log`: what it has printed."""

    def __init__(self, out: Path, log: Path, processes: list):
        self.out, self.log_file, self.processes = out, log, processes

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    @property
    def status(self) -> dict | None:
        """What status.json says; None where there is none."""
        path = self.out / "status.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def send(self, number: int) -> None:
        """A signal to every process that has not ended by itself."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def until(self, condition: Callable[[], object] | str, seconds: float = 60) -> None:
        """Wait for something that happens, or is printed, while the run goes on."""
        deadline = time.monotonic() + seconds
        while not (condition in self.log if isinstance(condition, str) else condition()):
            assert self.running, f"the run ended before what was waited for\n{self.log[-3000:]}"
            assert time.monotonic() < deadline, f"not in {seconds} s\n{self.log[-3000:]}"
            time.sleep(0.001)

    def end(self, seconds: float = 120) -> int | None:
        """The exit code: of several processes, the first that is not 0; None where it had to be killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        if self.running:
            self.kill()
            return None
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def kill(self) -> None:
        """SIGKILL to all that is left, workers of torchrun included."""
        for pid in workers(self.out):
            os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.join()


def start(
    out: Path,
    script: str = DPO,
    processes: int = 1,
    torchrun: bool = False,
    hook: Callable[[], None] | None = None,
    beside: Path | None = None,
    **options: object,
) -> Started:
    """Start a run; log and cache lie beside `out`, or beside another path. `hook` runs in its process first."""
    beside = beside or out
    log = Path(f"{beside}.log")
    log.unlink(missing_ok=True)
    script = str(worlds.ROOT / script)
    line = worlds.command(script, processes if torchrun else 1, {"output_dir": out, **options})[1:]
    places: list[dict] = [{}]
    if processes > 1 and not torchrun:  # as torchrun and every other launcher describe a process group
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        places = [{"RANK": rank, "LOCAL_RANK": rank, **group} for rank in range(processes)]
    with mock.patch.dict(os.environ, worlds.environment(Path(f"{beside}.cache"))):
        context.set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()
        environments = [{**os.environ, **{name: str(value) for name, value in place.items()}} for place in places]
    found = [context.Process(target=_run, args=(line, log, environment, hook)) for environment in environments]
    for process in found:
        process.start()
    started.append(Started(out, log, found))
    return started[-1]


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


def run(out: Path, seconds: float = 120, code: int = 0, **options: object) -> Started:
    """A run to its end, which must be this exit code."""
    ended = start(out, **options)
    found = ended.end(seconds)
    assert found == code, f"exit code {found}, not {code}\n{ended.log[-3000:]}"
    assert code == 1 or "Traceback" not in ended.log, ended.log[-3000:]
    return ended


def refused(out: Path, *words: str, state: str | None = "refused", **options: object) -> None:
    """A run that ends before its first step with exit code 2 and one line that holds `words`."""
    ended = run(out, code=2, **options)
    check_message(ended, *words)
    assert not re.search("^step 1/", ended.log, re.M)
    if state:
        assert (ended.status["state"], ended.status["step"]) == (state, 0), ended.status


def check_message(ended: Started, *words: str) -> None:
    """One line says how the run ended, and holds `words`."""
    (message,) = re.findall(r"\w\.py: (.*)", ended.log)
    assert all(word in message for word in words), (message, words)


def workers(out: Path) -> list[int]:
    """The processes that torchrun started for a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if str(out).encode() in words and b"torch.distributed.run" not in words:
            found.append(int(folder.name))
    return sorted(found)


def lines(out: Path) -> list[dict]:
    """The whole lines of metrics.jsonl without what a clock gave."""
    path = out / "metrics.jsonl"
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in found if line.endswith("\n")]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def weights(out: Path) -> bytes:
    """The exported weights."""
    return (out / "model.safetensors").read_bytes()


def same(out: Path, through: Path) -> None:
    """Bitwise as the run that nothing happened to."""
    assert lines(out) == lines(through)
    assert weights(out) == weights(through)


def close(out: Path, through: Path, losses: float = 1e-6) -> None:
    """Other summation orders, the same run: relative differences of losses, and to 1e-4 of gradient norms."""
    ours, theirs = lines(out), lines(through)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name, most in (("loss", losses), ("grad_norm", 1e-4)):
        gaps = worlds.differences([line[name] for line in ours], [line[name] for line in theirs])
        assert max(gaps) <= most, (name, gaps)


def checkpoints(out: Path) -> list[str]:
    """What lies in checkpoints/."""
    return sorted(path.name for path in (out / "checkpoints").glob("*"))


def files(out: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


def cut(through: Path, out: Path, step: int) -> Path:
    """A copy of a finished run as it was when it was killed behind this step."""
    shutil.copytree(
        through,
        out,
        ignore=lambda folder, names: (
            {n for n in names if n > f"step-{step:06d}"} & {f"step-{later:06d}" for later in range(step + 1, 100)}
        ),
    )
    for name in ("model.safetensors", "config.json", "status.json"):
        (out / name).unlink()
    return out
