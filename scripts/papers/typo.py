"""TYPO, arXiv 2407.09072: its theory and its bandits, for TYPO, DPO, IPO and f-DPO.

A policy has one logit for each response to a prompt, in float64. The losses are those of algos/, and of
scripts/lab/qpo.py for f-DPO and the rest of the family QPO. DPO's β, IPO's τ and TYPO's λ are all λ here.

    python scripts/papers/typo.py
    python scripts/papers/typo.py --claim C13
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from algos.dpo import dpo_loss
from algos.ipo import ipo_loss
from algos.rm import rm_loss
from algos.typo import typo_loss
from scripts.lab.claim_files import Args, paper_command
from scripts.lab.claims import (
    Finding,
    Paper,
    Verdict,
    above,
    below,
    given,
    instead,
    judged,
    same_digits,
    same_value,
    vanishes,
)
from scripts.lab.commands import checked_command
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, canvas, label_axes
from scripts.lab.qpo import (
    FORWARD_KL,
    JENSEN_SHANNON,
    REVERSE_KL,
    Labelled,
    adam_path,
    alpha_divergence,
    chain_pairs,
    drawn_pairs,
    f_dpo_loss,
    f_tilted,
    hinge,
    ipo_reward,
    logarithm,
    logistic,
    minimise_each,
    qpo_loss,
    squared,
    uniform_pairs,
)
from scripts.lab.tabular import (
    bradley_terry,
    entropy,
    kl,
    minimise,
    objective,
    random_policies,
    tilted,
    total_variation,
    uniform_logps,
    vector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = Paper("typo", "New Desiderata for Direct Preference Optimization (TYPO)", "2407.09072")


Loss = Callable[[Tensor], Tensor]


class Setting(NamedTuple):
    """One prompt: the target policy π*, from which the preferences come, and the reference π_ref."""

    pi_star: Tensor
    pi_ref: Tensor

    @property
    def rewards(self) -> Tensor:
        """r* = log π*, up to a constant."""
        return self.pi_star.log()

    @property
    def ref_logps(self) -> Tensor:
        return self.pi_ref.log()


# appendix A.1 and the prompts x_g and x_b of Eq 18
INTERPOLATION = Setting(vector(0.6, 0.3, 0.1), vector(0.4, 0.4, 0.2))
GOOD = Setting(vector(0.6, 0.3, 0.1), vector(0.6, 0.3, 0.1))
BAD = Setting(vector(0.4, 0.2, 0.4), vector(0.6, 0.2, 0.2))
# ours: π_ref has its mass on the wrong response, without a tie in π*
SECOND_BAD = Setting(vector(0.6, 0.3, 0.1), vector(0.2, 0.2, 0.6))

METHODS = ("DPO", "IPO", "f-DPO (JS)", "TYPO")
RIVALS = ("DPO", "IPO", "f-DPO (JS)")
DIVERGENCES = {
    "f-DPO (JS)": JENSEN_SHANNON,
    "f-DPO (forward KL)": FORWARD_KL,
    "f-DPO (α = 0.5)": alpha_divergence(0.5),
}
QPO_METHODS = ("DPO", "IPO", *DIVERGENCES)


def losses_of(method: str, logps: Tensor, ref_logps: Tensor, pairs: Tensor, lam: float) -> Tensor:
    """The loss of each pair. logps, ref_logps (n,), of all responses; pairs (P, 2) → (P,)."""
    if method == "DPO":
        return dpo_loss(logps[pairs], ref_logps[pairs], lam)
    if method == "IPO":
        return ipo_loss(logps[pairs], ref_logps[pairs], lam)
    if method == "TYPO":
        # the loss is linear in the samples' log-probs, so their expectation stands for the samples
        expected_logp = (ref_logps.exp() * logps).sum()
        return typo_loss(logps[pairs], expected_logp.expand(len(pairs), 1), lam)
    return f_dpo_loss(logps[pairs], ref_logps[pairs], DIVERGENCES[method], lam)


def mean_loss(method: str, logps: Tensor, pi_ref: Tensor, data: Labelled, lam: float) -> Tensor:
    """The expected loss of a policy, from its log-probs (n,)."""
    losses = losses_of(method, logps, pi_ref.log(), data.pairs, lam)
    return (data.weights * losses).sum()


def optima(method: str, pi_ref: Tensor, data: Labelled, lams: Iterable[float]) -> Tensor:
    """For each λ the policy of the least expected loss, by Newton's method from π_ref: (number of λ, n)."""

    def loss(logits: Tensor, lam: float) -> Tensor:
        return mean_loss(method, logits.log_softmax(0), pi_ref, data, lam)

    strengths = vector(*lams)
    starts = pi_ref.log().expand(len(strengths), -1)
    return minimise_each(loss, starts, strengths).softmax(1)


def bandit_optima(method: str, setting: Setting, lams: Iterable[float]) -> Tensor:
    """The optima with the uniform pairs of the paper's bandits."""
    return optima(method, setting.pi_ref, uniform_pairs(setting.pi_star), lams)


def mixed_policies(count: int, n: int, seed: int) -> Tensor:
    """Random policies, (count, n), none of whose probabilities is below 0.1/n."""
    policies = random_policies(count, n, seed).exp()
    return 0.9 * policies + 0.1 / n


def two_logps(logit: Tensor) -> Tensor:
    """Log-probs of two responses, of which the first has this logit: (...) → (..., 2)."""
    return torch.stack([F.logsigmoid(logit), F.logsigmoid(-logit)], -1)


def gradient_of(loss: Loss, x: Tensor) -> Tensor:
    """The gradient of the sum of losses at x."""
    return torch.func.grad(lambda y: loss(y).sum())(x)


def distances(policies: Iterable[Tensor], target: Tensor) -> Tensor:
    """The total variation of each policy to the target."""
    return vector(*[total_variation(policy, target) for policy in policies])


def all_vanish(statement: str, differences: Sequence[Tensor], tolerance: float = 1e-10) -> Finding:
    """State that every entry of all these tensors is 0 up to rounding."""
    return vanishes(statement, torch.stack(differences), tolerance)


def all_digits(statement: str, texts: Iterable[str], rows: Iterable[Tensor]) -> Finding:
    """Compare rows of numbers with lists of known digits. The number of rows that agree is reported."""
    agree = []
    for text, row in zip(texts, rows, strict=True):
        finding = same_digits(statement, text, *row.tolist())
        agree.append(bool(finding.holds))
    return Finding(statement, f"{len(agree)}", f"{sum(agree)}", all(agree))


# ---------------------------------------------------------------- data and rewards

DATA = PAPER.section("Preference data and the reward model (§2, §2.1)")


@DATA.claim("C1", "Eq 1")
def pairs_are_draws_of_the_reference() -> Iterator[Finding]:
    """A training pair is two independent draws of π_ref with a Bradley-Terry label, and equal draws are left out.

    200,000 pairs are drawn and labelled. The share of each (winner, loser) is compared with the enumeration that the
    other claims use.
    """
    pi_star, pi_ref = INTERPOLATION
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(pi_ref, 400_000, replacement=True, generator=generator)
    draws = draws.view(-1, 2)
    draws = draws[draws[:, 0] != draws[:, 1]]
    uniform = torch.rand(len(draws), generator=generator, dtype=torch.float64)
    first_wins = uniform < bradley_terry(pi_star, draws)
    winner_first = torch.where(first_wins[:, None], draws, draws.flip(1))

    data = drawn_pairs(pi_star, pi_ref)
    is_pair = (winner_first == data.pairs[:, None]).all(2)  # (6, number of draws)
    errors = is_pair.double().mean(1) - data.weights
    variances = data.weights * (1 - data.weights)
    standard_errors = (variances / len(draws)).sqrt()
    largest = float((errors / standard_errors).abs().max())
    yield below("largest deviation of a share, in standard errors", 4, largest)


@DATA.claim("C2", "§2, footnote 1")
def a_tie_adds_a_constant() -> Iterator[Finding]:
    """A pair of two equal responses with p* = ½ adds a number to a loss that does not depend on the policy.

    It is ln 2 for DPO and ℓ_sup, and 1/(4λ²) for IPO. Each loss is evaluated with winner = loser at 100 policies.
    """
    tied = torch.tensor([0, 0])
    logps = random_policies(100, 3, seed=1)[:, tied]
    ref_logps = random_policies(100, 3, seed=2)[:, tied]
    samples = torch.zeros(100, 1, dtype=torch.float64)
    losses = torch.stack(
        [
            dpo_loss(logps, ref_logps, 0.3),
            typo_loss(logps, samples, 0.3),
        ]
    )
    yield vanishes("DPO and ℓ_sup less ln 2", losses - math.log(2), 1e-12)
    remainder = ipo_loss(logps, ref_logps, 0.5) - 1
    yield vanishes("IPO, λ = 0.5, less 1", remainder, 1e-12)
    js_losses = f_dpo_loss(logps, ref_logps, JENSEN_SHANNON, 0.3)
    yield vanishes("f-DPO (JS) less ln 2", js_losses - math.log(2), 1e-12)


@DATA.claim("C3", "Eqs 2, 3")
def the_reward_loss_is_bradley_terry() -> Iterator[Finding]:
    """ℓ_BT is -log exp(r_w) / (exp(r_w) + exp(r_l)), a function of the rewards' difference alone."""
    rewards = 3 * random_policies(100, 2, seed=3)
    likelihoods = rewards[:, 0].exp() / rewards.exp().sum(1)
    remainder = rm_loss(rewards) + likelihoods.log()
    yield vanishes("100 pairs, loss plus log of Eq 2", remainder, 1e-12)
    remainder = rm_loss(rewards + 5) - rm_loss(rewards)
    yield vanishes("the loss less that of rewards + 5", remainder, 1e-12)
    loss = rm_loss(vector(math.log(3), 0)[None])
    yield given(same_value("rewards log 3 and 0: log 4/3", math.log(4 / 3), float(loss)))


@DATA.claim("C4", "Eqs 3, 38")
def the_reward_loss_recovers_the_reward() -> Iterator[Finding]:
    """The minimiser of ℓ_BT is the reward r* behind the preferences, up to a constant.

    With all three pairs, with those of Eq 1, and with a chain of two pairs.
    """
    pi_star, pi_ref = INTERPOLATION
    rewards = pi_star.log()
    deviations = []
    for data in (uniform_pairs(pi_star), drawn_pairs(pi_star, pi_ref), chain_pairs(pi_star)):

        def loss(reward: Tensor, data: Labelled = data) -> Tensor:
            losses = rm_loss(reward[data.pairs])
            return (data.weights * losses).sum()

        optimum = minimise(loss, vector(0, 0, 0))
        difference = optimum.parameters - rewards
        deviations.append(difference - difference.mean())
    yield all_vanish("largest deviation from log π*, less the shift", deviations, 1e-8)


# ---------------------------------------------------------------- RLHF and DPO

RLHF = PAPER.section("The RLHF objective and DPO (§2.1, §2.2)")
STRENGTHS = (0.1, 0.5, 1.0, 2.0, 10.0)  # values of λ


def all_tilts(pi_ref: Tensor, rewards: Tensor, lams: Iterable[float]) -> Tensor:
    """π_ref exp(r/λ) / Z for each λ."""
    logps = [tilted(pi_ref.log(), rewards, lam) for lam in lams]
    return torch.stack(logps).exp()


def tilts(setting: Setting, lams: Iterable[float]) -> Tensor:
    """π_ref π*^(1/λ) / Z, which is π_ref exp(r*/λ) / Z, for each λ."""
    return all_tilts(setting.pi_ref, setting.rewards, lams)


def rlhf_optima(setting: Setting, lams: Iterable[float]) -> Tensor:
    """The policies of the least RLHF loss, Eq 4 with r* = log π*, by Newton's method."""
    strengths = vector(*lams)

    def loss(logits: Tensor, lam: float) -> Tensor:
        logps = logits.log_softmax(0)
        return -objective(logps, setting.ref_logps, setting.rewards, lam)

    starts = setting.ref_logps.expand(len(strengths), -1)
    return minimise_each(loss, starts, strengths).softmax(1)


@RLHF.claim("C5", "Eqs 4, 5")
def the_tilt_minimises_rlhf() -> Iterator[Finding]:
    """The policy π_ref exp(r/λ)/Z minimises the RLHF loss E_π[-r] + λ KL(π ‖ π_ref)."""
    differences = rlhf_optima(INTERPOLATION, STRENGTHS) - tilts(INTERPOLATION, STRENGTHS)
    yield vanishes("λ from 0.1 to 10, Newton's optimum less the tilt", differences, 1e-8)


@RLHF.claim("C6", "Eqs 6, 7, 39")
def dpo_has_the_same_optimum() -> Iterator[Finding]:
    """The minimiser of DPO's loss is the optimal policy of RLHF with r*, for any pairs that connect all responses.

    With uniform pairs, with those of Eq 1, and with a chain.
    """
    for setting, name in ((INTERPOLATION, "interpolation"), (GOOD, "x_g"), (BAD, "x_b")):
        pi_star, pi_ref = setting
        differences = []
        for data in (uniform_pairs(pi_star), drawn_pairs(pi_star, pi_ref), chain_pairs(pi_star)):
            differences.append(optima("DPO", pi_ref, data, STRENGTHS) - tilts(setting, STRENGTHS))
        yield all_vanish(f"{name}, λ from 0.1 to 10, less the tilt", differences, 1e-8)


@RLHF.claim("C7", "Eq 7")
def dpo_loss_and_gradient() -> Iterator[Finding]:
    """DPO's loss is -log σ(λ log π_w/ref_w - λ log π_l/ref_l).

    Compared with the likelihood as a quotient of powers, p = u_w^λ / (u_w^λ + u_l^λ), and with the slope -λ (1 - p).
    """
    logps = random_policies(100, 2, seed=4)
    ref_logps = random_policies(100, 2, seed=5)
    powers = (logps - ref_logps).exp() ** 0.3
    likelihoods = powers[:, 0] / powers.sum(1)
    remainder = dpo_loss(logps, ref_logps, 0.3) + likelihoods.log()
    yield vanishes("100 pairs, loss plus log p", remainder, 1e-12)

    gradient = gradient_of(lambda x: dpo_loss(x, ref_logps, 0.3), logps)
    slopes = 0.3 * (1 - likelihoods)
    remainder = gradient - torch.stack([-slopes, slopes], 1)
    yield vanishes("gradient less λ (1 - p) (-1, 1)", remainder, 1e-12)


@RLHF.claim("C21", "Eq 52")
def unconstrained_losses_agree() -> Iterator[Finding]:
    """Without constraints, DPO's loss and the RLHF loss with r* have the same minimiser.

    Both are minimised by Newton's method; no closed form is used.
    """
    for setting, name in ((INTERPOLATION, "interpolation"), (SECOND_BAD, "the second bad prompt")):
        by_dpo = bandit_optima("DPO", setting, STRENGTHS)
        yield vanishes(f"{name}, DPO less RLHF", by_dpo - rlhf_optima(setting, STRENGTHS), 1e-8)


# ---------------------------------------------------------------- IPO

IPO = PAPER.section("IPO (§2.3)")


def ipo_tilts(setting: Setting, opponents: Tensor, lams: Iterable[float]) -> Tensor:
    """The optimum of RLHF with IPO's reward, Eqs 5, 8, 9, for each λ."""
    rewards = ipo_reward(setting.pi_star, opponents)
    return all_tilts(setting.pi_ref, rewards, lams)


@IPO.claim("C8", "Eqs 8, 9")
def ipo_is_a_tilt() -> Iterator[Finding]:
    """With the pairs of Eq 1, IPO's optimum is π_ref exp(r_IPO/λ)/Z, where r_IPO(y) = E_{y' ~ π_ref} p*(y ≻ y')."""
    for setting, name in ((INTERPOLATION, "interpolation"), (SECOND_BAD, "the second bad prompt")):
        pi_star, pi_ref = setting
        policies = optima("IPO", pi_ref, drawn_pairs(pi_star, pi_ref), STRENGTHS)
        remainder = policies - ipo_tilts(setting, pi_ref, STRENGTHS)
        yield vanishes(f"{name}, optimum less tilt", remainder, 1e-8)

    policies = optima("IPO", INTERPOLATION.pi_ref, drawn_pairs(*INTERPOLATION), [1.0])
    yield given(same_digits("interpolation, λ = 1", ".4549, .3897, .1554", *policies[0].tolist()))


@IPO.claim("C9", "§2.3, footnote 3")
def opponents_may_be_others() -> Iterator[Finding]:
    """The opponents y' in r_IPO may come from another distribution than π_ref.

    The pairs then have to come from it too. With the uniform pairs of the paper's bandits y' is uniform, and the tilt
    with y' ~ π_ref is not the optimum.
    """
    pi_star, pi_ref = INTERPOLATION
    policies = optima("IPO", pi_ref, uniform_pairs(pi_star), STRENGTHS)
    uniform = uniform_logps(3).exp()
    remainder = policies - ipo_tilts(INTERPOLATION, uniform, STRENGTHS)
    yield vanishes("uniform pairs: less the tilt, y' uniform", remainder)

    opponents = vector(0.1, 0.2, 0.7)
    from_others = optima("IPO", pi_ref, drawn_pairs(pi_star, opponents), STRENGTHS)
    differences = from_others - ipo_tilts(INTERPOLATION, opponents, STRENGTHS)
    yield vanishes("pairs and y' from (.1, .2, .7): the same", differences)

    mismatch = total_variation(policies[2], ipo_tilts(INTERPOLATION, pi_ref, STRENGTHS)[2])
    yield above("uniform pairs, λ = 1: distance to the tilt, y' ~ π_ref", 0.001, mismatch)


def both_forms_of_eq_10(logps: Tensor, setting: Setting, lam: float) -> tuple[Tensor, Tensor]:
    """The two sides of Eq 10, over all ordered pairs, ties included. logps (n,)."""
    n = len(logps)
    indices = torch.arange(n)
    pairs = torch.cartesian_prod(indices, indices)
    weights = setting.pi_ref[pairs].prod(1)
    ratios = (logps - setting.ref_logps)[pairs]
    rewards = ipo_reward(setting.pi_star, setting.pi_ref)[pairs]
    gaps = ratios - rewards / lam
    squares = (gaps[:, 0] - gaps[:, 1]) ** 2
    first = (weights * squares).sum()

    labels = bradley_terry(setting.pi_star, pairs)  # each order of a pair occurs, so the winner is the first
    losses = ipo_loss(logps[pairs], setting.ref_logps[pairs], lam)
    second = (2 * weights * labels * losses).sum()
    return first, second


@IPO.claim("C10", "Eq 10", expected=Verdict.CORRECTED)
def both_forms_agree_up_to_a_constant() -> Iterator[Finding]:
    """The two forms of IPO's loss, with r_IPO and with sampled labels, are equal.

    They differ by 1/(4λ²) - 2 Var(r_IPO)/λ², with the variance under π_ref. It does not depend on the policy.
    """
    lam = 0.5
    differences = []
    for logps in random_policies(100, 3, seed=6):
        first, second = both_forms_of_eq_10(logps, INTERPOLATION, lam)
        differences.append(second - first)
    gaps = torch.stack(differences)
    yield vanishes("100 policies, λ = 0.5, sampled form less the other", gaps)
    yield instead(vanishes("the same less its mean", gaps - gaps.mean()))

    # r_IPO - ½ is 29/210, -1/60, -17/70, and its mean under π_ref is 0
    variance = 0.4 * (29 / 210) ** 2 + 0.4 / 60**2 + 0.2 * (17 / 70) ** 2
    constant = 1 - 8 * variance
    yield given(same_value("the constant by hand, 1 - 8 Var", constant, float(gaps.mean())))


@IPO.claim("C11", "Eq 10")
def ipo_loss_and_gradient() -> Iterator[Finding]:
    """IPO's loss on samples is (log of the ratio of ratios - 1/(2λ))².

    Compared with the logarithm of the quotient of probabilities, and with the slope 2 (h - 1/(2λ)).
    """
    logps = random_policies(100, 2, seed=7)
    ref_logps = random_policies(100, 2, seed=8)
    chances = logps.exp()
    ref_chances = ref_logps.exp()
    ratios = chances / ref_chances
    quotients = ratios[:, 0] / ratios[:, 1]
    gaps = quotients.log() - 1 / 0.6
    remainder = ipo_loss(logps, ref_logps, 0.3) - gaps**2
    yield vanishes("100 pairs, λ = 0.3", remainder)

    gradient = gradient_of(lambda x: ipo_loss(x, ref_logps, 0.3), logps)
    remainder = gradient - torch.stack([2 * gaps, -2 * gaps], 1)
    yield vanishes("gradient less 2 (h - 1/(2λ)) (1, -1)", remainder)


@IPO.claim("L1", "Eq 10")
def ipo_starts_at() -> Iterator[Finding]:
    """At π_θ = π_ref, where training starts, IPO's loss is 1/(4λ²) for every pair."""
    logps = random_policies(8, 2, seed=9)
    value = float(ipo_loss(logps, logps, 0.1).mean())
    yield same_value("λ = 0.1", 25.0, value, tolerance=1e-12)
    value = float(ipo_loss(logps, logps, 2.0).mean())
    yield same_value("λ = 2", 1 / 16, value, tolerance=1e-12)


# ---------------------------------------------------------------- the family QPO

FAMILY = PAPER.section("The family QPO (§2.4, appendix B)")


@FAMILY.claim("C12", "Eq 11")
def members_of_qpo() -> Iterator[Finding]:
    """DPO, IPO and f-DPO have the form ψ(μ(u_w) - μ(u_l)) with u = π_θ/π_ref, an increasing μ and a quasi-convex ψ.

    f-DPO has ψ = -log σ(λ ·) and μ = f'; with the reverse KL it is DPO. The slopes f' in our code are compared with
    autograd's derivative of f.
    """
    logps = random_policies(100, 2, seed=10)
    ref_logps = random_policies(100, 2, seed=11)
    as_member = qpo_loss(logps, ref_logps, logarithm, logistic(0.3))
    remainder = dpo_loss(logps, ref_logps, 0.3) - as_member
    yield vanishes("DPO less μ = log, ψ = -log σ(λ ·)", remainder, 1e-12)
    as_member = qpo_loss(logps, ref_logps, logarithm, squared(0.3))
    remainder = ipo_loss(logps, ref_logps, 0.3) - as_member
    yield vanishes("IPO less μ = log, ψ = (· - 1/(2λ))²", remainder)
    of_reverse_kl = f_dpo_loss(logps, ref_logps, REVERSE_KL, 0.3)
    remainder = dpo_loss(logps, ref_logps, 0.3) - of_reverse_kl
    yield vanishes("DPO less f-DPO with the reverse KL", remainder, 1e-12)

    rho = torch.linspace(-5, 3, 200, dtype=torch.float64)
    errors = []
    rises = []
    for divergence in (REVERSE_KL, *DIVERGENCES.values()):
        derivative = gradient_of(divergence.generator, rho.exp())
        slopes = divergence.slope(rho)
        errors.append((slopes - derivative) / (1 + slopes.abs()))
        rises.append(slopes.diff().min())
    yield all_vanish("reverse and forward KL, JS, α = 0.5: f' less autograd's", errors)
    least = float(torch.stack(rises).min())
    yield above("least rise of f' between neighbours", 0, least)


@FAMILY.claim("L2", "§2.4", expected=Verdict.CORRECTED)
def slic_has_a_corner() -> Iterator[Finding]:
    """ψ is differentiable and quasi-convex, and GPO with SLiC's loss is a special case.

    SLiC's hinge is quasi-convex, but it has a corner. Eq 11 needs the quasi-convexity only.
    """
    psi = hinge(2.0)  # its corner is at h = ½
    step = 1e-6
    levels = psi(vector(0.5 - step, 0.5, 0.5 + step))
    left = float(levels[1] - levels[0]) / step
    right = float(levels[2] - levels[1]) / step
    yield same_value("SLiC, λ = 2: slope left of the corner, and right", left, right, 1e-6)
    levels = psi(torch.linspace(-5, 5, 1001, dtype=torch.float64))
    rise = float(levels.diff().max())
    yield instead(judged("SLiC: largest rise, so that it never turns", "≤ 0", rise, rise <= 0))
    yield given(same_value("slope left of the corner, by hand", -2.0, left, 1e-6))


def dpop_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Smaug's DPOP: DPO with a penalty where the winner has fallen below π_ref. (B, 2) → (B,)."""
    ratios = logps - ref_logps
    penalty = F.relu(-ratios[:, 0])
    return -F.logsigmoid(ratios[:, 0] - ratios[:, 1] - penalty)


def offset_loss(logps: Tensor, ref_logps: Tensor, offsets: Tensor) -> Tensor:
    """DPO with an offset of each pair: R-DPO's is of its lengths, ODPO's of its rewards. (B, 2), (B,) → (B,)."""
    ratios = logps - ref_logps
    return -F.logsigmoid(ratios[:, 0] - ratios[:, 1] - offsets)


def orpo_loss(logps: Tensor) -> Tensor:
    """ORPO: the likelihood of the winner and the ratio of the odds, without a reference. (B, 2) → (B,)."""
    log_odds = logps - (-logps.expm1()).log()
    margins = log_odds[:, 0] - log_odds[:, 1]
    return -logps[:, 0] - F.logsigmoid(margins)


@FAMILY.claim("L3", "§2.4, App. B")
def which_relatives_are_members() -> Iterator[Finding]:
    """Of the methods described there, Smaug's DPOP, R-DPO, ODPO and ORPO do not have the form of Eq 11.

    A member has the same loss, ψ(0), wherever u_w = u_l. The spread of each loss over such policies is measured.
    TR-DPO is DPO with a reference that moves, and so a member at every step.
    """
    ref_logps = random_policies(50, 3, seed=12)[:, :2]
    shifts = torch.linspace(-2, 0, 50, dtype=torch.float64)  # log u of both
    logps = ref_logps + shifts[:, None]
    offsets = torch.linspace(-1, 1, 50, dtype=torch.float64)
    spreads = {
        "Smaug": dpop_loss(logps, ref_logps),
        "R-DPO, ODPO": offset_loss(logps, ref_logps, offsets),
        "ORPO": orpo_loss(logps),
    }
    for name, losses in spreads.items():
        spread = float(losses.max() - losses.min())
        yield above(f"{name}: spread where u_w = u_l", 0.1, spread)

    moved = 0.5 * ref_logps + 0.5 * logps
    losses = dpo_loss(logps, moved, 0.3)
    remainder = float(losses.max() - losses.min())
    yield vanishes("TR-DPO, reference moved half-way: spread", remainder, 1e-12)


# ---------------------------------------------------------------- preservation

PRESERVATION = PAPER.section("Preservation (§3.1, appendix E.1)")


def falling_then_rising(h: Tensor) -> Tensor:
    """A differentiable quasi-convex ψ with ψ'(0) = 0: 3h² for h ≤ 0, else -h² + h⁴/2, which is least at h = 1."""
    return torch.where(h <= 0, 3 * h**2, h**4 / 2 - h**2)


def best_level(p: float, q: float, psi: Loss) -> tuple[float, float]:
    """h and π(y_1) at the global minimum of a QPO loss with μ = log, on a grid. Two responses, p = p*, q = π_ref."""
    h = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    logits = h + math.log(q / (1 - q))
    logps = two_logps(logits)
    ref_logps = vector(q, 1 - q).log().expand_as(logps)
    if_first_wins = qpo_loss(logps, ref_logps, logarithm, psi)
    if_second_wins = qpo_loss(logps.flip(1), ref_logps.flip(1), logarithm, psi)
    best = (p * if_first_wins + (1 - p) * if_second_wins).argmin()
    return float(h[best]), float(logps[best, 0].exp())


@PRESERVATION.claim("C13", "Thm 3.1, E.1", expected=Verdict.FALSE)
def qpo_cannot_preserve_and_improve() -> Iterator[Finding]:
    """If the minimiser of a QPO loss is closer to π* than π_ref at a bad prompt, it is away from π* at a good one.

    The proof takes the minimisers of Eqs 35 and 36 for equal, but their p* differ. DPO with λ = 1 and a uniform
    reference keeps π* = (½, ½) and reaches π* = (.6, .4). With another ψ (not convex, ψ'(0) = 0) the good prompt's
    π* need not be uniform: it keeps (.6, .4) and improves (.8, .2) towards (.9, .1).
    """
    half = vector(0.5, 0.5)
    policies = []
    for pi_star in (half, vector(0.6, 0.4)):
        policies.append(optima("DPO", half, uniform_pairs(pi_star), [1.0])[0])
    kept = total_variation(policies[0], half)
    yield judged("DPO: x_b improves; error at x_g", "> 0", round(kept, 12), kept > 1e-10)
    yield given(same_digits("DPO: optimum at x_b, where π* = (.6, .4)", ".600, .400", *policies[1].tolist()))

    _, kept_chance = best_level(0.6, 0.6, falling_then_rising)
    error = abs(kept_chance - 0.6)
    yield judged("the other ψ: x_b improves; error at x_g", "> 0", round(error, 12), error > 1e-10)
    level, chance = best_level(0.9, 0.8, falling_then_rising)
    yield given(same_digits("its h at x_b, √((4p-3)/p)", ".8165", level))
    yield given(same_digits("its π(y_1) at x_b: .8 before, .9 at best", ".9005", chance))


@PRESERVATION.claim("L4", "§3.1", expected=Verdict.CORRECTED)
def the_members_leave_good_prompts() -> Iterator[Finding]:
    """DPO, IPO and f-DPO, as special cases of QPO, cannot keep a good prompt.

    So it is where p* ≠ ½: with one pair, a convex ψ and ψ'(0) ≠ 0, staying at π_ref is optimal if and only if p* = ½.
    """
    least = []
    largest_at_half = []
    for method in QPO_METHODS:
        for p in (0.05, 0.4, 0.5, 0.7, 0.99):
            pi_star = vector(p, 1 - p)
            errors = distances(optima(method, pi_star, uniform_pairs(pi_star), STRENGTHS), pi_star)
            if p == 0.5:
                largest_at_half.append(float(errors.max()))
            else:
                least.append(float(errors.min()))
    at_half = max(largest_at_half)
    yield judged("p* = ½: largest error, λ from 0.1 to 10", "> 0", round(at_half, 9), at_half > 1e-9)
    smallest = min(least)
    yield instead(judged("p* = .05, .4, .7, .99: least error", "> 0.0001", smallest, smallest > 1e-4))


@PRESERVATION.claim("L5", "§3", expected=Verdict.CORRECTED)
def bt_optimality_is_an_order() -> Iterator[Finding]:
    """A policy π* is BT-optimal if p*(y_1 ≻ y_2) implies π*(y_1) > π*(y_2), and distances are measured to it.

    Read as p* > ½, this is an order of the responses, and many policies have it: DPO's optimum at x_g is one. The
    theorems need the π* of Eq 55, whose ratios are the odds.
    """
    data = uniform_pairs(GOOD.pi_star)
    policy = optima("DPO", GOOD.pi_ref, data, [1.0])[0]
    is_preferred = bradley_terry(GOOD.pi_star, data.pairs) > 0.5
    winners, losers = policy[data.pairs].T
    is_more_likely = winners > losers
    has_the_order = bool((is_preferred == is_more_likely).all())
    distance = total_variation(policy, GOOD.pi_star)
    yield judged("distance of π* to a BT-optimal policy, DPO's", "0", distance, not has_the_order or distance < 1e-9)
    errors = bradley_terry(policy, data.pairs) - bradley_terry(GOOD.pi_star, data.pairs)
    largest = float(errors.abs().max())
    yield instead(above("its largest error in Eq 55", 0.1, largest))
    yield given(same_digits("DPO's optimum, ∝ π*²", ".783, .196, .022", *policy.tolist()))


# ---------------------------------------------------------------- interpolation

LIMITS = PAPER.section("Interpolation (§3.2, appendices E.2 to F.2)")


def mode(pi_star: Tensor) -> Tensor:
    """π^δ: all mass on the most likely response."""
    return F.one_hot(pi_star.argmax(), len(pi_star)).double()


@LIMITS.claim("C14", "Eqs 12, 56")
def the_mode_has_the_largest_reward() -> Iterator[Finding]:
    """The policy that maximises E_π[r*], and also E_π[π*], puts all its mass on the mode of π*.

    10,000 random policies stay below.
    """
    pi_star = INTERPOLATION.pi_star
    policies = random_policies(10_000, 3, seed=13).exp()
    for values, name in ((pi_star.log(), "E r*"), (pi_star, "E π*")):
        best = float((mode(pi_star) * values).sum())
        yield same_value(f"{name} of the mode, and the largest entry", float(values.max()), best, 1e-12)
        excess = float((policies * values).sum(1).max()) - best
        yield below(f"{name}: best random policy less the mode", 0, excess)


@LIMITS.claim("C39", "Eqs 37, 40, 41", expected=Verdict.CORRECTED)
def limits_of_the_tilt() -> Iterator[Finding]:
    """π_ref exp(r/λ)/Z goes to the mode of the reward as λ → 0, and to π_ref as λ → ∞.

    Several responses may share the largest reward. Then it goes to π_ref restricted to them.
    """
    at_zero = []
    at_infinity = []
    all_rewards = random_policies(20, 4, seed=14).exp()
    references = random_policies(20, 4, seed=15)
    for rewards, ref_logps in zip(all_rewards, references, strict=True):
        at_zero.append(tilted(ref_logps, rewards, 1e-6).exp() - mode(rewards))
        at_infinity.append(tilted(ref_logps, rewards, 1e10).exp() - ref_logps.exp())
    yield given(all_vanish("20 settings, λ = 1e-6, less the mode", at_zero, 1e-9))
    yield given(all_vanish("λ = 1e10, less π_ref", at_infinity, 1e-9))

    tied = tilted(vector(0.4, 0.4, 0.2).log(), vector(1, 1, 0), 1e-6).exp()
    yield same_digits("r = (1, 1, 0), π_ref = (.4, .4, .2): one response", "1, 0, 0", *tied.tolist())
    yield instead(same_digits("π_ref restricted to both", ".5, .5, 0", *tied.tolist()))


def weak_interpolation(method: str) -> Iterator[Finding]:
    """The limits of a method's optimum with the pairs of Eq 1: at two prompts, and at x_b with its two modes."""
    at_zero = []
    at_infinity = []
    to_target = []
    for setting in (INTERPOLATION, SECOND_BAD):
        data = drawn_pairs(*setting)
        policies = optima(method, setting.pi_ref, data, [1e-4, 1e6])
        at_zero.append(policies[0] - mode(setting.pi_star))
        at_infinity.append(policies[1] - setting.pi_ref)
        to_target.append(total_variation(policies[0], setting.pi_star))
    yield all_vanish("λ = 1e-4 less the mode, λ = 1e6 less π_ref", at_zero + at_infinity, 1e-5)
    nearest = min(to_target)
    yield above("not the SIC: λ = 1e-4, distance to π*", 0.3, nearest)

    policies = optima(method, BAD.pi_ref, drawn_pairs(*BAD), [1e-4])
    tied = policies[0]
    largest = float(tied.max())
    yield judged("x_b, two modes: largest probability at λ = 1e-4", "1", largest, largest > 0.999)
    yield instead(same_digits("x_b: π_ref restricted to the modes", ".7500, 0, .2500", *tied.tolist()))


@LIMITS.claim("C15", "Prop 3.4", expected=Verdict.CORRECTED)
def dpo_interpolates_weakly() -> Iterator[Finding]:
    """With p* in (0, 1), DPO's minimiser goes to π^δ, all mass on the mode of π*, as λ → 0, and to π_ref as λ → ∞.

    The mode has to be unique. At the paper's own x_b two responses share it, and DPO goes to π_ref restricted to them.
    """
    yield from weak_interpolation("DPO")


@LIMITS.claim("C17", "Prop 3.5", expected=Verdict.CORRECTED)
def ipo_interpolates_weakly() -> Iterator[Finding]:
    """IPO's minimiser goes to π^δ as λ → 0, and to π_ref as λ → ∞, also where p* is 0 or 1.

    As with DPO, the mode has to be unique.
    """
    yield from weak_interpolation("IPO")
    # a ≻ b ≻ c without exception
    pairs = torch.tensor([(0, 1), (0, 2), (1, 2)])
    certain = Labelled(pairs, vector(1, 1, 1) / 3)
    policies = optima("IPO", INTERPOLATION.pi_ref, certain, [1e-4, 1e6])
    limits = torch.stack([vector(1, 0, 0), INTERPOLATION.pi_ref])
    differences = policies - limits
    yield vanishes("p* in {0, 1}: both limits", differences, 1e-5)


@LIMITS.claim("C18", "Thm 3.6")
def no_member_interpolates_strongly() -> Iterator[Finding]:
    """No QPO loss satisfies the SIC: none has π* as a limit of its minimisers whatever π_ref.

    Two responses, p* = .8. For each loss and λ we take the worse distance to π* of π_ref = .8 and π_ref = .5. The
    proof has μ = log. For a continuous, strictly increasing μ: two references near π* minimise the same function of
    μ(u_w) - μ(u_l), in which π* has another value for each. For a single π_ref the SIC can be met: DPO with λ from 1 to
    ∞ and a uniform π_ref goes from π* to π_ref.
    """
    pi_star = vector(0.8, 0.2)
    data = uniform_pairs(pi_star)
    lams = torch.logspace(-2, 3, 51, dtype=torch.float64).tolist()
    nearest = []
    at_zero = []
    for method in QPO_METHODS:
        of_good = distances(optima(method, pi_star, data, lams), pi_star)
        of_uniform = distances(optima(method, vector(0.5, 0.5), data, lams), pi_star)
        worse = torch.maximum(of_good, of_uniform)
        nearest.append(float(worse.min()))
        at_zero.append(float(worse[0]))
    least = min(nearest)
    yield above("DPO, IPO, f-DPO (JS, forward KL, α): least over λ", 0.05, least)
    least_at_zero = min(at_zero)
    yield above("the same at λ = 0.01", 0.15, least_at_zero)
    single = optima("DPO", vector(0.5, 0.5), data, [1.0])[0]
    yield given(vanishes("DPO, uniform π_ref alone, λ = 1: less π*", single - pi_star))


ONE_LABEL = Labelled(torch.tensor([[0, 1]]), vector(1))  # one pair, and the first has won


def slopes_of_one_label(method: str, pi_ref: Tensor, lam: float, gaps: Tensor) -> Tensor:
    """The slope of the loss in log π_w - log π_l at each gap."""

    def loss(gap: Tensor) -> Tensor:
        return mean_loss(method, two_logps(gap), pi_ref, ONE_LABEL, lam)

    return torch.vmap(torch.func.grad(loss))(gaps)


@LIMITS.claim("C16", "§3.2, F.2")
def one_label_per_pair() -> Iterator[Finding]:
    """With one label per pair the minimisers of DPO and f-DPO are independent of π_ref at every λ; IPO's is not.

    Two responses, the first has won. DPO and f-DPO have no finite minimiser: their loss falls as far as log π_w - log
    π_l goes. IPO's is σ(logit π_ref + 1/(2λ)), and TYPO's is (1 + λ π_ref)/(1 + λ).
    """
    gaps = torch.linspace(-5, 500, 102, dtype=torch.float64)
    slopes = []
    differences = []
    for q in (0.1, 0.5, 0.9):
        pi_ref = vector(q, 1 - q)
        for method in ("DPO", "f-DPO (JS)"):
            for lam in (0.1, 1.0):
                slopes.append(slopes_of_one_label(method, pi_ref, lam, gaps))
        ratios = 1 / vector(*STRENGTHS)
        logit = math.log(q / (1 - q))
        ipo_chances = (logit + ratios / 2).sigmoid()
        typo_chances = (ratios + q) / (ratios + 1)
        for method, expected in (("IPO", ipo_chances), ("TYPO", typo_chances)):
            differences.append(optima(method, pi_ref, ONE_LABEL, STRENGTHS)[:, 0] - expected)
    steepest = float(torch.stack(slopes).max())
    yield below("DPO, f-DPO (JS): largest slope for gaps up to 500 nats", 0, steepest)
    yield all_vanish("IPO and TYPO less their closed forms", differences, 1e-8)


def flat_at_zero(rho: Tensor) -> Tensor:
    """The slope f'(u) = exp(-1/u): increasing, invertible, not defined at u = 0. It goes to 0 there."""
    return (-(-rho).exp()).exp()


@LIMITS.claim("C42", "Eq 57, F.2", expected=Verdict.CORRECTED)
def f_dpo_ignores_the_reference() -> Iterator[Finding]:
    """For any valid f, f'(u) → -∞ as u → 0, so that f-DPO's loss of a pair goes to 0 with π_l for any fixed π_w > 0.

    So it does for JS and the forward KL. An invertible f' that is undefined at 0 need not go to -∞: f'(u) = exp(-1/u)
    goes to 0. What follows for the minimiser stays true, as the loss falls with π_w and rises with π_l: π_w = 1.
    """
    chances = vector(0.1, 0.5, 0.9)
    ref_logps = torch.stack([chances, 1 - chances], 1).log()
    logps = vector(math.log(0.3), -500).expand(3, 2)  # π_w = 0.3, and π_l = e^-500
    for name in ("f-DPO (JS)", "f-DPO (forward KL)"):
        losses = f_dpo_loss(logps, ref_logps, DIVERGENCES[name], 1.0)
        yield vanishes(f"{name}: loss at π_l = e^-500", losses, 1e-12)
    losses = qpo_loss(logps, ref_logps, flat_at_zero, logistic(1.0))
    yield vanishes("f'(u) = exp(-1/u): the same", losses, 1e-12)

    levels = torch.linspace(0.001, 0.998, 80, dtype=torch.float64)
    grid = torch.cartesian_prod(levels, levels)
    grid = grid[grid.sum(1) <= 0.999]
    best = []
    for reference in ref_logps:
        losses = qpo_loss(grid.log(), reference.expand_as(grid), flat_at_zero, logistic(1.0))
        best.append(grid[losses.argmin(), 0])
    least = float(min(best))
    yield instead(judged("the same: π_w at the best policy on a grid up to .998", "0.998", least, least > 0.997))


@LIMITS.claim("C43", "§3.2, App. C")
def early_stopping_keeps_the_reference() -> Iterator[Finding]:
    """That DPO still reflects π_ref in practice, and more so at a larger λ, is due to implicit constraints.

    Adam with rate 0.01 on one label, from π_ref = .1, .5, .9. The spread of the three π_w falls with the steps at
    every λ. At the same step it is larger at a larger λ.
    """
    betas = vector(0.1, 1.0, 10.0).repeat_interleave(3)[:, None]
    chances = vector(0.1, 0.5, 0.9).repeat(3)
    ref_logps = torch.stack([chances, 1 - chances], 1).log()

    def losses(logits: Tensor, step: int) -> Tensor:
        return dpo_loss(logits.log_softmax(1), ref_logps, betas)

    path = adam_path(losses, ref_logps, torch.full((9, 1), 0.01), 3000)
    policies = path[[0, 10, 100, 1000, 3000]].softmax(2)
    after = policies[:, :, 0].view(5, 3, 3)  # π_w by step, λ, π_ref
    spreads = after.amax(2) - after.amin(2)
    slowest = float(spreads.diff(dim=0).max())
    yield below("0, 10, 100, 1,000, 3,000 steps: largest change of a spread", 0, slowest)
    excess = float(spreads[3].diff().min())
    yield above("1,000 steps: least rise of the spread with λ = .1, 1, 10", 0.05, excess)
    least = float(after[4, 0].min())
    yield above("3,000 steps, λ = 0.1: least of the three π_w", 0.999, least)
    of_largest = float(spreads[3, 2])
    yield above("1,000 steps: spread at λ = 10", 0.5, of_largest)


# ---------------------------------------------------------------- constraints

CONSTRAINTS = PAPER.section("Constraints (§3.3, appendix E.5)")


@CONSTRAINTS.claim("C20", "Eqs 45 to 51")
def rlhf_and_dpo_are_two_divergences() -> Iterator[Finding]:
    """At λ = 1, with two equally likely responses, RLHF is KL(π_θ ‖ π*) and DPO is KL(π* ‖ π_θ), up to constants."""
    half = uniform_logps(2)
    target = vector(0.8, 0.2)
    data = uniform_pairs(target)
    policies = random_policies(100, 2, seed=16)
    losses = -objective(policies, half, target.log(), 1.0)
    rlhf = losses - kl(policies, target.log())
    dpo = [mean_loss("DPO", logps, half.exp(), data, 1.0) for logps in policies]
    yield vanishes("100 policies, RLHF less KL(π_θ ‖ π*), spread", rlhf - rlhf.mean())
    differences = torch.stack(dpo) - kl(target.log(), policies)
    remainder = differences - entropy(target.log())
    yield vanishes("DPO less KL(π* ‖ π_θ), less H(p*)", remainder)


@CONSTRAINTS.claim("C19", "Thm 3.7")
def constraints_separate_dpo_from_rlhf() -> Iterator[Finding]:
    """With a constraint on the policy, RLHF with r* and DPO can have different minimisers.

    The proof ends with "need not still hold". In its setting (two responses, λ = 1) the constraint can be a parameter
    that two prompts share: π(y_1) = t at both, with p* = .9 and .5. With one prompt and an interval for t both stop at
    the same end.
    """
    prompts = (vector(0.9, 0.1), vector(0.5, 0.5))
    half = uniform_logps(2)

    def dpo(logit: Tensor) -> Tensor:
        logps = two_logps(logit[0])
        losses = []
        for target in prompts:
            losses.append(mean_loss("DPO", logps, half.exp(), uniform_pairs(target), 1.0))
        return torch.stack(losses).mean()

    def rlhf(logit: Tensor) -> Tensor:
        logps = two_logps(logit[0])
        values = [objective(logps, half, target.log(), 1.0) for target in prompts]
        return -torch.stack(values).mean()

    by_dpo = float(minimise(dpo, vector(0)).parameters.sigmoid())
    by_rlhf = float(minimise(rlhf, vector(0)).parameters.sigmoid())
    yield judged(
        "shared t: difference of the minimisers", "> 0.01", abs(by_dpo - by_rlhf), abs(by_dpo - by_rlhf) > 0.01
    )
    yield given(same_value("DPO: the mean of p*", 0.7, by_dpo))
    yield given(same_value("RLHF: σ of the mean of logit p*", 0.75, by_rlhf))

    interval = torch.linspace(0.2, 0.6, 401, dtype=torch.float64)  # p* = .8 is outside
    logps = torch.stack([interval, 1 - interval], 1).log()
    target = vector(0.8, 0.2).log()
    forward = interval[kl(target, logps).argmin()]
    backward = interval[kl(logps, target).argmin()]
    ends = torch.stack([forward, backward])
    yield given(vanishes("one prompt, t in [.2, .6]: both less .6", ends - 0.6))


# ---------------------------------------------------------------- TYPO

TYPO = PAPER.section("TYPO (§4, appendices E.6, F.1, F.3)")


@TYPO.claim("C41", "Eq 55")
def preferences_of_the_target() -> Iterator[Finding]:
    """With π* = exp(r*)/Z the Bradley-Terry probabilities are π*(y_1) / (π*(y_1) + π*(y_2))."""
    rewards = 4 * random_policies(50, 4, seed=17)
    errors = []
    for reward in rewards:
        data = uniform_pairs(reward.softmax(0))
        winners, losers = reward[data.pairs].T
        gaps = winners - losers
        preferences = bradley_terry(reward.softmax(0), data.pairs)
        errors.append(preferences - gaps.sigmoid())
        errors.append(6 * data.weights - gaps.sigmoid())
    yield all_vanish("50 rewards, both forms", errors, 1e-12)


@TYPO.claim("C22", "Eqs 15, 16, 58, 59")
def the_supervised_term_is_a_divergence() -> Iterator[Finding]:
    """ℓ_sup = E KL(p* ‖ p_θ) equals E log(1 + π_l/π_w) up to the entropy of the labels, with the pairs of Eq 1."""
    differences = []
    policies = random_policies(100, 3, seed=18)
    for i, logps in enumerate(policies):
        pi_star = policies[i - 1].exp()
        data = drawn_pairs(pi_star, policies[i - 2].exp())
        labels = bradley_terry(pi_star, data.pairs)
        modelled = bradley_terry(logps.exp(), data.pairs)
        # each pair occurs in both orders, so the sum over winners is the sum over the labels
        divergence = (data.weights * (labels / modelled).log()).sum()
        label_entropy = -(data.weights * labels.log()).sum()
        differences.append(mean_loss("TYPO", logps, pi_star, data, 0.0) - divergence - label_entropy)
    yield all_vanish("100 random π_θ, π*, π_ref", differences)


@TYPO.claim("C23", "Eq 16")
def the_supervised_term_recovers_the_target() -> Iterator[Finding]:
    """The minimiser of ℓ_sup is necessarily π*.

    It is for pairs that connect all responses: of Eq 1 with three π_ref, uniform, or a chain. Two separate pairs of
    four responses leave the mass between them free.
    """
    pi_star = INTERPOLATION.pi_star
    differences = []
    sources = [drawn_pairs(pi_star, setting.pi_ref) for setting in (INTERPOLATION, SECOND_BAD, GOOD)]
    for data in (*sources, uniform_pairs(pi_star), chain_pairs(pi_star)):
        differences.append(optima("TYPO", SECOND_BAD.pi_ref, data, [0.0])[0] - pi_star)
    yield all_vanish("connected pairs, optimum less π*", differences, 1e-8)

    pairs = torch.tensor([(0, 1), (1, 0), (2, 3), (3, 2)])
    separate = Labelled(pairs, vector(0.4, 0.1, 0.25, 0.25))
    start = vector(0.1, 0.1, 0.4, 0.4)
    optimum = optima("TYPO", start, separate, [0.0])[0]
    distance = total_variation(optimum, vector(0.64, 0.16, 0.1, 0.1))
    yield above("two separate pairs, distance to π* = (.64, .16, .1, .1)", 0.3, distance)


@TYPO.claim("C40", "Eq 54")
def the_supervised_term_at_good_prompts() -> Iterator[Finding]:
    """Where π_ref = π*, ℓ_sup with the pairs of Eq 1 is least at π* = π_ref."""
    start = vector(0.2, 0.3, 0.5)
    differences = []
    for target in mixed_policies(10, 3, seed=19):
        policies = optima("TYPO", start, drawn_pairs(target, target), [0.0])
        differences.append(policies[0] - target)
    yield all_vanish("10 targets, from another start", differences, 1e-8)


@TYPO.claim("C24", "Eqs 17, 53")
def the_unsupervised_term_is_a_divergence() -> Iterator[Finding]:
    """ℓ_unsup = -E_{y ~ π_ref} log π_θ(y) is KL(π_ref ‖ π_θ) up to H(π_ref), and is least at π_ref."""
    pi_star, pi_ref = INTERPOLATION
    data = uniform_pairs(pi_star)
    differences = []
    for logps in random_policies(100, 3, seed=20):
        both_terms = mean_loss("TYPO", logps, pi_ref, data, 1.0)
        unsupervised = both_terms - mean_loss("TYPO", logps, pi_ref, data, 0.0)
        divergence = kl(pi_ref.log(), logps)
        differences.append(unsupervised - divergence - entropy(pi_ref.log()))
    yield all_vanish("100 policies", differences)
    remainder = optima("TYPO", pi_ref, data, [1e8])[0] - pi_ref
    yield vanishes("λ = 1e8: optimum less π_ref", remainder, 1e-7)


@TYPO.claim("C25", "Eqs 14, 16, 17")
def typo_loss_and_gradient() -> Iterator[Finding]:
    """TYPO's loss is log(1 + π_l/π_w) - λ log π(ŷ) with ŷ from π_ref, and reads no π_ref beside the sample.

    Whole runs of algos/typo.py are compared with an independent trainer in tests/test_exactness_family.py.
    """
    logps = random_policies(100, 3, seed=21)  # of y_w, y_l and ŷ
    chances = logps.exp()
    winner, loser, sample = chances.T
    expected = (1 + loser / winner).log() - 0.05 * sample.log()
    losses = typo_loss(logps[:, :2], logps[:, 2:], 0.05)
    remainder = losses - expected
    yield vanishes("100 rows, λ = 0.05", remainder, 1e-12)

    gradient = gradient_of(lambda x: typo_loss(x[:, :2], x[:, 2:], 0.05), logps)
    wrong = loser / (winner + loser)
    slopes = torch.stack([-wrong, wrong, torch.full_like(wrong, -0.05)], 1)
    yield vanishes("gradient", gradient - slopes, 1e-12)


SWEEP = torch.logspace(-5, 3, 33, dtype=torch.float64).tolist()  # values of λ


@functools.cache
def sweep(method: str, setting: Setting) -> Tensor:
    """The optima of a method for each λ of SWEEP, with the uniform pairs of the paper's bandits: (33, 3)."""
    return bandit_optima(method, setting, SWEEP)


@functools.cache
def errors_of(method: str, setting: Setting) -> Tensor:
    """For each λ of SWEEP, the distance of the optimum to π*."""
    return distances(sweep(method, setting), setting.pi_star)


@TYPO.claim("C26", "Prop 4.1")
def typo_preserves() -> Iterator[Finding]:
    """TYPO's minimiser is π* at a prompt where π_ref = π*, for every λ."""
    largest = float(errors_of("TYPO", GOOD).max())
    yield vanishes("x_g, 33 λ from 1e-5 to 1000: largest error", largest, 1e-8)
    differences = []
    for target in mixed_policies(5, 4, seed=22):
        differences.append(optima("TYPO", target, drawn_pairs(target, target), STRENGTHS) - target)
    yield all_vanish("5 targets of 4 responses, pairs of Eq 1", differences, 1e-8)


class Problems(NamedTuple):
    """Bandits drawn at random, and TYPO's optimum for each; all (B, n) but lams, (B, 1)."""

    targets: Tensor
    references: Tensor
    lams: Tensor
    optima: Tensor


def random_problems(n: int, count: int) -> Problems:
    """TYPO's optima with the pairs of Eq 1, for λ from 0.01 to 30. Every probability is at least 0.1/n."""
    targets = mixed_policies(count, n, seed=30 + n)
    references = mixed_policies(count, n, seed=40 + n)
    generator = torch.Generator().manual_seed(n)
    exponents = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    lams = 10 ** (3.5 * exponents - 2)
    data = []
    for target, reference in zip(targets, references, strict=True):
        data.append(drawn_pairs(target, reference))
    weights = torch.stack([labelled.weights for labelled in data])

    def loss(logits: Tensor, weights: Tensor, reference: Tensor, lam: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        losses = losses_of("TYPO", logps, reference.log(), data[0].pairs, lam)
        return (weights * losses).sum()

    logits = minimise_each(loss, references.log(), weights, references, lams)
    return Problems(targets, references, lams, logits.softmax(1))


def odds_shares(policies: Tensor) -> Tensor:
    """π_i / (π_i + π_j): (B, n) → (B, n, n)."""
    rows = policies[:, :, None]
    columns = policies[:, None]
    return rows / (rows + columns)


def imbalances(problems: Problems) -> Tensor:
    """λ (π_i - π_ref,i) - Σ_j w_ij (p*_ij - p_ij), which is 0 at TYPO's optimum: (B, n).

    w_ij is the probability of a pair under Eq 1, in either order.
    """
    products = problems.references[:, :, None] * problems.references[:, None]  # (B, n, n)
    ties = problems.references.square().sum(1)
    weights = 2 * products / (1 - ties)[:, None, None]
    errors = odds_shares(problems.targets) - odds_shares(problems.optima)  # the diagonal is 0
    pulls = (weights * errors).sum(2)
    return problems.lams * (problems.optima - problems.references) - pulls


@TYPO.claim("C27", "Prop 4.1, §5")
def typo_improves() -> Iterator[Finding]:
    """While it preserves good prompts, TYPO comes closer to π* than π_ref at bad ones; at x_b over all λ.

    It does so at every bad prompt whose pairs are connected, which the paper does not say. At the optimum λ (π_i -
    π_ref,i) = Σ_j w_ij (p*_ij - p_ij). Summed over the set A of responses with π > π*, the right side is not positive,
    so that π(A) ≤ π_ref(A). Hence the distance, π(A) - π*(A), is not above π_ref's. It holds for the total variation.
    """
    largest = float(errors_of("TYPO", BAD).max())
    of_reference = total_variation(*BAD)
    yield judged("x_b, 33 λ: largest distance to π*", f"< {of_reference:.4f}, π_ref's", largest, largest < of_reference)
    ratios = []
    residuals = []
    for n in (3, 4, 5):
        problems = random_problems(n, 300)
        before = (problems.references - problems.targets).abs().sum(1)
        after = (problems.optima - problems.targets).abs().sum(1)
        ratios.append(float((after / before).max()))
        residuals.append(float(imbalances(problems).abs().max()))
    yield below("900 random prompts: largest distance as a share of π_ref's", 1, max(ratios))
    yield vanishes("900 random prompts: the balance at the optimum", max(residuals), 1e-9)


@TYPO.claim("C28", "Prop 4.2")
def typo_interpolates_strongly() -> Iterator[Finding]:
    """TYPO's minimiser goes to π* as λ → 0 and to π_ref as λ → ∞, whatever π_ref: it satisfies the SIC."""
    at_zero = []
    at_infinity = []
    other = Setting(vector(0.05, 0.15, 0.8), vector(0.7, 0.1, 0.2))
    for setting in (INTERPOLATION, BAD, SECOND_BAD, other):
        for data in (drawn_pairs(*setting), uniform_pairs(setting.pi_star)):
            policies = optima("TYPO", setting.pi_ref, data, [1e-9, 1e9])
            at_zero.append(policies[0] - setting.pi_star)
            at_infinity.append(policies[1] - setting.pi_ref)
    yield all_vanish("4 settings, two kinds of pairs: λ = 1e-9, less π*", at_zero, 1e-6)
    yield all_vanish("λ = 1e9, less π_ref", at_infinity, 1e-6)


@TYPO.claim("C29", "Def 3.2, Prop 4.2", expected=Verdict.CORRECTED)
def between_the_extremes() -> Iterator[Finding]:
    """For λ between the limits the minimiser interpolates between π* and π_ref.

    Not response by response: one that has .16 in both π* and π_ref can have more than .5 between. What holds is true of
    any penalty: with λ the first term does not fall, and the second does not rise.
    """
    setting = Setting(vector(0.01, 0.83, 0.16), vector(0.8, 0.04, 0.16))
    pi_star, pi_ref = setting
    data = drawn_pairs(pi_star, pi_ref)
    policy = optima("TYPO", pi_ref, data, [0.3])[0]
    larger_end = torch.maximum(pi_star, pi_ref)
    excess = float((policy - larger_end)[2])
    yield judged("λ = 0.3: response c above both π* and π_ref", "≤ 0", excess, excess <= 0)

    lams = torch.logspace(-3, 3, 25, dtype=torch.float64).tolist()
    policies = optima("TYPO", pi_ref, data, lams)
    supervised = [mean_loss("TYPO", policy.log(), pi_ref, data, 0.0) for policy in policies]
    falls = -torch.stack(supervised).diff()
    rises = kl(pi_ref.log(), policies.log()).diff()
    wrong_way = float(torch.maximum(falls, rises).max())
    yield instead(judged("25 λ: largest fall of ℓ_sup or rise of KL(π_ref ‖ π)", "≤ 0", wrong_way, wrong_way <= 1e-12))
    problem = Problems(pi_star[None], pi_ref[None], vector(0.3), policy[None])
    yield given(vanishes("λ = 0.3: λ (π - π_ref) less the pull of the pairs", imbalances(problem)))


@TYPO.claim("C30", "§4.2 (not in the paper)")
def a_mixture_for_two_responses() -> Iterator[Finding]:
    """With two responses TYPO's optimum is the mixture (p* + λ π_ref)/(1 + λ)."""
    lams = vector(*STRENGTHS)
    differences = []
    for p in (0.1, 0.5, 0.8):
        for q in (0.05, 0.3, 0.9):
            data = uniform_pairs(vector(p, 1 - p))
            policies = optima("TYPO", vector(q, 1 - q), data, STRENGTHS)
            differences.append(policies[:, 0] - (p + lams * q) / (1 + lams))
    yield all_vanish("9 settings, λ from 0.1 to 10", differences, 1e-9)
    data = uniform_pairs(vector(0.8, 0.2))
    policy = optima("TYPO", vector(0.3, 0.7), data, [0.5])[0]
    yield given(same_value("p* = .8, π_ref = .3, λ = ½: 19/30", 19 / 30, float(policy[0])))


@TYPO.claim("C44", "E.6, Fig. 1 left")
def prompts_are_independent() -> Iterator[Finding]:
    """TYPO's optimum at good prompts is independent of what happens at bad ones.

    So it is if the prompts share no parameters. Where x_g and x_b have all logits in common, x_g pays.
    """

    def together(logits: Tensor) -> Tensor:
        losses = []
        for row, setting in zip(logits.view(2, 3), (GOOD, SECOND_BAD), strict=True):
            data = uniform_pairs(setting.pi_star)
            losses.append(mean_loss("TYPO", row.log_softmax(0), setting.pi_ref, data, 1.0))
        return torch.stack(losses).sum()

    start = torch.zeros(6, dtype=torch.float64)
    apart = minimise(together, start).parameters.view(2, 3).softmax(1)
    yield vanishes("λ = 1, two prompts at once: x_g less π*", apart[0] - GOOD.pi_star, 1e-8)

    def shared_loss(logits: Tensor) -> Tensor:
        return together(logits.repeat(2))

    shared = minimise(shared_loss, vector(0, 0, 0)).policy
    distance = total_variation(shared, GOOD.pi_star)
    yield above("all logits shared: distance to π* at x_g", 0.1, distance)


def mean_square(logps: Tensor) -> Tensor:
    """‖π‖², the penalty of the constraint test, over the last dimension."""
    return (2 * logps).exp().sum(-1)


def penalised(method: str, setting: Setting, alpha: float) -> Tensor:
    """The minimiser of a loss with λ = 1 and the penalty α‖π‖²."""
    data = uniform_pairs(setting.pi_star)

    def loss(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        return mean_loss(method, logps, setting.pi_ref, data, 1.0) + alpha * mean_square(logps)

    return minimise(loss, setting.ref_logps).policy


@TYPO.claim("C31", "§4.2", expected=Verdict.CORRECTED)
def constraints_pose_no_issue() -> Iterator[Finding]:
    """Constraints that might compromise an association with RLHF pose no issue for TYPO.

    So it is for the derivation. The optimum at x_g stays π* under a constraint on that prompt alone that admits π*. The
    penalty α‖π‖² of the paper's constraint test moves it, unless π* is uniform, and so can a constraint that prompts
    share.
    """
    percents = torch.arange(1, 99, dtype=torch.float64)
    grid = torch.cartesian_prod(percents, percents)
    counts = torch.cat([grid, 100 - grid.sum(1, keepdim=True)], 1)
    counts = counts[counts[:, 2] > 0]
    logps = (counts / 100).log()
    admitted = logps[mean_square(logps) <= mean_square(GOOD.rewards) + 1e-12]
    data = uniform_pairs(GOOD.pi_star)
    losses = [mean_loss("TYPO", row, GOOD.pi_ref, data, 1.0) for row in admitted]
    best = admitted[torch.stack(losses).argmin()].exp()
    yield vanishes("x_g, grid with ‖π‖² ≤ ‖π*‖²: optimum less π*", best - GOOD.pi_star, 1e-9)

    shift = total_variation(penalised("TYPO", GOOD, 0.1), GOOD.pi_star)
    yield judged("x_g, penalty with α = 0.1: distance to π*", "0", shift, shift < 1e-8)
    third = vector(1, 1, 1) / 3
    kept = penalised("TYPO", Setting(third, third), 0.1)
    yield instead(vanishes("the same where π* is uniform", kept - third, 1e-8))
    free = optima("DPO", GOOD.pi_ref, data, [1.0])[0]
    dpo_shift = total_variation(penalised("DPO", GOOD, 0.1), free)
    yield instead(judged("the same penalty moves DPO by", f"> {shift:.3f}", dpo_shift, dpo_shift > shift))


@TYPO.claim("C32", "§4.1")
def sampling_does_not_depend_on_the_policy() -> Iterator[Finding]:
    """All sampling in TYPO's loss is independent of θ, unlike RLHF's; and ℓ_unsup can use prompts without labels.

    The mean of the samples' gradients is the gradient of the mean for TYPO, and is not for RLHF. A second prompt shares
    two of three parameters; its samples bring it closer to its π_ref.
    """
    pi_star, pi_ref = INTERPOLATION
    logits = vector(0.3, -0.2, 0.5)
    jacobian = torch.func.jacrev(lambda x: x.log_softmax(0))(logits)  # of each log π(y)
    samplewise = -(pi_ref[:, None] * jacobian).sum(0)
    data = uniform_pairs(pi_star)

    def unsupervised(x: Tensor) -> Tensor:
        logps = x.log_softmax(0)
        both_terms = mean_loss("TYPO", logps, pi_ref, data, 1.0)
        return both_terms - mean_loss("TYPO", logps, pi_ref, data, 0.0)

    remainder = samplewise - torch.func.grad(unsupervised)(logits)
    yield vanishes("TYPO: the two gradients", remainder, 1e-12)
    policy = logits.softmax(0)
    naive = (policy[:, None] * jacobian).sum(0)  # of E_π[-r + log π/π_ref], with the draws held fixed

    def rlhf(x: Tensor) -> Tensor:
        logps = x.log_softmax(0)
        return -objective(logps, pi_ref.log(), pi_star.log(), 1.0)

    exact = gradient_of(rlhf, logits)
    gap = float((naive - exact).abs().max())
    yield above("RLHF: the two gradients differ by", 0.01, gap)

    labelled_features = torch.eye(3, dtype=torch.float64)
    other_features = torch.stack([vector(0, 1, 1), vector(1, 0, 0), vector(0, 0, 0)])
    unlabelled = vector(0.2, 0.7, 0.1)

    def divergence(use_samples: bool) -> Tensor:
        def loss(theta: Tensor) -> Tensor:
            first = (labelled_features @ theta).log_softmax(0)
            second = (other_features @ theta).log_softmax(0)
            supervised = mean_loss("TYPO", first, pi_ref, data, 1.0)
            return supervised + use_samples * kl(unlabelled.log(), second)

        theta = minimise(loss, vector(0, 0, 0)).parameters
        second = (other_features @ theta).log_softmax(0)
        return kl(unlabelled.log(), second)

    gain = float(divergence(False) - divergence(True))
    yield above("KL(π_ref ‖ π) at the unlabelled prompt falls by", 0.01, gain)


# ---------------------------------------------------------------- experiments

TESTS = PAPER.section("Experiments on bandits and on dialogue (§5, appendix A)")
TESTS.elsewhere("C45", "Fig. 1", "The desiderata as a picture.", "a diagram; its contents are C13, C15, C20 and C26")

NUM_SAMPLED = 200  # pairs; the paper gives no number
RATES = vector(4e-3, 4e-3, 4e-3, 2e-3)[:, None]  # of METHODS: four times the paper's
NUM_STEPS = 5000


class Learning(NamedTuple):
    """Adam's policies on sampled pairs, and the optimum of TYPO on the same pairs."""

    policies: Tensor  # (steps + 1, METHODS, 3)
    typo_optimum: Tensor  # (3,)


@functools.cache
def learning() -> Learning:
    """Fig. 2: λ = 1e-5, 200 sampled pairs, batches of 20, gradients clipped to the norm 10, from π_ref."""
    pi_star, pi_ref = INTERPOLATION
    lam = 1e-5
    data = uniform_pairs(pi_star)
    generator = torch.Generator().manual_seed(0)
    sampled = torch.multinomial(data.weights, NUM_SAMPLED, replacement=True, generator=generator)
    num_epochs = NUM_STEPS * 20 // NUM_SAMPLED
    epochs = [torch.randperm(NUM_SAMPLED, generator=generator) for _ in range(num_epochs)]
    kinds = sampled[torch.cat(epochs)].view(NUM_STEPS, 20)
    occurrences = F.one_hot(kinds, len(data.pairs)).double()
    shares = occurrences.mean(1)  # (steps, pairs)

    def losses(logits: Tensor, step: int) -> Tensor:
        logps = logits.log_softmax(1)
        of_pairs = []
        for method, row in zip(METHODS, logps, strict=True):
            of_pairs.append(losses_of(method, row, pi_ref.log(), data.pairs, lam))
        return (torch.stack(of_pairs) * shares[step]).sum(1)

    starts = pi_ref.log().expand(len(METHODS), 3)
    path = adam_path(losses, starts, RATES, NUM_STEPS)
    counts = torch.bincount(sampled, minlength=len(data.pairs)).double()
    empirical = Labelled(data.pairs, counts / NUM_SAMPLED)
    optimum = optima("TYPO", pi_ref, empirical, [lam])[0]
    return Learning(path.softmax(2), optimum)


@TESTS.claim("C46", "Fig. 2")
def learning_curves_converge() -> Iterator[Finding]:
    """At λ = 1e-5 Adam's TYPO converges closely to π* = (.6, .3, .1), and its DPO and IPO to π^δ = (1, 0, 0).

    200 sampled pairs (the paper gives no number), batches of 20, clipping at 10, rates four times the paper's, 5,000
    steps. The sample moves TYPO's optimum; Newton's optimum on the same pairs is the second yardstick.
    """
    policies, typo_optimum = learning()
    last = dict(zip(METHODS, policies[-1], strict=True))
    for method in ("DPO", "IPO"):
        chance = float(last[method][0])
        yield above(f"{method}: π(y_a) after the last step", 0.99, chance)
    distance = total_variation(last["TYPO"], INTERPOLATION.pi_star)
    yield below("TYPO: distance to π*", 0.05, distance)
    distance = total_variation(last["TYPO"], typo_optimum)
    yield below("TYPO: distance to the optimum on the sampled pairs", 0.002, distance)


JS_OPTIMA = {  # of the interpolation test, from the closed form with another code
    0.1: ".9997, .0003, .0000",
    0.5: ".9119, .0841, .0039",
    1.0: ".7780, .1972, .0247",
    2.0: ".6290, .3045, .0665",
    10.0: ".4504, .3907, .1589",
}


@TESTS.claim("C47", "Fig. 2, A.1")
def f_dpo_goes_to_the_mode() -> Iterator[Finding]:
    """f-DPO with the Jensen-Shannon divergence goes to π^δ at λ = 1e-5, more slowly than DPO.

    Its optimum is π_ref u with λ f'(u) = r* - ν, where ν normalises it. Newton's method on the loss agrees for all
    three divergences. λ depends on the scale of f, which the paper does not give; ours is twice the divergence.
    """
    pi_star, pi_ref = INTERPOLATION
    data = uniform_pairs(pi_star)
    differences = []
    for name, divergence in DIVERGENCES.items():
        closed = [f_tilted(pi_ref.log(), pi_star.log(), divergence, lam) for lam in STRENGTHS]
        policies = optima(name, pi_ref, data, STRENGTHS)
        differences.append(policies - torch.stack(closed).exp())
    yield all_vanish("JS, forward KL, α = 0.5: Newton less the closed form", differences, 1e-8)

    policies = optima("f-DPO (JS)", pi_ref, data, JS_OPTIMA)
    yield given(all_digits("λ from 0.1 to 10: optima with the known digits", JS_OPTIMA.values(), policies))
    remainder = sweep("f-DPO (JS)", INTERPOLATION)[0] - mode(pi_star)
    yield vanishes("λ = 1e-5: optimum less π^δ", remainder, 1e-8)
    half_way = learning().policies[NUM_STEPS // 4, :, 0]
    lag = float(half_way[0] - half_way[2])
    yield above("Adam, a quarter of the steps: π(y_a) of DPO less JS", 0.01, lag)
    chance = float(learning().policies[-1, 2, 0])
    yield above("Adam, last step: π(y_a) of JS", 0.99, chance)


OPTIMA = {  # for each λ the optima of the interpolation test, to the digits given; the last λ stands for ∞
    1e-5: {"DPO": "1, 0, 0", "IPO": "1, 0, 0", "TYPO": ".6, .3, .1"},
    0.1: {"DPO": ".999, .001, 0", "IPO": ".805, .185, .009", "TYPO": ".5667, .3224, .1109"},
    0.5: {"DPO": ".7912, .1978, .0110", "IPO": ".5049, .3764, .1188", "TYPO": ".5031, .3604, .1365"},
    1.0: {"DPO": ".6316, .3158, .0526", "IPO": ".4532, .3913, .1554", "TYPO": ".4710, .3761, .1529"},
    2.0: {"DPO": ".5232, .3700, .1068", "IPO": ".4267, .3965, .1767", "TYPO": ".4442, .3869, .1689"},
    10.0: {"DPO": ".4253, .3969, .1778", "IPO": ".4054, .3995, .1952", "TYPO": ".4111, .3972, .1916"},
    1e5: {"DPO": ".4000, .4000, .2000", "IPO": ".4000, .4000, .2000", "TYPO": ".4000, .4000, .2000"},
}


def gradients_left(method: str, setting: Setting, policies: Tensor, lams: Iterable[float]) -> Tensor:
    """The gradient of the expected loss by the logits, at the policy of each λ: (number of λ, n)."""
    data = uniform_pairs(setting.pi_star)

    def loss(logits: Tensor, lam: Tensor) -> Tensor:
        return mean_loss(method, logits.log_softmax(0), setting.pi_ref, data, lam)

    return torch.vmap(torch.func.grad(loss))(policies.log(), vector(*lams))


@TESTS.claim("C51a", "Fig. 6")
def optima_interpolate() -> Iterator[Finding]:
    """From small to large λ, DPO and IPO go from the mode of π* to π_ref, and TYPO from π* to π_ref.

    Seven λ from 1e-5 to 1e5, compared with known digits. The gradient that is left shows that the optima are reached.
    """
    pi_star, pi_ref = INTERPOLATION
    extremes = {"DPO": mode(pi_star), "IPO": mode(pi_star), "TYPO": pi_star}
    ends = []
    gradients = []
    for method, extreme in extremes.items():
        policies = bandit_optima(method, INTERPOLATION, OPTIMA)
        ends += [policies[0] - extreme, policies[-1] - pi_ref]
        texts = [optimum[method] for optimum in OPTIMA.values()]
        yield given(all_digits(f"{method}: λ whose optimum has the known digits", texts, policies))
        gradients.append(gradients_left(method, INTERPOLATION, policies, OPTIMA)[1:-1])
    yield all_vanish("λ = 1e-5 less the extreme, λ = 1e5 less π_ref", ends, 1e-5)
    yield all_vanish("gradients left, λ from 0.1 to 10", gradients, 1e-8)


@TESTS.claim("C51b", "Fig. 5")
def all_return_to_the_reference() -> Iterator[Finding]:
    """With a large λ all four methods stay at π_ref: DPO, IPO, f-DPO (JS) and TYPO.

    Their distance to π_ref falls as 1/λ.
    """
    lams = (100.0, 1000.0, 1e6)
    remaining = []
    gradients = []
    for method in METHODS:
        policies = bandit_optima(method, INTERPOLATION, lams)
        remaining.append(distances(policies, INTERPOLATION.pi_ref))
        left = gradients_left(method, INTERPOLATION, policies, lams)
        gradients.append(left / vector(*lams)[:, None])
    by_method = torch.stack(remaining)
    yield vanishes("λ = 1e6: largest distance to π_ref", by_method[:, 2], 1e-5)
    ratios = by_method[:, 0] / by_method[:, 1]
    yield vanishes("distance at λ = 100 over that at 1000, less 10", ratios - 10, 0.1)
    yield all_vanish("gradients left, over λ", gradients, 1e-9)


PRESERVED = {  # distance to π* with f-DPO (JS), λ in STRENGTHS, from the closed form with another code
    "x_g": ".3998, .3441, .2636, .1720, .0436",
    "x_b": ".3499, .3262, .2950, .2616, .2156",
}


@TESTS.claim("C48", "Fig. 3 left, middle")
def only_typo_preserves_and_improves() -> Iterator[Finding]:
    """Only TYPO keeps the error 0 at x_g and is closer to π* than π_ref at x_b, for every λ.

    DPO, IPO and f-DPO (JS) leave x_g at every λ.
    """
    kept = float(errors_of("TYPO", GOOD).max())
    yield vanishes("TYPO, x_g: largest error over λ", kept, 1e-8)
    largest = float(errors_of("TYPO", BAD).max())
    yield judged("TYPO, x_b: largest distance to π*", "< 0.2, π_ref's", largest, largest < 0.2)
    least = min(float(errors_of(method, GOOD).min()) for method in RIVALS)
    yield judged("DPO, IPO, f-DPO: least error at x_g over λ", "> 0", least, least > 1e-6)

    texts = [".783, .196, .022", ".6667, .1111, .2222", ".5272, .1949, .2779"]
    policies = []
    for method, setting in (("DPO", GOOD), ("DPO", BAD), ("TYPO", BAD)):
        data = uniform_pairs(setting.pi_star)
        policies.append(optima(method, setting.pi_ref, data, [1.0])[0])
    yield given(all_digits("λ = 1: DPO at x_g and x_b, TYPO at x_b, known digits", texts, policies))
    errors = []
    for setting in (GOOD, BAD):
        policies = bandit_optima("f-DPO (JS)", setting, STRENGTHS)
        errors.append(distances(policies, setting.pi_star))
    yield given(all_digits("f-DPO (JS) at x_g and x_b, five λ: known digits", PRESERVED.values(), errors))


@TESTS.claim("L6", "Eq 18, Fig. 3 middle", expected=Verdict.CORRECTED)
def the_bad_prompt_shows_the_trade_off() -> Iterator[Finding]:
    """x_b shows the trade-off of Theorem 3.1 for DPO, IPO and f-DPO: what improves there costs at x_g.

    None of them improves x_b at any λ: y_a and y_c are equally good, so that π_a : π_c stays 3 : 1 and π_a ≥ .6, which
    leaves the distance at .2 or more. A prompt with π* = (.6, .3, .1), π_ref = (.2, .2, .6) shows the trade-off.
    """
    least = min(float(errors_of(method, BAD).min()) for method in RIVALS)
    yield judged("x_b, 33 λ: least distance to π*", "< 0.2, π_ref's", least, least < 0.2 - 1e-9)
    policies = torch.cat([sweep(method, BAD)[8:] for method in RIVALS])
    remainder = policies[:, 0] - 3 * policies[:, 2]
    yield given(vanishes("x_b, λ ≥ 0.001: π_a - 3 π_c", remainder, 1e-7))

    data = uniform_pairs(SECOND_BAD.pi_star)
    lams = (0.5, 0.8, 1.0, 2.0)
    policies = optima("DPO", SECOND_BAD.pi_ref, data, lams)
    improved = distances(policies, SECOND_BAD.pi_star)
    yield instead(same_digits("other x_b, DPO, λ = .5, .8, 1, 2 (π_ref: .5)", ".150, .084, .150, .318", *improved))
    policies = optima("DPO", GOOD.pi_ref, data, lams)
    paid = distances(policies, GOOD.pi_star)
    yield instead(same_digits("x_g, DPO, the same λ", ".285, .214, .183, .103", *paid))
    policies = optima("TYPO", SECOND_BAD.pi_ref, data, (0.01, 0.1, 0.3, 1.0))
    typo_improved = distances(policies, SECOND_BAD.pi_star)
    yield instead(same_digits("other x_b, TYPO, λ = .01, .1, .3, 1", ".007, .059, .131, .270", *typo_improved))


ALPHAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


def dpo_on_grid(logps: Tensor) -> Tensor:
    """DPO's loss with β = 0.1 in the interpolation test: logps (G, 3) → (G,)."""
    pairs, weights = uniform_pairs(INTERPOLATION.pi_star)
    ref_logps = INTERPOLATION.ref_logps
    losses = []
    for pair in pairs:
        ref_pair = ref_logps[pair].expand(len(logps), 2)
        losses.append(dpo_loss(logps[:, pair], ref_pair, 0.1))
    return torch.stack(losses, 1) @ weights


def rlhf_on_grid(logps: Tensor) -> Tensor:
    """The RLHF loss with λ = 0.1 and r* = log π* in the interpolation test: logps (G, 3) → (G,)."""
    return -objective(logps, INTERPOLATION.ref_logps, INTERPOLATION.rewards, 0.1)


def twice_rlhf_on_grid(logps: Tensor) -> Tensor:
    """The control: the same objective in another unit."""
    return 2 * rlhf_on_grid(logps)


def best_on_grid(loss: Loss) -> Tensor:
    """The policy of three responses with the least loss, by ever finer grids of two logits. loss: (G, 3) → (G,)."""
    steps = torch.linspace(-1, 1, 61, dtype=torch.float64)
    directions = torch.cartesian_prod(steps, steps)
    center = vector(0, 0)
    width = 30.0
    for _ in range(16):
        points = center + width * directions
        logps = F.pad(points, (1, 0)).log_softmax(1)
        best = loss(logps).argmin()
        center = points[best]
        width *= 0.3
    return logps[best].exp()


@functools.cache
def constraint_test() -> dict[str, list[float]]:
    """Fig. 3 right: for each α of ALPHAS the distance of RLHF's optimum to DPO's, and to that of twice RLHF."""
    curves: dict[str, list[float]] = {"DPO": [], "control": []}
    for alpha in ALPHAS:
        policies = []
        for loss in (rlhf_on_grid, dpo_on_grid, twice_rlhf_on_grid):

            def penalised_loss(logps: Tensor, loss: Loss = loss, alpha: float = alpha) -> Tensor:
                return loss(logps) + alpha * mean_square(logps)

            policies.append(best_on_grid(penalised_loss))
        curves["DPO"].append(total_variation(policies[0], policies[1]))
        curves["control"].append(total_variation(policies[0], policies[2]))
    return curves


LARGEST_SQUARES = (0.36, 0.4, 0.45, 0.5, 0.51, 0.52, 0.55, 0.6, 0.7)  # c of the hard constraint ‖π‖² ≤ c


def circle(largest: float) -> Tensor:
    """Log-probs of 100,000 policies with ‖π‖² = c: a circle around the uniform policy."""
    angles = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)[:-1]
    radius = math.sqrt(largest - 1 / 3)
    # two directions of length 1 in the plane of the policies
    first = vector(1, -1, 0) / math.sqrt(2)
    second = vector(1, 1, -2) / math.sqrt(6)
    circle_of_one = torch.outer(angles.cos(), first) + torch.outer(angles.sin(), second)
    policies = 1 / 3 + radius * circle_of_one
    return policies[(policies > 1e-12).all(1)].log()


@functools.cache
def hard_constraint() -> list[float]:
    """For each c the distance of RLHF's optimum to DPO's under ‖π‖² ≤ c.

    The only stationary point of either loss is the free optimum, where ‖π‖² = .998, so that the constraint is active.
    """
    separations = []
    for largest in LARGEST_SQUARES:
        logps = circle(largest)
        of_rlhf = logps[rlhf_on_grid(logps).argmin()]
        of_dpo = logps[dpo_on_grid(logps).argmin()]
        separations.append(total_variation(of_rlhf.exp(), of_dpo.exp()))
    return separations


@TESTS.claim("C49", "Fig. 3 right", expected=Verdict.CORRECTED)
def the_penalty_separates_dpo_from_rlhf() -> Iterator[Finding]:
    """With a penalty α‖π‖² the distance of RLHF to DPO is 0 at α = 0, and grows considerably as α increases.

    It rises and falls: both go to the uniform policy. And it mixes in the unit of the loss: RLHF against 2 RLHF, the
    same objective, separates as well. A hard constraint has no unit, and the policies still differ, by less, for c up
    to about .5.
    """
    curves = constraint_test()
    yield vanishes("α = 0: distance", curves["DPO"][0], 1e-5)
    change = curves["DPO"][-1] - max(curves["DPO"])
    yield judged("from the largest distance to that at α = 100", "≥ 0", change, change >= 0)
    hump = curves["DPO"][3:]
    yield instead(same_digits("α = .1, .3, 1, 3, 10, 100", ".421, .373, .297, .148, .046, .005", *hump))
    controls = curves["control"][3:8]
    yield instead(same_digits("RLHF against 2 RLHF, α = .1, .3, 1, 3, 10", ".004, .085, .127, .127, .048", *controls))
    hard = hard_constraint()[:4]
    yield instead(same_digits("hard constraint ‖π‖² ≤ .36, .4, .45, .5", ".020, .049, .087, .133", *hard))


@TESTS.claim("C54", "App. A.3", expected=Verdict.CORRECTED)
def truncated_samples_are_another_reference() -> Iterator[Finding]:
    """Samples drawn with top-p 0.8 (and top-k, and a repetition penalty) serve as those of π_ref in ℓ_unsup.

    The minimiser for λ → ∞ is then the truncated distribution, not π_ref, which part 2 of the SIC asks for. Here with
    top-p 0.8 on π_ref = (.6, .3, .1), whose third response falls away.
    """
    pi_star, pi_ref = GOOD
    cumulative = pi_ref.cumsum(0)
    is_kept = cumulative - pi_ref < 0.8
    truncated = torch.where(is_kept, pi_ref, 0) / pi_ref[is_kept].sum()
    data = uniform_pairs(pi_star)

    def loss(logits: Tensor, lam: float) -> Tensor:
        logps = logits.log_softmax(0)
        expected_logp = (truncated * logps).sum()
        samples = expected_logp.expand(len(data.pairs), 1)
        losses = typo_loss(logps[data.pairs], samples, lam)
        return (data.weights * losses).sum()

    policies = minimise_each(loss, pi_ref.log()[None], vector(1e4)).softmax(1)
    distance = total_variation(policies[0], pi_ref)
    yield judged("x_g, λ = 1e4: distance to π_ref", "0", distance, distance < 1e-3)
    remainder = policies[0] - truncated
    yield instead(vanishes("λ = 1e4: optimum less (2/3, 1/3, 0)", remainder, 1e-3))


@TESTS.claim("C55", "App. A.3")
def one_sample_is_unbiased() -> Iterator[Finding]:
    """One sample of π_ref per prompt is used in ℓ_unsup. The gradient is unbiased for any number of samples.

    All pairs of samples are enumerated. The variance of the gradient with two samples is half of that with one.
    """
    logits = vector(0.3, -0.2, 0.5)
    pi_ref = INTERPOLATION.pi_ref
    indices = torch.arange(3)
    moments = []
    for samples in (indices[:, None], torch.cartesian_prod(indices, indices)):
        weights = pi_ref[samples].prod(1, keepdim=True)

        def losses(x: Tensor, samples: Tensor = samples) -> Tensor:
            logps = x.log_softmax(0)
            pair = logps[:2].expand(len(samples), 2)
            return typo_loss(pair, logps[samples], 0.5) - typo_loss(pair, logps[samples], 0.0)

        gradients = torch.func.jacrev(losses)(logits)  # (number of tuples, 3)
        mean = (weights * gradients).sum(0)
        squares = (gradients - mean) ** 2
        moments.append((mean, (weights * squares).sum(0)))
    exact = 0.5 * (logits.softmax(0) - pi_ref)
    remainder = torch.stack([m - exact for m, _ in moments])
    yield vanishes("one and two samples: mean gradient less λ (π - π_ref)", remainder)
    remainder = moments[1][1] - moments[0][1] / 2
    yield vanishes("variance with two samples less half of that with one", remainder)


NEEDS_MODELS = "needs trained language models"
TESTS.elsewhere("C50", "Fig. 4", "On Anthropic HH, TYPO wins more often against the chosen response.", NEEDS_MODELS)
TESTS.elsewhere("C52", "§3.1", "A language model keeps good prompts and improves bad ones with TYPO.", NEEDS_MODELS)
TESTS.elsewhere("C53", "Fig. 6", "The optima of a language model interpolate as the bandits' do.", NEEDS_MODELS)
TESTS.elsewhere(
    "C56",
    "Eq 16",
    "Without a reference, ℓ_sup on long texts becomes a comparison of lengths.",
    "ours, not the paper's; needs log-probs of a language model on dialogue rows",
)
TESTS.elsewhere(
    "C57",
    "Eqs 14, 16, 17",
    "Alone, a language model's ℓ_sup leads to π* from any π_ref, and its ℓ_unsup leads back to π_ref.",
    NEEDS_MODELS,
)
TESTS.elsewhere(
    "C58",
    "§4.1",
    "Prompts without preferences can serve in ℓ_unsup, and their good policy is preserved.",
    NEEDS_MODELS,
)
TESTS.elsewhere(
    "C59",
    "App. A.3",
    "Samples with top-k 60, top-p 0.8 and a repetition penalty of 1.1 serve as those of π_ref.",
    NEEDS_MODELS,
)


# ---------------------------------------------------------------- noise-adaptive regularisation

NOISE = PAPER.section("DPO as a penalty log(γ + u) (appendix C)")
LEVELS = torch.logspace(-3, 3, 121, dtype=torch.float64)  # values of u


@NOISE.claim("C33", "Eq 19")
def dpo_is_a_logarithm() -> Iterator[Finding]:
    """DPO's loss is log(γ + u) with γ = (ref_l/ref_w)^λ and u = (π_l/π_w)^λ, up to a constant: -log γ."""
    logps = random_policies(100, 2, seed=23)
    ref_logps = random_policies(100, 2, seed=24)
    ref_chances = ref_logps.exp()
    chances = logps.exp()
    gamma = (ref_chances[:, 1] / ref_chances[:, 0]) ** 0.3
    u = (chances[:, 1] / chances[:, 0]) ** 0.3
    penalty = (gamma + u).log() - gamma.log()
    remainder = dpo_loss(logps, ref_logps, 0.3) - penalty
    yield vanishes("100 pairs, λ = 0.3", remainder, 1e-12)


def excess_over_bound(gamma: float, of_gamma: float) -> float:
    """The largest violation of Eq 20 on a grid, for g = log(γ + u) relative to f = log(of_gamma + u)."""
    g = (gamma + LEVELS).log()
    f = (of_gamma + LEVELS).log()
    ratio = (of_gamma + LEVELS) / (gamma + LEVELS)  # g'/f'
    changes = f - f[:, None]  # from u_1 (rows) to u_2
    bound = g[:, None] + ratio[:, None] * changes
    return float((g - bound).max())


GAMMAS = [  # γ_1 < γ_2
    (0.01, 0.1),
    (0.1, 1.0),
    (1.0, 1.5),
    (1.0, 50.0),
]


@NOISE.claim("C34", "Def C.1, Eq 20")
def a_smaller_gamma_is_more_concave() -> Iterator[Finding]:
    """For γ_1 < γ_2, log(γ_1 + u) is concave relative to log(γ_2 + u).

    Eq 20 on all pairs of 121 values of u from 0.001 to 1000; with γ_1 and γ_2 exchanged it fails.
    """
    violations = []
    exchanged = []
    for smaller, larger in GAMMAS:
        violations.append(excess_over_bound(smaller, larger))
        exchanged.append(excess_over_bound(larger, smaller))
    yield judged("4 pairs of γ: largest violation", "≤ 0", max(violations), max(violations) <= 1e-12)
    yield above("exchanged: least violation", 0.01, min(exchanged))


@NOISE.claim("C35", "App. C, Eqs 21, 22")
def the_penalty_is_concave_and_adapts() -> Iterator[Finding]:
    """log(γ + u) is concave and does not fall, and DPO is such a penalty, more concave where γ is small.

    The slope of DPO's loss in log u is λ u/(γ + u) at equal u. It saturates sooner where π_ref favours the winner.
    """
    for gamma in (0.01, 1.0):
        slopes = (gamma + LEVELS).log().diff() / LEVELS.diff()
        yield above(f"γ = {gamma:g}: least slope", 0, float(slopes.min()))
        yield below(f"γ = {gamma:g}: largest change of slope", 0, float(slopes.diff().max()))

    margins = LEVELS.log()  # log π_l/π_w at λ = 1
    differences = []
    for gamma in (0.1, 1.0, 10.0):
        ref_logps = vector(-math.log(gamma), 0).expand(len(margins), 2)

        def loss(x: Tensor, ref_logps: Tensor = ref_logps) -> Tensor:
            logps = F.pad(x[:, None], (1, 0))  # of the winner 0, of the loser x
            return dpo_loss(logps, ref_logps, 1.0)

        slopes = gradient_of(loss, margins)
        differences.append(slopes - LEVELS / (gamma + LEVELS))
    yield all_vanish("slope of DPO's loss less u/(γ + u)", differences, 1e-12)


@NOISE.claim("C36", "Fig. 8", expected=Verdict.CORRECTED)
def limits_of_the_penalty() -> Iterator[Finding]:
    """log(γ + u) goes to log u as γ → 0, and γ log(γ + u) to u as γ → ∞.

    The second limit is infinite as it stands. γ log(1 + u/γ) goes to u. Both differ by a constant, γ log γ, that does
    not matter for the relative concavity.
    """
    few = LEVELS[(LEVELS >= 0.1) & (LEVELS <= 10)]
    remainder = (1e-9 + few).log() - few.log()
    yield vanishes("γ = 1e-9: log(γ + u) - log u, u from 0.1 to 10", remainder, 1e-7)
    excesses = 1e9 * (1e9 + few).log() - few
    excess = float(excesses.max())
    yield judged("γ = 1e9: largest of γ log(γ + u) - u", "0", excess, excess < 1e-6)
    remainder = 1e9 * (few / 1e9).log1p() - few
    yield instead(vanishes("γ = 1e9: γ log(1 + u/γ) - u", remainder, 1e-6))
    yield given(same_value("the excess at γ = 1e9 is γ log γ", 1e9 * math.log(1e9), excess, 1e-8))


# ---------------------------------------------------------------- a Gaussian

GAUSSIAN = PAPER.section("DPO from a Gaussian (appendix D)")


@GAUSSIAN.claim("L7", "Eq 23", expected=Verdict.CORRECTED)
def preferences_as_an_increasing_function() -> Iterator[Finding]:
    """A Bradley-Terry probability is p*(y_1 ≻ y_2) = μ(π*(y_2)/π*(y_1)) with an increasing μ into [0, 1].

    It falls with that ratio: p* = 1/(1 + t). With an increasing μ the likelihood -log μ(π_l/π_w) would raise π_l.
    """
    ratios = LEVELS
    first = 1 / (1 + ratios)  # π*(y_1)
    pi_star = torch.stack([first, 1 - first], 1)
    pair = torch.tensor([(0, 1)])
    preferences = torch.cat([bradley_terry(row, pair) for row in pi_star])
    rise = float(preferences.diff().min())
    yield above("121 ratios: least rise of p* with the ratio", 0, rise)
    remainder = preferences - 1 / (1 + ratios)
    yield instead(vanishes("p* less 1/(1 + t), which falls", remainder, 1e-12))
    preference = bradley_terry(vector(0.75, 0.25), pair)
    yield given(same_value("π* = (.75, .25), t = 1/3: p*", 0.75, float(preference)))


def gaussian_losses(vectors: Tensor, gamma: Tensor) -> Tensor:
    """-log N(v | 0, γ I) without its constant: (d/2) log γ + v'v/(2γ). vectors (B, d), gamma (G,) → (B, G)."""
    squares = vectors.square().sum(1, keepdim=True)
    return vectors.shape[1] / 2 * gamma.log() + squares / (2 * gamma)


@GAUSSIAN.claim("C37", "Eqs 25 to 28")
def the_best_variance() -> Iterator[Finding]:
    """For a vector v of two entries, -log N(v | 0, γ I) is least at γ = v'v/2, and the minimum is log v'v + const.

    By a grid of 200,001 γ. In d dimensions the best γ is v'v/d.
    """
    gamma = torch.logspace(-3, 2, 200_001, dtype=torch.float64)
    errors = []
    minima = []
    for d in (2, 3):
        vectors = random_policies(10, d, seed=25)
        squares = vectors.square().sum(1)
        losses = gaussian_losses(vectors, gamma)
        errors.append(gamma[losses.argmin(1)] * d / squares - 1)
        minima.append(losses.amin(1) - d / 2 * squares.log())
    yield vanishes("10 vectors, d = 2: γ over v'v/2, less 1", errors[0], 1e-4)
    remainder = minima[0] - minima[0].mean()
    yield vanishes("minimum less log v'v: spread", remainder, 1e-8)
    yield given(vanishes("d = 3: γ over v'v/3, less 1", errors[1], 1e-4))


@GAUSSIAN.claim("C38", "Eqs 29, 30")
def the_gaussian_gives_dpo() -> Iterator[Finding]:
    """With ξ = (π_l/π_w)^(λ/2), and so for π_ref, log(ξ_θ² + ξ_ref²) is DPO's loss up to a constant.

    Value and gradient are compared with DPO's loss; γ is minimised out with C37's formula.
    """
    logps = random_policies(100, 2, seed=26)
    ref_logps = random_policies(100, 2, seed=27)

    def loss(x: Tensor) -> Tensor:
        of_policy = (x[:, 1] - x[:, 0]).exp() ** 0.15
        of_reference = (ref_logps[:, 1] - ref_logps[:, 0]).exp() ** 0.15
        squares = of_policy**2 + of_reference**2
        return squares.log()

    constants = 0.3 * (ref_logps[:, 1] - ref_logps[:, 0])
    remainder = loss(logps) - constants - dpo_loss(logps, ref_logps, 0.3)
    yield vanishes("100 pairs, λ = 0.3", remainder, 1e-12)
    gradient = gradient_of(loss, logps)
    of_dpo = gradient_of(lambda x: dpo_loss(x, ref_logps, 0.3), logps)
    yield vanishes("gradient", gradient - of_dpo, 1e-12)


# ---------------------------------------------------------------- figures

ARMS = ((BLUE, "-", "a"), (ORANGE, "--", "b"), (GREEN, "-.", "c"))
LINES = {
    "DPO": (BLUE, "-"),
    "IPO": (ORANGE, "--"),
    "f-DPO (JS)": (PURPLE, ":"),
    "TYPO": (GREEN, "-."),
}


def mark_ends(axes: "Axes", left: float, right: float) -> None:
    """π* as triangles at the left end of the axes, π_ref at the right end."""
    for arm, (color, _, _) in enumerate(ARMS):
        axes.plot(left, INTERPOLATION.pi_star[arm], "<", color=color, clip_on=False)
        axes.plot(right, INTERPOLATION.pi_ref[arm], ">", color=color, clip_on=False)
    axes.set_ylim(-0.03, 1.03)


@PAPER.figure(
    "Interpolation (Figs. 5, 6): the probabilities of the three responses at the optimum, against λ. Triangles: π* at "
    "the left, π_ref at the right. Only TYPO goes to π* as λ → 0."
)
def interpolation() -> "Figure":
    figure, panels = canvas([METHODS], (14, 3.6))
    for method, axes in panels.items():
        for arm, (color, style, letter) in enumerate(ARMS):
            chances = sweep(method, INTERPOLATION)[:, arm]
            axes.semilogx(SWEEP, chances, style, color=color, label=f"$\\pi_\\theta(y_{letter})$")
        mark_ends(axes, SWEEP[0], SWEEP[-1])
        label_axes(axes, method, "λ (no unit)", "probability")
    return figure


@PAPER.figure(
    "Fig. 2: Adam at λ = 1e-5 on 200 sampled pairs, from π_ref. Dotted: π*. The rates are four times the paper's, and "
    "the steps 5,000."
)
def learning_curves() -> "Figure":
    figure, panels = canvas([METHODS], (14, 3.6))
    policies = learning().policies
    for column, (method, axes) in enumerate(panels.items()):
        for arm, (color, style, letter) in enumerate(ARMS):
            axes.plot(policies[:, column, arm], style, color=color, label=f"$\\pi_\\theta(y_{letter})$")
            axes.axhline(INTERPOLATION.pi_star[arm], color=color, linestyle=":", linewidth=1)
        axes.set_ylim(-0.03, 1.03)
        label_axes(axes, method, "optimizer steps", "probability")
    return figure


@PAPER.figure(
    "Preservation (Fig. 3 left, middle): the distance of the optimum to π* against λ. Grey: π_ref. At the paper's x_b "
    "no λ of DPO, IPO or f-DPO improves on π_ref; our second bad prompt shows the trade-off with x_g."
)
def preservation() -> "Figure":
    titles = {
        "good": ("$x_g$: π_ref = π* = (.6, .3, .1)", GOOD),
        "bad": ("$x_b$: π* = (.4, .2, .4), π_ref = (.6, .2, .2)", BAD),
        "second": ("second bad prompt: π* = (.6, .3, .1),\nπ_ref = (.2, .2, .6)", SECOND_BAD),
    }
    figure, panels = canvas([list(titles)], (14, 4.2))
    for name, axes in panels.items():
        title, setting = titles[name]
        axes.axhline(total_variation(*setting), color=GREY, linewidth=1, label="π_ref")
        for method, (color, style) in LINES.items():
            axes.semilogx(SWEEP, errors_of(method, setting), style, color=color, label=method)
        label_axes(axes, title, "λ (no unit)", "distance to π* (total variation)")
    return figure


@PAPER.figure(
    "Constraints (Fig. 3 right), λ = 0.1. Left: the distance of RLHF's optimum to DPO's with a penalty α‖π‖², and to "
    "that of twice the RLHF loss, which is the same objective. Right: with the hard constraint ‖π‖² ≤ c. It has no "
    "unit, and the two differ for c up to about .5."
)
def constraints() -> "Figure":
    figure, panels = canvas([["penalty", "hard"]], (11, 3.8))
    curves = constraint_test()
    axes = panels["penalty"]
    alphas = ALPHAS[1:]  # without 0, for the logarithmic axis
    axes.semilogx(alphas, curves["DPO"][1:], "o-", color=BLUE, label="RLHF and DPO")
    axes.semilogx(alphas, curves["control"][1:], "s--", color=GREY, label="RLHF and 2 RLHF (control)")
    label_axes(axes, "penalty α‖π‖²", "α (no unit)", "distance (total variation)")

    axes = panels["hard"]
    axes.plot(LARGEST_SQUARES, hard_constraint(), "o-", color=BLUE)
    axes.set_ylim(bottom=0)
    label_axes(axes, "constraint ‖π‖² ≤ c", "c (no unit)", "distance of RLHF and DPO (total variation)")
    return figure


def main(args: Args) -> None:
    paper_command(PAPER, args)


if __name__ == "__main__":
    checked_command(main, Args)
