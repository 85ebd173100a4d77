"""`--compile`: one piece of code for rows of all sizes, the same numbers up to rounding, log-ratios of exactly 0."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from shared import attention, logprobs
from shared.batches import Batches
from shared.distributed import Ranks, inference, single_process
from shared.groups import Groups, Requires, load_groups
from shared.loading import load_policy, load_tokenizer
from shared.model import Policy

NUM_ROWS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows of many lengths."""
    folder = tmp_path_factory.mktemp("compile")
    tiny.make_model(folder / "llama", "llama")
    tiny.make_rows(NUM_ROWS, seed=0, path=folder / "rows.jsonl")
    return folder


def groups_of(folder: Path) -> Groups:
    tokenizer, _ = load_tokenizer(str(folder / "llama"))
    return load_groups(str(folder / "rows.jsonl"), tokenizer, Requires("pair"), 256, None)


def load(folder: Path, ranks: Ranks, is_compiled: bool) -> Policy:
    args = SimpleNamespace(
        model=str(folder / "llama"),
        activation_checkpointing=False,
        compile=is_compiled,
        lora_rank=None,
        lora_alpha=None,
    )
    return load_policy(args, ranks)


# ---------------------------------------------------------------- without the compiler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_in_one_pass(dtype: torch.dtype) -> None:
    """It is that of a log-softmax, in float64; targets outside of the tile have no share in it."""
    torch.manual_seed(0)
    logits = torch.randn(5, 7)
    index = torch.tensor([0, 6, 3, 3, 2])[:, None]
    inside = torch.tensor([True, True, False, True, False])[:, None]
    logsumexp = logits.logsumexp(-1, keepdim=True) + 0.3  # of a larger vocabulary
    grad = torch.randn(5, 1)

    gradient = logprobs._gradient_in_one_pass(logits, index, inside, logsumexp, grad, dtype)
    assert gradient.dtype == dtype
    expected = -(logits.double() - logsumexp.double()).exp()
    for row in range(5):
        if inside[row]:
            expected[row, index[row]] += 1
    expected *= grad.double()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), expected, atol=tolerance, rtol=tolerance)


def test_keys_are_gathered_in_both_passes() -> None:
    """The gradient is that of indexing, to the bit, whatever the number of completions."""
    groups = [(5, (3, 1, 4)), (1, (2,)), (7, (1, 6)), (1, ()), (3, (1, 1))]
    spans = attention.Spans.of(groups, "cpu", torch.float32)
    tokens = sum(prompt + sum(completions) for prompt, completions in groups)
    torch.manual_seed(0)
    x = torch.randn(tokens, 2, 4, requires_grad=True)
    weights = torch.randn(len(spans.key_index), 2, 4)

    gathered = attention._Gathered.apply(x, spans.key_index, spans.key_places)
    indexed = x[spans.key_index]
    assert torch.equal(gathered, indexed)
    (ours,) = torch.autograd.grad((gathered * weights).sum(), x)
    (theirs,) = torch.autograd.grad((indexed * weights).sum(), x)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lora_rank", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_one_process_casts_as_fsdp_does(folder: Path, tmp_path: Path, lora_rank: int | None) -> None:
    """In bfloat16, weights that FSDP2 casts, which it does with --activation-checkpointing, train to the same bits."""
    lines = []
    for checkpointing in (False, True):
        lines.append(
            tiny.run(
                "algos/dpo.py",
                tmp_path / str(checkpointing),
                model=folder / "llama",
                train_data=folder / "rows.jsonl",
                dtype="bfloat16",
                batch_size=8,
                micro_batch_tokens=256,
                max_steps=3,
                log_every=1,
                learning_rate=1e-3,
                lora_rank=lora_rank,
                activation_checkpointing=checkpointing,
            )
        )
    ours, fsdp = [[(line["loss"], line["grad_norm"]) for line in run] for run in lines]
    assert ours == fsdp


# ---------------------------------------------------------------- with the compiler


@torch.library.custom_op("stand_in::attention", mutates_args=())
def stand_in(
    query: Tensor, key: Tensor, value: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_q: int, max_k: int
) -> Tensor:
    """What the compiler sees of the GPU's kernel: an operation with sizes that differ from row to row."""
    return query * value.mean() + key.mean()


@stand_in.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(query)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    query, key, value, *_ = inputs
    ctx.save_for_backward(query, key, value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value = ctx.saved_tensors
    key_grad = torch.ones_like(key) * grad.sum() / key.numel()
    value_grad = torch.ones_like(value) * (grad * query).sum() / value.numel()
    return grad * value.mean(), key_grad, value_grad, None, None, None, None


stand_in.register_autograd(_backward, setup_context=_keep)


def kernel(
    *segments: Any, scale: float | None = None, window_size: tuple = (-1, -1), enable_gqa: bool = False
) -> Tensor:
    return torch.ops.stand_in.attention(*segments)


def values_and_gradients(policy: Policy, batches: Batches) -> list[Tensor]:
    """log π of every micro-batch, and the gradients of their sum."""
    results = []
    for step in range(1, batches.steps_per_epoch + 1):
        for batch in batches.of_step(step):
            logps = policy.logps(batch)
            logps.sum().backward()
            results.append(logps.detach())
    return [*results, *(parameter.grad for parameter in policy.parameters())]


@pytest.mark.slow
def test_one_graph_for_all_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where attention is one call. The layers but the last share one graph, without a break."""
    import torch.nn.attention.varlen
    from torch._dynamo.utils import counters

    groups = groups_of(folder)
    with single_process("float32") as ranks:
        batches = Batches(groups, 4, 10_000, None, ranks)
        plain = load(folder, ranks, False)
        compiled = load(folder, ranks, True)
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
        monkeypatch.setattr(attention, "_per_segment", attention._variable_length)
        attention._parameters_of_kernel.cache_clear()
        counters.clear()
        expected = values_and_gradients(plain, batches)
        results = values_and_gradients(compiled, batches)
        attention._parameters_of_kernel.cache_clear()

    num_head_graphs = 2  # forward and backward
    assert counters["stats"]["unique_graphs"] <= 1 + 2 * num_head_graphs
    assert not counters["graph_break"]
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_ratios_are_exactly_0_at_the_start(folder: Path, dtype: str) -> None:
    """The forward pass of the reference, without gradients, has the bits of the one that is trained."""
    groups = groups_of(folder)
    with single_process(dtype) as ranks:
        batches = Batches(groups, 8, 10_000, None, ranks)
        policy = load(folder, ranks, True)
        for batch in batches.of_step(1):
            with inference(policy):
                ref_logps = policy.logps(batch)
            assert not ref_logps.requires_grad
            logps = policy.logps(batch)
            assert logps.requires_grad
            assert torch.equal(logps, ref_logps)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["algos/dpo.py", "algos/rm.py"])
def test_training_is_the_same_up_to_rounding(folder: Path, tmp_path: Path, script: str) -> None:
    lines = []
    for is_compiled in (False, True):
        options = {"model": folder / "llama", "train_data": folder / "rows.jsonl", "compile": is_compiled}
        options |= {"batch_size": 8, "max_steps": 3, "log_every": 1, "learning_rate": 1e-3}
        lines.append(tiny.run(script, tmp_path / str(is_compiled), **options))
    for plain, compiled in zip(*lines, strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    if script == "algos/dpo.py":
        assert lines[1][0]["rewards/margins"] == 0
