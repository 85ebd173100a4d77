"""The losses alone: closed forms, finite differences, brute force, invariances, extremes."""

import itertools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from algos import distill_dpo, ensemble_dpo, pessimistic_dpo
from algos.distill_dpo import distill_loss
from algos.dpo import dpo_loss
from algos.ensemble_dpo import ensemble_losses
from algos.exo import dpo_rw_loss, exo_loss
from algos.ipo import ipo_loss
from algos.pessimistic_dpo import pessimistic_loss
from algos.rm import rm_loss
from algos.sft import sft_loss
from algos.typo import typo_loss


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


# ---------------------------------------------------------------- the family


B, M = 6, 3
BETA, TAU, LAM, GAMMA = 0.3, 0.2, 0.05, 0.01
Numbers = list[Decimal]


def uniform(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random float64 numbers around 0."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target(k: int, seed: int = 31) -> Tensor:
    """(B, k) log-probabilities of a distribution over completions."""
    return uniform(B, k, seed=seed, scale=2).log_softmax(1)


def normalised(logits: Numbers) -> Numbers:
    """Softmax."""
    worths = [logit.exp() for logit in logits]
    return [worth / sum(worths) for worth in worths]


REF, REWARDS, ENSEMBLE = {k: double(B, k, seed=30 + k) for k in (2, 4, 8)}, uniform(B, 2, seed=32), uniform(B, 2, M)


def ours(name: str, k: int) -> Callable[[Tensor], Tensor]:
    """A loss of the contract as a function of its policy's log-probs (of the rewards, for rm) alone."""
    ref = REF.get(k)
    return {
        "dpo": lambda x: dpo_loss(x, ref, BETA),
        "ipo": lambda x: ipo_loss(x, ref, TAU),
        "exo": lambda x: exo_loss(x, ref, target(k), BETA),
        "dpo_rw": lambda x: dpo_rw_loss(x, ref, target(k), BETA),
        "typo": lambda x: typo_loss(x[:, :2], x[:, 2:], LAM),
        "distill": lambda x: distill_loss(x, ref, REWARDS, BETA),
        "pessimistic": lambda x: pessimistic_loss(dpo_loss(x, ref, BETA), x, GAMMA),
        "pessimistic_sample": lambda x: pessimistic_loss(distill_loss(x[:, :2], REF[2], REWARDS, BETA), x[:, 2:], 0.5),
        "ensemble": lambda x: ensemble_losses(x, ref, ENSEMBLE, BETA),
        "rm": lambda x: rm_loss(x),
    }[name]


def theirs(name: str, i: int, x: Numbers, ref: Numbers, p: Numbers) -> list[Decimal]:
    """The same for group i, number by number from the papers' equations, to 60 digits."""
    beta, tau, lam, gamma = (Decimal(value) for value in (BETA, TAU, LAM, GAMMA))
    rho = [a - b for a, b in zip(x, ref, strict=False)]
    h = rho[0] - rho[1]

    def ranking(rewards: Numbers) -> Decimal:
        worths, chance = [reward.exp() for reward in rewards], Decimal(1)
        for rank, worth in enumerate(worths):
            chance *= worth / sum(worths[rank:])
        return -chance.ln()

    def distill(rewards: Tensor) -> Decimal:
        return (Decimal(float(rewards[0])) - Decimal(float(rewards[1])) - beta * h) ** 2

    q = normalised([beta * r for r in rho])
    if name == "dpo":
        return [ranking([beta * r for r in rho])]
    if name == "ipo":
        return [(h - 1 / (2 * tau)) ** 2]
    if name == "exo":
        return [sum(a * (a / b).ln() for a, b in zip(q, p, strict=True))]
    if name == "dpo_rw":
        return [-sum(b * a.ln() for a, b in zip(q, p, strict=True))]
    if name == "typo":
        return [(1 + (x[1] - x[0]).exp()).ln() - lam * sum(x[2:]) / len(x[2:])]
    if name == "distill":
        return [distill(REWARDS[i])]
    if name == "pessimistic":
        return [ranking([beta * r for r in rho]) - gamma * (x[0] + x[1])]
    if name == "pessimistic_sample":
        return [distill(REWARDS[i]) - Decimal(0.5) * x[2]]
    if name == "ensemble":
        return [distill(ENSEMBLE[i, :, m]) for m in range(M)]
    return [ranking(x)]


ANY_K = [(name, k) for name in ("dpo", "exo", "dpo_rw", "rm") for k in (2, 4, 8)]
FAMILY = [*ANY_K, *((name, 2) for name in ("ipo", "distill", "pessimistic", "ensemble"))]
FAMILY += [("typo", 3), ("typo", 5), ("pessimistic_sample", 3)]  # a pair, and samples behind it


def point(name: str, k: int) -> Tensor:
    """(B, k) where a loss is looked at."""
    return uniform(B, k, seed=40, scale=3) if name == "rm" else double(B, k, seed=40)


@pytest.mark.parametrize("name,k", FAMILY)
def test_values(name: str, k: int) -> None:
    """float64's own rounding: inputs of size 30, losses up to 1e3."""
    x, ref, p = point(name, k), REF.get(k, REF[2]), target(k)
    losses = ours(name, k)(x)
    assert losses.shape == ((B, M) if name == "ensemble" else (B,))
    with localcontext() as context:
        context.prec = 60
        rows = [[Decimal(float(value)) for value in row] for row in torch.cat([x, ref, p.exp()], 1)]
        cuts = [(row[:k], row[k : -k or None], row[-k:]) for row in rows]
        expected = [[float(v) for v in theirs(name, i, *cut)] for i, cut in enumerate(cuts)]
    wanted = torch.tensor(expected, dtype=torch.float64).view_as(losses)
    torch.testing.assert_close(losses, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name,k", FAMILY)
def test_gradients(name: str, k: int) -> None:
    """Autograd's against central differences; the differences' own error is about 1e-9 of the loss."""
    x, loss = point(name, k).requires_grad_(), ours(name, k)
    weights = uniform(*loss(x).shape, seed=41)

    def value(x: Tensor) -> Tensor:
        return (weights * loss(x)).sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    torch.testing.assert_close(gradient, central(value, x.detach()), rtol=1e-6, atol=1e-7)
    assert float(gradient.abs().max()) > 1e-3


def test_distill_does_not_see_the_order_of_a_pair_nor_rewards_of_the_prompt() -> None:
    x, ref = double(B, 2, seed=50), REF[2]
    plain = distill_loss(x, ref, REWARDS, BETA)
    swapped = distill_loss(x.flip(1), ref.flip(1), REWARDS.flip(1), BETA)
    torch.testing.assert_close(plain, swapped, rtol=1e-12, atol=1e-12)
    shift = uniform(B, 1, seed=51, scale=10)
    torch.testing.assert_close(plain, distill_loss(x, ref, REWARDS + shift, BETA), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(plain, distill_loss(x.flip(1), ref, REWARDS, BETA))


@pytest.mark.parametrize("loss", [exo_loss, dpo_rw_loss])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_matching_losses_ignore_what_depends_on_the_prompt_alone(loss: Callable[..., Tensor], k: int) -> None:
    """Logs of a constant in π_θ or π_ref cancel in the softmax."""
    x, ref, shift = double(B, k, seed=52), REF[k], uniform(B, 1, seed=53, scale=20)
    plain = loss(x, ref, target(k), BETA)
    torch.testing.assert_close(plain, loss(x, ref + shift, target(k), BETA), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(plain, loss(x + shift, ref + shift, target(k), BETA), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(plain, loss(x.roll(1, 1), ref.roll(1, 1), target(k), BETA))
    order = torch.arange(k - 1, -1, -1)  # no column is special
    torch.testing.assert_close(plain, loss(x[:, order], ref[:, order], target(k)[:, order], BETA), rtol=1e-11, atol=0)


def test_reverse_and_forward_divergence_from_the_target() -> None:
    """Both least where q = p: EXO at 0, the cross-entropy at p's entropy; elsewhere they are different numbers."""
    x, ref, log_p = double(B, 4, seed=54), REF[4], target(4)
    at = ref + log_p / BETA
    zero = torch.zeros(B, dtype=torch.float64)
    torch.testing.assert_close(exo_loss(at, ref, log_p, BETA), zero, rtol=0, atol=1e-12)
    entropy = -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(dpo_rw_loss(at, ref, log_p, BETA), entropy, rtol=1e-12, atol=0)
    forward = dpo_rw_loss(x, ref, log_p, BETA) - entropy
    assert not torch.allclose(exo_loss(x, ref, log_p, BETA), forward, rtol=0.05)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_exo_pair_optimum(epsilon: float) -> None:
    """β h = log((1−ε)/ε): the value 0 and no slope there, slopes of opposite sign on either side."""
    log_p = torch.tensor([[1 - epsilon, epsilon]], dtype=torch.float64).log()
    best = math.log((1 - epsilon) / epsilon) / BETA
    slopes = []
    for h in (best - 0.5, best, best + 0.5):
        x = torch.tensor([[h - 40, -40.0]], dtype=torch.float64, requires_grad=True)
        loss = exo_loss(x, torch.full((1, 2), -40.0, dtype=torch.float64), log_p, BETA)
        slopes.append(float(torch.autograd.grad(loss.sum(), x)[0][0, 0]))
        assert float(loss.detach()) == pytest.approx(0, abs=1e-12) or h != best
    assert slopes[0] < -1e-6 and abs(slopes[1]) < 1e-12 and slopes[2] > 1e-6


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_dpo_rw_is_dpo_with_smoothed_labels(epsilon: float) -> None:
    x, ref = double(B, 2, seed=55), REF[2]
    p = torch.tensor([[1 - epsilon, epsilon]], dtype=torch.float64).expand(B, 2)
    smoothed = dpo_loss(x, ref, BETA, label_smoothing=epsilon)
    floor = p.clamp_min(1e-300).log()
    torch.testing.assert_close(dpo_rw_loss(x, ref, floor, BETA), smoothed, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_distill_of_unit_rewards_is_ipo(beta: float) -> None:
    """(1 − β h)² = β² (h − 1/β)²: IPO at τ = β/2."""
    x, ref = double(B, 2, seed=56), REF[2]
    rewards = uniform(B, 1, seed=57) + torch.tensor([1.0, 0.0], dtype=torch.float64)
    ipo = beta**2 * ipo_loss(x, ref, beta / 2)
    torch.testing.assert_close(distill_loss(x, ref, rewards, beta), ipo, rtol=1e-11, atol=1e-11)


def test_typo_without_its_second_term_is_dpo_without_a_reference() -> None:
    x, samples = double(B, 2, seed=58), double(B, M, seed=59)
    plain = dpo_loss(x, torch.zeros_like(x), 1.0)
    torch.testing.assert_close(typo_loss(x, samples, 0.0), plain, rtol=1e-12, atol=1e-12)
    second = typo_loss(x, samples, 0.7) - typo_loss(x, samples, 0.0)
    torch.testing.assert_close(second, -0.7 * samples.mean(1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("h", [-3.0, 0.0, 0.2, 9.0])
def test_rm_of_a_pair_is_bradley_terry(h: float) -> None:
    rewards = torch.tensor([[5 + h, 5.0]], dtype=torch.float64)
    assert float(rm_loss(rewards)) == pytest.approx(bradley_terry(float(rewards[0, 0]) - 5), rel=1e-12)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_rm_ranks_rewards_as_dpo_ranks_implicit_ones(k: int) -> None:
    x, ref = double(B, k, seed=60), REF[k]
    torch.testing.assert_close(rm_loss(BETA * (x - ref)), dpo_loss(x, ref, BETA), rtol=1e-11, atol=1e-12)
    rewards = uniform(B, k, seed=61)
    torch.testing.assert_close(rm_loss(rewards), rm_loss(rewards + 7), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 2])
def test_pessimistic_adds_the_negative_log_likelihood(columns: int) -> None:
    """One column at half the mean of two gives half the penalty."""
    losses, logps = uniform(B, seed=62), double(B, columns, seed=63)
    expected = losses + GAMMA * sum(-logps[:, c] for c in range(columns))
    torch.testing.assert_close(pessimistic_loss(losses, logps, GAMMA), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(pessimistic_loss(losses, logps, 0.0), losses, rtol=0, atol=0)


def test_pessimistic_optimum_of_the_rejected_completion() -> None:
    """At fixed π_θ(y_w), β h* = log(β/γ − 1) (Fisch et al., Proposition 3, with α = β/γ)."""
    gamma, beta, ref = 0.01, 0.3, torch.full((1, 2), -20.0, dtype=torch.float64)
    h = math.log(beta / gamma - 1) / beta
    x = torch.tensor([[-19.0, -19.0 - h]], dtype=torch.float64, requires_grad=True)
    loss = pessimistic_loss(dpo_loss(x, ref, beta), x, gamma)
    assert abs(float(torch.autograd.grad(loss.sum(), x)[0][0, 1])) < 1e-12


def test_ensemble_is_one_distillation_per_reward_model() -> None:
    x, ref = double(B, 2, seed=64), REF[2]
    losses = ensemble_losses(x, ref, ENSEMBLE, BETA)
    for m in range(M):
        torch.testing.assert_close(losses[:, m], distill_loss(x, ref, ENSEMBLE[..., m], BETA), rtol=1e-12, atol=0)


def test_losses_that_stand_in_two_files_agree() -> None:
    x, ref, losses = double(B, 2, seed=65), REF[2], uniform(B, seed=66)
    assert torch.equal(pessimistic_dpo.dpo_loss(x, ref, BETA), dpo_loss(x, ref, BETA))
    theirs = pessimistic_dpo.distill_loss(x, ref, REWARDS, BETA)
    assert torch.equal(theirs, distill_dpo.distill_loss(x, ref, REWARDS, BETA))
    both = [module.pessimistic_loss(losses, x, GAMMA) for module in (pessimistic_dpo, ensemble_dpo)]
    assert torch.equal(*both)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_at_the_reference(k: int) -> None:
    """π_θ = π_ref, in float32: the losses of step one."""
    x, log_p = REF[k].float(), target(k).float()
    mean_log_p = target(k).mean(1)

    def check(losses: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(losses.double(), expected.double().expand(B), rtol=2e-6, atol=1e-7)

    check(exo_loss(x, x, log_p, BETA), -math.log(k) - mean_log_p)
    check(dpo_rw_loss(x, x, log_p, BETA), torch.tensor(math.log(k)))
    check(dpo_loss(x, x, BETA), torch.tensor(math.lgamma(k + 1)))
    check(rm_loss(torch.full((B, k), 0.4)), torch.tensor(math.lgamma(k + 1)))
    if k > 2:
        return
    epsilon = 1e-3
    smoothed = torch.tensor([[1 - epsilon, epsilon]]).log().expand(B, 2)
    exo = -(math.log(epsilon) + math.log(1 - epsilon)) / 2 - math.log(2)
    check(exo_loss(x, x, smoothed, BETA), torch.tensor(exo))
    check(ipo_loss(x, x, TAU), torch.tensor(1 / (4 * TAU**2)))
    gap = (REWARDS[:, 0] - REWARDS[:, 1]).square()
    check(distill_loss(x, x, REWARDS.float(), BETA), gap)
    gaps = (ENSEMBLE[:, 0] - ENSEMBLE[:, 1]).square()
    torch.testing.assert_close(ensemble_losses(x, x, ENSEMBLE.float(), BETA).double(), gaps, rtol=2e-6, atol=1e-6)


HUGE, SMALL = 1e4, 1e-3
PAIR = [math.log(1 - SMALL), math.log(SMALL)]
# loss at ρ = (h, 0), β = 1, its slopes, for h = 1e4 and −1e4
EXTREMES = {
    "ipo": (lambda x: ipo_loss(x, 0 * x, 0.5), (9999.0**2, 10001.0**2), (2 * 9999.0, -2 * 10001.0)),
    "exo": (lambda x: exo_loss(x, 0 * x, x.new_tensor([PAIR]), 1.0), (-PAIR[0], -PAIR[1]), (0.0, 0.0)),
    "dpo_rw": (lambda x: dpo_rw_loss(x, 0 * x, x.new_tensor([PAIR]), 1.0), (10.0, 9990.0), (0.001, -0.999)),
    "typo": (lambda x: typo_loss(x, 0 * x[:, :1], 1.0), (0.0, 1e4), (0.0, -1.0)),
    "distill": (lambda x: distill_loss(x, 0 * x, 0 * x, 1.0), (1e8, 1e8), (2e4, -2e4)),
    "ensemble": (lambda x: ensemble_losses(x, 0 * x, 0 * x[..., None], 1.0), (1e8, 1e8), (2e4, -2e4)),
    "rm": (rm_loss, (0.0, 1e4), (0.0, -1.0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str, sign: int, dtype: torch.dtype) -> None:
    loss, values, slopes = EXTREMES[name]
    x = torch.tensor([[sign * HUGE, 0.0]], dtype=dtype, requires_grad=True)
    losses = loss(x)
    assert losses.dtype == dtype
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    value, slope = values[sign < 0], slopes[sign < 0]
    assert float(losses.detach().sum()) == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([slope, -slope], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["rm", "exo", "dpo_rw"])
def test_extreme_groups_of_four(name: str, dtype: torch.dtype) -> None:
    """Rewards of 3e4, and a target that is one completion to every digit."""
    log_p = torch.tensor([[0.0, -1e4, -2e4, -3e4]], dtype=dtype)
    right = torch.tensor([[3e4, 2e4, 1e4, 0.0]], dtype=dtype)
    losses = {
        "rm": (rm_loss, 6e4),
        "exo": (lambda x: exo_loss(x, 0 * x, log_p, 1.0), 3e4),
        "dpo_rw": (lambda x: dpo_rw_loss(x, 0 * x, log_p, 1.0), 3e4),
    }
    loss, wrong = losses[name]
    for x, value in ((right, 0.0), (right.flip(1), wrong)):
        x = x.clone().requires_grad_()
        found = loss(x)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert float(found.detach()) == pytest.approx(value, rel=1e-6, abs=1e-6)
        assert bool(gradient.isfinite().all())
