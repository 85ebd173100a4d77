"""DPO, arXiv 2305.18290: its objective, its optimum, its loss and its theory, on tabular policies.

A policy has one logit for each completion of a prompt, in float64. The losses are those of algos/dpo.py and
algos/rm.py. Optima are found by Newton's method; expectations are sums over all completions.

    python scripts/papers/dpo.py
    python scripts/papers/dpo.py --claim T8
"""

import functools
import math
import operator
import random
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp

from algos.dpo import dpo_loss
from algos.rm import rm_loss
from scripts.lab.claim_files import Args, paper_command
from scripts.lab.claims import (
    Finding,
    Paper,
    Verdict,
    given,
    instead,
    judged,
    reported,
    same_digits,
    same_value,
    vanishes,
)
from scripts.lab.commands import checked_command
from scripts.lab.enumeration import (
    along_completions,
    along_prefixes,
    best_of,
    gradient_moments,
    random_model,
    soft_value,
    win_rate,
)
from scripts.lab.notices import rank_by_preference
from scripts.lab.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, canvas, label_axes
from scripts.lab.tabular import (
    Optimum,
    all_orders,
    bradley_terry,
    entropy,
    fit_policy,
    frontier,
    kl,
    log_partition,
    minimise,
    objective,
    ordered_pairs,
    plackett_luce,
    random_policies,
    tilted,
    total_variation,
    uniform_logps,
    vector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = Paper("dpo", "Direct Preference Optimization", "2305.18290")

# one prompt with four completions
REF_LOGPS = vector(0.4, 0.3, 0.2, 0.1).log()
REWARDS = vector(1.0, -0.5, 0.3, 2.0)
PAIRS = ordered_pairs(4)
TWO_PARTS = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
CHAIN = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]])
BETAS = (0.05, 0.1, 1.0, 5.0)  # of section 6.1
MODERATE_BETAS = (0.5, 1.0, 5.0)  # no completion is so rare that its log-prob is lost

# three prompts with four completions each
PROMPT_REFS = random_policies(3, 4, seed=1)
PROMPT_SHIFTS = vector(-2.0, 0.7, 5.0)[:, None]  # f(x)


def random_numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal draws in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


PROMPT_REWARDS = random_numbers(3, 4, seed=2)


def labels(rewards: Tensor, pairs: Tensor) -> Tensor:
    """P(winner ≻ loser) of Bradley-Terry over all pairs, divided so that they sum to 1."""
    probabilities = bradley_terry(rewards.exp(), pairs)
    return probabilities / probabilities.sum()


LABELS = labels(REWARDS, PAIRS)


def optimal_logps(beta: float) -> Tensor:
    """log π* of Eq 4."""
    return tilted(REF_LOGPS, REWARDS, beta)


@functools.cache
def maximise_objective(beta: float, shift: float = 0.0) -> Optimum:
    """The policy that maximises Eq 3 with the rewards r + shift, by Newton's method from π_ref."""

    def loss(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        return -objective(logps, REF_LOGPS, REWARDS + shift, beta)

    return minimise(loss, REF_LOGPS, max_steps=40)  # at small β, rare completions drift on long after the rest stands


def fit_dpo(weights: Tensor, pairs: Tensor, beta: float, start: Tensor = REF_LOGPS) -> Optimum:
    """The policy that minimises Eq 7 over pairs with these weights, by Newton's method."""

    def losses(logps: Tensor) -> Tensor:
        return dpo_loss(logps[pairs], REF_LOGPS[pairs], beta)

    return fit_policy(losses, weights, start)


def dpo_optimum(beta: float) -> Tensor:
    """The policy that minimises Eq 7 under Bradley-Terry labels of all pairs."""
    return fit_dpo(LABELS, PAIRS, beta).policy


def of_orders(table: Tensor, orders: Tensor) -> Tensor:
    """The entries of each row of a table in each order: (rows, 4), (orders, K) → (rows · orders, K)."""
    return table[:, orders].flatten(0, 1)


# ---------------------------------------------------------------- section 3

PRELIMINARIES = PAPER.section("Preferences, reward models and the RL objective (section 3)")


def exact_log_losses(margins: list[Decimal]) -> Tensor:
    """-log σ(margin) to 50 digits."""
    with localcontext() as context:
        context.prec = 50
        losses = [(1 + (-margin).exp()).ln() for margin in margins]
    return vector(*map(float, losses))


@PRELIMINARIES.claim("T2", "Eq 1")
def preferences_follow_bradley_terry() -> Iterator[Finding]:
    """The probability that y_1 is preferred over y_2 is exp r(y_1) / (exp r(y_1) + exp r(y_2)).

    The probability exp(-loss) of the reward model's loss, and the made-up labels of scripts/notices.py, are compared.
    """
    likelihoods = (-rm_loss(REWARDS[PAIRS])).exp()
    yield vanishes("exp(-loss) of all pairs less Eq 1", likelihoods - bradley_terry(REWARDS.exp(), PAIRS), 1e-12)
    both_orders = likelihoods + (-rm_loss(REWARDS[PAIRS.flip(1)])).exp()
    yield vanishes("both orders of a pair: their sum less 1", both_orders - 1, 1e-12)

    rng = random.Random(5)
    orders = [rank_by_preference([1.0, 0.0], rng) for _ in range(4_000)]
    wins = orders.count([0, 1])
    expected = 1 / (1 + math.exp(-1))
    deviation = (wins / 4_000 - expected) / math.sqrt(expected * (1 - expected) / 4_000)
    yield judged("4,000 drawn labels, standard errors from Eq 1", "-3 to 3", deviation, abs(deviation) < 3)


@PRELIMINARIES.claim("T3", "Eq 2")
def the_reward_loss_is_the_log_loss() -> Iterator[Finding]:
    """The reward model's loss is -log σ(r(y_w) - r(y_l)): the negative log-likelihood of Eq 1."""
    rewards = random_numbers(50, 2, seed=3, scale=10.0)
    margins = [Decimal(winner) - Decimal(loser) for winner, loser in rewards.tolist()]
    yield vanishes(
        "50 pairs, loss less that of 50-digit arithmetic", rm_loss(rewards) - exact_log_losses(margins), 1e-13
    )
    of_equals = rm_loss(vector(3, 3)[None])
    yield same_value("equal rewards: ln 2", math.log(2), float(of_equals), 1e-12)


def fit_rewards(weights: Tensor) -> Optimum:
    """The rewards that minimise Eq 2. weights: (tables, pairs), of PAIRS; parameters: (tables · 4)."""

    def loss(parameters: Tensor) -> Tensor:
        rewards = parameters.view(-1, 4)
        losses = rm_loss(of_orders(rewards, PAIRS))
        return weights.flatten() @ losses

    return minimise(loss, torch.zeros(4 * len(weights), dtype=torch.float64))


SIZES = (100, 1_000, 10_000, 100_000)  # pairs in a data set
RUNS = 10  # data sets of each size


def draw_pairs(size: int) -> Tensor:
    """Shares of the pairs in RUNS data sets: pairs uniform, labels by Bradley-Terry. (RUNS, pairs)."""
    generator = torch.Generator().manual_seed(size)
    draws = torch.multinomial(LABELS, RUNS * size, replacement=True, generator=generator)
    counts = [run.bincount(minlength=len(PAIRS)) for run in draws.view(RUNS, size)]
    return torch.stack(counts).double() / size


@functools.cache
def fitted_rewards(size: int) -> Tensor:
    """The maximum-likelihood rewards of the data sets of a size, with mean 0: (RUNS, 4)."""
    rewards = fit_rewards(draw_pairs(size)).parameters.view(-1, 4)
    return rewards - rewards.mean(1, keepdim=True)


def error_of_rewards(size: int) -> float:
    """Root mean square distance of the fitted rewards to r*, both with mean 0, over the data sets of a size."""
    differences = fitted_rewards(size) - (REWARDS - REWARDS.mean())
    squares = differences.square().sum(1)
    return float(squares.mean().sqrt())


def slope(values: list[float]) -> float:
    """The slope of log(value) over log(size), by least squares over SIZES."""
    x = vector(*SIZES).log()
    x = x - x.mean()
    return float(x @ vector(*values).log() / (x @ x))


def rewards_information() -> Tensor:
    """Fisher information of one drawn pair about the rewards: E[σ'(Δr) (e_w - e_l)(e_w - e_l)ᵀ], (4, 4)."""
    units = torch.eye(4, dtype=torch.float64)
    differences = units[PAIRS[:, 0]] - units[PAIRS[:, 1]]
    winning = bradley_terry(REWARDS.exp(), PAIRS)
    weights = LABELS * winning * (1 - winning)
    return differences.T @ (weights[:, None] * differences)


@PRELIMINARIES.claim("T4", "Eq 2")
def maximum_likelihood_recovers_the_reward() -> Iterator[Finding]:
    """Maximum likelihood on pairs drawn from Eq 1 estimates the latent reward, up to a term f(x) of the prompt.

    Exact expectation on three prompts; then 10 sampled data sets of 100 to 100,000 pairs, whose root mean square error
    has to fall like n^-½ and to meet the Cramér-Rao bound.
    """
    weights = torch.stack([labels(rewards, PAIRS) for rewards in PROMPT_REWARDS])
    shifts = fit_rewards(weights).parameters.view(3, 4) - PROMPT_REWARDS
    yield vanishes("exact expectation: r - r* less its mean, each prompt", shifts - shifts.mean(1, keepdim=True), 1e-8)

    errors = [error_of_rewards(size) for size in SIZES]
    exponent = slope(errors)
    yield judged("slope of log error over log n", "-0.5 ± 0.1", exponent, abs(exponent + 0.5) < 0.1)

    covariance = torch.linalg.pinv(rewards_information()) / SIZES[-1]
    bound = float(covariance.trace())
    ratio = errors[-1] / math.sqrt(bound)
    yield judged("error at n = 100,000 over the Cramér-Rao bound", "1 ± 0.25", ratio, abs(ratio - 1) < 0.25)


@PRELIMINARIES.claim("T5", "§3")
def normalising_changes_no_preference() -> Iterator[Finding]:
    """Rewards normalised to mean 0 for every prompt have a lower variance, and mean the same preferences and policy.

    The variance over prompts and completions falls by that of the prompts' means. One mean over all prompts, the other
    reading of the formula, leaves the variance as it is.
    """
    weights = PROMPT_REFS.exp() / 3  # of prompt and completion
    means = (PROMPT_REFS.exp() * PROMPT_REWARDS).sum(1, keepdim=True)
    normalised = PROMPT_REWARDS - means

    def variance(rewards: Tensor) -> float:
        mean = (weights * rewards).sum()
        return float((weights * (rewards - mean).square()).sum())

    fall = variance(PROMPT_REWARDS) - variance(normalised)
    yield judged("fall of the variance", "> 0", fall, fall > 0)
    yield given(same_value("the same: variance of the prompts' means", float(means.var(correction=0)), fall, 1e-12))
    before = rm_loss(of_orders(PROMPT_REWARDS, PAIRS))
    after = rm_loss(of_orders(normalised, PAIRS))
    yield vanishes("change of the loss of any pair", after - before, 1e-12)
    policies = tilted(PROMPT_REFS, normalised, 0.5) - tilted(PROMPT_REFS, PROMPT_REWARDS, 0.5)
    yield vanishes("change of the optimal log-probs", policies, 1e-12)


@PRELIMINARIES.claim("T6", "Eq 3")
def beta_keeps_the_policy_near_the_reference() -> Iterator[Finding]:
    """The KL term keeps the policy near π_ref, and keeps it from collapsing to a single high-reward answer.

    The entropy need not rise with β: π_ref = (.9, .1), r = (0, 1) passes the uniform policy at β = 1/ln 9.
    """
    betas = torch.logspace(-1.3, 3, 81, dtype=torch.float64)[:, None]
    optima = tilted(REF_LOGPS, REWARDS, betas)
    largest = float(kl(optima, REF_LOGPS).diff().max())
    yield judged("β from 0.05 to 1e3: largest change of KL(π ‖ π_ref)", "< 0", largest, largest < 0)
    distance = total_variation(optima[-1].exp(), REF_LOGPS.exp())
    yield vanishes("β = 1e3, distance to π_ref", distance, 1e-3)

    least = maximise_objective(0.5).policy.min()
    log_floors = REF_LOGPS - (REWARDS.max() - REWARDS) / 0.5
    floor = log_floors.min().exp()
    yield judged(
        "β = 0.5: rarest completion, over π_ref exp((r - max r)/β)", "≥ 1", float(least / floor), least >= floor
    )
    collapsed = total_variation(tilted(REF_LOGPS, REWARDS, 1e-5).exp(), vector(0, 0, 0, 1))
    yield given(vanishes("β = 1e-5, distance to the best completion alone", collapsed, 1e-12))
    refs = vector(0.9, 0.1).log()
    passed = tilted(refs, vector(0, 1), 1 / math.log(9))
    yield given(same_value("entropy at β = 1/ln 9: ln 2", math.log(2), float(entropy(passed)), 1e-12))


@PRELIMINARIES.claim("T7", "§3")
def penalised_rewards_follow_the_objective() -> Iterator[Finding]:
    """Reinforcement learning on the reward r - β (log π_θ - log π_ref) follows the gradient of Eq 3.

    The expected policy gradient, by enumeration, against autograd of Eq 3 at 50 random policies.
    """

    def value(logits: Tensor) -> Tensor:
        return objective(logits.log_softmax(0), REF_LOGPS, REWARDS, 0.7)

    differences = []
    for logps in random_policies(50, 4, seed=3):
        penalised = REWARDS - 0.7 * (logps - REF_LOGPS)
        expected = gradient_moments(logps, penalised).mean
        differences.append(expected - grad(value)(logps))
    yield vanishes("largest difference of both gradients", torch.stack(differences), 1e-12)


# ---------------------------------------------------------------- section 4: the optimum and the loss

OBJECTIVE = PAPER.section("The objective's optimum and DPO's loss (section 4)")


@OBJECTIVE.claim("T1", "abstract, §4")
def a_classification_loss_optimises_the_objective() -> Iterator[Finding]:
    """A simple binary cross-entropy optimises the RL objective exactly.

    The maximum of Eq 3 against the minimum of Eq 7's exact expectation under Bradley-Terry labels of all pairs.
    """
    for beta in BETAS:
        distance = total_variation(dpo_optimum(beta), maximise_objective(beta).policy)
        yield vanishes(f"β = {beta:g}, distance of both optima", distance, 1e-8)


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
        distances.append(total_variation(optimum.policy, optimal_logps(beta).exp()))
        values.append(-optimum.loss - float(maximum))
        excesses.append(float(objective(policies, REF_LOGPS, REWARDS, beta).max() - maximum))

    yield vanishes("β from 0.1 to 5, distance of Newton's optimum", max(distances), 1e-8)
    yield vanishes("its value less β log Z", vector(*values))
    yield judged("best of 10,000 random policies less β log Z", "< 0", max(excesses), max(excesses) < 0)


@OBJECTIVE.claim("T9", "Eq 5")
def the_reward_in_terms_of_its_policy() -> Iterator[Finding]:
    """A reward is β log π_r/π_ref + β log Z, with its own optimal policy π_r.

    The optimal policies are those of Newton's method on Eq 3.
    """
    for beta in MODERATE_BETAS:
        log_ratios = maximise_objective(beta).policy.log() - REF_LOGPS
        rewards = beta * (log_ratios + log_partition(REF_LOGPS, REWARDS, beta))
        yield vanishes(f"β = {beta:g}, all completions: less r", rewards - REWARDS, 1e-8)


@OBJECTIVE.claim("T10", "Eq 6")
def preferences_in_terms_of_the_policy() -> Iterator[Finding]:
    """The preferences follow from π* and π_ref alone: Z cancels.

    The likelihood exp(-loss) of Eq 7 at the policy that maximises Eq 3, against Eq 1, for all ordered pairs.
    """
    expected = bradley_terry(REWARDS.exp(), PAIRS)
    for beta in MODERATE_BETAS:
        logps = maximise_objective(beta).policy.log()
        likelihoods = (-dpo_loss(logps[PAIRS], REF_LOGPS[PAIRS], beta)).exp()
        yield vanishes(f"β = {beta:g}, probabilities less Eq 1", likelihoods - expected, 1e-8)


def exact_margins(logps: Tensor, ref_logps: Tensor, beta: float) -> list[Decimal]:
    """β h of pairs (B, 2), without rounding."""
    margins = []
    quadruples = torch.cat([logps, ref_logps], dim=1)
    for quadruple in quadruples.tolist():
        winner, loser, ref_winner, ref_loser = map(Decimal, quadruple)
        log_ratio = winner - ref_winner - (loser - ref_loser)
        margins.append(Decimal(beta) * log_ratio)
    return margins


@OBJECTIVE.claim("T11", "Eq 7")
def the_dpo_loss() -> Iterator[Finding]:
    """The loss of a pair is -log σ(β log π_θ(y_w)/π_ref(y_w) - β log π_θ(y_l)/π_ref(y_l)).

    Against 50-digit arithmetic. tests/test_exactness.py compares whole training runs with a plain loop.
    """
    logps = random_numbers(50, 2, seed=4, scale=20.0)
    ref_logps = random_numbers(50, 2, seed=5, scale=20.0)
    for beta in (0.1, 0.5):
        exact = exact_log_losses(exact_margins(logps, ref_logps, beta))
        yield vanishes(f"β = {beta:g}, 50 pairs", dpo_loss(logps, ref_logps, beta) - exact, 1e-12)


@OBJECTIVE.claim("T12", "Eqs 2, 7")
def dpo_is_a_reward_model() -> Iterator[Finding]:
    """Eq 7 is the loss of a reward model, Eq 2, with the reward β log π_θ/π_ref.

    The gradients with respect to log π_θ differ by the factor β of the change of variables.
    """
    logps = random_numbers(50, 2, seed=6, scale=5.0)
    ref_logps = random_numbers(50, 2, seed=7, scale=5.0)
    implicit = 0.3 * (logps - ref_logps)
    yield vanishes("50 pairs, difference of both losses", dpo_loss(logps, ref_logps, 0.3) - rm_loss(implicit), 1e-12)

    def total_of_policy(x: Tensor) -> Tensor:
        return dpo_loss(x, ref_logps, 0.3).sum()

    def total_of_rewards(x: Tensor) -> Tensor:
        return rm_loss(x).sum()

    of_policy = grad(total_of_policy)(logps)
    of_rewards = grad(total_of_rewards)(implicit)
    yield vanishes("gradient less β times that of Eq 2", of_policy - 0.3 * of_rewards, 1e-12)


@functools.cache
def fitted_policies(size: int) -> Tensor:
    """The policies that minimise Eq 7 at β = 0.5 on the data sets of a size, all at once: (RUNS, 4)."""
    weights = draw_pairs(size).flatten()
    ref_logps = REF_LOGPS.expand(RUNS, 4)

    def loss(logits: Tensor) -> Tensor:
        logps = logits.view(RUNS, 4).log_softmax(1)
        losses = dpo_loss(of_orders(logps, PAIRS), of_orders(ref_logps, PAIRS), 0.5)
        return weights @ losses

    optimum = minimise(loss, ref_logps.flatten())
    return optimum.parameters.view(RUNS, 4).softmax(1)


def distance_to_optimum(size: int) -> float:
    """Root mean square distance of the fitted policies to π*, over the data sets of a size."""
    optimum = optimal_logps(0.5).exp()
    distances = (fitted_policies(size) - optimum).abs().sum(1) / 2
    return float(distances.square().mean().sqrt())


def is_strongly_connected(wins: Tensor) -> bool:
    """Whether wins lead from each completion to each other one. wins: (K, K), 1 where row has won against column."""
    reach = torch.eye(len(wins)) + wins
    for _ in range(len(wins)):
        reach = ((reach @ reach) > 0).float()
    return bool((reach > 0).all())


def rises_in_every_direction(pairs: Tensor) -> bool:
    """Whether Eq 7, summed over the pairs of three completions, rises without bound in every direction.

    It is convex in the log-ratios, so only then is its minimum finite. It is enough to look at the directions that
    raise a set of completions by the same amount.
    """
    far = 1e6
    ref_logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for raised in range(1, 7):
        log_ratios = vector(*[far * (raised >> completion & 1) for completion in range(3)])
        if dpo_loss(log_ratios[pairs], ref_logps, 1.0).sum() < far / 2:
            return False
    return True


@OBJECTIVE.claim("T13", "§4")
def dpo_is_consistent() -> Iterator[Finding]:
    """DPO is a reparametrised Bradley-Terry model, and so consistent under suitable assumptions on the data.

    The assumption: wins lead from each completion to each other one. Without it there is no finite optimum, or it is
    not unique. Data sets as in T4, β = 0.5; and all sets of wins among three completions.
    """
    of_rewards = tilted(REF_LOGPS, fitted_rewards(1_000), 0.5).exp()
    yield vanishes("10 data sets: policy less Eq 4 of the fitted reward", fitted_policies(1_000) - of_rewards, 1e-8)
    exponent = slope([distance_to_optimum(size) for size in SIZES])
    yield judged("slope of log distance to π* over log n", "-0.5 ± 0.1", exponent, abs(exponent + 0.5) < 0.1)

    all_wins = ordered_pairs(3)
    connected = 0
    disagreements = 0
    for subset in range(1, 64):
        pairs = all_wins[[subset >> win & 1 == 1 for win in range(6)]]
        wins = torch.zeros(3, 3)
        wins[pairs[:, 0], pairs[:, 1]] = 1
        connected += is_strongly_connected(wins)
        disagreements += is_strongly_connected(wins) != rises_in_every_direction(pairs)
    yield same_value("sets of wins of which only one is true: connected, finite optimum", 0, disagreements)
    yield given(same_value("connected ones (OEIS A003030)", 18, connected))

    weights = labels(REWARDS, TWO_PARTS)
    first = fit_dpo(weights, TWO_PARTS, 0.5)
    second = fit_dpo(weights, TWO_PARTS, 0.5, start=REF_LOGPS + vector(2, 2, 0, 0))
    distance = total_variation(first.policy, second.policy)
    yield judged("two separate pairs: distance of optima from two starts", "> 0.1", distance, distance > 0.1)


QUANTILES = (torch.arange(4_096, dtype=torch.float64) + 0.5) / 4_096
NORMAL_REWARDS = torch.special.ndtri(QUANTILES)  # of equally likely completions
NORMAL_REFS = uniform_logps(4_096)


def relative_error(beta: float) -> float:
    """Standard deviation of exp(r/β)/Z for one sample of π_ref: √(Z(β/2)/Z(β)² - 1)."""
    log_second = log_partition(NORMAL_REFS, NORMAL_REWARDS, beta / 2)
    log_first = log_partition(NORMAL_REFS, NORMAL_REWARDS, beta)
    return math.sqrt(math.expm1(log_second - 2 * log_first))


@OBJECTIVE.claim("T30", "§4")
def the_partition_function_is_expensive() -> Iterator[Finding]:
    """It is expensive to estimate the partition function Z(x).

    4,096 equally likely completions with normal rewards of standard deviation 1. The relative error of n samples is
    exact; 500 estimates from 1,000 samples each check it.
    """
    at_one = 100 * relative_error(1.0) ** 2
    at_tenth = 100 * relative_error(0.1) ** 2
    yield reported("samples for a relative error of 10%, β = 1", at_one)
    yield judged("the same, β = 0.1", "> 100,000", at_tenth, at_tenth > 1e5)
    of_normal_law = at_one / (100 * math.expm1(1))
    is_near = abs(of_normal_law - 1) < 0.05
    yield given(judged("β = 1, over the normal law's e^(1/β²) - 1", "1 ± 0.05", of_normal_law, is_near))

    generator = torch.Generator().manual_seed(8)
    draws = torch.randint(4_096, (500, 1_000), generator=generator)
    estimates = NORMAL_REWARDS[draws].exp().mean(1)
    spread = float(estimates.std() / estimates.mean())
    ratio = spread * math.sqrt(1_000) / relative_error(1.0)
    yield given(judged("β = 1, 500 estimates: their spread over the exact one", "1 ± 0.1", ratio, abs(ratio - 1) < 0.1))


@OBJECTIVE.claim("L1", "Eq 7 (ours)")
def the_loss_of_a_pair_at_the_reference() -> Iterator[Finding]:
    """At π_θ = π_ref, where training starts, the loss of every pair is ln 2."""
    logps = random_numbers(8, 2, seed=9, scale=5.0) - 20
    yield vanishes("8 random pairs, less ln 2", dpo_loss(logps, logps, 0.1) - math.log(2), 1e-12)


@OBJECTIVE.claim("L2", "Eq 20 (ours)")
def the_loss_of_a_ranking_at_the_reference() -> Iterator[Finding]:
    """At π_θ = π_ref the loss of K ranked completions is ln K!, since all orders are equally likely."""
    for k in (3, 4, 8):
        logps = random_numbers(8, k, seed=k, scale=5.0) - 20
        losses = dpo_loss(logps, logps, 0.1)
        yield vanishes(f"K = {k}, 8 random rankings, less ln K!", losses - math.log(math.factorial(k)), 1e-12)


# ---------------------------------------------------------------- section 4: the gradient

GRADIENT = PAPER.section("The gradient (section 4)")
SHARED_FEATURES = random_numbers(4, 2, seed=10)  # two parameters for four completions


def shared_logps(theta: Tensor) -> Tensor:
    """Log-probs of a policy whose completions share parameters."""
    return (SHARED_FEATURES @ theta).log_softmax(0)


def gradient_of_the_loss(theta: Tensor, beta: float) -> Tensor:
    """Autograd of Eq 7 under Bradley-Terry labels of all pairs."""

    def loss(parameters: Tensor) -> Tensor:
        return LABELS @ dpo_loss(shared_logps(parameters)[PAIRS], REF_LOGPS[PAIRS], beta)

    return grad(loss)(theta)


def weighted_gradient(theta: Tensor, beta: float, sign: int) -> Tensor:
    """-β E[σ(sign · (r̂_l - r̂_w)) (∇log π(y_w) - ∇log π(y_l))], with ∇log π(y) = φ(y) - E_π[φ]."""
    implicit = beta * (shared_logps(theta) - REF_LOGPS)
    winners = PAIRS[:, 0]
    losers = PAIRS[:, 1]
    weights = torch.sigmoid(sign * (implicit[losers] - implicit[winners]))
    brackets = SHARED_FEATURES[winners] - SHARED_FEATURES[losers]  # E_π[φ] cancels
    return -beta * (LABELS * weights) @ brackets


THETAS = random_numbers(20, 2, seed=11, scale=2.0)


@GRADIENT.claim("T14", "§4")
def the_gradient_of_the_loss() -> Iterator[Finding]:
    """The gradient of Eq 7 is -β E[σ(r̂_l - r̂_w) (∇log π(y_w) - ∇log π(y_l))], with r̂ = β log π_θ/π_ref.

    Against autograd at 20 random policies whose completions share parameters.
    """
    for beta in (0.1, 2.0):
        differences = [gradient_of_the_loss(theta, beta) - weighted_gradient(theta, beta, 1) for theta in THETAS]
        yield vanishes(f"β = {beta:g}, largest difference", torch.stack(differences), 1e-12)


def pair_weight(margin: float) -> float:
    """The weight of a pair's gradient at a margin βh: the slope of Eq 7 in log π(y_w), over -β."""

    def loss(logps: Tensor) -> Tensor:
        return dpo_loss(logps, torch.zeros_like(logps), 0.1)[0]

    logps = vector(10 * margin, 0)[None]
    slopes = grad(loss)(logps)
    return float(-slopes[0, 0] / 0.1)


@GRADIENT.claim("T15", "§4")
def wrong_pairs_weigh_more() -> Iterator[Finding]:
    """Pairs weigh the more, the more the implicit reward puts them in the wrong order."""
    yield same_value("weight at π_ref", 0.5, pair_weight(0), 1e-12)
    yield same_value("wrong order, βh = -40", 1, pair_weight(-40), 1e-12)
    yield vanishes("right order, βh = 40", pair_weight(40), 1e-12)
    weights = vector(*[pair_weight(margin) for margin in range(-20, 21)])
    largest = float(weights.diff().max())
    yield judged("largest change of the weight with βh", "< 0", largest, largest < 0)


FEATURES = vector(1, 0, 3)  # of the chosen, the rejected and a third completion: log π = θ · feature - log Z


def changes_along_step(logps_of: Callable[[Tensor], Tensor], start: Tensor) -> list[float]:
    """The changes of log π(y_w) and log π(y_l) along a step of gradient descent on Eq 7, β = 1, from π_ref.

    logps_of: parameters → log-probs of y_w, y_l and further completions.
    """
    refs = logps_of(start)

    def loss(parameters: Tensor) -> Tensor:
        return dpo_loss(logps_of(parameters)[None, :2], refs[None, :2], 1.0)[0]

    step = -grad(loss)(start)
    _, changes = jvp(logps_of, (start,), (step,))
    return changes[:2].tolist()


@GRADIENT.claim("T16", "§4", expected=Verdict.CORRECTED)
def the_update_raises_the_chosen_completion() -> Iterator[Finding]:
    """Intuitively, a step on the loss increases the likelihood of the preferred completion.

    Not if completions share parameters: with one parameter, the mass goes to a third completion. What a step on one
    pair surely raises is h. With a logit of its own for each completion, the likelihood of y_w rises too.
    """
    start = torch.zeros((), dtype=torch.float64)
    change, rival_change = changes_along_step(lambda theta: (FEATURES * theta).log_softmax(0), start)
    yield judged("change of log π(y_w) along the step", "> 0", change, change > 0)
    yield given(same_value("the same by hand, (1 - 4/3)/2", -1 / 6, change, 1e-12))
    yield instead(same_value("change of h by hand, 1/2", 0.5, change - rival_change, 1e-12))

    logits = torch.zeros(3, dtype=torch.float64)
    change, _ = changes_along_step(lambda x: x.log_softmax(0), logits)
    yield given(same_value("with logits of their own, (1 - π_w + π_l)/2", 0.5, change, 1e-12))


def unlikelihood(logps: Tensor) -> Tensor:
    """The naive loss: -log π(y_w) + log π(y_l), appendix C.3 with α = 1. (B, 2) → (B,)."""
    return logps[:, 1] - logps[:, 0]


@GRADIENT.claim("T17", "§1, §4, Table 3", expected=Verdict.CORRECTED)
def the_weight_prevents_degeneration() -> Iterator[Finding]:
    """The weight σ(r̂_l - r̂_w) prevents the degeneration that a naive loss without it, unlikelihood, shows.

    It does if each completion also loses sometimes. If a pair is always labelled the same, DPO's loss falls for ever
    too; the weight then only slows the growth of h, from t to log t.
    """

    def naive_loss(logits: Tensor) -> Tensor:
        return LABELS @ unlikelihood(logits.log_softmax(0)[PAIRS])

    def loss(logits: Tensor) -> Tensor:
        return LABELS @ dpo_loss(logits.log_softmax(0)[PAIRS], REF_LOGPS[PAIRS], 0.3)

    naive = grad(naive_loss)(REF_LOGPS)
    weighted = grad(loss)(REF_LOGPS)
    yield given(vanishes("at π_ref: DPO's gradient less β/2 times the naive one", weighted - 0.15 * naive, 1e-12))
    further = float(naive_loss(REF_LOGPS + 1_000 * REWARDS))
    yield given(judged("drawn labels: naive loss at π_ref exp(1,000 r)", "< -100", further, further < -100))
    distance = total_variation(dpo_optimum(0.3), optimal_logps(0.3).exp())
    yield given(vanishes("drawn labels: distance of DPO's optimum to π*", distance, 1e-8))

    slope_left = pair_weight(100)
    yield judged("one pair, always the same label: weight left at βh = 100", "0", slope_left, slope_left == 0)
    yield instead(same_value("its weight at βh = 100, over e^-100", 1, slope_left / math.exp(-100), 1e-12))


GRADIENT.elsewhere(
    "T18",
    "§4",
    "Preferred-FT as π_ref mitigates the distribution shift where the pairs come from another policy.",
    "needs trained language models",
)

# ---------------------------------------------------------------- section 5.1

THEORY = PAPER.section("Equivalent rewards and Theorem 1 (section 5.1)")
FOURS = all_orders(4)


@THEORY.claim("T19", "Definition 1, Lemma 1")
def equivalent_rewards_mean_the_same_preferences() -> Iterator[Finding]:
    """Rewards that differ by a function of the prompt alone induce the same preferences (Plackett-Luce, Bradley-Terry).

    The losses of the reward model and of DPO, three prompts with their own shifts.
    """
    shifted = PROMPT_REWARDS + PROMPT_SHIFTS
    for name, orders in (("K = 2", PAIRS), ("K = 4", FOURS)):
        losses = rm_loss(of_orders(PROMPT_REWARDS, orders))
        after = rm_loss(of_orders(shifted, orders))
        yield vanishes(f"{name}, all orders: change of Eq 18's loss", after - losses, 1e-12)
        ref_logps = of_orders(PROMPT_REFS, orders)
        of_policy = dpo_loss(ref_logps + of_orders(shifted, orders) / 0.4, ref_logps, 0.4)
        yield vanishes(f"{name}: DPO's with r̂ = r + f(x), less Eq 18's", of_policy - losses, 1e-12)


@THEORY.claim("T20", "Lemma 2")
def equivalent_rewards_mean_the_same_policy() -> Iterator[Finding]:
    """Rewards that differ by a function of the prompt alone have the same optimal policy.

    The maximum of Eq 3 by Newton's method; its value moves by f(x).
    """
    for shift in (-2.0, 7.0):
        plain = maximise_objective(1.0)
        shifted = maximise_objective(1.0, shift)
        yield vanishes(
            f"f(x) = {shift:g}, distance of both optima", total_variation(plain.policy, shifted.policy), 1e-8
        )
        yield same_value(f"f(x) = {shift:g}, change of the value", shift, plain.loss - shifted.loss, 1e-10)


def flat_directions(compared: list[Tensor]) -> int:
    """In how many directions Eq 2 is flat at r*, for three prompts with these pairs: the Hessian's zero eigenvalues."""

    def loss(rewards: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for prompt, pairs in enumerate(compared):
            weights = labels(PROMPT_REWARDS[prompt], pairs)
            total = total + weights @ rm_loss(rewards.view(3, 4)[prompt, pairs])
        return total

    curvature = hessian(loss)(PROMPT_REWARDS.flatten())
    eigenvalues = torch.linalg.eigvalsh(curvature)
    return int((eigenvalues < 1e-12).sum())


@THEORY.claim("T21", "§5.1")
def rewards_need_identifiability_constraints() -> Iterator[Finding]:
    """The Plackett-Luce family is under-specified: estimates from Eq 2 need further constraints.

    One for each prompt, and one for each further group of completions that is compared with no other.
    """
    yield same_value("three prompts, all pairs: flat directions", 3, flat_directions([PAIRS, PAIRS, PAIRS]))
    yield same_value("a chain of pairs for one prompt", 3, flat_directions([PAIRS, CHAIN, PAIRS]))
    yield same_value("two separate pairs for one prompt", 4, flat_directions([PAIRS, TWO_PARTS, PAIRS]))


def projection(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The operator f(r; π_ref, β) = r - β log Z of Eq 8, for each prompt."""
    return rewards - beta * log_partition(ref_logps, rewards, beta).unsqueeze(-1)


@THEORY.claim("T22", "Theorem 1, Eq 8")
def every_class_is_represented() -> Iterator[Finding]:
    """Every class of rewards has a member β log π/π_ref: f(r) = r - β log Z, which is the same for the whole class.

    π is Newton's optimum of Eq 3; and three prompts with shifts of their own.
    """
    for beta in MODERATE_BETAS:
        log_ratios = maximise_objective(beta).policy.log() - REF_LOGPS
        projected = projection(REF_LOGPS, REWARDS, beta)
        yield vanishes(f"β = {beta:g}, f(r) less β log π_r/π_ref", projected - beta * log_ratios, 1e-8)

    projected = projection(PROMPT_REFS, PROMPT_REWARDS, 0.3)
    twice = projection(PROMPT_REFS, projected, 0.3)
    yield vanishes("f(f(r)) less f(r), three prompts", twice - projected, 1e-12)
    of_shifted = projection(PROMPT_REFS, PROMPT_REWARDS + PROMPT_SHIFTS, 0.3)
    yield vanishes("f(r + g(x)) less f(r)", of_shifted - projected, 1e-12)


@THEORY.claim("T23", "Eq 9")
def the_member_with_partition_function_one() -> Iterator[Finding]:
    """DPO selects the member of each class for which Σ_y π_ref exp(r/β) = 1, so that this sum is a distribution."""
    projected = projection(PROMPT_REFS, PROMPT_REWARDS, 0.3)
    policies = (PROMPT_REFS + projected / 0.3).exp()
    yield vanishes("three prompts: the sum less 1", policies.sum(1) - 1, 1e-12)
    best = dpo_optimum(0.5)
    of_class = (REF_LOGPS + projection(REF_LOGPS, REWARDS, 0.5) / 0.5).exp()
    yield vanishes("the distribution less the one that minimises Eq 7", best - of_class, 1e-8)


@THEORY.claim("T24", "Proposition 1")
def the_member_is_unique() -> Iterator[Finding]:
    """Only one reward of each class is β log π/π_ref for a policy π.

    Σ_y π_ref exp((r + c)/β) grows strictly with c, so it is 1 at one c. Bisection over c finds it.
    """
    shifts = torch.linspace(-5, 5, 101, dtype=torch.float64)[:, None]
    log_sums = log_partition(REF_LOGPS, REWARDS + shifts, 0.3)
    growth = log_sums.diff()
    yield vanishes("growth of log Σ less that of c/β", growth - 0.1 / 0.3, 1e-12)
    sign_changes = log_sums.sign().diff().count_nonzero()
    yield same_value("sign changes of log Σ over c from -5 to 5", 1, int(sign_changes))

    low = -5.0
    high = 5.0
    for _ in range(60):
        middle = (low + high) / 2
        if log_partition(REF_LOGPS, REWARDS + middle, 0.3) > 0:
            high = middle
        else:
            low = middle
    of_projection = float((projection(REF_LOGPS, REWARDS, 0.3) - REWARDS)[0])
    yield same_value("the c at which the sum is 1, and f's", of_projection, low, 1e-12)


@THEORY.claim("T25", "Theorem 1 (A.6)", expected=Verdict.CORRECTED)
def positive_probabilities_are_enough() -> Iterator[Finding]:
    """Theorem 1 and Proposition 1 as restated: π_ref > 0 and β > 0 are enough for every class to have such a member.

    There are infinitely many completions of any length, and Z may be infinite: π_ref(n) = 2^-n, r(n) = n. At β = 1 a
    policy would have to be proportional to (e/2)^n, which has no finite sum. The condition Z(x) < ∞ is missing.
    """
    numbers = torch.arange(1, 201, dtype=torch.float64)
    ref_logps = -numbers * math.log(2)

    def last_half(beta: float) -> float:
        """The share of the completions 101 to 200 in the sum over the first 200."""
        return float(tilted(ref_logps, numbers, beta)[100:].exp().sum())

    yield judged(
        "β = 1: share of the terms 101 to 200 in Z's first 200", "< 0.01", last_half(1.0), last_half(1.0) < 0.01
    )
    ratio = math.e / 2
    log_sum = math.log(ratio / (ratio - 1)) + math.log(ratio**200 - 1)
    of_terms = float(log_partition(ref_logps, numbers, 1.0))
    yield given(same_value("β = 1, log of the first 200 terms' geometric sum", log_sum, of_terms, 1e-12))

    yield instead(judged("β = 2, Z is finite: the same share", "< 0.01", last_half(2.0), last_half(2.0) < 0.01))
    small = math.exp(0.5) / 2
    of_terms = float(log_partition(ref_logps, numbers, 2.0))
    yield instead(same_value("β = 2: log Z in closed form", math.log(small / (1 - small)), of_terms, 1e-8))


# ---------------------------------------------------------------- section 5.2

ACTOR_CRITIC = PAPER.section("Normalised rewards and the policy gradient (section 5.2)")


@ACTOR_CRITIC.claim("T26", "Eq 10")
def eq_10_is_a_divergence() -> Iterator[Finding]:
    """Eq 10, with the normalised reward, is what minimises KL(π_θ ‖ π*): its negative times β, with the maximum 0."""
    policies = random_policies(10_000, 4, seed=4)
    for beta in (0.1, 1.0, 5.0):
        values = objective(policies, REF_LOGPS, projection(REF_LOGPS, REWARDS, beta), beta)
        divergences = kl(policies, optimal_logps(beta))
        yield vanishes(f"β = {beta:g}, 10,000 policies: Eq 10 plus β KL", values + beta * divergences, 1e-12)
    normalised = -maximise_objective(1.0).loss - float(log_partition(REF_LOGPS, REWARDS, 1.0))
    yield vanishes("β = 1, value at Newton's optimum", normalised, 1e-10)


@ACTOR_CRITIC.claim("T27", "§5.2", expected=Verdict.CORRECTED)
def a_human_baseline_estimates_the_normaliser() -> Iterator[Finding]:
    """The normaliser β log Z is the soft value of π_ref. A human completion's reward is a one-sample estimate of it.

    exp(r/β) is an unbiased estimate of Z for a completion drawn from π_ref. Its β log, the reward, is on average too
    low by β KL(π_ref ‖ π*). Rewards 0 and 10, equally likely, β = 1; and a model with 1,093 completions.
    """
    ref = random_model(seed=1)
    rewards = random_numbers(1_093, seed=12)
    normaliser = 0.5 * log_partition(along_completions(ref), rewards, 0.5)
    yield given(
        same_value(
            "soft value by backups over tokens, β log Z", float(normaliser), soft_value(ref, rewards, 0.5), 1e-12
        )
    )

    two = vector(0, 10)
    normaliser = float(log_partition(uniform_logps(2), two, 1.0))
    mean = float(two.mean())
    yield given(same_digits("β log Z of rewards 0 and 10: log((1 + e^10)/2)", "9.306898", normaliser))
    yield same_value("mean of the one-sample estimates", normaliser, mean)
    bias = float(kl(uniform_logps(2), tilted(uniform_logps(2), two, 1.0)))
    yield instead(same_value("mean of the one-sample estimates, plus β KL(π_ref ‖ π*)", normaliser, mean + bias, 1e-12))


def half_way(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Log-probs of the policy whose probabilities are the mean of those of π_ref and π*."""
    optimum = tilted(ref_logps, rewards, beta)
    return (ref_logps.exp() + optimum.exp()).log() - math.log(2)


def gradient_variance(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float, baseline: float) -> float:
    """The variance of one sample's policy gradient of Eq 10, summed over the logits."""
    advantages = rewards - beta * (logps - ref_logps) - baseline
    return gradient_moments(logps, advantages).variance


THREE_REFS = vector(0.4, 0.4, 0.2).log()
THREE_REWARDS = vector(5, 3, 0)


@ACTOR_CRITIC.claim("T28", "§5.2")
def the_gradient_varies_more_without_the_normaliser() -> Iterator[Finding]:
    """Without the normaliser β log Z the policy gradient could have a high variance.

    π_ref = (.4, .4, .2), r = (5, 3, 0), by enumeration. The converse occurs too: on two completions with r = ±1,
    β = 0.1, at π_ref the variance is 0 without the normaliser.
    """

    def variances(logps: Tensor, beta: float) -> tuple[float, float]:
        """With the normaliser, and without."""
        normaliser = float(beta * log_partition(THREE_REFS, THREE_REWARDS, beta))
        with_it = gradient_variance(logps, THREE_REFS, THREE_REWARDS, beta, normaliser)
        return with_it, gradient_variance(logps, THREE_REFS, THREE_REWARDS, beta, 0.0)

    optimum = tilted(THREE_REFS, THREE_REWARDS, 1.0)
    with_it, without = variances(optimum, 1.0)
    yield vanishes("β = 1, at π*, with it", with_it, 1e-20)
    log_sum = float(log_partition(THREE_REFS, THREE_REWARDS, 1.0))
    fisher = float(1 - optimum.exp().square().sum())  # trace of diag(π) - ππᵀ
    yield same_value("β = 1, at π*, without it: (β log Z)² tr(diag π - ππᵀ)", log_sum**2 * fisher, without)

    ratios = []
    for beta in BETAS:
        for logps in (THREE_REFS, half_way(THREE_REFS, THREE_REWARDS, beta)):
            with_it, without = variances(logps, beta)
            ratios.append(with_it / without)
    largest = max(ratios)
    yield judged("the paper's four β, at π_ref and half-way: with over without", "< 1", largest, largest < 1)
    with_mean = gradient_variance(THREE_REFS, THREE_REFS, THREE_REWARDS, 1.0, 3.2)
    by_hand = (variances(THREE_REFS, 1.0)[1], with_mean)
    yield given(same_digits("at π_ref by hand: without it, with the mean reward instead", "6.6816, 1.7664", *by_hand))

    two = uniform_logps(2)
    signs = vector(1, -1)
    of_signs = float(0.1 * log_partition(two, signs, 0.1))
    growth = gradient_variance(two, two, signs, 0.1, of_signs) - gradient_variance(two, two, signs, 0.1, 0.0)
    yield given(
        same_value("r = ±1, β = 0.1, at π_ref: with less without, (β log Z)²/2", of_signs**2 / 2, growth, 1e-12)
    )


@ACTOR_CRITIC.claim("T29", "§5.2")
def implicit_rewards_need_no_baseline() -> Iterator[Finding]:
    """DPO's implicit reward needs no baseline: its normaliser is 0 for every policy.

    All 1,093 completions of a random model and a random reference, token by token.
    """
    policy = random_model(seed=2)
    ref = random_model(seed=3)
    for beta in (0.1, 1.0):
        implicit = along_completions(beta * (policy - ref))
        normaliser = beta * log_partition(along_completions(ref), implicit, beta)
        yield vanishes(f"β = {beta:g}, β log Σ π_ref exp(r̂/β)", float(normaliser), 1e-12)
    yield given(
        same_value("completions with up to five words, and with six", sum(3**k for k in range(7)), len(implicit))
    )


# ---------------------------------------------------------------- appendices A and B

APPENDIX = PAPER.section("Derivations and code (appendices A and B)")


@APPENDIX.claim("A1", "Eqs 11-15")
def the_objective_is_a_divergence_to_the_optimum() -> Iterator[Finding]:
    """For every policy, E_π[r] - β KL(π ‖ π_ref) = β (log Z - KL(π ‖ π*)), so that π* is the only optimum.

    The chain's "max = min" means the same optimisers: the values differ by the factor -β.
    """
    policies = random_policies(10_000, 4, seed=5)
    differences = []
    least = []
    for beta in (0.1, 1.0, 5.0):
        divergences = kl(policies, optimal_logps(beta))
        expected = beta * (log_partition(REF_LOGPS, REWARDS, beta) - divergences)
        differences.append(objective(policies, REF_LOGPS, REWARDS, beta) - expected)
        least.append(float(divergences.min()))
    yield vanishes("10,000 policies, β from 0.1 to 5: difference of both sides", torch.stack(differences), 1e-12)
    yield judged("least KL(π ‖ π*) of these", "> 0", min(least), min(least) > 0)


@APPENDIX.claim("A2", "Eqs 16-17", expected=Verdict.CORRECTED)
def the_last_line_is_the_loss() -> Iterator[Finding]:
    """With Eq 17 in Eq 16, Z cancels, and A.2's last line, σ(r̂(y_1) - r̂(y_2)), is the per-instance loss of Eq 7.

    The line is the probability of the label. The loss is its negative logarithm.
    """
    rewards = REWARDS / 2 + 3  # Eq 17 with β log Z = 3
    logps = REF_LOGPS + REWARDS / 2 / 0.5
    margins = rewards[PAIRS[:, 0]] - rewards[PAIRS[:, 1]]
    last_line = torch.sigmoid(margins)
    yield given(vanishes("Eq 16 less the last line", bradley_terry(rewards.exp(), PAIRS) - last_line, 1e-12))
    losses = dpo_loss(logps[PAIRS], REF_LOGPS[PAIRS], 0.5)
    yield vanishes("loss of Eq 7 less the last line", losses - last_line)
    yield instead(vanishes("loss of Eq 7 plus the log of the last line", losses + last_line.log(), 1e-12))


@APPENDIX.claim("A3", "Eq 18", expected=Verdict.CORRECTED)
def rankings_follow_plackett_luce() -> Iterator[Finding]:
    """Plackett-Luce, Eq 18: of what is left, a completion is chosen with probability proportional to its reward.

    Eq 18 has the exponential of the reward. Its case K = 2 is Bradley-Terry.
    """
    likelihoods = (-rm_loss(REWARDS[FOURS])).exp()
    yield given(vanishes("24 orders: exp(-loss) less Eq 18", likelihoods - plackett_luce(REWARDS, FOURS), 1e-12))
    yield given(vanishes("their sum less 1", float(likelihoods.sum() - 1), 1e-12))
    of_pairs = plackett_luce(REWARDS[:2], all_orders(2))
    difference = of_pairs - bradley_terry(REWARDS[:2].exp(), all_orders(2))
    yield given(vanishes("K = 2: Eq 18 less Bradley-Terry", difference, 1e-12))

    first = float((-rm_loss(vector(2, 1)[None])).exp())
    yield same_value("rewards 2 and 1: the first is chosen with 2/3", 2 / 3, first)
    yield instead(same_value("with e²/(e² + e)", math.e / (math.e + 1), first, 1e-12))


@APPENDIX.claim("A4", "Eq 19")
def rankings_in_terms_of_the_policy() -> Iterator[Finding]:
    """The probability of a ranking follows from π* and π_ref alone, as that of a pair does.

    All 24 orders: exp(-loss) of Eq 20 at the policy that maximises Eq 3, against sequential choice by exp(r).
    """
    expected = plackett_luce(REWARDS, FOURS)
    for beta in MODERATE_BETAS:
        logps = maximise_objective(beta).policy.log()
        likelihoods = (-dpo_loss(logps[FOURS], REF_LOGPS[FOURS], beta)).exp()
        yield vanishes(f"β = {beta:g}, probabilities less Eq 18", likelihoods - expected, 1e-8)


def exact_ranking_loss(rewards: list[Decimal]) -> float:
    """-log P(y_1 ≻ y_2 ≻ ...) of Eq 18 to 50 digits."""
    with localcontext() as context:
        context.prec = 50
        loss = Decimal(0)
        for place, reward in enumerate(rewards):
            loss += sum(other.exp() for other in rewards[place:]).ln() - reward
        return float(loss)


@APPENDIX.claim("A5", "Eq 20")
def the_ranking_loss() -> Iterator[Finding]:
    """DPO's loss of K ranked completions is the negative log of Eq 19.

    Against 50-digit arithmetic. tests/test_exactness.py compares whole training runs on four ranked completions.
    """
    for k in (2, 3, 4, 8):
        logps = random_numbers(20, k, seed=20 + k, scale=20.0)
        ref_logps = random_numbers(20, k, seed=30 + k, scale=20.0)
        expected = []
        for row, ref_row in zip(logps.tolist(), ref_logps.tolist(), strict=True):
            log_ratios = map(operator.sub, map(Decimal, row), map(Decimal, ref_row))
            rewards = [log_ratio / 2 for log_ratio in log_ratios]
            expected.append(exact_ranking_loss(rewards))
        yield vanishes(f"K = {k}, 20 rankings", dpo_loss(logps, ref_logps, 0.5) - vector(*expected), 1e-12)


@APPENDIX.claim("A6", "Eqs 7, 20 (ours)")
def rankings_and_their_pairs_have_the_same_optimum() -> Iterator[Finding]:
    """Under Plackett-Luce rankings, Eq 20 is least at π_r, and so is Eq 7 on all pairs of the rankings.

    The pairs of such a ranking follow Bradley-Terry, though the two losses differ.
    """
    rewards = vector(1.0, 0.2, -0.5)
    orders = all_orders(3)
    probabilities = plackett_luce(rewards, orders)
    pairs_of_ranking = torch.tensor([[0, 1], [0, 2], [1, 2]])

    def ranking_losses(logps: Tensor) -> Tensor:
        return dpo_loss(logps[orders], THREE_REFS[orders], 0.5)

    def pair_losses(logps: Tensor) -> Tensor:
        pairs = orders[:, pairs_of_ranking].flatten(0, 1)  # (orders · 3, 2)
        losses = dpo_loss(logps[pairs], THREE_REFS[pairs], 0.5)
        return losses.view(-1, 3).sum(1)

    optimum = tilted(THREE_REFS, rewards, 0.5).exp()
    yield given(same_digits("π_r", ".8151, .1646, .0203", *optimum.tolist()))
    for name, losses in (("Eq 20", ranking_losses), ("Eq 7 on all pairs", pair_losses)):
        policy = fit_policy(losses, probabilities, THREE_REFS).policy
        yield vanishes(f"{name}: distance of the optimum to π_r", total_variation(policy, optimum), 1e-8)
    differences = pair_losses(optimum.log()) - ranking_losses(optimum.log())
    gap = float(differences.abs().max())
    yield judged("largest difference of both losses of a ranking", "> 0.1", gap, gap > 0.1)


@APPENDIX.claim("A7", "A.4, Eqs 21-22", expected=Verdict.CORRECTED)
def the_gradient_as_derived() -> Iterator[Finding]:
    """A.4 derives the gradient of Eq 7 with the weight σ(r̂_w - r̂_l).

    y_w and y_l are exchanged in Eqs 21 and 22 and in the weight. Section 4 has the weight of Eq 7, σ(r̂_l - r̂_w).
    """
    printed = [gradient_of_the_loss(theta, 2.0) - weighted_gradient(theta, 2.0, -1) for theta in THETAS]
    yield vanishes("20 policies: autograd less the gradient as printed", torch.stack(printed))
    right = [gradient_of_the_loss(theta, 2.0) - weighted_gradient(theta, 2.0, 1) for theta in THETAS]
    yield instead(vanishes("autograd less the gradient of section 4", torch.stack(right), 1e-12))
    yield instead(same_digits("weight at βh = 2, not σ(2) = .881", ".119", pair_weight(2)))


def losses_by_index(logps: Tensor, ref_logps: Tensor, yw_idx: Tensor, yl_idx: Tensor, beta: float) -> Tensor:
    """The code of appendix B: completions (B,), and pairs as indices into them (T,) → (T,)."""
    log_ratios = logps[yw_idx] - logps[yl_idx]
    ref_log_ratios = ref_logps[yw_idx] - ref_logps[yl_idx]
    return -F.logsigmoid(beta * (log_ratios - ref_log_ratios))


@APPENDIX.claim("A8", "App. B")
def the_code_is_the_loss() -> Iterator[Finding]:
    """The code of appendix B, with pairs as indices into completions, gives the loss of Eq 7.

    Also where pairs share completions: six pairs of four completions, as in C.1.
    """
    six = torch.combinations(torch.arange(4), 2)
    logps = random_numbers(4, seed=13, scale=5.0)

    def by_index(x: Tensor) -> Tensor:
        return losses_by_index(x, REF_LOGPS, six[:, 0], six[:, 1], 0.1)

    def by_row(x: Tensor) -> Tensor:
        return dpo_loss(x[six], REF_LOGPS[six], 0.1)

    yield vanishes("six pairs: difference of the losses", by_index(logps) - by_row(logps), 1e-12)
    gradient = jacrev(by_index)(logps).sum(0)
    difference = gradient - jacrev(by_row)(logps).sum(0)
    yield vanishes("difference of the gradients of their sum", difference, 1e-12)

    ranking_loss = float(dpo_loss(logps[None], REF_LOGPS[None], 0.1))
    gap = abs(ranking_loss - float(by_row(logps).sum()))
    yield given(judged("six pairs are not one ranking: Eq 20's loss is another", "> 0.01", gap, gap > 0.01))


# ---------------------------------------------------------------- experiments

EXPERIMENTS = PAPER.section("Experiments (section 6, appendices C and D)")
NEEDS_MODELS = "needs trained language models"

EXPERIMENTS.elsewhere(
    "E1",
    "§6.1, Fig 2",
    "On IMDB sentiment DPO has the best frontier of reward against KL of all methods.",
    NEEDS_MODELS,
)
EXPERIMENTS.elsewhere(
    "E2",
    "§6.1, Fig 2",
    "DPO's frontier is better than PPO's, even where PPO has the ground-truth reward.",
    NEEDS_MODELS,
)


@EXPERIMENTS.claim("E3", "Eq 4, Fig 2 (ours)")
def no_policy_lies_above_the_frontier() -> Iterator[Finding]:
    """No policy lies above the curve of reward against KL that the optima of Eq 4 form, and DPO's optima lie on it.

    So what Fig 2 compares is how well the methods optimise: PPO with the ground-truth reward has the same optimum.
    """
    policies = random_policies(10_000, 4, seed=6)
    rewards = (policies.exp() * REWARDS).sum(1)
    excess = rewards - frontier(REF_LOGPS, REWARDS, kl(policies, REF_LOGPS))
    yield judged("most that 10,000 random policies lie above it", "< 0", float(excess.max()), excess.max() < 0)

    optima = torch.stack([dpo_optimum(beta) for beta in BETAS])
    on_curve = frontier(REF_LOGPS, REWARDS, kl(optima.log(), REF_LOGPS))
    yield vanishes("DPO's optima at the paper's four β: distance from it", optima @ REWARDS - on_curve, 1e-8)
    divergence_of_best = vector(-math.log(0.1))
    last = float(frontier(REF_LOGPS, REWARDS, divergence_of_best))
    yield given(same_value("its end: the best reward, at KL = -log π_ref(best)", 2, last))


@EXPERIMENTS.claim("E4", "§3, §6.1")
def larger_beta_is_more_conservative() -> Iterator[Finding]:
    """β sets how conservative the policy is: DPO with a larger β ends nearer to π_ref.

    For labels drawn from Bradley-Terry; E5 has labels without noise. The optima are those of Newton's method on Eq 7.
    """

    def divergence(beta: float) -> float:
        return float(kl(dpo_optimum(beta).log(), REF_LOGPS))

    divergences = vector(*[divergence(beta) for beta in BETAS])
    changes = divergences.diff()
    yield judged("β = .05, .1, 1, 5: largest change of the KL", "< 0", float(changes.max()), changes.max() < 0)
    measured = (divergence(1.001) - divergence(0.999)) / 0.002
    policy = optimal_logps(1.0).exp()
    variance = float(policy @ REWARDS.square() - (policy @ REWARDS) ** 2)
    yield given(same_value("its slope at β = 1: -Var(r)/β³ over π*", -variance, measured, 1e-5))


NOISE_FREE = PAIRS[REWARDS[PAIRS[:, 0]] > REWARDS[PAIRS[:, 1]]]  # the better completion always wins
STEPS = 500


@functools.cache
def divergences_of_descent(beta: float, has_noise: bool) -> Tensor:
    """KL(π_θ ‖ π_ref) after each step of gradient descent on Eq 7 from π_ref, at the rate 1/β²."""
    pairs = PAIRS
    weights = LABELS
    if not has_noise:
        pairs = NOISE_FREE
        weights = torch.full((len(pairs),), 1 / len(pairs), dtype=torch.float64)

    logits = REF_LOGPS.clone().requires_grad_()
    divergences = []
    for _ in range(STEPS):
        loss = weights @ dpo_loss(logits.log_softmax(0)[pairs], REF_LOGPS[pairs], beta)
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= gradient / beta**2
            divergences.append(kl(logits.log_softmax(0), REF_LOGPS))
    return torch.stack(divergences)


@EXPERIMENTS.claim("E5", "C.1, Eq 7 (ours)")
def noise_free_labels_have_no_optimum() -> Iterator[Finding]:
    """On pairs labelled without noise, as those of C.1, Eq 7 has no finite optimum: at every β the policy tends to the
    best completion alone, and the KL depends on when training stops.

    Until then β matters too: it sets how fast the policy gets there.
    """
    losses = []
    divergences = []
    for beta in BETAS:
        logps = tilted(REF_LOGPS, 1_000 * REWARDS, beta)
        losses.append(dpo_loss(logps[NOISE_FREE], REF_LOGPS[NOISE_FREE], beta))
        divergences.append(float(kl(logps, REF_LOGPS)))
    yield vanishes("losses at π_ref exp(1,000 r/β), the paper's four β", torch.stack(losses), 1e-12)
    yield vanishes("KL there less -log π_ref(best)", vector(*divergences) + math.log(0.1), 1e-12)

    without_noise = divergences_of_descent(1.0, has_noise=False)
    rise = float(without_noise[-1] - without_noise[99])
    yield judged("β = 1: KL after 500 steps less that after 100, nats", "> 0.1", rise, rise > 0.1)
    with_noise = divergences_of_descent(1.0, has_noise=True)
    at_optimum = float(kl(optimal_logps(1.0), REF_LOGPS))
    yield given(same_value("drawn labels, β = 1: KL after 500 steps, π*'s", at_optimum, float(with_noise[-1]), 1e-6))


@EXPERIMENTS.claim("E6", "footnote 3")
def the_divergence_is_a_sum_over_tokens() -> Iterator[Finding]:
    """The sequence-level KL is the sum of the per-timestep KLs, along completions of the policy.

    All 1,093 completions of two random models. Along one sample, the sum of KLs varies less than the log-ratio.
    """
    policy = random_model(seed=4)
    ref = random_model(seed=5)
    logps = along_completions(policy)
    log_ratios = logps - along_completions(ref)
    divergence = float(kl(logps, along_completions(ref)))
    steps = kl(policy, ref)
    visits = along_prefixes(policy).exp()
    yield same_value("sum over prefixes of their KL, as often as visited", divergence, float(visits @ steps), 1e-12)

    sums = along_completions(steps[:, None].expand_as(policy))
    yield same_value("mean of the sums of KLs along completions", divergence, float(logps.exp() @ sums), 1e-12)
    of_sums = logps.exp() @ (sums - divergence).square()
    of_log_ratios = logps.exp() @ (log_ratios - divergence).square()
    spread = float(of_sums / of_log_ratios)
    yield judged("variance of the sum of KLs over that of the log-ratio", "< 1", spread, spread < 1)


EXPERIMENTS.elsewhere(
    "E7",
    "§6.2, Fig 2",
    "On TL;DR DPO wins against the reference summaries in about 61% of cases, PPO in 57%, both at temperature 0.",
    NEEDS_MODELS,
)
EXPERIMENTS.elsewhere(
    "E8", "§6.2, Fig 2", "DPO is much more robust to the sampling temperature than PPO.", NEEDS_MODELS
)
EXPERIMENTS.elsewhere(
    "E9", "§6.2, Fig 2", "DPO's best win rate on TL;DR is higher than that of the best of N samples.", NEEDS_MODELS
)
EXPERIMENTS.elsewhere("E10", "§6.2", "Preferred-FT does not improve significantly over the SFT model.", NEEDS_MODELS)
EXPERIMENTS.elsewhere(
    "E11",
    "§6.2, §6.4",
    "Humans prefer DPO's samples at temperature 0.25 over PPO's at temperature 0 in 58% of cases.",
    "needs trained language models; E27 has the interval of the 58%",
)
EXPERIMENTS.elsewhere(
    "E12",
    "§6.2, Fig 3",
    "On HH dialogue DPO alone, of the methods that draw one sample, wins against the preferred completions.",
    NEEDS_MODELS,
)
EXPERIMENTS.elsewhere(
    "E13", "§6.2, Fig 3", "DPO converges quickly, and its gain is stable over training and temperatures.", NEEDS_MODELS
)


@EXPERIMENTS.claim("E14", "Fig 4")
def best_of_n_plateaus() -> Iterator[Finding]:
    """The performance of the best of N samples plateaus after roughly 64 to 128 samples.

    The exact part: its win rate against one sample of the same policy under the same reward is N/(N + 1), for any law
    of the rewards without ties. The mean reward grows on. 4,096 equally likely completions with normal rewards.
    """
    policy = NORMAL_REFS.exp()
    sizes = (1, 4, 16, 64, 128)
    best = {n: best_of(policy, NORMAL_REWARDS, n) for n in sizes}
    rates = [win_rate(best[n], policy, NORMAL_REWARDS) for n in sizes]
    yield given(same_digits("win rates at N = 1, 4, 16, 64, 128: N/(N + 1)", ".500, .800, .941, .985, .992", *rates))
    gain = rates[-1] - rates[-2]
    yield judged("gain of the win rate from N = 64 to 128", "< 0.01", gain, gain < 0.01)
    gain = float((best[128] - best[64]) @ NORMAL_REWARDS)
    yield reported("gain of the reward from N = 64 to 128, standard deviations", gain)


@EXPERIMENTS.claim("E15", "§6.2")
def best_of_128_is_a_proxy() -> Iterator[Finding]:
    """Best of 128 is a rough proxy for what PPO reaches on the same reward function.

    The exact part: the distribution of the best of 128, and the largest reward of Eq 3 at the same KL. A trained PPO is
    not compared. Best of N has no β; its KL to the policy it samples from is at most log N - (N - 1)/N.
    """
    best = best_of(NORMAL_REFS.exp(), NORMAL_REWARDS, 128)
    divergence = kl(best.log(), NORMAL_REFS)
    reward = float(best @ NORMAL_REWARDS)
    largest = float(frontier(NORMAL_REFS, NORMAL_REWARDS, divergence[None])[0])
    yield judged("its reward over the largest at the same KL", "0.9 to 1", reward / largest, 0.9 < reward / largest < 1)
    bound = math.log(128) - 127 / 128
    yield given(same_value("its KL in nats: log N - (N - 1)/N", bound, float(divergence), 1e-2))
    yield given(judged("the KL over that bound", "≤ 1", float(divergence) / bound, float(divergence) <= bound))


EXPERIMENTS.elsewhere(
    "E16",
    "§6.3, Table 1",
    "On CNN/DailyMail, new to both, DPO outperforms PPO by a significant margin.",
    "needs trained language models; E27 has the number of prompts from which the margin is significant",
)

# Table 2: percentages for DPO and for PPO at temperature 1, each against PPO at temperature 0
HUMAN_WINS = {"DPO": 0.58, "SFT": 0.43, "PPO-1": 0.17}
JUDGE_WINS = {
    "S": {"DPO": 0.47, "SFT": 0.27, "PPO-1": 0.13},
    "C": {"DPO": 0.54, "SFT": 0.32, "PPO-1": 0.12},
}
HUMAN_AGREEMENT = {"DPO": 0.65, "PPO-1": 0.87}
JUDGE_AGREEMENT = {"S": {"DPO": 0.70, "PPO-1": 0.86}, "C": {"DPO": 0.67, "PPO-1": 0.85}}


def kappa(agreement: float, first: float, second: float) -> float:
    """Cohen's κ: agreement beyond that of independent raters who prefer the first method with these probabilities."""
    by_chance = first * second + (1 - first) * (1 - second)
    return (agreement - by_chance) / (1 - by_chance)


@EXPERIMENTS.claim("E17", "§6.4, Table 2")
def humans_agree_with_the_judge() -> Iterator[Finding]:
    """Humans agree with GPT-4 about as much as they agree with each other.

    Arithmetic on Table 2. Corrected for chance, the judge's κ is larger than the humans' for DPO, and smaller for
    PPO-1, where the humans' has a standard error of about 0.12 (100 comparisons).
    """
    shortfalls = []
    kappas = []
    for method, agreement in HUMAN_AGREEMENT.items():
        wins = HUMAN_WINS[method]
        kappas.append(kappa(agreement, wins, wins))
        for prompt in ("S", "C"):
            of_judge = JUDGE_AGREEMENT[prompt][method]
            shortfalls.append(agreement - of_judge)
            kappas.append(kappa(of_judge, wins, JUDGE_WINS[prompt][method]))

    yield judged("largest shortfall of the judge's agreement", "≤ 0.05", max(shortfalls), max(shortfalls) <= 0.05)
    yield given(same_digits("κ for DPO: humans, (S), (C)", ".282, .406, .331", *kappas[:3]))
    yield given(same_digits("κ for PPO-1: humans, (S), (C)", ".539, .453, .398", *kappas[3:]))
    largest_gap = kappas[3] - kappas[5]
    error = math.sqrt(0.87 * 0.13 / 100) / (2 * 0.17 * 0.83)
    yield judged(
        "humans' κ less (C)'s for PPO-1, standard errors", "< 1.96", largest_gap / error, largest_gap < 1.96 * error
    )


@EXPERIMENTS.claim("E18", "§6.4, Table 2")
def the_concise_prompt_is_nearer_to_humans() -> Iterator[Finding]:
    """The prompt (C), which asks for concise summaries, gives win rates more representative of humans than (S).

    Arithmetic on Table 2. That (S) prefers longer summaries needs the judge.
    """
    distances = {}
    for prompt, wins in JUDGE_WINS.items():
        distances[prompt] = [abs(wins[method] - HUMAN_WINS[method]) for method in HUMAN_WINS]
    yield given(same_digits("(S), mean distance to the humans' win rates: 31/300", ".1033", sum(distances["S"]) / 3))
    mean = sum(distances["C"]) / 3
    yield judged("(C), mean distance", "< .1033", mean, mean < 31 / 300)


EXPERIMENTS.elsewhere("E19", "C.1", "The reward model's best checkpoint of 3 epochs is taken.", NEEDS_MODELS)
EXPERIMENTS.elsewhere(
    "E20", "title, §5.1", "DPO's implicit reward orders held-out pairs as a reward model does.", NEEDS_MODELS
)
EXPERIMENTS.elsewhere("E21", "abstract, §7", "DPO needs virtually no tuning of its hyper-parameters.", NEEDS_MODELS)
EXPERIMENTS.elsewhere(
    "E22",
    "abstract, §6",
    "DPO is computationally lightweight; the best of N costs N samples for each query.",
    "docs/performance.md measures DPO's training steps; the comparison needs trained language models",
)
EXPERIMENTS.elsewhere("E23", "abstract", "DPO's training is stable.", NEEDS_MODELS)
EXPERIMENTS.elsewhere(
    "E24", "§7", "Labels from the DPO policy itself may make use of prompts without labels.", NEEDS_MODELS
)
EXPERIMENTS.elsewhere(
    "E25", "§7", "DPO policies generalise out of distribution as well as an explicit reward does.", NEEDS_MODELS
)
EXPERIMENTS.elsewhere(
    "E26",
    "Tables 4-10",
    "Samples of DPO, PPO and the data set, with GPT-4's judgments, one of them wrong.",
    "samples of models that are not here",
)


def prompts_needed(first: float, second: float) -> float:
    """From how many prompts each on two win rates differ at 95%, unpaired: 1.96² (p(1-p) + q(1-q)) / (p - q)²."""
    variance = first * (1 - first) + second * (1 - second)
    return 1.96**2 * variance / (first - second) ** 2


@EXPERIMENTS.claim("E27", "D.3, Table 2")
def the_human_study_in_numbers() -> Iterator[Finding]:
    """24 raters with 25 summaries each give 275 + 200 + 125 judgments; about 1% are ties; 58% is more than chance.

    Two raters saw 125 of the 150 comparisons with DPO and one saw 25. With κ = .282 between them, the variance of the
    58% is 1 + κ (Σm²/Σm - 1) = 1.256 times that of 272 independent judgments.
    """
    of_dpo = 150 * 2 - 25
    yield same_value("judgments: 24 times 25", 600, of_dpo + 100 * 2 + 125)
    ties = 1 - (272 + 122 + 199) / 600
    yield judged("share of ties", "0.01 ± 0.005", ties, abs(ties - 0.01) < 0.005)

    squares = 125 * 2**2 + 25
    inflation = 1 + kappa(0.65, 0.58, 0.58) * (squares / of_dpo - 1)
    low = 0.58 - 1.96 * math.sqrt(inflation * 0.58 * 0.42 / 272)
    yield judged("lower end of the 95% interval of the 58%", "> 0.5", low, low > 0.5)
    yield given(same_digits("variance of the 58% over that of 272 independent ones", "1.256", inflation))
    needed = (prompts_needed(0.61, 0.57), prompts_needed(0.36, 0.26))
    yield given(
        same_digits("prompts from which E7's and E16's rates differ (n not given)", "1159.683, 162.423", *needed)
    )


EXPERIMENTS.elsewhere(
    "E28",
    "§6.2",
    "No prompt or temperature makes the public PPO model for HH better than its base model.",
    "a model that is not here",
)

# ---------------------------------------------------------------- figures


def plot_frontier(axes: "Axes") -> None:
    """Reward against KL: random policies, the curve of Eq 4, and DPO's optima."""
    policies = random_policies(3_000, 4, seed=6)
    divergences = kl(policies, REF_LOGPS)
    axes.plot(divergences, policies.exp() @ REWARDS, ".", color=GREY, markersize=2, alpha=0.4)
    axes.plot([], [], ".", color=GREY, label="random policies")

    betas = torch.logspace(-2, 2, 200, dtype=torch.float64)[:, None]
    curve = tilted(REF_LOGPS, REWARDS, betas)
    axes.plot(kl(curve, REF_LOGPS), curve.exp() @ REWARDS, color=BLUE, label="optima of Eq 3, any β")
    for beta, name, offset in (
        (0.05, "0.05 and 0.1", (-54, -24)),
        (1.0, "1", (8, -12)),
        (5.0, "5", (8, 0)),
    ):
        policy = dpo_optimum(beta)
        place = (float(kl(policy.log(), REF_LOGPS)), float(policy @ REWARDS))
        axes.plot(*place, "o", color=ORANGE)
        axes.annotate(name, place, xytext=offset, textcoords="offset points", fontsize=8)

    axes.plot([], [], "o", color=ORANGE, label="optima of DPO, with β")
    ref_reward = float(REF_LOGPS.exp() @ REWARDS)
    axes.plot(0, ref_reward, "s", color=BLACK, label="π_ref", zorder=3)
    label_axes(axes, "The frontier", "KL(π ‖ π_ref) (nats)", "expected reward")


def plot_consistency(axes: "Axes") -> None:
    """Errors of sampled data sets against their size."""
    errors = [error_of_rewards(n) for n in SIZES]
    distances = [distance_to_optimum(n) for n in SIZES]
    axes.loglog(SIZES, errors, "o-", color=BLUE, label="Eq 2: error of the rewards")
    axes.loglog(SIZES, distances, "s-", color=ORANGE, label="Eq 7: distance to π* (total variation)")
    guide = [2 * n**-0.5 for n in SIZES]
    axes.loglog(SIZES, guide, ":", color=GREY, label="slope -½")
    label_axes(axes, f"Sampled pairs, {RUNS} data sets", "pairs n", "root mean square error")


def plot_descent(axes: "Axes") -> None:
    """KL over steps of gradient descent on labels with and without noise."""
    steps = range(1, STEPS + 1)
    for beta, color in ((0.3, ORANGE), (1.0, BLUE)):
        axes.semilogx(
            steps, divergences_of_descent(beta, has_noise=True), color=color, label=f"drawn labels, β = {beta:g}"
        )
        without = divergences_of_descent(beta, has_noise=False)
        axes.semilogx(steps, without, "--", color=color, label=f"noise-free labels, β = {beta:g}")
    axes.axhline(-math.log(0.1), color=GREY, linestyle=":", label="the best completion alone")
    axes.set_ylim(-0.1, 3.7)  # room for the legend
    label_axes(axes, "Labels without noise", "steps of gradient descent, rate 1/β²", "KL(π ‖ π_ref) (nats)")


@PAPER.figure(
    "Left: no policy lies above the optima of Eq 3, and DPO's optima under Bradley-Terry labels lie on the curve. "
    "Middle: on sampled pairs DPO and the reward model are consistent. Right: if the better completion always wins, "
    "the KL grows with the steps at every β; with drawn labels it ends at the optimum's."
)
def optimum() -> "Figure":
    figure, panels = canvas(["abc"], (14, 4.2))
    plot_frontier(panels["a"])
    plot_consistency(panels["b"])
    plot_descent(panels["c"])
    return figure


def plot_variance(axes: "Axes") -> None:
    """The variance of the policy gradient with and without the normaliser as its baseline, over β."""
    betas = torch.logspace(-1.3, 1, 60, dtype=torch.float64).tolist()
    places = (
        ("π_ref", BLUE, lambda beta: THREE_REFS),
        ("half-way", GREEN, lambda beta: half_way(THREE_REFS, THREE_REWARDS, beta)),
        ("π*", ORANGE, lambda beta: tilted(THREE_REFS, THREE_REWARDS, beta)),
    )
    for name, color, policy_of in places:
        without = [gradient_variance(policy_of(b), THREE_REFS, THREE_REWARDS, b, 0.0) for b in betas]
        axes.semilogx(betas, without, "--", color=color, label=f"{name}, without")
        with_it = []
        for beta in betas:
            normaliser = float(beta * log_partition(THREE_REFS, THREE_REWARDS, beta))
            with_it.append(gradient_variance(policy_of(beta), THREE_REFS, THREE_REWARDS, beta, normaliser))
        axes.semilogx(betas, with_it, color=color, label=f"{name}, with β log Z")
    axes.set_ylim(-0.3, 11.5)  # room for the legend
    label_axes(axes, "Variance of the policy gradient, r = (5, 3, 0)", "β", "variance of one sample (squared reward)")


def plot_one_parameter(axes: "Axes") -> None:
    """The log-probs of the example of T16 over its parameter."""
    thetas = torch.linspace(-1, 1.5, 200, dtype=torch.float64)
    logps = (thetas[:, None] * FEATURES).log_softmax(1)
    axes.plot(thetas, logps[:, 0], color=BLUE, label="chosen, feature 1")
    axes.plot(thetas, logps[:, 1], color=ORANGE, label="rejected, feature 0")
    axes.plot(thetas, logps[:, 2], color=GREEN, label="third, feature 3")
    axes.plot(thetas, thetas, "--", color=PURPLE, label="h, the margin of the pair")
    axes.axvline(0, color=GREY, linestyle=":")
    axes.set_ylim(-5, 4)  # room for the legend
    axes.annotate("DPO's step", (0.75, -4.6), (0.04, -4.65), arrowprops={"arrowstyle": "->"}, fontsize=8)
    label_axes(axes, "One parameter: log π(chosen) falls from π_ref (θ = 0)", "θ", "log-probability, and h (nats)")


def plot_estimates(axes: "Axes") -> None:
    """The relative error of n-sample estimates of Z over β."""
    betas = torch.logspace(-1.3, 1, 60, dtype=torch.float64).tolist()
    for n, color in ((100, BLUE), (10_000, ORANGE), (1_000_000, GREEN)):
        errors = [relative_error(beta) / math.sqrt(n) for beta in betas]
        axes.loglog(betas, errors, color=color, label=f"n = {n:,}")
    axes.axhline(0.1, color=GREY, linestyle=":", label="10%")
    label_axes(
        axes, "Estimates of Z, 4,096 completions, normal rewards", "β (standard deviations of r)", "relative error"
    )


@PAPER.figure(
    "Left: the policy gradient of section 5.2 varies less with β log Z as its baseline, and not at all at π*. Middle: "
    "a policy with one parameter, whose chosen completion loses likelihood while the margin h grows. Right: an "
    "estimate of Z from n samples of π_ref fails as β falls."
)
def gradient() -> "Figure":
    figure, panels = canvas(["abc"], (14, 4.2))
    plot_variance(panels["a"])
    plot_one_parameter(panels["b"])
    plot_estimates(panels["c"])
    return figure


def main(args: Args) -> None:
    paper_command(PAPER, args)


if __name__ == "__main__":
    checked_command(main, Args)
