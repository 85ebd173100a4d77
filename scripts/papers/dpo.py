"""DPO, arXiv 2305.18290: its objective, its optimum, its loss and its theory, on tabular policies.

A policy has one logit for each completion of a prompt, in float64. The losses are those of algos/dpo.py and algos/rm.py.
Optima are found by Newton's method; expectations are sums over all completions.

    python scripts/papers/dpo.py
    python scripts/papers/dpo.py --claim T8
"""

import functools
import math
import random
from collections.abc import Iterator
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from algos.dpo import dpo_loss
from algos.rm import rm_loss
from scripts.lab.claim_files import Args, run_paper
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
    Moments,
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


@functools.cache
def maximise_objective(beta: float, shift: float = 0.0) -> Optimum:
    """The policy that maximises Eq 3 with the rewards r + shift, by Newton's method from π_ref."""

    def loss(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(0)
        return -objective(logps, REF_LOGPS, REWARDS + shift, beta)

    return minimise(loss, REF_LOGPS)


def fit_dpo(weights: Tensor, pairs: Tensor, beta: float, start: Tensor = REF_LOGPS) -> Optimum:
    """The policy that minimises Eq 7 over pairs with these weights, by Newton's method."""

    def losses(logps: Tensor) -> Tensor:
        return dpo_loss(logps[pairs], REF_LOGPS[pairs], beta)

    return fit_policy(losses, weights, start)


# ---------------------------------------------------------------- section 3

PRELIMINARIES = PAPER.section("Preferences, reward models and the RL objective (section 3)")


def exact_log_losses(margins: list[Decimal]) -> Tensor:
    """-log σ(margin) to 50 digits."""
    with localcontext() as context:
        context.prec = 50
        return vector(*[float((1 + (-margin).exp()).ln()) for margin in margins])


@PRELIMINARIES.claim("T2", "Eq 1")
def preferences_follow_bradley_terry() -> Iterator[Finding]:
    """The probability that y_1 is preferred over y_2 is exp r(y_1) / (exp r(y_1) + exp r(y_2)).

    The probability exp(-loss) of the reward model's loss, and the made-up labels of scripts/notices.py, are compared.
    """
    likelihoods = (-rm_loss(REWARDS[PAIRS])).exp()
    yield vanishes("exp(-loss) of all pairs less Eq 1", likelihoods - bradley_terry(REWARDS.exp(), PAIRS), 1e-14)
    both_orders = likelihoods + (-rm_loss(REWARDS[PAIRS.flip(1)])).exp()
    yield vanishes("both orders of a pair: their sum less 1", both_orders - 1, 1e-14)

    rng = random.Random(5)
    wins = sum(rank_by_preference([1.0, 0.0], rng)[0] == 0 for _ in range(4_000))
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
    yield same_value("equal rewards: ln 2", math.log(2), float(rm_loss(vector(3, 3)[None])), 1e-15)


def fit_rewards(weights: Tensor) -> Optimum:
    """The rewards that minimise Eq 2. weights: (tables, pairs), of PAIRS; parameters: (tables · 4)."""

    def loss(parameters: Tensor) -> Tensor:
        rewards = parameters.view(-1, 4)
        losses = rm_loss(rewards[:, PAIRS].flatten(0, 1))
        return weights.flatten() @ losses

    return minimise(loss, torch.zeros(4 * len(weights), dtype=torch.float64))


SIZES = (100, 1_000, 10_000, 100_000)  # pairs in a data set
RUNS = 20  # data sets of each size


def draw_pairs(size: int) -> Tensor:
    """Shares of the pairs in RUNS data sets: pairs uniform, labels by Bradley-Terry. (RUNS, pairs)."""
    generator = torch.Generator().manual_seed(size)
    draws = torch.multinomial(labels(REWARDS, PAIRS), RUNS * size, replacement=True, generator=generator)
    counts = [run.bincount(minlength=len(PAIRS)) for run in draws.view(RUNS, size)]
    return torch.stack(counts) / size


@functools.cache
def fitted_rewards(size: int) -> Tensor:
    """The maximum-likelihood rewards of the data sets of a size, with mean 0: (RUNS, 4)."""
    rewards = fit_rewards(draw_pairs(size).double()).parameters.view(-1, 4)
    return rewards - rewards.mean(1, keepdim=True)


def slope(values: list[float]) -> float:
    """The slope of log(value) over log(size), by least squares over SIZES."""
    x = vector(*SIZES).log()
    x = x - x.mean()
    return float(x @ vector(*values).log() / (x @ x))


def rewards_information() -> Tensor:
    """Fisher information of one drawn pair about the rewards: E[σ'(Δr) (e_i - e_j)(e_i - e_j)ᵀ], (4, 4)."""
    differences = torch.eye(4, dtype=torch.float64)[PAIRS].diff(dim=1).squeeze(1)
    losing = bradley_terry(REWARDS.exp(), PAIRS.flip(1))
    weights = labels(REWARDS, PAIRS) * losing  # p(1 - p) of a pair appears once in each order
    return differences.T @ (weights[:, None] * differences)


@PRELIMINARIES.claim("T4", "Eq 2")
def maximum_likelihood_recovers_the_reward() -> Iterator[Finding]:
    """Maximum likelihood on pairs drawn from Eq 1 estimates the latent reward, up to a term f(x) of the prompt.

    Exact expectation on three prompts; then 20 sampled data sets of 100 to 100,000 pairs, whose root mean square error
    has to fall like n^-½ and to meet the Cramér-Rao bound.
    """
    weights = torch.stack([labels(rewards, PAIRS) for rewards in PROMPT_REWARDS])
    shifts = fit_rewards(weights).parameters.view(3, 4) - PROMPT_REWARDS
    yield vanishes("exact expectation: r - r* less its mean, each prompt", shifts - shifts.mean(1, keepdim=True), 1e-8)

    errors = []
    for size in SIZES:
        differences = fitted_rewards(size) - (REWARDS - REWARDS.mean())
        errors.append(float(differences.square().sum(1).mean().sqrt()))
    exponent = slope(errors)
    yield judged("slope of log error over log n", "-0.5 ± 0.1", exponent, abs(exponent + 0.5) < 0.1)

    bound = float(torch.linalg.pinv(rewards_information()).trace()) / SIZES[-1]
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
    before = rm_loss(PROMPT_REWARDS[:, PAIRS].flatten(0, 1))
    after = rm_loss(normalised[:, PAIRS].flatten(0, 1))
    yield vanishes("change of the loss of any pair", after - before, 1e-14)
    policies = tilted(PROMPT_REFS, normalised, 0.5) - tilted(PROMPT_REFS, PROMPT_REWARDS, 0.5)
    yield vanishes("change of the optimal log-probs", policies, 1e-12)


@PRELIMINARIES.claim("T6", "Eq 3")
def beta_keeps_the_policy_near_the_reference() -> Iterator[Finding]:
    """The KL term keeps the policy near π_ref, and keeps it from collapsing to a single high-reward answer.

    The entropy need not fall with β: π_ref = (.9, .1), r = (0, 1) passes the uniform policy at β = 1/ln 9.
    """
    betas = torch.logspace(-5, 3, 81, dtype=torch.float64)[:, None]
    optima = tilted(REF_LOGPS, REWARDS, betas)
    rises = kl(optima, REF_LOGPS).diff()
    yield judged("β from 1e-5 to 1e3: largest change of KL(π ‖ π_ref)", "≤ 0", float(rises.max()), rises.max() <= 1e-12)
    yield vanishes("β = 1e3, distance to π_ref", total_variation(optima[-1].exp(), REF_LOGPS.exp()), 1e-3)

    least = maximise_objective(0.5).policy.min()
    floor = (REF_LOGPS - (REWARDS.max() - REWARDS) / 0.5).exp().min()
    yield judged(
        "β = 0.5: rarest completion, over π_ref exp((r - max r)/β)", "≥ 1", float(least / floor), least >= floor
    )
    collapsed = total_variation(optima[0].exp(), vector(0, 0, 0, 1))
    yield given(vanishes("β = 1e-5, distance to the best completion alone", collapsed, 1e-12))
    passed = tilted(vector(0.9, 0.1).log(), vector(0, 1), 1 / math.log(9))
    yield given(same_value("entropy at β = 1/ln 9: ln 2", math.log(2), float(entropy(passed)), 1e-12))


@PRELIMINARIES.claim("T7", "§3")
def penalised_rewards_follow_the_objective() -> Iterator[Finding]:
    """Reinforcement learning on the reward r - β (log π_θ - log π_ref) follows the gradient of Eq 3.

    The expected policy gradient, by enumeration, against autograd of Eq 3 at 50 random policies.
    """
    differences = []
    for logits in random_policies(50, 4, seed=3):
        penalised = REWARDS - 0.7 * (logits - REF_LOGPS)
        gradient = torch.func.grad(lambda x: objective(x.log_softmax(0), REF_LOGPS, REWARDS, 0.7))(logits)
        differences.append(gradient_moments(logits, penalised).mean - gradient)
    yield vanishes("largest difference of both gradients", torch.stack(differences), 1e-12)


# ---------------------------------------------------------------- section 4: the optimum and the loss

OBJECTIVE = PAPER.section("The objective's optimum and DPO's loss (section 4)")


@OBJECTIVE.claim("T1", "abstract, §4")
def a_classification_loss_optimises_the_objective() -> Iterator[Finding]:
    """A simple binary cross-entropy optimises the RL objective exactly.

    The maximum of Eq 3 against the minimum of Eq 7's exact expectation under Bradley-Terry labels of all pairs.
    """
    for beta in BETAS:
        optimum = fit_dpo(labels(REWARDS, PAIRS), PAIRS, beta)
        distance = total_variation(optimum.policy, maximise_objective(beta).policy)
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
        distances.append(total_variation(optimum.policy, tilted(REF_LOGPS, REWARDS, beta).exp()))
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
    for (winner, loser), (ref_winner, ref_loser) in zip(logps.tolist(), ref_logps.tolist(), strict=True):
        log_ratio = Decimal(winner) - Decimal(ref_winner) - Decimal(loser) + Decimal(ref_loser)
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
    yield vanishes("50 pairs, difference of both losses", dpo_loss(logps, ref_logps, 0.3) - rm_loss(implicit), 1e-13)
    of_policy = torch.func.grad(lambda x: dpo_loss(x, ref_logps, 0.3).sum())(logps)
    of_rewards = torch.func.grad(lambda x: rm_loss(x).sum())(implicit)
    yield vanishes("gradient less β times that of Eq 2", of_policy - 0.3 * of_rewards, 1e-13)


@functools.cache
def fitted_policies(size: int) -> list[Tensor]:
    """The policies that minimise Eq 7 at β = 0.5 on the data sets of a size."""
    return [fit_dpo(shares.double(), PAIRS, 0.5).policy for shares in draw_pairs(size)]


def distance_to_optimum(size: int) -> float:
    """Root mean square distance of the fitted policies to π*, over the data sets of a size."""
    optimum = tilted(REF_LOGPS, REWARDS, 0.5).exp()
    distances = [total_variation(policy, optimum) for policy in fitted_policies(size)]
    return float(vector(*distances).square().mean().sqrt())


def is_strongly_connected(wins: Tensor) -> bool:
    """Whether wins lead from each completion to each other one. wins: (K, K), 1 where row has won against column."""
    reach = torch.eye(len(wins)) + wins
    for _ in range(len(wins)):
        reach = ((reach @ reach) > 0).float()
    return bool((reach > 0).all())


def is_bounded_below_only_inside(pairs: Tensor) -> bool:
    """Whether Eq 7, summed over the pairs of three completions, rises without bound in every direction.

    It is convex in the log-ratios, so only then is its minimum finite. The directions are those that raise a set of
    completions by the same amount.
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

    The assumption: wins lead from each completion to each other one. Without it there is no finite optimum, or none that
    is unique. Data sets as in T4, β = 0.5; and all 64 sets of wins among three completions.
    """
    policies = torch.stack(fitted_policies(1_000))
    of_rewards = tilted(REF_LOGPS, fitted_rewards(1_000), 0.5).exp()
    yield vanishes("20 data sets: policy less Eq 4 of the fitted reward", policies - of_rewards, 1e-8)
    exponent = slope([distance_to_optimum(size) for size in SIZES])
    yield judged("slope of log distance to π* over log n", "-0.5 ± 0.1", exponent, abs(exponent + 0.5) < 0.1)

    all_wins = ordered_pairs(3)
    connected = 0
    disagreements = 0
    for subset in range(1, 64):
        pairs = all_wins[[subset >> win & 1 == 1 for win in range(6)]]
        wins = torch.zeros(3, 3).index_put((pairs[:, 0], pairs[:, 1]), torch.ones(len(pairs)))
        connected += is_strongly_connected(wins)
        disagreements += is_strongly_connected(wins) != is_bounded_below_only_inside(pairs)
    yield same_value("sets of wins that are connected, or have a finite optimum, but not both", 0, disagreements)
    yield given(same_value("connected ones, as counted by others", 18, connected))

    two_parts = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
    starts = (REF_LOGPS, REF_LOGPS + vector(2, 2, 0, 0))
    first, second = [fit_dpo(labels(REWARDS, two_parts), two_parts, 0.5, start).policy for start in starts]
    distance = total_variation(first, second)
    yield judged("two separate pairs: distance of optima from two starts", "> 0.1", distance, distance > 0.1)


NORMAL_REWARDS = torch.special.ndtri((torch.arange(4_096, dtype=torch.float64) + 0.5) / 4_096)  # of equally likely ones
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
    is_near = abs(of_normal_law - 1) < 0.02
    yield given(judged("β = 1, over the normal law's e^(1/β²) - 1", "1 ± 0.02", of_normal_law, is_near))

    generator = torch.Generator().manual_seed(8)
    draws = torch.randint(4_096, (500, 1_000), generator=generator)
    estimates = NORMAL_REWARDS[draws].exp().mean(1)
    ratio = float(estimates.std() / estimates.mean()) * math.sqrt(1_000) / relative_error(1.0)
    yield given(judged("β = 1, 500 estimates: their spread over the exact one", "1 ± 0.1", ratio, abs(ratio - 1) < 0.1))


@OBJECTIVE.claim("L1", "Eq 7 (ours)")
def the_loss_of_a_pair_at_the_reference() -> Iterator[Finding]:
    """At π_θ = π_ref, where training starts, the loss of every pair is ln 2."""
    logps = random_numbers(8, 2, seed=9, scale=5.0) - 20
    yield vanishes("8 random pairs, less ln 2", dpo_loss(logps, logps, 0.1) - math.log(2), 1e-15)


@OBJECTIVE.claim("L2", "Eq 20 (ours)")
def the_loss_of_a_ranking_at_the_reference() -> Iterator[Finding]:
    """At π_θ = π_ref the loss of K ranked completions is ln K!, since all orders are equally likely."""
    for k in (3, 4, 8):
        logps = random_numbers(8, k, seed=k, scale=5.0) - 20
        losses = dpo_loss(logps, logps, 0.1)
        yield vanishes(f"K = {k}, 8 random rankings, less ln K!", losses - math.log(math.factorial(k)), 1e-13)


# ---------------------------------------------------------------- section 4: the gradient

GRADIENT = PAPER.section("The gradient (section 4)")
SHARED_FEATURES = random_numbers(4, 2, seed=10)  # two parameters for four completions


def shared_logps(theta: Tensor) -> Tensor:
    """Log-probs of a policy whose completions share parameters."""
    return (SHARED_FEATURES @ theta).log_softmax(0)


def gradient_of_the_loss(theta: Tensor, beta: float) -> Tensor:
    """Autograd of Eq 7, averaged over all ordered pairs."""

    def loss(parameters: Tensor) -> Tensor:
        return dpo_loss(shared_logps(parameters)[PAIRS], REF_LOGPS[PAIRS], beta).mean()

    return torch.func.grad(loss)(theta)


def weighted_gradient(theta: Tensor, beta: float, sign: int) -> Tensor:
    """-β E[σ(sign · (r̂_l - r̂_w)) (∇log π(y_w) - ∇log π(y_l))], with ∇log π(y) = φ(y) - E_π[φ]."""
    implicit = beta * (shared_logps(theta) - REF_LOGPS)
    winners = PAIRS[:, 0]
    losers = PAIRS[:, 1]
    weights = torch.sigmoid(sign * (implicit[losers] - implicit[winners]))
    brackets = SHARED_FEATURES[winners] - SHARED_FEATURES[losers]  # E_π[φ] cancels
    return -beta * (weights[:, None] * brackets).mean(0)


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
    slopes = torch.func.grad(lambda logps: dpo_loss(logps, torch.zeros_like(logps), 0.1)[0])(
        vector(10 * margin, 0)[None]
    )
    return float(-slopes[0, 0] / 0.1)


@GRADIENT.claim("T15", "§4")
def wrong_pairs_weigh_more() -> Iterator[Finding]:
    """Pairs weigh the more, the more the implicit reward puts them in the wrong order."""
    yield same_value("weight at π_ref", 0.5, pair_weight(0), 1e-15)
    yield same_value("wrong order, βh = -40", 1, pair_weight(-40), 1e-12)
    yield vanishes("right order, βh = 40", pair_weight(40), 1e-12)
    weights = vector(*[pair_weight(margin) for margin in range(-20, 21)])
    yield judged("largest change of the weight with βh", "< 0", float(weights.diff().max()), weights.diff().max() < 0)


FEATURES = vector(1, 0, 3)  # of the chosen, the rejected and a third completion: log π = θ · feature - log Z


@GRADIENT.claim("T16", "§4", expected=Verdict.FALSE)
def the_update_raises_the_chosen_completion() -> Iterator[Finding]:
    """A step on the loss increases the likelihood of the preferred completion.

    Not if completions share parameters: with one parameter, the mass goes to a third completion. What surely rises is
    h. With a logit of its own for each completion, the likelihood of y_w rises too.
    """
    theta = vector(0)[0]
    ref_logps = (FEATURES * theta).log_softmax(0)

    def logps_of(parameter: Tensor) -> Tensor:
        return (FEATURES * parameter).log_softmax(0)

    def loss(parameter: Tensor) -> Tensor:
        return dpo_loss(logps_of(parameter)[None, :2], ref_logps[None, :2], 1.0)[0]

    step = -torch.func.grad(loss)(theta)
    slopes = torch.func.jacrev(logps_of)(theta)
    change = float(slopes[0] * step)
    yield judged("change of log π(y_w) along the step", "> 0", change, change > 0)
    yield given(same_value("the same by hand, (1 - 4/3)/2", -1 / 6, change, 1e-15))
    yield given(same_value("change of h by hand, 1/2", 0.5, float((slopes[0] - slopes[1]) * step), 1e-15))

    def tabular_loss(logits: Tensor) -> Tensor:
        return dpo_loss(logits.log_softmax(0)[None, :2], ref_logps[None, :2], 1.0)[0]

    logits = torch.zeros(3, dtype=torch.float64)
    tabular_step = -torch.func.grad(tabular_loss)(logits)
    rise = float(torch.func.jacrev(lambda x: x.log_softmax(0)[0])(logits) @ tabular_step)
    yield given(same_value("with logits of their own, (1 - π_w + π_l)/2", 0.5, rise, 1e-15))


def unlikelihood(logps: Tensor) -> Tensor:
    """The naive loss: -log π(y_w) + log π(y_l), appendix C.3 with α = 1. (B, 2) → (B,)."""
    return logps[:, 1] - logps[:, 0]


@GRADIENT.claim("T17", "§1, §4, Table 3", expected=Verdict.CORRECTED)
def the_weight_prevents_degeneration() -> Iterator[Finding]:
    """The weight σ(r̂_l - r̂_w) prevents the degeneration that a naive loss without it, unlikelihood, shows.

    It does if each completion also loses sometimes. If a pair is always labelled the same, DPO's loss falls for ever too;
    the weight then only slows the growth of h, from t to log t.
    """

    def expected(losses: Tensor) -> Tensor:
        return labels(REWARDS, PAIRS) @ losses

    naive = torch.func.grad(lambda x: expected(unlikelihood(x.log_softmax(0)[PAIRS])))(REF_LOGPS)
    weighted = torch.func.grad(lambda x: expected(dpo_loss(x.log_softmax(0)[PAIRS], REF_LOGPS[PAIRS], 0.3)))(REF_LOGPS)
    yield vanishes("at π_ref: DPO's gradient less β/2 times the naive one", weighted - 0.15 * naive, 1e-14)
    further = float(expected(unlikelihood((REF_LOGPS + 1_000 * REWARDS)[PAIRS])))
    yield judged("drawn labels: naive loss at π_ref exp(1,000 r)", "< -100", further, further < -100)
    optimum = fit_dpo(labels(REWARDS, PAIRS), PAIRS, 0.3)
    distance = total_variation(optimum.policy, tilted(REF_LOGPS, REWARDS, 0.3).exp())
    yield vanishes("drawn labels: distance of DPO's optimum to π*", distance, 1e-8)

    slope_left = pair_weight(100)
    yield judged("one pair, always the same label: weight at βh = 100", "0", slope_left, slope_left == 0)
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
    """Rewards that differ by a function of the prompt alone induce the same Plackett-Luce and Bradley-Terry preferences.

    The losses of the reward model and of DPO, three prompts with their own shifts.
    """
    shifted = PROMPT_REWARDS + PROMPT_SHIFTS
    for name, orders in (("K = 2", PAIRS), ("K = 4", FOURS)):
        losses = rm_loss(PROMPT_REWARDS[:, orders].flatten(0, 1))
        after = rm_loss(shifted[:, orders].flatten(0, 1))
        yield vanishes(f"{name}, all orders: change of Eq 18's loss", after - losses, 1e-13)
        ref_logps = PROMPT_REFS[:, orders].flatten(0, 1)
        of_policy = dpo_loss(ref_logps + shifted[:, orders].flatten(0, 1) / 0.4, ref_logps, 0.4)
        yield vanishes(f"{name}: DPO's with r̂ = r + f(x), less Eq 18's", of_policy - losses, 1e-13)


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
            total = total + labels(PROMPT_REWARDS[prompt], pairs) @ rm_loss(rewards.view(3, 4)[prompt, pairs])
        return total

    hessian = torch.func.hessian(loss)(PROMPT_REWARDS.flatten())
    return int((torch.linalg.eigvalsh(hessian) < 1e-12).sum())


@THEORY.claim("T21", "§5.1")
def rewards_need_identifiability_constraints() -> Iterator[Finding]:
    """The Plackett-Luce family is under-specified: estimates from Eq 2 need further constraints.

    One for each prompt, and one for each further group of completions that is compared with no other.
    """
    two_parts = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
    yield same_value("three prompts, all pairs: flat directions", 3, flat_directions([PAIRS, PAIRS, PAIRS]))
    chain = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]])
    yield same_value("a chain of pairs for one prompt", 3, flat_directions([PAIRS, chain, PAIRS]))
    yield same_value("two separate pairs for one prompt", 4, flat_directions([PAIRS, two_parts, PAIRS]))


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
    yield vanishes("f(f(r)) less f(r), three prompts", twice - projected, 1e-13)
    of_shifted = projection(PROMPT_REFS, PROMPT_REWARDS + PROMPT_SHIFTS, 0.3)
    yield vanishes("f(r + g(x)) less f(r)", of_shifted - projected, 1e-13)


@THEORY.claim("T23", "Eq 9")
def the_member_with_partition_function_one() -> Iterator[Finding]:
    """DPO selects the member of each class for which Σ_y π_ref exp(r/β) = 1, so that this sum is a distribution."""
    projected = projection(PROMPT_REFS, PROMPT_REWARDS, 0.3)
    policies = (PROMPT_REFS + projected / 0.3).exp()
    yield vanishes("three prompts: the sum less 1", policies.sum(1) - 1, 1e-13)
    best = fit_dpo(labels(REWARDS, PAIRS), PAIRS, 0.5).policy
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
    yield same_value("sign changes of log Σ over c from -5 to 5", 1, int((log_sums.sign().diff() != 0).sum()))

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
        divergences = kl(policies, tilted(REF_LOGPS, REWARDS, beta))
        yield vanishes(f"β = {beta:g}, 10,000 policies: Eq 10 plus β KL", values + beta * divergences, 1e-12)
    normalised = -maximise_objective(1.0).loss - float(log_partition(REF_LOGPS, REWARDS, 1.0))
    yield vanishes("β = 1, value at Newton's optimum", normalised, 1e-10)


@ACTOR_CRITIC.claim("T27", "§5.2", expected=Verdict.CORRECTED)
def a_human_baseline_estimates_the_normaliser() -> Iterator[Finding]:
    """The normaliser β log Z is the soft value of π_ref, of which the reward of a human completion is a one-sample estimate.

    exp(r/β) is an unbiased estimate of Z for a completion drawn from π_ref. Its β log, the reward, is on average too low
    by β KL(π_ref ‖ π*). Rewards 0 and 10, equally likely, β = 1; and a model with 1,093 completions.
    """
    ref = random_model(seed=1)
    rewards = random_numbers(1_093, seed=12)
    normaliser = 0.5 * log_partition(along_completions(ref), rewards, 0.5)
    yield same_value(
        "soft value by backups over tokens, β log Z", float(normaliser), soft_value(ref, rewards, 0.5), 1e-12
    )

    two = vector(0, 10)
    normaliser = float(log_partition(uniform_logps(2), two, 1.0))
    mean = float(two.mean())
    yield given(same_digits("β log Z of rewards 0 and 10: log((1 + e^10)/2)", "9.306898", normaliser))
    yield same_value("mean of the one-sample estimates", normaliser, mean)
    bias = float(kl(uniform_logps(2), tilted(uniform_logps(2), two, 1.0)))
    yield instead(same_value("mean of the one-sample estimates, plus β KL(π_ref ‖ π*)", normaliser, mean + bias, 1e-12))


def advantages(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """r - β log π/π_ref: what the policy gradient of Eq 10 weighs a completion by, without a baseline."""
    return rewards - beta * (logps - ref_logps)


def half_way(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Log-probs of the policy whose probabilities are the mean of those of π_ref and π*."""
    optimum = tilted(ref_logps, rewards, beta)
    return (ref_logps.exp() + optimum.exp()).log() - math.log(2)


def gradient_variance(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float, baseline: float) -> float:
    """The variance of one sample's policy gradient, summed over the logits."""
    weights = advantages(logps, ref_logps, rewards, beta) - baseline
    return gradient_moments(logps, weights).variance


@ACTOR_CRITIC.claim("T28", "§5.2")
def the_gradient_varies_more_without_the_normaliser() -> Iterator[Finding]:
    """Without the normaliser β log Z the policy gradient could have a high variance.

    Three equally likely completions, r = (5, 3, 0), β = 1, by enumeration. The converse occurs too: on two completions
    with r = ±1, β = 0.1, at π_ref the variance is 0 without the normaliser.
    """
    refs = uniform_logps(3)
    rewards = vector(5, 3, 0)
    normaliser = float(log_partition(refs, rewards, 1.0))
    optimum = tilted(refs, rewards, 1.0)
    yield vanishes("at π*, with it", gradient_variance(optimum, refs, rewards, 1.0, normaliser), 1e-20)
    without = gradient_variance(optimum, refs, rewards, 1.0, 0.0)
    yield judged("at π*, without it", "> 1", without, without > 1)
    fisher = float(1 - optimum.exp().square().sum())  # trace of diag(π) - ππᵀ
    yield given(
        same_value("the same: (β log Z)² times the Fisher information's trace", normaliser**2 * fisher, without)
    )

    at_ref = gradient_variance(refs, refs, rewards, 1.0, 0.0)
    yield given(same_value("at π_ref, without it, in fractions: 166/27", 166 / 27, at_ref, 1e-12))
    two = uniform_logps(2)
    signs = vector(1, -1)
    of_signs = float(0.1 * log_partition(two, signs, 0.1))
    with_it = gradient_variance(two, two, signs, 0.1, of_signs)
    yield given(same_value("r = ±1, β = 0.1, at π_ref, with it: (β log cosh 10)²/2", of_signs**2 / 2, with_it, 1e-12))


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
    for beta in (0.1, 1.0, 5.0):
        divergences = kl(policies, tilted(REF_LOGPS, REWARDS, beta))
        expected = beta * (log_partition(REF_LOGPS, REWARDS, beta) - divergences)
        values = objective(policies, REF_LOGPS, REWARDS, beta)
        yield vanishes(f"β = {beta:g}, 10,000 policies: difference", values - expected, 1e-12)
        yield judged(f"β = {beta:g}, least KL(π ‖ π*)", "> 0", float(divergences.min()), divergences.min() > 0)


@APPENDIX.claim("A2", "Eqs 16-17", expected=Verdict.CORRECTED)
def the_last_line_is_the_loss() -> Iterator[Finding]:
    """With Eq 17 put into Eq 16, Z cancels, and the last line, σ(β log-ratio difference), is the per-instance loss of Eq 7.

    It is the probability of the label. The loss is its negative logarithm.
    """
    rewards = REWARDS / 2 + 3  # Eq 17 with β log Z = 3
    logps = REF_LOGPS + REWARDS / 2 / 0.5
    last_line = torch.sigmoid((rewards[PAIRS[:, 0]] - rewards[PAIRS[:, 1]]))
    yield vanishes("Eq 16 less the last line", bradley_terry(rewards.exp(), PAIRS) - last_line, 1e-14)
    losses = dpo_loss(logps[PAIRS], REF_LOGPS[PAIRS], 0.5)
    yield vanishes("loss of Eq 7 less the last line", losses - last_line)
    yield instead(vanishes("loss of Eq 7 plus the log of the last line", losses + last_line.log(), 1e-14))


@APPENDIX.claim("A3", "Eq 18", expected=Verdict.CORRECTED)
def rankings_follow_plackett_luce() -> Iterator[Finding]:
    """Eq 18, Plackett-Luce: rankings arise as the best of what is left is chosen with probability proportional to its reward.

    Eq 18 has the exponential of the reward, and Bradley-Terry as its case K = 2.
    """
    likelihoods = (-rm_loss(REWARDS[FOURS])).exp()
    yield vanishes("24 orders: exp(-loss) less Eq 18", likelihoods - plackett_luce(REWARDS, FOURS), 1e-14)
    yield vanishes("their sum less 1", float(likelihoods.sum() - 1), 1e-14)
    of_pairs = plackett_luce(REWARDS[:2], all_orders(2)) - bradley_terry(REWARDS[:2].exp(), all_orders(2))
    yield vanishes("K = 2: Eq 18 less Bradley-Terry", of_pairs, 1e-14)

    first = float((-rm_loss(vector(2, 1)[None])).exp())
    yield same_value("rewards 2 and 1: the first is chosen with 2/3", 2 / 3, first)
    yield instead(same_value("with e²/(e² + e)", math.e / (math.e + 1), first, 1e-14))


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
            log_ratios = [Decimal(x) - Decimal(y) for x, y in zip(row, ref_row, strict=True)]
            expected.append(exact_ranking_loss([Decimal(0.5) * log_ratio for log_ratio in log_ratios]))
        yield vanishes(f"K = {k}, 20 rankings", dpo_loss(logps, ref_logps, 0.5) - vector(*expected), 1e-12)


@APPENDIX.claim("A6", "Eqs 7, 20 (ours)")
def rankings_and_their_pairs_have_the_same_optimum() -> Iterator[Finding]:
    """Under Plackett-Luce rankings, Eq 20 is least at π_r, and so is Eq 7 on all pairs of the rankings.

    The pairs of such a ranking follow Bradley-Terry, though the two losses differ.
    """
    rewards = vector(1.0, 0.2, -0.5)
    orders = all_orders(3)
    probabilities = plackett_luce(rewards, orders)
    refs = uniform_logps(3)
    pairs_of_ranking = torch.tensor([[0, 1], [0, 2], [1, 2]])

    def ranking_losses(logps: Tensor) -> Tensor:
        return dpo_loss(logps[orders], refs[orders], 0.5)

    def pair_losses(logps: Tensor) -> Tensor:
        pairs = orders[:, pairs_of_ranking]  # (orders, 3, 2)
        return dpo_loss(logps[pairs].flatten(0, 1), refs[pairs].flatten(0, 1), 0.5).view(-1, 3).sum(1)

    optimum = tilted(refs, rewards, 0.5).exp()
    yield given(same_digits("π_r", ".8151, .1646, .0203", *optimum.tolist()))
    for name, losses in (("Eq 20", ranking_losses), ("Eq 7 on all pairs", pair_losses)):
        policy = fit_policy(losses, probabilities, refs).policy
        yield vanishes(f"{name}: distance of the optimum to π_r", total_variation(policy, optimum), 1e-8)
    gap = float((pair_losses(optimum.log()) - ranking_losses(optimum.log())).abs().max())
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

    yield vanishes("six pairs: difference of the losses", by_index(logps) - by_row(logps), 1e-14)
    gradients = [torch.func.grad(lambda x, losses=losses: losses(x).sum())(logps) for losses in (by_index, by_row)]
    yield vanishes("difference of the gradients of their sum", gradients[0] - gradients[1], 1e-14)
    one_ranking = float(dpo_loss(logps[None], REF_LOGPS[None], 0.1))
    difference = abs(one_ranking - float(by_row(logps).sum()))
    yield given(
        judged("six pairs are not one ranking: Eq 20's loss is another", "> 0.01", difference, difference > 0.01)
    )
