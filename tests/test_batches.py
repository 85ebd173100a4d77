"""Which groups a step takes, how they are balanced over processes, and one packed row written out by hand."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from shared.batches import Batch, Batches, balance, load_batches
from shared.distributed import Ranks
from shared.groups import Groups, Requires


def ranks(rank: int = 0, world_size: int = 1) -> Ranks:
    return Ranks(rank, world_size, torch.device("cpu"), torch.float32)


def make_groups(sizes: list[tuple[int, ...]]) -> Groups:
    """Groups of a prompt and completions of these lengths, whose token ids are 100, 101, 102, …"""
    offsets = []
    total = 0
    for lengths in sizes:
        starts = [total]
        for length in lengths:
            total += length
            starts.append(total)
        offsets.append(starts)
    tokens = torch.arange(100, 100 + total, dtype=torch.int32)
    return Groups(tokens, torch.tensor(offsets), torch.arange(1, len(sizes) + 1), report={})


def groups_in(batches: Iterable[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.group_index.tolist()]


def test_a_packed_row_of_two_groups() -> None:
    #          group 0: p0 p1 | a0 a1 | b0        group 1: p0 | a0 | b0 b1
    groups = make_groups([(2, 2, 1), (1, 1, 2)])
    groups.ref_logps = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    groups.ref_token_logps = torch.arange(9) / 10
    batches = Batches(groups, 2, 100, None, ranks())

    (batch,) = batches.of_step(1)

    assert batch.input_ids.tolist() == [[100, 101, 102, 103, 104, 105, 106, 107, 108]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    # b0 of group 0 is predicted from p1 again, and both completions of group 1 from its p0
    assert batch.predictor_positions.tolist() == [1, 2, 5, 7]
    assert batch.predictor_of_token.tolist() == [0, 1, 0, 2, 2, 3]
    assert batch.targets.tolist() == [102, 103, 104, 106, 107, 108]
    assert batch.target_index.tolist() == [2, 3, 4, 6, 7, 8]
    assert batch.lengths.tolist() == [[2, 1], [1, 2]]
    assert batch.last_positions.tolist() == [[3, 4], [6, 8]]
    assert batch.group_index.tolist() == [0, 1]
    assert batch.spans.groups == [(2, (2, 1)), (1, (1, 2))]
    assert torch.equal(batch.ref_logps, groups.ref_logps)
    assert torch.equal(batch.ref_token_logps, groups.ref_token_logps[batch.target_index])
    assert len(batch.scores) == 0
    assert (batch.global_groups, batch.global_tokens) == (2, 6)


def test_a_process_without_a_group_has_one_token_that_predicts_nothing() -> None:
    batches = Batches(make_groups([(2, 2, 1)]), 1, 100, None, ranks(1, 2))
    (batch,) = batches.of_step(1)
    assert batch.input_ids.shape == (1, 1)
    assert batch.lengths.shape == (0, 2)
    assert len(batch.targets) == len(batch.predictor_positions) == 0
    assert batch.is_last


@pytest.mark.parametrize("seed", [None, 3])
def test_every_epoch_takes_each_group_once(seed: int | None) -> None:
    batches = Batches(make_groups([(1, 1)] * 10), 4, 100, seed, ranks())
    assert batches.steps_per_epoch == 3

    epochs = []
    for first_step in (1, 4):
        steps = [batches.groups_of(step).tolist() for step in range(first_step, first_step + 3)]
        assert [len(indices) for indices in steps] == [4, 4, 2]
        epochs.append(steps[0] + steps[1] + steps[2])

    for order in epochs:
        assert sorted(order) == list(range(10))
    if seed is None:
        assert epochs == [list(range(10))] * 2
    else:
        assert epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed_alone() -> None:
    """Not on which steps were asked for before, nor on processes or the budget."""
    groups = make_groups([(1, 1)] * 10)
    batches = Batches(groups, 4, 100, 3, ranks())
    forwards = [batches.groups_of(step).tolist() for step in range(1, 7)]
    backwards = [batches.groups_of(step).tolist() for step in range(6, 0, -1)]
    other = Batches(groups, 4, 2, 3, ranks(1, 3))
    assert backwards == forwards[::-1]
    assert [other.groups_of(step).tolist() for step in range(1, 7)] == forwards


@pytest.mark.parametrize("world_size", [1, 3])
def test_processes_share_out_the_groups_of_a_step(world_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (30, 3), generator=generator).tolist()
    groups = make_groups([tuple(row) for row in lengths])

    of_ranks = []
    for rank in range(world_size):
        batches = Batches(groups, 16, 100, 7, ranks(rank, world_size))
        of_ranks.append(list(batches.of_step(1)))

    assert len({len(micro_batches) for micro_batches in of_ranks}) == 1
    together = [i for micro_batches in of_ranks for i in groups_in(micro_batches)]
    assert sorted(together) == sorted(batches.groups_of(1).tolist())
    for micro_batches in of_ranks:
        last = [batch.is_last for batch in micro_batches]
        assert last == [False] * (len(last) - 1) + [True]
        assert all(batch.input_ids.numel() <= 100 for batch in micro_batches)


def test_all_batches_stop_where_the_run_stops() -> None:
    batches = Batches(make_groups([(1, 1)] * 10), 4, 100, None, ranks())
    assert groups_in(batches.all_batches()) == list(range(10))
    batches.last_step = 2
    assert groups_in(batches.all_batches()) == list(range(8))
    batches.last_step = 7
    assert groups_in(batches.all_batches()) == list(range(10))


def test_progress_goes_from_0_to_1() -> None:
    batches = Batches(make_groups([(1, 1)] * 4), 2, 100, None, ranks())
    batches.last_step = 5
    progress = [next(batches.of_step(step)).progress for step in range(1, 6)]
    assert progress == [0, 0.25, 0.5, 0.75, 1]


def test_balance() -> None:
    assert balance([5, 3, 4, 2], budget=7, world_size=2) == [[[0, 3], [1, 2]]]
    # a group larger than the budget has a bin to itself
    assert balance([9, 1, 2, 1, 1], budget=7, world_size=1) == [[[0]], [[1, 2, 3, 4]]]
    # more processes than groups
    assert balance([3], budget=7, world_size=3) == [[[0], [], []]]


@pytest.mark.parametrize("budget, said", [(40, True), (4000, False)])
def test_the_longest_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: int, said: bool) -> None:
    rows = [{"prompt": "a", "completion": "ok"}, {"prompt": "a", "completion": "ok " * 50}]
    source = str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
    args = SimpleNamespace(
        train_data=source,
        eval_data=None,
        max_length=512,
        max_prompt_length=None,
        batch_size=1,
        micro_batch_tokens=budget,
        shuffle=False,
        epochs=1,
        max_steps=None,
        output_dir=str(tmp_path),
        resume=False,
    )
    config = tiny.make_config("llama", vocab=1000)
    tokenizer = tiny.make_tokenizer()
    load_batches(args, ranks(), tokenizer, config, Requires("first"))
    prompt, completion = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in rows[1].values())
    length = prompt + completion + 2  # the BOS and the EOS
    line = f"row 2 has {length} tokens, more than --micro-batch-tokens {budget}, and gets a pass of its own"
    assert (line in capsys.readouterr().out) == said
