"""Compare policies on held-out prompts: reward, KL to a reference, length and win rate, with 95% intervals.

For every policy K completions y of each prompt x are sampled. Rewards are those of the notices' oracle, or of a reward
model in a directory (`--reward runs/rm`), less its mean over its own training completions. Over all samples, with
π_ref the reference:

    KL        mean of log π(y|x) - log π_ref(y|x), in nats, of the sampled token ids, the EOS included where it came
    length    mean number of tokens, the EOS included
    win rate  P(reward > the baseline's reward on the same prompt), over all pairs of samples, a tie counts half

The KL is an unbiased estimate where sampling is from the policy itself, as by default; with another temperature,
top-k or top-p it is the mean log-ratio of what was sampled. The intervals are bootstrap percentiles; prompts are
resampled, not completions, because completions of one prompt are not independent.

    python scripts/evaluate.py --policies sft=runs/sft dpo=runs/dpo --rows runs/world/held_out.jsonl \\
        --output runs/results.json --max-new-tokens 48
"""

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import notices
import sample
import score as scoring
import streaming
import torch
from torch import Tensor

from shared import UserError
from shared.model import load_policy, load_tokenizer
from shared.rows import Example, Text
from shared.run import command, plain_length

RESAMPLES = 2_000
SHOWN_PROMPTS = 6  # whose completions are kept as text
MICRO_BATCH_TOKENS = 8_192


@dataclass(kw_only=True)
class Args(sample.Sampling):
    """Compare policies on held-out prompts."""

    policies: tuple[str, ...]
    """NAME=DIR of each policy, the first is the baseline of the win rates"""
    rows: Path
    """file, directory or hub id (`path:split`) of rows of any form with a prompt"""
    output: Path
    """json file to write"""
    reference: str | None = None
    """directory or hub id of the policy that the KL is measured to; default: the first policy"""
    reward: str = "notices"
    """where rewards come from: `notices`, the oracle of the embedded world, or the directory of a reward model"""
    num_prompts: int = 512
    """prompts, the first of the file"""
    num_samples: int = 4
    """completions per prompt and policy"""


@dataclass
class Samples:
    """What one policy wrote: n prompts with K completions each."""

    ids: list[list[list[int]]]  # n prompts, K completions, token ids, with the EOS where it was sampled
    texts: list[list[str]]
    finished: list[list[bool]]  # whether there is an EOS


def score(reward: str, prompts: list[Text], completions: list[str], finished: list[bool] | None = None) -> list[float]:
    """The reward of each completion, given its prompt. Raises UserError where a prompt has none."""
    if reward != "notices":
        return model_score(reward, prompts, completions, finished or [True] * len(completions))
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"--reward {reward}: a prompt is not a string")
    try:
        return [notices.oracle(*pair) for pair in zip(prompts, completions, strict=True)]
    except ValueError as error:
        raise UserError(f"--reward {reward}: {error}") from None


def model_score(path: str, prompts: list[Text], completions: list[str], finished: list[bool]) -> list[float]:
    """r(x, y) of the reward model in `path`, its mean over its own training completions subtracted."""
    with streaming.alone("float32") as place:
        models = scoring.load([path], place)
        chat = [isinstance(prompt, list) for prompt in prompts]
        completions = [
            [{"role": "assistant", "content": y}] if c else y for y, c in zip(completions, chat, strict=True)
        ]
        examples = make_examples(prompts, [[y] for y in completions], [[end] for end in finished])
        rows = encode(path, examples, models.tokenizer, models.room, completions=True)
        return [value[0][0] for value in models.rewards(rows, MICRO_BATCH_TOKENS, normalise=True)]


def make_examples(prompts: list[Text], completions: list[list], finished: list[list[bool]]) -> list[tuple]:
    """Examples with rows of their own, as `streaming.encode` takes them."""
    triples = enumerate(zip(prompts, completions, finished, strict=True), 1)
    return [(Example("", i, x, ys, ended=ends), {}) for i, (x, ys, ends) in triples]


def encode(path: str, examples: list[tuple], tokenizer, room: int, completions: bool) -> list[streaming.Row]:
    """The token ids of examples, all of which must be usable: the policies are compared on the same prompts."""
    dropped: Counter = Counter()
    rows = list(streaming.encode(examples, tokenizer, dropped, room, completions))
    if dropped:
        raise UserError(f"{path}: cannot use all prompts: {', '.join(f'{why} {n}' for why, n in dropped.items())}")
    return rows


# ---------------------------------------------------------------- samples and their log-probs


def draw(path: str, prompts: list[Text], args: Args) -> tuple[list[list[int]], Samples]:
    """The token ids of the prompts, and `args.num_samples` completions of each from the policy in `path`."""
    model, tokenizer, ends = sample.load(path, args.dtype)
    examples = make_examples(prompts, [[]] * len(prompts), [[]] * len(prompts))
    room = min(sample.room(model, args.max_new_tokens), plain_length(model.config) - args.max_new_tokens + 1)
    rows = encode(path, examples, tokenizer, room, completions=False)
    encoded = [row.prompt for row in rows]
    ids = list(sample.draw(model, ends, encoded, args.num_samples, args, progress=f"sample {path}"))
    texts = [[sample.decode(tokenizer, y) for y in row] for row in ids]
    return encoded, Samples(ids, texts, [[y[-1] in ends for y in row] for row in ids])


def log_ratios(
    paths: list[str], reference: str, prompts: list[list[list[int]]], samples: list[Samples]
) -> list[Tensor]:
    """log π(y|x) - log π_ref(y|x) (n, K) of each policy's own samples; exactly 0 for the reference itself."""
    example = Example("", 0, "", [])
    rows = [
        [streaming.Row(example, {}, *pair) for pair in zip(x, s.ids, strict=True)]
        for x, s in zip(prompts, samples, strict=True)
    ]
    sets = [streaming.make_groups(some) for some in rows]
    with streaming.alone("float32") as place:

        def logps(path: str, some: list) -> list[Tensor]:
            policy = load_policy(path, place)
            return [streaming.over_groups(policy, policy.logps, groups, MICRO_BATCH_TOKENS, place) for groups in some]

        own = [logps(path, [groups])[0] for path, groups in zip(paths, sets, strict=True)]
        return [a - b for a, b in zip(own, logps(reference, sets), strict=True)]


# ---------------------------------------------------------------- statistics


def win_rates(rewards: Tensor, baseline: Tensor) -> Tensor:
    """Of each prompt, the share of pairs of samples that win, ties counting half: (n, K), (n, K') → (n,)."""
    difference = rewards[:, :, None] - baseline[:, None, :]
    return ((difference.sign() + 1) / 2).mean((1, 2))


def bootstrap(values: Tensor, seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (n,), one per prompt, from 2,000 resamples of the prompts."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.double)
    low, high = values.double()[drawn].mean(1).quantile(quantiles).tolist()
    return low, high


def summarise(rewards: Tensor, baseline: Tensor, ratios: Tensor, samples: Samples, seed: int) -> dict:
    """The numbers of one policy: each measure's mean and its interval [low, high]."""
    lengths = torch.tensor([[len(y) for y in row] for row in samples.ids], dtype=torch.double)
    measures = {
        "reward": rewards.mean(1),
        "kl": ratios.mean(1),
        "length": lengths.mean(1),
        "win_rate": win_rates(rewards, baseline),
    }
    return {
        **{name: {"mean": float(v.mean()), "interval": bootstrap(v, seed)} for name, v in measures.items()},
        "finished": float(torch.tensor(samples.finished).double().mean()),
        "rewards": rewards.tolist(),
    }


# ---------------------------------------------------------------- command line


def table(results: dict) -> str:
    """Aligned columns: each measure's mean and its 95% interval."""
    columns = {"reward": ".2f", "kl": ".2f", "length": ".1f", "win_rate": ".3f"}
    lines = [["policy", "reward", "KL (nats)", "length (tokens)", "win rate"]]
    for name, policy in results["policies"].items():
        cells = [(policy[key], form) for key, form in columns.items()]
        lines.append([name, *(f"{c['mean']:{f}} [{c['interval'][0]:{f}}, {c['interval'][1]:{f}}]" for c, f in cells)])
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Cells in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def named_policies(policies: tuple[str, ...]) -> dict[str, str]:
    """NAME=DIR words as a dictionary. Raises UserError where one is not of that form or a name comes twice."""
    named = {}
    for word in policies:
        name, equals, path = word.partition("=")
        if not (name and equals and path) or name in named:
            raise UserError(f"--policies {word}: must be NAME=DIR, each name once")
        named[name] = path
    return named


def check_tokenizers(paths: list[str], reference: str) -> None:
    """Raises UserError where a policy's ids mean other tokens to the reference: the KL would be of another text."""
    vocabulary = load_tokenizer(reference)[0].get_vocab()
    for path in paths:
        if load_tokenizer(path)[0].get_vocab() != vocabulary:
            raise UserError(f"--policies {path}: has another tokenizer than the reference {reference}")


def evaluate(args: Args) -> dict:
    """Sample, score and compare; the contents of the results file."""
    policies = named_policies(args.policies)
    prompts = [example.prompt for example in streaming.first(str(args.rows), args.num_prompts)]
    # what has no reward should not cost minutes of sampling
    score(args.reward, *zip(*[(x, "") for x in prompts[: None if args.reward == "notices" else 1]], strict=True))
    paths, reference = list(policies.values()), args.reference or next(iter(policies.values()))
    check_tokenizers(paths, reference)
    encoded, samples = zip(*(draw(path, prompts, args) for path in paths), strict=True)
    ratios = log_ratios(paths, reference, list(encoded), list(samples))
    repeated = [prompt for prompt in prompts for _ in range(args.num_samples)]
    flat = [([t for row in d.texts for t in row], [f for row in d.finished for f in row]) for d in samples]
    rewards = [score(args.reward, repeated, texts, finished) for texts, finished in flat]
    rewards = [torch.tensor(r, dtype=torch.double).view(len(prompts), -1) for r in rewards]
    results = {"settings": settings(args, reference, len(prompts)), "prompts": prompts[:SHOWN_PROMPTS], "policies": {}}
    for name, path, r, ratio, drawn in zip(policies, paths, rewards, ratios, samples, strict=True):
        numbers = summarise(r, rewards[0], ratio, drawn, args.seed)
        results["policies"][name] = {"path": path, **numbers, "completions": drawn.texts[:SHOWN_PROMPTS]}
    return results


def settings(args: Args, reference: str, num_prompts: int) -> dict:
    """All arguments, as JSON can hold them, with the number of prompts that there were, and the versions."""
    import transformers

    plain = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(args).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        **plain,
        "reference": reference,
        "num_prompts": num_prompts,
        "resamples": RESAMPLES,
        "versions": versions,
    }


def main(args: Args) -> None:
    """Evaluate, write the results, print the table."""
    results = evaluate(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
    os.replace(temporary, args.output)
    print(table(results))


if __name__ == "__main__":
    command(main, Args)
