"""Every algorithm on the embedded world, from the same model and rows, in one table.

Makes the world, an SFT model, a reward model and an ensemble of three on random thirds of its rows, pairs of the SFT
model's own completions with their scores and with samples of it, trains all algorithms on them, and compares the
policies on held-out prompts. Each stage is a command of its own, shown as it starts, that also works by hand.
`family.md` and `family.json` hold the tables, `results.json` what scripts/evaluate.py writes. Interrupted, it goes on
behind the last stage that was finished, as long as the arguments are the same.

The reward models learn from rankings of eight made-up summaries, drawn from the oracle by Plackett-Luce: their task,
to look every fact up in the post, needs many more of them than a policy that can do it already. Each fact is wrong
independently of the others, so that none explains the preferences away from which another one is to be learned.

The best that any reward model can do on pairs that Bradley-Terry drew is stated beside its accuracy: the mean over
held-out pairs of max(σ(Δr), σ(-Δr)), Δr from the oracle.

    python scripts/family.py
"""

import json
import os
import random
import shlex
import shutil
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

RECORD = "family.json"  # the commands that were run and the numbers; it also marks the directory as this program's own
MODELS = 3  # of the ensemble
RANKED = 36_000  # rows of the reward model
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

    output_dir: Path = quickstart.ROOT / "runs" / "family"
    """where everything is written; what an earlier run with other arguments left there is removed"""
    steps: int = 60
    """optimizer steps of every policy, of 64 rows each; SFT takes 16 times as many, the reward model 36 times, those of
    the ensemble 12 times, of 16 rows each"""
    num_prompts: int = 256
    """held-out prompts, with 4 completions of every policy"""
    max_rows: int | None = None
    """take no more rows and prompts, to try the program out"""
    seed: int = 0
    """of the world, the thirds, the order of the rows, the draws and the bootstrap"""


def train(algorithm: str, model: str, rows: str, steps: int, rate: float, seed: int, name: str, options: str) -> str:
    """The command line of one training, whose result is {out}/`name`."""
    fixed = f"--max-steps {steps} --learning-rate {rate} --warmup-steps {steps // 12} --save-every 0 --seed {seed}"
    return (
        f"algos/{algorithm}.py --model {{out}}/{model} --train-data {{out}}/{rows}.jsonl --output-dir {{out}}/{name} "
        f"{fixed} {options}"
    )


def stages(args: Args) -> list[str]:
    """The command lines, in order, with {out} for the directory."""
    seed, most, four = args.seed, args.max_rows or 4096, min(args.max_rows or 2048, 2048)
    draw = f"scripts/sample.py --model {{out}}/sft --max-new-tokens 40 --seed {seed}"
    prefer = f"scripts/notices.py prefer --seed {seed}"
    small, rate = "--batch-size 16 --log-every 100 --eval-every 360 --eval-data {out}/held_out_pairs.jsonl", 5e-4
    ensemble = " ".join(f"{{out}}/rm_{i}" for i in range(MODELS))
    lines = [
        f"scripts/notices.py world --output-dir {{out}}/world --sft-rows {args.max_rows or 64_000} --seed {seed}",
        train("sft", "world/base", "world/sft", 16 * args.steps, 2e-3, seed, "sft", "--log-every 50"),
        f"{draw} --num-completions 2 --rows {{out}}/world/prompts.jsonl --max-rows {most} --output {{out}}/two.jsonl",
        f"{prefer} --rows {{out}}/two.jsonl --output {{out}}/pairs.jsonl",
        f"{draw} --num-completions 2 --rows {{out}}/world/held_out.jsonl --max-rows {most} "
        "--output {out}/held_out_two.jsonl",
        f"{prefer} --rows {{out}}/held_out_two.jsonl --output {{out}}/held_out_pairs.jsonl",
        train("rm", "sft", "ranked", 36 * args.steps, rate, seed, "rm", small),
        *(train("rm", "sft", f"third_{i}", 12 * args.steps, rate, seed + i, f"rm_{i}", small) for i in range(MODELS)),
        "scripts/score.py --rows {out}/held_out_pairs.jsonl --output {out}/held_out_scored.jsonl "
        f"--reward-models {{out}}/rm {ensemble}",
        "scripts/score.py --rows {out}/pairs.jsonl --output {out}/scored.jsonl --reward-models {out}/rm",
        f"scripts/score.py --rows {{out}}/pairs.jsonl --output {{out}}/ensemble.jsonl --reward-models {ensemble}",
        f"{draw} --reference-samples 1 --rows {{out}}/pairs.jsonl --output {{out}}/reference.jsonl",
        f"{draw} --num-completions 4 --rows {{out}}/world/prompts.jsonl --max-rows {four} --output {{out}}/four.jsonl",
        "scripts/score.py --rows {out}/four.jsonl --output {out}/four_scored.jsonl --reward-models {out}/rm",
    ]
    for name, (algorithm, rows, options) in POLICIES.items():
        lines.append(train(algorithm, "sft", rows, args.steps, 1e-4, seed, name, options))
    named = " ".join(f"{name}={{out}}/{name}" for name in ("sft", *POLICIES))
    return [
        *lines,
        f"scripts/evaluate.py --policies {named} --rows {{out}}/world/held_out.jsonl --output {{out}}/results.json "
        f"--max-new-tokens 40 --num-prompts {min(args.num_prompts, most)} --seed {seed}",
    ]


def prepare(out: Path, args: Args) -> None:
    """An empty directory with the rankings that the reward models learn from, and random thirds for the ensemble.

    Raises UserError where files that are not this program's are in the way.
    """
    if out.exists() and any(out.iterdir()) and not (out / RECORD).exists():
        raise UserError(f"--output-dir {out}: holds something that is not from this program; give another one")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    record(out, {})
    rng = random.Random(f"family {args.seed}")  # other posts than those of `notices.py world`
    lines = [json.dumps(row) + "\n" for row in ranked(min(RANKED, args.max_rows or RANKED), rng)]
    files = {"ranked": lines} | {f"third_{i}": rng.sample(lines, len(lines) // 3) for i in range(MODELS)}
    for name, some in files.items():
        (out / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")


def finished(out: Path, lines: list[str]) -> list[dict]:
    """What an interrupted run of the same command lines has recorded; of the stage behind it nothing is left."""
    path = out / RECORD
    commands = json.loads(path.read_text(encoding="utf-8")).get("commands", []) if path.exists() else []
    if [f"python {line}" for line in lines[: len(commands)]] != [command["command"] for command in commands]:
        return []
    words = shlex.split(lines[len(commands)]) if 0 < len(commands) < len(lines) else []
    if "--output-dir" in words:
        shutil.rmtree(quickstart.ROOT / words[words.index("--output-dir") + 1], ignore_errors=True)
    return commands


def ranked(n: int, rng: random.Random) -> Iterator[dict]:
    """n posts with eight different summaries each, in an order that the oracle's preferences draw."""
    for prompt, kind in islice(notices.unique_notices(rng), n):
        summaries: dict[str, None] = {}
        while len(summaries) < 8:
            superfluous = rng.choices((0, 1, 2), (0.6, 0.25, 0.15))[0]
            summaries[notices.make_summary(prompt, kind, rng, 0.4, superfluous)] = None
        yield notices.prefer_row({"prompt": prompt, "completions": list(summaries)}, rng)


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
    out = args.output_dir.resolve()
    shown_out = shlex.quote(str(out.relative_to(quickstart.ROOT) if out.is_relative_to(quickstart.ROOT) else out))
    lines = [line.format(out=shown_out) for line in stages(args)]
    commands = finished(out, lines)
    if not commands:
        prepare(out, args)
    for line in lines[len(commands) :]:
        commands.append(quickstart.run(line))
        record(out, {"commands": commands})
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (out / "held_out_scored.jsonl").read_text(encoding="utf-8").splitlines()]
    models = reward_models(rows, args.seed)
    policies = {
        name: {key: policy[key] for key in ("reward", "kl", "length", "win_rate")}
        for name, policy in results["policies"].items()
    }
    seconds = sum(command["seconds"] for command in commands)
    record(out, {"commands": commands, "seconds": seconds, "reward_models": models, "policies": policies})
    (out / "family.md").write_text(markdown(models, policies), encoding="utf-8")
    print(f"\n{markdown(models, policies)}\n{seconds:.0f} s in all; the same in {out / 'family.md'}")


if __name__ == "__main__":
    command(main, Args)
