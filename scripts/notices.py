"""The rows and the base model of the notices (see scripts/lab/notices.py), and the oracle's preferences.

Everything is written as ordinary files: jsonl rows, and a Hugging Face model directory (a word-level tokenizer and a
randomly initialised Llama of about 1M parameters) that is used like any other model.

    python scripts/notices.py world --output-dir runs/world
    python scripts/notices.py pairs --output runs/demonstrations.jsonl --rows 16000
    python scripts/notices.py prefer --rows runs/samples.jsonl --output runs/pairs.jsonl
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from scripts.lab.commands import checked_command
from scripts.lab.notices import (
    TINY,
    Demonstrations,
    Kind,
    check_demonstrations,
    check_row,
    make_demonstration,
    make_pair,
    make_sft_row,
    make_summary,
    pairs_of,
    prefer_row,
    save_model,
    unique_notices,
    unusable,
)
from scripts.lab.row_files import read_examples, summary, write_jsonl
from shared import UserError
from shared.command import NonNegativeInt, PositiveInt, Seed
from shared.rows import Counts


@dataclass(kw_only=True)
class World(Demonstrations):
    """Write a model directory `base` and `sft.jsonl`, `prompts.jsonl`, `held_out.jsonl`, no post twice.

    With --unseen-kind, `held_out_unseen.jsonl` has posts of that kind alone.
    """

    output_dir: Path
    """directory to write into"""
    seed: Seed = 0
    """seed of the model's weights and of the rows"""
    sft_rows: NonNegativeInt = 32_000
    """rows of imperfect demonstrations, `prompt` and `completion`"""
    prompt_rows: NonNegativeInt = 4_096
    """rows with a `prompt` alone"""
    held_out_rows: NonNegativeInt = 512
    """rows with a `prompt` and a reference summary, `completion`"""
    references: Literal["perfect", "demonstration"] = "perfect"
    """held-out rows have a perfect `completion`, or a demonstration there and the perfect summary in `perfect`"""
    tiny: bool = False
    """also write a model directory `tiny`, a random Llama that is too small to look facts up"""


@dataclass(kw_only=True)
class Pairs(Demonstrations):
    """Write posts with two different demonstrations each, independent but for that, for `prefer`.

    The posts have random numbers of their own. Only by chance is one of them a post of a world.
    """

    output: Path
    """jsonl file to write: `prompt`, `completions` [2] and `finished` [2], as `sample.py` writes it"""
    rows: PositiveInt
    """number of posts"""
    seed: Seed = 0
    """seed of the posts and of the demonstrations"""
    exclude: tuple[Path, ...] = ()
    """jsonl files with a `prompt` whose posts are left out, such as the held-out rows of a world"""


@dataclass(kw_only=True)
class Prefer:
    """Sample the oracle's preferences: Bradley-Terry from two completions, Plackett-Luce from more.

    Rows with an unfinished completion, and rows with identical completions, are dropped and counted.
    """

    rows: Path
    """jsonl file with `prompt`, `completions` [K] and `finished` [K], as `sample.py` writes it"""
    output: Path
    """jsonl file to write: `prompt`, `chosen`, `rejected`, or for K > 2 ranked `completions`"""
    seed: Seed = 0
    """seed of the samples"""
    noise_free: bool = False
    """order completions by the oracle's reward instead of sampling; rows with equal rewards are dropped"""
    pairs: bool = False
    """make a pair of each two of the K completions instead of a ranking"""


Args = World | Pairs | Prefer


def main(args: Args) -> None:
    """Run the sub-command `world`, `pairs` or `prefer`."""
    if isinstance(args, World):
        world(args)
    elif isinstance(args, Pairs):
        pairs(args)
    else:
        prefer(args)


# ---------------------------------------------------------------- world


def world(args: World) -> None:
    """Write the rows and the models. Raises UserError for arguments that cannot be."""
    check_demonstrations(args)
    # Held-out rows come first, so that they stay the same whatever the number of the others.
    rng = random.Random(args.seed)
    # Imperfect references have draws of their own, so that the posts are the same with either references.
    reference_rng = random.Random(f"references {args.seed}")
    notices = unique_notices(rng, args.fillers)
    shown = without(notices, args.unseen_kind)
    unseen = (notice for notice in notices if notice[1].name == args.unseen_kind)

    files = {"held_out": held_out_rows(shown, args, rng, reference_rng)}
    if args.unseen_kind:
        files["held_out_unseen"] = held_out_rows(unseen, args, rng, reference_rng)
    files["prompts"] = [{"prompt": prompt} for prompt, _ in islice(shown, args.prompt_rows)]
    files["sft"] = [make_sft_row(prompt, kind, rng, args) for prompt, kind in islice(notices, args.sft_rows)]

    for name, rows in files.items():
        write_jsonl(args.output_dir / f"{name}.jsonl", rows)
    save_model(args.output_dir / "base", args.seed)
    if args.tiny:
        save_model(args.output_dir / "tiny", args.seed, TINY)


def without(notices: Iterator[tuple[str, Kind]], name: str | None) -> Iterator[tuple[str, Kind]]:
    """The notices of all kinds but one."""
    return (notice for notice in notices if notice[1].name != name)


def held_out_rows(
    notices: Iterator[tuple[str, Kind]], args: World, rng: random.Random, reference_rng: random.Random
) -> list[dict[str, str]]:
    """Rows with a summary: the perfect one, or a demonstration, with the perfect one beside it."""
    rows = []
    for prompt, kind in islice(notices, args.held_out_rows):
        row = {"prompt": prompt, "completion": make_summary(prompt, kind, rng)}
        if args.references == "demonstration":
            row["perfect"] = row["completion"]
            row["completion"] = make_demonstration(prompt, kind, reference_rng, args)
        rows.append(row)
    return rows


# ---------------------------------------------------------------- preferences


def pairs(args: Pairs) -> None:
    """Write posts with two demonstrations each. Raises UserError for arguments that cannot be."""
    check_demonstrations(args)
    exclude = set()
    for path in args.exclude:
        exclude |= {example.prompt for example in read_examples(str(path), Counts())}

    rng = random.Random(f"pairs {args.seed}")
    notices = without(unique_notices(rng, args.fillers, exclude), args.unseen_kind)
    rows = [make_pair(prompt, kind, rng, args) for prompt, kind in islice(notices, args.rows)]
    write_jsonl(args.output, rows)


def prefer(args: Prefer) -> None:
    """Write preferences and print what became of the rows. Raises UserError if none could be used."""
    rng = random.Random(args.seed)
    rows = read_rows(args.rows)
    if args.pairs:
        rows = [pair for row in rows for pair in pairs_of(row)]
    preferences = []
    counts = Counts()
    for row in rows:
        reason = unusable(row, args.noise_free)
        if reason is None:
            preferences.append(prefer_row(row, rng, args.noise_free))
        else:
            counts.dropped[reason] += 1

    line = summary(str(args.rows), len(preferences), counts)
    write_jsonl(args.output, preferences)
    print(line)


def read_rows(path: Path) -> list[dict]:
    """The rows of a jsonl file of notices with K completions each. Raises UserError for a bad row."""
    rows: list[dict] = []
    num_completions = None
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                check_row(row, num_completions)
                num_completions = len(row["completions"])
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}, line {len(rows) + 1}: {error}") from None
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


if __name__ == "__main__":
    checked_command(main, Args)
