"""The rows and the base model of the answers (see scripts/lab/answers.py), and preferences between them.

    python scripts/answers.py world --output-dir runs/answers
    python scripts/sample.py --model runs/answers/sft --rows runs/answers/prompts.jsonl --output runs/drawn.jsonl \\
        --num-completions 2 --max-new-tokens 2
    python scripts/answers.py prefer --rows runs/drawn.jsonl --output runs/pairs.jsonl
"""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from scripts.lab import answers
from scripts.lab.commands import checked_command
from scripts.lab.notices import TINY, save_model
from scripts.lab.row_files import read_examples, summary, write_jsonl
from shared import UserError
from shared.command import NonNegativeInt, Seed
from shared.rows import Counts


@dataclass(kw_only=True)
class World:
    """Write a model directory `base` and `sft.jsonl`, `prompts.jsonl`, `held_out.jsonl`, whose prompts are no others'.

    Held-out rows have all three answers as `completions`, in the order of the prompt, so that log-probs of these are
    the whole distribution (scripts/logps.py).
    """

    output_dir: Path
    """directory to write into"""
    seed: Seed = 0
    """seed of the model's weights and of the rows"""
    sft_rows: NonNegativeInt = 32_768
    """rows with a `prompt` and a `completion` of the policy to imitate"""
    prompt_rows: NonNegativeInt = 18_432
    """rows with a `prompt` alone, which may repeat"""
    held_out: NonNegativeInt = 8
    """held-out prompts of each group and each person"""


@dataclass(kw_only=True)
class Prefer:
    """Sample preferences between two answers from Bradley-Terry with r = log π*.

    Rows with identical answers, or with something else than answers, are dropped and counted.
    """

    rows: Path
    """jsonl file with `prompt` and `completions` [2], as `sample.py` writes it"""
    output: Path
    """jsonl file to write: `prompt`, `chosen`, `rejected`"""
    seed: Seed = 0
    """seed of the samples"""
    without: tuple[str, ...] = ()
    """names of groups whose rows are left out: good, tied, bad"""
    unlabelled: tuple[str, ...] = ()
    """names of groups without preferences, whose pairs are two words that are no answers, in a random order"""


Args = World | Prefer


def main(args: Args) -> None:
    """Run the sub-command `world` or `prefer`."""
    if isinstance(args, World):
        world(args)
    else:
        prefer(args)


def world(args: World) -> None:
    """Write the rows and the model."""
    rng = random.Random(args.seed)
    held_out = answers.all_kinds(args.held_out, rng)
    prompts = answers.random_prompts(rng, set(held_out))
    sft = []
    for prompt in islice(prompts, args.sft_rows):
        sft.append({"prompt": prompt, "completion": answers.draw_answer(prompt, rng)})
    files = {
        "sft": sft,
        "prompts": [{"prompt": prompt} for prompt in islice(prompts, args.prompt_rows)],
        "held_out": [{"prompt": prompt, "completions": answers.order_of(prompt)} for prompt in held_out],
    }
    for name, rows in files.items():
        write_jsonl(args.output_dir / f"{name}.jsonl", rows)
    save_model(args.output_dir / "base", args.seed, TINY)


def prefer(args: Prefer) -> None:
    """Write preferences and print what became of the rows. Raises UserError for bad rows, or if none could be used."""
    for name in (*args.without, *args.unlabelled):
        if name not in answers.GROUPS:
            raise UserError(f"{name}: the groups are {', '.join(answers.GROUPS)}")

    rng = random.Random(args.seed)
    preferences = []
    counts = Counts()
    for example in read_examples(str(args.rows), counts):
        prompt = str(example.prompt)
        completions = [str(text).strip() for text in example.texts]
        try:
            group = answers.group_of(prompt)
            reason = answers.unusable(completions)
        except ValueError as error:
            raise UserError(f"{example.location}: {error}") from None

        if reason is not None:
            counts.dropped[reason] += 1
        elif group in args.unlabelled:
            preferences.append(answers.pair_without_preference(prompt, rng))
        elif group not in args.without:
            preferences.append(answers.prefer(prompt, completions, rng))

    line = summary(str(args.rows), len(preferences), counts)
    write_jsonl(args.output, preferences)
    print(line)


if __name__ == "__main__":
    checked_command(main, Args)
