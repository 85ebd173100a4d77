"""Credit assignment as a number: do token rewards find the wrong words of a summary? From r to Q*, section 5.1.

Rows are notices with a correct summary. Two of its five facts are drawn, and other words of the same slots put in their
place: three copies of each summary, with the first of the two facts wrong, with the second, and with both. Of the
tokens that state facts, r = log π_θ(token|before) - log π_ref(token|before), the token reward (Eq 11) in nats per β:
β changes no order. A policy that was trained without a reference, as by algos/typo.py, gets the same log-ratio.

    one error       AUROC: P(-r of a wrong fact > -r of a correct one), in all copies with one error; a tie counts half
    second error    AUROC of the second error after the first, against the correct word there after the same first error
    both found      share of copies with both errors in which the two lowest r are exactly theirs (by chance 0.1);
                    with the second error this is the paper's "stitching"
    wrong, correct  mean r, in nats per β, in the copies with one error

Beside the policies stands a baseline that needs no preferences: log π_ref in the place of r. The 95% intervals are
percentiles of 2,000 bootstrap resamples: prompts are resampled, and the measure is computed anew from all tokens of the
drawn ones. A figure beside the output shows the values whose AUROC "one error" is.

    python scripts/credit.py --policies dpo=runs/dpo --reference runs/sft --rows runs/world/held_out.jsonl \\
        --output runs/credit.json
"""

import json
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import evaluate
import figures
import notices
import streaming
import torch
from family import shown
from torch import Tensor

from algos.token_dpo_beam import token_rewards
from shared import UserError
from shared.model import load_policy, load_tokenizer
from shared.run import command

BASELINE = "-log π_ref"
PANELS = 3  # of the figure, side by side


@dataclass(kw_only=True)
class Args:
    """Credit assignment as a number."""

    policies: tuple[str, ...]
    """NAME=DIR of each policy"""
    reference: str
    """directory or hub id of π_ref, the policy that training started from"""
    rows: Path
    """file, directory or hub id (`path:split`) of notices, `prompt`, with a correct summary, `completion`"""
    output: Path
    """json file to write; the figure goes beside it, under the same name in .png"""
    num_prompts: int = 512
    """prompts, the first of the file"""
    seed: int = 0
    """of the errors and the bootstrap"""


# ---------------------------------------------------------------- summaries with errors


def corrupt(summary: str, rng: random.Random) -> tuple[list[str], list[list[bool]]]:
    """Copies of a summary in which the first of two facts is wrong, the second, and both: 3 texts, and which of the
    facts (3, 5), in the order of the text, are wrong."""
    facts = list(notices.read_facts(summary).items())
    first, second = pair = sorted(rng.sample(range(len(facts)), 2))
    others = {i: rng.choice([v for v in notices.SLOTS[facts[i][0]] if v != facts[i][1]]) for i in pair}
    copies, wrong = [], []
    for errors in ([first], [second], pair):
        copy = summary
        for i in errors:
            copy = re.sub(rf"\b{facts[i][1]}\b", others[i], copy)
        copies.append(copy)
        wrong.append([i in errors for i in range(len(facts))])
    return copies, wrong


def read(rows: str, num_prompts: int, seed: int) -> tuple[list[str], list[list[str]], Tensor]:
    """n prompts, three copies of each summary, and which facts of them are wrong (n, 3, 5)."""
    rng, prompts, copies, wrong = random.Random(seed), [], [], []
    for example in streaming.first(rows, num_prompts):
        texts = [example.prompt, *example.completions]
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{example.where}: needs a notice as `prompt` and its summary as `completion`, plain texts")
        try:
            if notices.read_facts(texts[0]) != notices.read_facts(texts[1]):
                raise ValueError(f"a summary to put errors into must be correct: {texts[1]!r}")
        except ValueError as error:
            raise UserError(f"{example.where}: {error}") from None
        made = corrupt(texts[1], rng)
        for found, one in zip((prompts, copies, wrong), (texts[0], *made), strict=True):
            found.append(one)
    return prompts, copies, torch.tensor(wrong)


def encode(path: str, prompts: list[str], copies: list[list[str]]) -> tuple[list[streaming.Row], Tensor]:
    """Token ids, and the places of the five facts in every completion (n, 5).

    Raises UserError unless each word of a summary is one token.
    """
    tokenizer, config = load_tokenizer(path)
    examples = evaluate.make_examples(prompts, copies, [[True] * 3] * len(prompts))
    room = getattr(config, "max_position_embeddings", sys.maxsize)
    rows = evaluate.encode(path, examples, tokenizer, room, completions=True)
    for row, texts in zip(rows, copies, strict=True):
        for ids, text in zip(row.completions, texts, strict=True):
            tokens = tokenizer.convert_ids_to_tokens(ids)
            if tokens != [*notices.words(text), tokenizer.eos_token]:
                raise UserError(f"{path}: the tokens of {text!r} are not its words and an EOS, but {tokens}")
    facts = [[i for i, word in enumerate(notices.words(c[0])) if word in notices.SLOT_OF] for c in copies]
    return rows, torch.tensor(facts)


def fact_logps(paths: list[str], rows: list[streaming.Row], facts: Tensor) -> list[Tensor]:
    """log π of the tokens that state facts, (n, 3, 5) for each policy."""
    groups, found = streaming.make_groups(rows), []
    with streaming.alone("float32") as place:
        for path in paths:
            logps = streaming.token_logps(load_policy(path, place), groups, evaluate.MICRO_BATCH_TOKENS, place)
            pairs = zip(logps, facts, strict=True)
            found.append(torch.stack([torch.stack([logp[at] for logp in row]) for row, at in pairs]))
    return found


# ---------------------------------------------------------------- statistics


def auroc(suspicion: Tensor, wrong: Tensor, weights: Tensor) -> float:
    """P(suspicion of a wrong token > that of a correct one) + P(equal) / 2 over all pairs of them, exactly: the
    Mann-Whitney U over its maximum. suspicion, wrong (n, T), of any prompts; weights (n,): each prompt counts so often.
    """
    values, rank = suspicion.unique(return_inverse=True)
    weights = weights.double()[:, None].expand_as(suspicion)
    bad, good = (torch.bincount(rank[some], weights[some], len(values)) for some in (wrong, ~wrong))
    return float(bad @ (good.cumsum(0) - good / 2) / (bad.sum() * good.sum()))


def auroc_number(suspicion: Tensor, wrong: Tensor, seed: int) -> dict:
    """The AUROC of all prompts, and its 95% percentile interval from 2,000 resamples of the prompts."""
    n, generator = len(suspicion), torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (evaluate.RESAMPLES, n), generator=generator)
    resampled = [auroc(suspicion, wrong, draw.bincount(minlength=n)) for draw in draws]
    interval = torch.tensor(resampled, dtype=torch.double).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return {"mean": auroc(suspicion, wrong, torch.ones(n)), "interval": interval.tolist()}


def measure(rewards: Tensor, wrong: Tensor, seed: int) -> dict:
    """The measures of one policy. rewards, wrong (n, 3, 5): of each fact of each copy."""
    one, one_wrong, second = rewards[:, :2], wrong[:, :2], wrong[:, 1]
    # the same place after the same first error: in the first copy the word is correct, in the third wrong
    there = torch.stack([rewards[:, 0][second], rewards[:, 2][second]], 1)
    both, both_wrong = rewards[:, 2], wrong[:, 2]
    highest_wrong = both.masked_fill(~both_wrong, -torch.inf).amax(1)
    found = (highest_wrong < both.masked_fill(both_wrong, torch.inf).amin(1)).double()
    return {
        "one_error": auroc_number(-one.flatten(1), one_wrong.flatten(1), seed),
        "second_error": auroc_number(-there, torch.tensor([False, True]).expand_as(there), seed),
        "both_found": {"mean": float(found.mean()), "interval": evaluate.bootstrap(found, seed)},
        "wrong": float(one[one_wrong].mean()),
        "correct": float(one[~one_wrong].mean()),
    }


# ---------------------------------------------------------------- output


def table(measures: dict[str, dict]) -> str:
    """Aligned columns, 95% intervals in brackets."""
    lines = [["", "AUROC, one error", "AUROC, second error", "both found", "wrong (nats)", "correct (nats)"]]
    for name, numbers in measures.items():
        cells = (shown(n, ".3f") if isinstance(n, dict) else f"{n:+.2f}" for n in numbers.values())
        lines.append([name, *cells])
    return evaluate.aligned(lines)


def draw(path: Path, rewards: dict[str, Tensor], wrong: Tensor, measures: dict[str, dict]) -> None:
    """A panel for each policy and the baseline: the values of correct and wrong facts in copies with one error."""
    panels = list(range(len(rewards)))
    mosaic = [panels[i : i + PANELS] for i in panels[::PANELS]]
    mosaic[-1] += ["."] * (len(mosaic[0]) - len(mosaic[-1]))
    figure, axes = figures.canvas(mosaic, (4.2 * len(mosaic[0]), 3.2 * len(mosaic)))
    for i, (name, values) in enumerate(rewards.items()):
        one = values[:, :2]
        limits = float(one.min()), float(one.max())
        for kind, some, color in (("correct", ~wrong, figures.BLUE), ("wrong", wrong, figures.ORANGE)):
            found = one[some[:, :2]]
            share = torch.full_like(found, 1 / len(found))
            axes[i].hist(found, 40, range=limits, weights=share, color=color, alpha=0.6, label=f"{kind} facts")
        unit = "log π_ref of a token (nats)" if name == BASELINE else "log π_θ - log π_ref of a token (nats)"
        title = f"{name}: AUROC {shown(measures[name]['one_error'], '.3f')}"
        figures.label(axes[i], title, unit, "share of the kind's tokens")
    figure.savefig(path, format="png", dpi=150)


def main(args: Args) -> None:
    """Corrupt, compare, write both files, print the table."""
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: must end in .json; the figure goes beside it in .png")
    figures.check()
    policies = evaluate.named_policies(args.policies)
    prompts, copies, wrong = read(str(args.rows), args.num_prompts, args.seed)
    evaluate.check_tokenizers(list(policies.values()), args.reference)
    reference, *logps = fact_logps([args.reference, *policies.values()], *encode(args.reference, prompts, copies))
    rewards = {name: token_rewards(values, reference, 1.0) for name, values in zip(policies, logps, strict=True)}
    rewards[BASELINE] = reference
    measures = {name: measure(values, wrong, args.seed) for name, values in rewards.items()}
    results = {"settings": evaluate.settings(args, args.reference, len(prompts)), "measures": measures}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure = args.output.with_suffix(".png")
    temporary = [path.with_name(path.name + ".tmp") for path in (figure, args.output)]
    draw(temporary[0], rewards, wrong, measures)
    temporary[1].write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    for path, final in zip(temporary, (figure, args.output), strict=True):
        os.replace(path, final)
    print(table(measures))


if __name__ == "__main__":
    command(main, Args)
