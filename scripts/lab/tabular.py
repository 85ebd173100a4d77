"""Tabular policies: one logit for each of a few completions of one prompt, trained to the optimum in float64."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def vector(*values: float) -> Tensor:
    """A float64 tensor of the given values."""
    return torch.tensor(values, dtype=torch.float64)


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
