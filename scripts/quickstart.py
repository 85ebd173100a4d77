"""SFT, then DPO, from nothing to a report, on the notices: a few minutes on two cores, no download.

A small model learns from imperfect demonstrations, samples two completions per prompt, an oracle prefers one of them,
DPO trains on these pairs, and both policies are compared on held-out prompts. Each stage is a command of its own. It
is shown as it starts, and also works by hand.

    python scripts/quickstart.py
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from scripts.lab.commands import ROOT, checked_command
from scripts.lab.policies import comparison_table
from scripts.lab.stages import Stages, run_stage, shell_path
from shared import StorageError, UserError
from shared.command import AtLeast

RECORD = "quickstart.json"  # the commands that were run; it also marks the directory as this program's own
RESULTS = (
    "world",
    "sft",
    "dpo",
    "samples.jsonl",
    "pairs.jsonl",
    "held_out_samples.jsonl",
    "held_out_pairs.jsonl",
    "results.json",
    "report.html",
    RECORD,
)


@dataclass(kw_only=True)
class Args:
    """SFT, then DPO, from nothing to a report, on the notices."""

    output_dir: Path = ROOT / "runs" / "quickstart"
    """where everything is written; the results of an earlier quickstart there are removed"""
    seed: Annotated[int, AtLeast(0, at_most=2**32 - 1)] = 0
    """seed of the notices, the order of the rows, and the samples"""


def command_lines(out: str, seed: int) -> list[str]:
    """The stages in order, as they can be typed in the repository root. `out` is the output directory."""
    sampling = f"scripts/sample.py --model {out}/sft --num-completions 2 --max-new-tokens 40 --seed {seed}"
    training = f"--batch-size 64 --save-every 0 --seed {seed}"
    return [
        f"scripts/notices.py world --output-dir {out}/world --sft-rows 22400 --prompt-rows 3072 --seed {seed}",
        f"algos/sft.py --model {out}/world/base --train-data {out}/world/sft.jsonl "
        f"--eval-data {out}/world/held_out.jsonl --output-dir {out}/sft "
        f"--max-steps 350 --learning-rate 2e-3 --warmup-steps 50 --log-every 10 --eval-every 100 {training}",
        f"{sampling} --rows {out}/world/prompts.jsonl --output {out}/samples.jsonl",
        f"scripts/notices.py prefer --rows {out}/samples.jsonl --output {out}/pairs.jsonl --seed {seed}",
        f"{sampling} --max-rows 128 --rows {out}/world/held_out.jsonl --output {out}/held_out_samples.jsonl",
        f"scripts/notices.py prefer --rows {out}/held_out_samples.jsonl --output {out}/held_out_pairs.jsonl "
        f"--seed {seed}",
        f"algos/dpo.py --model {out}/sft --train-data {out}/pairs.jsonl --eval-data {out}/held_out_pairs.jsonl "
        f"--output-dir {out}/dpo --beta 0.3 --max-steps 48 --learning-rate 1e-4 --log-every 4 --eval-every 12 "
        f"{training}",
        f"scripts/evaluate.py --policies sft={out}/sft dpo={out}/dpo --rows {out}/world/held_out.jsonl "
        f"--output {out}/results.json --max-new-tokens 40 --seed {seed}",
    ]


def start_over(out: Path) -> None:
    """Remove what an earlier quickstart left in `out`, and nothing else.

    Raises UserError if a file there has the name of a result, but is not from a quickstart.
    """
    old_results = []
    for name in RESULTS:
        if (out / name).exists():
            old_results.append(out / name)
    if old_results and not (out / RECORD).exists():
        name = old_results[0].name
        raise UserError(f"--output-dir {out}: {name} is there, but not from a quickstart; give another one")

    for path in old_results:
        print(f"removing {path}")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    out.mkdir(parents=True, exist_ok=True)


def main(args: Args) -> None:
    """Run all stages, then write the report and print the table and the time."""
    started = time.perf_counter()
    out = args.output_dir.resolve()
    shown = shell_path(out)
    stages = Stages(out / RECORD, command_lines(shown, args.seed))
    try:
        start_over(out)
        stages.write_record()
    except (OSError, StorageError) as error:  # the directory was a bad choice
        raise UserError(str(error)) from None

    stages.run()
    run_stage(f"scripts/report.py --run-dir {shown}")

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    seconds = time.perf_counter() - started
    print(f"\n{comparison_table(results['policies'])}")
    print(f"\n{seconds:.0f} s in all; report: {out / 'report.html'}")


if __name__ == "__main__":
    checked_command(main, Args)
