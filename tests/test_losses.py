"""The losses alone: closed forms, finite differences, brute force, invariances, extremes."""

import itertools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from algos.dpo import dpo_loss
from algos.sft import sft_loss


def double(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Random float64 log-probabilities."""
    return -30 + scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def central(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of a scalar function by central differences."""
    gradient = torch.zeros_like(x)
    for index in itertools.product(*map(range, x.shape)):
        up, down = x.clone(), x.clone()
        up[index] += step
        down[index] -= step
        gradient[index] = (f(up) - f(down)) / (2 * step)
    return gradient


def bradley_terry(h: float, epsilon: float = 0.0) -> float:
    """(1−ε)·log(1 + e^−h) + ε·log(1 + e^h) to 60 digits."""
    with localcontext() as context:
        context.prec, h_, epsilon_ = 60, Decimal(h), Decimal(epsilon)
        return float((1 - epsilon_) * (1 + (-h_).exp()).ln() + epsilon_ * (1 + h_.exp()).ln())


def plackett_luce(rewards: list[float]) -> float:
    """−log of the product over ranks of worth / worth of all that are left."""
    with localcontext() as context:
        context.prec = 60
        worths = [Decimal(reward).exp() for reward in rewards]
        chance = Decimal(1)
        for rank, worth in enumerate(worths):
            chance *= worth / sum(worths[rank:])
        return float(-chance.ln())


def test_sft_is_the_negative_log_probability_of_each_token() -> None:
    logps = double(17).requires_grad_()
    losses = sft_loss(logps)
    torch.testing.assert_close(losses, -logps, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(gradient, -torch.ones_like(logps), rtol=0, atol=0)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 5.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_dpo_pair(beta: float, epsilon: float) -> None:
    logps, ref_logps = double(9, 2, seed=1), double(9, 2, seed=2)
    losses = dpo_loss(logps, ref_logps, beta, label_smoothing=epsilon)
    assert losses.shape == (9,)
    h = beta * ((logps[:, 0] - logps[:, 1]) - (ref_logps[:, 0] - ref_logps[:, 1]))
    expected = [bradley_terry(float(x), epsilon) for x in h]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_dpo_is_plackett_luce(k: int, beta: float) -> None:
    logps, ref_logps = double(6, k, seed=3), double(6, k, seed=4)
    losses = dpo_loss(logps, ref_logps, beta)
    expected = [plackett_luce(row) for row in (beta * (logps - ref_logps)).tolist()]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_plackett_luce_sums_to_one_over_all_orders() -> None:
    logps, ref_logps = double(1, 4, seed=5), double(1, 4, seed=6)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    chances = (-dpo_loss(logps[0][orders], ref_logps[0][orders], 0.3)).exp()
    assert float(chances.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("k,epsilon", [(2, 0.0), (2, 0.2), (4, 0.0), (8, 0.0)])
def test_dpo_gradient(k: int, epsilon: float) -> None:
    logps, ref_logps = double(5, k, seed=7).requires_grad_(), double(5, k, seed=8)
    weights = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return (weights * dpo_loss(x, ref_logps, 0.3, label_smoothing=epsilon)).sum()

    (gradient,) = torch.autograd.grad(value(logps), logps)
    torch.testing.assert_close(gradient, central(value, logps.detach()), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_dpo_pair_gradient_closed_form() -> None:
    """Rafailov et al.: −β σ(r_l − r_w) on the chosen completion, the opposite on the rejected."""
    logps, ref_logps = double(7, 2, seed=9).requires_grad_(), double(7, 2, seed=10)
    (gradient,) = torch.autograd.grad(dpo_loss(logps, ref_logps, 0.4).sum(), logps)
    h = 0.4 * ((logps - ref_logps)[:, 0] - (logps - ref_logps)[:, 1]).detach()
    expected = -0.4 / (1 + h.exp())
    torch.testing.assert_close(gradient, torch.stack([expected, -expected], 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k,epsilon", [(2, 0.0), (2, 0.1), (4, 0.0)])
def test_dpo_ignores_what_depends_on_the_prompt_alone(k: int, epsilon: float) -> None:
    logps, ref_logps = double(6, k, seed=11), double(6, k, seed=12)
    shift = double(6, 1, seed=13, scale=20)
    plain = dpo_loss(logps, ref_logps, 0.1, label_smoothing=epsilon)
    shifted = dpo_loss(logps, ref_logps + shift, 0.1, label_smoothing=epsilon)
    torch.testing.assert_close(plain, shifted, rtol=1e-12, atol=1e-12)
    both = dpo_loss(logps + shift, ref_logps + shift, 0.1, label_smoothing=epsilon)
    torch.testing.assert_close(plain, both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("h", [1e4, -1e4])
def test_dpo_extreme_pair(h: float, epsilon: float, dtype: torch.dtype) -> None:
    logps = torch.tensor([[h, 0.0]], dtype=dtype, requires_grad=True)
    loss = dpo_loss(logps, torch.zeros(1, 2, dtype=dtype), 1.0, label_smoothing=epsilon)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    value = epsilon * h if h > 0 else (1 - epsilon) * -h
    slope = epsilon if h > 0 else -(1 - epsilon)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6, abs=1e-12)
    assert gradient[0].tolist() == pytest.approx([slope, -slope], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpo_extreme_ranking(dtype: torch.dtype) -> None:
    """In float32, to the rounding of a reward of 3e4."""
    tolerance = 4e-3 if dtype == torch.float32 else 1e-6
    zeros = torch.zeros(1, 4, dtype=dtype)
    right = torch.tensor([[3e4, 2e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    wrong = right.detach().flip(1).requires_grad_()
    for logps, value, slopes in ((right, 0.0, [0, 0, 0, 0]), (wrong, 6e4, [-1, -1, -1, 3])):
        loss = dpo_loss(logps, zeros, 1.0)
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        assert float(loss.detach()) == pytest.approx(value, rel=1e-6, abs=1e-12)
        assert gradient[0].tolist() == pytest.approx(slopes, rel=tolerance, abs=1e-12)


@pytest.mark.parametrize("k,epsilon", [(2, 0.0), (2, 0.3), (3, 0.0), (4, 0.0), (8, 0.0)])
def test_dpo_at_the_reference(k: int, epsilon: float) -> None:
    """π_θ = π_ref: ln K!, and the gradient pushes the first up."""
    logps = double(5, k, seed=14).requires_grad_()
    losses = dpo_loss(logps, logps.detach(), 0.1, label_smoothing=epsilon)
    expected = torch.full((5,), math.log(math.factorial(k)), dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    slopes = [-0.1 * (1 - 2 * epsilon) / 2, 0.1 * (1 - 2 * epsilon) / 2] if k == 2 else None
    if slopes is None:  # −β (1 − Σ_{i ≤ k} 1 / (K − i)) for rank k from 0
        chances = list(itertools.accumulate(1 / (k - i) for i in range(k)))
        slopes = [-0.1 * (1 - chance) for chance in chances]
    torch.testing.assert_close(gradient, torch.tensor([slopes] * 5, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_dpo_keeps_float32() -> None:
    logps = double(3, 2).float()
    assert dpo_loss(logps, logps, 0.1).dtype == torch.float32
