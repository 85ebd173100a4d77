"""Add the scores of reward models, or of the notices' oracle, to rows of completions.

Rows are written in the order of the file, with their own columns and

    one score each       rows with `completions` [K] get `scores` [K], pairs of any other form `score_chosen` and
                         `score_rejected`
    several models       every row gets `scores`, one list of M numbers for each completion: [K][M], or [2][M] for a
                         pair, chosen first, which keeps its order

A reward model is a directory of algos/rm.py, or any sequence classifier with one label; all of them are held in
memory together, and must share one tokenizer. It reads what training reads, an EOS at the end, except where the row's
`finished` says that the completion was cut off. `--normalise` subtracts `config.reward_mean`, the mean over the
model's own training completions. A run that was killed continues from OUTPUT.partial; under torchrun every process
scores its share of the rows.

    python scripts/score.py --rows pairs.jsonl --output scored.jsonl --reward-models runs/rm
    python scripts/score.py --rows samples.jsonl --output scored.jsonl --reward notices
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import notices
import streaming
import torch

from shared import UserError
from shared.distributed import Place
from shared.run import command, plain_length

WINDOW = 256  # rows that are cut into micro-batches together


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
    """instead of reward models, the oracle of the embedded world"""
    normalise: bool = True
    """subtract each reward model's mean over its training completions"""
    max_length: int | None = None
    """most tokens of prompt plus completion; default: the models' positions"""
    micro_batch_tokens: int = 8192
    """most tokens in one forward pass of one process"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the forward pass"""
    max_rows: int | None = None
    """take the first rows only"""


@dataclass
class Models:
    """Reward models that share one tokenizer."""

    models: list
    tokenizer: object
    room: int  # most tokens of prompt and completion
    place: Place

    def rewards(self, rows: list[streaming.Row], budget: int, normalise: bool) -> list[list[list[float]]]:
        """r(x, y) of each row's completions: K lists of one number per model."""
        means = [getattr(model.lm.config, "reward_mean", 0.0) * normalise for model in self.models]
        found: list[list[list[float]]] = [[] for _ in rows]
        for k in {len(row.completions) for row in rows}:
            where = [i for i, row in enumerate(rows) if len(row.completions) == k]
            groups = streaming.make_groups([rows[i] for i in where])
            values = [streaming.over_groups(model, model, groups, budget, self.place) for model in self.models]
            values = torch.stack(values, 2) - torch.tensor(means, dtype=torch.double)  # (n, K, M)
            for i, scores in zip(where, values.tolist(), strict=True):
                found[i] = scores
        return found


def load(paths: list[str], place: Place) -> Models:
    """Reward models with trained heads. Raises UserError where one has none, or another tokenizer than the first."""
    from shared.model import RewardModel, load_model, load_tokenizer

    tokenizers, models, room = [], [], sys.maxsize
    for path in paths:
        tokenizer, config = load_tokenizer(path)
        if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            raise UserError(f"model {path}: not a reward model, it has no trained head; train one with algos/rm.py")
        if config.num_labels != 1:
            raise UserError(f"model {path}: its head has {config.num_labels} labels; a reward model's has one")
        tokenizers.append(tokenizer)
        if tokenizer.get_vocab() != tokenizers[0].get_vocab():
            raise UserError(f"model {path}: has another tokenizer than {paths[0]}; score with each by itself")
        models.append(load_model("AutoModelForSequenceClassification", RewardModel, path, place, num_labels=1))
        room = min(room, getattr(config, "max_position_embeddings", None) or room, plain_length(config))
    if tokenizers[0].eos_token_id is None:
        raise UserError(f"model {paths[0]}: the tokenizer has no EOS token; set one so that completions can end")
    return Models(models, tokenizers[0], room, place)


def with_scores(row: streaming.Row, scores: list[list[float]]) -> dict:
    """The row's own columns and its scores, earlier ones removed. scores [K][M]."""
    names = ("scores", "score_chosen", "score_rejected")
    own = {name: value for name, value in row.own.items() if name not in names}
    if len(scores[0]) > 1:
        return own | {"scores": scores}
    values = [score for (score,) in scores]
    return own | ({"scores": values} if "completions" in own else dict(zip(names[1:], values, strict=True)))


def by_oracle(number: int, window: list[tuple]) -> Iterator[dict]:
    """A window of (Example, row) with the oracle's rewards."""
    for example, own in window:
        texts = [example.prompt, *example.completions]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{example.where}: --reward notices scores plain texts, not chat messages")
        try:
            scores = [[notices.oracle(texts[0], completion)] for completion in texts[1:]]
        except ValueError as error:
            raise UserError(f"{example.where}: --reward notices: {error}") from None
        yield with_scores(streaming.Row(example, own, []), scores)


def check(args: Args) -> int:
    """The number of rows. Raises UserError where the arguments or a row do not allow scoring."""
    if bool(args.reward_models) == bool(args.reward):
        raise UserError("give either --reward-models or --reward notices")
    total = 0
    for example, own in streaming.read(args.rows, Counter(), args.max_rows):
        if "completions" not in own and len(example.completions) != 2 or not example.completions:
            raise UserError(f"{example.where}: nothing to compare, it has {len(example.completions)} completions")
        total += 1
    return total


def main(args: Args) -> None:
    """Reads the rows, scores them, writes rows."""
    total, made_with, dropped = check(args), streaming.settings(args, *args.reward_models), Counter()
    rows = streaming.read(args.rows, dropped, args.max_rows)
    if args.reward:
        kept = streaming.write(args.output, made_with, rows, WINDOW, by_oracle, total)
    else:
        with streaming.alone(args.dtype) as place:
            models = load(list(args.reward_models), place)
            room = min(args.max_length or models.room, models.room)

            def compute(number: int, window: list[streaming.Row]) -> Iterator[dict]:
                yield from map(with_scores, window, models.rewards(window, args.micro_batch_tokens, args.normalise))

            rows = streaming.encode(rows, models.tokenizer, dropped, room, completions=True)
            kept = streaming.write(args.output, made_with, rows, WINDOW, compute, total)
    if int(os.environ.get("RANK", 0)) == 0:
        print(streaming.summary(args.rows, kept, dropped))


if __name__ == "__main__":
    command(main, Args)
