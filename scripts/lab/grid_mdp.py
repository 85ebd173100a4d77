"""A denoising MDP on a grid: T steps from noise x_T to the end x_0, From r to Q*, arXiv 2404.12358, appendix B.

The state is the current point with the time, the action is the next point. Tables have an entry for each step, point
and next point, (T, X, X), the first step first; values V have one for each step and point, (T, X), and are 0 at x_0.
Where a density is meant, its sum over the grid replaces the integral.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ChainSolution(NamedTuple):
    """The optimum of E[Σ r] - β KL(π ‖ π_ref)."""

    q: Tensor  # (T, X, X)
    v: Tensor  # (T, X)
    logps: Tensor  # (T, X, X)


def solve_chain(rewards: Tensor, ref_logps: Tensor, beta: float, end_values: Tensor | None = None) -> ChainSolution:
    """Eqs 5 to 7 from the last step backwards; `end_values` (X,) is V at x_0, 0 if it is left out."""
    next_values = torch.zeros(rewards.shape[-1], dtype=rewards.dtype)
    if end_values is not None:
        next_values = end_values

    steps = []
    for step_rewards, step_ref in zip(rewards.flip(0), ref_logps.flip(0), strict=True):
        q = step_rewards + beta * step_ref + next_values
        next_values = beta * (q / beta).logsumexp(-1)
        steps.append((q, next_values))

    q = torch.stack([step[0] for step in reversed(steps)])
    v = torch.stack([step[1] for step in reversed(steps)])
    return ChainSolution(q, v, (q - v[..., None]) / beta)


def inverse_chain(q: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """The rewards whose Q* is q: Eq 7 with the V* of Eq 6, solved for r."""
    v = beta * (q / beta).logsumexp(-1)
    end = torch.zeros_like(v[:1])
    next_values = torch.cat([v[1:], end])
    return q - beta * ref_logps - next_values[:, None, :]


def end_logps(logps: Tensor) -> Tensor:
    """log π(x_0 | x_T) of a chain of steps, (T, X, X) → (X, X)."""
    total = logps[0]
    for step in logps[1:]:
        total = (total[:, :, None] + step).logsumexp(1)
    return total


def gaussian_steps(grid: Tensor, num_steps: int, shrinkage: float, scale: float) -> Tensor:
    """Denoising steps x' ~ N(shrinkage · x, scale²), normalised on the grid (X,): (T, X, X)."""
    deviations = (grid - shrinkage * grid[:, None]) / scale
    step = (-(deviations**2) / 2).log_softmax(-1)
    return step.expand(num_steps, -1, -1)
