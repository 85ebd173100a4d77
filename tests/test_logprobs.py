"""Chunked log-probs of tokens and their sums against float64 log-softmax."""

import math

import pytest
import torch

from shared import logprobs
from shared.logprobs import sequence_logps, token_logps


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [(1, 1), (7, 50), (23, 9), (7, 9), (99, 99)])  # one logit, ragged last tiles, all
@pytest.mark.parametrize("kept", [0, 400, 10**6])  # no logits, those of the first tiles, all
def test_token_logps_and_gradients(
    monkeypatch: pytest.MonkeyPatch, kept: int, tile: tuple[int, int], bias: bool
) -> None:
    monkeypatch.setitem(logprobs.TILE, "cpu", tile)
    monkeypatch.setattr(logprobs, "KEPT", kept)
    torch.manual_seed(0)
    inputs = [torch.randn(23, 8), torch.randn(50, 8)] + [torch.randn(50)] * bias
    targets, upstream = torch.randint(50, (23,)), torch.randn(23)

    doubles = [x.double().requires_grad_() for x in inputs]
    expected = torch.nn.functional.linear(*doubles).log_softmax(-1)[torch.arange(23), targets]
    singles = [x.clone().requires_grad_() for x in inputs]
    got = token_logps(*singles, *[None] * (not bias), targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    theirs = torch.autograd.grad((expected * upstream).sum(), doubles)
    for _ in range(2):  # kept logits serve the first backward pass only
        ours = torch.autograd.grad((got * upstream).sum(), singles, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.double() - b).norm() <= 1e-6 * b.norm()


def test_bfloat16_sums_over_tiles_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 8).bfloat16(), torch.randn(2048, 8).bfloat16(), torch.randint(2048, (64,))
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = (doubles[0] @ doubles[1].mT).log_softmax(-1)[torch.arange(64), targets]
    theirs = torch.autograd.grad(expected.sum(), doubles)
    errors = []
    for tile in ((64, 2048), (1, 8)):
        monkeypatch.setitem(logprobs.TILE, "cpu", tile)
        ours = torch.autograd.grad(token_logps(*inputs, None, targets).sum(), inputs)
        errors.append(max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)))
    assert errors[0] < 1e-2 and errors[1] < 1.5 * errors[0]  # sums in bfloat16 would lose far more in 64 × 256 tiles


def test_many_tiles_cost_no_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs.TILE, "cpu", (256, 16))
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(256, 8), torch.randn(8192, 8), torch.randint(8192, (256,))
    expected = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(256), targets]
    errors = token_logps(hidden, weight, None, targets) - expected
    assert errors.square().mean().sqrt() < 1e-6 and errors.mean().abs() < 1e-7


def test_no_float32_tensor_of_tokens_times_vocabulary() -> None:
    """The largest tensor alive while a long row goes through the head is one tile, forward and backward."""
    tokens, vocabulary = 4096, 4096

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.size = max(Largest.size, result.numel())
            return result

    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    with Largest():
        token_logps(hidden, weight, None, torch.zeros(tokens, dtype=torch.long)).sum().backward()
    assert vocabulary <= Largest.size <= math.prod(logprobs.TILE["cpu"]) < tokens * vocabulary


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "kept"),
    [
        (100, 4096, 100 * 4096),
        (2100, 4096, 2**23),
        (3100, 3000, 3100 * 3000 - 512 * 2048),  # the first tile that would go beyond the bound is not kept
        (512, 2**17, 2**23),
    ],
)
def test_logits_are_kept_up_to_a_bound_for_the_backward_pass(tokens: int, vocabulary: int, kept: int) -> None:
    hidden, weight = torch.randn(tokens, 2, requires_grad=True), torch.randn(vocabulary, 2, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)
    logps = token_logps(hidden, weight, None, targets)
    assert sum(logits.numel() for logits in logps.grad_fn.kept.values()) == kept <= logprobs.KEPT == 2**23
    logps.sum().backward()
    assert not logps.grad_fn.kept
    # nor does a pass without gradients, as its hidden states need none
    assert not token_logps(hidden.detach(), weight, None, targets).grad_fn.kept


def test_sequence_logps_sum_each_completion() -> None:
    lengths = torch.tensor([[2, 1], [3, 4]])
    values = torch.randn(10, dtype=torch.float32, requires_grad=True)
    sums = sequence_logps(values, lengths)
    parts = values.double().split([2, 1, 3, 4])
    torch.testing.assert_close(sums.double().flatten(), torch.stack([p.sum() for p in parts]))
    (sums * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert values.grad.tolist() == [1, 1, 2, 3, 3, 3, 4, 4, 4, 4]


def test_a_process_without_groups() -> None:
    hidden, weight = torch.randn(1, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    sums = sequence_logps(token_logps(hidden[empty], weight, None, empty), torch.zeros(0, 2, dtype=torch.long))
    assert sums.shape == (0, 2)
    sums.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(9, 4)) and torch.equal(hidden.grad, torch.zeros(1, 4))
