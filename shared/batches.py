"""Groups → packed micro-batches, in an order that the seed fixes, balanced over processes."""

import heapq
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from shared import UserError
from shared.attention import Spans
from shared.distributed import Ranks, activity, copied, from_main
from shared.encode import CONTROL_STRINGS
from shared.groups import Groups, Requires, check_fit, describe, load_groups, shown_example

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ADVICE = (
    "the string of a special token in a row is encoded as plain text, never as the token; "
    "if rows were rendered with a chat template, give their messages instead"
)


@dataclass
class Batch:
    """One micro-batch of one process: B groups of K completions, packed into one row of T tokens without padding.

    The completions have N counted tokens together, which the hidden states at R positions predict. Tokens of the user
    or of tools between two turns of the assistant are context, and do not count.
    """

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), going on from the end of the prompt at each completion
    spans: Spans  # which token attends to which
    predictor_positions: Tensor  # (R,) positions whose hidden states predict counted tokens, ascending
    predictor_of_token: Tensor  # (N,) for each counted token, the index of its predictor in predictor_positions
    targets: Tensor  # (N,) the counted tokens, completion by completion
    target_index: Tensor  # (N,) their indices in `Groups.tokens`
    lengths: Tensor  # (B, K) counted tokens of each completion
    last_positions: Tensor  # (B, K) position of each completion's last token
    group_index: Tensor  # (B,) the indices of the groups in `Groups`
    ref_logps: Tensor  # (B, K) log π_ref of each completion, or empty
    ref_token_logps: Tensor  # (N,) log π_ref of each counted token, or empty
    scores: Tensor  # (B, K, R) of R reward models, or empty
    global_groups: int  # groups of the whole step, over all micro-batches and processes
    global_tokens: int  # counted tokens of the whole step
    progress: float  # of training: 0 at the first step, 1 at the last
    is_last: bool = True  # whether this is the last micro-batch of its step

    def to(self, device: torch.device) -> "Batch":
        """The same batch with all tensors on a device."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = copied(value, device)
        return replace(self, **moved)


class Batches:
    """The micro-batches of this process for every step.

    Which groups a step takes depends on nothing but the seed, the epoch and the batch size. How they are split into
    micro-batches depends on the token budget and the number of processes. Step s of an epoch that is not shuffled
    takes the groups from (s - 1) * batch_size. The last step of an epoch may be smaller, and steps beyond an epoch
    run on into the next.
    """

    def __init__(self, groups: Groups, batch_size: int, micro_batch_tokens: int, seed: int | None, ranks: Ranks):
        self.groups = groups
        self.batch_size = batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed  # None: in the order of the file
        self.ranks = ranks

        self.steps_per_epoch = math.ceil(len(groups) / batch_size)
        self.last_step = self.steps_per_epoch
        self.group_sizes = groups.offsets[:, -1] - groups.offsets[:, 0]  # (n,) tokens
        counted_before = F.pad(groups.is_counted.cumsum(0), (1, 0))  # each token, and the end
        self.counted_sizes = counted_before[groups.offsets].diff(dim=1)  # (n, 1 + K) counted tokens of each piece
        self._epoch: int | None = None
        self._order = torch.arange(len(groups))  # of the groups in this epoch

    @property
    def used_steps(self) -> int:
        """The steps of the first epoch, or all steps if they are fewer."""
        return min(self.last_step, self.steps_per_epoch)

    def groups_of(self, step: int) -> Tensor:
        """The indices of the groups of step 1, 2, ..., over all processes."""
        epoch, step_of_epoch = divmod(step - 1, self.steps_per_epoch)
        if self.seed is not None and epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._order = torch.randperm(len(self.groups), generator=generator)
            self._epoch = epoch

        start = step_of_epoch * self.batch_size
        return self._order[start : start + self.batch_size]

    def of_step(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of a step; every process has equally many, some perhaps without a group."""
        group_index = self.groups_of(step)
        counted_tokens = int(self.counted_sizes[group_index].sum())
        progress = (step - 1) / max(1, self.last_step - 1)

        sizes = self.group_sizes[group_index].tolist()
        micro_steps = balance(sizes, self.micro_batch_tokens, self.ranks.world_size)
        for number, bins in enumerate(micro_steps, 1):
            members = bins[self.ranks.rank]
            batch = self.pack(group_index[members], len(group_index), counted_tokens, progress)
            batch.is_last = number == len(micro_steps)
            activity.note()
            yield batch

    def all_batches(self) -> Iterator[Batch]:
        """This process's micro-batches of all groups that the run uses, each group once."""
        for step in range(1, self.used_steps + 1):
            yield from self.of_step(step)

    def pack(self, group_index: Tensor, global_groups: int, global_tokens: int, progress: float) -> Batch:
        """The groups at `group_index` (B,) as one packed row; without any, one token that predicts nothing.

        Two groups, [p p | a a | b] and [q | c | d], are packed like this:

            position in the row    0  1  2  3  4  5  6  7
            input_ids              p  p  a  a  b  q  c  d
            position_ids           0  1  2  3  2  0  1  1
            predicted from               1  2  1     5  5
        """
        groups = self.groups
        offsets = groups.offsets[group_index]
        lengths = offsets.diff(dim=1)  # (B, 1 + K): of the pieces, which are the prompt and the completions
        ends = lengths.flatten().cumsum(0).view_as(lengths)  # of each piece, in the packed row
        starts = ends - lengths

        # of each token of the packed row
        position = torch.arange(int(lengths.sum()))
        piece = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())
        group = piece // lengths.shape[1]
        is_completion = piece % lengths.shape[1] > 0
        token_index = position + (offsets[:, 0] - starts[:, 0])[group]
        input_ids = groups.tokens[token_index].long()
        is_counted = groups.is_counted[token_index]

        # a completion's positions go on from the end of its prompt, whose last token predicts its first one
        within_piece = position - starts.flatten()[piece]
        position_ids = torch.where(is_completion, within_piece + lengths[group, 0], within_piece)
        prompt_end = ends[group, 0] - 1
        predictor = torch.where(within_piece == 0, prompt_end, position - 1)
        predictor_positions, predictor_of_token = predictor[is_counted].unique(return_inverse=True)

        targets = input_ids[is_counted]
        target_index = token_index[is_counted]

        layout = [(prompt, tuple(completions)) for prompt, *completions in lengths.tolist()]
        if not layout:
            layout = [(1, ())]
            input_ids = groups.tokens[:1].long()
            position_ids = torch.zeros(1, dtype=torch.long)

        batch = Batch(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            spans=Spans.of(layout, self.ranks.device, self.ranks.dtype),
            predictor_positions=predictor_positions,
            predictor_of_token=predictor_of_token,
            targets=targets,
            target_index=target_index,
            lengths=self.counted_sizes[group_index, 1:],
            last_positions=ends[:, 1:] - 1,
            group_index=group_index,
            ref_logps=_at(groups.ref_logps, group_index),
            ref_token_logps=_at(groups.ref_token_logps, target_index),
            scores=_at(groups.scores, group_index),
            global_groups=global_groups,
            global_tokens=global_tokens,
            progress=progress,
        )
        return batch.to(self.ranks.device)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """The values at an index; an empty tensor, for something that the groups do not have, stays empty."""
    if len(values) == 0:
        return values
    return values[index]


def balance(sizes: list[int], budget: int, world_size: int) -> list[list[list[int]]]:
    """Split a step into micro-steps of one bin per process, of about equally many tokens, none over the budget.

    sizes: tokens of each group → bins[micro-step][process] = indices into `sizes`, ascending. The largest groups are
    placed first, each into the emptiest bin. A group larger than the budget has a bin to itself.

    >>> balance([5, 3, 4, 2], budget=7, world_size=2)
    [[[0, 3], [1, 2]]]
    """
    bins_needed = min(sum(sizes) / budget, len(sizes))
    micro_steps = max(1, math.ceil(bins_needed / world_size))
    while True:
        bins = _fill_bins(sizes, micro_steps * world_size)
        if all(load <= budget or len(members) == 1 for load, _, members in bins):
            break
        micro_steps += 1

    fullest_first = sorted(bins, key=lambda bin: (-bin[0], bin[1]))
    members_of_bins = [sorted(members) for _, _, members in fullest_first]
    return [members_of_bins[i : i + world_size] for i in range(0, len(bins), world_size)]


def _fill_bins(sizes: list[int], num_bins: int) -> list[tuple[int, int, list[int]]]:
    """(tokens, number of the bin, indices into `sizes`) for each bin."""
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(num_bins)]
    for i in largest_first:
        load, number, members = heapq.heappop(heap)
        heapq.heappush(heap, (load + sizes[i], number, [*members, i]))
    return heap


# ---------------------------------------------------------------- load


def load_batches(
    args: Any,
    ranks: Ranks,
    tokenizer: "PreTrainedTokenizerBase",
    config: "PretrainedConfig",
    requires: Requires,
) -> tuple[Batches, Batches | None]:
    """Training and held-out micro-batches; prints what happened to the rows, and one decoded example.

    Raises UserError if the rows are wrong or do not fit the model.
    """
    max_length = _max_length(args, config)
    today = from_main(_date_of_run(args))

    def load(name: str, source: str, seed: int | None) -> Batches:
        groups = load_groups(source, tokenizer, requires, max_length, args.max_prompt_length, today)
        check_fit(groups, config, source)
        _say(f"{name}: {source}: {describe(groups.report)}", ranks)
        _say_longest(groups, args.micro_batch_tokens, ranks)
        return Batches(groups, args.batch_size, args.micro_batch_tokens, seed, ranks)

    shuffling_seed = None
    if args.shuffle:
        shuffling_seed = args.seed
    train = load("train", args.train_data, shuffling_seed)
    held_out = None
    if args.eval_data is not None:
        held_out = load("eval", args.eval_data, None)
        _check_reward_models(train.groups, held_out.groups, args.eval_data)
    if any(CONTROL_STRINGS in batches.groups.report for batches in (train, held_out) if batches is not None):
        _say(f"{CONTROL_STRINGS}: {ADVICE}", ranks)
    _say(shown_example(train.groups, tokenizer), ranks)

    steps = math.ceil(round(args.epochs * train.steps_per_epoch, 6))
    train.last_step = args.max_steps or max(1, steps)
    return train, held_out


def _check_reward_models(train: Groups, held_out: Groups, source: str) -> None:
    """Raises UserError if the completions of both sets have not equally many scores."""
    expected = train.scores.shape[2:]
    if held_out.scores.shape[2:] != expected:
        numbers = f"{held_out.scores.shape[2]} scores for each completion, the training rows have {expected[0]}"
        raise UserError(f"{source}: {numbers}")


def _max_length(args: Any, config: "PretrainedConfig") -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and args.max_length and args.max_length > positions:
        raise UserError(f"--max-length {args.max_length}: the model has {positions} positions")
    return args.max_length or positions or sys.maxsize


def _date_of_run(args: Any) -> date:
    """Today, or the date of the run that --resume continues: a chat template may write it into the rows."""
    path = Path(args.output_dir) / "run.json"
    if args.resume and path.exists():
        report = json.loads(path.read_text())["data"]["train"]
        if "date" in report:
            return date.fromisoformat(report["date"])
    return date.today()


def _say_longest(groups: Groups, budget: int, ranks: Ranks) -> None:
    """Print which row has more tokens than one pass should have."""
    sizes = groups.offsets[:, -1] - groups.offsets[:, 0]
    longest = int(sizes.argmax())
    if sizes[longest] > budget:
        row = f"row {int(groups.row_numbers[longest])} has {int(sizes[longest])} tokens"
        _say(f"{row}, more than --micro-batch-tokens {budget}, and gets a pass of its own; --max-length cuts it", ranks)


def _say(line: str, ranks: Ranks) -> None:
    """Print one line from the first process, above a progress bar."""
    if ranks.is_main:
        tqdm.write(line)
