"""What a small tuned proxy does to a larger policy: reward and length against the strength of steering.

    π(a|s) ∝ π_model(a|s) (π_proxy(a|s) / π_proxy-reference(a|s))^β           Eq 14 of From r to Q*, arXiv 2404.12358

For every β of `--betas`, and for the proxy by itself, completions of held-out prompts are sampled. Rewards, and the
95% intervals of the means over prompts, are those of scripts/evaluate.py. Writes OUTPUT, and a picture beside it.

    python scripts/proxy.py --model runs/large --proxy runs/dpo --proxy-reference runs/sft \\
        --rows runs/world/held_out.jsonl --output runs/proxy.json --max-new-tokens 40
"""

import json
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import evaluate
import family
import figures
import sample
import streaming
import torch

from shared import UserError
from shared.run import command


@dataclass(kw_only=True)
class Args(sample.Sampling):
    """Reward of a steered policy against the strength of steering."""

    model: str
    """directory or hub id of the policy that is steered"""
    proxy: str
    """directory or hub id of a tuned model"""
    proxy_reference: str
    """directory or hub id of what the proxy was tuned from"""
    betas: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """exponents β; 0 is the policy itself"""
    rows: str
    """file, directory or hub id (`path:split`) of rows of any form with a prompt"""
    output: Path
    """json file to write; the picture is the same with .png"""
    reward: str = "notices"
    """where rewards come from: `notices`, the oracle of the embedded world, or the directory of a reward model"""
    num_prompts: int = 256
    """prompts, the first of the file"""
    num_samples: int = 2
    """completions per prompt and β"""


def measure(model, steer, ends: list[int], prompts: list, encoded: list, tokenizer, args: Args, name: str) -> dict:
    """Reward and length of what is sampled: each one's mean and its interval [low, high]."""
    drawn = sample.draw(model, ends, encoded, args.num_samples, args, progress=name, steer=steer)
    ids = [y for row in drawn for y in row]
    texts, finished = [sample.decode(tokenizer, y) for y in ids], [y[-1] in ends for y in ids]
    rewards = evaluate.score(args.reward, [x for x in prompts for _ in range(args.num_samples)], texts, finished)
    values = torch.tensor([rewards, list(map(len, ids))], dtype=torch.double).view(2, len(prompts), -1).mean(2)
    numbers = [{"mean": float(v.mean()), "interval": evaluate.bootstrap(v, args.seed)} for v in values]
    return {"policy": name, "reward": numbers[0], "length": numbers[1]}


def sweep(args: Args) -> dict:
    """The measures at every β and, last, of the proxy by itself; the contents of the results file."""
    prompts = [example.prompt for example in streaming.first(args.rows, args.num_prompts)]
    evaluate.score(args.reward, prompts, [""] * len(prompts))  # what has no reward should not cost minutes of sampling
    model, tokenizer, ends = sample.load(args.model, args.dtype)
    pair, more = sample.load_pair(args.proxy, args.proxy_reference, args.dtype, tokenizer)
    ends, room = sorted({*ends, *more}), min(sample.room(m, args.max_new_tokens) for m in (model, *pair))
    examples = evaluate.make_examples(prompts, [[]] * len(prompts), [[]] * len(prompts))
    encoded = [row.prompt for row in evaluate.encode(args.rows, examples, tokenizer, room, completions=False)]
    policies = [(model, partial(sample.Steering, pair, beta), f"β = {beta:g}") for beta in args.betas]
    policies.append((pair[0], None, "proxy by itself"))
    found = [measure(model, steer, ends, prompts, encoded, tokenizer, args, name) for model, steer, name in policies]
    return {"settings": evaluate.settings(args, args.proxy_reference, len(prompts)), "policies": found}


def draw_picture(betas: tuple[float, ...], policies: list[dict], path: Path) -> None:
    """Reward against β with its intervals, and the proxy's as a line."""
    figure, panels = figures.canvas([["reward"]], (4.6, 3))
    axes = panels["reward"]
    *steered, proxy = [policy["reward"] for policy in policies]
    bars = [[abs(reward["interval"][end] - reward["mean"]) for reward in steered] for end in (0, 1)]
    axes.errorbar(betas, [reward["mean"] for reward in steered], bars, fmt="o-", capsize=3, label="steered policy")
    axes.axhline(proxy["mean"], color=figures.GREY, linestyle="--", label="proxy by itself")
    figures.label(axes, "", "β, exponent of Eq 14", "reward")
    figure.savefig(path, format="png", dpi=150)


def main(args: Args) -> None:
    """Sample and score at every β, write the results and the picture, print the table."""
    if not all(math.isfinite(beta) and beta >= 0 for beta in args.betas):
        raise UserError(f"--betas {' '.join(map(str, args.betas))}: must be finite numbers of at least 0")
    figures.check()
    results, files = sweep(args), (args.output.with_suffix(".png"), args.output)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = [path.with_name(f"{path.name}.tmp") for path in files]
    draw_picture(args.betas, results["policies"], temporary[0])
    temporary[1].write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    for path, final in zip(temporary, files, strict=True):
        os.replace(path, final)
    print("| policy | reward | length (tokens) |\n|---|---|---|")
    for row in results["policies"]:
        print(f"| {row['policy']} | {family.shown(row['reward'], '.2f')} | {family.shown(row['length'], '.1f')} |")


if __name__ == "__main__":
    command(main, Args)
