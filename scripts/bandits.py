"""The papers' experiments that need no language model: tabular softmax policies trained to the optimum in float64.

The losses are those of `algos/`, called on the log-probs of a handful of completions of one prompt. Every number that
a paper's claim gives in closed form, or that was worked out for its setting, is printed beside ours; exit code 1 if
one disagrees. One figure per paper goes into `--output-dir`:

    typo.png          interpolation and preservation (TYPO, arXiv text: Figs. 2, 3, 5, 6; appendix A)
    distillation.png  reward-model distillation (2405.19316): Propositions 3 and 7, Theorems 1 and 2
    exo.png           EXO (2402.00856): Eqs 16 and 20 at finite K, mode seeking (Fig. 1)

    python scripts/bandits.py --output-dir runs/bandits
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from algos.distill_dpo import distill_loss
from algos.dpo import dpo_loss
from algos.ensemble_dpo import ensemble_losses
from algos.exo import dpo_rw_loss, exo_loss
from algos.ipo import ipo_loss
from algos.pessimistic_dpo import pessimistic_loss
from algos.typo import typo_loss

# Okabe and Ito's colours, which stay apart for colour-blind readers
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
STYLES = {"DPO": (BLUE, "-"), "IPO": (ORANGE, "--"), "TYPO": (GREEN, "-.")}


@dataclass(kw_only=True)
class Args:
    """The tabular experiments of the papers."""

    output_dir: Path = Path("runs/bandits")
    """directory of the figures"""


class Optimum(NamedTuple):
    """Where `minimise` stopped."""

    x: Tensor  # the parameters; of a tabular policy, its logits
    loss: float
    gradient: float  # the gradient's norm
    step: float  # largest entry of the Newton step that is left

    @property
    def policy(self) -> Tensor:
        return self.x.softmax(0)


class Check(NamedTuple):
    """One printed line."""

    name: str
    expected: str
    got: str
    ok: bool


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 200) -> Optimum:
    """Newton's method on |curvature|, with backtracking. Directions without curvature (a shift of all logits) stay."""
    x = start.clone()
    for _ in range(steps):
        value, gradient, curvature = loss(x), torch.func.grad(loss)(x), torch.func.hessian(loss)(x)
        values, vectors = torch.linalg.eigh(curvature)
        inverse = torch.where(values.abs() > 1e-10 * values.abs().max(), 1 / values.abs(), 0)
        step = -vectors @ (inverse * (vectors.T @ gradient))
        left = float(step.abs().max())
        if left <= 1e-13 * (1 + float(x.abs().max())):
            break
        size = 1.0
        while not loss(x + size * step) <= value + 1e-4 * size * (gradient @ step) + 1e-13 * value.abs():
            size /= 2
        x = x + size * step
    return Optimum(x, float(value), float(gradient.norm()), left)


def fit(losses: Callable[[Tensor], Tensor], weights: Tensor, start: Tensor) -> Optimum:
    """The tabular policy, softmax of one logit per completion, that minimises the weighted sum of losses(log π_θ)."""
    return minimise(lambda logits: (weights * losses(logits.log_softmax(0))).sum(), start)


# ---------------------------------------------------------------- TYPO: interpolation and preservation

LAMBDAS = (1e-5, 0.1, 0.5, 1.0, 2.0, 10.0)
INTERPOLATION = (vector(0.6, 0.3, 0.1), vector(0.4, 0.4, 0.2))  # π*, π_ref of appendix A.1
GOOD = (vector(0.6, 0.3, 0.1), vector(0.6, 0.3, 0.1))  # prompt x_g, Eq 18
BAD = (vector(0.4, 0.2, 0.4), vector(0.6, 0.2, 0.2))  # prompt x_b, Eq 18
OPTIMA = {  # of INTERPOLATION for each of LAMBDAS, and how many digits are given
    "DPO": [(1, 0, 0, 4), (0.999, 0.001, 0, 3), (0.7912, 0.1978, 0.0110, 4), (0.6316, 0.3158, 0.0526, 4)]
    + [(0.5232, 0.3700, 0.1068, 4), (0.4253, 0.3969, 0.1778, 4)],
    "IPO": [(1, 0, 0, 4), (0.805, 0.185, 0.009, 3), (0.5049, 0.3764, 0.1188, 4), (0.4532, 0.3913, 0.1554, 4)]
    + [(0.4267, 0.3965, 0.1767, 4), (0.4054, 0.3995, 0.1952, 4)],
    "TYPO": [(0.6, 0.3, 0.1, 4), (0.5667, 0.3224, 0.1109, 4), (0.5031, 0.3604, 0.1365, 4)]
    + [(0.4710, 0.3761, 0.1529, 4), (0.4442, 0.3869, 0.1689, 4), (0.4111, 0.3972, 0.1916, 4)],
}


def preferences(pi_star: Tensor) -> tuple[Tensor, Tensor]:
    """All (winner, loser) and their probabilities: pairs uniform, P(y_i ≻ y_j) = π*_i / (π*_i + π*_j) (TYPO Eq 55)."""
    pairs = torch.tensor(list(itertools.permutations(range(len(pi_star)), 2)))
    chance = pi_star[pairs[:, 0]] / pi_star[pairs].sum(1)
    return pairs, chance / chance.sum()


def interpolation(method: str, lam: float, pi_star: Tensor, ref: Tensor) -> Optimum:
    """The optimum of DPO with β = λ, IPO with τ = λ, or TYPO with λ and the exact expectation over π_ref."""
    (pairs, weights), ref_logps = preferences(pi_star), ref.log()
    losses = {
        "DPO": lambda logps: dpo_loss(logps[pairs], ref_logps[pairs], lam),
        "IPO": lambda logps: ipo_loss(logps[pairs], ref_logps[pairs], lam),
        # the loss is linear in the samples' log-probs: their expectation stands in for M samples
        "TYPO": lambda logps: typo_loss(logps[pairs], (ref @ logps).expand(len(pairs), 1), lam),
    }
    return fit(losses[method], weights, ref_logps)


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation, from 0 to 1."""
    return float((p - q).abs().sum() / 2)


# ---------------------------------------------------------------- reward-model distillation


def pdpo_fixed(beta: float, gamma: float) -> float:
    """β h at p-DPO's optimum over log π_θ(y_l), π_θ(y_w) fixed and π_θ(y_l) not bounded (Proposition 3)."""
    ref_logps, winner = vector(0.5, 0.5).log()[None], vector(0.4).log()

    def loss(loser: Tensor) -> Tensor:
        logps = torch.cat([winner, loser])[None]
        return pessimistic_loss(dpo_loss(logps, ref_logps, beta), logps, gamma).sum()

    return beta * float(winner - minimise(loss, winner).x)


def pdpo_bounded(winner: float, beta: float, gamma: float) -> float:
    """p-DPO's best π_θ(y_l) ≤ 1 - π_θ(y_w) by search in steps of 1e-4 (Proposition 3), π_ref = (1/2, 1/2)."""
    losers = torch.arange(1, round((1 - winner) * 10_000) + 1, dtype=torch.float64) / 10_000
    logps = torch.stack([torch.full_like(losers, winner), losers], 1).log()
    losses = pessimistic_loss(dpo_loss(logps, torch.full_like(logps, math.log(0.5)), beta), logps, gamma)
    return float(losers[losses.argmin()])


def pdpo_chain(pairs: Sequence[tuple[int, int]], arms: int, beta: float, gamma: float) -> Tensor:
    """The policy at p-DPO's optimum over all arms together, uniform reference; pairs are (winner, loser)."""
    index, ref_logps = torch.tensor(pairs), -torch.ones(arms, dtype=torch.float64).cumsum(0).new_ones(arms).log()

    def losses(logps: Tensor) -> Tensor:
        return pessimistic_loss(dpo_loss(logps[index], ref_logps[index], beta), logps[index], gamma)

    return fit(losses, vector(1.0), ref_logps).policy
