"""Time and memory of training, alone or against TRL, or against a plain loop that takes up one trick after another.

Every measured run is a process of its own with empty caches. Contenders take turns, on the same weights, rows, order,
dtype, clipping and AdamW. The clock starts when the libraries are imported and stops at the last update. Loading rows
and weights, tokenising, and the reference's log-probs are inside; writing the trained model is not. Before anything is
compared, loss and gradient norm of steps one and two must agree; in bfloat16, where rounding alone can make step two
differ, a disagreement is reported.

    s/row      seconds of the whole run per row
    first      seconds to the end of the first update
    step       mean seconds of the steps after it; rows/s and tokens/s are of these steps, a token counted once
    memory     most resident memory of the process, the libraries (given beside it) included; on a GPU, most allocated
    MFU        necessary FLOPs of those steps, over their time, over the FLOP/s of one large matmul of the same dtype,
               device and threads. Necessary is a prompt once per row, attention to what a token may see, of the last
               layer what is read, the head on completion tokens only; forward and backward are three forward passes,
               a live reference is a fourth
    ÷ ours     seconds or memory over ours of the same round: median [least, most]

TRL and the plain loop pad. Each number of `--against-batch` is tried on two steps, and the fastest one is measured. One
that fails, for instance for lack of memory, counts as infinitely slow, also if it fails on later rows. The plain loop's
lines add up: each has all tricks of the lines above it. The one trick left after the last, prefix sharing, makes ours.
Random weights and rows of random words serve as well as real ones: nothing depends on what they are.

    python scripts/benchmark.py --profile hh --against trl
    python scripts/benchmark.py --profile hh --against naive
    python scripts/benchmark.py --shape 0.5b --dtype bfloat16 --max-rows 1024 --batch-size 64 \\
        --micro-batch-tokens 16384 --against trl --against-batch 4 8 16
"""

import dataclasses
import importlib.util
import json
import math
import os
import platform
import statistics
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor

from scripts.lab.commands import ROOT, checked_command
from scripts.lab.contenders import LADDER, Spec
from scripts.lab.tables import markdown_table
from scripts.lab.timing import Measurement, measure
from scripts.lab.workload import PROFILES, SHAPES, Workload, forward_flops, prepare
from shared import UserError
from shared.command import Above
from shared.files import write_text
from shared.loading import load_tokenizer

LEARNING_RATE = 1e-4  # high enough that step two tells whether step one's update was the same
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of losses and gradient norms
PACKED_TRICKS = LADDER.index("+ packing")  # from this rung on the plain loop has no pairs per pass

# of the table: key and format of each number
COLUMNS = {
    "s/row": ("seconds_per_row", ".4f"),
    "first (s)": ("first_update", ".2f"),
    "step (s)": ("step", ".3f"),
    "rows/s": ("rows_per_second", ".2f"),
    "tokens/s": ("tokens_per_second", ".0f"),
    "memory (MB)": ("memory", ".0f"),
    "libraries (MB)": ("libraries", ".0f"),
    "MFU": ("mfu", ".1%"),
}


@dataclass(kw_only=True)
class Args:
    """Time and memory of training."""

    algorithm: Literal["dpo", "sft", "rm", "exo", "typo", "ensemble_dpo"] = "dpo"
    """file of algos/"""
    num_completions: Annotated[int, Above(0)] = 2
    """completions of a row"""
    profile: Literal["hh", "ultrafeedback", "tldr"] = "hh"
    """lengths of the rows, which are of random words"""
    rows: str | None = None
    """file, directory or hub id (`path:split`) of real pairs of plain text, instead of a profile"""
    tokenizer: str | None = None
    """directory or hub id of the tokenizer of --rows; default: byte-level BPE of 8192 tokens trained on them"""
    shape: Literal["cpu-1k", "cpu-8k", "cpu-152k", "0.5b", "1.5b"] = "cpu-8k"
    """shape of the model, whose weights are random"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the forward and backward pass; weights and optimizer state stay float32"""
    max_rows: Annotated[int, Above(0)] = 96
    """rows, each used once"""
    batch_size: Annotated[int, Above(0)] = 16
    """rows per optimizer step"""
    micro_batch_tokens: Annotated[int, Above(0)] = 2048
    """largest number of tokens in one forward pass of ours"""
    against: Literal["trl", "naive"] | None = None
    """compare dpo with TRL's trainer, or with a plain loop"""
    against_batch: tuple[int, ...] = (16, 4)
    """pairs per forward pass to try for the other side, the fastest of which is used; on a GPU: 4 8 16"""
    repeats: Annotated[int, Above(0)] = 2
    """rounds of one run of every contender"""
    output_dir: Path = ROOT / "runs" / "benchmark"
    """where the table (.md) and all numbers (.json) go"""


def require_measurable(args: Args) -> None:
    """Raises UserError for what cannot be measured."""
    if args.max_rows <= args.batch_size:
        raise UserError(f"--max-rows {args.max_rows}: must be more than one batch, {args.batch_size}")
    if args.tokenizer and not args.rows:
        raise UserError(f"--tokenizer {args.tokenizer}: is that of --rows; a profile has its own")
    if args.rows and (args.algorithm == "typo" or args.num_completions != 2):
        raise UserError("--rows: gives pairs without samples of the reference; take a profile")

    if args.against is None:
        return
    if args.algorithm != "dpo" or args.num_completions != 2:
        raise UserError(f"--against {args.against}: compares dpo on pairs only")
    if args.against == "trl" and importlib.util.find_spec("trl") is None:
        raise UserError("--against trl: TRL is not installed; pip install trl")
    for size in args.against_batch:
        if size < 1 or args.batch_size % size:
            raise UserError(f"--against-batch {size}: must divide --batch-size {args.batch_size}")


# ---------------------------------------------------------------- contenders


def make_contenders(args: Args, model: Path, rows: Path) -> dict[str, Spec]:
    """Every contender's name and Spec, ours first."""
    ours = Spec(
        job="ours",
        model=str(model),
        train_data=str(rows),
        algorithm=args.algorithm,
        batch_size=args.batch_size,
        micro_batch_tokens=args.micro_batch_tokens,
        learning_rate=LEARNING_RATE,
        dtype=args.dtype,
    )
    contenders = {"ours": ours}
    if args.against == "trl":
        trl = dataclasses.replace(ours, job="trl")
        contenders["TRL, reference live"] = dataclasses.replace(trl, live_reference=True)
        contenders["TRL, reference precomputed"] = trl
    if args.against == "naive":
        for tricks, name in enumerate(LADDER):
            contenders[name] = dataclasses.replace(ours, job="naive", tricks=tricks, live_reference=tricks == 0)
    return contenders


def label(name: str, pairs_per_pass: int | None) -> str:
    """A contender's name with its pairs per forward pass, if it has any."""
    if pairs_per_pass is None:
        return name
    return f"{name}, {pairs_per_pass} pairs a pass"


def tune(contenders: dict[str, Spec], args: Args, scratch: Path) -> tuple[dict[str, list[Spec]], dict[str, dict]]:
    """Run every contender on the first two steps, to see that it trains as ours does and which pass is fastest.

    Returns the contenders, each with the numbers of pairs per forward pass that it can do, the fastest first, and what
    was tried: its seconds and bytes, and why it failed or how it disagrees. Raises UserError if a contender disagrees
    with ours in float32, or if all of them fail with every number of pairs.
    """
    two_steps = scratch / "two_steps.jsonl"
    with open(contenders["ours"].train_data, encoding="utf-8") as rows:
        two_steps.write_text("".join(islice(rows, 2 * args.batch_size)), encoding="utf-8")

    ours = measure("ours", dataclasses.replace(contenders["ours"], train_data=str(two_steps)), scratch)
    tuned = {"ours": [contenders["ours"]]}
    tried: dict[str, dict] = {"ours": {"seconds": ours.seconds, "memory": ours.memory}}
    for name, spec in list(contenders.items())[1:]:
        sizes: tuple[int | None, ...] = args.against_batch
        if spec.job == "naive" and spec.tricks >= PACKED_TRICKS:
            sizes = (None,)
        seconds = {}
        for size in sizes:
            candidate = dataclasses.replace(spec, train_data=str(two_steps), pairs_per_pass=size)
            attempt = try_contender(label(name, size), candidate, ours, scratch)
            tried[label(name, size)] = attempt
            seconds[size] = attempt.get("seconds", math.inf)

        fastest_first = sorted(seconds, key=lambda size: seconds[size])
        possible = [size for size in fastest_first if seconds[size] < math.inf]
        tuned[name] = [dataclasses.replace(spec, pairs_per_pass=size) for size in possible]

    if not any(tuned[name] for name in tuned if name != "ours"):
        raise UserError(next(attempt["failed"] for attempt in tried.values() if "failed" in attempt))
    return tuned, tried


def try_contender(name: str, spec: Spec, ours: Measurement, scratch: Path) -> dict:
    """What `tune` notes of one attempt. Raises UserError if it disagrees with ours in float32."""
    try:
        measurement = measure(name, spec, scratch)
    except UserError as error:  # perhaps it has not enough memory
        return failed_attempt(error)

    attempt = {"seconds": measurement.seconds, "memory": measurement.memory}
    problem = disagreement(measurement.result, ours.result, TOLERANCE[spec.dtype])
    if problem is None:
        print(f"agrees with ours on two steps: {name}, {measurement.seconds:.2f} s", flush=True)
        return attempt
    if spec.dtype == "float32":
        raise UserError(f"{name}: {problem}: not the same training")
    print(f"does not agree with ours: {name}: {problem}, {measurement.seconds:.2f} s", flush=True)
    return {**attempt, "disagreement": problem}


def failed_attempt(error: UserError) -> dict:
    """What is noted of an attempt that failed."""
    print(f"counts as infinitely slow: {error}", flush=True)
    return {"failed": str(error)}


def disagreement(losses: list, expected: list, tolerance: float) -> str | None:
    """Where loss or gradient norm of steps one and two differ by more than `tolerance`, relative; None: nowhere.

    losses, expected: loss and gradient norm of each step.
    """
    for step in (0, 1):
        for i, quantity in enumerate(("loss", "gradient norm")):
            value = losses[step][i]
            ours = expected[step][i]
            if not abs(value - ours) <= tolerance * abs(ours):  # also where it is not a number
                return f"{quantity} of step {step + 1} is {value:.8g}, ours {ours:.8g}"
    return None


# ---------------------------------------------------------------- numbers


def run_all(args: Args, scratch: Path) -> dict:
    """Agreement, then rounds of runs; the contents of the results file."""
    load_before = os.getloadavg()[0]
    workload = Workload(
        algorithm=args.algorithm,
        num_completions=args.num_completions,
        profile=PROFILES[args.profile],
        shape=SHAPES[args.shape],
        max_rows=args.max_rows,
        rows=args.rows,
        tokenizer=args.tokenizer,
    )
    model, rows, lengths = prepare(workload, scratch)
    contenders = make_contenders(args, model, rows)
    candidates = {name: [spec] for name, spec in contenders.items()}
    tried: dict[str, dict] = {}
    if args.against is not None:
        candidates, tried = tune(contenders, args, scratch)
    peak = measure("peak", dataclasses.replace(contenders["ours"], job="peak"), scratch).result

    runs = measure_rounds(candidates, args.repeats, tried, scratch)
    _, config = load_tokenizer(str(model))
    later_rows = lengths[args.batch_size :]
    forward_seconds = forward_flops(config, later_rows, head=args.algorithm != "rm") / peak
    summaries = {}
    for name in runs:
        spec = candidates[name][0]
        forward_passes = 3 + spec.live_reference
        summaries[label(name, spec.pairs_per_pass)] = summarise(
            runs[name], runs["ours"], args.batch_size, lengths, forward_passes * forward_seconds
        )
    return {
        "machine": describe_machine(runs["ours"][0], load_before, peak, args),
        "rows": {
            "mean tokens of a prompt": round(float(lengths[:, 0].double().mean()), 1),
            "of a completion": round(float(lengths[:, 1:].double().mean()), 1),
        },
        "settings": describe_settings(args),
        "tried": tried,
        "contenders": summaries,
        "runs": {name: [dataclasses.asdict(run) for run in of_name] for name, of_name in runs.items()},
    }


def measure_rounds(
    candidates: dict[str, list[Spec]], repeats: int, tried: dict[str, dict], scratch: Path
) -> dict[str, list[Measurement]]:
    """Rounds of one run of the first candidate of every contender.

    One that fails, perhaps on a row that `tune` did not see, makes place for the next one, which does the earlier
    rounds too. A contender without candidates is left out.
    """
    runs: dict[str, list[Measurement]] = {name: [] for name in candidates}
    for i in range(repeats):
        for name, specs in candidates.items():
            while specs and len(runs[name]) <= i:
                measure_once_more(name, specs, runs[name], tried, scratch)
    return {name: of_name for name, of_name in runs.items() if candidates[name]}


def measure_once_more(
    name: str, specs: list[Spec], runs: list[Measurement], tried: dict[str, dict], scratch: Path
) -> None:
    """Add a run of the first Spec to `runs`. If it fails, remove it and its runs. Raises UserError if ours fails."""
    title = label(name, specs[0].pairs_per_pass)
    try:
        runs.append(measure(title, specs[0], scratch))
    except UserError as error:
        if name == "ours":
            raise
        tried[title] = failed_attempt(error)
        specs.pop(0)
        runs.clear()
    else:
        print(f"round {len(runs)}: {title}: {runs[-1].seconds:.2f} s", flush=True)


def describe_machine(run: Measurement, load_before: float, peak: float, args: Args) -> dict[str, Any]:
    """Hardware and libraries."""
    machine = {
        "device": run.device,
        "cores": os.cpu_count(),
        "threads": run.threads,
        "load before": round(load_before, 2),
        "GFLOP/s of a matmul": round(peak / 1e9, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    if args.against == "trl":
        machine["trl"] = version("trl")
    return machine


def describe_settings(args: Args) -> dict[str, Any]:
    """The arguments, without this machine's paths."""
    settings = dataclasses.asdict(args)
    del settings["output_dir"]
    if args.rows is not None:
        settings["rows"] = Path(args.rows).name
        settings["profile"] = None
    return settings


def summarise(
    runs: list[Measurement], ours: list[Measurement], batch_size: int, lengths: Tensor, work: float
) -> dict[str, Any]:
    """The medians of one contender's rounds, and its ratios to ours of the same round.

    lengths: (n, 1 + C); work: seconds that the necessary FLOPs of the steps after the first take at the peak rate.
    """
    later_steps = len(runs[0].updates) - 1
    later_seconds = statistics.median(run.updates[-1] - run.updates[0] for run in runs)
    return {
        "seconds_per_row": statistics.median(run.seconds for run in runs) / len(lengths),
        "first_update": statistics.median(run.updates[0] for run in runs),
        "step": later_seconds / later_steps,
        "rows_per_second": (len(lengths) - batch_size) / later_seconds,
        "tokens_per_second": int(lengths[batch_size:].sum()) / later_seconds,
        "memory": statistics.median(run.memory for run in runs) / 1e6,
        "libraries": statistics.median(run.libraries for run in runs) / 1e6,
        "mfu": work / later_seconds,
        "seconds_ratio": ratios([run.seconds for run in runs], [run.seconds for run in ours]),
        "memory_ratio": ratios([run.memory for run in runs], [run.memory for run in ours]),
    }


def ratios(values: list, ours: list) -> dict[str, float]:
    """The ratios of each round, summed up."""
    quotients = [value / our_value for value, our_value in zip(values, ours, strict=True)]
    return {"median": statistics.median(quotients), "least": min(quotients), "most": max(quotients)}


# ---------------------------------------------------------------- output


def markdown(name: str, results: dict) -> str:
    """The machine, the settings, a table with one line per contender, and what was tried."""
    paragraphs = [f"# {name}"]
    for part in ("machine", "rows", "settings"):
        shown = [f"{key} {value}" for key, value in results[part].items() if value is not None]
        paragraphs.append(f"{part.capitalize()}: {', '.join(shown)}.")
    paragraphs.append(contender_table(results["contenders"]))
    if results["tried"]:
        attempts = [attempt_text(contender, attempt) for contender, attempt in results["tried"].items()]
        paragraphs.append(f"Two steps of each: {'; '.join(attempts)}.")
    return "\n\n".join(paragraphs)


def contender_table(contenders: dict[str, dict]) -> str:
    """One line per contender."""
    lines = []
    for name, numbers in contenders.items():
        cells = [name]
        for key, form in COLUMNS.values():
            cells.append(f"{numbers[key]:{form}}")
        for ratio in (numbers["seconds_ratio"], numbers["memory_ratio"]):
            cells.append(f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['most']:.2f}]")
        lines.append(cells)
    return markdown_table(["contender", *COLUMNS, "time ÷ ours", "memory ÷ ours"], lines)


def attempt_text(name: str, attempt: dict) -> str:
    """Seconds and memory of two steps, or that they failed, or how they disagree with ours."""
    if "failed" in attempt:
        return f"{name} failed"
    text = f"{name} {attempt['seconds']:.2f} s, {attempt['memory'] / 1e6:.0f} MB"
    if "disagreement" in attempt:
        text += f" (not as ours: {attempt['disagreement']})"
    return text


def results_name(args: Args) -> str:
    """The name of the results files, without their endings."""
    name = args.algorithm
    if args.num_completions > 2:
        name += f"-{args.num_completions}"
    rows: str = args.profile
    if args.rows is not None:
        rows, _, _ = Path(args.rows).name.partition(".")
    name += f"-{rows}-{args.shape}"
    if args.against is not None:
        name += f"-{args.against}"
    return name


def main(args: Args) -> None:
    """Measure, write the results, print the table."""
    require_measurable(args)
    with tempfile.TemporaryDirectory() as scratch:
        results = run_all(args, Path(scratch))

    name = results_name(args)
    table = markdown(name, results)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(args.output_dir / f"{name}.json", json.dumps(results, indent=1) + "\n")
    write_text(args.output_dir / f"{name}.md", table + "\n")
    print(table)


if __name__ == "__main__":
    checked_command(main, Args)
