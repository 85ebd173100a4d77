"""Compare policies on held-out prompts: reward, KL to a reference, length and win rate, with 95% intervals.

For every policy K completions y of each prompt x are sampled. Rewards are those of the notices' oracle, or of a reward
model in a directory (`--reward runs/rm`), less its mean over its own training completions. Over all samples, with
π_ref the reference:

    KL             mean of log π(y|x) - log π_ref(y|x), in nats, of the sampled token ids, the EOS included if it was
                   sampled
    KL by steps    mean of Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)), exact at each step: the same expectation, which
                   usually varies less (footnote 3 of DPO, arXiv 2305.18290)
    length         mean number of tokens, the EOS included
    win rate       P(reward > the baseline's reward on the same prompt), over all pairs of samples; a tie counts half.
                   The baseline is the first policy, and with `--against-rows` also each row's chosen completion

`--temperatures 0 0.5 1` compares the policies at each of these, against the first policy at the same one. π is the
distribution that was sampled, softmax(z/T) at each step, while π_ref stays at temperature 1. At 0, a policy writes its
one greedy completion, and the KL is -log π_ref(y|x). There is no KL with top-k, top-p or a repetition penalty.

`--best-of 1 4 16` adds the best of N samples by the reward, or by another one (`--select-by runs/rm`), as the exact
mean over all subsets of N of the K samples. Its KL to the policy is at most log N - (N - 1) / N.

The results file holds the values of each sample too, in the order of the prompts. Policies of several files can be
compared prompt by prompt. With several temperatures, `by_temperature` takes the place of `policies`. The intervals are
bootstrap percentiles. Prompts are resampled, not completions, because completions of one prompt are not independent.

    python scripts/evaluate.py --policies sft=runs/sft dpo=runs/dpo --rows runs/world/held_out.jsonl \\
        --output runs/results.json --max-new-tokens 48
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import Tensor

from scripts.lab.commands import checked_command
from scripts.lab.divergence import Divergence
from scripts.lab.policies import (
    Opponents,
    Outcome,
    Samples,
    check_rewards,
    check_tokenizers,
    comparison_table,
    divergences,
    evaluation_settings,
    named_policies,
    open_sampler,
    plain_prompt,
    rewards_of_rows,
    rewards_of_sets,
    summarise,
    summarise_best_of,
)
from scripts.lab.row_files import first_examples
from scripts.lab.sampling import Sampling
from shared import UserError
from shared.command import Above
from shared.files import write_text
from shared.rows import Example

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
    against_rows: bool = False
    """win rates against each row's chosen completion too"""
    temperatures: tuple[float, ...] = ()
    """compare at each of these temperatures, 0 for greedy; default: at --temperature alone"""
    best_of: tuple[int, ...] = ()
    """each N of the best of N samples"""
    select_by: str | None = None
    """where the rewards that select the best of N come from, as for --reward; default: the same"""
    num_prompts: Annotated[int, Above(0)] = 512
    """number of prompts, from the start of the file"""
    num_samples: Annotated[int, Above(0)] = 4
    """completions per prompt and policy"""


# ---------------------------------------------------------------- what is compared


def check_combinations(args: Args) -> None:
    """Raises UserError for temperatures or sizes that mean nothing, and for flags that exclude each other."""
    shown = " ".join(f"{temperature:g}" for temperature in args.temperatures)
    if len(set(args.temperatures)) < len(args.temperatures):
        raise UserError(f"--temperatures {shown}: each must be given once")
    if not all(math.isfinite(temperature) and temperature >= 0 for temperature in args.temperatures):
        raise UserError(f"--temperatures {shown}: must be finite numbers of at least 0")
    if args.temperatures and args.temperature != 1:
        raise UserError("give either --temperature or --temperatures")

    if args.select_by is not None and not args.best_of:
        raise UserError("--select-by: selects the best of N; give each N with --best-of")
    for size in args.best_of:
        if size < 1 or size > args.num_samples:
            raise UserError(f"--best-of {size}: must be at least 1 and at most --num-samples {args.num_samples}")
    if args.best_of and 0 in args.temperatures:
        raise UserError("--best-of: at temperature 0 there is one completion, and no best of them")


def temperatures_of(args: Args) -> tuple[float, ...]:
    """All temperatures that are compared."""
    return args.temperatures or (args.temperature,)


def sample_at(path: str, examples: list[Example], args: Args) -> tuple[list[list[int]], list[Samples]]:
    """The prompts' token ids, and what the policy in `path` writes at each temperature."""
    sampler = open_sampler(path, examples, args)
    samples = []
    for temperature in temperatures_of(args):
        if temperature == 0:
            greedy = dataclasses.replace(args, temperature=1.0, top_k=1)
            samples.append(sampler.draw(greedy, 1))
        else:
            sampling = dataclasses.replace(args, temperature=temperature)
            samples.append(sampler.draw(sampling, args.num_samples))
    return sampler.prompts, samples


def has_kl(args: Args) -> bool:
    """Whether the distribution that is sampled is the policy's own, but for its temperature."""
    return args.top_k == 0 and args.top_p == 1 and args.repetition_penalty == 1


# ---------------------------------------------------------------- numbers


def evaluate(args: Args) -> dict:
    """Sample, score and compare; returns the contents of the results file."""
    directories = named_policies(args.policies)
    check_combinations(args)
    examples = first_examples(str(args.rows), args.num_prompts)
    check_rewards(args.reward, examples)
    if args.select_by is not None:
        check_rewards(args.select_by, examples)
    chosen = None
    if args.against_rows:
        chosen = rewards_of_rows(args.reward, examples)

    paths = list(directories.values())
    reference = args.reference or paths[0]
    check_tokenizers(paths, reference)
    outcomes = outcomes_of(paths, reference, examples, args)

    results = {
        "settings": evaluation_settings(args, reference, len(examples)),
        "prompts": [plain_prompt(example.prompt) for example in examples[:NUM_SHOWN_PROMPTS]],
    }
    if chosen is not None:
        results["row_rewards"] = chosen.squeeze(1).tolist()

    by_temperature = {}
    for i, temperature in enumerate(temperatures_of(args)):
        at_temperature = [policy_outcomes[i] for policy_outcomes in outcomes]
        by_temperature[f"{temperature:g}"] = numbers_of(directories, at_temperature, chosen, args)
    if args.temperatures:
        results["by_temperature"] = by_temperature
    else:
        (results["policies"],) = by_temperature.values()
    return results


def outcomes_of(paths: list[str], reference: str, examples: list[Example], args: Args) -> list[list[Outcome]]:
    """For each policy, what came of it at each temperature."""
    prompts = []
    samples = []
    for path in paths:
        policy_prompts, policy_samples = sample_at(path, examples, args)
        prompts.append(policy_prompts)
        samples.append(policy_samples)

    divergence_of: list[list[Divergence]] = []  # each policy's, at each temperature
    if has_kl(args):
        divergence_of = divergences(paths, reference, prompts, samples, temperatures_of(args))

    sets = [drawn for policy_samples in samples for drawn in policy_samples]
    rewards = rewards_of_sets(args.reward, examples, sets)
    selector_rewards: list[Tensor] = []
    if args.select_by is not None:
        selector_rewards = rewards_of_sets(args.select_by, examples, sets)

    num_temperatures = len(temperatures_of(args))
    outcomes = []
    for i, drawn in enumerate(sets):
        outcome = Outcome(drawn, rewards[i])
        policy, temperature = divmod(i, num_temperatures)
        if divergence_of:
            outcome.divergence = divergence_of[policy][temperature]
        if selector_rewards:
            outcome.selector_rewards = selector_rewards[i]
        outcomes.append(outcome)
    return [outcomes[start : start + num_temperatures] for start in range(0, len(sets), num_temperatures)]


def numbers_of(directories: dict[str, str], outcomes: list[Outcome], chosen: Tensor | None, args: Args) -> dict:
    """The numbers of each policy at one temperature."""
    opponents = Opponents(outcomes[0].rewards, chosen)
    policies = {}
    for (name, path), outcome in zip(directories.items(), outcomes, strict=True):
        numbers = summarise(outcome, opponents, args.seed)
        if args.best_of:
            numbers["best_of"] = summarise_best_of(outcome, opponents, args.best_of, args.seed)
        shown = outcome.samples.texts[:NUM_SHOWN_PROMPTS]
        policies[name] = {"path": path, **numbers, "completions": shown}
    return policies


# ---------------------------------------------------------------- tables


def tables(results: dict) -> str:
    """A line for each policy, at each temperature if there are several, and for the best of N."""
    policies = results.get("policies", {})
    for temperature, at_temperature in results.get("by_temperature", {}).items():
        for name, numbers in at_temperature.items():
            policies = {**policies, f"{name}, T = {temperature}": numbers}

    best = {}
    for name, numbers in policies.items():
        for size, best_numbers in numbers.get("best_of", {}).items():
            best[f"{name}, best of {size}"] = best_numbers
    text = comparison_table(policies)
    if best:
        text += f"\n\n{comparison_table(best)}"
    return text


def main(args: Args) -> None:
    """Evaluate, write the results, print the tables."""
    results = evaluate(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(results, indent=1))
    print(tables(results))


if __name__ == "__main__":
    checked_command(main, Args)
