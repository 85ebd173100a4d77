"""Reward against KL to the reference: curves, the best that any policy can have, and densities on samples of it.

Curve              a run's checkpoints, prompt by prompt
at_equal_kl()      how much higher one curve is than another at the same KL
optimum_of()       KL and reward of π*_β, from samples of the reference and their rewards
log_weights()      densities on those samples that self-normalised importance sampling gives
divergence_from()  KL between two such densities
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scripts.lab.statistics import Statistic

GRID = 20  # values of the KL at which curves are compared


class Curve(NamedTuple):
    """C policies on n prompts, the reference among them; float64."""

    kls: Tensor  # (C, n)
    values: Tensor  # (C, n), rewards or what else is to be high


def at_equal_kl(ours: Curve, theirs: Curve) -> Statistic:
    """The mean difference of two curves, over values of the KL that both reach, evenly spaced from 0 on.

    Between its points a curve is linear. Points are in the order of their KL.
    """

    def statistic(counts: Tensor) -> Tensor:
        our_kls, our_values = mean_points(ours, counts)
        their_kls, their_values = mean_points(theirs, counts)

        our_largest = our_kls.max(1).values
        their_largest = their_kls.max(1).values
        largest = torch.minimum(our_largest, their_largest)
        shares = torch.arange(1, GRID + 1, dtype=torch.double) / GRID
        grid = largest.unsqueeze(1) * shares

        our_heights = interpolated(our_kls, our_values, grid)
        their_heights = interpolated(their_kls, their_values, grid)
        return (our_heights - their_heights).mean(1)

    return statistic


def mean_points(curve: Curve, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL and mean value of each policy in each resample of the prompts, (R, n) → (R, C) each."""
    weights = counts / counts.sum(1, keepdim=True)
    kls = weights @ curve.kls.T
    values = weights @ curve.values.T
    return kls, values


def interpolated(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation between the points of each row, (R, C), (R, C), (R, G) → (R, G).

    `at` lies between the least and the largest x of its row.
    """
    order = x.argsort(1)
    x = x.gather(1, order)
    y = y.gather(1, order)

    last = x.shape[1] - 1
    right = torch.searchsorted(x, at).clamp(1, last)
    left = right - 1
    left_x = x.gather(1, left)
    right_x = x.gather(1, right)
    left_y = y.gather(1, left)
    right_y = y.gather(1, right)

    share = (at - left_x) / (right_x - left_x)
    return left_y.lerp(right_y, share)


# ---------------------------------------------------------------- on samples of the reference


def log_weights(log_ratios: Tensor) -> Tensor:
    """The log of the share that each of M samples of π_ref has in π ∝ π_ref e^ρ, (n, M) → (n, M).

    log_ratios: ρ, up to a number for each prompt; log π - log π_ref of a policy, r/β of the optimum.
    """
    return log_ratios.double().log_softmax(1)


def divergence_from(log_shares: Tensor, other: Tensor) -> Tensor:
    """KL(p ‖ q) of each prompt, for log p and log q of M samples, (n, M), (n, M) → (n,)."""
    terms = log_shares.exp() * (log_shares - other)
    return terms.sum(1)


def optimum_of(rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(π*_β ‖ π_ref) and the mean reward of π*_β, from rewards of M samples of π_ref: (n, M) → (n,), (n,).

    The KL is at most log M. Both are too low where few samples have most of the weight.
    """
    log_shares = log_weights(rewards / beta)
    uniform = log_weights(torch.zeros_like(rewards))
    kl = divergence_from(log_shares, uniform)
    terms = log_shares.exp() * rewards
    return kl, terms.sum(1)
