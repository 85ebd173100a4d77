"""What a small tuned proxy does to a larger policy: reward and length against the strength of steering.

    π(a|s) ∝ π_model(a|s) (π_proxy(a|s) / π_proxy-reference(a|s))^β           Eq 14 of From r to Q*, arXiv 2404.12358

For every β of `--betas`, and for the proxy by itself, completions of held-out prompts are sampled. Rewards, and the
95% intervals of the means over prompts, are those of scripts/evaluate.py. Writes OUTPUT, and a plot beside it.

    python scripts/proxy.py --model runs/large --proxy runs/dpo --proxy-reference runs/sft \\
        --rows runs/world/held_out.jsonl --output runs/proxy.json --max-new-tokens 40
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from scripts.lab.commands import checked_command
from scripts.lab.plots import GREY, canvas, label_axes, require_matplotlib
from scripts.lab.policies import (
    check_rewards,
    collect_samples,
    encode_prompts,
    evaluation_settings,
    lengths_of,
    rewards_of_samples,
)
from scripts.lab.row_files import first_examples
from scripts.lab.sampling import Sampling, Steering, load_proxies, load_sampler, prompt_room, sample_completions
from scripts.lab.statistics import interval_text, mean_and_interval
from scripts.lab.tables import markdown_table
from shared import UserError
from shared.command import Above
from shared.files import replacing, write_json

PROXY_ALONE = "proxy by itself"


@dataclass(kw_only=True)
class Args(Sampling):
    """Reward of a steered policy against the strength of steering."""

    model: str
    """directory or hub id of the policy that is steered"""
    proxy: str
    """directory or hub id of a tuned model"""
    proxy_reference: str
    """directory or hub id of the model that the proxy was tuned from"""
    betas: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """exponents β; 0 is the policy itself"""
    rows: str
    """file, directory or hub id (`path:split`) of rows of any form with a prompt"""
    output: Path
    """json file to write; the plot has the same name with .png"""
    reward: str = "notices"
    """where rewards come from: `notices`, the oracle of the notices, or the directory of a reward model"""
    num_prompts: Annotated[int, Above(0)] = 256
    """number of prompts, from the start of the file"""
    num_samples: Annotated[int, Above(0)] = 2
    """completions per prompt and β"""


def sweep(args: Args) -> dict:
    """Reward and length at every β and, last, of the proxy by itself; returns the contents of the results file."""
    examples = first_examples(args.rows, args.num_prompts)
    check_rewards(args.reward, examples)

    model, tokenizer, eos_ids = load_sampler(args.model, args.dtype)
    proxies, proxy_eos_ids = load_proxies(args.proxy, args.proxy_reference, args.dtype, tokenizer)
    eos_ids = sorted({*eos_ids, *proxy_eos_ids})
    room = min(prompt_room(network, args.max_new_tokens) for network in (model, *proxies))
    prompt_ids = encode_prompts(args.rows, examples, tokenizer, room)

    policies: list[tuple[str, Any, Callable | None]] = []
    for beta in args.betas:
        policies.append((f"β = {beta:g}", model, partial(Steering, proxies, beta)))
    policies.append((PROXY_ALONE, proxies[0], None))

    measured = []
    for name, policy, steer in policies:
        completions = sample_completions(
            policy, eos_ids, prompt_ids, args.num_samples, args, progress=name, steer=steer
        )
        samples = collect_samples(prompt_ids, completions, tokenizer, eos_ids)
        rewards = rewards_of_samples(args.reward, examples, samples)
        reward = mean_and_interval(rewards.mean(1), args.seed)
        length = mean_and_interval(lengths_of(samples).mean(1), args.seed)
        measured.append({"policy": name, "reward": reward, "length": length})

    settings = evaluation_settings(args, args.proxy_reference, len(examples))
    return {"settings": settings, "policies": measured}


def plot_rewards(betas: tuple[float, ...], policies: list[dict], path: Path) -> None:
    """Plot the reward against β with its intervals, and the proxy's reward as a line.

    policies: the steered ones in the order of `betas`, then the proxy by itself.
    """
    *steered, proxy = [policy["reward"] for policy in policies]
    means = [reward["mean"] for reward in steered]
    below = []
    above = []
    for reward in steered:
        low, high = reward["interval"]
        below.append(abs(low - reward["mean"]))
        above.append(abs(high - reward["mean"]))

    figure, panels = canvas([["reward"]], (4.6, 3))
    axes = panels["reward"]
    axes.errorbar(betas, means, [below, above], fmt="o-", capsize=3, label="steered policy")
    axes.axhline(proxy["mean"], color=GREY, linestyle="--", label=PROXY_ALONE)
    label_axes(axes, "", "β, exponent of Eq 14", "reward")
    figure.savefig(path, format="png", dpi=150)


def table(policies: list[dict]) -> str:
    """Reward and length of each policy."""
    rows = []
    for policy in policies:
        reward = interval_text(policy["reward"], ".2f")
        length = interval_text(policy["length"], ".1f")
        rows.append([policy["policy"], reward, length])
    return markdown_table(["policy", "reward", "length (tokens)"], rows)


def main(args: Args) -> None:
    """Sample and score at every β, write the results and the plot, print the table."""
    for beta in args.betas:
        if not math.isfinite(beta) or beta < 0:
            betas = " ".join(map(str, args.betas))
            raise UserError(f"--betas {betas}: must be finite numbers of at least 0")
    require_matplotlib()

    results = sweep(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output.with_suffix(".png")) as path:
        plot_rewards(args.betas, results["policies"], path)
    write_json(args.output, results)
    print(table(results["policies"]))


if __name__ == "__main__":
    checked_command(main, Args)
