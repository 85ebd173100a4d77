"""How time and memory of training grow: with the length of a row, completions, vocabulary, rows, and processes.

Every point is a run of `algos/dpo.py` on random rows, in processes of its own, with empty caches. Memory that is freed
goes back to the system (MALLOC_MMAP_THRESHOLD_), so that what is seen is what is needed. Of each:

    first      seconds to the end of the first update: rows and weights loaded, tokenised, π_ref's log-probs computed
    again      the same at the next start, when tokens and log-probs of π_ref are in the cache
    step       mean seconds of the steps after the first
    memory     most resident memory of a process, the largest of them, without what the libraries take
    saving     seconds of writing one checkpoint, its bytes, and how far it lifts the most resident memory

    python scripts/growth.py
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import benchmark
import figures
import quickstart
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from shared import UserError, checkpoint
from shared.run import command

SMALL = (8_192, 256, 4, 8, 8, 688)  # vocabulary, width, layers, heads, their keys and values, inner width
THIN = (64, 4, 4, 4, 172)  # behind a vocabulary
LARGE = (8_192, 768, 8, 12, 12, 2_048)  # whose weights and optimizer outweigh all else
HH = benchmark.PROFILES["hh"]
SAVING = {"save_every": 1, "micro_batch_tokens": 256}  # so small that weights and optimizer are most of the memory
# what grows → points of: its value, what the run has that others have not
SWEEPS: dict[str, list[tuple[int, dict]]] = {
    "tokens of a prompt and of a completion": [
        (n, {"profile": ((n, 0, n), (n, 0, n)), "rows": 3 * 4096 // n, "batch": 4096 // n})
        for n in (64, 256, 1024, 2048)
    ],
    "completions": [(k, {"k": k, "rows": 96 // k, "batch": 32 // k}) for k in (2, 4, 8, 16)],
    "vocabulary": [(v, {"shape": (v, *THIN)}) for v in (8_192, 32_768, 131_072)],
    "rows": [(n, {"rows": n, "options": {"max_steps": 2}, "again": True}) for n in (1_000, 10_000, 100_000)],
    "processes": [(n, {"shape": LARGE, "processes": n, "rows": 12, "batch": 4, "options": SAVING}) for n in (1, 2, 4)],
}
COLUMNS = {
    "first (s)": ("first", ".2f"),
    "again (s)": ("again", ".2f"),
    "step (s)": ("step", ".3f"),
    "tokens of a step": ("tokens", ".0f"),
    "token ids (MB)": ("ids", ".1f"),
    "memory (MB)": ("memory", ".0f"),
    "libraries (MB)": ("libraries", ".0f"),
    "saving (s)": ("saving", ".2f"),
    "checkpoint (MB)": ("checkpoint", ".1f"),
    "memory of saving (MB)": ("extra", ".1f"),
}


@dataclass(kw_only=True)
class Args:
    """How time and memory of training grow."""

    sweeps: tuple[str, ...] = tuple(SWEEPS)
    """which"""
    output_dir: Path = quickstart.ROOT / "results"
    """where the tables (growth.md), all numbers (growth.json) and the picture (growth.png) go"""


# ---------------------------------------------------------------- one process


def worker(spec: dict) -> None:
    """One run of one process; a file beside the output directory says what was measured."""
    for name in benchmark.MODULES.split():
        import_module(name)
    (module, args), ends, saves = benchmark.own(spec), [], []
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    plain = checkpoint.save

    def save(out: Path, step: int, *words: object) -> None:
        before, began = benchmark.resident("VmHWM"), time.perf_counter()
        plain(out, step, *words)
        dist.barrier()  # the first process has still to rename it
        files = (out / "checkpoints" / f"step-{step:06d}").glob("*")
        size = sum(file.stat().st_size for file in files) if step == 1 else 0
        saves.append((time.perf_counter() - began, benchmark.resident("VmHWM") - before, size))

    checkpoint.save = save
    libraries, began = benchmark.resident("VmRSS"), time.perf_counter()
    module.main(args)
    found = {"first": ends[0] - began, "step": (ends[-1] - ends[0]) / (len(ends) - 1), "libraries": libraries / 1e6}
    found["memory"] = (benchmark.resident("VmHWM") - libraries) / 1e6
    if saves:  # the first one grows what memory the allocator holds
        seconds, extra, size = zip(*saves, strict=True)
        found["step"] -= sum(seconds[:-1]) / (len(ends) - 1)
        found |= {"saving": min(seconds), "checkpoint": size[0] / 1e6, "extra": max(extra) / 1e6}
    Path(f"{spec['output_dir']}.{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    os._exit(0)  # gloo's threads can abort an ordinary interpreter exit


def launch(spec: dict, processes: int, folder: Path, name: str) -> dict:
    """The largest of each number over the processes. Raises UserError where a run fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    line = [sys.executable, *(torchrun if processes > 1 else []), __file__, "worker"]
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "XDG_CACHE_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    words = [*line, json.dumps(spec | {"output_dir": str(folder / name)})]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    found = [json.loads(path.read_text()) for path in folder.glob(f"{name}.*.json")]
    if done.returncode or len(found) != processes:
        said = re.findall(r"^\[rank\d+\]: (\w\S*: .*)", done.stderr, re.MULTILINE)  # torchrun says more below it
        raise UserError(f"{name}: failed: {said[-1] if said else done.stderr[-1000:] or 'it wrote nothing'}")
    return {key: max(one[key] for one in found) for key in found[0]}


# ---------------------------------------------------------------- points


def point(
    scratch: Path,
    profile: tuple = HH,
    shape: tuple = SMALL,
    k: int = 2,
    rows: int = 96,
    batch: int = 16,
    processes: int = 1,
    options: dict | None = None,
    again: bool = False,
) -> dict:
    """What one run takes. profile: as `benchmark.PROFILES`; options: of the algorithm."""
    benchmark.PROFILES["own"], benchmark.SHAPES["own"] = profile, (shape, False)
    args = benchmark.Args(profile="own", shape="own", max_rows=rows, batch_size=batch, num_completions=k)
    model, path, lengths = benchmark.prepare(args, scratch)
    spec = {name: getattr(args, name) for name in ("algorithm", "batch_size", "micro_batch_tokens", "dtype")}
    spec |= {"model": str(model), "train_data": str(path), "learning_rate": 1e-4, "options": options or {}}
    found = launch(spec, processes, scratch, "first")
    if again:
        found["again"] = launch(spec, processes, scratch, "again")["first"]
    return found | {"tokens": float(lengths[batch:].sum()) / (rows / batch - 1), "ids": float(lengths.sum()) * 4 / 1e6}


def markdown(machine: dict, sweeps: dict[str, list[dict]]) -> str:
    """A table for each sweep, with the columns that its points have."""
    lines = ["# growth", "", f"Machine: {', '.join(f'{key} {value}' for key, value in machine.items())}."]
    for name, points in sweeps.items():
        columns = {title: column for title, column in COLUMNS.items() if column[0] in points[0]}
        lines += ["", f"| {name} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for one in points:
            lines.append(f"| {one['value']} | {' | '.join(f'{one[key]:{form}}' for key, form in columns.values())} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, sweeps: dict[str, list[dict]]) -> None:
    """Step time and memory of every sweep."""
    names = list(sweeps)
    mosaic = [[f"{name}, {what}" for name in names] for what in ("step", "memory")]
    figure, axes = figures.canvas(mosaic, (3.1 * len(names), 5.2))
    for name, points in sweeps.items():
        for what, unit, color in (("step", "step (s)", figures.BLUE), ("memory", "memory (MB)", figures.ORANGE)):
            panel = axes[f"{name}, {what}"]
            panel.plot([one["value"] for one in points], [one[what] for one in points], "o-", color=color)
            panel.set_xscale("log")
            panel.set_ylim(0, 1.1 * max(one[what] for one in points))
            panel.set_xticks([one["value"] for one in points], [f"{one['value']:,}" for one in points], minor=False)
            panel.minorticks_off()
            figures.label(panel, "", name, unit if name == names[0] else "")
    figure.savefig(path, format="png", dpi=100)


def main(args: Args) -> None:
    """Measure all points, write and print the tables."""
    figures.check()
    if not args.sweeps:
        raise UserError(f"--sweeps: needs at least one of {', '.join(map(repr, SWEEPS))}")
    if unknown := set(args.sweeps) - set(SWEEPS):
        raise UserError(f"--sweeps {unknown.pop()!r}: must be of {', '.join(map(repr, SWEEPS))}")
    sweeps: dict[str, list[dict]] = {}
    machine = {"device": benchmark.cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.sweeps:
        for value, own in SWEEPS[name]:
            with tempfile.TemporaryDirectory() as scratch:
                sweeps.setdefault(name, []).append({"value": value, **point(Path(scratch), **own)})
            print(f"{name} {value}: {sweeps[name][-1]['step']:.3f} s a step", flush=True)
            numbers = json.dumps({"machine": machine, "sweeps": sweeps}, indent=1)
            (args.output_dir / "growth.json").write_text(numbers + "\n", encoding="utf-8")
    draw(args.output_dir / "growth.png", sweeps)
    (args.output_dir / "growth.md").write_text(markdown(machine, sweeps), encoding="utf-8")
    print(f"\n{markdown(machine, sweeps)}")


if __name__ == "__main__":
    worker(json.loads(sys.argv[2])) if sys.argv[1:2] == ["worker"] else command(main, Args)
