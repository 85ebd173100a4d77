"""Compare policies on held-out prompts: reward, KL to a reference, length and win rate, with 95% intervals.

For every policy K completions y of each prompt x are sampled. Over all of them, with π_ref the reference:

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
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import notices
import sample
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from shared import UserError

RESAMPLES = 2_000
SHOWN_PROMPTS = 6  # whose completions are kept as text
MICRO_BATCH_TOKENS = 8_192


@dataclass(kw_only=True)
class Args:
    """Compare policies on held-out prompts."""

    policies: tuple[str, ...]
    """NAME=DIR of each policy, the first is the baseline of the win rates"""
    rows: Path
    """jsonl file of rows with a `prompt`"""
    output: Path
    """json file to write"""
    reference: str | None = None
    """directory or hub id of the policy that the KL is measured to; default: the first policy"""
    reward: Literal["notices"] = "notices"
    """where rewards come from: the oracle of the embedded world"""
    num_prompts: int = 512
    """prompts, the first of the file"""
    num_samples: int = 4
    """completions per prompt and policy"""
    temperature: float = 1.0
    """divides the logits"""
    top_k: int = 0
    """sample among the k likeliest tokens only; 0 for all, 1 is greedy"""
    top_p: float = 1.0
    """sample among the likeliest tokens that hold this probability together; 1 for all"""
    max_new_tokens: int = 256
    """tokens of a completion, EOS included"""
    batch_size: int = 128
    """sequences that are generated together"""
    seed: int = 0
    """of the draws and of the bootstrap"""


@dataclass
class Samples:
    """What one policy wrote: n prompts with K completions each."""

    ids: list[list[list[int]]]  # n prompts, K completions, token ids, with the EOS where it was sampled
    texts: list[list[str]]
    finished: list[list[bool]]  # whether there is an EOS


def score(reward: str, prompts: list[str], completions: list[str]) -> list[float]:
    """The reward of each completion, given its prompt. Raises UserError where a prompt has none."""
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"--reward {reward}: a prompt is not a string")
    try:
        return [notices.oracle(*pair) for pair in zip(prompts, completions, strict=True)]
    except ValueError as error:
        raise UserError(f"--reward {reward}: {error}") from None


# ---------------------------------------------------------------- samples and their log-probs


def draw(path: str, prompts: list[str], args: Args) -> tuple[list[list[int]], Samples]:
    """The token ids of the prompts, and `args.num_samples` completions of each from the policy in `path`."""
    from transformers import GenerationConfig

    model, tokenizer = sample.load_policy(path, "float32")
    encoded = [sample.encode_prompt(tokenizer, prompt) for prompt in prompts]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    sample.check_lengths(args.rows, encoded, args.max_new_tokens, positions)
    ends = sample.end_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=True,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    torch.manual_seed(args.seed)
    repeated = [ids for ids in encoded for _ in range(args.num_samples)]
    order = sorted(range(len(repeated)), key=lambda i: len(repeated[i]))  # little padding
    drawn: list[list[int]] = [[]] * len(repeated)
    for start in tqdm(range(0, len(order), args.batch_size), f"sample {path}", unit="batch"):
        batch = order[start : start + args.batch_size]
        for i, ids in zip(batch, sample.generate(model, [repeated[i] for i in batch], config), strict=True):
            drawn[i] = ids
    ids = [drawn[i : i + args.num_samples] for i in range(0, len(drawn), args.num_samples)]
    texts = [[sample.decode(tokenizer, y) for y in row] for row in ids]
    return encoded, Samples(ids, texts, [[y[-1] in ends for y in row] for row in ids])


def make_groups(prompts: list[list[int]], completions: list[list[list[int]]]):
    """`shared.data.Groups` of the sampled ids themselves: text tokenised again could be other tokens."""
    from shared.data import Groups

    pieces = [[prompt, *row] for prompt, row in zip(prompts, completions, strict=True)]
    lengths = torch.tensor([[len(piece) for piece in row] for row in pieces])  # (n, 1 + K)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.flatten().cumsum(0)])
    offsets = torch.cat([starts[:-1].view_as(lengths), starts[lengths.shape[1] :: lengths.shape[1], None]], 1)
    tokens = torch.tensor([token for row in pieces for piece in row for token in piece], dtype=torch.int32)
    return Groups(tokens, offsets, torch.arange(1, len(pieces) + 1), {})


def logps(path: str, sets: list, place) -> list[Tensor]:
    """log π(y|x) (n, K) of each set of groups under the policy in `path`."""
    from shared.data import Batches
    from shared.distributed import inference
    from shared.model import load_policy

    policy, results = load_policy(path, place), []
    with inference(policy):
        for groups in sets:
            batches = Batches(groups, 256, MICRO_BATCH_TOKENS, None, place)
            values = torch.zeros(len(groups), groups.completions, device=place.device)
            for step in tqdm(range(1, batches.per_epoch + 1), f"log-probs {path}", unit="batch"):
                for batch in batches(step):
                    values[batch.rows] = policy.logps(batch)
            results.append(values.cpu().double())
    return results


def log_ratios(
    paths: list[str], reference: str, prompts: list[list[list[int]]], samples: list[Samples]
) -> list[Tensor]:
    """log π(y|x) - log π_ref(y|x) (n, K) of each policy's own samples; exactly 0 for the reference itself."""
    from torch.distributed import destroy_process_group

    from shared.distributed import setup

    place = setup("float32")
    sets = [make_groups(p, s.ids) for p, s in zip(prompts, samples, strict=True)]
    own = [logps(path, [groups], place)[0] for path, groups in zip(paths, sets, strict=True)]
    ref = logps(reference, sets, place)
    destroy_process_group()
    return [a - b for a, b in zip(own, ref, strict=True)]


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


def check(args: Args) -> None:
    """Raises UserError where a number is out of range."""
    for name in ("num_prompts", "num_samples", "temperature", "top_p", "max_new_tokens", "batch_size"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be greater than 0")
    if args.top_k < 0 or args.top_p > 1:
        raise UserError("--top-k must be at least 0 and --top-p at most 1")


def check_tokenizers(paths: list[str], reference: str) -> None:
    """Raises UserError where a policy's ids mean other tokens to the reference: the KL would be of another text."""
    from shared.model import load_tokenizer

    vocabulary = load_tokenizer(reference)[0].get_vocab()
    for path in paths:
        if load_tokenizer(path)[0].get_vocab() != vocabulary:
            raise UserError(f"--policies {path}: has another tokenizer than the reference {reference}")


def evaluate(args: Args) -> dict:
    """Sample, score and compare; the contents of the results file."""
    check(args)
    policies = named_policies(args.policies)
    prompts = sample.read_prompts(args.rows, args.num_prompts)
    score(args.reward, prompts, [""] * len(prompts))  # a prompt without a reward should not cost minutes of sampling
    paths, reference = list(policies.values()), args.reference or next(iter(policies.values()))
    check_tokenizers(paths, reference)
    # all sampling comes first: `setup` asks for deterministic kernels, which sampling on a GPU does not have
    encoded, samples = zip(*(draw(path, prompts, args) for path in paths), strict=True)
    ratios = log_ratios(paths, reference, list(encoded), list(samples))
    repeated = [prompt for prompt in prompts for _ in range(args.num_samples)]
    rewards = [score(args.reward, repeated, [text for row in drawn.texts for text in row]) for drawn in samples]
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
    try:
        results = evaluate(args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.output.with_name(args.output.name + ".tmp")
        temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
        os.replace(temporary, args.output)
    except (UserError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
