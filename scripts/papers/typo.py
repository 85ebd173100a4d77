"""TYPO's experiments on tabular policies: interpolation and preservation (Figs. 2, 3, 5, 6, appendix A).

The optima are finite and Newton's method reaches them. Those of DPO and IPO lie at infinity only in the limit λ → 0;
at λ = 1e-5 they are some 10⁵ nats away. The figure is typo.png.

    python scripts/papers/typo.py --output-dir runs/bandits
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from algos.dpo import dpo_loss
from algos.ipo import ipo_loss
from algos.typo import typo_loss
from scripts.lab.commands import checked_command
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, canvas, label_axes
from scripts.lab.tabular import Optimum, fit_policy, ordered_pairs, total_variation, vector
from scripts.papers import Args, Finding, Section, judged, reported, run_experiments, same_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = ("DPO", "IPO", "TYPO")


class Setting(NamedTuple):
    """One prompt: the target policy π*, from which the preferences come, and the reference π_ref."""

    pi_star: Tensor
    pi_ref: Tensor


SETTINGS = {  # appendix A.1; the prompts x_g and x_b of Eq 18
    "interpolation": Setting(vector(0.6, 0.3, 0.1), vector(0.4, 0.4, 0.2)),
    "good": Setting(vector(0.6, 0.3, 0.1), vector(0.6, 0.3, 0.1)),
    "bad": Setting(vector(0.4, 0.2, 0.4), vector(0.6, 0.2, 0.2)),
}
SWEEP = torch.logspace(-5, 3, 33, dtype=torch.float64).tolist()  # values of λ
OPTIMA = {  # for each λ the optima of "interpolation", to the digits given; the last λ stands for ∞
    1e-5: {"DPO": "1, 0, 0", "IPO": "1, 0, 0", "TYPO": ".6, .3, .1"},
    0.1: {"DPO": ".999, .001, 0", "IPO": ".805, .185, .009", "TYPO": ".5667, .3224, .1109"},
    0.5: {"DPO": ".7912, .1978, .0110", "IPO": ".5049, .3764, .1188", "TYPO": ".5031, .3604, .1365"},
    1.0: {"DPO": ".6316, .3158, .0526", "IPO": ".4532, .3913, .1554", "TYPO": ".4710, .3761, .1529"},
    2.0: {"DPO": ".5232, .3700, .1068", "IPO": ".4267, .3965, .1767", "TYPO": ".4442, .3869, .1689"},
    10.0: {"DPO": ".4253, .3969, .1778", "IPO": ".4054, .3995, .1952", "TYPO": ".4111, .3972, .1916"},
    1e5: {"DPO": ".4000, .4000, .2000", "IPO": ".4000, .4000, .2000", "TYPO": ".4000, .4000, .2000"},
}
PRESERVATION = (  # setting, method, its optimum at λ = 1
    ("good", "TYPO", ".6, .3, .1"),
    ("good", "DPO", ".783, .196, .022"),
    ("bad", "TYPO", ".5272, .1949, .2779"),
    ("bad", "DPO", ".6667, .1111, .2222"),
)


def preferences(pi_star: Tensor) -> tuple[Tensor, Tensor]:
    """All (winner, loser) pairs and their probabilities, Eq 55: pairs uniform, P(y_i ≻ y_j) = π*_i / (π*_i + π*_j)."""
    pairs = ordered_pairs(len(pi_star))
    winners = pairs[:, 0]
    weights = pi_star[winners] / pi_star[pairs].sum(1)
    return pairs, weights / weights.sum()


@functools.cache
def optimum(method: str, lam: float, setting: str = "interpolation") -> Optimum:
    """The optimum of DPO with β = λ, IPO with τ = λ, or TYPO with λ and the exact expectation over π_ref."""
    pi_star, pi_ref = SETTINGS[setting]
    pairs, weights = preferences(pi_star)
    ref_logps = pi_ref.log()

    def losses(logps: Tensor) -> Tensor:
        if method == "DPO":
            return dpo_loss(logps[pairs], ref_logps[pairs], lam)
        if method == "IPO":
            return ipo_loss(logps[pairs], ref_logps[pairs], lam)
        # TYPO's loss is linear in the samples' log-probs, so their expectation stands for M samples
        expected_logps = (pi_ref @ logps).expand(len(pairs), 1)
        return typo_loss(logps[pairs], expected_logps, lam)

    return fit_policy(losses, weights, ref_logps)


def distances(method: str, setting: str) -> list[float]:
    """For each λ of SWEEP, the distance of the optimum to π*."""
    pi_star = SETTINGS[setting].pi_star
    return [total_variation(optimum(method, lam, setting).policy, pi_star) for lam in SWEEP]


# ---------------------------------------------------------------- checks


def optima_interpolate() -> Iterator[Finding]:
    for lam, expected_optima in OPTIMA.items():
        for method, expected in expected_optima.items():
            policy = optimum(method, lam).policy
            yield same_digits(f"{method}, λ = {lam:g}", expected, *policy.tolist())


def optima_are_reached() -> Iterator[Finding]:
    optima = []
    for lam in OPTIMA:
        if lam <= 10:
            optima += [optimum(method, lam) for method in METHODS]

    gradient = max(stop.gradient_norm for stop in optima)
    step = max(stop.newton_step for stop in optima)
    yield judged("largest gradient norm left, λ ≤ 10", "< 1e-8", gradient, gradient < 1e-8)
    yield judged("largest Newton step left, λ ≤ 10, nats", "< 1e-5", step, step < 1e-5)


def optima_of_preservation() -> Iterator[Finding]:
    for setting, method, expected in PRESERVATION:
        policy = optimum(method, 1.0, setting).policy
        statement = f"preservation, x_{setting[0]}, {method}, λ = 1"
        yield same_digits(statement, expected, *policy.tolist())


def typo_preserves_and_improves() -> Iterator[Finding]:
    good = max(distances("TYPO", "good"))
    yield judged("x_g, TYPO: largest distance to π* over all λ", "0", good, good < 1e-8)

    bad = max(distances("TYPO", "bad"))
    of_ref = total_variation(*SETTINGS["bad"])
    expected = f"< {of_ref:.4f}, π_ref's"
    yield judged("x_b, TYPO: largest distance to π* over all λ", expected, bad, bad < of_ref)


def dpo_and_ipo_do_not() -> Iterator[Finding]:
    for method in ("DPO", "IPO"):
        good = max(distances(method, "good"))
        yield reported(f"x_g, {method}: largest distance to π* over all λ", good)
        bad = min(distances(method, "bad"))
        yield reported(f"x_b, {method}: least distance to π* over all λ", bad)


REMARKS = """\
DPO's β, IPO's τ (gap 1/(2τ)) and TYPO's λ are all λ. Every optimum is finite and reached; λ = 1e5 stands for ∞."""

SECTIONS = (
    Section(
        "TYPO: interpolation and preservation",
        (
            optima_interpolate,
            optima_are_reached,
            optima_of_preservation,
            typo_preserves_and_improves,
            dpo_and_ipo_do_not,
        ),
        REMARKS,
    ),
)


# ---------------------------------------------------------------- figure


def plot_interpolation(axes: "Axes", method: str) -> None:
    """The probabilities at the optimum against λ, with those of π* and π_ref at the sides."""
    pi_star, pi_ref = SETTINGS["interpolation"]
    policies = torch.stack([optimum(method, lam).policy for lam in SWEEP])  # (λ, completions)
    for arm, (color, style) in enumerate([(BLUE, "-"), (ORANGE, "--"), (GREEN, "-.")]):
        letter = "abc"[arm]
        axes.semilogx(SWEEP, policies[:, arm], style, color=color, label=f"$\\pi_\\theta(y_{letter})$")
        axes.plot(SWEEP[0], pi_star[arm], "<", color=color, clip_on=False)
        axes.plot(SWEEP[-1], pi_ref[arm], ">", color=color, clip_on=False)

    axes.set_ylim(-0.03, 1.03)
    parameter = {"DPO": "λ = β", "IPO": "λ = τ", "TYPO": "λ"}[method]
    title = f"{method} (left marks: π*, right marks: π_ref)"
    label_axes(axes, title, f"{parameter} (no unit)", "probability")


def plot_preservation(axes: "Axes", setting: str, title: str) -> None:
    """The distance to π* against λ."""
    of_ref = total_variation(*SETTINGS[setting])
    axes.axhline(of_ref, color=GREY, linestyle=":", label="π_ref")
    for method, color, style in (("DPO", BLUE, "-"), ("IPO", ORANGE, "--"), ("TYPO", GREEN, "-.")):
        axes.semilogx(SWEEP, distances(method, setting), style, color=color, label=method)
    label_axes(axes, f"Preservation, {title}", "λ (no unit)", "distance to π* (total variation)")


def plot_typo() -> "Figure":
    figure, panels = canvas(["aabbcc", "dddeee"], (11, 6.5))
    plot_interpolation(panels["a"], "DPO")
    plot_interpolation(panels["b"], "IPO")
    plot_interpolation(panels["c"], "TYPO")
    plot_preservation(panels["d"], "good", "prompt $x_g$: π_ref = π*")
    plot_preservation(panels["e"], "bad", "prompt $x_b$: π_ref ≠ π*")
    return figure


FIGURES = {"typo.png": plot_typo}


def main(args: Args) -> None:
    run_experiments(args, SECTIONS, FIGURES)


if __name__ == "__main__":
    checked_command(main, Args)
