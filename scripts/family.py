"""Every algorithm on the embedded world, from the same model and rows, in one table.

Reads what `scripts/quickstart.py` left in a directory: `sft/`, `pairs.jsonl`, `held_out_pairs.jsonl` and `world/`.
Trains a reward model and an ensemble of three on random halves of its pairs, adds scores and samples of the SFT model
to the rows, trains all algorithms on them, compares the policies on held-out prompts, and writes all of it into
`family/` there: `family.json` and `family.md` with the table, `results.json` of scripts/evaluate.py, every model.

A reward model needs many more pairs than a policy, which has learnt before to look a fact up in the post: to the
policies' pairs come 20,000 of made-up summaries with more or fewer wrong facts, whose preferences are drawn alike.

The best that any reward model can do on pairs that Bradley-Terry drew is stated beside its accuracy: the mean over
held-out pairs of max(σ(Δr), σ(-Δr)), Δr from the oracle.

    python scripts/family.py --run-dir runs/quickstart
"""

import json
import os
import random
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import evaluate
import notices
import quickstart
import torch

from shared import UserError
from shared.run import command

INPUTS = ("sft/config.json", "pairs.jsonl", "held_out_pairs.jsonl", "world/prompts.jsonl", "world/held_out.jsonl")
RECORD = "family.json"  # the commands that were run and the numbers; it also marks the directory as this program's own
MODELS = 3  # of the ensemble
MADE_UP = 20_000  # more pairs for the reward models
# policy → algorithm, rows, options. The oracle's rewards are in nats of preference, so that the optimum of DPO and of
# the distillation losses is π_ref exp(r/β); exo gets the same one with β_π β_r = β. IPO's gap is that of a reward gap
# of 1 (τ = β/2), and ε about the share of pairs that the noise turned around.
POLICIES = {
    "dpo": ("dpo", "pairs", "--beta 0.3"),
    "ipo": ("ipo", "pairs", "--tau 0.15"),
    "exo-pref": ("exo", "pairs", "--beta 0.3 --epsilon 0.2"),
    "exo-rw": ("exo", "four_scored", "--beta 0.3 --beta-r 1"),
    "typo": ("typo", "reference", "--lam 0.1"),
    "distill_dpo": ("distill_dpo", "scored", "--beta 0.3"),
    "pessimistic_dpo": ("pessimistic_dpo", "reference", "--beta 0.3 --gamma-start 1e-3 --gamma-end 1e-1"),
    "ensemble_dpo": ("ensemble_dpo", "ensemble", "--beta 0.3"),
}


@dataclass(kw_only=True)
class Args:
    """Every algorithm on the embedded world, in one table."""

    run_dir: Path = Path("runs/quickstart")
    """directory that `quickstart.py` has written"""
    steps: int = 60
    """optimizer steps of every policy, of 64 rows each; the reward model takes 5 times, those of the ensemble 3 times
    as many"""
    num_prompts: int = 256
    """held-out prompts, with 4 completions of every policy"""
    max_rows: int | None = None
    """take no more pairs and prompts, to try the program out"""
    seed: int = 0
    """of the halves, the order of the rows, the draws and the bootstrap"""


def train(algorithm: str, rows: str, steps: int, rate: float, seed: int, name: str, options: str) -> str:
    """The command line of one training, whose result is {out}/`name`."""
    fixed = f"--max-steps {steps} --learning-rate {rate} --warmup-steps {steps // 6} --save-every 0 --seed {seed}"
    return (
        f"algos/{algorithm}.py --model {{run}}/sft --train-data {{out}}/{rows}.jsonl --output-dir {{out}}/{name} "
        f"{fixed} {options}"
    )


def stages(args: Args) -> list[str]:
    """The command lines, in order, with {run} and {out} for the directories."""
    most = f" --max-rows {args.max_rows}" if args.max_rows else ""
    eval_data = "--eval-data {run}/held_out_pairs.jsonl"
    lines = [train("rm", "rm_pairs", 5 * args.steps, 2e-3, args.seed, "rm", eval_data)]
    lines += [
        train("rm", f"half_{i}", 3 * args.steps, 2e-3, args.seed + i, f"rm_{i}", eval_data) for i in range(MODELS)
    ]
    ensemble = " ".join(f"{{out}}/rm_{i}" for i in range(MODELS))
    draw = f"scripts/sample.py --model {{run}}/sft --max-new-tokens 40 --seed {args.seed}"
    four = f"--num-completions 4 --max-rows {args.max_rows or 2048}"
    lines += [
        "scripts/score.py --rows {run}/held_out_pairs.jsonl --output {out}/held_out.jsonl --reward-models {out}/rm "
        + ensemble,
        "scripts/score.py --rows {out}/pairs.jsonl --output {out}/scored.jsonl --reward-models {out}/rm",
        f"scripts/score.py --rows {{out}}/pairs.jsonl --output {{out}}/ensemble.jsonl --reward-models {ensemble}",
        f"{draw} --rows {{out}}/pairs.jsonl --output {{out}}/reference.jsonl --reference-samples 1{most}",
        f"{draw} --rows {{run}}/world/prompts.jsonl --output {{out}}/four.jsonl {four}",
        "scripts/score.py --rows {out}/four.jsonl --output {out}/four_scored.jsonl --reward-models {out}/rm",
    ]
    lines += [
        train(algorithm, rows, args.steps, 1e-4, args.seed, name, options)
        for name, (algorithm, rows, options) in POLICIES.items()
    ]
    named = " ".join(["sft={run}/sft", *(f"{name}={{out}}/{name}" for name in POLICIES)])
    return [
        *lines,
        f"scripts/evaluate.py --policies {named} --rows {{run}}/world/held_out.jsonl --output {{out}}/results.json "
        f"--max-new-tokens 40 --num-prompts {args.num_prompts} --seed {args.seed}",
    ]


def prepare(run: Path, out: Path, args: Args) -> None:
    """An empty directory with the pairs, more for the reward models, and random halves of those for the ensemble.

    Raises UserError where the quickstart's files are missing, or another program's are in the way.
    """
    for name in INPUTS:
        if not (run / name).exists():
            raise UserError(f"--run-dir {run}: {name} is missing; run scripts/quickstart.py first")
    if out.exists() and not (out / RECORD).exists():
        raise UserError(f"{out}: is there, but not from this program; move it away")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    record(out, {})
    lines = (run / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[: args.max_rows]
    rng = random.Random(f"family {args.seed}")  # other posts than those of `notices.py world`
    more = [json.dumps(row) + "\n" for row in made_up(min(MADE_UP, args.max_rows or sys.maxsize), rng)]
    files = {"pairs": lines, "rm_pairs": lines + more}
    files |= {f"half_{i}": rng.sample(lines + more, (len(lines) + len(more)) // 2) for i in range(MODELS)}
    for name, some in files.items():
        (out / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")


def made_up(n: int, rng: random.Random) -> Iterator[dict]:
    """Pairs of summaries of n new posts that differ in their facts, and which of them the oracle preferred."""
    for prompt, kind in islice(notices.unique_notices(rng), n):
        superfluous = rng.choices((0, 1, 2), (0.6, 0.25, 0.15))[0]
        completions = [notices.make_summary(prompt, kind, rng, rng.choice((0.0, 0.5)), superfluous) for _ in range(2)]
        if completions[0] != completions[1]:
            yield notices.prefer_row({"prompt": prompt, "completions": completions}, rng)


def record(out: Path, contents: dict) -> None:
    """Write what has been done, whole or not at all."""
    temporary = out / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(contents, indent=1), encoding="utf-8")
    os.replace(temporary, out / RECORD)


def reward_models(rows: list[dict], seed: int) -> dict:
    """Accuracy of each model on pairs with `scores` [2][1 + MODELS], and the most that their noise allows."""
    scores = torch.tensor([row["scores"] for row in rows], dtype=torch.double)  # (n, 2, 1 + MODELS)
    right = (scores[:, 0] > scores[:, 1]).double()
    oracle = [[notices.oracle(row["prompt"], row[name]) for name in ("chosen", "rejected")] for row in rows]
    gaps = torch.tensor(oracle, dtype=torch.double).diff(dim=1)[:, 0].abs()
    measures = {"rm": right[:, 0]} | {f"rm_{i}": right[:, 1 + i] for i in range(MODELS)} | {"ceiling": gaps.sigmoid()}
    return {name: {"mean": float(v.mean()), "interval": evaluate.bootstrap(v, seed)} for name, v in measures.items()}


def shown(number: dict, form: str) -> str:
    """A mean and its interval as text."""
    return f"{number['mean']:{form}} [{number['interval'][0]:{form}}, {number['interval'][1]:{form}}]"


def markdown(models: dict, policies: dict) -> str:
    """Both tables, 95% intervals in brackets."""
    columns = {"reward": ".2f", "kl": ".2f", "length": ".1f", "win_rate": ".3f"}
    lines = ["| policy | oracle reward | KL to SFT (nats) | length (tokens) | win rate against SFT |", "|---" * 5 + "|"]
    for name, policy in policies.items():
        lines.append(" | ".join([f"| {name}", *(shown(policy[key], form) for key, form in columns.items())]) + " |")
    lines += ["", "| reward model | accuracy on held-out pairs |", "|---|---|"]
    lines += [f"| {name} | {shown(number, '.3f')} |" for name, number in models.items()]
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    """All stages, then the tables."""
    started, run, commands = time.perf_counter(), args.run_dir.resolve(), []
    out = run / "family"
    prepare(run, out, args)
    inside = run.relative_to(quickstart.ROOT) if run.is_relative_to(quickstart.ROOT) else run
    words = {"run": shlex.quote(str(inside)), "out": shlex.quote(str(inside / "family"))}
    for line in stages(args):
        commands.append(quickstart.run(line.format(**words)))
        record(out, {"commands": commands})
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (out / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    models = reward_models(rows, args.seed)
    policies = {
        name: {key: policy[key] for key in ("reward", "kl", "length", "win_rate")}
        for name, policy in results["policies"].items()
    }
    seconds = time.perf_counter() - started
    record(out, {"commands": commands, "seconds": seconds, "reward_models": models, "policies": policies})
    (out / "family.md").write_text(markdown(models, policies), encoding="utf-8")
    print(f"\n{markdown(models, policies)}\n{seconds:.0f} s in all; the same in {out / 'family.md'}")


if __name__ == "__main__":
    command(main, Args)
