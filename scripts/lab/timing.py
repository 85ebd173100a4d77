"""One measured process: a job of `contenders`, with empty caches, the time of each update, and the memory it takes.

measure()    start such a process, wait for it, and read what it measured
launch()     the same for several processes under torchrun, with a cache of the caller's choice

The clock starts when the libraries are imported, and stops at the last update. What follows it, writing the trained
model, is not counted. On a GPU an update has happened when its last kernel is queued.

    python -m scripts.lab.timing SPEC
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from scripts.lab.commands import ROOT
from scripts.lab.contenders import JOBS, Spec
from scripts.lab.machine import processor_name, proportional_bytes, resident_bytes
from shared import UserError
from shared.distributed import ALLOCATOR_SETTING
from shared.run import Run

# what the jobs would import while they run
MODULES = (
    "torch.distributed.fsdp",
    "torch.distributed.device_mesh",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)


@dataclass
class Measurement:
    """What one process measured."""

    result: Any  # what the job returned
    seconds: float  # to the end of the last update; of a job without updates, to its end
    updates: list[float]  # seconds to the end of each
    memory: int  # bytes until then: most resident memory, on a GPU most allocated memory
    libraries: int  # resident bytes when the clock started; 0 on a GPU
    threads: int
    device: str
    loading: list[tuple[float, int]]  # until the steps begin: the time of day, and the bytes of this process


# ---------------------------------------------------------------- in the measured process


class Stopwatch:
    """The time of every update, and the memory that was needed until it."""

    started: float
    updates: list[float]
    memory: int

    def __init__(self) -> None:
        self.updates = []
        self.memory = 0
        register_optimizer_step_post_hook(self._note_update)
        self.started = time.perf_counter()
        self.memory_log = MemoryLog()

    def _note_update(self, *_: object) -> None:
        self.updates.append(self.seconds())
        self.memory = peak_memory()

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


class MemoryLog:
    """The memory of this process ten times a second, until the steps of its run begin."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

        resume = Run.resume

        def end_and_resume(run: Run, *args: Any) -> int:
            self._ended.set()
            return resume(run, *args)

        Run.resume = end_and_resume  # type: ignore[method-assign, assignment]

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self.samples.append((time.time(), proportional_bytes()))


def most_at_once(logs: list[list[tuple[float, int]]]) -> int:
    """The largest sum of the memory of all processes at one time, from the log of each."""
    events = []
    for process, samples in enumerate(logs):
        for moment, size in samples:
            events.append((moment, process, size))

    sizes = [0] * len(logs)
    largest = 0
    for _, process, size in sorted(events):
        sizes[process] = size
        largest = max(largest, sum(sizes))
    return largest


def peak_memory() -> int:
    """Bytes that this process has held at most so far, on a GPU those of its tensors there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")


def run_job(spec: Spec) -> Measurement:
    """Import everything, start the clock, and do the job."""
    for name in MODULES:
        importlib.import_module(name)
    job = JOBS[spec.job](spec)
    libraries = 0
    if not torch.cuda.is_available():
        libraries = resident_bytes("VmRSS")

    stopwatch = Stopwatch()
    result = job()

    seconds = stopwatch.seconds()
    if stopwatch.updates:
        seconds = stopwatch.updates[-1]
    return Measurement(
        result=result,
        seconds=seconds,
        updates=stopwatch.updates,
        memory=stopwatch.memory,
        libraries=libraries,
        threads=torch.get_num_threads(),
        device=device_name(),
        loading=stopwatch.memory_log.samples,
    )


def device_name() -> str:
    """The GPU, or the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor_name()


def main(spec: Spec) -> None:
    """Do the job, write what was measured beside the output directory, and end the process."""
    measurement = run_job(spec)
    path = measurement_path(spec, int(os.environ.get("RANK", 0)))
    path.write_text(json.dumps(dataclasses.asdict(measurement)), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort an ordinary interpreter exit


def measurement_path(spec: Spec, rank: int) -> Path:
    """Where a process leaves its Measurement."""
    return Path(f"{spec.output_dir}.{rank}.json")


# ---------------------------------------------------------------- in the process that waits for it


def measure(name: str, spec: Spec, scratch: Path) -> Measurement:
    """Run a job in a process of its own with empty caches. Raises UserError, which begins with `name`, if it fails."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        spec = dataclasses.replace(spec, output_dir=f"{directory}/out")
        (measurement,) = launch(name, spec, Path(directory))
    return measurement


def launch(
    name: str, spec: Spec, cache: Path, processes: int = 1, environment: dict[str, str] | None = None
) -> list[Measurement]:
    """Run a job in one process, or in several under torchrun, and return what each of them measured.

    environment: more variables for the processes. Raises UserError, which begins with `name`, if the job fails.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "scripts.lab.timing", json.dumps(dataclasses.asdict(spec))]
    environment = {
        "GOMP_SPINCOUNT": "10000",
        "PYTORCH_ALLOC_CONF": ALLOCATOR_SETTING,  # of every contender, as ours sets it
        **os.environ,
        **(environment or {}),
        "XDG_CACHE_HOME": str(cache),
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
    }
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if job.returncode:
        raise UserError(f"{name}: failed with exit code {job.returncode}: {last_error(job.stderr)}")

    measurements = []
    for rank in range(processes):
        text = measurement_path(spec, rank).read_text(encoding="utf-8")
        measurements.append(Measurement(**json.loads(text)))
    return measurements


def last_error(stderr: str) -> str:
    """The last error that a process reported; torchrun writes more below those of its processes."""
    errors = re.findall(r"^\[rank\d+\]: (\w\S*: .*)", stderr, re.MULTILINE)
    if errors:
        return errors[-1]
    lines = stderr.strip().splitlines()
    if lines:
        return lines[-1]
    return "it wrote nothing"


if __name__ == "__main__":
    main(Spec(**json.loads(sys.argv[1])))
