"""DPO, arXiv 2305.18290: its objective, its optimum, its loss and its theory, on tabular policies.

A policy has one logit for each completion of a prompt, in float64. The loss is that of algos/dpo.py.

    python scripts/papers/dpo.py
    python scripts/papers/dpo.py --claim T8
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from algos.dpo import dpo_loss
from scripts.lab.claim_files import Args, paper_command
from scripts.lab.claims import Finding, Paper, Verdict, given, judged, same_value, vanishes
from scripts.lab.commands import checked_command
from scripts.lab.tabular import (
    Optimum,
    log_partition,
    minimise,
    objective,
    random_policies,
    tilted,
    total_variation,
    vector,
)

PAPER = Paper("dpo", "Direct Preference Optimization", "2305.18290")

# ---------------------------------------------------------------- the objective and its optimum

OBJECTIVE = PAPER.section("The objective and its optimum")
REF_LOGPS = vector(0.4, 0.3, 0.2, 0.1).log()
REWARDS = vector(1.0, -0.5, 0.3, 2.0)


def maximise_objective(beta: float) -> Optimum:
    """The policy that maximises Eq 3, by Newton's method from π_ref."""

    def loss(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        return -objective(logps, REF_LOGPS, REWARDS, beta)

    return minimise(loss, REF_LOGPS)


@OBJECTIVE.claim("T8", "Eq 4")
def the_tilted_reference_is_optimal() -> Iterator[Finding]:
    """The policy π_ref exp(r/β)/Z maximises E_π[r] - β KL(π ‖ π_ref), and the maximum is β log Z.

    Newton's method maximises the objective; 10,000 random policies stay below.
    """
    distances = []
    excesses = []
    values = []
    policies = random_policies(10_000, 4, seed=0)
    for beta in (0.1, 1.0, 5.0):
        optimum = maximise_objective(beta)
        maximum = beta * log_partition(REF_LOGPS, REWARDS, beta)
        distances.append(total_variation(optimum.policy, tilted(REF_LOGPS, REWARDS, beta).exp()))
        values.append(-optimum.loss - float(maximum))
        excesses.append(float(objective(policies, REF_LOGPS, REWARDS, beta).max() - maximum))

    yield vanishes("β from 0.1 to 5, distance of Newton's optimum", max(distances), 1e-8)
    yield vanishes("its value less β log Z", vector(*values))
    yield judged("best of 10,000 random policies less β log Z", "< 0", max(excesses), max(excesses) < 0)


# ---------------------------------------------------------------- the gradient

GRADIENT = PAPER.section("The loss and its gradient")
FEATURES = vector(1, 0, 3)  # of the chosen, the rejected and a third completion: log π = θ · feature - log Z


@GRADIENT.claim("T16", "§4", expected=Verdict.FALSE)
def the_update_raises_the_chosen_completion() -> Iterator[Finding]:
    """A step on the loss increases the likelihood of the preferred completion.

    Not if completions share parameters: with one parameter, the mass goes to a third completion.
    """
    theta = vector(0)[0]
    ref_logps = (FEATURES * theta).log_softmax(0)

    def loss(parameter: Tensor) -> Tensor:
        logps = (FEATURES * parameter).log_softmax(0)
        return dpo_loss(logps[None, :2], ref_logps[None, :2], 1.0)[0]

    def chosen_logp(parameter: Tensor) -> Tensor:
        return (FEATURES * parameter).log_softmax(0)[0]

    step = -torch.func.grad(loss)(theta)
    change = float(torch.func.grad(chosen_logp)(theta) * step)
    yield judged("change of log π(y_w) along the step", "> 0", change, change > 0)
    yield given(same_value("the same by hand, (1 - 4/3)/2", -1 / 6, change))


def main(args: Args) -> None:
    paper_command(PAPER, args)


if __name__ == "__main__":
    checked_command(main, Args)
