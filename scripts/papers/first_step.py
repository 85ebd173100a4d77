"""The value of every loss at π_θ = π_ref, where training starts, on random groups.

python scripts/papers/first_step.py
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from algos.distill_dpo import distill_loss
from algos.dpo import dpo_loss
from algos.ensemble_dpo import ensemble_losses
from algos.exo import dpo_rw_loss, exo_loss
from algos.ipo import ipo_loss
from algos.pessimistic_dpo import pessimistic_loss
from scripts.lab.commands import checked_command
from scripts.lab.tabular import vector
from scripts.papers import Args, Finding, Section, run_experiments, same_value


class RandomGroups(NamedTuple):
    """Eight groups of four completions; the first two of each are its pair."""

    logps: Tensor  # (8, 4)
    pairs: Tensor  # (8, 2), the log-probs of the pairs
    rewards: Tensor  # (8, 2, 3), of the pairs by three reward models
    gaps: Tensor  # (8, 3), Δr: the first reward of a pair minus the second
    target_logps: Tensor  # (8, 4), log p of EXO


def random_groups() -> RandomGroups:
    generator = torch.Generator().manual_seed(1)
    logps = -20 + 5 * torch.randn(8, 4, generator=generator, dtype=torch.float64)
    rewards = torch.randn(8, 2, 3, generator=generator, dtype=torch.float64)
    energies = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    gaps = rewards[:, 0] - rewards[:, 1]
    return RandomGroups(logps, logps[:, :2], rewards, gaps, energies.log_softmax(1))


GROUPS = random_groups()


def equals(statement: str, expected: float | Tensor, losses: Tensor) -> list[Finding]:
    """Compare the mean loss with its closed form, to rounding."""
    return [same_value(statement, float(expected), float(losses.mean()), tolerance=1e-12)]


def dpo_of_pairs() -> list[Finding]:
    losses = dpo_loss(GROUPS.pairs, GROUPS.pairs, 0.1)
    return equals("DPO: ln 2", math.log(2), losses)


def dpo_of_rankings() -> list[Finding]:
    losses = dpo_loss(GROUPS.logps, GROUPS.logps, 0.1)
    return equals("DPO, K = 4 ranked: ln K!", math.log(24), losses)


def ipo() -> list[Finding]:
    losses = ipo_loss(GROUPS.pairs, GROUPS.pairs, 0.1)
    return equals("IPO, τ = 0.1: 1/(4τ²)", 25.0, losses)


def exo_pref() -> list[Finding]:
    smoothed_labels = vector(0.999, 0.001).log().expand(8, 2)
    losses = exo_loss(GROUPS.pairs, GROUPS.pairs, smoothed_labels, 0.5)
    expected = -(math.log(0.999) + math.log(0.001)) / 2 - math.log(2)
    return equals("EXO-pref, ε = 1e-3: -(log(1-ε) + log ε)/2 - ln 2", expected, losses)


def exo_rw() -> list[Finding]:
    losses = exo_loss(GROUPS.logps, GROUPS.logps, GROUPS.target_logps, 0.5)
    expected = -math.log(4) - GROUPS.target_logps.mean()
    return equals("EXO-rw, K = 4: -ln K - mean log p", expected, losses)


def dpo_rw() -> list[Finding]:
    losses = dpo_rw_loss(GROUPS.logps, GROUPS.logps, GROUPS.target_logps, 0.5)
    return equals("DPO-rw, K = 4: ln K", math.log(4), losses)


def distillation() -> list[Finding]:
    losses = distill_loss(GROUPS.pairs, GROUPS.pairs, GROUPS.rewards[..., 0], 0.1)
    expected = (GROUPS.gaps[:, 0] ** 2).mean()
    return equals("d-DPO: mean Δr²", expected, losses)


def ensemble() -> list[Finding]:
    distillation_losses = ensemble_losses(GROUPS.pairs, GROUPS.pairs, GROUPS.rewards, 0.1)  # (8, 3)
    best_model = distillation_losses.mean(0).min()
    losses = pessimistic_loss(best_model.expand(8), GROUPS.pairs, 0.01)

    smallest_gap = (GROUPS.gaps**2).mean(0).min()
    expected = smallest_gap - 0.01 * GROUPS.pairs.sum(1).mean()
    return equals("e-DPO, 3 models, γ = 0.01: min_i mean Δr_i² + γ Ω", expected, losses)


CHECKS = (
    dpo_of_pairs,
    dpo_of_rankings,
    ipo,
    exo_pref,
    exo_rw,
    dpo_rw,
    distillation,
    ensemble,
)
SECTIONS = (Section("All losses: the value at π_θ = π_ref", CHECKS),)


def main(args: Args) -> None:
    run_experiments(args, SECTIONS, {})


if __name__ == "__main__":
    checked_command(main, Args)
