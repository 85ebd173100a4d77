"""Bandits of the TYPO paper (arXiv 2407.09072): the loss family QPO, f-divergences, pairs with labels, and Adam.

QPO is the paper's Eq 11. Of a pair with u = π_θ(y|x)/π_ref(y|x) its loss is

    ψ(μ(u_w) - μ(u_l))

with an increasing μ and a quasi-convex ψ. DPO, IPO, GPO with SLiC, and f-DPO are members. Here μ is a function of
ρ = log u, so that it stays finite for small u.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.lab.tabular import bradley_terry, newton_step, ordered_pairs

Function = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------- the family


def qpo_loss(logps: Tensor, ref_logps: Tensor, mu: Function, psi: Function) -> Tensor:
    """ψ(μ_w - μ_l), Eq 11. logps, ref_logps (B, 2), preferred first → (B,)."""
    levels = mu(logps - ref_logps)  # (B, 2)
    return psi(levels[:, 0] - levels[:, 1])


def logarithm(log_ratios: Tensor) -> Tensor:
    """μ = log, the choice of DPO, IPO and GPO."""
    return log_ratios


def logistic(lam: float) -> Function:
    """ψ of DPO and f-DPO: -log σ(λ h)."""
    return lambda h: -F.logsigmoid(lam * h)


def squared(lam: float) -> Function:
    """ψ of IPO: (h - 1/(2λ))²."""
    return lambda h: (h - 1 / (2 * lam)) ** 2


def hinge(lam: float) -> Function:
    """ψ of SLiC in GPO's form: max(0, 1 - λ h)."""
    return lambda h: F.relu(1 - lam * h)


# ---------------------------------------------------------------- f-DPO


class Divergence(NamedTuple):
    """D_f(π ‖ π_ref) = Σ π_ref f(u) with u = π/π_ref. f-DPO takes μ = f'."""

    generator: Function  # f of u
    slope: Function  # f' of ρ = log u
    inverse: Function  # ρ of f'


REVERSE_KL = Divergence(
    generator=lambda u: u * u.log(),
    slope=lambda rho: 1 + rho,
    inverse=lambda slope: slope - 1,
)
FORWARD_KL = Divergence(
    generator=lambda u: -u.log(),
    slope=lambda rho: -(-rho).exp(),
    inverse=lambda slope: -(-slope).log(),
)
# twice the Jensen-Shannon divergence: u log u - (1+u) log((1+u)/2)
JENSEN_SHANNON = Divergence(
    generator=lambda u: u * u.log() - (1 + u) * ((1 + u) / 2).log(),
    slope=lambda rho: math.log(2) + F.logsigmoid(rho),
    inverse=lambda slope: slope - (2 - slope.exp()).log(),
)


def alpha_divergence(alpha: float) -> Divergence:
    """f(u) = (u^(1-α) - (1-α) u - α) / (α (α-1)), for α other than 0 and 1. Its slope is (1 - u^-α) / α."""
    scale = alpha * (alpha - 1)
    return Divergence(
        generator=lambda u: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / scale,
        slope=lambda rho: -(-alpha * rho).expm1() / alpha,
        inverse=lambda slope: -(1 - alpha * slope).log() / alpha,
    )


def f_dpo_loss(logps: Tensor, ref_logps: Tensor, divergence: Divergence, lam: float) -> Tensor:
    """-log σ(λ (f'(u_w) - f'(u_l))). logps, ref_logps (B, 2), preferred first → (B,)."""
    return qpo_loss(logps, ref_logps, divergence.slope, logistic(lam))


def f_tilted(ref_logps: Tensor, rewards: Tensor, divergence: Divergence, lam: float) -> Tensor:
    """Log-probs of the policy that maximises E_π[r] - λ D_f(π ‖ π_ref): λ f'(u) = r - ν. ref_logps, rewards (n,).

    ν is what normalises it. We bisect for ρ of the best completion, which lies between 0 and -log π_ref.
    """
    best = int(rewards.argmax())
    gaps = (rewards - rewards[best]) / lam  # ≤ 0, of f' to that of the best
    low = torch.zeros_like(ref_logps[best])
    high = -ref_logps[best]
    for _ in range(100):
        middle = (low + high) / 2
        log_ratios = divergence.inverse(divergence.slope(middle) + gaps)
        mass = (ref_logps + log_ratios).logsumexp(0)
        if mass > 0:
            high = middle
        else:
            low = middle
    return ref_logps + divergence.inverse(divergence.slope(low) + gaps)


# ---------------------------------------------------------------- labelled pairs


class Labelled(NamedTuple):
    """(winner, loser) index pairs of distinct completions, and the probability of each."""

    pairs: Tensor  # (P, 2)
    weights: Tensor  # (P,), with the sum 1


def labelled(pi_star: Tensor, pair_weights: Tensor) -> Labelled:
    """Pairs with these weights, labelled by Bradley-Terry. pi_star (n,); pair_weights (n, n), symmetric."""
    pairs = ordered_pairs(len(pi_star))
    weights = pair_weights[pairs[:, 0], pairs[:, 1]] * bradley_terry(pi_star, pairs)
    is_drawn = weights > 0
    return Labelled(pairs[is_drawn], weights[is_drawn] / weights.sum())


def uniform_pairs(pi_star: Tensor) -> Labelled:
    """Each pair as often as any other: the paper's bandits."""
    n = len(pi_star)
    return labelled(pi_star, torch.ones(n, n, dtype=torch.float64))


def drawn_pairs(pi_star: Tensor, pi_ref: Tensor) -> Labelled:
    """Eq 1: two independent draws of π_ref; identical ones are left out."""
    return labelled(pi_star, torch.outer(pi_ref, pi_ref))


def chain_pairs(pi_star: Tensor) -> Labelled:
    """Only neighbours: the pairs (0, 1), (1, 2) and so on."""
    n = len(pi_star)
    above = torch.ones(n - 1, dtype=torch.float64).diag(1)
    return labelled(pi_star, above + above.T)


def ipo_reward(pi_star: Tensor, opponents: Tensor) -> Tensor:
    """E_{y' ~ opponents} p*(y ≻ y'), Eq 8, for every completion y; p*(y ≻ y) = ½. All tensors (n,)."""
    wins = pi_star[:, None] / (pi_star[:, None] + pi_star)  # (n, n)
    return wins @ opponents


# ---------------------------------------------------------------- optimizers


def minimise_each(loss: Callable[..., Tensor], starts: Tensor, *arguments: Tensor, max_steps: int = 100) -> Tensor:
    """Minimise many functions at once, as `tabular.minimise` does one, from the logits `starts` (B, n) → (B, n).

    loss(logits, *arguments) is the function of one problem; each of `arguments` has the problems as its first
    dimension.
    """
    values = torch.vmap(loss)
    gradients = torch.vmap(torch.func.grad(loss))
    hessians = torch.vmap(torch.func.jacrev(torch.func.grad(loss)))

    x = starts.clone()
    for _ in range(max_steps):
        before = values(x, *arguments)
        gradient = gradients(x, *arguments)
        steps = torch.vmap(newton_step)(gradient, hessians(x, *arguments))
        slopes = (gradient * steps).sum(1)
        rounding = 1e-13 * before.abs()

        sizes = torch.ones_like(before)
        for _ in range(60):
            limit = before + 1e-4 * sizes * slopes + rounding
            is_worse = ~(values(x + sizes[:, None] * steps, *arguments) <= limit)
            if not is_worse.any():
                break
            sizes[is_worse] /= 2

        x = x + sizes[:, None] * steps
        largest_entries = steps.abs().amax(1)
        if (largest_entries <= 1e-10 * (1 + x.abs().amax(1))).all():
            break
    return x


def adam_path(
    losses: Callable[[Tensor, int], Tensor], starts: Tensor, rates: Tensor, num_steps: int, max_norm: float = 10.0
) -> Tensor:
    """The logits of R policies under Adam: starts (R, n), rates (R, 1) → (num_steps + 1, R, n).

    losses(logits, step) gives the loss of each policy, (R,). The gradient of each is clipped to `max_norm`.
    """
    logits = starts.clone()
    mean = torch.zeros_like(starts)
    square = torch.zeros_like(starts)
    path = [logits]
    for step in range(num_steps):
        logits = logits.detach().requires_grad_()
        (gradients,) = torch.autograd.grad(losses(logits, step).sum(), logits)
        norms = gradients.norm(dim=1, keepdim=True)
        gradients = gradients * (max_norm / norms.clamp(min=max_norm))

        mean = 0.9 * mean + 0.1 * gradients
        square = 0.999 * square + 0.001 * gradients**2
        unbiased_mean = mean / (1 - 0.9 ** (step + 1))
        unbiased_square = square / (1 - 0.999 ** (step + 1))
        logits = logits.detach() - rates * unbiased_mean / (unbiased_square.sqrt() + 1e-8)
        path.append(logits)
    return torch.stack(path)
