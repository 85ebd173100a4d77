"""Reward-model distillation, arXiv 2405.19316, on tabular policies: Propositions 1, 3 and 7, Theorems 1 and 2.

Completions are called arms, as in a bandit. The figure is distillation.png.

    python scripts/papers/distillation.py --output-dir runs/bandits
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from algos.distill_dpo import distill_loss
from algos.dpo import dpo_loss
from algos.ipo import ipo_loss
from algos.pessimistic_dpo import pessimistic_loss
from scripts.lab.commands import checked_command
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, canvas, label_axes
from scripts.lab.tabular import Optimum, fit_policy, minimise, ordered_pairs, total_variation, uniform_logps, vector
from scripts.papers import Args, Finding, Section, judged, reported, run_experiments, same_digits, same_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINNER = 0.4  # π_θ(y_w) of the pair whose π_θ(y_l) alone is free
ONE_PAIR = torch.tensor([[0, 1]])
CONFLICT = torch.stack([vector(1, -1, 0), vector(-1, 1, 0)])  # two reward models: no saddle point for Theorem 2


# ---------------------------------------------------------------- Propositions 1 and 3: one pair


def dpo_slope(h: float, beta: float) -> float:
    """dL/dh of DPO. It is negative for every h, so no finite h is optimal (Proposition 1)."""

    def loss(h: Tensor) -> Tensor:
        logps = torch.stack([h, torch.zeros_like(h)])
        ref_logps = vector(0, 0)
        return dpo_loss(logps[None], ref_logps[None], beta)[0]

    return float(torch.func.grad(loss)(vector(h)[0]))


def pdpo_loss(logps: Tensor, ref_logps: Tensor, beta: float, alpha: float) -> Tensor:
    """Eq 13 with γ = β/α and Ω on the pairs themselves. logps, ref_logps (B, 2) → (B,)."""
    losses = dpo_loss(logps, ref_logps, beta)
    return pessimistic_loss(losses, logps, beta / alpha)


def pdpo_margin(beta: float, alpha: float) -> float:
    """β h at p-DPO's optimum over log π_θ(y_l), with π_θ(y_w) fixed and π_θ(y_l) unbounded (Proposition 3)."""
    winner_logp = vector(WINNER).log()
    ref_logps = uniform_logps(2)

    def loss(loser_logp: Tensor) -> Tensor:
        logps = torch.cat([winner_logp, loser_logp])
        return pdpo_loss(logps[None], ref_logps[None], beta, alpha).sum()

    optimum = minimise(loss, winner_logp)
    return beta * float(winner_logp - optimum.parameters)


def pdpo_bounded_loser(beta: float, alpha: float, winner: float) -> float:
    """The best π_θ(y_l) ≤ 1 - π_θ(y_w), in steps of 1e-4, with π_θ(y_w) fixed (Proposition 3)."""
    num_steps = round((1 - winner) * 10_000)
    losers = torch.arange(1, num_steps + 1, dtype=torch.float64) / 10_000
    winners = torch.full_like(losers, winner)
    logps = torch.stack([winners, losers], 1).log()
    losses = pdpo_loss(logps, uniform_logps(2).expand_as(logps), beta, alpha)
    return float(losers[losses.argmin()])


def pdpo_policy(pairs: Tensor, num_arms: int, beta: float, alpha: float) -> Tensor:
    """p-DPO's optimum over the probabilities of all arms jointly, with a uniform π_ref."""
    ref_logps = uniform_logps(num_arms)

    def losses(logps: Tensor) -> Tensor:
        return pdpo_loss(logps[pairs], ref_logps[pairs], beta, alpha)

    return fit_policy(losses, vector(1), ref_logps).policy


# ---------------------------------------------------------------- Proposition 7: transitive closure


def chain(num_arms: int, closed: bool) -> Tensor:
    """The (winner, loser) pairs of y_1 ≺ y_2 ≺ ... ≺ y_n: neighbours only, or their transitive closure."""
    pairs = []
    for loser, winner in itertools.combinations(range(num_arms), 2):
        if closed or winner == loser + 1:
            pairs.append((winner, loser))
    return torch.tensor(pairs)


def ipo_log_ratios(pairs: Tensor, num_arms: int, inverse_tau: float) -> Tensor:
    """log π_θ/π_ref at IPO's optimum, with a uniform π_ref.

    The paper's IPO has the gap 1/τ and algos/ipo.py has 1/(2τ), so the loss gets half of the paper's τ.
    """
    ref_logps = uniform_logps(num_arms)
    tau = 1 / (2 * inverse_tau)

    def losses(logps: Tensor) -> Tensor:
        return ipo_loss(logps[pairs], ref_logps[pairs], tau)

    optimum = fit_policy(losses, vector(1), ref_logps)
    return optimum.parameters.log_softmax(0) - ref_logps


def log_ratio_range(num_arms: int, closed: bool, inverse_tau: float) -> float:
    """The largest minus the smallest of IPO's log-ratios on a chain of arms (Proposition 7)."""
    log_ratios = ipo_log_ratios(chain(num_arms, closed), num_arms, inverse_tau)
    return float(log_ratios.max() - log_ratios.min())


class ClosureEffect(NamedTuple):
    """How far the transitive closure of three arms moves the optimum, in total variation."""

    inverse_tau: float  # β⁻¹ log(α - 1), with which p-DPO and IPO agree on one pair
    pdpo: float
    ipo: float


@functools.cache
def closure_effects() -> list[ClosureEffect]:
    """The effect of the closure for each β and α of appendix B."""
    neighbours = chain(3, closed=False)
    closure = chain(3, closed=True)

    effects = []
    for beta, alpha in itertools.product((1, 3, 10, 30), (5, 10, 20, 50, 100, 1000)):
        pdpo_neighbours = pdpo_policy(neighbours, 3, beta, alpha)
        pdpo_closure = pdpo_policy(closure, 3, beta, alpha)

        inverse_tau = math.log(alpha - 1) / beta
        # π_ref is uniform, so the log-ratios are logits of the policy
        ipo_neighbours = ipo_log_ratios(neighbours, 3, inverse_tau).softmax(0)
        ipo_closure = ipo_log_ratios(closure, 3, inverse_tau).softmax(0)

        pdpo_effect = total_variation(pdpo_neighbours, pdpo_closure)
        ipo_effect = total_variation(ipo_neighbours, ipo_closure)
        effects.append(ClosureEffect(inverse_tau, pdpo_effect, ipo_effect))
    return effects


# ---------------------------------------------------------------- Theorems 1 and 2: distillation

GRAPHS = {  # pairs of 5 arms
    "all pairs": ordered_pairs(5),
    "chain": torch.tensor([(0, 1), (1, 2), (2, 3), (3, 4)]),
    "two separate pairs": torch.tensor([(0, 1), (2, 3)]),
}


def aligned_policy(ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """π_ref exp(r/β) / Z, the optimum of the alignment objective (Eq 3)."""
    return (ref.log() + rewards / beta).softmax(0)


def distil(rewards: Tensor, ref: Tensor, pairs: Tensor, weights: Tensor, beta: float, start: Tensor) -> Optimum:
    """The minimiser of the distillation loss, Eq 7, on weighted pairs."""
    ref_logps = ref.log()

    def losses(logps: Tensor) -> Tensor:
        return distill_loss(logps[pairs], ref_logps[pairs], rewards[pairs], beta)

    return fit_policy(losses, weights / weights.sum(), start)


@functools.cache
def theorem_1(graph: str) -> tuple[Tensor, list[Optimum]]:
    """The aligned policy of 5 arms, and d-DPO's minimisers on the pairs of `graph` from two random starts.

    Rewards, reference and the pairs' weights are random; β = 0.7.
    """
    generator = torch.Generator().manual_seed(0)
    rewards, ref_logits, *starts = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    ref = ref_logits.softmax(0)
    pairs = GRAPHS[graph]
    weights = torch.rand(len(pairs), generator=generator, dtype=torch.float64) + 0.1

    optima = [distil(rewards, ref, pairs, weights, 0.7, start) for start in starts]
    return aligned_policy(ref, rewards, 0.7), optima


def pessimistic_score(policy: Tensor, rewards: Tensor, ref: Tensor, beta: float) -> float:
    """Eq 8: min_i (E_π r_i - E_ref r_i) - β KL(π || π_ref), for the rewards (S, arms) of S reward models."""
    gains = rewards @ (policy - ref)
    divergence = (policy * (policy / ref).log()).sum()
    return float(gains.min() - beta * divergence)


@functools.cache
def theorem_2() -> tuple[float, ...]:
    """Eq 8 at the two members of P_β(S), reached by distillation, and at π_ref; S = CONFLICT, β = 1, π_ref uniform."""
    ref = uniform_logps(3).exp()
    pairs = ordered_pairs(3)
    weights = torch.ones(len(pairs), dtype=torch.float64)

    policies = [distil(rewards, ref, pairs, weights, 1.0, ref.log()).policy for rewards in CONFLICT]
    policies.append(ref)
    return tuple(pessimistic_score(policy, CONFLICT, ref, 1.0) for policy in policies)


# ---------------------------------------------------------------- checks


def dpo_has_no_finite_optimum() -> Iterator[Finding]:
    steepest = max(dpo_slope(h, 1.0) for h in range(101))
    yield judged("Prop 1, DPO: largest dL/dh for h from 0 to 100", "< 0", steepest, steepest < 0)


def pdpo_margin_is_log_alpha_minus_1() -> Iterator[Finding]:
    for beta, alpha in ((1.0, 1.5), (1.0, 3.0), (1.0, 10.0), (0.1, 10.0), (0.1, 1000.0)):
        statement = f"Prop 3, β h of p-DPO, π_θ(y_w) fixed, β = {beta:g}, α = {alpha:g}: log(α-1)"
        yield same_value(statement, math.log(alpha - 1), pdpo_margin(beta, alpha))


def pdpo_loser_is_bounded() -> Iterator[Finding]:
    at_the_bound = pdpo_bounded_loser(1.0, 1.5, 0.6)
    yield same_digits("Prop 3, π_θ(y_w) = .6, α = 1.5: π_θ(y_l) is bounded by .4", ".4000", at_the_bound)
    inside = pdpo_bounded_loser(1.0, 11.0, 0.6)
    yield same_digits("Prop 3, π_θ(y_w) = .6, α = 11: π_θ(y_l) = .6/10", ".0600", inside)


def pdpo_joint_margin_is_log_alpha_plus_1() -> Iterator[Finding]:
    winner, loser = pdpo_policy(ONE_PAIR, 2, 1.0, 10.0)
    margin = float((winner / loser).log())
    yield same_digits("p-DPO, two arms jointly, β = 1, γ = .1: log(α+1)", "2.398", margin)


def closure_narrows_ipo() -> Iterator[Finding]:
    inverse_tau = 2.0
    for n in (3, 4, 8):
        statement = f"Prop 7, range of IPO's log-ratios, n = {n}, τ = 1/2,"
        of_chain = log_ratio_range(n, False, inverse_tau)
        yield same_value(f"{statement} chain: (n-1)/τ", (n - 1) * inverse_tau, of_chain)
        of_closure = log_ratio_range(n, True, inverse_tau)
        yield same_value(f"{statement} closure: 2(n-1)/(nτ)", 2 * (n - 1) / n * inverse_tau, of_closure)


def closure_moves_pdpo_less_than_ipo() -> Iterator[Finding]:
    effects = closure_effects()
    largest_pdpo = max(effect.pdpo for effect in effects)
    yield reported("Fig. B.1, p-DPO: largest effect of the closure, total variation", largest_pdpo)
    largest_ipo = max(effect.ipo for effect in effects)
    yield reported("Fig. B.1, IPO: largest effect of the closure, total variation", largest_ipo)


def distillation_reaches_the_aligned_policy() -> Iterator[Finding]:
    yield from minimisers_are_aligned("all pairs")
    yield from minimisers_are_aligned("chain")


def minimisers_are_aligned(graph: str) -> Iterator[Finding]:
    for statement, optimum, distance in minimisers(graph):
        yield judged(f"{statement}: loss at the minimiser", "0", optimum.loss, optimum.loss < 1e-16)
        yield judged(f"{statement}: distance to π_ref exp(r/β)/Z", "0", distance, distance < 1e-8)


def separate_pairs_leave_it_open() -> Iterator[Finding]:
    for statement, optimum, distance in minimisers("two separate pairs"):
        yield judged(f"{statement}: loss at the minimiser", "0", optimum.loss, optimum.loss < 1e-16)
        yield judged(f"{statement}: distance to π_ref exp(r/β)/Z", "> 0.01", distance, distance > 0.01)


def minimisers(graph: str) -> Iterator[tuple[str, Optimum, float]]:
    """For each start the beginning of a statement, the minimiser, and its distance to the aligned policy."""
    target, optima = theorem_1(graph)
    for start, optimum in zip(("first", "second"), optima, strict=True):
        yield f"Theorem 1, {graph}, {start} start", optimum, total_variation(optimum.policy, target)


def theorem_2_does_not_hold() -> Iterator[Finding]:
    statement = "Theorem 2, Eq 8 at both members of P_β(S), and at π_ref"
    yield same_digits(statement, "-0.841, -0.841, 0", *theorem_2())


REMARKS_ON_PROPOSITIONS = """\
α = β/γ. τ is the paper's here, IPO's gap being 1/τ: half of it goes into the loss, whose gap is 1/(2τ)."""

REMARKS_ON_THEOREMS = """\
Theorem 1 asks for full support of the pairs; that they connect all completions is enough. Theorem 2 does not hold
for the two reward models r = ±(1, -1, 0) with β = 1 and a uniform π_ref: π_ref is better than both its candidates."""

SECTIONS = (
    Section(
        "Reward-model distillation: propositions",
        (
            dpo_has_no_finite_optimum,
            pdpo_margin_is_log_alpha_minus_1,
            pdpo_loser_is_bounded,
            pdpo_joint_margin_is_log_alpha_plus_1,
            closure_narrows_ipo,
            closure_moves_pdpo_less_than_ipo,
        ),
        REMARKS_ON_PROPOSITIONS,
    ),
    Section(
        "Reward-model distillation: theorems",
        (distillation_reaches_the_aligned_policy, separate_pairs_leave_it_open, theorem_2_does_not_hold),
        REMARKS_ON_THEOREMS,
    ),
)


# ---------------------------------------------------------------- figure


def plot_pair_losses(axes: "Axes") -> None:
    """The losses of one pair against β h, with π_θ(y_w) fixed."""
    h = torch.linspace(-3, 8, 200, dtype=torch.float64)
    winner_logps = torch.full_like(h, math.log(WINNER))
    logps = torch.stack([winner_logps, winner_logps - h], 1)
    ref_logps = uniform_logps(2).expand_as(logps)

    axes.plot(h, dpo_loss(logps, ref_logps, 1.0), color=GREY, linestyle=":", label="DPO: no optimum")
    for alpha, color, style in ((3.0, ORANGE, "--"), (10.0, BLUE, "-"), (100.0, GREEN, "-.")):
        losses = pdpo_loss(logps, ref_logps, 1.0, alpha)
        axes.plot(h, losses, style, color=color, label=f"p-DPO, α = {alpha:g}")
        axes.plot(h[losses.argmin()], losses.min(), "o", color=color)

    axes.set_ylim(0, 5)
    label_axes(axes, "Propositions 1 and 3: β = 1, π_θ(y_w) = .4", "β h (nats)", "loss (nats)")


def plot_pair_optima(axes: "Axes") -> None:
    """p-DPO's optimum against α, with π_θ(y_w) fixed and over two arms jointly."""
    alphas = torch.logspace(0.1, 3, 25, dtype=torch.float64)
    fixed_winner = []
    jointly = []
    for alpha in alphas.tolist():
        fixed_winner.append(pdpo_margin(1.0, alpha))
        winner, loser = pdpo_policy(ONE_PAIR, 2, 1.0, alpha)
        jointly.append(float((winner / loser).log()))

    axes.semilogx(alphas, fixed_winner, "o", color=BLUE, label="π_θ(y_w) fixed")
    axes.plot(alphas, (alphas - 1).log(), "-", color=BLUE, label="log(α-1)")
    axes.plot(alphas, jointly, "s", color=ORANGE, label="two arms jointly")
    axes.plot(alphas, (alphas + 1).log(), "--", color=ORANGE, label="log(α+1)")
    label_axes(axes, "p-DPO's optimum: β = 1, uniform π_ref", "α = β/γ (no unit)", "β h at the optimum (nats)")


def plot_closure_ranges(axes: "Axes") -> None:
    """The range of IPO's log-ratios against the number of arms."""
    arms = range(2, 11)
    axes.plot(arms, [log_ratio_range(n, False, 1.0) for n in arms], "o", color=BLUE, label="chain, optimum")
    axes.plot(arms, [n - 1 for n in arms], color=BLUE, label="(n-1)/τ")

    closure = [log_ratio_range(n, True, 1.0) for n in arms]
    axes.plot(arms, closure, "s", color=ORANGE, label="transitive closure, optimum")
    axes.plot(arms, [2 * (n - 1) / n for n in arms], color=ORANGE, label="2(n-1)/(nτ)")
    label_axes(axes, "Proposition 7: IPO, τ = 1", "arms n", "range of log-ratios (nats)")


def plot_closure_effects(axes: "Axes") -> None:
    """How far the closure moves the optima, against β⁻¹ log(α - 1)."""
    effects = closure_effects()
    inverse_taus = [effect.inverse_tau for effect in effects]
    pdpo = [effect.pdpo for effect in effects]
    ipo = [effect.ipo for effect in effects]

    axes.semilogx(inverse_taus, pdpo, "o", color=GREEN, label="p-DPO", fillstyle="none")
    axes.semilogx(inverse_taus, ipo, "s", color=ORANGE, label="IPO", fillstyle="none")
    title = "Fig. B.1: three arms with and without closure"
    label_axes(axes, title, "τ⁻¹ = β⁻¹ log(α-1) (nats)", "change (total variation)")


def plot_theorem_1(axes: "Axes") -> None:
    """d-DPO's minimisers for three sets of pairs beside the aligned policy."""
    arms = torch.arange(1, 6)
    target, chain_optima = theorem_1("chain")
    _, all_pairs_optima = theorem_1("all pairs")
    _, (first, second) = theorem_1("two separate pairs")

    axes.bar(arms, target, 0.8, color=GREY, alpha=0.3, label="π_ref exp(r/β)/Z")
    axes.plot(arms - 0.25, all_pairs_optima[0].policy, "o", color=BLUE, label="d-DPO, all pairs")
    axes.plot(arms, chain_optima[0].policy, "^", color=GREEN, label="d-DPO, chain")
    separate = "d-DPO, two separate pairs"
    axes.plot(arms + 0.25, first.policy, "s", color=ORANGE, label=f"{separate}, first start")
    axes.plot(arms + 0.25, second.policy, "D", color=ORANGE, fillstyle="none", label=f"{separate}, second start")

    axes.set_ylim(0, 1.15)
    label_axes(axes, "Theorem 1: pairs that connect all arms suffice", "arm", "probability")


def plot_theorem_2(axes: "Axes") -> None:
    """Eq 8 between the two members of P_β(S), π_ref being in the middle."""
    tilts = torch.linspace(-1.5, 1.5, 121, dtype=torch.float64)
    ref = uniform_logps(3).exp()
    scores = []
    for tilt in tilts:
        policy = aligned_policy(ref, tilt * CONFLICT[0], 1.0)
        scores.append(pessimistic_score(policy, CONFLICT, ref, 1.0))

    first, second, of_ref = theorem_2()
    axes.plot(tilts, scores, color=GREY, label="π_ref exp(t r/β)/Z")
    axes.plot([1, -1], [first, second], "o", color=ORANGE, label="members of P_β(S), by d-DPO")
    axes.plot([0], [of_ref], "s", color=BLUE, label="π_ref")
    label_axes(axes, "Theorem 2: r = ±(1, -1, 0), β = 1", "tilt t (no unit)", "pessimistic score, Eq 8 (reward)")


def plot_distillation() -> "Figure":
    figure, panels = canvas(["abc", "def"], (13, 7.5))
    plot_pair_losses(panels["a"])
    plot_pair_optima(panels["b"])
    plot_closure_ranges(panels["c"])
    plot_closure_effects(panels["d"])
    plot_theorem_1(panels["e"])
    plot_theorem_2(panels["f"])
    return figure


FIGURES = {"distillation.png": plot_distillation}


def main(args: Args) -> None:
    run_experiments(args, SECTIONS, FIGURES)


if __name__ == "__main__":
    checked_command(main, Args)
