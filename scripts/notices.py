"""The rows and the base model of the notices (see scripts/lab/notices.py), and the oracle's preferences.

Everything is written as ordinary files: jsonl rows, and a Hugging Face model directory (a word-level tokenizer and a
randomly initialised Llama of about 1M parameters) that is used like any other model.

    python scripts/notices.py world --output-dir runs/world
    python scripts/notices.py prefer --rows runs/samples.jsonl --output runs/pairs.jsonl
"""

import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

from scripts.lab.commands import checked_command
from scripts.lab.notices import (
    check_row,
    make_sft_row,
    make_summary,
    prefer_row,
    save_base,
    unique_notices,
    unusable,
)
from scripts.lab.row_files import summary, write_jsonl
from shared import UserError
from shared.command import AtLeast
from shared.rows import Counts


@dataclass(kw_only=True)
class World:
    """Write a model directory `base` and `sft.jsonl`, `prompts.jsonl`, `held_out.jsonl`, no post twice."""

    output_dir: Path
    """directory to write into"""
    seed: Annotated[int, AtLeast(0, at_most=2**32 - 1)] = 0
    """seed of the model's weights and of the rows"""
    sft_rows: int = 32_000
    """rows of imperfect demonstrations, `prompt` and `completion`"""
    prompt_rows: int = 4_096
    """rows with a `prompt` alone"""
    held_out_rows: int = 512
    """rows with a `prompt` and a perfect `completion`"""


@dataclass(kw_only=True)
class Prefer:
    """Sample the oracle's preferences: Bradley-Terry from two completions, Plackett-Luce from more.

    Rows with an unfinished completion, and rows with identical completions, are dropped and counted.
    """

    rows: Path
    """jsonl file with `prompt`, `completions` [K] and `finished` [K], as `sample.py` writes it"""
    output: Path
    """jsonl file to write: `prompt`, `chosen`, `rejected`, or for K > 2 ranked `completions`"""
    seed: Annotated[int, AtLeast(0, at_most=2**32 - 1)] = 0
    """seed of the samples"""


def main(args: World | Prefer) -> None:
    """Run the sub-command `world` or `prefer`."""
    if isinstance(args, World):
        world(args)
    else:
        prefer(args)


def world(args: World) -> None:
    """Write the rows and the base model."""
    # Held-out rows come first, so that they stay the same whatever the number of the others.
    rng = random.Random(args.seed)
    notices = unique_notices(rng)
    held_out = []
    for prompt, kind in islice(notices, args.held_out_rows):
        held_out.append({"prompt": prompt, "completion": make_summary(prompt, kind, rng)})
    prompts = [{"prompt": prompt} for prompt, _ in islice(notices, args.prompt_rows)]
    sft = [make_sft_row(prompt, kind, rng) for prompt, kind in islice(notices, args.sft_rows)]

    write_jsonl(args.output_dir / "held_out.jsonl", held_out)
    write_jsonl(args.output_dir / "prompts.jsonl", prompts)
    write_jsonl(args.output_dir / "sft.jsonl", sft)
    save_base(args.output_dir / "base", args.seed)


def prefer(args: Prefer) -> None:
    """Write preferences and print what became of the rows. Raises UserError if none could be used."""
    rng = random.Random(args.seed)
    rows = read_rows(args.rows)
    preferences = []
    counts = Counts()
    for row in rows:
        reason = unusable(row)
        if reason is None:
            preferences.append(prefer_row(row, rng))
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
    checked_command(main, World | Prefer)
