"""The papers' experiments that need no language model: tabular softmax policies, trained to the optimum in float64.

The losses are those of `algos/`, on the log-probs of a few completions of one prompt. Each number that is known for a
setting, in closed form or worked out beforehand, is printed beside ours; one that disagrees makes the exit code 1. The
optima sought are finite (DPO's and IPO's lie at infinity only in the limit λ → 0, at λ = 1e-5 some 10⁵ nats away), and
Newton's method reaches them. One figure per paper goes into `--output-dir`:

    typo.png          TYPO: interpolation and preservation (Figs. 2, 3, 5, 6, appendix A)
    distillation.png  reward-model distillation, arXiv 2405.19316: Propositions 3 and 7, Theorems 1 and 2
    exo.png           EXO, arXiv 2402.00856: mode seeking (Fig. 1), the gradients of Eqs 16 and 20 at finite K

    python scripts/bandits.py --output-dir runs/bandits
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import figures
import torch
from figures import BLUE, GREEN, GREY, ORANGE, canvas, label
from torch import Tensor

from algos.distill_dpo import distill_loss
from algos.dpo import dpo_loss
from algos.ensemble_dpo import ensemble_losses
from algos.exo import dpo_rw_loss, exo_loss
from algos.ipo import ipo_loss
from algos.pessimistic_dpo import pessimistic_loss
from algos.typo import typo_loss
from shared.run import command


@dataclass(kw_only=True)
class Args:
    """The papers' experiments on tabular policies."""

    output_dir: Path = Path("runs/bandits")
    """directory of the figures"""


class Optimum(NamedTuple):
    """Where `minimise` stopped."""

    x: Tensor  # the parameters; of a tabular policy, its logits
    loss: float
    gradient: float  # norm
    step: float  # largest entry of the Newton step that is left

    @property
    def policy(self) -> Tensor:
        return self.x.softmax(0)


def vector(*values: float) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation of two distributions, from 0 to 1."""
    return float((p - q).abs().sum() / 2)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 200) -> Optimum:
    """Newton's method on |curvature|, with backtracking. Directions without curvature (a shift of all logits) stay."""
    x = start.clone()
    for _ in range(steps):
        value, gradient, curvature = loss(x), torch.func.grad(loss)(x), torch.func.hessian(loss)(x)
        values, vectors = torch.linalg.eigh(curvature)
        inverse = torch.where(values.abs() > 1e-10 * values.abs().max(), 1 / values.abs(), 0)
        step = -vectors @ (inverse * (vectors.T @ gradient))
        left = float(step.abs().max())
        if left <= 1e-11 * (1 + float(x.abs().max())):
            break
        size = 1.0
        while not loss(x + size * step) <= value + 1e-4 * size * (gradient @ step) + 1e-13 * value.abs():
            size /= 2
        x = x + size * step
    return Optimum(x, float(value), float(gradient.norm()), left)


def fit(losses: Callable[[Tensor], Tensor], weights: Tensor, start: Tensor) -> Optimum:
    """The softmax policy, one logit per completion, that minimises the weighted sum of losses(log π_θ)."""
    return minimise(lambda logits: (weights * losses(logits.log_softmax(0))).sum(), start)


# ---------------------------------------------------------------- TYPO: interpolation and preservation

SETTINGS = {  # π*, π_ref: appendix A.1; prompts x_g and x_b of Eq 18
    "interpolation": (vector(0.6, 0.3, 0.1), vector(0.4, 0.4, 0.2)),
    "good": (vector(0.6, 0.3, 0.1), vector(0.6, 0.3, 0.1)),
    "bad": (vector(0.4, 0.2, 0.4), vector(0.6, 0.2, 0.2)),
}
SWEEP = torch.logspace(-5, 3, 33, dtype=torch.float64).tolist()
OPTIMA = {  # for λ the optima of "interpolation", to the digits given; the last λ stands for ∞
    1e-5: {"DPO": "1, 0, 0", "IPO": "1, 0, 0", "TYPO": ".6, .3, .1"},
    0.1: {"DPO": ".999, .001, 0", "IPO": ".805, .185, .009", "TYPO": ".5667, .3224, .1109"},
    0.5: {"DPO": ".7912, .1978, .0110", "IPO": ".5049, .3764, .1188", "TYPO": ".5031, .3604, .1365"},
    1.0: {"DPO": ".6316, .3158, .0526", "IPO": ".4532, .3913, .1554", "TYPO": ".4710, .3761, .1529"},
    2.0: {"DPO": ".5232, .3700, .1068", "IPO": ".4267, .3965, .1767", "TYPO": ".4442, .3869, .1689"},
    10.0: {"DPO": ".4253, .3969, .1778", "IPO": ".4054, .3995, .1952", "TYPO": ".4111, .3972, .1916"},
    1e5: {"DPO": ".4000, .4000, .2000", "IPO": ".4000, .4000, .2000", "TYPO": ".4000, .4000, .2000"},
}


def preferences(pi_star: Tensor) -> tuple[Tensor, Tensor]:
    """All (winner, loser) and their probabilities: pairs uniform, P(y_i ≻ y_j) = π*_i / (π*_i + π*_j), Eq 55."""
    pairs = torch.tensor(list(itertools.permutations(range(len(pi_star)), 2)))
    chances = pi_star[pairs[:, 0]] / pi_star[pairs].sum(1)
    return pairs, chances / chances.sum()


@functools.cache
def interpolation(method: str, lam: float, setting: str = "interpolation") -> Optimum:
    """The optimum of DPO with β = λ, IPO with τ = λ, or TYPO with λ and the exact expectation over π_ref."""
    pi_star, ref = SETTINGS[setting]
    (pairs, weights), ref_logps = preferences(pi_star), ref.log()
    losses = {
        "DPO": lambda logps: dpo_loss(logps[pairs], ref_logps[pairs], lam),
        "IPO": lambda logps: ipo_loss(logps[pairs], ref_logps[pairs], lam),
        # the loss is linear in the samples' log-probs: their expectation stands for M samples
        "TYPO": lambda logps: typo_loss(logps[pairs], (ref @ logps).expand(len(pairs), 1), lam),
    }
    return fit(losses[method], weights, ref_logps)


def errors(method: str, setting: str) -> list[float]:
    """Distances to π* over SWEEP."""
    return [distance(interpolation(method, lam, setting).policy, SETTINGS[setting][0]) for lam in SWEEP]


# ---------------------------------------------------------------- reward-model distillation

CONFLICT = torch.stack([vector(1, -1, 0), vector(-1, 1, 0)])  # two reward models: no saddle point for Theorem 2


def uniform(arms: int) -> Tensor:
    """Log-probs of the uniform reference."""
    return torch.full((arms,), -math.log(arms), dtype=torch.float64)


def chain(arms: int, closed: bool) -> Tensor:
    """The (winner, loser) of y_1 ≺ y_2 ≺ ... ≺ y_n: neighbours only, or the transitive closure."""
    return torch.tensor([(j, i) for i, j in itertools.combinations(range(arms), 2) if closed or j == i + 1])


def pdpo_loss(logps: Tensor, ref_logps: Tensor, beta: float, alpha: float) -> Tensor:
    """Eq 13 with γ = β/α, Ω on the pairs themselves. logps, ref_logps (B, 2) → (B,)."""
    return pessimistic_loss(dpo_loss(logps, ref_logps, beta), logps, beta / alpha)


def pdpo_pair(beta: float, alpha: float, winner: float = 0.4) -> float:
    """β h at p-DPO's optimum over log π_θ(y_l), with π_θ(y_w) fixed and π_θ(y_l) not bounded (Proposition 3)."""
    fixed = vector(winner).log()
    optimum = minimise(lambda x: pdpo_loss(torch.cat([fixed, x])[None], uniform(2)[None], beta, alpha).sum(), fixed)
    return beta * float(fixed - optimum.x)


def pdpo_bounded(beta: float, alpha: float, winner: float) -> float:
    """The best π_θ(y_l) ≤ 1 - π_θ(y_w) in steps of 1e-4, π_θ(y_w) fixed (Proposition 3)."""
    losers = torch.arange(1, round((1 - winner) * 10_000) + 1, dtype=torch.float64) / 10_000
    logps = torch.stack([torch.full_like(losers, winner), losers], 1).log()
    return float(losers[pdpo_loss(logps, uniform(2).expand_as(logps), beta, alpha).argmin()])


def dpo_slope(h: float, beta: float) -> float:
    """dL/dh of DPO: negative for every h, so that no optimum is finite (Proposition 1)."""
    return float(torch.func.grad(lambda x: dpo_loss(torch.stack([x, 0 * x])[None], vector(0, 0)[None], beta)[0])(h))


def pdpo_arms(pairs: Tensor, arms: int, beta: float, alpha: float) -> Tensor:
    """The policy at p-DPO's optimum over all arms jointly, uniform reference."""
    ref_logps = uniform(arms)
    return fit(lambda logps: pdpo_loss(logps[pairs], ref_logps[pairs], beta, alpha), vector(1), ref_logps).policy


def ipo_arms(pairs: Tensor, arms: int, inverse_tau: float) -> Tensor:
    """The log-ratios at IPO's optimum. The paper's target is τ⁻¹ where algos/ipo.py has 1/(2τ): its τ is half."""
    ref_logps = uniform(arms)
    optimum = fit(lambda logps: ipo_loss(logps[pairs], ref_logps[pairs], 1 / (2 * inverse_tau)), vector(1), ref_logps)
    return optimum.x.log_softmax(0) - ref_logps


def spread(arms: int, closed: bool, inverse_tau: float) -> float:
    """The range of IPO's log-ratios (Proposition 7)."""
    ratios = ipo_arms(chain(arms, closed), arms, inverse_tau)
    return float(ratios.max() - ratios.min())


def closure_effects() -> list[tuple[float, float, float]]:
    """Over appendix B's β and α, for three arms: β⁻¹ log(α - 1), which p-DPO and IPO share as τ⁻¹, and the distances
    between the policies without and with the transitive closure, of p-DPO and of IPO."""
    effects = []
    for beta, alpha in itertools.product((1, 3, 10, 30), (5, 10, 20, 50, 100, 1000)):
        inverse_tau = math.log(alpha - 1) / beta
        pessimistic = [pdpo_arms(chain(3, closed), 3, beta, alpha) for closed in (False, True)]
        ipo = [ipo_arms(chain(3, closed), 3, inverse_tau).softmax(0) for closed in (False, True)]
        effects.append((inverse_tau, distance(*pessimistic), distance(*ipo)))
    return effects


def tilted(ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """π_ref exp(r/β) / Z, the optimum of the alignment objective (Eq 3)."""
    return (ref.log() + rewards / beta).softmax(0)


def distilled(rewards: Tensor, ref: Tensor, pairs: Tensor, weights: Tensor, beta: float, start: Tensor) -> Optimum:
    """The minimiser of the distillation loss, Eq 7, on weighted pairs."""
    return fit(
        lambda logps: distill_loss(logps[pairs], ref.log()[pairs], rewards[pairs], beta), weights / weights.sum(), start
    )


GRAPHS = {  # pairs of 5 arms
    "all pairs": list(itertools.permutations(range(5), 2)),
    "chain": [(0, 1), (1, 2), (2, 3), (3, 4)],
    "two separate pairs": [(0, 1), (2, 3)],
}


def theorem_1(graph: str) -> tuple[Tensor, list[Optimum]]:
    """π_ref exp(r/β)/Z for random rewards and a random reference of 5 arms, β = 0.7, and the minimisers of d-DPO on
    randomly weighted pairs, from two random starts."""
    generator = torch.Generator().manual_seed(0)
    rewards, ref, *starts = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    pairs, ref = torch.tensor(GRAPHS[graph]), ref.softmax(0)
    weights = torch.rand(len(pairs), generator=generator, dtype=torch.float64) + 0.1
    return tilted(ref, rewards, 0.7), [distilled(rewards, ref, pairs, weights, 0.7, start) for start in starts]


def pessimistic_score(policy: Tensor, rewards: Tensor, ref: Tensor, beta: float) -> float:
    """Eq 8: min_i (E_π r_i - E_ref r_i) - β KL(π || π_ref). rewards (S, completions)."""
    return float((rewards @ (policy - ref)).min() - beta * (policy * (policy / ref).log()).sum())


def theorem_2() -> list[float]:
    """Eq 8 at the two members of P_β(S), reached by distillation, and at π_ref; S = CONFLICT, β = 1, π_ref uniform."""
    ref, pairs = uniform(3).exp(), torch.tensor(list(itertools.permutations(range(3), 2)))
    members = [distilled(rewards, ref, pairs, vector(*[1] * 6), 1.0, ref.log()).policy for rewards in CONFLICT]
    return [pessimistic_score(policy, CONFLICT, ref, 1.0) for policy in (*members, ref)]


# ---------------------------------------------------------------- EXO: gradients

SFT, REWARDS, LOGITS = vector(0.4, 0.4, 0.2), vector(0.1, 0.6, 1.0), vector(0.5, -0.3, 0.2)
PROPORTIONAL, ONCE = (0, 0, 1, 1, 2), (0, 1, 2)  # each completion as often as π_sft has it; each once
COUNTS = (2, 3, 4, 8, 16, 32)  # completions per group, K
EXO_LOSSES = {"EXO": exo_loss, "DPO-rw": dpo_rw_loss}


def divergence(name: str, logits: Tensor, beta: float, beta_r: float) -> Tensor:
    """KL(π_θ^{β_π} || π*_{β_r}), the right side of Eq 16, or for DPO-rw its reverse, of Eq 20; Eqs 5 and 9."""
    log_p = (beta * logits.log_softmax(0) + (1 - beta) * SFT.log()).log_softmax(0)
    log_target = (SFT.log() + REWARDS / beta_r).log_softmax(0)
    first, second = (log_p, log_target) if name == "EXO" else (log_target, log_p)
    return (first.exp() * (first - second)).sum()


def expected_loss(name: str, logits: Tensor, rows: Tensor, weights: Tensor, beta: float, beta_r: float) -> Tensor:
    """The mean loss over groups of completions: rows (B, K) of indices, weights (B,)."""
    logps, targets = logits.log_softmax(0), (REWARDS / beta_r)[rows].log_softmax(1)
    return (weights * EXO_LOSSES[name](logps[rows], SFT.log()[rows], targets, beta)).sum()


def gradient_error(name: str, rows: Tensor, weights: Tensor, beta: float = 0.5, beta_r: float = 0.5) -> float:
    """|∇(mean loss) - ∇KL| / |∇KL|, at LOGITS."""
    exact = torch.func.grad(lambda x: divergence(name, x, beta, beta_r))(LOGITS)
    ours = torch.func.grad(lambda x: expected_loss(name, x, rows, weights, beta, beta_r))(LOGITS)
    return float((ours - exact).norm() / exact.norm())


def group(rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One group of completions, with weight 1."""
    return torch.tensor([rows]), vector(1)


def draws(k: int) -> tuple[Tensor, Tensor]:
    """All multisets of K independent draws from π_sft (B, K), and their probabilities."""
    rows = torch.tensor(list(itertools.combinations_with_replacement(range(len(SFT)), k)))
    counts = torch.nn.functional.one_hot(rows, len(SFT)).sum(1).double()
    logs = math.lgamma(k + 1) - torch.lgamma(counts + 1).sum(1) + counts @ SFT.log()
    return rows, logs.exp()


# ---------------------------------------------------------------- EXO: mode seeking

GRID = torch.linspace(-5, 5, 101, dtype=torch.float64)  # the completions; π_sft is uniform, so each counts once
MODES = (0.7, 2.0, 0.6), (0.3, -2.0, 0.6)  # weight, mean, standard deviation: the target is not a tie
STARTS = {"main mode": (2.0, 1.0), "minor mode": (-2.0, 1.0), "wide": (0.0, 3.0)}  # mean and scale


def gaussian(mean: Tensor | float, scale: Tensor | float) -> Tensor:
    """Log-probs of a Gaussian on GRID, its mean and scale being all the parameters it has."""
    return (-(((GRID - mean) / scale) ** 2) / 2).log_softmax(-1)


def bimodal() -> Tensor:
    """Log-probs of the target π* on GRID; with a uniform π_sft and β_r = 1 the rewards are these up to a constant."""
    return torch.stack([gaussian(mean, scale) + math.log(weight) for weight, mean, scale in MODES]).logsumexp(0)


def matching_loss(name: str, logps: Tensor) -> Tensor:
    """EXO's or DPO-rw's loss (B,) of policies (B, grid) with β_π = 1, one group being the whole grid."""
    return EXO_LOSSES[name](logps, uniform(len(GRID)).expand_as(logps), bimodal().expand_as(logps), 1.0)


def match(name: str, start: tuple[float, float]) -> tuple[float, float, float]:
    """Mean, scale and loss where a descent from `start` stops."""
    optimum = minimise(
        lambda x: matching_loss(name, gaussian(x[0], x[1].exp())[None]).sum(), vector(start[0], math.log(start[1]))
    )
    return float(optimum.x[0]), math.exp(optimum.x[1]), optimum.loss


def landscape(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Means, and for each the best scale and its loss, over a grid of both: the global optimum without descent."""
    means = torch.linspace(-4, 4, 161, dtype=torch.float64)
    scales = torch.logspace(-1, 1, 81, dtype=torch.float64)
    logps = gaussian(means[:, None, None], scales[:, None])  # (means, scales, grid)
    losses, index = matching_loss(name, logps.flatten(0, 1)).view(len(means), -1).min(1)
    return means, scales[index], losses


def moments(logps: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a distribution on GRID."""
    mean = float(logps.exp() @ GRID)
    return mean, math.sqrt(float(logps.exp() @ (GRID - mean) ** 2))


def mass(logps: Tensor, low: float, high: float) -> float:
    """Probability of GRID's points between two bounds."""
    return float(logps.exp()[(low <= GRID) & (high >= GRID)].sum())


# ---------------------------------------------------------------- the first step


def step_one() -> dict[str, tuple[float, float]]:
    """The losses' values at π_θ = π_ref: expected, and got from 8 random groups."""
    generator = torch.Generator().manual_seed(1)
    logps = -20 + 5 * torch.randn(8, 4, generator=generator, dtype=torch.float64)
    rewards = torch.randn(8, 2, 3, generator=generator, dtype=torch.float64)
    pair, target = logps[:, :2], torch.randn(8, 4, generator=generator, dtype=torch.float64).log_softmax(1)
    softened, gaps = vector(0.999, 0.001).log().expand(8, 2), rewards[:, 0] - rewards[:, 1]
    ensemble = ensemble_losses(pair, pair, rewards, 0.1).mean(0).min()
    return {
        "DPO: ln 2": (math.log(2), dpo_loss(pair, pair, 0.1)),
        "DPO, K = 4 ranked: ln K!": (math.log(24), dpo_loss(logps, logps, 0.1)),
        "IPO, τ = 0.1: 1/(4τ²)": (25.0, ipo_loss(pair, pair, 0.1)),
        "EXO-pref, ε = 1e-3: -(log(1-ε) + log ε)/2 - ln 2": (
            -(math.log(0.999) + math.log(0.001)) / 2 - math.log(2),
            exo_loss(pair, pair, softened, 0.5),
        ),
        "EXO-rw, K = 4: -ln K - mean log p": (-math.log(4) - target.mean(), exo_loss(logps, logps, target, 0.5)),
        "DPO-rw, K = 4: ln K": (math.log(4), dpo_rw_loss(logps, logps, target, 0.5)),
        "d-DPO: mean Δr²": ((gaps[:, 0] ** 2).mean(), distill_loss(pair, pair, rewards[..., 0], 0.1)),
        "e-DPO, 3 models, γ = 0.01: min_i mean Δr_i² + γ Ω": (
            (gaps**2).mean(0).min() - 0.01 * pair.sum(1).mean(),
            pessimistic_loss(ensemble.expand(8), pair, 0.01),
        ),
    }


# ---------------------------------------------------------------- expected against got


class Check(NamedTuple):
    """One printed line; `ok` is None where the number is reported only."""

    name: str
    expected: str
    got: str
    ok: bool | None


def digits(name: str, expected: str, *got: float) -> Check:
    """Agreement to the digits given, three at least."""
    wanted = [x.strip() for x in expected.split(",")]
    places = max(3, *(len(x.partition(".")[2]) for x in wanted), 3)
    ok = all(abs(x - float(y)) <= 0.5 * 10**-places + 1e-12 for x, y in zip(got, wanted, strict=True))
    return Check(name, expected, ", ".join(f"{x:.{places}f}" for x in got), ok)


def close(name: str, expected: float, got: float) -> Check:
    """Agreement with a closed form."""
    return Check(name, f"{expected:.6f}", f"{got:.6f}", abs(got - expected) <= 1e-8 * max(1, abs(expected)))


def claim(name: str, expected: str, got: float, ok: bool | None) -> Check:
    """An inequality, put in words."""
    return Check(name, expected, f"{got:.2e}" if 0 < abs(got) < 1e-3 else f"{got:.4f}", ok)


def check_typo() -> list[Check]:
    """TYPO: interpolation and preservation

    DPO's β, IPO's τ (gap 1/(2τ)) and TYPO's λ are all λ. Every optimum is finite and reached; λ = 1e5 stands for ∞.
    """
    checks, optima = [], []
    for lam, row in OPTIMA.items():
        for method, expected in row.items():
            optima.append(interpolation(method, lam))
            checks.append(digits(f"{method}, λ = {lam:g}", expected, *optima[-1].policy.tolist()))
    gradient, step = (max(getattr(x, name) for x in optima[:-3]) for name in ("gradient", "step"))
    checks += [
        claim("largest gradient norm left, λ ≤ 10", "< 1e-8", gradient, gradient < 1e-8),
        claim("largest Newton step left, λ ≤ 10, nats", "< 1e-5", step, step < 1e-5),
    ]
    for setting, method, expected in (
        ("good", "TYPO", ".6, .3, .1"),
        ("good", "DPO", ".783, .196, .022"),
        ("bad", "TYPO", ".5272, .1949, .2779"),
        ("bad", "DPO", ".6667, .1111, .2222"),
    ):
        got = interpolation(method, 1.0, setting).policy.tolist()
        checks.append(digits(f"preservation, x_{setting[0]}, {method}, λ = 1", expected, *got))
    good, bad = max(errors("TYPO", "good")), max(errors("TYPO", "bad"))
    start = distance(*SETTINGS["bad"])
    checks.append(claim("x_g, TYPO: largest distance to π* over all λ", "0", good, good < 1e-8))
    checks.append(claim("x_b, TYPO: largest distance to π* over all λ", f"< {start:.4f}, π_ref's", bad, bad < start))
    for method in ("DPO", "IPO"):
        good, bad = max(errors(method, "good")), min(errors(method, "bad"))
        checks.append(claim(f"x_g, {method}: largest distance to π* over all λ", "", good, None))
        checks.append(claim(f"x_b, {method}: least distance to π* over all λ", "", bad, None))
    return checks


def check_propositions() -> list[Check]:
    """Reward-model distillation: propositions

    α = β/γ. τ is the paper's here, IPO's gap being 1/τ: half of it goes into the loss, whose gap is 1/(2τ).
    """
    steepest = max(dpo_slope(vector(h)[0], 1.0) for h in range(101))
    checks = [claim("Prop 1, DPO: largest dL/dh for h from 0 to 100", "< 0", steepest, steepest < 0)]
    for beta, alpha in ((1.0, 1.5), (1.0, 3.0), (1.0, 10.0), (0.1, 10.0), (0.1, 1000.0)):
        name = f"Prop 3, β h of p-DPO, π_θ(y_w) fixed, β = {beta:g}, α = {alpha:g}: log(α-1)"
        checks.append(close(name, math.log(alpha - 1), pdpo_pair(beta, alpha)))
    both = pdpo_arms(torch.tensor([[0, 1]]), 2, 1.0, 10.0)
    checks += [
        digits("Prop 3, π_θ(y_w) = .6, α = 1.5: π_θ(y_l) is bounded by .4", ".4000", pdpo_bounded(1.0, 1.5, 0.6)),
        digits("Prop 3, π_θ(y_w) = .6, α = 11: π_θ(y_l) = .6/10", ".0600", pdpo_bounded(1.0, 11.0, 0.6)),
        digits("p-DPO, two arms jointly, β = 1, γ = .1: log(α+1)", "2.398", float((both[0] / both[1]).log())),
    ]
    for arms in (3, 4, 8):
        expected = (arms - 1) * 2.0, 2 * (arms - 1) / arms * 2.0
        for closed, name in enumerate(("chain: (n-1)/τ", "closure: 2(n-1)/(nτ)")):
            name = f"Prop 7, range of IPO's log-ratios, n = {arms}, τ = 1/2, {name}"
            checks.append(close(name, expected[closed], spread(arms, bool(closed), 2.0)))
    for name, index in (("p-DPO", 1), ("IPO", 2)):
        largest = max(effect[index] for effect in closure_effects())
        checks.append(claim(f"Fig. B.1, {name}: largest effect of the closure, total variation", "", largest, None))
    return checks


def check_theorems() -> list[Check]:
    """Reward-model distillation: theorems

    Theorem 1 asks for full support of the pairs; that they connect all completions is enough. Theorem 2 does not hold
    for the two reward models r = ±(1, -1, 0) with β = 1 and a uniform π_ref: π_ref is better than both its candidates.
    """
    checks = []
    for graph in GRAPHS:
        target, optima = theorem_1(graph)
        apart = graph == "two separate pairs"
        for start, optimum in zip(("first", "second"), optima, strict=True):
            name, got = f"Theorem 1, {graph}, {start} start", distance(optimum.policy, target)
            checks.append(claim(f"{name}: loss at the minimiser", "0", optimum.loss, optimum.loss < 1e-16))
            ok = got > 0.01 if apart else got < 1e-8
            checks.append(claim(f"{name}: distance to π_ref exp(r/β)/Z", "> 0.01" if apart else "0", got, ok))
    checks.append(digits("Theorem 2, Eq 8 at both members of P_β(S), and at π_ref", "-0.841, -0.841, 0", *theorem_2()))
    return checks


def check_exo() -> list[Check]:
    """EXO: gradients

    Against the gradients of the reverse (Eq 16) and the forward (Eq 20) KL, π_sft = (.4, .4, .2); the bias is that of
    the expectation over K independent draws, all of them enumerated, with β_π = β_r = 1/2.
    """
    checks = []
    for name, equation in (("EXO", "Eq 16"), ("DPO-rw", "Eq 20")):
        for beta, beta_r in ((1.0, 1.0), (0.5, 0.1), (0.1, 0.5)):
            label = f"{equation}, {name}, β_π = {beta:g}, β_r = {beta_r:g}, relative error of the gradient:"
            got = gradient_error(name, *group(PROPORTIONAL), beta, beta_r)
            checks.append(claim(f"{label} rows 2, 2, 1", "0", got, got < 1e-12))
            got = gradient_error(name, *group(ONCE), beta, beta_r)
            checks.append(claim(f"{label} rows 1, 1, 1", "> 0.1", got, got > 0.1))
        bias = {k: gradient_error(name, *draws(k)) for k in COUNTS}
        for k, got in bias.items():
            checks.append(claim(f"{equation}, {name}, bias of the gradient, K = {k} draws", "> 0", got, got > 0.001))
        ratio = bias[COUNTS[-1]] / bias[COUNTS[-2]]
        checks.append(
            claim(f"{equation}, {name}, bias with K doubled: about half", ".45 to .55", ratio, 0.45 < ratio < 0.55)
        )
    return checks


def check_modes() -> list[Check]:
    """EXO: mode seeking

    The target is .7 N(2, .6) + .3 N(-2, .6) on 101 points, π_sft uniform, the policy a Gaussian. Weights and starts
    are chosen: with equal modes EXO's optimum is a tie, and started over the minor mode it stays there.
    """
    (_, main, _), (_, minor, _) = MODES
    stops = {name: {start: match(name, value) for start, value in STARTS.items()} for name in EXO_LOSSES}
    exo, forward = (gaussian(*min(stop.values(), key=lambda x: x[2])[:2]) for stop in stops.values())
    means, _, losses = landscape("EXO")
    top = float(means[losses.argmin()])
    checks = [claim("Fig. 1, EXO: mean of the best of all (mean, scale)", f"{main} ± .1", top, abs(top - main) < 0.1)]
    for start, wanted in zip(STARTS, (main, minor, main), strict=True):
        got = stops["EXO"][start][0]
        checks.append(claim(f"Fig. 1, EXO from start '{start}': mean", f"{wanted} ± .1", got, abs(got - wanted) < 0.1))
    for start in ("main mode", "minor mode"):
        got = stops["DPO-rw"][start][0]
        checks.append(
            close(f"Fig. 1, DPO-rw from start '{start}': mean, as from 'wide'", stops["DPO-rw"]["wide"][0], got)
        )
    for name, expected, got in zip(("mean", "deviation"), moments(bimodal()), moments(forward), strict=True):
        checks.append(close(f"Fig. 1, DPO-rw: {name} of the policy is the target's", expected, got))
    gap = stops["EXO"]["minor mode"][2] - stops["EXO"]["main mode"][2]
    checks.append(claim("Fig. 1, EXO: loss at the minor mode minus at the main mode", "> 0", gap, gap > 0))
    for bounds, name in (((-5, -1), "below -1, the minor mode"), ((-1, 1), "between the modes")):
        target, reverse, spread_out = (mass(logps, *bounds) for logps in (bimodal(), exo, forward))
        checks.append(claim(f"Fig. 1, mass {name}: the target's", "", target, None))
        checks.append(claim(f"Fig. 1, mass {name}: EXO's", "< .1", reverse, reverse < 0.1))
        checks.append(claim(f"Fig. 1, mass {name}: DPO-rw's", "> .1", spread_out, spread_out > 0.1))
    return checks


def check_step_one() -> list[Check]:
    """All losses: the value at π_θ = π_ref"""
    return [close(name, float(expected), float(got.mean())) for name, (expected, got) in step_one().items()]


# ---------------------------------------------------------------- figures


def draw_typo(path: Path) -> None:
    figure, axes = canvas([[*"aabbcc"], [*"dddeee"]], (11, 6.5))
    pi_star, ref = SETTINGS["interpolation"]
    for method, panel in zip(("DPO", "IPO", "TYPO"), "abc", strict=True):
        policies = torch.stack([interpolation(method, lam).policy for lam in SWEEP]).T
        for arm, (color, style) in enumerate(((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."))):
            axes[panel].semilogx(SWEEP, policies[arm], style, color=color, label=f"$\\pi_\\theta(y_{'abc'[arm]})$")
            axes[panel].plot(SWEEP[0], pi_star[arm], "<", color=color, clip_on=False)
            axes[panel].plot(SWEEP[-1], ref[arm], ">", color=color, clip_on=False)
        axes[panel].set_ylim(-0.03, 1.03)
        name = {"DPO": "λ = β", "IPO": "λ = τ", "TYPO": "λ"}[method]
        label(axes[panel], f"{method} (left marks: π*, right marks: π_ref)", f"{name} (no unit)", "probability")
    for setting, panel in (("good", "d"), ("bad", "e")):
        axes[panel].axhline(distance(*SETTINGS[setting]), color=GREY, linestyle=":", label="π_ref")
        for method, (color, style) in {"DPO": (BLUE, "-"), "IPO": (ORANGE, "--"), "TYPO": (GREEN, "-.")}.items():
            axes[panel].semilogx(SWEEP, errors(method, setting), style, color=color, label=method)
        title = {"good": "prompt $x_g$: π_ref = π*", "bad": "prompt $x_b$: π_ref ≠ π*"}[setting]
        label(axes[panel], f"Preservation, {title}", "λ (no unit)", "distance to π* (total variation)")
    figure.savefig(path, dpi=150)


def draw_distillation(path: Path) -> None:
    figure, axes = canvas([[*"abc"], [*"def"]], (13, 7.5))
    draw_pair(axes["a"], axes["b"])
    arms = range(2, 11)
    for closed, color, marker, name in ((False, BLUE, "o", "chain"), (True, ORANGE, "s", "transitive closure")):
        axes["c"].plot(arms, [spread(n, closed, 1.0) for n in arms], marker, color=color, label=f"{name}, optimum")
        formula = [2 * (n - 1) / n if closed else n - 1 for n in arms]
        axes["c"].plot(arms, formula, color=color, label="2(n-1)/(nτ)" if closed else "(n-1)/τ")
    label(axes["c"], "Proposition 7: IPO, τ = 1", "arms n", "range of log-ratios (nats)")
    effects = closure_effects()
    for index, color, marker, name in ((1, GREEN, "o", "p-DPO"), (2, ORANGE, "s", "IPO")):
        points = [(effect[0], effect[index]) for effect in effects]
        axes["d"].semilogx(*zip(*points, strict=True), marker, color=color, label=name, fillstyle="none")
    label(
        axes["d"],
        "Fig. B.1: three arms with and without closure",
        "τ⁻¹ = β⁻¹ log(α-1) (nats)",
        "change (total variation)",
    )
    draw_theorem_1(axes["e"])
    tilts, ref = torch.linspace(-1.5, 1.5, 121, dtype=torch.float64), uniform(3).exp()
    scores = [pessimistic_score(tilted(ref, t * CONFLICT[0], 1.0), CONFLICT, ref, 1.0) for t in tilts]
    axes["f"].plot(tilts, scores, color=GREY, label="π_ref exp(t r/β)/Z")
    axes["f"].plot([1, -1], theorem_2()[:2], "o", color=ORANGE, label="members of P_β(S), by d-DPO")
    axes["f"].plot([0], theorem_2()[2:], "s", color=BLUE, label="π_ref")
    label(axes["f"], "Theorem 2: r = ±(1, -1, 0), β = 1", "tilt t (no unit)", "pessimistic score, Eq 8 (reward)")
    figure.savefig(path, dpi=150)


def draw_pair(left, right) -> None:
    """One pair, π_θ(y_w) fixed: the losses against β h, and p-DPO's optimum against α."""
    h = torch.linspace(-3, 8, 200, dtype=torch.float64)
    winner = torch.full_like(h, math.log(0.4))
    logps, ref_logps = torch.stack([winner, winner - h], 1), uniform(2).expand(len(h), 2)
    left.plot(h, dpo_loss(logps, ref_logps, 1.0), color=GREY, linestyle=":", label="DPO: no optimum")
    for alpha, color, style in ((3.0, ORANGE, "--"), (10.0, BLUE, "-"), (100.0, GREEN, "-.")):
        losses = pdpo_loss(logps, ref_logps, 1.0, alpha)
        left.plot(h, losses, style, color=color, label=f"p-DPO, α = {alpha:g}")
        left.plot(h[losses.argmin()], losses.min(), "o", color=color)
    left.set_ylim(0, 5)
    label(left, "Propositions 1 and 3: β = 1, π_θ(y_w) = .4", "β h (nats)", "loss (nats)")
    alphas = torch.logspace(0.1, 3, 25, dtype=torch.float64)
    pair = torch.tensor([[0, 1]])
    joint = [pdpo_arms(pair, 2, 1.0, float(alpha)) for alpha in alphas]
    right.semilogx(alphas, [pdpo_pair(1.0, float(alpha)) for alpha in alphas], "o", color=BLUE, label="π_θ(y_w) fixed")
    right.plot(alphas, (alphas - 1).log(), "-", color=BLUE, label="log(α-1)")
    right.plot(alphas, [float((p[0] / p[1]).log()) for p in joint], "s", color=ORANGE, label="two arms jointly")
    right.plot(alphas, (alphas + 1).log(), "--", color=ORANGE, label="log(α+1)")
    label(right, "p-DPO's optimum: β = 1, uniform π_ref", "α = β/γ (no unit)", "β h at the optimum (nats)")


def draw_theorem_1(axes) -> None:
    """d-DPO's minimisers for three sets of pairs against the aligned policy."""
    arms = torch.arange(1, 6)
    axes.bar(arms, theorem_1("chain")[0], 0.8, color=GREY, alpha=0.3, label="π_ref exp(r/β)/Z")
    styles = {"all pairs": [(BLUE, "o", "")], "chain": [(GREEN, "^", "")]}
    styles["two separate pairs"] = [(ORANGE, "s", ", first start"), (ORANGE, "D", ", second start")]
    for shift, (graph, marks) in zip((-0.25, 0, 0.25), styles.items(), strict=True):
        for optimum, (color, marker, start) in zip(theorem_1(graph)[1], marks, strict=False):
            fill = "none" if marker == "D" else "full"
            axes.plot(arms + shift, optimum.policy, marker, color=color, fillstyle=fill, label=f"d-DPO, {graph}{start}")
    axes.set_ylim(0, 1.15)
    label(axes, "Theorem 1: pairs that connect all arms suffice", "arm", "probability")


def draw_exo(path: Path) -> None:
    figure, axes = canvas([[*"abc"]], (13, 4))
    styles = {
        "main mode": (BLUE, "-", "EXO, global optimum"),
        "minor mode": (GREEN, "-.", "EXO, started at minor mode"),
    }
    axes["a"].fill_between(GRID, bimodal().exp(), color=GREY, alpha=0.3, linewidth=0, label="target π*")
    for start, (color, style, name) in styles.items():
        axes["a"].plot(GRID, gaussian(*match("EXO", STARTS[start])[:2]).exp(), style, color=color, label=name)
    axes["a"].plot(
        GRID, gaussian(*match("DPO-rw", STARTS["wide"])[:2]).exp(), "--", color=ORANGE, label="DPO-rw, any start"
    )
    axes["a"].set_ylim(0, 0.105)
    label(axes["a"], "Fig. 1: a policy with one mode", "completion (position on a line, no unit)", "probability")
    for name, color, style in (("EXO", BLUE, "-"), ("DPO-rw", ORANGE, "--")):
        means, _, losses = landscape(name)
        axes["b"].plot(means, losses - losses.min(), style, color=color, label=name)
        bias = [gradient_error(name, *draws(k)) for k in COUNTS]
        axes["c"].loglog(COUNTS, bias, style, color=color, marker="o", label=name)
    label(
        axes["b"],
        "Loss at the best scale for each mean",
        "mean of the policy (no unit)",
        "loss minus its minimum (nats)",
    )
    axes["c"].plot(COUNTS, [1 / k for k in COUNTS], ":", color=GREY, label="1/K")
    axes["c"].set_xticks(COUNTS, COUNTS)
    axes["c"].set_yticks([0.03, 0.05, 0.1, 0.2, 0.5], ["3%", "5%", "10%", "20%", "50%"])
    axes["c"].minorticks_off()
    label(
        axes["c"],
        "Eqs 16 and 20 with K i.i.d. draws",
        "completions per group K",
        "bias of the gradient (% of its norm)",
    )
    figure.savefig(path, dpi=150)


SECTIONS = check_typo, check_propositions, check_theorems, check_exo, check_modes, check_step_one
FIGURES = {"typo.png": draw_typo, "distillation.png": draw_distillation, "exo.png": draw_exo}


def main(args: Args) -> None:
    figures.check()
    wrong = 0
    for section in SECTIONS:
        print("", inspect.cleandoc(section.__doc__), "", f"{'':78}{'expected':>26}{'got':>26}", sep="\n")
        for check in section():
            verdict = {True: "ok", False: "NOT", None: "reported"}[check.ok]
            wrong += check.ok is False
            print(f"  {check.name:76}{check.expected:>26}{check.got:>26}  {verdict}", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(args.output_dir / name)
    print(f"\n{wrong} disagree; figures: {', '.join(str(args.output_dir / name) for name in FIGURES)}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    command(main, Args)
