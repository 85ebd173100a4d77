"""How time and memory of training grow: with the length of a row, completions, vocabulary, rows, and processes.

Every point is a run of `algos/dpo.py` on random rows, in processes of its own, with empty caches. Memory that is freed
goes back to the system (MALLOC_MMAP_THRESHOLD_), so that the measured memory is the memory needed. For each point:

    first      seconds to the end of the first update: rows and weights loaded, tokenised, π_ref's log-probs computed
    again      the same at the next start, when tokens and log-probs of π_ref are in the cache
    step       mean seconds of the steps after the first
    memory     most resident memory of a process, the largest of them, without what the libraries take
    loading    most memory of all processes at one time until the steps begin, and of a process that is not the first,
               in copies of the model in float32, without what a run of a tiny model takes
    saving     seconds of writing one checkpoint, its bytes, and how far it lifts the most resident memory; measured
               in a run of its own, which saves after every step

    python scripts/growth.py
"""

import json
import os
import platform
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from scripts.lab import plots
from scripts.lab.commands import ROOT, checked_command
from scripts.lab.contenders import Spec
from scripts.lab.machine import processor_name
from scripts.lab.tables import markdown_table
from scripts.lab.timing import Measurement, launch, most_at_once
from scripts.lab.workload import PROFILES, Lengths, Profile, Shape, Workload, make_model, prepare
from shared import UserError
from shared.files import write_text
from shared.loading import load_tokenizer

LEARNING_RATE = 1e-4
MICRO_BATCH_TOKENS = 2_048
RETURNED = 2**20  # bytes of a block that goes back to the system when it is freed

SMALL = Shape(8_192, 256, 4, 8, 8, 688)
LARGE = Shape(8_192, 768, 8, 12, 12, 2_048)  # whose weights and optimizer outweigh all else
DEEP = Shape(4_096, 512, 20, 8, 8, 1_376)  # mostly in its layers, as larger models are: 67 million parameters


def thin_shape(vocab_size: int) -> Shape:
    """A narrow model with a vocabulary of this size."""
    return Shape(vocab_size, 64, 4, 4, 4, 172)


def fixed_lengths(tokens: int) -> Profile:
    """Prompts and completions of exactly so many tokens."""
    lengths = Lengths(tokens, 0, tokens)
    return Profile(lengths, lengths)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run that is measured."""

    value: int  # of what grows
    profile: Profile = PROFILES["hh"]
    shape: Shape = SMALL
    num_completions: int = 2
    rows: int = 96
    batch_size: int = 16
    processes: int = 1
    options: dict = field(default_factory=dict)  # of the algorithm
    again: bool = False  # whether the next start is measured too
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    saving: bool = False  # whether checkpoints are measured too
    loading: bool = False  # whether memory until the steps begin is measured too
    dtype: str = "float32"  # of the model's files
    returned: int = RETURNED


def length_point(tokens: int) -> Point:
    """Always 12,288 tokens a step."""
    prompts = 4096 // tokens
    return Point(value=tokens, profile=fixed_lengths(tokens), rows=3 * prompts, batch_size=prompts)


def completions_point(num_completions: int) -> Point:
    """Always 32 completions a step."""
    return Point(
        value=num_completions,
        num_completions=num_completions,
        rows=96 // num_completions,
        batch_size=32 // num_completions,
    )


def processes_point(processes: int) -> Point:
    """Few tokens in a forward pass, so that weights and optimizer are most of the memory."""
    return Point(
        value=processes,
        shape=LARGE,
        rows=12,
        batch_size=4,
        processes=processes,
        micro_batch_tokens=256,
        saving=True,
    )


def loading_point(processes: int) -> Point:
    """Weights as most models have them. Activations of half a megabyte go back to the system too, which takes time."""
    point = processes_point(processes)
    return replace(point, shape=DEEP, saving=False, loading=True, dtype="bfloat16", returned=RETURNED // 8)


SWEEPS = {
    "tokens of a prompt and of a completion": [length_point(n) for n in (64, 256, 1024, 2048)],
    "completions": [completions_point(n) for n in (2, 4, 8, 16)],
    "vocabulary": [Point(value=n, shape=thin_shape(n)) for n in (8_192, 32_768, 131_072)],
    "rows": [Point(value=n, rows=n, options={"max_steps": 2}, again=True) for n in (1_000, 10_000, 100_000)],
    "processes": [processes_point(n) for n in (1, 2, 4)],
    "processes that load": [loading_point(n) for n in (1, 2, 4)],
}

# of the tables: key and format of each number
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
    "loading (copies)": ("loading", ".2f"),
    "of another process": ("loading of another", ".2f"),
}


@dataclass(kw_only=True)
class Args:
    """How time and memory of training grow."""

    sweeps: tuple[str, ...] = tuple(SWEEPS)
    """sweeps to run"""
    output_dir: Path = ROOT / "runs" / "growth"
    """where the tables (growth.md), all numbers (growth.json) and the picture (growth.png) go"""


# ---------------------------------------------------------------- measuring


def measure_point(point: Point, scratch: Path) -> dict[str, float]:
    """What the run of a point takes. Raises UserError if it fails."""
    workload = Workload(
        shape=point.shape,
        max_rows=point.rows,
        profile=point.profile,
        num_completions=point.num_completions,
        dtype=point.dtype,
    )
    model, rows, lengths = prepare(workload, scratch)
    spec = Spec(
        model=str(model),
        train_data=str(rows),
        batch_size=point.batch_size,
        micro_batch_tokens=point.micro_batch_tokens,
        learning_rate=LEARNING_RATE,
        options=point.options,
    )

    runs = run_point("first", spec, point, scratch)
    numbers = largest_numbers(runs)
    if point.again:
        again = run_point("again", spec, point, scratch)
        numbers["again"] = largest_numbers(again)["first"]
    if point.saving:
        runs = run_point("saving", replace(spec, job="saving"), point, scratch)
        for key in ("saving", "checkpoint", "extra"):
            numbers[key] = max(run.result[key] for run in runs)

    if point.loading:
        tiny_model = scratch / "tiny_model"
        make_model(tiny_model, thin_shape(point.shape.vocab_size), load_tokenizer(str(model))[0], point.dtype)
        tiny_runs = run_point("tiny", replace(spec, model=str(tiny_model)), point, scratch)
        numbers |= loading_numbers(runs, tiny_runs, model)

    later_steps = point.rows / point.batch_size - 1
    numbers["tokens"] = float(lengths[point.batch_size :].sum()) / later_steps
    numbers["ids"] = 4 * float(lengths.sum()) / 1e6
    return numbers


def run_point(name: str, spec: Spec, point: Point, scratch: Path) -> list[Measurement]:
    """Run the processes, which share the machine's cores and the caches of earlier runs in `scratch`."""
    spec = replace(spec, output_dir=str(scratch / name))
    threads = max(1, (os.cpu_count() or 1) // point.processes)
    environment = {"OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": str(point.returned)}
    return launch(name, spec, scratch, point.processes, environment)


def loading_numbers(runs: list[Measurement], tiny_runs: list[Measurement], model: Path) -> dict[str, float]:
    """The memory of loading in copies of the model: of all processes at one time, and of one that is not the first."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).num_parameters()
    copy = 4 * parameters

    most = most_at_once([run.loading for run in runs])
    numbers = {"loading": (most - most_at_once([run.loading for run in tiny_runs])) / copy}
    others = []
    for run, tiny_run in zip(runs[1:], tiny_runs[1:], strict=True):
        difference = most_at_once([run.loading]) - most_at_once([tiny_run.loading])
        others.append(difference / copy)
    numbers["loading of another"] = max(others, default=0.0)
    return numbers


def largest_numbers(runs: list[Measurement]) -> dict[str, float]:
    """The largest of each number over the processes."""
    numbers = {}
    for run in runs:
        later_steps = len(run.updates) - 1
        of_run = {
            "first": run.updates[0],
            "step": (run.updates[-1] - run.updates[0]) / later_steps,
            "libraries": run.libraries / 1e6,
            "memory": (run.memory - run.libraries) / 1e6,
        }
        for key, value in of_run.items():
            numbers[key] = max(value, numbers.get(key, value))
    return numbers


# ---------------------------------------------------------------- output


def markdown(machine: dict[str, Any], sweeps: dict[str, list[dict]]) -> str:
    """A table for each sweep, with the columns that its points have."""
    shown = [f"{key} {value}" for key, value in machine.items()]
    paragraphs = ["# growth", f"Machine: {', '.join(shown)}."]
    for name, points in sweeps.items():
        columns = {title: column for title, column in COLUMNS.items() if column[0] in points[0]}
        lines = []
        for point in points:
            cells = [str(point["value"])]
            for key, form in columns.values():
                cells.append(f"{point[key]:{form}}")
            lines.append(cells)
        paragraphs.append(markdown_table([name, *columns], lines))
    return "\n\n".join(paragraphs) + "\n"


def plot(path: Path, sweeps: dict[str, list[dict]]) -> None:
    """Step time and memory of every sweep."""
    quantities = [("step", "step (s)", plots.BLUE), ("memory", "memory (MB)", plots.ORANGE)]
    mosaic = []
    for key, _, _ in quantities:
        mosaic.append([f"{name}, {key}" for name in sweeps])
    figure, panels = plots.canvas(mosaic, (3.1 * len(sweeps), 5.2))

    leftmost = next(iter(sweeps))
    for name, points in sweeps.items():
        values = [point["value"] for point in points]
        for key, unit, color in quantities:
            numbers = [point[key] for point in points]
            panel = panels[f"{name}, {key}"]
            panel.plot(values, numbers, "o-", color=color)
            panel.set_xscale("log")
            panel.set_ylim(0, 1.1 * max(numbers))
            panel.set_xticks(values, [f"{value:,}" for value in values], minor=False)
            panel.minorticks_off()
            if name != leftmost:
                unit = ""
            plots.label_axes(panel, "", name, unit)
    figure.savefig(path, format="png", dpi=100)


def require_known_sweeps(names: tuple[str, ...]) -> None:
    """Raises UserError where there is nothing to run, or a sweep that does not exist."""
    known = ", ".join(repr(name) for name in SWEEPS)
    if not names:
        raise UserError(f"--sweeps: needs at least one of {known}")
    for name in names:
        if name not in SWEEPS:
            raise UserError(f"--sweeps {name!r}: must be one of {known}")


def main(args: Args) -> None:
    """Measure all points, write and print the tables."""
    plots.require_matplotlib()
    require_known_sweeps(args.sweeps)
    machine = {"device": processor_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    args.output_dir.mkdir(parents=True, exist_ok=True)

    sweeps: dict[str, list[dict]] = {}
    for name in args.sweeps:
        sweeps[name] = []
        for point in SWEEPS[name]:
            with tempfile.TemporaryDirectory() as scratch:
                numbers = measure_point(point, Path(scratch))
            sweeps[name].append({"value": point.value, **numbers})
            print(f"{name} {point.value}: {numbers['step']:.3f} s a step", flush=True)
            results = json.dumps({"machine": machine, "sweeps": sweeps}, indent=1)
            write_text(args.output_dir / "growth.json", results + "\n")

    plot(args.output_dir / "growth.png", sweeps)
    tables = markdown(machine, sweeps)
    write_text(args.output_dir / "growth.md", tables)
    print(f"\n{tables}")


if __name__ == "__main__":
    checked_command(main, Args)
