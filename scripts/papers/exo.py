"""EXO, arXiv 2402.00856, on tabular policies: the gradients of Eqs 16 and 20 at finite K, and mode seeking (Fig. 1).

EXO minimises a reverse KL divergence, DPO-rw the forward one. The figure is exo.png.

    python scripts/papers/exo.py --output-dir runs/bandits
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from algos.exo import dpo_rw_loss, exo_loss
from scripts.lab.commands import checked_command
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, canvas, label_axes
from scripts.lab.tabular import minimise, uniform_logps, vector
from scripts.papers import Args, Finding, Section, judged, reported, run_experiments, same_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = {"EXO": exo_loss, "DPO-rw": dpo_rw_loss}

# ---------------------------------------------------------------- gradients of three completions

SFT = vector(0.4, 0.4, 0.2)
REWARDS = vector(0.1, 0.6, 1.0)
LOGITS = vector(0.5, -0.3, 0.2)  # where gradients are taken
PROPORTIONAL = (0, 0, 1, 1, 2)  # a group with each completion as often as π_sft has it
ONCE = (0, 1, 2)  # a group with each completion once
GROUP_SIZES = (2, 3, 4, 8, 16, 32)  # completions per group, K


def divergence(method: str, logits: Tensor, beta: float, beta_r: float) -> Tensor:
    """KL(π_θ^{β_π} || π*_{β_r}), the right side of Eq 16, or for DPO-rw its reverse, of Eq 20; Eqs 5 and 9."""
    mixed_logits = beta * logits.log_softmax(0) + (1 - beta) * SFT.log()
    log_policy = mixed_logits.log_softmax(0)
    log_target = (SFT.log() + REWARDS / beta_r).log_softmax(0)
    if method == "EXO":
        return kl(log_policy, log_target)
    return kl(log_target, log_policy)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q)."""
    return (log_p.exp() * (log_p - log_q)).sum()


def expected_loss(method: str, logits: Tensor, groups: Tensor, weights: Tensor, beta: float, beta_r: float) -> Tensor:
    """The weighted sum of the losses of groups (B, K) of completion indices; weights (B,)."""
    logps = logits.log_softmax(0)[groups]
    ref_logps = SFT.log()[groups]
    target_logps = (REWARDS / beta_r)[groups].log_softmax(1)
    losses = LOSSES[method](logps, ref_logps, target_logps, beta)
    return (weights * losses).sum()


def gradient_error(method: str, groups: Tensor, weights: Tensor, beta: float = 0.5, beta_r: float = 0.5) -> float:
    """|∇(expected loss) - ∇KL| / |∇KL|, at LOGITS."""

    def exact(logits: Tensor) -> Tensor:
        return divergence(method, logits, beta, beta_r)

    def ours(logits: Tensor) -> Tensor:
        return expected_loss(method, logits, groups, weights, beta, beta_r)

    exact_gradient = torch.func.grad(exact)(LOGITS)
    our_gradient = torch.func.grad(ours)(LOGITS)
    return float((our_gradient - exact_gradient).norm() / exact_gradient.norm())


def single_group(completions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One group of completions with weight 1, for `gradient_error`."""
    return torch.tensor([completions]), vector(1)


def all_samples(k: int) -> tuple[Tensor, Tensor]:
    """All multisets of K independent samples of π_sft (B, K), and their probabilities (B,)."""
    multisets = itertools.combinations_with_replacement(range(len(SFT)), k)
    groups = torch.tensor(list(multisets))
    counts = torch.nn.functional.one_hot(groups, len(SFT)).sum(1).double()
    log_orders = math.lgamma(k + 1) - torch.lgamma(counts + 1).sum(1)
    log_probs = log_orders + counts @ SFT.log()
    return groups, log_probs.exp()


@functools.cache
def bias(method: str, k: int) -> float:
    """The relative bias of the gradient from groups of K samples, with β_π = β_r = 1/2."""
    return gradient_error(method, *all_samples(k))


# ---------------------------------------------------------------- mode seeking

GRID = torch.linspace(-5, 5, 101, dtype=torch.float64)  # the completions; π_sft is uniform over them
MAIN_MODE = 2.0
MINOR_MODE = -2.0
MIXTURE = ((0.7, MAIN_MODE, 0.6), (0.3, MINOR_MODE, 0.6))  # weight, mean, standard deviation of the target
STARTS = {"main mode": (MAIN_MODE, 1.0), "minor mode": (MINOR_MODE, 1.0), "wide": (0.0, 3.0)}  # mean, scale


def gaussian(mean: Tensor | float, scale: Tensor | float) -> Tensor:
    """Log-probs of a Gaussian policy on GRID, which has no parameters but its mean and scale."""
    deviations = (GRID - mean) / scale
    return (-(deviations**2) / 2).log_softmax(-1)


def target() -> Tensor:
    """Log-probs of π* on GRID. With a uniform π_sft and β_r = 1, the rewards are these up to a constant."""
    components = [gaussian(mean, scale) + math.log(weight) for weight, mean, scale in MIXTURE]
    return torch.stack(components).logsumexp(0)


def matching_losses(method: str, logps: Tensor) -> Tensor:
    """The losses (B,) of policies (B, grid) with β_π = 1, the whole grid being one group."""
    ref_logps = uniform_logps(len(GRID)).expand_as(logps)
    target_logps = target().expand_as(logps)
    return LOSSES[method](logps, ref_logps, target_logps, 1.0)


class GaussianOptimum(NamedTuple):
    """The Gaussian at which a descent stopped."""

    mean: float
    scale: float
    loss: float

    @property
    def logps(self) -> Tensor:
        return gaussian(self.mean, self.scale)


@functools.cache
def descend(method: str, start: str) -> GaussianOptimum:
    """Descend from the Gaussian STARTS[start]."""

    def loss(parameters: Tensor) -> Tensor:
        mean, log_scale = parameters
        logps = gaussian(mean, log_scale.exp())
        return matching_losses(method, logps[None]).sum()

    mean, scale = STARTS[start]
    optimum = minimise(loss, vector(mean, math.log(scale)))
    mean, log_scale = optimum.parameters.tolist()
    return GaussianOptimum(mean, math.exp(log_scale), optimum.loss)


def best_optimum(method: str) -> GaussianOptimum:
    """The optimum with the smallest loss over all starts."""
    optima = [descend(method, start) for start in STARTS]
    return min(optima, key=lambda optimum: optimum.loss)


@functools.cache
def landscape(method: str) -> tuple[Tensor, Tensor]:
    """Means on a grid, and for each the loss at the best scale on a grid: the global optimum without descent."""
    means = torch.linspace(-4, 4, 161, dtype=torch.float64)
    scales = torch.logspace(-1, 1, 81, dtype=torch.float64)
    logps = gaussian(means[:, None, None], scales[:, None])  # (means, scales, grid)
    losses = matching_losses(method, logps.flatten(0, 1))
    best_losses = losses.view(len(means), len(scales)).amin(1)
    return means, best_losses


def mean_and_deviation(logps: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a distribution on GRID."""
    probs = logps.exp()
    mean = float(probs @ GRID)
    variance = float(probs @ (GRID - mean) ** 2)
    return mean, math.sqrt(variance)


def mass(logps: Tensor, low: float, high: float) -> float:
    """The probability of GRID's points between two bounds."""
    is_inside = (low <= GRID) & (high >= GRID)
    return float(logps.exp()[is_inside].sum())


# ---------------------------------------------------------------- checks


def exo_follows_equation_16() -> Iterator[Finding]:
    yield from gradients_are_exact("Eq 16", "EXO")
    yield from bias_falls_with_k("Eq 16", "EXO")


def dpo_rw_follows_equation_20() -> Iterator[Finding]:
    yield from gradients_are_exact("Eq 20", "DPO-rw")
    yield from bias_falls_with_k("Eq 20", "DPO-rw")


def gradients_are_exact(equation: str, method: str) -> Iterator[Finding]:
    for beta, beta_r in ((1.0, 1.0), (0.5, 0.1), (0.1, 0.5)):
        setting = f"β_π = {beta:g}, β_r = {beta_r:g}"
        statement = f"{equation}, {method}, {setting}, relative error of the gradient:"
        proportional = gradient_error(method, *single_group(PROPORTIONAL), beta, beta_r)
        yield judged(f"{statement} rows 2, 2, 1", "0", proportional, proportional < 1e-12)
        once = gradient_error(method, *single_group(ONCE), beta, beta_r)
        yield judged(f"{statement} rows 1, 1, 1", "> 0.1", once, once > 0.1)


def bias_falls_with_k(equation: str, method: str) -> Iterator[Finding]:
    for k in GROUP_SIZES:
        error = bias(method, k)
        yield judged(f"{equation}, {method}, bias of the gradient, K = {k} draws", "> 0", error, error > 0.001)

    ratio = bias(method, 32) / bias(method, 16)
    statement = f"{equation}, {method}, bias with K doubled: about half"
    yield judged(statement, ".45 to .55", ratio, 0.45 < ratio < 0.55)


def exo_prefers_the_main_mode() -> Iterator[Finding]:
    means, losses = landscape("EXO")
    best = float(means[losses.argmin()])
    holds = abs(best - MAIN_MODE) < 0.1
    yield judged("Fig. 1, EXO: mean of the best of all (mean, scale)", f"{MAIN_MODE} ± .1", best, holds)


def exo_stops_at_a_mode() -> Iterator[Finding]:
    for start, mode in (("main mode", MAIN_MODE), ("minor mode", MINOR_MODE), ("wide", MAIN_MODE)):
        mean = descend("EXO", start).mean
        yield judged(f"Fig. 1, EXO from start '{start}': mean", f"{mode} ± .1", mean, abs(mean - mode) < 0.1)


def dpo_rw_stops_at_the_same_mean() -> Iterator[Finding]:
    from_wide = descend("DPO-rw", "wide").mean
    for start in ("main mode", "minor mode"):
        mean = descend("DPO-rw", start).mean
        yield same_value(f"Fig. 1, DPO-rw from start '{start}': mean, as from 'wide'", from_wide, mean)


def dpo_rw_matches_the_moments() -> Iterator[Finding]:
    target_mean, target_deviation = mean_and_deviation(target())
    mean, deviation = mean_and_deviation(best_optimum("DPO-rw").logps)
    yield same_value("Fig. 1, DPO-rw: mean of the policy is the target's", target_mean, mean)
    yield same_value("Fig. 1, DPO-rw: deviation of the policy is the target's", target_deviation, deviation)


def minor_mode_costs_exo_more() -> Iterator[Finding]:
    gap = descend("EXO", "minor mode").loss - descend("EXO", "main mode").loss
    yield judged("Fig. 1, EXO: loss at the minor mode minus at the main mode", "> 0", gap, gap > 0)


def dpo_rw_spreads_its_mass() -> Iterator[Finding]:
    for low, high, region in ((-5, -1, "below -1, the minor mode"), (-1, 1, "between the modes")):
        statement = f"Fig. 1, mass {region}:"
        yield reported(f"{statement} the target's", mass(target(), low, high))
        exo = mass(best_optimum("EXO").logps, low, high)
        yield judged(f"{statement} EXO's", "< .1", exo, exo < 0.1)
        dpo_rw = mass(best_optimum("DPO-rw").logps, low, high)
        yield judged(f"{statement} DPO-rw's", "> .1", dpo_rw, dpo_rw > 0.1)


REMARKS_ON_GRADIENTS = """\
Against the gradients of the reverse (Eq 16) and the forward (Eq 20) KL, π_sft = (.4, .4, .2); the bias is that of
the expectation over K independent draws, all of them enumerated, with β_π = β_r = 1/2."""

REMARKS_ON_MODES = """\
The target is .7 N(2, .6) + .3 N(-2, .6) on 101 points, π_sft uniform, the policy a Gaussian. Weights and starts
are chosen: with equal modes EXO's optimum is a tie, and started over the minor mode it stays there."""

SECTIONS = (
    Section(
        "EXO: gradients",
        (exo_follows_equation_16, dpo_rw_follows_equation_20),
        REMARKS_ON_GRADIENTS,
    ),
    Section(
        "EXO: mode seeking",
        (
            exo_prefers_the_main_mode,
            exo_stops_at_a_mode,
            dpo_rw_stops_at_the_same_mean,
            dpo_rw_matches_the_moments,
            minor_mode_costs_exo_more,
            dpo_rw_spreads_its_mass,
        ),
        REMARKS_ON_MODES,
    ),
)


# ---------------------------------------------------------------- figure


def plot_policies(axes: "Axes") -> None:
    """The target and the Gaussians that fit it."""
    global_optimum = descend("EXO", "main mode")
    minor_optimum = descend("EXO", "minor mode")
    dpo_rw_optimum = descend("DPO-rw", "wide")

    axes.fill_between(GRID, target().exp(), color=GREY, alpha=0.3, linewidth=0, label="target π*")
    axes.plot(GRID, global_optimum.logps.exp(), "-", color=BLUE, label="EXO, global optimum")
    axes.plot(GRID, minor_optimum.logps.exp(), "-.", color=GREEN, label="EXO, started at minor mode")
    axes.plot(GRID, dpo_rw_optimum.logps.exp(), "--", color=ORANGE, label="DPO-rw, any start")

    axes.set_ylim(0, 0.105)
    label_axes(axes, "Fig. 1: a policy with one mode", "completion (position on a line, no unit)", "probability")


def plot_landscapes(axes: "Axes") -> None:
    """The loss against the mean of the policy."""
    for method, color, style in (("EXO", BLUE, "-"), ("DPO-rw", ORANGE, "--")):
        means, losses = landscape(method)
        axes.plot(means, losses - losses.min(), style, color=color, label=method)
    title = "Loss at the best scale for each mean"
    label_axes(axes, title, "mean of the policy (no unit)", "loss minus its minimum (nats)")


def plot_bias(axes: "Axes") -> None:
    """The bias of the gradient against K."""
    for method, color, style in (("EXO", BLUE, "-"), ("DPO-rw", ORANGE, "--")):
        errors = [bias(method, k) for k in GROUP_SIZES]
        axes.loglog(GROUP_SIZES, errors, style, color=color, marker="o", label=method)
    axes.plot(GROUP_SIZES, [1 / k for k in GROUP_SIZES], ":", color=GREY, label="1/K")

    axes.set_xticks(GROUP_SIZES, GROUP_SIZES)
    axes.set_yticks([0.03, 0.05, 0.1, 0.2, 0.5], ["3%", "5%", "10%", "20%", "50%"])
    axes.minorticks_off()
    title = "Eqs 16 and 20 with K i.i.d. draws"
    label_axes(axes, title, "completions per group K", "bias of the gradient (% of its norm)")


def plot_exo() -> "Figure":
    figure, panels = canvas(["abc"], (13, 4))
    plot_policies(panels["a"])
    plot_landscapes(panels["b"])
    plot_bias(panels["c"])
    return figure


FIGURES = {"exo.png": plot_exo}


def main(args: Args) -> None:
    run_experiments(args, SECTIONS, FIGURES)


if __name__ == "__main__":
    checked_command(main, Args)
