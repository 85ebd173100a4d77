"""Checks of one GPU, in parts, each in a process of its own with a time limit, in the order of the command line.

    prepare[:SHAPE]    on a CPU, once: expected.json, the first steps of dpo in float32; SHAPE is 0.5b unless given
    probe              kernels and deterministic operations one by one, against float64
    train              dpo in bfloat16, its first steps against expected.json
    resume             killed and resumed: the same bits
    bench:SHAPE:PROFILE:BATCH:BUDGET:STEPS:NAMES
                       time, memory and MFU of each of NAMES, with BATCH pairs a step and BUDGET tokens in a forward
                       pass of ours: ours, ours-compiled, trl-N, trl-N-liger, where N is 2, 4, 8, 16 or 32 pairs in a
                       forward pass
    profile[:SHAPE[:BATCH:BUDGET]]
                       the kernels of one step of dpo

Each part prints PASS or FAIL. Logs, expected.json and profiles go to runs/gpu, or to $OUT if that is set. A machine
without an installation needs this repository and tyro in PYTHONPATH. Everything runs on a CPU too, as a rehearsal with
the shape cpu-1k.

    python scripts/gpu_check.py prepare
    python scripts/gpu_check.py probe train resume bench:0.5b:hh:64:16384:5:ours profile:0.5b
"""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from scripts.lab.commands import ROOT, checked_command
from scripts.lab.gpu_parts import CONTENDERS, RESULTS
from scripts.lab.workload import PROFILES, SHAPES
from shared import UserError

# seconds that a part may take on a GPU; a rehearsal may share its CPU with much else
TIME_LIMITS = {"prepare": 1800, "probe": 90, "train": 100, "resume": 100, "bench": 200, "profile": 90}
REHEARSAL_FACTOR = 10
SHOWN_WIDTH = 400  # characters of a line
LAST_LINES = 12  # of the log of a part that failed


@dataclass(kw_only=True)
class Args:
    """Checks of one GPU, in parts."""

    parts: tyro.conf.Positional[tuple[str, ...]]
    """prepare[:SHAPE], probe, train, resume, bench:SHAPE:PROFILE:BATCH:BUDGET:STEPS:NAMES, profile[:SHAPE]"""
    stop: bool = False
    """stop at the first part that fails"""


def require_valid(part: str) -> None:
    """Raises UserError for a part that does not exist, or has other options than it should."""
    name, *options = part.split(":")
    if name not in TIME_LIMITS:
        raise UserError(f"part {part!r}: must be one of {', '.join(TIME_LIMITS)}")
    shapes = options[:1]
    numbers = options[1:]
    if name == "bench":
        if len(options) != 6:
            raise UserError(f"part {part!r}: must be bench:SHAPE:PROFILE:BATCH:BUDGET:STEPS:NAMES")
        numbers = options[2:5]
        require_known(part, options[1:2], PROFILES)
        require_known(part, options[5].split(","), CONTENDERS)
    elif name == "profile" and len(options) not in (0, 1, 3):
        raise UserError(f"part {part!r}: must be profile, profile:SHAPE or profile:SHAPE:BATCH:BUDGET")
    elif name == "prepare" and len(options) > 1:
        raise UserError(f"part {part!r}: must be prepare or prepare:SHAPE")
    elif name in ("probe", "train", "resume") and options:
        raise UserError(f"part {part!r}: takes no options")

    require_known(part, shapes, SHAPES)
    for number in numbers:
        if not number.isdecimal() or int(number) == 0:
            raise UserError(f"part {part!r}: {number!r} must be a number above 0")


def require_known(part: str, names: list[str], known: dict) -> None:
    """Raises UserError for a name that is not a key of `known`."""
    for name in names:
        if name not in known:
            raise UserError(f"part {part!r}: {name!r} must be one of {', '.join(known)}")


def time_limit(part: str) -> float:
    """Seconds after which a part is killed."""
    name, _, _ = part.partition(":")
    limit = TIME_LIMITS[name]
    if not torch.cuda.is_available():
        limit *= REHEARSAL_FACTOR
    return limit


def run_part(part: str) -> bool:
    """Run a part in its own process, show its indented lines, and say whether it passed.

    A CUDA error or a hang of one part does not reach the next one.
    """
    started = time.perf_counter()
    log_path = RESULTS / f"{part.replace(':', '-').replace(',', '+')}.log"
    exit_code = run_logged([sys.executable, "-u", "-m", "scripts.lab.gpu_parts", part], log_path, time_limit(part))

    seconds = time.perf_counter() - started
    if exit_code == 0:
        print(f"PASS {part} {seconds:.0f} s", flush=True)
        return True
    print(f"FAIL {part} {seconds:.0f} s", flush=True)
    last_lines = log_path.read_text(encoding="utf-8").splitlines()[-LAST_LINES:]
    print("\n".join(last_lines), flush=True)
    return False


def run_logged(command_line: list[str], log_path: Path, limit: float) -> int:
    """Run a command until it ends or the limit kills it and its children; returns its exit code.

    The log gets all of its output, and the console the indented lines.
    """
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command_line, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                show(line)
            return process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # this program was interrupted
                os.killpg(process.pid, signal.SIGKILL)


def show(line: str) -> None:
    """Print a line of a part's output if it is indented."""
    if line.startswith("    "):
        print(line.rstrip("\n")[:SHOWN_WIDTH], flush=True)


def main(args: Args) -> None:
    """Run all parts; the exit code is 1 if one fails."""
    if not args.parts:
        raise UserError(f"give at least one part of {', '.join(TIME_LIMITS)}")
    for part in args.parts:
        require_valid(part)
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in args.parts:
        if not run_part(part):
            failed.append(part)
            if args.stop:
                break
    if failed:
        sys.exit(f"failed: {' '.join(failed)}")


if __name__ == "__main__":
    checked_command(main, Args)
