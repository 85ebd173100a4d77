"""Log-probs of tokens in tiles, and their sums over completions, against a float64 log-softmax."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared import logprobs
from shared.logprobs import sum_over_completions, token_logps

ONE_LOGIT = (1, 1)
RAGGED = (7, 9)
ALL_TOKENS = (23, 9)
ALL_ENTRIES = (7, 50)
EVERYTHING = (99, 99)


def exact_logps(inputs: Sequence[Tensor], targets: Tensor, cap: float | None = None) -> Tensor:
    """From all logits at once; inputs: hidden states, weight, and perhaps a bias."""
    logits = torch.nn.functional.linear(*inputs)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logps = logits.log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error = actual.double() - expected
    return float(error.norm() / expected.norm())


@pytest.mark.parametrize("has_bias, cap", [(False, None), (True, None), (True, 3.0)])
@pytest.mark.parametrize("tile", [ONE_LOGIT, ALL_ENTRIES, ALL_TOKENS, RAGGED, EVERYTHING])
@pytest.mark.parametrize("kept", [0, 400, 10**6])  # no logits, those of the first tiles, all
def test_token_logps_and_gradients(
    monkeypatch: pytest.MonkeyPatch, kept: int, tile: tuple[int, int], has_bias: bool, cap: float | None
) -> None:
    monkeypatch.setitem(logprobs.TILE, "cpu", tile)
    monkeypatch.setattr(logprobs, "KEPT", kept)
    torch.manual_seed(0)
    inputs = [torch.randn(23, 8), torch.randn(50, 8)]
    bias = None
    if has_bias:
        bias = torch.randn(50)
        inputs.append(bias)
    targets = torch.randint(50, (23,))
    upstream = torch.randn(23)

    exact_inputs = [x.double().requires_grad_() for x in inputs]
    expected = exact_logps(exact_inputs, targets, cap)
    expected_grads = torch.autograd.grad(expected, exact_inputs, upstream.double())

    for x in inputs:
        x.requires_grad_()
    logps = token_logps(inputs[0], inputs[1], bias, targets, cap)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)

    # the kept logits serve the first backward pass only
    for _ in range(2):
        grads = torch.autograd.grad(logps, inputs, upstream, retain_graph=True)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert relative_error(grad, expected_grad) <= 1e-6


def test_bfloat16_sums_over_tiles_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in bfloat16 would lose far more in 64 × 256 tiles than in one."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 8).bfloat16().requires_grad_()
    weight = torch.randn(2048, 8).bfloat16().requires_grad_()
    targets = torch.randint(2048, (64,))

    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = exact_logps(exact_inputs, targets)
    expected_grads = torch.autograd.grad(expected.sum(), exact_inputs)

    def largest_error(tile: tuple[int, int]) -> float:
        monkeypatch.setitem(logprobs.TILE, "cpu", tile)
        logps = token_logps(hidden, weight, None, targets)
        grads = torch.autograd.grad(logps.sum(), (hidden, weight))
        return max(map(relative_error, grads, expected_grads))

    error = largest_error(tile=(64, 2048))
    assert error < 1e-2
    assert largest_error(tile=(1, 8)) < 1.5 * error


@pytest.fixture
def float32_results(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU whose products of half precision have sums in float32, as a GPU's; returns the names of those called."""
    calls = []

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        calls.append("mm")
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        calls.append("addmm")
        return out.copy_(total + a.to(out_dtype) @ b.to(out_dtype))

    monkeypatch.setattr(logprobs, "_has_float32_results", lambda factor: factor.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    return calls


@pytest.mark.parametrize("has_bias", [False, True])
def test_products_that_are_not_rounded(
    monkeypatch: pytest.MonkeyPatch, float32_results: list[str], has_bias: bool
) -> None:
    """Log-probs are then as exact as the hidden states and weights."""
    monkeypatch.setitem(logprobs.TILE, "cpu", (16, 64))
    torch.manual_seed(0)
    inputs = [(4 * torch.randn(shape)).bfloat16().requires_grad_() for shape in ((40, 8), (200, 8))]
    bias = None
    if has_bias:
        bias = torch.randn(200).bfloat16().requires_grad_()
        inputs.append(bias)
    targets = torch.randint(200, (40,))
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    expected = exact_logps(exact_inputs, targets)
    expected_grads = torch.autograd.grad(expected.sum(), exact_inputs)
    expected = expected.detach()

    logps = token_logps(inputs[0], inputs[1], bias, targets)
    assert relative_error(logps.detach(), expected) < 1e-6
    assert set(float32_results) == {"mm"}
    grads = torch.autograd.grad(logps.sum(), inputs)
    assert set(float32_results) == {"mm", "addmm"}
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) < 5e-3  # the rounding of the result, and of the logits' gradient


def test_a_cpu_rounds() -> None:
    assert not logprobs._has_float32_results(torch.ones(1, dtype=torch.bfloat16))


def test_many_tiles_cost_no_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs.TILE, "cpu", (256, 16))
    torch.manual_seed(0)
    hidden = torch.randn(256, 8)
    weight = torch.randn(8192, 8)
    targets = torch.randint(8192, (256,))
    expected = exact_logps((hidden.double(), weight.double()), targets)

    errors = token_logps(hidden, weight, None, targets) - expected
    assert errors.square().mean().sqrt() < 1e-6
    assert errors.mean().abs() < 1e-7


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_no_float32_tensor_of_tokens_times_vocabulary() -> None:
    """The largest tensor alive while a long row goes through the head is one tile, forward and backward."""
    tokens = 4096
    vocabulary = 4096
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)
    with LargestTensor() as largest:
        token_logps(hidden, weight, None, targets).sum().backward()

    tile = math.prod(logprobs.TILE["cpu"])
    assert vocabulary <= largest.size <= tile < tokens * vocabulary


# the tokens, the vocabulary, and how many of their logits are kept
KEPT_LOGITS = [
    (100, 4096, 100 * 4096),
    (2100, 4096, 2**23),
    (3100, 3000, 3100 * 3000 - 512 * 2048),  # all but the first tile that would go beyond the bound
    (512, 2**17, 2**23),
]


@pytest.mark.parametrize(("tokens", "vocabulary", "kept"), KEPT_LOGITS)
def test_logits_are_kept_up_to_a_bound_for_the_backward_pass(tokens: int, vocabulary: int, kept: int) -> None:
    hidden = torch.randn(tokens, 2, requires_grad=True)
    weight = torch.randn(vocabulary, 2, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)

    logps = token_logps(hidden, weight, None, targets)
    kept_logits = logps.grad_fn.kept_logits
    sizes = [logits.numel() for logits in kept_logits.values()]
    assert sum(sizes) == kept <= logprobs.KEPT

    logps.sum().backward()
    assert not kept_logits


def test_no_logits_are_kept_when_the_hidden_states_need_no_gradient() -> None:
    hidden = torch.randn(3, 2)
    weight = torch.randn(50, 2, requires_grad=True)
    targets = torch.tensor([0, 7, 49])
    logps = token_logps(hidden, weight, None, targets)
    assert not logps.grad_fn.kept_logits


def test_a_frozen_head_gets_no_gradient() -> None:
    """That of the hidden states is the same, and no sum over the vocabulary is made for the head."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    bias = torch.randn(50, requires_grad=True)
    targets = torch.randint(50, (5,))
    expected, *_ = torch.autograd.grad(token_logps(hidden, weight, bias, targets).sum(), (hidden, weight, bias))
    token_logps(hidden, weight.detach(), bias.detach(), targets).sum().backward()
    assert torch.equal(hidden.grad, expected)

    shapes = []
    add = logprobs._add_product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_add_product", lambda total, a, b: shapes.append(total.shape) or add(total, a, b))
        token_logps(hidden, weight.detach(), None, targets).sum().backward()
    assert shapes == [hidden.shape]


def test_a_device_without_a_tile_of_its_own_gets_that_of_a_cpu() -> None:
    hidden = torch.empty(600, 2, device="meta")
    weight = torch.empty(9, 2, device="meta")
    first, second = logprobs._tiles(hidden, weight)
    assert first == (slice(0, 512), slice(0, 9))
    assert second == (slice(512, 1024), slice(0, 9))


def test_values_are_summed_over_each_completion() -> None:
    lengths = torch.tensor([[2, 1], [3, 4]])
    values = torch.randn(10, requires_grad=True)
    sums = sum_over_completions(values, lengths)
    pieces = values.double().split([2, 1, 3, 4])
    expected = torch.stack([piece.sum() for piece in pieces])
    torch.testing.assert_close(sums.double().flatten(), expected)

    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sums.backward(upstream)
    assert values.grad.tolist() == [1, 1, 2, 3, 3, 3, 4, 4, 4, 4]


def test_a_process_without_groups() -> None:
    """Its gradients are zeros, which the other processes can add to theirs."""
    hidden = torch.randn(1, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    no_tokens = torch.zeros(0, dtype=torch.long)
    no_lengths = torch.zeros(0, 2, dtype=torch.long)

    logps = token_logps(hidden[no_tokens], weight, None, no_tokens)
    sums = sum_over_completions(logps, no_lengths)
    assert sums.shape == (0, 2)

    sums.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(9, 4))
    assert torch.equal(hidden.grad, torch.zeros(1, 4))
