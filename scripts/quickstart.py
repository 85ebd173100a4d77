"""SFT, then DPO, from nothing to a report, on the embedded world: a few minutes on two cores, no download.

A small model learns from imperfect demonstrations, samples two completions per prompt, an oracle prefers one of them,
DPO trains on these pairs, and both policies are compared on held-out prompts. Each stage is a command of its own,
shown as it starts, that also works by hand.

    python scripts/quickstart.py
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import evaluate
import tyro

from shared import UserError

ROOT = Path(__file__).resolve().parent.parent
RECORD = "quickstart.json"  # the commands that were run; it also marks the directory as this program's own
RESULTS = ("world", "sft", "dpo", "samples.jsonl", "pairs.jsonl", "held_out_samples.jsonl", "held_out_pairs.jsonl")
RESULTS += ("results.json", "report.html", RECORD)


@dataclass(kw_only=True)
class Args:
    """SFT, then DPO, from nothing to a report, on the embedded world."""

    output_dir: Path = ROOT / "runs" / "quickstart"
    """where everything is written; the results of an earlier quickstart there are removed"""
    seed: int = 0
    """of the world, the order of the rows, and the draws"""


def stages(out: str, seed: int) -> list[str]:
    """The command lines, in order, as they can be typed in the repository root."""
    draw = f"scripts/sample.py --model {out}/sft --num-completions 2 --max-new-tokens 40 --seed {seed}"
    train = f"--batch-size 64 --save-every 0 --seed {seed}"
    return [
        f"scripts/notices.py world --output-dir {out}/world --sft-rows 22400 --prompt-rows 3072 --seed {seed}",
        f"algos/sft.py --model {out}/world/base --train-data {out}/world/sft.jsonl "
        f"--eval-data {out}/world/held_out.jsonl --output-dir {out}/sft "
        f"--max-steps 350 --learning-rate 2e-3 --warmup-steps 50 --log-every 10 --eval-every 100 {train}",
        f"{draw} --rows {out}/world/prompts.jsonl --output {out}/samples.jsonl",
        f"scripts/notices.py prefer --rows {out}/samples.jsonl --output {out}/pairs.jsonl --seed {seed}",
        f"{draw} --max-rows 128 --rows {out}/world/held_out.jsonl --output {out}/held_out_samples.jsonl",
        f"scripts/notices.py prefer --rows {out}/held_out_samples.jsonl --output {out}/held_out_pairs.jsonl "
        f"--seed {seed}",
        f"algos/dpo.py --model {out}/sft --train-data {out}/pairs.jsonl --eval-data {out}/held_out_pairs.jsonl "
        f"--output-dir {out}/dpo --beta 0.3 --max-steps 48 --learning-rate 1e-4 --log-every 4 --eval-every 12 {train}",
        f"scripts/evaluate.py --policies sft={out}/sft dpo={out}/dpo --rows {out}/world/held_out.jsonl "
        f"--output {out}/results.json --max-new-tokens 40 --seed {seed}",
    ]


def run(command: str) -> dict:
    """Run one command line with this Python in the repository root; what it prints is shown.

    → the command and its seconds. Where it fails, the program ends with its exit code.
    """
    print(f"\n$ python {command}", flush=True)
    started = time.perf_counter()
    # threads that wait by spinning make a step ten times slower as soon as anything else needs a core: spin briefly
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}
    code = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, env=environment).returncode
    if code:
        print(f"{Path(sys.argv[0]).name}: stopped, exit code {code} from: python {command}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    return {"command": f"python {command}", "seconds": time.perf_counter() - started}


def start_over(out: Path) -> None:
    """Remove what an earlier quickstart left in `out`, and nothing else.

    Raises UserError where a file of the same name is there that is no quickstart's.
    """
    found = [out / name for name in RESULTS if (out / name).exists()]
    if found and not (out / RECORD).exists():
        raise UserError(f"--output-dir {out}: {found[0].name} is there, but not from a quickstart; give another one")
    for path in found:
        print(f"removing {path}")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    record(out, [], 0.0)


def record(out: Path, commands: list[dict], seconds: float) -> None:
    """Write the commands that have been run, each with its seconds, and the seconds in all."""
    temporary = out / f"{RECORD}.tmp"
    temporary.write_text(json.dumps({"commands": commands, "seconds": seconds}, indent=1), encoding="utf-8")
    os.replace(temporary, out / RECORD)


def main(args: Args) -> None:
    """All stages, then the report, the table and the time."""
    started, out, commands = time.perf_counter(), args.output_dir.resolve(), []
    try:
        start_over(out)
    except (UserError, OSError) as error:
        print(f"quickstart.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    shown = shlex.quote(str(out.relative_to(ROOT) if out.is_relative_to(ROOT) else out))
    for command in stages(shown, args.seed):
        commands.append(run(command))
        record(out, commands, time.perf_counter() - started)
    run(f"scripts/report.py --run-dir {shown}")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    print(f"\n{evaluate.table(results)}")
    print(f"\n{time.perf_counter() - started:.0f} s in all; report: {out / 'report.html'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("quickstart.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
