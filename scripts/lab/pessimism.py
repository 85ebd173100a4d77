"""Pessimism over reward models, arXiv 2405.19316: Eq 8 for finite sets, for their convex hulls, and for balls.

Policies are tabular, in float64. r̄ is the reward of a convex hull whose optimal policy has the least KL(π_ref ‖ π).
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scripts.lab.tabular import grid, kl, minimise, tilted, vector


def pessimistic_score(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq 8: min_i (E_π r_i - E_ref r_i) - β KL(π ‖ π_ref), for log π (..., arms) and the rewards (models, arms)."""
    least = advantages(logps, ref_logps, rewards).amin(-1)
    return least - beta * kl(logps, ref_logps)


def advantages(logps: Tensor, ref_logps: Tensor, rewards: Tensor) -> Tensor:
    """E_π r_i - E_ref r_i of each reward model, (..., models), for log π (..., arms) and the rewards (models, arms)."""
    differences = logps.exp() - ref_logps.exp()
    return differences @ rewards.T


def forward_kls(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """KL(π_ref ‖ π_r) in nats, π_r being the optimal policy of r: rewards (..., arms) → (...)."""
    logps = tilted(ref_logps, rewards, beta)
    return kl(ref_logps, logps)


# ---------------------------------------------------------------- the convex hull


class HullPoint(NamedTuple):
    """r̄ of a convex hull."""

    weights: Tensor  # of the reward models, (models,)
    rewards: Tensor  # (arms,)
    divergence: float  # KL(π_ref ‖ π_r̄) in nats


def least_divergent(ref_logps: Tensor, rewards: Tensor, beta: float) -> HullPoint:
    """r̄ of the convex hull of the rewards (models, arms).

    The divergence is convex in r. So its minimum over the plane through those models that have a weight in r̄ is r̄
    itself: the best of all such minima with no negative weight is taken.
    """
    points = []
    for members in subsets(len(rewards)):
        weights = torch.zeros(len(rewards), dtype=torch.float64)
        weights[members] = plane_minimum(ref_logps, rewards[members], beta)
        mixture = weights @ rewards
        divergence = forward_kls(ref_logps, mixture, beta)
        points.append(HullPoint(weights, mixture, float(divergence)))

    inside = [point for point in points if point.weights.min() >= -1e-12]
    return min(inside, key=lambda point: point.divergence)


def subsets(count: int) -> Iterator[list[int]]:
    """All subsets of the numbers below `count` but the empty one."""
    for size in range(1, count + 1):
        for members in itertools.combinations(range(count), size):
            yield list(members)


def plane_minimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The weights, of sum 1 and any sign, of the reward models (models, arms) for the least divergence."""
    if len(rewards) == 1:
        return torch.ones(1, dtype=torch.float64)

    directions = rewards[1:] - rewards[0]

    def divergence(weights: Tensor) -> Tensor:
        return forward_kls(ref_logps, rewards[0] + weights @ directions, beta)

    start = torch.zeros(len(directions), dtype=torch.float64)
    others = minimise(divergence, start).parameters
    first = 1 - others.sum(0, keepdim=True)
    return torch.cat([first, others])


# ---------------------------------------------------------------- a ball of reward models


def gap_matrix(pairs: Tensor, weights: Tensor, num_arms: int) -> Tensor:
    """M with δᵀ M δ = Σ_ρ ρ(y_1, y_2) (δ(y_1) - δ(y_2))², for the weights ρ of the pairs: (arms, arms)."""
    identity = torch.eye(num_arms, dtype=torch.float64)
    firsts = identity[pairs[:, 0]]
    seconds = identity[pairs[:, 1]]
    differences = firsts - seconds  # (pairs, arms)
    return differences.T @ (weights[:, None] * differences)


class Ball(NamedTuple):
    """The set of Eq 12 of one reward model: all r + δ with δᵀ M δ ≤ λ."""

    rewards: Tensor  # r, (arms,)
    matrix: Tensor  # M, (arms, arms)
    size: float  # λ

    def score(self, logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
        """Eq 8 over the ball, for log π (..., arms) → (...): with d = π - π_ref, the least ⟨d, δ⟩ is -√(λ dᵀ M⁺ d)."""
        differences = logps.exp() - ref_logps.exp()
        inverse = torch.linalg.pinv(self.matrix)
        squares = (differences @ inverse) * differences
        margin = math.sqrt(self.size) * squares.sum(-1).sqrt()
        advantage = differences @ self.rewards
        return advantage - margin - beta * kl(logps, ref_logps)

    def boundary(self, count: int) -> Tensor:
        """Rewards on the boundary of the ball, for three arms: (count, 3)."""
        directions = plane_directions(count)
        squares = (directions @ self.matrix) * directions
        lengths = squares.sum(1, keepdim=True).sqrt()
        radius = math.sqrt(self.size)
        return self.rewards + radius * directions / lengths


def plane_directions(count: int) -> Tensor:
    """Unit vectors in all directions of the plane of rewards whose sum is 0, for three arms: (count, 3)."""
    angles = grid(0, 2 * math.pi, count + 1)[:-1]
    first = vector(1, -1, 0) / math.sqrt(2)
    second = vector(1, 1, -2) / math.sqrt(6)
    along_first = angles.cos()[:, None] * first
    along_second = angles.sin()[:, None] * second
    return along_first + along_second
