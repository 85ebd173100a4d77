"""Compare policies on held-out prompts: reward, KL to a reference, length and win rate, with 95% intervals.

For every policy K completions y of each prompt x are sampled. Rewards are those of the notices' oracle, or of a reward
model in a directory (`--reward runs/rm`), less its mean over its own training completions. Over all samples, with
π_ref the reference:

    KL        mean of log π(y|x) - log π_ref(y|x), in nats, of the sampled token ids, the EOS included if it was sampled
    length    mean number of tokens, the EOS included
    win rate  P(reward > the baseline's reward on the same prompt), over all pairs of samples; a tie counts half

The KL is an unbiased estimate if sampling is from the policy itself, which is the default. With another temperature,
top-k or top-p it is the mean log-ratio of what was sampled. The intervals are bootstrap percentiles. Prompts are
resampled, not completions, because completions of one prompt are not independent.

    python scripts/evaluate.py --policies sft=runs/sft dpo=runs/dpo --rows runs/world/held_out.jsonl \\
        --output runs/results.json --max-new-tokens 48
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from scripts.lab.commands import checked_command
from scripts.lab.policies import (
    check_rewards,
    check_tokenizers,
    comparison_table,
    evaluation_settings,
    log_ratios,
    named_policies,
    plain_prompt,
    rewards_of_samples,
    sample_policy,
    summarise,
)
from scripts.lab.row_files import first_examples
from scripts.lab.sampling import Sampling
from shared.command import Above
from shared.files import write_text

NUM_SHOWN_PROMPTS = 6  # their completions are kept as text


@dataclass(kw_only=True)
class Args(Sampling):
    """Compare policies on held-out prompts."""

    policies: tuple[str, ...]
    """NAME=DIR of each policy; the first is the baseline of the win rates"""
    rows: Path
    """file, directory or hub id (`path:split`) of rows of any form with a prompt"""
    output: Path
    """json file to write"""
    reference: str | None = None
    """directory or hub id of the policy that the KL is measured to; default: the first policy"""
    reward: str = "notices"
    """where rewards come from: `notices`, the oracle of the notices, or the directory of a reward model"""
    num_prompts: Annotated[int, Above(0)] = 512
    """number of prompts, from the start of the file"""
    num_samples: Annotated[int, Above(0)] = 4
    """completions per prompt and policy"""


def evaluate(args: Args) -> dict:
    """Sample, score and compare; returns the contents of the results file."""
    directories = named_policies(args.policies)
    examples = first_examples(str(args.rows), args.num_prompts)
    check_rewards(args.reward, examples)

    paths = list(directories.values())
    reference = args.reference or paths[0]
    check_tokenizers(paths, reference)

    encoded_prompts = []
    samples = []
    for path in paths:
        encoded, policy_samples = sample_policy(path, examples, args, args.num_samples)
        encoded_prompts.append(encoded)
        samples.append(policy_samples)

    ratios = log_ratios(paths, reference, encoded_prompts, samples)
    rewards = [rewards_of_samples(args.reward, examples, policy_samples) for policy_samples in samples]

    policies = {}
    for i, (name, path) in enumerate(directories.items()):
        numbers = summarise(rewards[i], rewards[0], ratios[i], samples[i], args.seed)
        shown = samples[i].texts[:NUM_SHOWN_PROMPTS]
        policies[name] = {"path": path, **numbers, "completions": shown}

    return {
        "settings": evaluation_settings(args, reference, len(examples)),
        "prompts": [plain_prompt(example.prompt) for example in examples[:NUM_SHOWN_PROMPTS]],
        "policies": policies,
    }


def main(args: Args) -> None:
    """Evaluate, write the results, print the table."""
    results = evaluate(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(results, indent=1))
    print(comparison_table(results["policies"]))


if __name__ == "__main__":
    checked_command(main, Args)
