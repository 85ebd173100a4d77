"""Reward-model distillation, arXiv 2405.19316, on tabular policies: its propositions, theorems and figures.

Completions are called arms, as in a bandit. Policies are in float64. α is β/γ. The losses are those of algos/.

    python scripts/papers/distillation.py
    python scripts/papers/distillation.py --claim T19
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from algos.distill_dpo import distill_loss
from algos.dpo import dpo_loss
from algos.ensemble_dpo import ensemble_losses
from algos.ipo import ipo_loss
from algos.pessimistic_dpo import pessimistic_loss
from algos.rm import rm_loss
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
from scripts.lab.pessimism import (
    Ball,
    HullPoint,
    advantages,
    forward_kls,
    gap_matrix,
    least_divergent,
    pessimistic_score,
    plane_directions,
)
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, canvas, label_axes
from scripts.lab.tabular import (
    Optimum,
    bradley_terry,
    descend,
    entropy,
    fit_policy,
    grid,
    kl,
    log_partition,
    matrix,
    minimise,
    normal,
    objective,
    ordered_pairs,
    random_policies,
    tilted,
    total_variation,
    uniform_logps,
    vector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = Paper("distillation", "Robust Preference Optimization through Reward Model Distillation", "2405.19316")
LANGUAGE_MODELS = "needs trained language models"


def gaps_of(values: Tensor, pairs: Tensor) -> Tensor:
    """The value of the first of each index pair less that of the second: (..., arms) → (..., pairs)."""
    firsts = values[..., pairs[:, 0]]
    seconds = values[..., pairs[:, 1]]
    return firsts - seconds


# ---------------------------------------------------------------- Section 2: the objective, reward models and DPO

PRELIMINARIES = PAPER.section("The objective, reward models and DPO")
REF_LOGPS = vector(0.3, 0.25, 0.2, 0.15, 0.1).log()
REWARDS = vector(1.2, -0.7, 0.4, 2.0, -1.5)
ALL_PAIRS = ordered_pairs(5)
BETAS = (0.5, 1.0, 5.0)


@functools.cache
def aligned_optimum(beta: float) -> Optimum:
    """The policy that maximises Eq 1, by Newton's method from π_ref."""

    def loss(logits: Tensor) -> Tensor:
        return -objective(logits.log_softmax(0), REF_LOGPS, REWARDS, beta)

    return minimise(loss, REF_LOGPS)


@PRELIMINARIES.claim("T1", "Eqs 1, 3")
def the_aligned_policy_is_the_tilted_reference() -> Iterator[Finding]:
    """The policy π_ref exp(r/β)/Z maximises E_π[r] - β KL(π ‖ π_ref), and the maximum is β log Z."""
    distances = []
    values = []
    for beta in BETAS:
        optimum = aligned_optimum(beta)
        distances.append(total_variation(optimum.policy, tilted(REF_LOGPS, REWARDS, beta).exp()))
        values.append(-optimum.loss - float(beta * log_partition(REF_LOGPS, REWARDS, beta)))

    yield vanishes("five arms, β from 0.5 to 5, distance of Newton's optimum", max(distances), 1e-8)
    yield vanishes("its value less β log Z", vector(*values))


@PRELIMINARIES.claim("T2", "Eqs 4, 5")
def the_aligned_policy_gives_the_reward_back() -> Iterator[Finding]:
    """The aligned policy gives the reward back, r = β log(π/π_ref) + β log Z, and P(y_1 ≻ y_2) = σ(β h).

    The policy is Newton's optimum of Eq 1, not Eq 3.
    """
    reward_errors = []
    probability_errors = []
    preferences = bradley_terry(REWARDS.exp(), ALL_PAIRS)
    for beta in BETAS:
        log_ratios = aligned_optimum(beta).policy.log() - REF_LOGPS
        implicit_rewards = beta * (log_ratios + log_partition(REF_LOGPS, REWARDS, beta))
        reward_errors.append(implicit_rewards - REWARDS)
        margins = beta * gaps_of(log_ratios, ALL_PAIRS)
        probability_errors.append(margins.sigmoid() - preferences)

    yield vanishes("Eq 4, β from 0.5 to 5, implicit reward less r", torch.stack(reward_errors), 1e-8)
    yield vanishes("Eq 5, σ(β h) less exp r_1 / (exp r_1 + exp r_2)", torch.stack(probability_errors), 1e-8)


@PRELIMINARIES.claim("T3", "Eq 2")
def maximum_likelihood_returns_the_reward() -> Iterator[Finding]:
    """On pairs that follow a Bradley-Terry model, maximum likelihood returns its reward, up to a shift.

    All pairs of five arms in both orders, weighted with their probabilities.
    """
    preferences = bradley_terry(REWARDS.exp(), ALL_PAIRS)

    def loss(rewards: Tensor) -> Tensor:
        return preferences @ rm_loss(rewards[ALL_PAIRS])

    optimum = minimise(loss, torch.zeros_like(REWARDS))
    shifts = optimum.parameters - REWARDS
    yield vanishes("estimate less r, without their means", shifts - shifts.mean(), 1e-8)
    yield vanishes("change of the loss when 7 is added to all rewards", float(loss(REWARDS + 7) - loss(REWARDS)))


@PRELIMINARIES.claim("T4", "Eq 6")
def dpo_is_the_likelihood_of_eq_5() -> Iterator[Finding]:
    """DPO's loss is -log p with the p of Eq 5, and its gradient over (log π(y_w), log π(y_l)) is β (1-p) (-1, 1)."""
    beta = 0.3
    logps = random_policies(1000, 2, seed=0)
    ref_logps = random_policies(1000, 2, seed=1)
    policies = logps.exp()
    references = ref_logps.exp()
    policy_odds = policies[:, 0] / policies[:, 1]
    reference_odds = references[:, 0] / references[:, 1]
    odds = (policy_odds / reference_odds) ** beta
    probabilities = odds / (1 + odds)

    def loss(pair_logps: Tensor) -> Tensor:
        return dpo_loss(pair_logps, ref_logps, beta).sum()

    slopes = beta * (1 - probabilities)
    gradient = torch.stack([-slopes, slopes], 1)
    losses = dpo_loss(logps, ref_logps, beta)
    yield vanishes("loss plus log p, 1,000 random pairs", losses + probabilities.log())
    yield vanishes("gradient less β (1-p) (-1, 1)", torch.func.grad(loss)(logps) - gradient)


# ---------------------------------------------------------------- Section 2.3: pitfalls

PITFALLS = PAPER.section("Pitfalls of DPO")
ONE_PAIR = torch.tensor([[0, 1]])
DISJOINT = torch.tensor([(0, 4), (1, 5), (2, 6), (3, 7)])  # of 12 arms: 4 winners, 4 losers, 4 that no pair has
SIDES = vector(1, 1, 1, 1, -1, -1, -1, -1, 0, 0, 0, 0)  # 1, -1, 0 for those


def dpo_slope(beta_h: float, beta: float) -> float:
    """dL/dh of DPO at β h."""

    def loss(h: Tensor) -> Tensor:
        logps = torch.stack([h, torch.zeros_like(h)])
        return dpo_loss(logps[None], vector(0, 0)[None], beta)[0]

    return float(torch.func.grad(loss)(vector(beta_h / beta)[0]))


def noisy_margin(doubt: float, beta: float) -> float:
    """β h of DPO's optimum on two arms, where the second one is preferred with the probability `doubt`."""
    ref_logps = vector(0.3, 0.7).log()
    both_orders = ordered_pairs(2)
    weights = vector(1 - doubt, doubt)

    def losses(logps: Tensor) -> Tensor:
        return dpo_loss(logps[both_orders], ref_logps[both_orders], beta)

    log_ratios = fit_policy(losses, weights, ref_logps).parameters - ref_logps
    return beta * float(log_ratios[0] - log_ratios[1])


@PITFALLS.claim("T5", "§2.3")
def certain_preferences_remove_the_loser() -> Iterator[Finding]:
    """If y_1 is always preferred to y_2, the reward gap is infinite, and the aligned π(y_2) is 0 for any finite β.

    With a doubt ε the gap is log((1-ε)/ε) for every β, and has no bound as ε goes to 0.
    """
    errors = []
    slopes = []
    for beta in (0.01, 0.1, 1.0, 10.0, 100.0):
        for beta_h in range(0, 701, 50):
            slopes.append(dpo_slope(beta_h, beta) / beta)
        for doubt in (1e-1, 1e-6):
            errors.append(noisy_margin(doubt, beta) - math.log((1 - doubt) / doubt))

    flattest = max(slopes)
    yield below("β from .01 to 100: largest dL/d(βh) of DPO, β h from 0 to 700", 0, flattest)
    yield vanishes("β h of the optimum less log((1-ε)/ε), ε from .1 to 1e-6", vector(*errors), 1e-6)


def disjoint_losses(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """DPO's loss on each of the disjoint pairs: log π (..., 12) → (..., 4)."""
    pair_logps = logps[..., DISJOINT]  # (..., 4, 2)
    pair_ref_logps = ref_logps[DISJOINT].expand_as(pair_logps)
    flat_logps = pair_logps.reshape(-1, 2)
    losses = dpo_loss(flat_logps, pair_ref_logps.reshape(-1, 2), beta)
    return losses.view(pair_logps.shape[:-1])


def disjoint_margins(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """h of each of the disjoint pairs: log π (..., 12) → (..., 4)."""
    return gaps_of(logps - ref_logps, DISJOINT)


def disjoint_path(ref_logps: Tensor, beta: float) -> Tensor:
    """β h of the disjoint pairs along 100 steps of gradient descent on DPO from the uniform policy: (101, 4)."""

    def loss(logits: Tensor) -> Tensor:
        return disjoint_losses(logits.log_softmax(0), ref_logps, beta).mean()

    logits = descend(loss, uniform_logps(12), 4 / beta**2, 100)
    return beta * disjoint_margins(logits, ref_logps)


@PITFALLS.claim("T6", "Prop. 1, Eqs 15-17")
def disjoint_pairs_have_infinite_ratios() -> Iterator[Finding]:
    """On disjoint pairs with one parameter per completion, every ratio h goes to infinity as DPO's loss goes to its
    infimum 0, for any β, and the pairs do not depend on each other.

    The mean loss L of n pairs is at least log(1 + exp(-βh_i))/n. So β h_i ≥ -log(exp(nL) - 1), without bound as L → 0.
    """
    ref_logps = random_policies(1, 12, seed=0)[0]
    other_ref_logps = ref_logps.clone()
    other_ref_logps[0] += 1  # of the first pair's winner
    shortfalls = []
    growths = []
    dependences = []
    for beta in (0.1, 1.0, 10.0):
        tilts = grid(0, 30 / beta, 5000)[:, None]
        logps = (random_policies(5000, 12, seed=1) + tilts * SIDES).log_softmax(1)
        sums = disjoint_losses(logps, ref_logps, beta).sum(1)
        bounds = -sums.expm1().log()
        margins = beta * disjoint_margins(logps, ref_logps)
        shortfalls.append(torch.relu(bounds - margins.amin(1)))

        path = disjoint_path(ref_logps, beta)
        other_path = disjoint_path(other_ref_logps, beta)
        growths.append(path.diff(dim=0))
        dependences.append(path[:, 1:] - other_path[:, 1:])

    yield vanishes("β from .1 to 10: how far β h is below the bound, 15,000 policies", torch.cat(shortfalls), 1e-9)
    yield above("smallest growth of a β h in 100 gradient steps", 0, torch.cat(growths))
    yield vanishes("change of the others when one pair is changed", torch.cat(dependences))


def disjoint_policy(winner: float, loser: float) -> Tensor:
    """Log-probs of a policy with these probabilities of each winner and loser, and the rest on the unseen arms."""
    unseen = (1 - 4 * winner - 4 * loser) / 4
    probabilities = torch.full_like(SIDES, unseen)
    probabilities[SIDES > 0] = winner
    probabilities[SIDES < 0] = loser
    return probabilities.log()


@PITFALLS.claim("T7", "Cor. 1, Eqs 18-22", expected=Verdict.CORRECTED)
def global_optima_may_favour_unseen_arms() -> Iterator[Finding]:
    """A policy is a global optimum of DPO on disjoint pairs iff the mass outside the losers goes to 1 with π(y_w) > 0.
    So nearly all mass may be on completions that no pair has.

    The mass has to be 1, which no softmax reaches. For a limit, each π(y_w)/π(y_l) has to go to infinity: with
    π(y_w) = π(y_l) = 1/t and t to infinity, the mass goes to 1 too. β = 1, uniform π_ref.
    """
    reference = uniform_logps(12)

    def loss(winner: float, loser: float) -> float:
        losses = disjoint_losses(disjoint_policy(winner, loser), reference, 1.0)
        return float(losses.mean())

    yield vanishes("loss with π(y_l) = 1e-300, π(y_w) = .001", loss(1e-3, 1e-300))
    yield vanishes("loss with π(y_w) = 1e-8, π(y_l) = 1e-16", loss(1e-8, 1e-16), 1e-7)
    constant = loss(1e-8, 1e-8)
    yield same_value("loss with π(y_w) = π(y_l) = 1e-8, mass outside of the losers 1 - 4e-8", 0, constant)
    yield given(same_value("the same by hand, log 2", math.log(2), constant))

    logps = random_policies(10_000, 12, seed=2)
    ratios = disjoint_margins(logps, reference).amin(1).exp()
    losses = disjoint_losses(logps, reference, 1.0).mean(1)
    upper = torch.log1p(1 / ratios)
    is_below = losses <= upper + 1e-12
    is_above = losses >= upper / 4 - 1e-12
    share = (is_below & is_above).double().mean()
    statement = "share of 10,000 policies with log(1 + 1/q)/n ≤ loss ≤ log(1 + 1/q), q the least ratio"
    yield instead(same_value(statement, 1, float(share)))


PITFALLS.elsewhere(
    "T8", "§2.3", "DPO can overfit to almost never producing anything like the good responses.", LANGUAGE_MODELS
)

# ---------------------------------------------------------------- Section 3.1: distillation

DISTILLATION = PAPER.section("Reward-model distillation")
GRAPHS = {  # pairs of 5 arms
    "all pairs": ordered_pairs(5),
    "chain": torch.tensor([(0, 1), (1, 2), (2, 3), (3, 4)]),
    "two separate pairs": torch.tensor([(0, 1), (2, 3)]),
}


def distil(rewards: Tensor, ref_logps: Tensor, pairs: Tensor, weights: Tensor, beta: float, start: Tensor) -> Optimum:
    """The minimiser of the distillation loss, Eq 7, on weighted pairs."""

    def losses(logps: Tensor) -> Tensor:
        return distill_loss(logps[pairs], ref_logps[pairs], rewards[pairs], beta)

    return fit_policy(losses, weights / weights.sum(), start)


@DISTILLATION.claim("T9", "Eq 7")
def distillation_regresses_the_reward_gap() -> Iterator[Finding]:
    """The distillation loss is (Δr - β h)². It does not see the order of a pair, nor a number added to both rewards.
    It is least where h = Δr/β."""
    beta = 0.3
    logps = random_policies(1000, 2, seed=0)
    ref_logps = random_policies(1000, 2, seed=1)
    rewards = normal(1000, 2, seed=0)
    losses = distill_loss(logps, ref_logps, rewards, beta)

    log_ratios = logps - ref_logps
    h = log_ratios[:, 0] - log_ratios[:, 1]
    gaps = rewards[:, 0] - rewards[:, 1]
    by_hand = (gaps - beta * h) ** 2
    swapped = distill_loss(logps.flip(1), ref_logps.flip(1), rewards.flip(1), beta)
    shifted = distill_loss(logps, ref_logps, rewards + 7, beta)
    at_optimum = distill_loss(ref_logps + rewards / beta, ref_logps, rewards, beta)

    yield vanishes("loss less (Δr - β h)², 1,000 random pairs", losses - by_hand)
    yield vanishes("change when the pair is swapped", losses - swapped)
    yield vanishes("change when 7 is added to the rewards", losses - shifted)
    yield vanishes("loss where h = Δr/β", at_optimum)


@DISTILLATION.claim("T10", "§3.1")
def equal_gaps_are_equal_preferences() -> Iterator[Finding]:
    """Under Bradley-Terry, matching the reward gaps is the same as matching the strength of the preference.

    σ changes by at most a quarter of a change of the gap, and always changes: (σ(Δr) - σ(βh))² ≤ loss/16.
    """
    values = grid(-5, 5, 201)
    both = torch.cartesian_prod(values, values)
    gaps = both[:, 0]
    margins = both[:, 1]
    zeros = torch.zeros_like(gaps)
    logps = torch.stack([margins, zeros], 1)
    rewards = torch.stack([gaps, zeros], 1)
    losses = distill_loss(logps, torch.zeros_like(logps), rewards, 1.0)
    differences = (margins.sigmoid() - gaps.sigmoid()).abs()

    is_equal = gaps == margins
    yield vanishes("loss where the preferences are equal, gaps from -5 to 5", losses[is_equal])
    yield above("smallest difference of the preferences where the gaps differ", 0, differences[~is_equal])
    yield below("largest (σ(Δr) - σ(βh))² - loss/16", 1e-15, differences**2 - losses / 16)


@functools.cache
def theorem_1(graph: str, beta: float = 0.7) -> tuple[Tensor, list[Optimum]]:
    """The aligned policy of 5 arms, and d-DPO's minimisers on the pairs of `graph` from two random starts.

    Rewards, reference and the pairs' weights are random.
    """
    rewards, ref_logits, *starts = normal(4, 5, seed=0)
    ref_logps = ref_logits.log_softmax(0)
    pairs = GRAPHS[graph]
    weights = normal(len(pairs), seed=1).abs() + 0.1

    optima = [distil(rewards, ref_logps, pairs, weights, beta, start) for start in starts]
    return tilted(ref_logps, rewards, beta).exp(), optima


def distances_to_aligned(graph: str, beta: float = 0.7) -> list[float]:
    """The distance of each of d-DPO's minimisers to the aligned policy."""
    target, optima = theorem_1(graph, beta)
    return [total_variation(optimum.policy, target) for optimum in optima]


@DISTILLATION.claim("T11", "Theorem 1")
def distillation_reaches_the_aligned_policy() -> Iterator[Finding]:
    """If every pair of completions has weight, the minimiser of the distillation loss maximises Eq 1, for any β > 0.

    Full support is more than is needed. A chain that connects all completions suffices; two separate pairs do not.
    """
    full_support = [max(distances_to_aligned("all pairs", beta)) for beta in (0.1, 0.7, 5.0)]
    yield vanishes("all pairs with random weights, two starts, β from .1 to 5, distance", max(full_support), 1e-8)
    yield instead(vanishes("chain, distance", max(distances_to_aligned("chain")), 1e-8))

    _, separate = theorem_1("two separate pairs")
    apart = min(distances_to_aligned("two separate pairs"))
    yield instead(vanishes("two separate pairs, loss", max(optimum.loss for optimum in separate), 1e-16))
    yield instead(above("two separate pairs, distance", 0.01, apart))


@DISTILLATION.claim("T12", "Theorem 1")
def any_finite_reward_can_be_distilled() -> Iterator[Finding]:
    """Theorem 1 makes no assumption on r: it need not come from a Bradley-Terry model.

    Rewards that no preference data gave: a constant, ranks, a count, one very bad arm, and heavy-tailed random numbers.
    """
    heavy_tailed = normal(1, 5, seed=3) ** 3
    kinds = [
        (2, 2, 2, 2, 2),
        (1, 2, 3, 4, 5),
        (0, 0, 7, 0, 1),
        (0, -9, 0, 0, 0),
    ]
    weights = torch.ones(len(ALL_PAIRS), dtype=torch.float64)

    distances = []
    for rewards in torch.cat([matrix(kinds), heavy_tailed]):
        optimum = distil(rewards, REF_LOGPS, ALL_PAIRS, weights, 0.7, REF_LOGPS)
        distances.append(total_variation(optimum.policy, tilted(REF_LOGPS, rewards, 0.7).exp()))
    yield vanishes("largest distance to the aligned policy", max(distances), 1e-8)


@DISTILLATION.claim("T13", "§3.1", expected=Verdict.CORRECTED)
def unit_rewards_give_ipo() -> Iterator[Finding]:
    """With r = 1{y = y_w} distillation is IPO, and Theorem 1 generalises it.

    The losses are the same times β². But that r is a function of the pair: it is no r(x, y) where a completion wins one
    pair and loses another. On y_1 ≺ y_2 ≺ y_3, y_1 ≺ y_3 no r(x, y) has all gaps 1, so that Theorem 1 does not apply,
    and the loss keeps 1/9.
    """
    beta = 0.3
    logps = random_policies(1000, 2, seed=0)
    ref_logps = random_policies(1000, 2, seed=1)
    wins = vector(1, 0).expand(1000, 2)
    distillation = distill_loss(logps, ref_logps, wins, beta)
    differences = distillation - beta**2 * ipo_loss(logps, ref_logps, beta / 2)
    yield instead(vanishes("gap 1: loss less β² times IPO's with the target gap 1/β", differences))

    uniform = uniform_logps(3)
    closure = chain(3, closed=True)
    unit_rewards = vector(1, 0).expand(3, 2)

    def losses(policy_logps: Tensor) -> Tensor:
        return distill_loss(policy_logps[closure], uniform[closure], unit_rewards, 1.0)

    optimum = fit_policy(losses, vector(1 / 3), uniform)
    yield same_value("closed chain, least loss", 0, optimum.loss)
    yield given(same_value("the same by hand, ((1/3)² + (1/3)² + (1/3)²)/3", 1 / 9, optimum.loss))


@DISTILLATION.claim("T14", "§3.1")
def distillation_avoids_the_degenerate_optimum() -> Iterator[Finding]:
    """A reward model is finite, so distilling it avoids the degenerate optima of DPO on the same disjoint pairs."""
    rewards = normal(12, seed=1)
    ref_logps = random_policies(1, 12, seed=0)[0]
    errors = []
    probabilities = []
    for beta in (0.1, 1.0, 10.0):
        optimum = distil(rewards, ref_logps, DISJOINT, vector(1, 1, 1, 1), beta, ref_logps)
        margins = beta * disjoint_margins(optimum.parameters, ref_logps)
        errors.append(margins - gaps_of(rewards, DISJOINT))
        probabilities.append(float(optimum.policy.min()))

    yield vanishes("β from .1 to 10, β h of the optimum less Δr", torch.stack(errors), 1e-8)
    yield above("smallest probability of an arm", 0, vector(*probabilities))


# ---------------------------------------------------------------- Section 3.2: pessimism

PESSIMISM = PAPER.section("Pessimism over reward models")
CONFLICT = matrix([(1, -1, 0), (-1, 1, 0)])  # two reward models for which Theorem 2 fails
UNEVEN = matrix([(1, -1, 0), (-0.5, 1.2, 0.3)])  # two without that symmetry
UNEVEN_REF = vector(0.5, 0.3, 0.2).log()
BALL_REF = vector(0.5, 0.3, 0.2).log()
BALL_REWARDS = vector(1, -0.5, 0.2)
THREE_ARM_PAIRS = ordered_pairs(3)
EVEN = vector(1, 1, 1, 1, 1, 1) / 6  # weights of these pairs
BALL_MATRIX = gap_matrix(THREE_ARM_PAIRS, EVEN, 3)
BETA = 0.7  # of the two settings above


@PESSIMISM.claim("T15", "Eq 8")
def a_single_reward_is_the_usual_objective() -> Iterator[Finding]:
    """With S = {r*} the pessimistic objective is Eq 1, up to a number that no policy changes."""
    logps = random_policies(1000, 5, seed=4)
    scores = pessimistic_score(logps, REF_LOGPS, REWARDS[None], BETA)
    constants = objective(logps, REF_LOGPS, REWARDS, BETA) - scores
    yield vanishes("Eq 1 less Eq 8 less E_ref[r], 1,000 random policies", constants - REF_LOGPS.exp() @ REWARDS)


def ball_optimum(size: float) -> Optimum:
    """The policy that maximises Eq 8 over the ball of that size, from the optimal policy of its centre."""
    ball = Ball(BALL_REWARDS, BALL_MATRIX, size)

    def loss(logits: Tensor) -> Tensor:
        return -ball.score(logits.log_softmax(0), BALL_REF, BETA)

    return minimise(loss, tilted(BALL_REF, BALL_REWARDS, BETA))


@functools.cache
def ball_distances() -> tuple[list[float], list[float]]:
    """Shares of the ball's size λ at which it contains a constant reward, and the optimum's distance to π_ref there."""
    limit = float(BALL_REWARDS @ BALL_MATRIX @ BALL_REWARDS)
    shares = [0.0001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.99]
    distances = []
    for share in shares:
        optimum = ball_optimum(share * limit)
        distances.append(total_variation(optimum.policy, BALL_REF.exp()))
    return shares, distances


@PESSIMISM.claim("T16", "§3.2")
def a_rich_set_forces_the_reference() -> Iterator[Finding]:
    """If S is too rich, the policy that maximises Eq 8 is forced to be nearly π_ref.

    S is a ball around r of a growing size λ. From λ = E (Δr)² on it contains a constant reward, and π_ref is optimal.
    """
    _, distances = ball_distances()
    steps = vector(*distances).diff()
    yield below("largest change of the distance to π_ref as the ball grows", 0, steps)
    yield below("distance to π_ref at .99 of the limit", 0.01, distances[-1])

    limit = float(BALL_REWARDS @ BALL_MATRIX @ BALL_REWARDS)
    ball = Ball(BALL_REWARDS, BALL_MATRIX, limit)
    logps = random_policies(100_000, 3, seed=5)
    scores = ball.score(logps, BALL_REF, BETA)
    yield below("at the limit, best of 100,000 policies on Eq 8 (π_ref has 0)", 0, scores)


class RewardSet(NamedTuple):
    """Three reward models of four arms, a reference, and the reward of the hull with the least divergence."""

    ref_logps: Tensor
    rewards: Tensor  # (3, 4)
    best: HullPoint
    logps: Tensor  # of its optimal policy


@functools.cache
def random_sets() -> list[RewardSet]:
    sets = []
    for ref_logits, *models in normal(5, 4, 4, seed=0):
        ref_logps = ref_logits.log_softmax(0)
        rewards = torch.stack(models)
        best = least_divergent(ref_logps, rewards, BETA)
        sets.append(RewardSet(ref_logps, rewards, best, tilted(ref_logps, best.rewards, BETA)))
    return sets


@PESSIMISM.claim("T17", "§3.2")
def pessimism_keeps_an_advantage() -> Iterator[Finding]:
    """The policy that maximises Eq 8 has an advantage over π_ref under every reward model of S, also under a good one.

    The advantage need not be large: for r = ±(1, -1, 0) it is 0, and the optimum is π_ref.
    """
    values = []
    for s in random_sets():
        values.append(advantages(s.logps, s.ref_logps, s.rewards))
    yield above("smallest advantage, 5 random sets of 3 reward models", -1e-10, torch.stack(values))

    reference = uniform_logps(3)
    best = least_divergent(reference, CONFLICT, 1.0)
    logps = tilted(reference, best.rewards, 1.0)
    yield given(vanishes("largest advantage for r = ±(1, -1, 0)", advantages(logps, reference, CONFLICT)))


@functools.cache
def members(kind: str) -> tuple[Tensor, Tensor]:
    """Log-probs of the members of P_β(S), reached by distillation, and their scores of Eq 8."""
    rewards, ref_logps, beta = {
        "conflict": (CONFLICT, uniform_logps(3), 1.0),
        "uneven": (UNEVEN, UNEVEN_REF, BETA),
    }[kind]
    weights = torch.ones(6, dtype=torch.float64)
    policies = []
    for target in rewards:
        optimum = distil(target, ref_logps, THREE_ARM_PAIRS, weights, beta, ref_logps)
        policies.append(optimum.policy)
    logps = torch.stack(policies).log()
    return logps, pessimistic_score(logps, ref_logps, rewards, beta)


def conflict_score() -> float:
    """Eq 8 at both members of P_β(S) for CONFLICT, in closed form: log Z - 2 E_π[r], as E_π[r] - KL = log Z."""
    sum_of_exponentials = 1 + 2 * math.cosh(1)
    advantage = 2 * math.sinh(1) / sum_of_exponentials
    return math.log(sum_of_exponentials / 3) - 2 * advantage


@PESSIMISM.claim("T18", "Theorem 2, Eqs 23-28", expected=Verdict.FALSE)
def theorem_2_as_printed() -> Iterator[Finding]:
    """The member of P_β(S) with the least forward KL to π_ref maximises the pessimistic objective, Eq 8.

    Not for r = ±(1, -1, 0), β = 1 and a uniform π_ref: π_ref is better than both members. A.4 exchanges max and min,
    which needs a convex set of rewards; the objective is concave in π, not convex.
    """
    _, scores = members("conflict")
    best = float(scores.max())
    yield above("Eq 8 at the better member, π_ref having 0", 0, best)

    yield given(same_value("the same in closed form", conflict_score(), best))
    yield given(same_digits("both members", "-.841, -.841", *scores.tolist()))


@functools.cache
def uneven_optimum() -> tuple[Tensor, float]:
    """The policy that maximises Eq 8 for UNEVEN, and its value, without any hull.

    Both of its members lose where the other one gains, so both are equal at the optimum. That leaves a line of policies
    through π_ref, along which Newton's method maximises.
    """
    gap = UNEVEN[0] - UNEVEN[1]
    direction = torch.linalg.cross(gap, torch.ones_like(gap))
    reference = UNEVEN_REF.exp()

    def loss(step: Tensor) -> Tensor:
        logps = (reference + step[0] * direction).log()
        return -(objective(logps, UNEVEN_REF, UNEVEN[0], BETA) - reference @ UNEVEN[0])

    optimum = minimise(loss, vector(0))
    return reference + optimum.parameters[0] * direction, -optimum.loss


@PESSIMISM.claim("T19", "Theorem 2", expected=Verdict.CORRECTED)
def theorem_2_with_the_convex_hull() -> Iterator[Finding]:
    """Theorem 2 gives the maximum of Eq 8 as the least β KL(π_ref ‖ π_r) over the reward models r of S.

    It is right for the convex hull of S: with r̄ of the hull, π_r̄ maximises Eq 8. S = {(1, -1, 0), (-.5, 1.2, .3)},
    β = .7, π_ref = (.5, .3, .2). By Eq 29 β KL(π_ref ‖ π_r̄) is never less than the maximum, and π_r̄ attains it.
    """
    best = least_divergent(UNEVEN_REF, UNEVEN, BETA)
    logps = tilted(UNEVEN_REF, best.rewards, BETA)
    policy, maximum = uneven_optimum()
    _, scores = members("uneven")
    yield same_value("Eq 8 at the better member of P_β(S), against the maximum", maximum, float(scores.max()))
    yield given(same_digits("Eq 8 at both members", "-.804, -1.171", *scores.tolist()))
    yield instead(vanishes("distance of π_r̄ to the maximiser of Eq 8", total_variation(logps.exp(), policy), 1e-8))
    yield instead(
        same_digits("weight of the first, and π_r̄", ".4588, .5031, .3029, .1940", best.weights[0], *logps.exp())
    )

    gaps = []
    for s in random_sets():
        score = pessimistic_score(s.logps, s.ref_logps, s.rewards, BETA)
        gaps.append(float(score) - BETA * s.best.divergence)
    yield instead(vanishes("5 random sets: Eq 8 at π_r̄ less β KL(π_ref ‖ π_r̄)", vector(*gaps), 1e-8))


@PESSIMISM.claim("T20", "Eq 29")
def the_value_of_a_policy_is_its_forward_kl() -> Iterator[Finding]:
    """For the optimal policy π_r of any r, E_π_r[r] - E_ref[r] - β KL(π_r ‖ π_ref) = β KL(π_ref ‖ π_r)."""
    rewards = 3 * normal(1000, 5, seed=2)
    logps = tilted(REF_LOGPS, rewards, BETA)
    values = objective(logps, REF_LOGPS, rewards, BETA) - rewards @ REF_LOGPS.exp()
    yield vanishes("difference, 1,000 random rewards", values - BETA * forward_kls(REF_LOGPS, rewards, BETA))


@PESSIMISM.claim("T21", "footnote 1")
def forward_and_reverse_kl_differ() -> Iterator[Finding]:
    """The forward KL of Eq 9 is not the reverse KL of Eq 8: they may choose different members of P_β(S).

    Uniform π_ref, β = 1: r_1 = (1.7, 0, 0) has the smaller forward KL, r_2 = (-2.1, 0, 0) the smaller reverse KL.
    """
    reference = uniform_logps(3)
    rewards = matrix([(1.7, 0, 0), (-2.1, 0, 0)])
    logps = tilted(reference, rewards, 1.0)
    yield same_digits("KL(π_ref ‖ π_r), of r_1 and r_2", ".346, .354", *kl(reference, logps))
    yield same_digits("KL(π_r ‖ π_ref), of r_1 and r_2", ".332, .225", *kl(logps, reference))


def two_arms(margins: Tensor) -> Tensor:
    """Log-probs of two arms with log π(y_w) - log π(y_l) = margins: (..., 2)."""
    logits = torch.stack([margins, torch.zeros_like(margins)], -1)
    return logits.log_softmax(-1)


FIGURE_1 = vector(0.5, 1.0, 2.0, 4.0)  # reward gaps of four reward models


@PESSIMISM.claim("T52", "Fig. 1")
def figure_1_is_right_on_two_arms() -> Iterator[Finding]:
    """On two arms with an even π_SFT, of the policies that prefer y_w the one of least forward KL maximises Eq 8.

    There a reward is one number, the gap. So Theorem 2 holds as printed if all gaps of S have the same sign. If they
    have both signs, π_SFT is the maximiser.
    """
    rewards = torch.stack([FIGURE_1, vector(0, 0, 0, 0)], 1)
    reference = uniform_logps(2)
    margins = grid(-8, 8, 160_001)
    scores = pessimistic_score(two_arms(margins), reference, rewards, 1.0)
    least_divergent_gap = float(FIGURE_1[forward_kls(reference, rewards, 1.0).argmin()])
    yield same_value(
        "gap of the best policy in steps of 1e-4, gaps .5, 1, 2, 4",
        least_divergent_gap,
        float(margins[scores.argmax()]),
        1e-4,
    )

    rewards[0, 0] = -0.5
    both_signs = pessimistic_score(two_arms(margins), reference, rewards, 1.0)
    yield instead(vanishes("the same with gaps -.5, 1, 2, 4", float(margins[both_signs.argmax()])))


# ---------------------------------------------------------------- Section 3.2.1: what is optimised

OPTIMISATION = PAPER.section("Pessimistic distillation: what is optimised")


def eq_11(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float, gamma: float) -> Tensor:
    """Eq 11 on all pairs of a prompt with the exact KL(π_ref ‖ π): log π (arms,), rewards (models, arms)."""
    pairs = ordered_pairs(len(logps))
    losses = ensemble_losses(logps[pairs], ref_logps[pairs], rewards.T[pairs], beta)  # (pairs, models)
    means = losses.mean(0)
    return means.min() + gamma * kl(ref_logps, logps)


def minimise_eq_11(ref_logps: Tensor, rewards: Tensor, beta: float, gamma: float, start: Tensor) -> Optimum:
    """A minimum of Eq 11 near `start`. Each reward model may have one."""

    def loss(logits: Tensor) -> Tensor:
        return eq_11(logits.log_softmax(0), ref_logps, rewards, beta, gamma)

    return minimise(loss, start)


@OPTIMISATION.claim("T22", "Eqs 10, 11, §4.1", expected=Verdict.CORRECTED)
def gamma_is_beta_over_alpha() -> Iterator[Finding]:
    """Divided by α, the penalised objective of Eq 10 is Eq 11, with the γ that §4.1 gives as α/β.

    γ is β/α, as below Eq 11.
    """
    alpha = 20.0
    with_printed = []
    with_right = []
    for logps in random_policies(100, 3, seed=6):
        distillation = eq_11(logps, UNEVEN_REF, UNEVEN, BETA, 0)
        divided = BETA * kl(UNEVEN_REF, logps) / alpha + distillation
        printed = eq_11(logps, UNEVEN_REF, UNEVEN, BETA, alpha / BETA)
        right = eq_11(logps, UNEVEN_REF, UNEVEN, BETA, BETA / alpha)
        with_printed.append(float(divided - printed))
        with_right.append(float(divided - right))

    yield vanishes("Eq 10 over α less Eq 11 with γ = α/β, 100 random policies", vector(*with_printed))
    yield instead(vanishes("the same with γ = β/α", vector(*with_right)))


class RandomPairs(NamedTuple):
    """Eight pairs with the rewards of three reward models."""

    logps: Tensor  # (8, 2)
    rewards: Tensor  # (8, 2, 3)
    gaps: Tensor  # (8, 3), Δr


def eight_pairs() -> RandomPairs:
    logps = -20 + 5 * normal(8, 2, seed=1)
    rewards = normal(8, 2, 3, seed=2)
    return RandomPairs(logps, rewards, rewards[:, 0] - rewards[:, 1])


def batch_loss(pairs: RandomPairs, ref_logps: Tensor, beta: float, gamma: float) -> float:
    """The mean loss of e-DPO on a batch, with Ω on the pairs."""
    best = ensemble_losses(pairs.logps, ref_logps, pairs.rewards, beta).mean(0).min()
    losses = pessimistic_loss(best.expand(8), pairs.logps, gamma)
    return float(losses.mean())


@OPTIMISATION.claim("T23", "Eq 11, footnote 2")
def the_minimum_is_over_means_of_the_batch() -> Iterator[Finding]:
    """The pessimistic loss of a batch is the least mean distillation loss of a reward model, plus γ Ω.

    Runs of algos/ensemble_dpo.py are compared with loops in tests/test_exactness_family.py.
    """
    pairs = eight_pairs()
    ref_logps = pairs.logps.flip(0) + 1.0
    sums = [0.0, 0.0, 0.0]
    omega = 0.0
    for i, model in itertools.product(range(8), range(3)):
        first_ratio = pairs.logps[i, 0] - ref_logps[i, 0]
        second_ratio = pairs.logps[i, 1] - ref_logps[i, 1]
        margin = 0.1 * (first_ratio - second_ratio)
        sums[model] += float((pairs.gaps[i, model] - margin) ** 2)
    for winner, loser in pairs.logps.tolist():
        omega -= winner + loser

    expected = min(sums) / 8 + 0.01 * omega / 8
    measured = batch_loss(pairs, ref_logps, 0.1, 0.01)
    yield same_value("eight random pairs, three reward models", expected, measured, 1e-12)


@OPTIMISATION.claim("T51", "Eqs 7, 11")
def losses_at_the_reference() -> Iterator[Finding]:
    """At π_θ = π_ref, where training starts, d-DPO's loss is the mean of (Δr)². e-DPO's is the least such mean of a
    reward model, plus γ Ω."""
    pairs = eight_pairs()
    squares = pairs.gaps**2
    means = squares.mean(0)
    first_model = distill_loss(pairs.logps, pairs.logps, pairs.rewards[..., 0], 0.1)
    yield same_value("d-DPO", float(means[0]), float(first_model.mean()), 1e-12)

    omega = -pairs.logps.sum(1).mean()
    expected = float(means.min() + 0.01 * omega)
    measured = batch_loss(pairs, pairs.logps, 0.1, 0.01)
    yield same_value("e-DPO, three models, γ = .01", expected, measured, 1e-12)


PROMPTS = matrix(  # rewards of two prompts by two models, (prompts, models, arms)
    [
        ((1, 0, -1), (-2, 1, 1)),
        ((2, -1, -1), (-1, 0.5, 0.5)),
    ]
)


def prompt_losses(logits: Tensor) -> Tensor:
    """The distillation loss of each prompt and model, (prompts, models), with β = 1 and a uniform π_ref."""
    pairs = THREE_ARM_PAIRS
    ref_pairs = uniform_logps(3)[pairs]
    losses = []
    policies = logits.view(2, 3).log_softmax(1)
    for logps, rewards in zip(policies, PROMPTS, strict=True):
        pair_losses = ensemble_losses(logps[pairs], ref_pairs, rewards.T[pairs], 1.0)
        losses.append(pair_losses.mean(0))
    return torch.stack(losses)


START = vector(0, 0, 0, 0, 0, 0)  # logits of π_ref on both prompts


def expected_minimum(logits: Tensor, batch_size: int) -> Tensor:
    """The mean over all batches of prompts of the least batch mean: footnote 2's loss without Ω."""
    losses = prompt_losses(logits)
    minima = []
    for batch in itertools.product(range(2), repeat=batch_size):
        minima.append(losses[list(batch)].mean(0).min())
    return torch.stack(minima).mean()


@OPTIMISATION.claim("T24", "footnote 2")
def the_minimum_per_batch_is_another_objective() -> Iterator[Finding]:
    """With the minimum taken per mini-batch (footnote 2), the expected loss is at most that of Eq 11, and its optimum
    need not be a member of P_β(S).

    Two prompts with two reward models, of which the first is closer to π_ref on one prompt, the second on the other.
    With one prompt a batch, descent follows the first on one and the second on the other. With all, it follows one.
    """

    def per_prompt(logits: Tensor) -> Tensor:
        return expected_minimum(logits, 1)

    def on_all(logits: Tensor) -> Tensor:
        return prompt_losses(logits).mean(0).min()

    end = descend(per_prompt, START, 0.5, 40)[-1]
    nearest = on_all(end)
    yield vanishes("one prompt a batch: expected loss at the end", per_prompt(end), 1e-12)
    yield above("there, loss of the nearest member of P_β(S)", 1, nearest)

    by_size = [expected_minimum(end, size) for size in (1, 2, 4)]
    growths = torch.stack([*by_size, nearest]).diff()
    yield above("there, least growth of the expected loss over batches of 1, 2, 4 and all", 0, growths)

    end_on_all = descend(on_all, START, 0.5, 40)[-1]
    yield vanishes("all prompts: loss of the nearest member at the end", on_all(end_on_all), 1e-12)


@functools.cache
def distilled_pessimistically(gamma: float) -> tuple[Tensor, float]:
    """Log-probs of pd-DPO's optimum on the setting of BALL_REF, and λ, its distillation loss."""
    optimum = minimise_eq_11(BALL_REF, BALL_REWARDS[None], BETA, gamma, BALL_REF)
    logps = optimum.policy.log()
    return logps, float(eq_11(logps, BALL_REF, BALL_REWARDS[None], BETA, 0))


@OPTIMISATION.claim("T25", "Prop. 2, Eqs 12, 30, 31")
def pd_dpo_is_nearest_to_the_reference() -> Iterator[Finding]:
    """With one reward model, the minimiser of Eq 11 has the least forward KL to π_ref of all policies whose reward is
    in S_γ (Eq 12), λ being its distillation loss.

    π_ref = (.5, .3, .2), r = (1, -.5, .2), β = .7, γ = .5, all pairs. The least KL is looked for on 100,000 points of
    the boundary of S_γ, an ellipse. It is there, because the constant rewards, which have the KL 0, are outside.
    """
    logps, size = distilled_pessimistically(0.5)
    yield given(same_digits("policy", ".80202, .07391, .12407", *logps.exp()))
    yield given(same_digits("λ", ".018890", size))

    rewards = Ball(BALL_REWARDS, BALL_MATRIX, size).boundary(100_000)
    divergences = forward_kls(BALL_REF, rewards, BETA)
    nearest = tilted(BALL_REF, rewards[divergences.argmin()], BETA)
    yield vanishes("its distance to the nearest one of S_γ", total_variation(nearest.exp(), logps.exp()), 1e-4)
    yield vanishes("the KL of that less its own", float(divergences.min() - kl(BALL_REF, logps)), 1e-8)


@OPTIMISATION.claim("T26", "after Prop. 2")
def pd_dpo_with_one_model_is_pessimistic() -> Iterator[Finding]:
    """With a single reward model, minimising Eq 11 maximises the pessimistic objective, Eq 8, over all r of S_γ.

    S_γ is a ball, hence convex, and Theorem 2 holds for it. The maximum of Eq 8 is found by Newton's method on the
    closed form of its inner minimum. The setting is that of T25.
    """
    reference = BALL_REF
    distances = []
    for gamma in (0.05, 0.5, 5.0):
        logps, size = distilled_pessimistically(gamma)
        distances.append(total_variation(ball_optimum(size).policy, logps.exp()))
    yield vanishes("γ from .05 to 5, distance of both optima", max(distances), 1e-7)

    logps, size = distilled_pessimistically(0.5)
    ball = Ball(BALL_REWARDS, BALL_MATRIX, size)
    yield same_digits("Eq 8 at pd-DPO's optimum, γ = .5", ".195653", float(ball.score(logps, reference, BETA)))
    by_points = pessimistic_score(logps, reference, ball.boundary(100_000), BETA)
    yield same_value(
        "the same on 100,000 points of the boundary", float(ball.score(logps, reference, BETA)), float(by_points), 1e-7
    )


@OPTIMISATION.claim("L1", "Prop. 2", expected=Verdict.FALSE)
def pd_dpo_with_two_models_is_not() -> Iterator[Finding]:
    """With several reward models, minimising Eq 11 maximises the pessimistic objective over all r of S_γ.

    Proposition 2 itself holds. But S_γ is then a union of balls, which is not convex, and Theorem 2 fails for it: for
    r = ±(1, -1, 0), β = 1, a uniform π_ref and γ = 1e-4, π_ref is better.
    """
    reference = uniform_logps(3)
    start = tilted(reference, CONFLICT[0], 1.0)
    logps = minimise_eq_11(reference, CONFLICT, 1.0, 1e-4, start).policy.log()
    size = float(eq_11(logps, reference, CONFLICT, 1.0, 0))
    scores = []
    for rewards in CONFLICT:
        ball = Ball(rewards, BALL_MATRIX, size)
        scores.append(ball.score(logps, reference, 1.0))

    worst = float(min(scores))
    yield above("Eq 8 over S_γ at the minimiser, π_ref having 0", 0, worst)
    yield given(same_value("the same for γ → 0, in closed form", conflict_score(), worst, 1e-3))


def chosen_models(path: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float, weights: Tensor) -> Tensor:
    """The model of least loss at each point of a path of logits: (points,)."""
    pairs = ordered_pairs(len(ref_logps))
    chosen = []
    for logits in path:
        logps = logits.log_softmax(0)
        losses = ensemble_losses(logps[pairs], ref_logps[pairs], rewards.T[pairs], beta)
        chosen.append((weights @ losses).argmin())
    return torch.stack(chosen)


def descend_ensemble(ref_logps: Tensor, rewards: Tensor, beta: float, weights: Tensor, num_steps: int) -> Tensor:
    """Gradient descent on e-DPO's loss without Ω, from π_ref on, with weighted pairs: logits (num_steps + 1, arms)."""
    pairs = ordered_pairs(len(ref_logps))

    def loss(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        losses = ensemble_losses(logps[pairs], ref_logps[pairs], rewards.T[pairs], beta)
        return (weights @ losses).min()

    return descend(loss, ref_logps, 0.1 / beta**2, num_steps)


def mean_squared_gaps(rewards: Tensor) -> Tensor:
    """E (Δr)² over all pairs of three arms, of the rewards (models, 3): (models,)."""
    products = (rewards @ BALL_MATRIX) * rewards
    return products.sum(1)


@OPTIMISATION.claim("T49", "§4.1, footnote 2")
def e_dpo_chooses_the_smallest_gaps() -> Iterator[Finding]:
    """From π_ref on, e-DPO distils the reward model with the least mean squared gap E (Δr)², and without Ω never leaves
    it, if all pairs have the same weight. So the choice depends on the scale of the rewards.

    Derived here: on the straight way to π_r the other's loss stays larger. With unequal weights the way is curved.
    """
    is_least = []
    for rewards in normal(6, 3, 3, seed=4):
        path = descend_ensemble(UNEVEN_REF, rewards, BETA, EVEN, 40)
        chosen = chosen_models(path, UNEVEN_REF, rewards, BETA, EVEN)
        is_least.append(chosen == mean_squared_gaps(rewards).argmin())
    share = float(torch.cat(is_least).double().mean())
    yield same_value("share of steps that distil the model of least E (Δr)², 6 random sets of 3", 1, share)

    scaled = torch.stack([0.1 * UNEVEN[0], UNEVEN[1]])
    choices = []
    for rewards in (UNEVEN, scaled):
        choices.append(int(chosen_models(UNEVEN_REF[None], UNEVEN_REF, rewards, BETA, EVEN)))
    yield same_digits("model chosen, and with the first one's rewards times .1", "1, 0", *choices)

    has_third_arm = (THREE_ARM_PAIRS == 2).any(1)
    uneven = torch.where(has_third_arm, vector(0.025), vector(0.45))
    crossing = matrix([(4, 2, -6), (3, -1, -2)])
    path = descend_ensemble(UNEVEN_REF, crossing, 1.0, uneven, 80)
    models = chosen_models(path, UNEVEN_REF, crossing, 1.0, uneven)
    statement = "unequal weights: first and last model, r = (4, 2, -6), (3, -1, -2)"
    yield same_digits(statement, "0, 1", models[0], models[-1])


@OPTIMISATION.claim("T50", "Eqs 9-11", expected=Verdict.CORRECTED)
def e_dpo_need_not_solve_eq_9() -> Iterator[Finding]:
    """Eq 9 can be solved by minimising its relaxation, Eq 11: the policy of P_β(S) with the least forward KL comes out.

    It is Eq 11's global minimum. But descent from π_ref ends at the model of least E (Δr)²: uniform π_ref, β = 1,
    S = {(2, 0, 0), (-2.1, 0, 0)}, where Eq 9 wants the second.
    """
    reference = uniform_logps(3)
    rewards = matrix([(2, 0, 0), (-2.1, 0, 0)])
    end = descend_ensemble(reference, rewards, 1.0, EVEN, 100)[-1].log_softmax(0)
    divergences = forward_kls(reference, rewards, 1.0)
    least = float(divergences.min())
    reached = float(kl(reference, end))
    yield same_value("KL(π_ref ‖ π) where descent ends, against the least of P_β(S)", least, reached, 1e-6)
    by_hand = []
    for reward in (2, -2.1):
        log_z = math.log((math.exp(reward) + 2) / 3)
        by_hand.append(log_z - reward / 3)
    yield given(same_digits("KL of both members, log((exp a + 2)/3) - a/3", ".474, .354", *by_hand))
    yield given(same_digits("their E (Δr)²", "2.667, 2.940", *mean_squared_gaps(rewards)))

    minima = []
    for start in tilted(reference, rewards, 1.0):
        minima.append(minimise_eq_11(reference, rewards, 1.0, 0.01, start).loss)
    difference = minima[0] - minima[1]
    yield instead(above("Eq 11 with γ = .01: minimum at the first less that at the second", 0, difference))


# ---------------------------------------------------------------- Section 3.3: pessimistic DPO

PESSIMISTIC_DPO = PAPER.section("Pessimistic DPO")
LABELS = torch.tensor([(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)])
LABEL_WEIGHTS = vector(0.25, 0.08, 0.2, 0.14, 0.28, 0.05)  # how often each pair occurs in that order


def mean_dpo_loss(logps: Tensor) -> Tensor:
    """DPO's loss on LABELS, with BALL_REF and β = .7: log π (..., 3) → (...)."""
    pair_logps = logps[..., LABELS].reshape(-1, 2)
    num_policies = len(pair_logps) // len(LABELS)
    pair_ref_logps = BALL_REF[LABELS].repeat(num_policies, 1)
    losses = dpo_loss(pair_logps, pair_ref_logps, BETA)
    return losses.view(*logps.shape[:-1], 6) @ LABEL_WEIGHTS


def exact_pdpo(gamma: float) -> Tensor:
    """Log-probs of the minimiser of Eq 13 on LABELS, with the exact KL."""

    def loss(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        return mean_dpo_loss(logps) + gamma * kl(BALL_REF, logps)

    return minimise(loss, BALL_REF).policy.log()


def level_set_boundary(level: float, count: int) -> Tensor:
    """Rewards of zero sum where DPO's loss is at `level`, (count, 3): a curve around DPO's optimum."""
    centre = BETA * (exact_pdpo(0) - BALL_REF)
    directions = plane_directions(count)
    inside = torch.zeros(count, 1, dtype=torch.float64)
    outside = torch.full_like(inside, 20)
    for _ in range(60):
        lengths = (inside + outside) / 2
        losses = mean_dpo_loss(tilted(BALL_REF, centre + lengths * directions, BETA))
        is_inside = losses[:, None] <= level
        inside = torch.where(is_inside, lengths, inside)
        outside = torch.where(is_inside, outside, lengths)
    return centre + inside * directions


@PESSIMISTIC_DPO.claim("T27", "Eqs 13, 14")
def p_dpo_is_pessimistic() -> Iterator[Finding]:
    """p-DPO with the exact KL maximises Eq 8 over all rewards whose DPO loss is within λ of the least one, Eq 14.

    DPO's loss is convex in r, so the set is convex and Theorem 2 holds for it. Eq 8 is taken on 5,000 points of the
    boundary of the set: three arms, noisy labels on all pairs, β = .7.
    """
    excesses = []
    errors = []
    random = random_policies(1000, 3, seed=8)
    for gamma in (0.02, 0.1):
        logps = exact_pdpo(gamma)
        rewards = level_set_boundary(float(mean_dpo_loss(logps)), 5000)
        score = float(pessimistic_score(logps, BALL_REF, rewards, BETA))
        errors.append(score - BETA * float(kl(BALL_REF, logps)))

        noise = random - random.mean(1, keepdim=True)
        near = (logps + 0.3 * noise).log_softmax(1)
        others = pessimistic_score(torch.cat([random, near]), BALL_REF, rewards, BETA)
        excesses.append(float(others.max()) - score)

    yield vanishes("γ = .02, .1: Eq 8 at p-DPO's optimum less β KL(π_ref ‖ π)", vector(*errors), 1e-6)
    yield below("best of 2,000 other policies less that, half of them near", 0, vector(*excesses))


def exact_pdpo_policy(pairs: Tensor, num_arms: int, beta: float, alpha: float) -> Tensor:
    """p-DPO's optimum over the probabilities of all arms, with a uniform π_ref and the exact KL(π_ref ‖ π)."""
    ref_logps = uniform_logps(num_arms)

    def losses(logps: Tensor) -> Tensor:
        return dpo_loss(logps[pairs], ref_logps[pairs], beta) + beta / alpha * kl(ref_logps, logps)

    return fit_policy(losses, vector(1 / len(pairs)), ref_logps).policy


@PESSIMISTIC_DPO.claim("T28", "§3.3")
def dpo_gains_little_from_large_rewards() -> Iterator[Finding]:
    """Past a certain point DPO's loss hardly falls while the reward grows without bound. With γ > 0 finite rewards are
    preferred.

    One pair, two arms, uniform π_ref, β = 1: with the exact KL, p-DPO's optimum is h = log(1 + 2/γ).
    """
    reference = uniform_logps(2)
    losses = dpo_loss(two_arms(vector(10, 100)), reference.expand(2, 2), 1.0)
    yield same_value(
        "what DPO's loss gains from β h = 10 to 100, log(1 + exp(-10))",
        math.log1p(math.exp(-10)),
        float(losses[0] - losses[1]),
        1e-12,
    )

    errors = []
    for gamma in (0.1, 1e-2, 1e-4):
        optimum = exact_pdpo_policy(ONE_PAIR, 2, 1.0, 1 / gamma)
        margin = float((optimum[0] / optimum[1]).log())
        errors.append(margin - math.log(1 + 2 / gamma))
    yield vanishes("γ from .1 to 1e-4, h of p-DPO's optimum less log(1 + 2/γ)", vector(*errors), 1e-7)


def pdpo_loss(logps: Tensor, ref_logps: Tensor, beta: float, alpha: float) -> Tensor:
    """Eq 13 with γ = β/α and Ω on the pairs themselves. logps, ref_logps (B, 2) → (B,)."""
    losses = dpo_loss(logps, ref_logps, beta)
    return pessimistic_loss(losses, logps, beta / alpha)


@PESSIMISTIC_DPO.claim("T29", "Eq 13")
def p_dpo_adds_gamma_omega() -> Iterator[Finding]:
    """p-DPO's loss on a pair is DPO's plus γ Ω, with Ω = -(log π(y_w) + log π(y_l)); so is its gradient.

    The course of γ over a run is compared with a loop in tests/test_exactness_family.py.
    """
    beta = 0.3
    gamma = 0.02
    logps = random_policies(1000, 3, seed=0)[:, :2]
    ref_logps = random_policies(1000, 3, seed=1)[:, :2]
    log_ratios = logps - ref_logps
    h = log_ratios[:, 0] - log_ratios[:, 1]
    wrongs = torch.sigmoid(-beta * h)

    def losses(pair_logps: Tensor) -> Tensor:
        return pdpo_loss(pair_logps, ref_logps, beta, beta / gamma)

    omegas = -(logps[:, 0] + logps[:, 1])
    by_hand = gamma * omegas - torch.log1p(-wrongs)
    gradient = torch.func.grad(lambda x: losses(x).sum())(logps)
    gradient_by_hand = torch.stack([-beta * wrongs, beta * wrongs], 1) - gamma
    yield vanishes("loss less log(1 + exp(-βh)) + γ Ω, 1,000 pairs", losses(logps) - by_hand)
    yield vanishes("gradient less (-β p - γ, β p - γ), p = σ(-βh)", gradient - gradient_by_hand)


@PESSIMISTIC_DPO.claim("T30", "§5", expected=Verdict.CORRECTED)
def omega_estimates_twice_the_cross_entropy() -> Iterator[Finding]:
    """If both completions of the pairs are drawn from π_ref, Ω = -(log π(y_w) + log π(y_l)) is a finite-sample
    approximation of KL(π_ref ‖ π).

    A pair's Ω has the mean 2 (KL + H(π_ref)). The entropy does not matter, but the same γ is twice as strong.
    """
    logps = tilted(REF_LOGPS, REWARDS, 1.0)
    reference = REF_LOGPS.exp()
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    weights = reference[pairs[:, 0]] * reference[pairs[:, 1]]

    def mean_omega(logits: Tensor) -> Tensor:
        policy_logps = logits.log_softmax(0)
        omegas = pessimistic_loss(torch.zeros(25), policy_logps[pairs], 1.0)
        return weights @ omegas

    def divergence(logits: Tensor) -> Tensor:
        return kl(REF_LOGPS, logits.log_softmax(0))

    omega_gradient = torch.func.grad(mean_omega)(logps)
    ratios = omega_gradient / torch.func.grad(divergence)(logps)
    yield same_value("gradient of Ω's mean over that of the KL", 1, float(ratios.mean()))
    yield instead(vanishes("that ratio less 2, in each of five logits", ratios - 2))
    from_omega = mean_omega(logps) / 2 - entropy(REF_LOGPS)
    yield instead(vanishes("Ω/2 - H(π_ref) less KL(π_ref ‖ π)", from_omega - divergence(logps)))

    generator = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(reference, 20_000, replacement=True, generator=generator)
    drawn_logps = logps[drawn].view(-1, 2)
    halves = pessimistic_loss(torch.zeros(10_000), drawn_logps, 0.5)
    estimates = halves - entropy(REF_LOGPS)
    standard_error = estimates.std() / 100
    error = float((estimates.mean() - divergence(logps)) / standard_error)
    yield instead(
        judged("the same from 10,000 drawn pairs, error in standard errors", "within 3", error, abs(error) < 3)
    )


# ---------------------------------------------------------------- Section 5: one pair

SINGLE_PAIR = PAPER.section("One pair")
PAIR_REF = vector(0.4, 0.2).log()  # π_ref of the winner and the loser; a third arm has the rest


@functools.cache
def pdpo_margin(beta: float, alpha: float) -> float:
    """β h at p-DPO's optimum over log π_θ(y_l), with π_θ(y_w) = .3 and π_θ(y_l) unbounded (Proposition 3)."""
    winner_logp = vector(0.3).log()

    def loss(loser_logp: Tensor) -> Tensor:
        logps = torch.cat([winner_logp, loser_logp])
        return pdpo_loss(logps[None], PAIR_REF[None], beta, alpha).sum()

    optimum = minimise(loss, winner_logp)
    ratios = torch.cat([winner_logp, optimum.parameters]) - PAIR_REF
    return beta * float(ratios[0] - ratios[1])


def losers(winner: float) -> Tensor:
    """Log-probs of the pair for π_θ(y_l) up to 1 - π_θ(y_w), in steps of 1e-4: (steps, 2)."""
    num_steps = round((1 - winner) * 10_000)
    loser_probabilities = torch.arange(1, num_steps + 1, dtype=torch.float64) / 10_000
    winners = torch.full_like(loser_probabilities, winner)
    return torch.stack([winners, loser_probabilities], 1).log()


def pdpo_bounded_loser(beta: float, alpha: float, winner: float) -> float:
    """The best π_θ(y_l) ≤ 1 - π_θ(y_w) of p-DPO, in steps of 1e-4, with π_θ(y_w) fixed and a uniform π_ref."""
    logps = losers(winner)
    losses = pdpo_loss(logps, uniform_logps(2).expand_as(logps), beta, alpha)
    return float(logps[losses.argmin(), 1].exp())


def pdpo_policy(pairs: Tensor, num_arms: int, beta: float, alpha: float) -> Tensor:
    """p-DPO's optimum over the probabilities of all arms jointly, with a uniform π_ref and Ω on the pairs."""
    ref_logps = uniform_logps(num_arms)

    def losses(logps: Tensor) -> Tensor:
        return pdpo_loss(logps[pairs], ref_logps[pairs], beta, alpha)

    return fit_policy(losses, vector(1 / len(pairs)), ref_logps).policy


@SINGLE_PAIR.claim("T31", "Prop. 3, Eqs 33-36")
def p_dpo_has_a_finite_optimum() -> Iterator[Finding]:
    """With π(y_w) fixed and α > 1, p-DPO's optimum over π(y_l) has β h = log(α - 1), as far as π(y_l) ≤ 1 - π(y_w).

    For α < 2 it is negative: the loser is preferred.
    """
    errors = []
    for beta, alpha in itertools.product((0.1, 1.0), (1.5, 2.0, 3.0, 10.0, 1000.0)):
        errors.append(pdpo_margin(beta, alpha) - math.log(alpha - 1))
    yield vanishes("β = .1 and 1, α from 1.5 to 1000, β h less log(α - 1)", vector(*errors), 1e-8)
    yield same_digits(
        "π(y_w) = .6, α = 1.5, uniform π_ref: π(y_l) at the bound", ".4000", pdpo_bounded_loser(1.0, 1.5, 0.6)
    )
    yield same_digits("π(y_w) = .6, α = 11: π(y_l) = .6/10", ".0600", pdpo_bounded_loser(1.0, 11.0, 0.6))


@SINGLE_PAIR.claim("T32", "Eq 32")
def small_alpha_has_no_inner_optimum() -> Iterator[Finding]:
    """The derivative over ψ_l = π(y_l)/π_ref(y_l) is β/ψ_l (ψ_l^β/(ψ_w^β + ψ_l^β) - 1/α). It has no zero for α ≤ 1, and
    y_l is pushed up to the bound."""
    beta = 0.7
    winner = torch.ones(200, dtype=torch.float64)
    psi = grid(0.05, 10, 200)
    errors = []
    for alpha in (0.5, 1.0, 3.0):

        def loss(loser: Tensor, alpha: float = alpha) -> Tensor:
            logps = torch.stack([winner, loser], 1).log()
            return pdpo_loss(logps, torch.zeros_like(logps), beta, alpha).sum()

        power = psi**beta
        formula = beta / psi * (power / (1 + power) - 1 / alpha)
        errors.append(torch.func.grad(loss)(psi) - formula)

    yield vanishes("derivative less Eq 32, ψ_w = 1, ψ_l from .05 to 10", torch.stack(errors))
    at_the_bound = [pdpo_bounded_loser(1.0, alpha, 0.6) for alpha in (0.5, 1.0)]
    yield same_digits("π(y_w) = .6, α = .5 and 1: π(y_l)", ".4, .4", *at_the_bound)


def second_derivatives(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """The second derivative of a function of one number, at each of the points."""
    second_derivative = torch.func.grad(torch.func.grad(function))
    return torch.func.vmap(second_derivative)(points)


@SINGLE_PAIR.claim("T33", "A.6", expected=Verdict.CORRECTED)
def the_loss_is_not_convex_in_psi() -> Iterator[Finding]:
    """The loss of Proposition 3 is convex in ψ_l, as both of its parts are.

    DPO's part is not, nor is the sum. Both are convex in log ψ_l, so the conclusion stands: there is no other optimum.
    """

    def loss(psi: Tensor) -> Tensor:
        logps = torch.stack([torch.zeros_like(psi), psi.log()])
        return pdpo_loss(logps[None], vector(0, 0)[None], 1.0, 3.0)[0]

    def loss_of_log(log_psi: Tensor) -> Tensor:
        return loss(log_psi.exp())

    curvature = float(second_derivatives(loss, vector(3)))
    yield above("second derivative in ψ_l at 3, β = 1, ψ_w = 1, α = 3", 0, curvature)
    yield given(same_value("the same by hand, 1/27 - 1/16", 1 / 27 - 1 / 16, curvature))
    curvatures = second_derivatives(loss_of_log, grid(-10, 10, 201))
    yield instead(above("least second derivative in log ψ_l, from -10 to 10", 0, curvatures))


@SINGLE_PAIR.claim("T34", "§5")
def p_dpo_and_ipo_share_the_optimum() -> Iterator[Finding]:
    """On one pair the unconstrained optima of p-DPO and IPO are the same for 1/τ = log(α - 1)/β.

    For α < 2 that τ is negative, which IPO does not have.
    """
    errors = []
    for beta, alpha in itertools.product((0.1, 1.0), (3.0, 10.0, 1000.0)):
        log_ratios = ipo_log_ratios(ONE_PAIR, 2, math.log(alpha - 1) / beta)
        margin = beta * float(log_ratios[0] - log_ratios[1])
        errors.append(margin - pdpo_margin(beta, alpha))
    yield vanishes("β = .1 and 1, α from 3 to 1000, β h of IPO less that of p-DPO", vector(*errors), 1e-7)


@SINGLE_PAIR.claim("T35", "§5", expected=Verdict.CORRECTED)
def a_fixed_winner_is_an_approximation() -> Iterator[Finding]:
    """Optimising the probability of the loser alone captures the behaviour of p-DPO reasonably well.

    It does for large α. Optimised jointly, two arms with β = 1 and a uniform π_ref have h = log(α + 1) in place of
    log(α - 1): for α < 2 the signs differ. And with Ω on the pair, a third arm loses all its mass.
    """
    winner, loser = pdpo_policy(ONE_PAIR, 2, 1.0, 1.5)
    jointly = float((winner / loser).log())
    alone = pdpo_margin(1.0, 1.5)
    yield above("α = 1.5: product of both optima's h", 0, alone * jointly)
    yield given(same_digits("α = 1.5: h jointly, and with the winner fixed", ".916, -.693", jointly, alone))

    errors = []
    for alpha in (10.0, 100.0, 1000.0):
        winner, loser = pdpo_policy(ONE_PAIR, 2, 1.0, alpha)
        difference = float((winner / loser).log()) - pdpo_margin(1.0, alpha)
        errors.append(difference - math.log((alpha + 1) / (alpha - 1)))
    statement = "α from 10 to 1000: difference of both less log((α + 1)/(α - 1)), which is .201 to .002"
    yield instead(vanishes(statement, vector(*errors), 1e-7))

    def loss(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        return pdpo_loss(logps[ONE_PAIR], uniform_logps(3)[ONE_PAIR], 1.0, 10.0)[0]

    logits = random_policies(100, 3, seed=9)
    third_arms = logits[:, 2].exp()
    gradients = torch.func.vmap(torch.func.grad(loss))(logits)
    yield instead(vanishes("slope of the third arm's logit less 2γ π_3, γ = .1", gradients[:, 2] - 0.2 * third_arms))


@SINGLE_PAIR.claim("T36", "Eq 13, §5")
def p_dpo_is_label_smoothing_and_likelihood() -> Iterator[Finding]:
    """With Ω on the pair, p-DPO is DPO with label smoothing ε = γ/β, plus 2γ times the negative log-likelihood of y_w.

    Derived here. It explains Proposition 3: with π(y_w) fixed the optimum is that of label smoothing, σ(βh) = 1 - γ/β.
    """
    beta = 0.3
    gamma = 0.06
    logps = random_policies(1000, 3, seed=0)[:, :2]
    ref_logps = random_policies(1000, 3, seed=1)[:, :2]
    smoothed = dpo_loss(logps, ref_logps, beta, label_smoothing=gamma / beta)
    likelihood = -2 * gamma * logps[:, 0]
    constants = gamma * (ref_logps[:, 0] - ref_logps[:, 1])
    losses = pdpo_loss(logps, ref_logps, beta, beta / gamma)
    differences = losses - smoothed - likelihood - constants
    yield vanishes("p-DPO less both, less γ log(π_ref(y_w)/π_ref(y_l)), 1,000 pairs", differences)
    confidence = 1 / (1 + math.exp(-pdpo_margin(beta, beta / gamma)))
    yield same_value("σ(βh) at the optimum of Proposition 3, against 1 - γ/β", 0.8, confidence)


@SINGLE_PAIR.claim("T37", "Prop. 4")
def d_dpo_has_a_finite_optimum() -> Iterator[Finding]:
    """With π(y_w) fixed, d-DPO's optimum over π(y_l) is π(y_w) exp((r_l - r_w)/β) π_ref(y_l)/π_ref(y_w), or 1 - π(y_w)
    if that is smaller.

    On a grid of π(y_l) with steps of 1e-4: β = .5, π_ref = (.4, .2), π(y_w) = .6.
    """
    logps = losers(0.6)
    best = []
    for gap in (1.0, -2.0):
        rewards = vector(gap, 0).expand_as(logps)
        losses = distill_loss(logps, PAIR_REF.expand_as(logps), rewards, 0.5)
        best.append(float(logps[losses.argmin(), 1].exp()))
    yield same_digits("π(y_l) for r_w - r_l = 1: .3 exp(-2), and for -2: the bound", ".0406, .4000", *best)


@SINGLE_PAIR.claim("T38", "§5")
def regularisation_avoids_degenerate_optima() -> Iterator[Finding]:
    """Distillation and pessimism both avoid DPO's degenerate optima: their ratios h are finite.

    On disjoint pairs distillation leaves the mass of each pair free. Four such pairs of eight arms, β = 1, uniform
    π_ref, α = 10, Δr = 1, IPO with 1/τ = 2. With Ω on the pairs p-DPO has h = log(α + 1) on each.
    """
    pairs = DISJOINT
    reference = uniform_logps(8)
    rewards = vector(1, 1, 1, 1, 0, 0, 0, 0)

    def pd_dpo_losses(logps: Tensor) -> Tensor:
        losses = distill_loss(logps[pairs], reference[pairs], rewards[pairs], 1.0)
        return pessimistic_loss(losses, logps[pairs], 0.1)

    def ratios(policy: Tensor) -> Tensor:
        return (policy[:4] / policy[4:]).log()

    p_dpo = pdpo_policy(pairs, 8, 1.0, 10.0)
    d_dpo = distil(rewards, reference, pairs, vector(1, 1, 1, 1), 1.0, reference).policy
    pd_dpo = fit_policy(pd_dpo_losses, vector(0.25), reference).policy
    ipo = ipo_log_ratios(pairs, 8, 2.0).softmax(0)

    yield vanishes("h of p-DPO less log 11", ratios(p_dpo) - math.log(11), 1e-8)
    yield vanishes("h of d-DPO less 1", ratios(d_dpo) - 1, 1e-8)
    yield vanishes("h of IPO less 2", ratios(ipo) - 2, 1e-8)
    yield above("pd-DPO: smallest probability of an arm", 0.01, pd_dpo)
    slope = max(dpo_slope(beta_h, 1.0) for beta_h in range(101))
    yield below("DPO: largest dL/dh for h from 0 to 100", 0, slope)


# ---------------------------------------------------------------- Section 5: a bag of words

BAG_OF_WORDS = PAPER.section("A bag of words")
EXAMPLE = matrix([(2, 1, 1, 0), (1, 1, 1, 1)])  # counts of the tokens of y_w and of y_l
SIMILAR = matrix([(2, 1, 1, 0, 0, 0), (1, 2, 1, 0, 0, 0)])
DISTINCT = matrix([(2, 0, 0, 0, 2, 0), (0, 0, 0, 2, 0, 2)])


def bag_logps(theta: Tensor, counts: Tensor) -> Tensor:
    """log π_θ(y) = c(y) · θ - n log Σ_i exp θ_i, for θ and counts (..., tokens) → (...)."""
    scores = (counts * theta).sum(-1)
    lengths = counts.sum(-1)
    return scores - lengths * theta.logsumexp(-1)


def upper_bounds(theta: Tensor, counts: Tensor) -> Tensor:
    """log π̃_θ(y) = c(y) · θ - n max_i θ_i."""
    scores = (counts * theta).sum(-1)
    lengths = counts.sum(-1)
    return scores - lengths * theta.amax(-1)


def train_bag(pairs: Tensor, beta: float, rate: float, num_steps: int) -> Tensor:
    """θ along gradient descent on DPO from θ = 0, with counts (pairs, 2, tokens): (num_steps + 1, tokens).

    π_ref is a bag of words too, with other token probabilities.
    """
    ref_theta = grid(0, 1, pairs.shape[2])
    ref_logps = bag_logps(ref_theta, pairs)

    def loss(theta: Tensor) -> Tensor:
        return dpo_loss(bag_logps(theta, pairs), ref_logps, beta).mean()

    return descend(loss, torch.zeros_like(ref_theta), rate, num_steps)


class BagRun(NamedTuple):
    """Training on one pair."""

    pair: Tensor  # counts of y_w and y_l, (2, tokens)
    path: Tensor  # θ, (steps + 1, tokens)

    @property
    def difference(self) -> Tensor:
        """Δ = c(y_w) - c(y_l)."""
        return self.pair[0] - self.pair[1]

    def times(self) -> Tensor:
        """τ(t), if θ = τ(t) Δ."""
        return self.path @ self.difference / self.difference.square().sum()

    def winner_logps(self) -> Tensor:
        """log π(y_w) at each step."""
        return bag_logps(self.path, self.pair[0])


@functools.cache
def bag_runs() -> list[BagRun]:
    """100 steps on each of eight random pairs of four of six tokens, with β = .5."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, (8, 2, 4), generator=generator)
    pairs = torch.nn.functional.one_hot(tokens, 6).sum(2).double()
    return [BagRun(pair, train_bag(pair[None], 0.5, 1.0, 100)) for pair in pairs]


def ray_logps(times: Tensor) -> Tensor:
    """log π(y_w) of EXAMPLE at θ = τ Δ, where training is at the times τ."""
    difference = EXAMPLE[0] - EXAMPLE[1]
    return bag_logps(times[:, None] * difference, EXAMPLE[0])


@BAG_OF_WORDS.claim("L2", "A.8, Eq 37", expected=Verdict.CORRECTED)
def the_gradient_has_both_signs() -> Iterator[Finding]:
    """DPO's loss is -log σ(β Δ·θ + β log ρ) with ρ = π_ref(y_w)/π_ref(y_l), and its gradient -p β Δ is negative (≺ 0).

    The sign of β log ρ is a minus. y_w and y_l have the same length, so Δ sums to 0 and has entries of both signs.
    """
    theta = vector(0.3, -0.2, 0.5, 0.1)
    ref_logps = vector(-3.0, -4.5)
    log_rho = ref_logps[0] - ref_logps[1]
    difference = EXAMPLE[0] - EXAMPLE[1]

    def loss(parameters: Tensor) -> Tensor:
        return dpo_loss(bag_logps(parameters, EXAMPLE)[None], ref_logps[None], 0.5)[0]

    value = loss(theta)
    growth = difference @ theta
    printed = torch.log1p(torch.exp(-0.5 * (growth + log_rho)))
    right = torch.log1p(torch.exp(-0.5 * (growth - log_rho)))
    yield vanishes("loss less that of A.8, with + β log ρ", value - printed)
    yield instead(vanishes("loss less that with - β log ρ", value - right))

    gradient = torch.func.grad(loss)(theta)
    wrong = 1 - torch.exp(-value)
    yield below("largest entry of the gradient, c(y_w) = (2, 1, 1, 0), c(y_l) = (1, 1, 1, 1)", 0, gradient)
    yield instead(vanishes("gradient plus p β Δ", gradient + wrong * 0.5 * difference))


@BAG_OF_WORDS.claim("T39", "Prop. 5, Eqs 37-42")
def the_upper_bound_falls() -> Iterator[Finding]:
    """For a bag of words, gradient descent on DPO from θ = 0 never raises the bound π̃(y_w) = exp(c·θ - n max θ), which
    is at least π(y_w)."""
    rises = []
    excesses = []
    for run in bag_runs():
        bounds = upper_bounds(run.path, run.pair[0])
        rises.append(float(bounds.diff().max()))
        excesses.append(float((run.winner_logps() - bounds).max()))
    yield below("largest step of log π̃(y_w), 8 random pairs, 100 steps", 1e-12, vector(*rises))
    yield below("largest log π(y_w) - log π̃(y_w)", 1e-12, vector(*excesses))


@BAG_OF_WORDS.claim("T40", "§5")
def dpo_can_drive_the_winner_to_zero() -> Iterator[Finding]:
    """For a bag of words, DPO can drive π(y_w) to zero.

    It does so iff y_w has a token outside argmax Δ. π(y_w) itself may rise first, while its bound falls from 1 on.
    """
    times = vector(0, 1, 2, 5)
    late = float(ray_logps(vector(200))[0])
    yield below("c(y_w) = (2, 1, 1, 0), c(y_l) = (1, 1, 1, 1): log π(y_w) at θ = 200 Δ", -300, late)
    expected = "-5.545, -4.506, -5.015, -10.054"
    yield given(same_digits("log π(y_w) at θ = τ Δ, τ = 0, 1, 2, 5", expected, *ray_logps(times)))

    agreements = []
    for run in bag_runs():
        difference = run.difference
        is_best = difference == difference.max()
        has_others = run.pair[0][~is_best].sum() > 0
        falls = bag_logps(100 * difference, run.pair[0]) < -50
        agreements.append(float(has_others == falls))
    agreement = sum(agreements) / len(agreements)
    yield same_value("share of 8 random pairs where it falls just if there is such a token", 1, agreement)

    limit = bag_logps(vector(100, 100, -100, -100), vector(1, 1, 0, 0))
    yield vanishes("limit for c(y_w) = (1, 1, 0, 0), c(y_l) = (0, 0, 1, 1), less -2 log 2", limit + 2 * math.log(2))


@BAG_OF_WORDS.claim("T41", "Prop. 6, Eqs 43-46")
def mass_goes_to_the_best_tokens() -> Iterator[Finding]:
    """With ŷ made of one token of argmax Δ, π(y_w) - π(ŷ) = τ(t) k with k ≤ 0 and a non-decreasing τ ≥ 0. So the mass
    goes to sequences of such tokens.

    The proof and its k = c(y_w)·Δ - n max Δ are about log π. For π itself it is true with k = -1 and another τ.
    """
    slopes = []
    differences = []
    growths = []
    masses = []
    for run in bag_runs():
        difference = run.difference
        times = run.times()
        best_token = torch.nn.functional.one_hot(difference.argmax(), 6).double()
        best_logps = bag_logps(run.path, 4 * best_token)
        winner_logps = run.winner_logps()
        k = run.pair[0] @ difference - 4 * difference.max()

        slopes.append(winner_logps - best_logps - times * k)
        growths.append(times.diff())
        lead = best_logps.exp() - winner_logps.exp()
        differences.append(lead.diff())
        late = torch.softmax(50 * difference, 0)
        mass = late[difference == difference.max()].sum()
        masses.append(float(mass**4))

    yield vanishes("8 random pairs: log π(y_w) - log π(ŷ) - τ k", torch.stack(slopes))
    yield above("smallest step of τ(t)", 0, torch.cat(growths))
    yield above("smallest step of π(ŷ) - π(y_w)", -1e-12, torch.cat(differences))
    yield same_value("mass of the sequences of such tokens at θ = 50 Δ", 1, min(masses))


class CountPairs(NamedTuple):
    """All pairs of different bags of four tokens of five."""

    winners: Tensor  # (pairs, 5)
    differences: Tensor  # Δ, (pairs, 5)
    k: Tensor  # (pairs,)

    def shared(self) -> Tensor:
        """How many tokens y_w and y_l share, (pairs,)."""
        return (self.winners - self.differences.clamp(min=0)).sum(1)


@functools.cache
def count_pairs() -> CountPairs:
    bags = itertools.product(range(5), repeat=5)
    counts = matrix([bag for bag in bags if sum(bag) == 4])
    pairs = ordered_pairs(len(counts))
    winners = counts[pairs[:, 0]]
    differences = winners - counts[pairs[:, 1]]
    k = (winners * differences).sum(1) - 4 * differences.amax(1)
    return CountPairs(winners, differences, k)


@BAG_OF_WORDS.claim("T42", "after Prop. 6", expected=Verdict.CORRECTED)
def similar_pairs_degrade_more() -> Iterator[Finding]:
    """k is 0 if y_w is ŷ, and far below 0 if ‖Δ‖₂ = ‖Δ‖_∞, a sparse Δ. So if y_w and y_l are similar, π(y_w) degrades
    faster.

    The conclusion holds, k being taken per margin gained, β τ ‖Δ‖². But ‖Δ‖₂ = ‖Δ‖_∞ needs a single entry, and Δ sums
    to 0. All 4,830 pairs of bags of four tokens of five; the least ratio is that of (4, -1, -1, -1, -1), where k = 0.
    """
    pairs = count_pairs()
    squares = pairs.differences.square().sum(1)
    largest_entries = pairs.differences.abs().amax(1)
    least = float((squares.sqrt() / largest_entries).min())
    yield same_value("least ‖Δ‖₂/‖Δ‖_∞", 1, least)
    yield given(same_value("the same by hand, √(1 + 1/4)", math.sqrt(1.25), least))

    is_best = pairs.differences == pairs.differences.amax(1, keepdim=True)
    only_best = (pairs.winners * ~is_best).sum(1) == 0
    agreement = (only_best == (pairs.k == 0)).double().mean()
    yield instead(same_value("share with k = 0 just if y_w has only tokens of argmax Δ", 1, float(agreement)))

    shared = pairs.shared()
    means = []
    for count in range(4):
        rates = pairs.k / squares
        means.append(rates[shared == count].mean())
    yield instead(below("mean k/‖Δ‖² with 0, 1, 2, 3 shared tokens: largest change", 0, torch.stack(means).diff()))


@functools.cache
def two_bags() -> Tensor:
    """θ of training on SIMILAR and DISTINCT together, β = 1: (301, 6)."""
    return train_bag(torch.stack([SIMILAR, DISTINCT]), 1.0, 0.2, 300)


def winner_logps_of(pair: Tensor) -> Tensor:
    """log π(y_w) of the pair along `two_bags`, (301,)."""
    return bag_logps(two_bags(), pair[0])


@BAG_OF_WORDS.claim("T43", "after Prop. 6")
def early_stopping_is_a_trade_off() -> Iterator[Finding]:
    """Early stopping trades off the degenerate solution of pairs that are similar against underfitting those that are
    more distinct.

    Two pairs trained together, one with a token replaced, one without a common token: π(y_w) is largest at different
    steps. Underfitting is meant in that sense: in DPO's loss the distinct pair is ahead from the first step on.
    """
    similar = winner_logps_of(SIMILAR)
    distinct = winner_logps_of(DISTINCT)
    first_peak = int(similar.argmax())
    second_peak = int(distinct.argmax())
    yield judged(
        "step of the largest π(y_w) of the similar pair", "between 1 and 100", first_peak, 1 <= first_peak <= 100
    )
    yield judged("of the distinct pair", "later by 20 at least", second_peak, second_peak >= first_peak + 20)
    gain = float(distinct[second_peak] - distinct[first_peak])
    yield above("log π(y_w) that the distinct pair gains in between", 0.1, gain)
    loss = float(similar[second_peak] - similar[first_peak])
    yield below("and that the similar pair loses", -0.1, loss)

    similar_growth = two_bags() @ (SIMILAR[0] - SIMILAR[1])
    distinct_growth = two_bags() @ (DISTINCT[0] - DISTINCT[1])
    leads = distinct_growth - similar_growth
    yield instead(above("least lead of the distinct pair's growth of h after the first step", 0, leads[1:]))


# ---------------------------------------------------------------- Appendix B: transitive closure

CLOSURE = PAPER.section("Transitive closure")


def chain(num_arms: int, closed: bool) -> Tensor:
    """The (winner, loser) pairs of y_1 ≺ y_2 ≺ ... ≺ y_n: neighbours only, or their transitive closure."""
    pairs = []
    for loser, winner in itertools.combinations(range(num_arms), 2):
        if closed or winner == loser + 1:
            pairs.append((winner, loser))
    return torch.tensor(pairs)


def ipo_log_ratios(pairs: Tensor, num_arms: int, inverse_tau: float) -> Tensor:
    """log π_θ/π_ref at IPO's optimum, up to a shift, with a uniform π_ref.

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


@CLOSURE.claim("T44", "Prop. 7")
def closure_narrows_ipo() -> Iterator[Finding]:
    """For n arms in a chain of preferences, IPO's log-ratios have the range (n-1)/τ. With the transitive closure it is
    2(n-1)/(nτ).

    The paper's data set has the pairs (i, i+1) for i up to n, which would be n+1 arms; n-1 is meant.
    """
    of_chain = []
    of_closure = []
    for n, inverse_tau in itertools.product((3, 4, 8), (0.5, 2.0)):
        expected = (n - 1) * inverse_tau
        of_chain.append(log_ratio_range(n, False, inverse_tau) - expected)
        of_closure.append(log_ratio_range(n, True, inverse_tau) - 2 / n * expected)
    yield vanishes("n = 3, 4, 8, τ = .5 and 2: range of the chain less (n-1)/τ", vector(*of_chain), 1e-8)
    yield vanishes("range of the closure less 2(n-1)/(nτ)", vector(*of_closure), 1e-8)


@CLOSURE.claim("T45", "App. B")
def closed_chains_are_equally_spaced() -> Iterator[Finding]:
    """With the closure, IPO's neighbouring arms are all 2/(nτ) apart, which the proof of Proposition 7 presupposes."""
    errors = []
    for n in (3, 4, 8):
        log_ratios = ipo_log_ratios(chain(n, True), n, 1.0)
        errors.append(log_ratios.diff() - 2 / n)
    yield vanishes("n = 3, 4, 8, τ = 1: distances less 2/n", torch.cat(errors), 1e-8)


SETTINGS = torch.cartesian_prod(vector(1, 3, 10, 30), vector(5, 10, 20, 50, 100, 1000))  # β and α, (24, 2)
SETTING_BETAS = SETTINGS[:, 0]
SETTING_GAMMAS = SETTINGS[:, 0] / SETTINGS[:, 1]
INVERSE_TAUS = (SETTINGS[:, 1] - 1).log() / SETTINGS[:, 0]  # log(α - 1)/β: p-DPO and IPO agree on one pair


class ThreeArms(NamedTuple):
    """The optima of three arms in all settings, (24, 3)."""

    on_pairs: Tensor  # p-DPO with Ω on the pairs
    exact: Tensor  # p-DPO with the exact KL
    ipo: Tensor


@functools.cache
def three_arms(closed: bool) -> ThreeArms:
    """The optima for the chain of three arms, or for its transitive closure, with a uniform π_ref."""
    reference = uniform_logps(3)
    pairs = chain(3, closed)
    betas = SETTING_BETAS.repeat_interleave(len(pairs))
    gammas = SETTING_GAMMAS.repeat_interleave(len(pairs))

    def pair_logps(logits: Tensor) -> Tensor:
        logps = logits.view(24, 3).log_softmax(1)
        return logps[:, pairs].reshape(-1, 2)

    def dpo_losses(logits: Tensor) -> Tensor:
        pair_ref_logps = reference[pairs].repeat(24, 1)
        return dpo_loss(pair_logps(logits), pair_ref_logps, betas[:, None])  # a β for each row

    def with_omega(logits: Tensor) -> Tensor:
        losses = pessimistic_loss(dpo_losses(logits), pair_logps(logits), gammas)
        return losses.sum() / len(pairs)

    def with_kl(logits: Tensor) -> Tensor:
        logps = logits.view(24, 3).log_softmax(1)
        losses = dpo_losses(logits)
        return losses.sum() / len(pairs) + SETTING_GAMMAS @ kl(reference, logps)

    start = torch.zeros(72, dtype=torch.float64)
    on_pairs = minimise(with_omega, start).parameters
    exact = minimise(with_kl, start).parameters
    # IPO's log-ratios are proportional to 1/τ, and here they are logits of the policy
    ipo = INVERSE_TAUS[:, None] * ipo_log_ratios(pairs, 3, 1.0)
    return ThreeArms(on_pairs.view(24, 3).softmax(1), exact.view(24, 3).softmax(1), ipo.softmax(1))


def changes(method: str) -> Tensor:
    """How far the closure moves the optimum in each setting, in total variation: (24,)."""
    without = getattr(three_arms(closed=False), method)
    with_closure = getattr(three_arms(closed=True), method)
    return (without - with_closure).abs().sum(1) / 2


@CLOSURE.claim("T46", "Fig. B.1", expected=Verdict.CORRECTED)
def closure_moves_p_dpo_less_than_ipo() -> Iterator[Finding]:
    """The transitive closure of three arms changes IPO's optimum significantly, and that of p-DPO imperceptibly.

    β from 1 to 30 and α from 5 to 1000 as in the paper, uniform π_ref; changes are total variations. With the exact KL
    p-DPO moves less than IPO in all 24 settings. With Ω on the pairs, as in Proposition 3, it does not for large β and
    small α: the chain's Ω counts the middle arm twice, the closure's counts all arms alike.
    """
    ipo = changes("ipo")
    on_pairs = changes("on_pairs")
    exact = changes("exact")
    yield above("IPO: largest change", 0.1, ipo.max())
    yield same_value("Ω on the pairs: settings of 24 with a smaller change than IPO's", 24, int((on_pairs < ipo).sum()))
    ranges = [ipo.min(), ipo.max(), on_pairs.min(), on_pairs.max()]
    statement = "smallest and largest change of IPO; of p-DPO, Ω on the pairs"
    yield given(same_digits(statement, ".005, .121, .001, .049", *ranges))
    yield instead(same_value("exact KL: settings of 24 with a smaller change than IPO's", 24, int((exact < ipo).sum())))
    yield instead(below("exact KL: largest change of p-DPO", 0.036, exact))


@CLOSURE.claim("T47", "App. B")
def dpo_removes_the_arm_that_never_wins() -> Iterator[Finding]:
    """On the chain DPO sets ψ_1 → -∞, because y_1 is never preferred.

    In 1,000 random policies its logit has a positive slope. The loss is at its infimum 0 for logits (0, t, 2t), t → ∞.
    """
    pairs = chain(3, closed=False)
    reference = uniform_logps(3)

    def loss(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        return dpo_loss(logps[pairs], reference[pairs], 1.0).mean()

    logits = random_policies(1000, 3, seed=10)
    gradients = torch.func.vmap(torch.func.grad(loss))(logits)
    yield above("smallest slope of y_1's logit", 0, gradients[:, 0])
    yield vanishes("loss for logits (0, 50, 100)", float(loss(vector(0, 50, 100))))


@CLOSURE.claim("T48", "App. B")
def p_dpo_does_not_grow_quadratically() -> Iterator[Finding]:
    """p-DPO's loss does not grow quadratically away from its target, as IPO's does: its slope over h stays below β.

    π(y_w) is fixed, β = 1, α = 10 and 1/τ = log 9.
    """
    log_ratios = vector(-500, -50, 50, 500)

    def losses_of(h: Tensor) -> Tensor:
        logps = torch.stack([torch.zeros_like(h), -h], 1)
        return torch.stack(
            [
                pdpo_loss(logps, torch.zeros_like(logps), 1.0, 10.0),
                ipo_loss(logps, torch.zeros_like(logps), 1 / (2 * math.log(9))),
            ]
        )

    slopes = torch.func.jacrev(lambda h: losses_of(h).sum(1))(log_ratios)
    yield same_digits("slope of p-DPO at h = -500, -50, 50, 500", "-.900, -.900, .100, .100", *slopes[0])
    yield vanishes("slope of IPO less 2(h - 1/τ)", slopes[1] - 2 * (log_ratios - math.log(9)))


# ---------------------------------------------------------------- Section 4: experiments

EXPERIMENTS = PAPER.section("Experiments")
GAMMA_START = 1e-4
GAMMA_END = 1e-2


@EXPERIMENTS.claim("X17", "§4.1, Prop. 3")
def the_annealed_target_is_positive() -> Iterator[Finding]:
    """While γ rises from 1e-4 to 1e-2, the target gap log(α - 1)/β of Proposition 3 stays finite and positive, for β
    from .1 to 100.

    Arithmetic on the settings of §4.1. With β = .01, which the sweep has too, α falls below 2 in the middle of
    training: the target is negative from there on. At the end α is 1, and there is no target.
    """
    gammas = grid(GAMMA_START, GAMMA_END, 10_001)
    betas = vector(0.1, 1, 3, 10, 30, 100)
    yield above("least α = β/γ for β from .1 to 100", 2, betas[:, None] / gammas)

    alphas = 0.01 / gammas
    yield instead(same_value("β = .01: α at the last step", 1, float(alphas[-1]), 1e-12))
    first_below = int((alphas < 2).double().argmax())
    yield instead(same_value("β = .01: first of 10,000 steps with α < 2", 4950, first_below))


EXPERIMENT_ROWS = [  # number, where, statement
    ("X1", "§4.1", "After relabelling by the oracle, the longer response is preferred in 61% of the examples."),
    ("X2", "footnote 3", "Length correlates with reward."),
    ("X3", "§4.1", "The sensitivity to length of reward models differs with the share b of their training set."),
    ("X4", "Fig. 2", "Every method gains over π_SFT, for all length biases ρ."),
    ("X5", "Fig. 2", "For ρ ≤ .5 all methods that distil are better than DPO and IPO."),
    ("X6", "Fig. 2", "e-DPO is the best for ρ < .5."),
    ("X7", "Fig. 2", "d-DPO is the best for ρ > .6, better than DPO and IPO."),
    ("X8", "§4.2", "p-DPO has no benefit over distillation."),
    ("X9", "§4.2", "ρ < .5 is the harder setting."),
    ("X10", "§1", "On unbiased preferences all methods are about equal."),
    ("X11", "Fig. D.1", "The best β is inversely correlated with ρ, and so is IPO's τ."),
    ("X12", "Fig. D.1", "Different ρ have different best settings, and the results are robust to the seed."),
    ("X13", "Fig. C.1", "The reward model that matches an example best tends to have the opposite bias b."),
    ("X14", "§4.2", "e-DPO is successful because it distils models without the bias of the training set."),
    ("X15", "footnote 4", "An ensemble of checkpoints of one reward model brings nothing."),
    ("X16", "§2.3, §5", "The likelihood of preferred completions falls under DPO, less under distillation."),
]
for number, where, statement in EXPERIMENT_ROWS:
    EXPERIMENTS.elsewhere(number, where, statement, LANGUAGE_MODELS)

EXPERIMENTS.elsewhere("X18", "App. E", "Training takes ten seconds a step on 32 TPU v3.", "needs that hardware")

# ---------------------------------------------------------------- figures


def plot_pair_losses(axes: "Axes") -> None:
    """The losses of one pair against β h, with π_θ(y_w) fixed."""
    h = grid(-3, 8, 200)
    logps = torch.stack([torch.zeros_like(h), -h], 1) + math.log(0.4)
    ref_logps = uniform_logps(2).expand_as(logps)

    dpo_losses = dpo_loss(logps, ref_logps, 1.0)
    axes.plot(h, dpo_losses, color=GREY, linestyle=":", label="DPO: no optimum")
    for alpha, color, style in ((3.0, ORANGE, "--"), (10.0, BLUE, "-"), (100.0, GREEN, "-.")):
        losses = pdpo_loss(logps, ref_logps, 1.0, alpha)
        axes.plot(h, losses, style, color=color, label=f"p-DPO, α = {alpha:g}")
        best = losses.argmin()
        axes.plot(h[best], losses[best], "o", color=color)

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


@PAPER.figure(
    "One pair. Left: DPO's loss has no optimum, p-DPO's has one (dots). Right: it is at log(α-1) if the loser's"
    " probability alone is free, and at log(α+1) if both are (T31, T35)."
)
def one_pair() -> "Figure":
    figure, panels = canvas(["ab"], (10, 4))
    plot_pair_losses(panels["a"])
    plot_pair_optima(panels["b"])
    return figure


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
    tilts = grid(-1.5, 1.5, 121)
    reference = uniform_logps(3)
    logps = tilted(reference, tilts[:, None] * CONFLICT[0], 1.0)
    _, scores = members("conflict")

    axes.plot(tilts, pessimistic_score(logps, reference, CONFLICT, 1.0), color=GREY, label="π_ref exp(t r/β)/Z")
    axes.plot([1, -1], scores, "o", color=ORANGE, label="members of P_β(S), by d-DPO")
    axes.plot([0], [0], "s", color=BLUE, label="π_ref")
    label_axes(axes, "Theorem 2 fails: r = ±(1, -1, 0), β = 1", "tilt t (no unit)", "Eq 8 (reward)")


def plot_hull(axes: "Axes") -> None:
    """Eq 8 and the forward KL between the two members of an uneven set."""
    weights = grid(0, 1, 201)[:, None]
    mixtures = weights * UNEVEN[0] + (1 - weights) * UNEVEN[1]
    logps = tilted(UNEVEN_REF, mixtures, BETA)
    scores = pessimistic_score(logps, UNEVEN_REF, UNEVEN, BETA)
    divergences = kl(UNEVEN_REF, logps)
    best = least_divergent(UNEVEN_REF, UNEVEN, BETA)
    _, of_members = members("uneven")

    axes.plot(weights, BETA * divergences, color=GREEN, label="β KL(π_ref ‖ π_r)")
    axes.plot(weights, scores, color=GREY, label="Eq 8 at π_r")
    axes.plot([1, 0], of_members, "o", color=ORANGE, label="members of P_β(S), by d-DPO")
    label = "least KL on the hull: the maximum of Eq 8"
    axes.plot(best.weights[0], BETA * best.divergence, "s", color=BLUE, label=label)
    axes.set_ylim(-1.3, 1.3)
    label_axes(axes, "Theorem 2 on the convex hull of S", "weight of the first reward model in r", "reward")


@PAPER.figure(
    "Theorems. Left: d-DPO reaches the aligned policy from pairs that connect all arms (T11). Middle: for two opposite"
    " reward models π_ref is better than both candidates of Theorem 2 (T18). Right: along the convex hull of two others"
    " the least forward KL and the largest value of Eq 8 meet, at the policy that the theorem should name (T19)."
)
def theorems() -> "Figure":
    figure, panels = canvas(["abc"], (15, 4.2))
    plot_theorem_1(panels["a"])
    plot_theorem_2(panels["b"])
    plot_hull(panels["c"])
    return figure


@PAPER.figure(
    "Fig. 1 of the paper, worked out. S has four reward models with the gaps .5, 1, 2, 4 between two arms. Of their"
    " policies the one with the least forward KL has the largest value of Eq 8. For gaps of both signs π_SFT has (T52)."
)
def figure_1() -> "Figure":
    figure, panels = canvas(["ab"], (10, 4))
    reference = uniform_logps(2)
    margins = grid(-5, 5, 401)
    logps = two_arms(margins)
    winners = logps[:, 0].exp()
    policies = two_arms(FIGURE_1)
    policy_winners = policies[:, 0].exp()
    divergences = kl(reference, policies)

    axes = panels["a"]
    axes.plot(winners, kl(reference, logps), color=GREY)
    axes.plot(policy_winners, divergences, "o", color=ORANGE, label="P_β(S)")
    axes.plot(policy_winners[0], divergences[0], "s", color=BLUE, label="least forward KL")
    axes.plot(0.5, 0, "D", color=GREEN, label="π_SFT")
    label_axes(axes, "Forward KL to π_SFT; π_MLE is at 1", "π(y_w)", "KL(π_SFT ‖ π) (nats)")

    axes = panels["b"]
    rewards = torch.stack([FIGURE_1, vector(0, 0, 0, 0)], 1)
    scores = pessimistic_score(logps, reference, rewards, 1.0)
    axes.plot(winners, scores, color=BLUE, label="gaps .5, 1, 2, 4")
    axes.plot(policy_winners[0], scores.max(), "s", color=BLUE)

    rewards[0, 0] = -0.5
    scores = pessimistic_score(logps, reference, rewards, 1.0)
    axes.plot(winners, scores, color=ORANGE, linestyle="--", label="gaps -.5, 1, 2, 4")
    axes.plot(0.5, 0, "D", color=GREEN, label="π_SFT")
    axes.set_ylim(-0.6, 0.1)
    label_axes(axes, "Pessimistic objective", "π(y_w)", "Eq 8 (reward), β = 1")
    return figure


@PAPER.figure(
    "Pessimism over a growing ball of reward models around one (T16): the optimum of Eq 8 moves to π_ref, and is there"
    " as soon as the ball contains a constant reward."
)
def growing_ball() -> "Figure":
    figure, panels = canvas(["a"], (6, 4))
    shares, distances = ball_distances()
    panels["a"].plot([*shares, 1, 1.2], [*distances, 0, 0], "o-", color=BLUE)
    label_axes(
        panels["a"], "A richer set S", "size λ of the ball / E (Δr)² (no unit)", "distance to π_ref (total variation)"
    )
    return figure


@PAPER.figure(
    "A bag of words trained with DPO. Left: the bound of Proposition 5 falls while π(y_w) may rise first (T40). Right:"
    " two pairs trained together; the similar one is at its best early, the distinct one late (T43)."
)
def bag_of_words() -> "Figure":
    figure, panels = canvas(["ab"], (10, 4))
    times = grid(0, 5, 101)
    thetas = times[:, None] * (EXAMPLE[0] - EXAMPLE[1])
    bounds = upper_bounds(thetas, EXAMPLE[0])
    best_tokens = bag_logps(thetas, vector(4, 0, 0, 0))

    axes = panels["a"]
    axes.plot(times, bounds, color=GREY, linestyle="--", label="upper bound of log π(y_w)")
    axes.plot(times, ray_logps(times), color=BLUE, label="log π(y_w)")
    axes.plot(times, best_tokens, color=ORANGE, label="log π(ŷ), only tokens of argmax Δ")
    title = "c(y_w) = (2, 1, 1, 0), c(y_l) = (1, 1, 1, 1)"
    label_axes(axes, title, "τ, with θ = τ Δ (no unit)", "log-probability (nats)")

    axes = panels["b"]
    kinds = ((SIMILAR, BLUE, "similar: one token replaced"), (DISTINCT, ORANGE, "distinct: no common token"))
    for pair, color, label in kinds:
        logps = winner_logps_of(pair)
        best = int(logps.argmax())
        axes.plot(logps, color=color, label=label)
        axes.plot(best, logps[best], "o", color=color)
    label_axes(axes, "Two pairs trained together, β = 1", "step of gradient descent", "log π(y_w) (nats)")
    return figure


def plot_closure_ranges(axes: "Axes") -> None:
    """The range of IPO's log-ratios against the number of arms."""
    arms = torch.arange(2, 11)
    of_chain = []
    of_closure = []
    for n in arms.tolist():
        of_chain.append(log_ratio_range(n, False, 1.0))
        of_closure.append(log_ratio_range(n, True, 1.0))

    axes.plot(arms, of_chain, "o", color=BLUE, label="chain, optimum")
    axes.plot(arms, arms - 1, color=BLUE, label="(n-1)/τ")
    axes.plot(arms, of_closure, "s", color=ORANGE, label="transitive closure, optimum")
    axes.plot(arms, 2 * (arms - 1) / arms, color=ORANGE, label="2(n-1)/(nτ)")
    label_axes(axes, "Proposition 7: IPO, τ = 1", "arms n", "range of log-ratios (nats)")


def plot_closure_changes(axes: "Axes") -> None:
    """How far the closure moves the optima, against log(α - 1)/β."""
    axes.semilogx(INVERSE_TAUS, changes("ipo"), "s", color=ORANGE, label="IPO", fillstyle="none")
    axes.semilogx(INVERSE_TAUS, changes("on_pairs"), "o", color=GREEN, label="p-DPO, Ω on the pairs", fillstyle="none")
    axes.semilogx(INVERSE_TAUS, changes("exact"), "^", color=BLUE, label="p-DPO, exact KL", fillstyle="none")
    label_axes(axes, "Three arms with and without closure", "1/τ = log(α-1)/β (nats)", "change (total variation)")


@PAPER.figure(
    "Transitive closure. Left: it narrows IPO's log-ratios (T44). Right: how far it moves the optima of three arms, for"
    " the 24 settings of appendix B (T46)."
)
def closure() -> "Figure":
    figure, panels = canvas(["ab"], (10, 4))
    plot_closure_ranges(panels["a"])
    plot_closure_changes(panels["b"])
    return figure


@PAPER.figure(
    "Fig. B.1 of the paper: the probability of each arm with and without the closure, for y_1 ≺ y_2 ≺ y_3, in 24"
    " settings. p-DPO hardly changes with the exact KL. With Ω on the pairs it does at small 1/τ (T46)."
)
def figure_b1() -> "Figure":
    methods = {"on_pairs": "p-DPO, Ω on the pairs", "exact": "p-DPO, exact KL", "ipo": "IPO"}
    names = [[f"{method} {arm}" for arm in range(3)] for method in methods]
    figure, panels = canvas(names, (12, 9))
    for method, arm in itertools.product(methods, range(3)):
        axes = panels[f"{method} {arm}"]
        without = getattr(three_arms(closed=False), method)
        with_closure = getattr(three_arms(closed=True), method)
        axes.semilogx(INVERSE_TAUS, without[:, arm], "o", color=BLUE, label="chain", markersize=4)
        axes.semilogx(INVERSE_TAUS, with_closure[:, arm], "s", color=ORANGE, label="closure", fillstyle="none")
        axes.set_ylim(-0.03, 1.03)
        label_axes(axes, f"{methods[method]}, arm y_{arm + 1}", "1/τ = log(α-1)/β (nats)", "probability")
    return figure


def main(args: Args) -> None:
    paper_command(PAPER, args)


if __name__ == "__main__":
    checked_command(main, Args)
