"""Add the scores of reward models, or of the notices' oracle, to rows of completions.

Rows are written in the order of the file, with their own columns and

    one score each       rows with `completions` [K] get `scores` [K], pairs of any other form `score_chosen` and
                         `score_rejected`
    several models       every row gets `scores`, one list of M numbers for each completion: [K][M], or [2][M] for a
                         pair, chosen first, which keeps its order

A reward model is a directory of algos/rm.py, or any sequence classifier with one label. All of them are held in memory
together, and must share one tokenizer. They read the tokens that training reads, with an EOS at the end unless the
row's `finished` says that the completion was cut off. `--normalise` subtracts `config.reward_mean`, the mean over the
model's own training completions. A run that was killed continues from OUTPUT.partial. Under torchrun every process
scores its share of the rows.

    python scripts/score.py --rows pairs.jsonl --output scored.jsonl --reward-models runs/rm
    python scripts/score.py --rows samples.jsonl --output scored.jsonl --reward notices
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from scripts.lab.commands import checked_command
from scripts.lab.row_files import (
    EncodedRow,
    encode_rows,
    read_examples,
    refuse_existing,
    settings_of,
    summary,
    write_windows,
)
from scripts.lab.scoring import load_reward_models, score_with_oracle
from shared import UserError
from shared.command import Above
from shared.distributed import single_process
from shared.encode import Encoder
from shared.rows import Counts, Example

WINDOW_SIZE = 256  # rows that are divided into micro-batches together


@dataclass(kw_only=True)
class Args:
    """Add scores to rows."""

    rows: str
    """file, directory or hub id (`path:split`) of rows with two or more completions"""
    output: Path
    """jsonl file to write"""
    reward_models: tuple[str, ...] = ()
    """directories or hub ids of reward models"""
    reward: Literal["notices"] | None = None
    """instead of reward models, the oracle of the notices"""
    normalise: bool = True
    """subtract each reward model's mean over its training completions"""
    max_length: Annotated[int | None, Above(0)] = None
    """most tokens of prompt plus completion; default: the models' positions"""
    micro_batch_tokens: Annotated[int, Above(0)] = 8192
    """most tokens in one forward pass of one process"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the forward pass"""
    max_rows: Annotated[int | None, Above(0)] = None
    """take the first rows only"""


def main(args: Args) -> None:
    """Read the rows, score them, write rows."""
    if bool(args.reward_models) == bool(args.reward):
        raise UserError("give either --reward-models or --reward notices")
    total = count_comparable(args)
    settings = settings_of(args, *args.reward_models)
    refuse_existing([args.output], settings)
    counts = Counts()
    examples = read_examples(args.rows, counts, args.max_rows)
    if args.reward:
        kept = write_windows(args.output, settings, examples, WINDOW_SIZE, compute_with_oracle, total)
    else:
        kept = write_model_scores(args, settings, examples, counts, total)
    if int(os.environ.get("RANK", 0)) == 0:
        print(summary(args.rows, kept, counts))


def count_comparable(args: Args) -> int:
    """The number of usable rows. Raises UserError for a row that has not two completions or a list of them."""
    total = 0
    for example in read_examples(args.rows, Counts(), args.max_rows):
        num_completions = len(example.completions)
        is_comparable = num_completions == 2 or (num_completions > 0 and "completions" in example.row)
        if not is_comparable:
            raise UserError(f"{example.location}: nothing to compare, it has {num_completions} completions")
        total += 1
    return total


def compute_with_oracle(number: int, window: list[Example]) -> Iterator[dict]:
    """The rows of a window with the oracle's scores."""
    for example in window:
        scores = score_with_oracle(example)
        yield with_scores(example.row, [[score] for score in scores])


def write_model_scores(args: Args, settings: dict, examples: Iterator[Example], counts: Counts, total: int) -> int:
    """Write the rows with the scores of the reward models; returns their number."""
    with single_process(args.dtype) as ranks:
        models = load_reward_models(list(args.reward_models), ranks)
        room = models.room
        if args.max_length is not None:
            room = min(room, args.max_length)

        def compute(number: int, window: list[EncodedRow]) -> Iterator[dict]:
            rewards = models.rewards(window, args.micro_batch_tokens, args.normalise)
            for row, scores in zip(window, rewards, strict=True):
                yield with_scores(row.example.row, scores)

        encoder = Encoder(models.tokenizer, counts, date.fromisoformat(settings["date"]))
        rows = encode_rows(examples, encoder, room, completions=True)
        return write_windows(args.output, settings, rows, WINDOW_SIZE, compute, total)


def with_scores(row: dict, scores: list[list[float]]) -> dict:
    """The columns of a row and its scores [K][M], without earlier scores."""
    scored = dict(row)
    for name in ("scores", "score_chosen", "score_rejected"):
        scored.pop(name, None)

    if len(scores[0]) > 1:
        return scored | {"scores": scores}
    values = [score for (score,) in scores]
    if "completions" in row:
        return scored | {"scores": values}
    chosen, rejected = values
    return scored | {"score_chosen": chosen, "score_rejected": rejected}


if __name__ == "__main__":
    checked_command(main, Args)
