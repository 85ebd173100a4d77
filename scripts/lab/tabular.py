"""Tabular policies: one logit for each of a few completions of one prompt, trained to the optimum in float64."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def vector(*values: float) -> Tensor:
    """A float64 tensor of the given values."""
    return torch.tensor(values, dtype=torch.float64)


def matrix(rows: Sequence[Any]) -> Tensor:
    """A float64 tensor of the given rows, which may be nested."""
    return torch.tensor(rows, dtype=torch.float64)


def grid(start: float, end: float, count: int) -> Tensor:
    """Evenly spaced float64 numbers, both ends included: (count,)."""
    return torch.linspace(start, end, count, dtype=torch.float64)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Independent normal numbers of that shape, with the mean 0 and the standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform_logps(num_completions: int) -> Tensor:
    """Log-probs of the uniform distribution, (num_completions,)."""
    logp = -math.log(num_completions)
    return torch.full((num_completions,), logp, dtype=torch.float64)


def ordered_pairs(num_completions: int) -> Tensor:
    """All (winner, loser) index pairs of distinct completions, (num_pairs, 2)."""
    pairs = itertools.permutations(range(num_completions), 2)
    return torch.tensor(list(pairs))


def total_variation(p: Tensor, q: Tensor) -> float:
    """The distance of two distributions, from 0 to 1."""
    differences = (p - q).abs()
    return float(differences.sum() / 2)


def random_policies(count: int, num_completions: int, seed: int) -> Tensor:
    """Log-probs of policies drawn uniformly from the simplex, (count, num_completions)."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, num_completions, generator=generator, dtype=torch.float64)
    exponentials = -uniform.log()
    return exponentials.log() - exponentials.sum(1, keepdim=True).log()


def all_orders(num_completions: int) -> Tensor:
    """All orders of the completions, the best first, (orders, num_completions)."""
    orders = itertools.permutations(range(num_completions))
    return torch.tensor(list(orders))


# ---------------------------------------------------------------- the KL-regularised objective


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats over the last dimension, from log-probs. Completions with p = 0 add nothing."""
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0)
    return terms.sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """H(p) in nats over the last dimension, from log-probs."""
    p = log_p.exp()
    terms = torch.where(p > 0, p * log_p, 0)
    return -terms.sum(-1)


def objective(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """E_π[r] - β KL(π ‖ π_ref) over the last dimension, from log π and log π_ref."""
    expected_rewards = (logps.exp() * rewards).sum(-1)
    return expected_rewards - beta * kl(logps, ref_logps)


def tilted(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Log-probs of π_ref exp(r/β) / Z over the last dimension, which maximise `objective`."""
    return (ref_logps + rewards / beta).log_softmax(-1)


def log_partition(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z = log Σ π_ref exp(r/β) over the last dimension. β log Z is the maximum of `objective`."""
    return (ref_logps + rewards / beta).logsumexp(-1)


def bradley_terry(pi_star: Tensor, pairs: Tensor) -> Tensor:
    """P(y_w ≻ y_l) = π*(y_w) / (π*(y_w) + π*(y_l)) of (winner, loser) index pairs: (num_pairs,)."""
    winners = pairs[:, 0]
    return pi_star[winners] / pi_star[pairs].sum(1)


def plackett_luce(rewards: Tensor, orders: Tensor) -> Tensor:
    """P(order) of each row of `orders`: each place takes one of the remaining completions in proportion to exp(r)."""
    probabilities = []
    for order in orders:
        worths = rewards[order].exp()
        probability = torch.ones((), dtype=rewards.dtype)
        for place in range(len(worths)):
            probability = probability * worths[place] / worths[place:].sum()
        probabilities.append(probability)
    return torch.stack(probabilities)


def frontier(ref_logps: Tensor, rewards: Tensor, divergences: Tensor) -> Tensor:
    """The largest E_π[r] of all policies with KL(π ‖ π_ref) at most each divergence, (divergences,), by bisection.

    It is that of `tilted` with the β at which the divergence is reached, for β from 1e-4 to 1e4.
    """
    low = torch.full_like(divergences, -4)  # log10 β
    high = torch.full_like(divergences, 4)
    for _ in range(60):
        middle = (low + high) / 2
        logps = tilted(ref_logps, rewards, 10 ** middle[:, None])
        is_too_far = kl(logps, ref_logps) > divergences
        low = torch.where(is_too_far, middle, low)
        high = torch.where(is_too_far, high, middle)

    logps = tilted(ref_logps, rewards, 10 ** high[:, None])
    return (logps.exp() * rewards).sum(1)


# ---------------------------------------------------------------- optima


class Optimum(NamedTuple):
    """The point at which `minimise` stopped."""

    parameters: Tensor  # of a tabular policy: its logits
    loss: float
    gradient_norm: float
    newton_step: float  # largest entry of the Newton step that remains

    @property
    def policy(self) -> Tensor:
        """The softmax of the parameters."""
        return self.parameters.softmax(0)


def fit_policy(losses: Callable[[Tensor], Tensor], weights: Tensor, start: Tensor) -> Optimum:
    """The softmax policy that minimises the weighted sum of losses(log π_θ), from the logits `start`."""

    def loss(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        weighted_losses = weights * losses(logps)
        return weighted_losses.sum()

    return minimise(loss, start)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, max_steps: int = 200) -> Optimum:
    """Minimise a scalar function of a vector by Newton's method with backtracking."""
    gradient_of = torch.func.grad(loss)
    hessian_of = torch.func.hessian(loss)

    x = start.clone()
    for _ in range(max_steps):
        value = loss(x)
        gradient = gradient_of(x)
        step = newton_step(gradient, hessian_of(x))

        largest_entry = float(step.abs().max())
        largest_parameter = float(x.abs().max())
        if largest_entry <= 1e-11 * (1 + largest_parameter):
            break

        slope = gradient @ step
        rounding = 1e-13 * value.abs()  # lets a step pass whose gain is lost in rounding
        size = 1.0
        while not loss(x + size * step) <= value + 1e-4 * size * slope + rounding:
            size /= 2
        x = x + size * step

    gradient_norm = float(gradient.norm())
    return Optimum(x, float(value), gradient_norm, largest_entry)


def newton_step(gradient: Tensor, hessian: Tensor) -> Tensor:
    """The Newton step with the absolute curvature, so that it always descends.

    The step is zero along directions without curvature. A softmax has one: the shift of all logits.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(hessian)
    curvature = eigenvalues.abs()
    is_curved = curvature > 1e-10 * curvature.max()
    inverse = torch.where(is_curved, 1 / curvature, 0)
    rotated_gradient = eigenvectors.T @ gradient
    return -eigenvectors @ (inverse * rotated_gradient)


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, rate: float, num_steps: int) -> Tensor:
    """The path of gradient descent on a scalar function of a vector, from the start on: (num_steps + 1, size)."""
    gradient_of = torch.func.grad(loss)
    path = [start]
    for _ in range(num_steps):
        path.append(path[-1] - rate * gradient_of(path[-1]))
    return torch.stack(path)
