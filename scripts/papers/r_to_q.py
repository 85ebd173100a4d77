"""From r to Q*, arXiv 2404.12358: DPO token by token, on MDPs so small that all trajectories are enumerated.

The token MDP has three tokens, one of them the EOS, and at most four actions: 15 states and 31 trajectories. Rewards
and policies are tables in float64. The losses are those of algos/token_dpo_beam.py and, on sums, of algos/dpo.py.

    python scripts/papers/r_to_q.py
    python scripts/papers/r_to_q.py --claim C46
"""

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from algos.dpo import dpo_loss
from algos.token_dpo_beam import Beam, extend, likeliest, proxy_logps, token_dpo_loss, token_rewards
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
    reported,
    same_digits,
    same_value,
    vanishes,
)
from scripts.lab.commands import checked_command
from scripts.lab.eq_16 import eq_16
from scripts.lab.grid_mdp import end_logps, gaussian_steps, inverse_chain, solve_chain
from scripts.lab.plots import BLUE, GREEN, GREY, ORANGE, canvas, label_axes
from scripts.lab.tabular import (
    entropy,
    fit_policy,
    kl,
    log_partition,
    minimise,
    normal,
    objective,
    ordered_pairs,
    tilted,
    total_variation,
    uniform_logps,
    vector,
)
from scripts.lab.tree_mdp import Solution, State, TreeMDP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

PAPER = Paper("r_to_q", "From r to Q*: Your Language Model is Secretly a Q-Function", "2404.12358")
TRAINED = "needs trained language models"

# ---------------------------------------------------------------- the token MDP

TREE = TreeMDP(num_tokens=3, horizon=4, eos=2)
PAIRS = ordered_pairs(len(TREE.paths))  # (930, 2)
CHOSEN, REJECTED = PAIRS.T
BETA = 0.7


def random_logps(*batch: int, seed: int) -> Tensor:
    """Log-probs of random policies, (*batch, S, A)."""
    return normal(*batch, *TREE.shape, seed=seed).log_softmax(-1)


REWARDS = normal(*TREE.shape, seed=1)  # dense
REF_LOGPS = random_logps(seed=2)
RETURNS = TREE.sums(REWARDS)
REF_PATH_LOGPS = TREE.sums(REF_LOGPS)


def solved(rewards: Tensor) -> Solution:
    """Q*, V* and log π* of rewards (..., S, A)."""
    return TREE.solve(rewards, REF_LOGPS, BETA)


@functools.cache
def optimum() -> Solution:
    """Q*, V* and log π* of the dense rewards."""
    return solved(REWARDS)


def rewards_of(q: Tensor) -> Tensor:
    """The rewards whose Q* is q, (..., S, A)."""
    return TREE.inverse(q, REF_LOGPS, BETA)


def log_ratios_of(logps: Tensor) -> Tensor:
    """Eq 11, β log π/π_ref of policies (..., S, A)."""
    return token_rewards(logps, REF_LOGPS, BETA)


def preferences(returns: Tensor) -> Tensor:
    """Eq 1 of all ordered pairs, P(τ_w ≻ τ_l) from the returns Σ r (..., paths): (..., pairs)."""
    return (returns[..., CHOSEN] - returns[..., REJECTED]).sigmoid()


def token_losses(rewards: Tensor) -> Tensor:
    """Eq 9 of all ordered pairs, from the rewards of the tokens (S, A): (pairs,)."""
    paths = [TREE.paths[i] for i in PAIRS.flatten().tolist()]
    lengths = torch.tensor([len(path) for path in paths])
    return token_dpo_loss(TREE.along(rewards, *paths), lengths.view(-1, 2)).double()


def sum_losses(logps: Tensor) -> Tensor:
    """Eq 4 of all ordered pairs, from log π_θ (S, A): (pairs,)."""
    path_logps = TREE.sums(logps)
    return dpo_loss(path_logps[PAIRS], REF_PATH_LOGPS[PAIRS], BETA)


def train(weights: Tensor) -> Tensor:
    """log π_θ (S, A) that minimises the weighted loss of the pairs, from π_ref, by Newton's method."""

    def loss(logits: Tensor) -> Tensor:
        logps = logits.view(TREE.shape).log_softmax(-1)
        return weights @ sum_losses(logps)

    trained = minimise(loss, REF_LOGPS.flatten()).parameters
    return trained.view(TREE.shape).log_softmax(-1)


# ---------------------------------------------------------------- preliminaries

PRELIMINARIES = PAPER.section("Preliminaries: the token-level MDP, RLHF and DPO")


@PRELIMINARIES.claim("C1", "Eq 1")
def preferences_follow_the_sums_of_token_rewards() -> Iterator[Finding]:
    """A trajectory is preferred with probability σ(Σ r_w - Σ r_l), the sums over all its tokens.

    The rewards are logarithms of whole numbers, so that the probabilities are fractions.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1, 10, TREE.shape, generator=generator)
    products = [math.prod(TREE.along(factors, path).tolist()) for path in TREE.paths]
    fractions = []
    for chosen, rejected in PAIRS.tolist():
        fractions.append(Fraction(products[chosen], products[chosen] + products[rejected]))
    probabilities = torch.tensor([float(fraction) for fraction in fractions], dtype=torch.float64)

    rewards = factors.double().log()
    yield vanishes("930 pairs, the loss less -log of the fraction", token_losses(rewards) + probabilities.log(), 2e-6)
    yield vanishes("σ of the difference less the fraction", preferences(TREE.sums(rewards)) - probabilities)


def values_of(logps: Tensor) -> Tensor:
    """Eq 2 of policies (..., S, A): E[Σ (r + β log π_ref)] + β Σ H(π(·|s)) over the states on the way."""
    entropies = entropy(logps).unsqueeze(-1).expand_as(logps)
    gains = TREE.sums(REWARDS + BETA * REF_LOGPS + BETA * entropies)
    return (TREE.sums(logps).exp() * gains).sum(-1)


@PRELIMINARIES.claim("C2", "Eq 2")
def the_entropy_bonus_is_a_kl_penalty() -> Iterator[Finding]:
    """Eq 2, the rewards with β log π_ref and an entropy bonus, is E[Σ r] - β KL(π ‖ π_ref). Its maximum is V*(s_0).

    1,000 random policies; what a policy lacks is β KL(π ‖ π*).
    """
    logps = random_logps(1000, seed=3)
    path_logps = TREE.sums(logps)
    values = values_of(logps)
    best = optimum()
    start = best.v[0]
    gaps = start - values
    yield vanishes("Eq 2 less the KL form", values - objective(path_logps, REF_PATH_LOGPS, RETURNS, BETA))
    yield vanishes("V*(s_0) - Eq 2 - β KL(π ‖ π*)", gaps - BETA * kl(path_logps, TREE.sums(best.logps)))
    yield vanishes("V*(s_0) less Eq 2 at π*", start - values_of(best.logps))
    yield above("V*(s_0) less the best random policy", 0, gaps)


@PRELIMINARIES.claim("C3", "Eq 3")
def a_reward_at_the_eos_is_enough() -> Iterator[Finding]:
    """With the whole reward at the last token, the token-level optimum is the bandit's, π_ref exp(r/β)/Z."""
    distances = []
    for seed in range(5):
        returns = normal(len(TREE.paths), seed=seed)
        best = solved(TREE.at_the_end(returns))
        distances.append(TREE.sums(best.logps) - tilted(REF_PATH_LOGPS, returns, BETA))
    yield vanishes("log π* of 31 trajectories, 5 rewards", torch.stack(distances), 1e-12)


ARM_REF_LOGPS = vector(0.4, 0.3, 0.2, 0.1).log()
ARM_REWARDS = vector(1.0, -0.5, 0.3, 2.0)
ARM_BETA = 0.5


@PRELIMINARIES.claim("C4", "§3.3", expected=Verdict.CORRECTED)
def the_bandit_s_optimum() -> Iterator[Finding]:
    """The bandit's optimum is π_ref exp(r)/Z, and the reward is β log π* - β log π_ref - Z.

    It is exp(r/β), and + β log Z. Newton's method maximises the objective of a bandit with four arms, β = 1/2.
    """

    def loss(logits: Tensor) -> Tensor:
        return -objective(logits.log_softmax(0), ARM_REF_LOGPS, ARM_REWARDS, ARM_BETA)

    policy = minimise(loss, ARM_REF_LOGPS).policy
    log_ratios = policy.log() - ARM_REF_LOGPS
    yield vanishes("distance from π_ref exp(r)/Z", total_variation(policy, tilted(ARM_REF_LOGPS, ARM_REWARDS, 1).exp()))
    best = tilted(ARM_REF_LOGPS, ARM_REWARDS, ARM_BETA).exp()
    yield instead(vanishes("distance from π_ref exp(r/β)/Z", total_variation(policy, best), 1e-8))

    printed_z = log_partition(ARM_REF_LOGPS, ARM_REWARDS, 1).exp()
    log_z = log_partition(ARM_REF_LOGPS, ARM_REWARDS, ARM_BETA)
    yield vanishes("r less (β log π*/π_ref - Z)", ARM_REWARDS - ARM_BETA * log_ratios + printed_z)
    remainder = ARM_REWARDS - ARM_BETA * log_ratios - ARM_BETA * log_z
    yield instead(vanishes("r less (β log π*/π_ref + β log Z)", remainder, 1e-8))


@PRELIMINARIES.claim("C5", "Eq 4")
def the_dpo_loss() -> Iterator[Finding]:
    """The loss is -log σ(β log π_θ/π_ref of the chosen response less that of the rejected one).

    β = 2 and π_θ = (3/5, 1/5), π_ref = (1/2, 1/3): P = (6/5)² / ((6/5)² + (3/5)²) = 4/5, and the gradient ∓β (1 - P).
    """
    ref_logps = vector(1 / 2, 1 / 3).log()
    worths = (Fraction(6, 5) ** 2, Fraction(3, 5) ** 2)
    probability = worths[0] / sum(worths)

    def loss(logps: Tensor) -> Tensor:
        return dpo_loss(logps[None], ref_logps[None], 2.0)[0]

    logps = vector(3 / 5, 1 / 5).log()
    yield same_value("-log(4/5)", -math.log(probability), float(loss(logps)), 1e-12)
    slope = 2 * float(1 - probability)
    gradient = torch.func.grad(loss)(logps)
    yield vanishes("gradient less (-2/5, 2/5)", gradient - vector(-slope, slope), 1e-12)


# ---------------------------------------------------------------- DPO as a Q-function

Q_FUNCTION = PAPER.section("DPO as a Q-function in the token-level MDP (§4.1)")


@Q_FUNCTION.claim("C6", "Eqs 5, 6")
def the_optimal_policy_is_a_softmax_of_q() -> Iterator[Finding]:
    """The optimal policy is exp((Q* - V*)/β), where V* = β log Σ exp(Q*/β) makes it sum to 1.

    Newton's method maximises Eq 2 over the 45 logits of a table.
    """

    def loss(logits: Tensor) -> Tensor:
        return -values_of(logits.view(TREE.shape).log_softmax(-1))

    best = optimum()
    maximum = minimise(loss, REF_LOGPS.flatten()).parameters
    probs = maximum.view(TREE.shape).softmax(-1)
    from_q = ((best.q - best.v[:, None]) / BETA).exp()
    yield vanishes("15 states, Newton's π less Eq 5", probs - from_q, 1e-7)
    yield vanishes("Σ π* - 1", from_q.sum(1) - 1, 1e-12)


@Q_FUNCTION.claim("C7", "Eq 7")
def q_satisfies_bellman_s_equation() -> Iterator[Finding]:
    """Q*(s, a) = r + β log π_ref + V*(s'), with V* = 0 at terminal states.

    Beside it, without Bellman: β log Σ exp(Σ (r/β + log π_ref)) over the rest of all trajectories through (s, a).
    """
    worths = REWARDS / BETA + REF_LOGPS
    differences = []
    for state, action in TREE.choices():
        prefix = (*state, action)
        through = [path for path in TREE.paths if path[: len(prefix)] == prefix]
        sums = [TREE.along(worths, path)[len(state) :].sum() for path in through]
        expected = BETA * torch.stack(sums).logsumexp(0)
        differences.append(optimum().q[TREE.row_of[state], action] - expected)
    yield vanishes("45 actions", torch.stack(differences), 1e-12)


@Q_FUNCTION.claim("C8", "Lemma 1, App. A")
def rewards_and_q_functions_are_one_to_one() -> Iterator[Finding]:
    """Under mild assumptions, each reward has one optimal Q-function, and each Q-function is that of one reward.

    The assumptions: a finite horizon, V* = 0 at the end, and π_ref > 0. With π_ref(a|s) = 0, Q* forgets r(s, a).
    """
    rewards = normal(20, *TREE.shape, seed=4)
    q = solved(rewards).q
    yield vanishes("20 rewards, r → Q* → r", rewards_of(q) - rewards, 1e-12)

    random_q = normal(20, *TREE.shape, seed=5, scale=3)
    q = solved(rewards_of(random_q)).q
    yield vanishes("20 tables, Q → r → Q*", q - random_q, 1e-12)

    never = REF_LOGPS.clone()
    never[3, 1] = -math.inf
    other = REWARDS.clone()
    other[3, 1] += 1
    q = TREE.solve(torch.stack([REWARDS, other]), never, BETA).q
    worths = (q / BETA).exp()
    yield given(vanishes("π_ref(a|s) = 0, two rewards: exp(Q*/β)", worths[0] - worths[1], 1e-12))


LOOP_Q = normal(2, 2, seed=6, scale=3)  # two states, the actions "to the first" and "to the second"
LOOP_REF_LOGPS = normal(2, 2, seed=7).log_softmax(1)


def loop_rewards(q: Tensor, discount: float) -> Tensor:
    """The rewards of Q (2, 2) where each action leads to the state of its number, and nothing ends."""
    v = BETA * (q / BETA).logsumexp(1)
    return q - BETA * LOOP_REF_LOGPS - discount * v


@Q_FUNCTION.claim("C8a", "§4.2, App. A")
def where_states_return_a_discount_is_needed() -> Iterator[Finding]:
    """Without a discount, the bijection is particular to the token MDP, where no state comes back.

    With a loop, Q and Q + 1 have the same reward at γ = 1. At γ = 0.9, the fixed point of Eq 7 gives Q back.
    """
    differences = loop_rewards(LOOP_Q + 1, 1) - loop_rewards(LOOP_Q, 1)
    yield vanishes("a loop, γ = 1: rewards of Q + 1 less those of Q", differences, 1e-12)

    rewards = loop_rewards(LOOP_Q, 0.9)
    fixed_point = torch.zeros_like(LOOP_Q)
    for _ in range(400):
        v = BETA * (fixed_point / BETA).logsumexp(1)
        fixed_point = rewards + BETA * LOOP_REF_LOGPS + 0.9 * v
    yield vanishes("γ = 0.9: Q → r → Q*", fixed_point - LOOP_Q, 1e-12)


LM_TREE = TreeMDP(num_tokens=4, horizon=3, eos=3)


@functools.cache
def language_model_logits(seed: int) -> Tensor:
    """The logits (S, A) of a random Llama with four tokens after the prompt "0", at each state of LM_TREE."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=3,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double().eval()
        logits = []
        for state in LM_TREE.states:
            input_ids = torch.tensor([[0, *state]])
            logits.append(model(input_ids).logits[0, -1])
    return torch.stack(logits)


@Q_FUNCTION.claim("C9", "§4.1")
def a_language_model_is_the_optimal_q_of_a_reward() -> Iterator[Finding]:
    """A language model that is sampled at temperature β has logits that are Q* of a reward: l_θ = Q*.

    The logits of a random Llama with four tokens. At temperature 1, as DPO trains and the paper samples, Q* = β l_θ.
    """
    beta = 0.1
    logits = language_model_logits(seed=0)
    ref_logps = language_model_logits(seed=1).log_softmax(1)

    rewards = LM_TREE.inverse(logits, ref_logps, beta)
    best = LM_TREE.solve(rewards, ref_logps, beta)
    yield vanishes("Q* less the logits, 13 states", best.q - logits)
    yield vanishes("π* less softmax(l/β)", best.logps.exp() - (logits / beta).softmax(1))
    differences = (best.logps.exp() - logits.softmax(1)).abs()
    yield reported("β = 0.1, Q* = l: largest difference of π* and softmax(l)", float(differences.max()))

    scaled = LM_TREE.solve(LM_TREE.inverse(beta * logits, ref_logps, beta), ref_logps, beta)
    yield given(vanishes("Q* = β l: π* less softmax(l)", scaled.logps.exp() - logits.softmax(1)))


@Q_FUNCTION.claim("C10", "before Eq 8")
def returns_are_log_ratios_and_a_constant() -> Iterator[Finding]:
    """The sum of rewards of a trajectory is V*(s_0) + Σ β log π*/π_ref."""
    best = optimum()
    log_ratios = TREE.sums(best.logps - REF_LOGPS)
    yield vanishes("31 trajectories", RETURNS - best.v[0] - BETA * log_ratios, 1e-12)
    log_z = log_partition(REF_PATH_LOGPS, RETURNS, BETA)
    yield given(same_value("V*(s_0), β log Σ π_ref exp(r/β)", BETA * float(log_z), float(best.v[0]), 1e-12))


@Q_FUNCTION.claim("C11", "Eq 8")
def the_policy_induces_the_preferences() -> Iterator[Finding]:
    """The preference model of π*, σ of the difference of Σ β log π*/π_ref, is that of the rewards."""
    rewards = log_ratios_of(optimum().logps)
    wanted = preferences(RETURNS)
    yield vanishes("930 pairs, P of π* less P of r", preferences(TREE.sums(rewards)) - wanted, 1e-12)
    yield vanishes("Eq 9 at π* less -log P", token_losses(rewards) + wanted.log(), 2e-6)


LENGTHS = [
    (1, 1),
    (1, 300),
    (300, 1),
    (17, 4),
    (2, 90),
    (64, 64),
    (33, 250),
]


@Q_FUNCTION.claim("C12", "Eq 9")
def the_token_level_loss_is_dpo_s() -> Iterator[Finding]:
    """The loss over tokens, Eq 9, is DPO's loss of the sums, in value and in the gradient of each token.

    Seven pairs of 1 to 300 tokens; the sums are rounded to float32. The paper prints π* for π_θ.
    """
    lengths = torch.tensor(LENGTHS)
    num_tokens = int(lengths.sum())
    logps = normal(num_tokens, seed=8, scale=0.7)
    ref_logps = normal(num_tokens, seed=9, scale=0.7)

    def sums(values: Tensor) -> Tensor:
        completions = values.split(lengths.flatten().tolist())
        return torch.stack([completion.sum() for completion in completions]).view(-1, 2)

    def by_tokens(values: Tensor) -> Tensor:
        return token_dpo_loss(token_rewards(values, ref_logps, BETA), lengths)

    def by_sums(values: Tensor) -> Tensor:
        return dpo_loss(sums(values), sums(ref_logps), BETA)

    yield vanishes("values", by_tokens(logps).double() - by_sums(logps), 1e-5)
    gradients = [torch.func.jacrev(losses)(logps) for losses in (by_tokens, by_sums)]
    yield vanishes("gradients of the tokens", gradients[0] - gradients[1], 1e-5)
    yield reported("largest gradient", float(gradients[1].abs().max()))


@Q_FUNCTION.claim("C13", "Eq 9")
def the_loss_is_a_kl_divergence() -> Iterator[Finding]:
    """Eq 9 is KL(p_D ‖ p_θ), from the data's preferences to the policy's, up to a constant."""
    wanted = preferences(RETURNS)
    policies = random_logps(50, seed=10)
    worths = TREE.sums(log_ratios_of(policies)).exp()
    p_theta = worths[:, CHOSEN] / worths[:, PAIRS].sum(-1)
    divergences = (wanted * (wanted / p_theta).log()).sum(-1)

    losses = torch.stack([wanted @ sum_losses(logps) for logps in policies])
    constant = -(wanted * wanted.log()).sum()
    yield vanishes("50 policies, Σ P loss - Σ KL - H(p_D)", losses - divergences - constant, 1e-9)
    yield above("largest less smallest KL", 10, divergences.max() - divergences.min())


@Q_FUNCTION.claim("C14", "§4.1")
def the_loss_is_least_at_the_optimal_policy() -> Iterator[Finding]:
    """DPO learns π* of any dense reward: the expected loss is least at π*, token by token.

    Newton's method from π_ref, on the preferences of the rewards.
    """
    trained = train(preferences(RETURNS) / len(PAIRS))
    yield vanishes("15 states, trained π less π*", trained.exp() - optimum().logps.exp(), 1e-8)
    changes = trained.exp() - REF_LOGPS.exp()
    yield above("largest change from π_ref", 0.2, changes.max())


@Q_FUNCTION.claim("C15", "§4.1, §4.2")
def a_shift_of_the_logits_is_a_potential() -> Iterator[Finding]:
    """A shift of all logits of a state by c(s) leaves the policy and the preferences, and changes Q* and the rewards.

    The new rewards are r + c(s) - c(s'), so that the potential of Definition 1 is Φ = -c.
    """
    shifts = normal(len(TREE.states), seed=11, scale=2)
    rewards = rewards_of(optimum().q + shifts[:, None])
    best = solved(rewards)
    yield vanishes("log π*", best.logps - optimum().logps)
    yield vanishes("preferences", preferences(TREE.sums(rewards)) - preferences(RETURNS))
    yield vanishes("rewards less r + Φ(s') - Φ(s)", rewards - TREE.shaped(REWARDS, -shifts))


# ---------------------------------------------------------------- any dense reward

DENSE = PAPER.section("Token-level DPO can represent any dense reward (§4.2)")


@DENSE.claim("C16", "Definition 1", expected=Verdict.CORRECTED)
def equivalent_rewards_share_the_optimal_policy() -> Iterator[Finding]:
    """Rewards that differ by a potential, r' = r + Φ(s') - Φ(s), have the same optimal policy.

    Only if Φ is constant at terminal states, which Definition 1 does not ask: in a tree, any two rewards differ by a
    potential. One step, r = (0, 0), Φ = 1 after the first action: r' = (1, 0).
    """
    arms = TreeMDP(num_tokens=2, horizon=1)
    uniform = uniform_logps(2)[None]
    before = arms.solve(vector(0, 0)[None], uniform, 1.0).logps.exp()
    after = arms.solve(vector(1, 0)[None], uniform, 1.0).logps.exp()
    yield vanishes("two arms, π* of r' less that of r", after - before)
    chances = [float(before[0, 0]), float(after[0, 0])]
    yield given(same_digits("π*(a) of r and of r'", ".5, .7311", *chances))

    potential = normal(20, len(TREE.states), seed=12, scale=3)
    shaped = TREE.shaped(REWARDS, potential)
    best = solved(shaped)
    yield instead(vanishes("Φ = 0 at the end, 20 draws: log π*", best.logps - optimum().logps))
    differences = preferences(TREE.sums(shaped)) - preferences(RETURNS)
    yield instead(vanishes("and the preferences", differences))


@DENSE.claim("C17", "Eq 10")
def log_ratios_are_shaped_rewards() -> Iterator[Finding]:
    """β log π*/π_ref is r + V*(s') - V*(s): the reward, shaped by the potential V*."""
    best = optimum()
    log_ratios = log_ratios_of(best.logps)
    yield vanishes("45 actions", log_ratios - TREE.shaped(REWARDS, best.v), 1e-12)


@DENSE.claim("C17a", "Eq 10, §5.1, App. A", expected=Verdict.CORRECTED)
def log_ratios_are_the_optimal_advantage() -> Iterator[Finding]:
    """β log π*/π_ref is precisely the optimal advantage A* = Q* - V*, and the reward is Q* - V*(s') (appendix A).

    By Eqs 5 and 7, which have β log π_ref inside Q*, both lack it: the log-ratio is A* - β log π_ref.
    """
    best = optimum()
    log_ratios = log_ratios_of(best.logps)
    advantages = best.q - best.v[:, None]
    yield vanishes("log-ratio less A*", log_ratios - advantages)
    yield instead(vanishes("log-ratio less (A* - β log π_ref)", log_ratios - advantages + BETA * REF_LOGPS))

    from_q = best.q - TREE.next_values(best.v)
    yield vanishes("r less (Q* - V*(s'))", REWARDS - from_q)
    yield instead(vanishes("r less (Q* - β log π_ref - V*(s'))", REWARDS - from_q + BETA * REF_LOGPS))


@DENSE.claim("C18", "Theorem 1")
def log_ratios_represent_every_class() -> Iterator[Finding]:
    """Every class of rewards has a member β log π/π_ref: with the same preferences (Bradley-Terry) and optimal policy.

    20 rewards, dense ones and some with large entries.
    """
    scales = torch.linspace(0.1, 5, 20, dtype=torch.float64)
    rewards = scales[:, None, None] * normal(20, *TREE.shape, seed=13)
    best = solved(rewards)
    members = log_ratios_of(best.logps)
    yield vanishes("preferences", preferences(TREE.sums(members)) - preferences(TREE.sums(rewards)))
    yield vanishes("log π*", solved(members).logps - best.logps)


@DENSE.claim("C19", "Theorem 1")
def log_ratios_represent_plackett_luce() -> Iterator[Finding]:
    """The same holds for Plackett-Luce: rankings of more than two trajectories.

    All 26,970 orders of three trajectories, and Newton's minimiser of the expected loss of 600 of them.
    """
    orders = torch.combinations(torch.arange(len(TREE.paths)), 3)
    ranked = torch.cat([orders[:, list(order)] for order in itertools.permutations(range(3))])
    worths = RETURNS.exp()[ranked]
    is_first = worths[:, 0] / worths.sum(1)
    is_second = worths[:, 1] / worths[:, 1:].sum(1)
    wanted = is_first * is_second
    path_logps = TREE.sums(optimum().logps)
    losses = dpo_loss(path_logps[ranked], REF_PATH_LOGPS[ranked], BETA)
    yield vanishes("-loss at π* less log P of r", losses + wanted.log())

    generator = torch.Generator().manual_seed(14)
    triples = torch.randperm(len(orders), generator=generator)[:100]
    some_orders = torch.cat([triples + i * len(orders) for i in range(6)])
    rows = ranked[some_orders]

    def losses_of(path_logps: Tensor) -> Tensor:
        return dpo_loss(path_logps[rows], REF_PATH_LOGPS[rows], BETA)

    policy = fit_policy(losses_of, wanted[some_orders], REF_PATH_LOGPS).policy
    yield vanishes("trained π of trajectories less π*", policy - path_logps.exp(), 1e-8)


@DENSE.claim("C20", "Theorem 1, §4.2")
def each_class_has_one_log_ratio() -> Iterator[Finding]:
    """Each class has exactly one member β log π/π_ref: the one with Σ π_ref exp(r/β) = 1 at all states.

    100 members of a class, by potentials that are 0 at the end.
    """
    members = TREE.shaped(REWARDS, normal(100, len(TREE.states), seed=15))
    logps = solved(members).logps
    log_ratios = log_ratios_of(logps)
    yield vanishes("log-ratios of 100 members less the first", log_ratios - log_ratios[0])

    log_sums = log_partition(REF_LOGPS, log_ratios, BETA)
    yield vanishes("theirs, log Σ π_ref exp(r/β)", log_sums)
    deviations = log_partition(REF_LOGPS, members, BETA).abs().amax(1)
    yield above("the members', least of the largest |log Σ|", 0.1, deviations)


def redistributed(seed: int) -> Tensor:
    """Rewards with the returns of REWARDS, spread otherwise over the tokens."""
    potential = normal(len(TREE.states), seed=seed, scale=2)
    potential[0] = 0
    return TREE.shaped(REWARDS, potential)


@DENSE.claim("C21", "§4.2")
def any_token_reward_has_its_policy_learned() -> Iterator[Finding]:
    """DPO can learn the optimal policy for any per-token reward.

    What it cannot learn is which one: dense and sparse rewards of equal returns give the same optimum and the same
    token rewards β log π*/π_ref. Credit is that of the returns, not of the annotator's dense reward.
    """
    trained = train(preferences(RETURNS) / len(PAIRS))
    yield vanishes("trained π less the dense reward's π*", trained.exp() - optimum().logps.exp(), 1e-8)

    others = [redistributed(seed) for seed in (16, 17, 18)]
    tables = torch.stack([REWARDS, TREE.at_the_end(RETURNS), *others])
    logps = solved(tables).logps
    credit = log_ratios_of(logps)
    yield given(vanishes("returns of dense, sparse and three others", TREE.sums(tables) - RETURNS))
    yield given(vanishes("their token rewards less the first's", credit - credit[0]))
    deviations = (credit - tables).abs().amax((1, 2))
    yield given(above("largest |recovered - true reward|, least of five", 0.5, deviations))


JUDGMENTS = (20, 200, 2_000, 20_000)  # of each of the 465 pairs
NUM_SEEDS = 10


def trained_on(counts: Tensor) -> Tensor:
    """The token rewards (S, A) of DPO, trained to the optimum on counted pairs (pairs,)."""

    def losses(path_logps: Tensor) -> Tensor:
        return dpo_loss(path_logps[PAIRS], REF_PATH_LOGPS[PAIRS], BETA)

    start = TREE.sums(optimum().logps)  # which saves steps; the loss is convex and has a single optimum
    policy = fit_policy(losses, counts / counts.sum(), start).policy
    return token_rewards(TREE.policy_of(policy.log()), REF_LOGPS, BETA)


def judge(judgments: int, seed: int) -> Tensor:
    """How often each of the ordered pairs came out, if each two trajectories are compared so often: (pairs,)."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.zeros(len(TREE.paths), len(TREE.paths), dtype=torch.float64)
    probabilities[CHOSEN, REJECTED] = preferences(RETURNS)
    trials = torch.full_like(probabilities, judgments)
    wins = torch.binomial(trials, probabilities, generator=generator).triu(1)
    losses = (trials - wins).triu(1)
    counts = wins + losses.T
    return counts[CHOSEN, REJECTED]


@functools.cache
def sampled_distances() -> Tensor:
    """Root mean square of learned less true token rewards, (JUDGMENTS, NUM_SEEDS), in units of reward."""
    truth = log_ratios_of(optimum().logps)
    distances = []
    for judgments, seed in itertools.product(JUDGMENTS, range(NUM_SEEDS)):
        deviations = trained_on(judge(judgments, seed)) - truth
        distances.append(deviations.square().mean().sqrt())
    return torch.stack(distances).view(len(JUDGMENTS), NUM_SEEDS)


def shifted_towards(action: int, log_odds: float) -> Tensor:
    """log π* (S, A) with the first action moved: log-ratios of trajectories that begin with it all grow by as much."""
    logps = optimum().logps.clone()
    logps[0, action] += log_odds
    return logps.log_softmax(-1)


@functools.cache
def is_unconnected() -> Tensor:
    """Which pairs compare two trajectories that both begin with the first action, or both not: (pairs,)."""
    begins = torch.tensor([path[0] == 0 for path in TREE.paths])
    return begins[CHOSEN] == begins[REJECTED]


@DENSE.claim("C22", "§4.2")
def the_data_determine_the_advantage() -> Iterator[Finding]:
    """The training data determine how close the learned advantage is to the true reward's.

    The distance falls as n^(-1/2) in the number of judged pairs, from 9,300 to 9.3 million, 10 seeds. Where no pair
    connects two groups of trajectories, the loss says nothing of one against the other, whatever n is.
    """
    distances = sampled_distances().log()
    log_counts = torch.tensor(JUDGMENTS).double().log()
    centred = log_counts - log_counts.mean()
    slopes = centred @ distances / centred.square().sum()
    slope = float(slopes.mean())
    margin = 2.26 * float(slopes.std()) / math.sqrt(NUM_SEEDS)  # Student's t, 9 degrees of freedom
    is_half = abs(slope + 0.5) < 0.05
    yield judged(f"slope of log distance in log n, ± {margin:.3f} (95%)", "-1/2 ± 0.05", slope, is_half)

    weights = torch.where(is_unconnected(), preferences(RETURNS), 0)
    losses = [weights @ sum_losses(shifted_towards(0, log_odds)) for log_odds in (0.0, 3.0)]
    yield given(vanishes("two groups, no pair between: difference of loss", losses[1] - losses[0]))
    distances = (shifted_towards(0, 3.0) - optimum().logps).abs()
    yield given(above("of two policies with |Δ log π| of", 1, distances.max()))


TWO_STEPS = TreeMDP(num_tokens=2, horizon=2)  # no EOS
TWO_STEPS_REF = uniform_logps(2).expand(TWO_STEPS.shape)


def reward_of_aa(reward: float) -> Tensor:
    """A reward for the second a of "aa", and 0 for all else."""
    return TWO_STEPS.at_the_end(vector(reward, 0, 0, 0))


@DENSE.claim("C23", "§3.1, Theorem 1")
def trajectories_must_end() -> Iterator[Finding]:
    """Preferences are between trajectories that end in a terminal state, where V* is 0; Eq 8 needs that.

    Completions that were cut break it: two steps, r(aa) = 2, β = 1, π_ref uniform. The prefixes a and b have equal
    returns, yet Eq 8 prefers a with σ(log((e² + 1)/2)) = 0.807.
    """
    best = TWO_STEPS.solve(reward_of_aa(2.0), TWO_STEPS_REF, 1.0)
    log_ratios = token_rewards(best.logps, TWO_STEPS_REF, 1.0)
    returns = TWO_STEPS.sums(reward_of_aa(2.0))
    yield vanishes("whole ones: returns less V*(s_0) + log-ratios", returns - best.v[0] - TWO_STEPS.sums(log_ratios))

    gap = log_ratios[0, 0] - log_ratios[0, 1]
    closed_form = 1 / (1 + 2 / (math.exp(2) + 1))
    yield given(same_value("cut ones: P(a ≻ b) by Eq 8, not 1/2", closed_form, float(gap.sigmoid())))
    yield given(vanishes("their log-ratios less V*(a) - V*(b)", gap - best.v[1] + best.v[2]))


# ---------------------------------------------------------------- credit assignment

CREDIT = PAPER.section("Credit assignment (§5.1)")
CREDIT.elsewhere(
    "C24",
    "Fig. 1",
    "The token rewards of a DPO model are low at wrong words.",
    f"{TRAINED}: scripts/credit.py",
)
FACTS = TreeMDP(num_tokens=2, horizon=3)  # three facts in a row, each right (0) or wrong (1)
FACTS_REF = vector(0.7, 0.3).log().expand(FACTS.shape)


def credit_of(returns: Tensor) -> Tensor:
    """The optimum's token rewards (S, A) of three facts, β = 1/2."""
    best = FACTS.solve(FACTS.at_the_end(returns), FACTS_REF, 0.5)
    return token_rewards(best.logps, FACTS_REF, 0.5)


def additive_returns() -> Tensor:
    """1 for each right fact, -1 for each wrong one."""
    returns = [3 - 2 * sum(path) for path in FACTS.paths]
    return vector(*returns)


def all_or_nothing() -> Tensor:
    """1 if all facts are right, else 0."""
    returns = [path == (0, 0, 0) for path in FACTS.paths]
    return vector(*returns)


@CREDIT.claim("C25", "Fig. 1")
def an_error_changes_no_other_token() -> Iterator[Finding]:
    """Where a wrong word stands, the token reward falls, without much change to the other tokens.

    Exactly so at the optimum if the reward is a sum over facts that π_ref states independently. Three facts, β = 1/2,
    each wrong with probability 0.3. Trained models: scripts/credit.py.
    """
    credit = credit_of(additive_returns())
    right = FACTS.along(credit, (0, 0, 0))
    wrong = FACTS.along(credit, (0, 1, 0))
    drop = float(wrong[1] - right[1])
    yield same_value("change at the error, r(wrong) - r(right)", -2, drop)
    yield vanishes("change at the others", (wrong - right)[[0, 2]])


@CREDIT.claim("C26", "§5.1")
def the_second_error_is_identified_too() -> Iterator[Finding]:
    """In the context of a first error, the second one is still identified: stitching.

    So it is for a reward that is a sum over facts. For one that counts whole summaries only, all right or nothing, the
    optimum gives the second error no credit: 0. Trained models: scripts/credit.py.
    """
    additive = FACTS.along(credit_of(additive_returns()), (1, 1, 0))
    once = FACTS.along(credit_of(additive_returns()), (0, 1, 0))
    yield same_value("sum: reward of the second error, of a lone one", float(once[1]), float(additive[1]))
    yield below("it is", -1, additive[1])

    whole = FACTS.along(credit_of(all_or_nothing()), (1, 1, 0))
    yield given(vanishes("all or nothing: the second error's reward", float(whole[1])))


CREDIT.elsewhere(
    "C27",
    "App. C",
    "In three posts of TL;DR, the wrong words have the low token rewards.",
    "needs the 2.8B model; scripts/heatmap.py draws any rows",
)
CREDIT.elsewhere(
    "C28",
    "App. C",
    "A DPO model classifies the pairs of right and wrong summaries correctly.",
    TRAINED,
)
CREDIT.elsewhere(
    "C29",
    "§5.1",
    "DPO models are strong classifiers of responses (RewardBench).",
    f"{TRAINED}: eval/rewards/accuracies of a run",
)
CREDIT.elsewhere(
    "C30",
    "§5.1",
    "The token rewards of a trained model are the optimal advantage.",
    f"{TRAINED}; C14 is the exact part",
)

# ---------------------------------------------------------------- search

SEARCH = PAPER.section("Guided decoding and search (§5.2)")
OBJECTIVES = REWARDS + BETA * REF_LOGPS  # what Eq 12 sums
NO_VALUES = torch.zeros(len(TREE.states), dtype=torch.float64)


def value_of(values: Tensor, state: State) -> float:
    """V at a state, 0 at a terminal one."""
    if TREE.is_terminal(state):
        return 0.0
    return float(values[TREE.row_of[state]])


def extensions(state: State, depth: int) -> list[State]:
    """The states after `depth` more actions, or after fewer where the trajectory ends."""
    if depth == 0 or TREE.is_terminal(state):
        return [state]
    longer = []
    for action in range(TREE.num_tokens):
        longer += extensions((*state, action), depth - 1)
    return longer


@SEARCH.claim("C31", "Eqs 12, 13", expected=Verdict.CORRECTED)
def search_with_the_value_is_search_by_likelihood() -> Iterator[Finding]:
    """The partial expansion Σ (r + β log π_ref) + V*(s_{K+1}) equals -V*(s_0) + Σ β log π*.

    The sign of V*(s_0) is a plus. It is fixed, so that the best expansion is the same.
    """
    best = optimum()
    differences = []
    for state in [*TREE.states[1:], *TREE.paths]:
        expansion = TREE.along(OBJECTIVES, state).sum() + value_of(best.v, state)
        differences.append(expansion - BETA * TREE.along(best.logps, state).sum())
    remainder = torch.stack(differences)
    yield vanishes("45 expansions, Eq 12 less Eq 13 as printed", remainder + best.v[0])
    yield instead(vanishes("Eq 12 less (+V*(s_0) + Σ β log π*)", remainder - best.v[0], 1e-12))


def lookahead(table: Tensor, values: Tensor, state: State, depth: int) -> State:
    """The best expansion of a state by the sum of a table (S, A) and the value at its end."""

    def worth(extension: State) -> float:
        gains = TREE.along(table, extension)[len(state) :]
        return float(gains.sum()) + value_of(values, extension)

    return max(extensions(state, depth), key=worth)


def best_first(table: Tensor, values: Tensor) -> list[State]:
    """The states that a best-first search takes up, to the first that is terminal."""
    queue: list[tuple[float, State]] = [(0.0, ())]
    order: list[State] = []
    while queue:
        _, state = heapq.heappop(queue)
        order.append(state)
        if TREE.is_terminal(state):
            break
        for extension in extensions(state, 1):
            worth = float(TREE.along(table, extension).sum()) + value_of(values, extension)
            heapq.heappush(queue, (-worth, extension))
    return order


def reference_values(rewards: Tensor) -> Tensor:
    """The expected rewards to come under π_ref, (S,): a value that is trained without the optimum."""
    values = torch.zeros(len(TREE.states), dtype=torch.float64)
    for row in reversed(range(len(values))):
        next_values = TREE.next_values(values)[row]
        values[row] = REF_LOGPS[row].exp() @ (rewards[row] + next_values)
    return values


@SEARCH.claim("C32", "§5.2")
def tree_search_with_v_is_likelihood_search() -> Iterator[Finding]:
    """Search with the reward and V*, such as MCTS, is likelihood search on π*: it takes the same actions.

    Lookahead of 1 to 4 actions from all 15 states, five rewards; best-first search. The value of π_ref leads elsewhere.
    """
    differing = 0
    differing_by_reference = 0
    for seed in range(5):
        rewards = normal(*TREE.shape, seed=seed, scale=2)
        objectives = rewards + BETA * REF_LOGPS
        best = solved(rewards)
        under_reference = reference_values(rewards)
        for state, depth in itertools.product(TREE.states, range(1, 5)):
            likeliest_expansion = lookahead(best.logps, NO_VALUES, state, depth)
            differing += lookahead(objectives, best.v, state, depth) != likeliest_expansion
            differing_by_reference += lookahead(objectives, under_reference, state, depth) != likeliest_expansion
    yield same_value("300 lookaheads, expansions that differ", 0, differing)

    order = best_first(optimum().logps, NO_VALUES)
    is_same = order == best_first(OBJECTIVES, optimum().v)
    yield judged("states of a best-first search", "the same, in order", len(order), is_same)
    differs = differing_by_reference > 0
    yield given(judged("with the value of π_ref, expansions that differ", "> 0", differing_by_reference, differs))


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function turns from negative to positive between two numbers."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@SEARCH.claim("C33", "Eqs 12, 13")
def exact_search_maximises_the_penalised_reward() -> Iterator[Finding]:
    """The likeliest trajectory of π* maximises Σ (r + β log π_ref), not the reward alone.

    40 values of β from 0.01 to 5. It leaves the best reward at the smallest β = (r* - r)/(log π_ref - log π_ref*).
    """
    betas = torch.logspace(-2, math.log10(5), 40).tolist()
    best = int(RETURNS.argmax())
    differing = 0
    for beta in betas:
        path_logps = TREE.sums(TREE.solve(REWARDS, REF_LOGPS, beta).logps)
        differing += int(path_logps.argmax() != (RETURNS + beta * REF_PATH_LOGPS).argmax())
    yield same_value("values of β at which another is likeliest", 0, differing)

    def lead_of_others(beta: float) -> float:
        path_logps = TREE.sums(TREE.solve(REWARDS, REF_LOGPS, beta).logps)
        return float(path_logps.max() - path_logps[best]) - 1e-14

    likelier = REF_PATH_LOGPS > REF_PATH_LOGPS[best]
    crossings = (RETURNS[best] - RETURNS)[likelier] / (REF_PATH_LOGPS - REF_PATH_LOGPS[best])[likelier]
    turn = bisect(lead_of_others, 0.001, 5)
    yield given(same_value("β at which it is no longer the best reward", float(crossings.min()), turn, 1e-6))


SEARCH.elsewhere(
    "C34",
    "§5.2",
    "Beam search on the DPO policy is a one-line change.",
    "tests/test_token_dpo.py compares the search with brute force and with generate()",
)
SEARCH.elsewhere(
    "C35",
    "Fig. 2",
    "Five beams raise the win rate by 10 to 15 points.",
    f"{TRAINED}: token_figures.py",
)
SEARCH.elsewhere(
    "C36",
    "Fig. 2",
    "More than five beams lower the win rate.",
    f"{TRAINED}: token_figures.py",
)
SEARCH.elsewhere(
    "C37",
    "Fig. 2",
    "More than five beams make answers explode in length.",
    f"{TRAINED}: token_figures.py",
)
SEARCH.elsewhere(
    "C38",
    "Fig. 2",
    "The gain from beams is there for each of three β.",
    f"{TRAINED}: token_figures.py",
)
SEARCH.elsewhere(
    "C39",
    "§5.2",
    "The decline with many beams is reward over-optimisation.",
    TRAINED,
)
SEARCH.elsewhere(
    "C40",
    "§5.2",
    "The gain is comparable to that of value-guided search.",
    TRAINED,
)


def best_of(n: int, probs: Tensor, scores: Tensor) -> Tensor:
    """The probability of each completion (C,) to be the best by its score of n draws from `probs`."""
    order = scores.argsort()
    drawn = probs[order]
    up_to = drawn.cumsum(0)
    chances = torch.empty_like(probs)
    chances[order] = up_to**n - (up_to - drawn).clamp(min=0) ** n
    return chances


@SEARCH.claim("C41", "§5.2")
def ranked_candidates_are_a_likelihood_search() -> Iterator[Finding]:
    """V-STaR, candidates of a proposal (STaR) ranked by the DPO likelihood, is a form of likelihood search.

    It is thought to be safer from reward hacking than deep search. With the proposal π_ref the found log π* rises in N
    to the search's. A wrongly likeliest trajectory is found only if it is drawn, with 1 - (1 - p)^N.
    """
    scores = TREE.sums(optimum().logps)
    proposal = REF_PATH_LOGPS.exp()
    sizes = (1, 4, 16, 64, 256)
    expected = torch.stack([best_of(n, proposal, scores) @ scores for n in sizes])
    yield above("least rise of E[log π*] from N to the next", 0, expected.diff())
    at_last = best_of(100_000, proposal, scores) @ scores
    yield vanishes("N = 100,000: E[log π*] less the likeliest's", at_last - scores.max(), 1e-8)

    rare = int(proposal.argmin())
    hacked = scores.clone()
    hacked[rare] = 0.0
    chance = best_of(64, proposal, hacked)[rare]
    yield below("a trajectory with a false score: chance at N = 64, search 1", 0.5, chance)
    yield given(vanishes("less 1 - (1 - p)^64", chance - 1 + (1 - proposal[rare]) ** 64))


def ends_with_eos(token_ids: list[int]) -> bool:
    """Token 0 is the EOS of `next_beams`."""
    return token_ids[-1] == 0


def next_beams(logits: Tensor, width: int, top_k: int) -> list[list[int]]:
    """The beams that go on, from logits (beams, V) of running beams, with the best top_k tokens of each only."""
    beams = [Beam(0, [row], -0.1 * row) for row in range(len(logits))]
    logps, ids = likeliest(logits, logits.shape[1])
    kept_logps = logps[:, :top_k]
    kept_ids = ids[:, :top_k]
    _, going_on = extend(beams, kept_logps, kept_ids, width, ends_with_eos)
    return [beam.token_ids for beam in going_on]


@SEARCH.claim("C42", "App. E")
def top_k_says_nothing_without_sampling() -> Iterator[Finding]:
    """The beams use a top-k of 50: a parameter of sampling.

    Without sampling, it cannot change a search of up to 25 beams, whose 2 × width best continuations are among the 50
    best of each beam. A step of the project's search, 200 tokens.
    """
    differing = 0
    for width in range(1, 26):
        for beams in (1, width):
            logits = normal(beams, 200, seed=width, scale=3)
            differing += next_beams(logits, width, 50) != next_beams(logits, width, 200)
    yield same_value("50 steps of 1 to 25 beams that differ", 0, differing)

    logits = normal(1, 200, seed=0, scale=3)
    logits[0, 0] = -100.0  # the EOS
    yield given(same_value("60 beams: the first step keeps", 50, len(next_beams(logits, 60, 50))))


SEARCH.elsewhere(
    "C43",
    "Fig. 5",
    "PPO: two beams help and shorten, more harm and lengthen.",
    "needs a PPO policy",
)
SEARCH.elsewhere(
    "C44",
    "F.1",
    "At 20 beams one sample runs into a copy of the post.",
    f"{TRAINED}: scripts/sample.py --beams 20",
)

# ---------------------------------------------------------------- proxy tuning

PROXY = PAPER.section("Proxy tuning and realignment (§5.3)")


@PROXY.claim("C45", "Eq 14")
def a_base_is_steered_by_a_ratio() -> Iterator[Finding]:
    """The steered policy is π_base (π_proxy/π_ref)^β, normalised over the tokens.

    Fractions: π_base = (1/2, 1/3, 1/6), π_proxy = (1/4, 1/4, 1/2), π_ref = (1/2, 1/4, 1/4), β = 2.
    """
    base = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 6))
    ratios = (Fraction(1, 2), Fraction(1), Fraction(2))
    products = [probability * ratio**2 for probability, ratio in zip(base, ratios, strict=True)]
    expected = [float(product / sum(products)) for product in products]

    base_logps = vector(1 / 2, 1 / 3, 1 / 6).log()
    proxy = vector(1 / 4, 1 / 4, 1 / 2).log()
    ref_logps = vector(1 / 2, 1 / 4, 1 / 4).log()
    steered = proxy_logps(base_logps, proxy, ref_logps, 2.0).exp()
    yield vanishes("less (3, 8, 16)/27", steered - vector(*expected), 1e-12)
    alone = proxy_logps(ref_logps, proxy, ref_logps, 1.0)
    yield vanishes("base = π_ref, β = 1: less π_proxy", alone.exp() - proxy.exp(), 1e-12)


def equation_15(base_logps: Tensor, proxy: Tensor, ref_logps: Tensor, beta: float, proxy_beta: float) -> Tensor:
    """Eq 15 as printed, with the Q* - V* of a proxy that was trained with `proxy_beta`: log-probs (A,).

    Q* is that of Eq 7, of the reward of a single step that has the proxy as its optimum.
    """
    arms = TreeMDP(num_tokens=len(base_logps), horizon=1)
    rewards = token_rewards(proxy, ref_logps, proxy_beta)[None]
    best = arms.solve(rewards, ref_logps[None], proxy_beta)
    advantages = best.q[0] - best.v[0]
    return (base_logps + beta * advantages).log_softmax(-1)


EVEN = vector(0.5, 0.5).log()
TUNED = vector(0.8, 0.2).log()
SKEWED = vector(0.9, 0.1).log()
CASES = (  # π_ref, β_t, and the probabilities by the two equations at β = 1
    (EVEN, 0.1, "base = π_ref, β_t = 0.1", ".8, .535"),
    (SKEWED, 1.0, "π_ref = (.9, .1), β_t = 1", ".308, .8"),
)


@PROXY.claim("C46", "Eq 15", expected=Verdict.CORRECTED)
def steering_is_by_the_optimal_advantage() -> Iterator[Finding]:
    """Eq 14 is equivalent to π_base exp(β (Q* - V*)), with the optimal implicit advantage of the proxy.

    With the Q* of Eq 7 it is π_base π_proxy^(β β_t): it lacks π_ref, and its exponent has the β_t of the proxy's
    training. Right is π_base exp((β/β_t) Ã) with the implicit reward Ã = β_t log π_proxy/π_ref.
    """
    for ref_logps, proxy_beta, setting, digits in CASES:
        eq_14 = proxy_logps(EVEN, TUNED, ref_logps, 1.0).exp()
        eq_15 = equation_15(EVEN, TUNED, ref_logps, 1.0, proxy_beta).exp()
        yield vanishes(f"{setting}: distance", total_variation(eq_14, eq_15))
        chances = [float(eq_14[0]), float(eq_15[0])]
        yield given(same_digits("P(first token) by Eq 14, by Eq 15", digits, *chances))

    distances = []
    for proxy_beta in (0.1, 0.7, 3.0):
        implicit = token_rewards(TUNED, SKEWED, proxy_beta)
        corrected = (EVEN + implicit / proxy_beta).softmax(0)
        distances.append(total_variation(corrected, proxy_logps(EVEN, TUNED, SKEWED, 1.0).exp()))
    yield instead(vanishes("π_base exp((β/β_t) Ã), distance", max(distances), 1e-12))


PROXY.elsewhere(
    "C47",
    "§5.3",
    "A small tuned proxy improves a larger base.",
    f"{TRAINED}: scripts/proxy.py",
)


@PROXY.claim("C48", "§5.3", expected=Verdict.CORRECTED)
def realigned_tokens_are_the_optimum_of_another_beta() -> Iterator[Finding]:
    """With π_ref as the base, weighting the tokens by Eq 14 with the exponent λ is realignment: the optimum for β/λ.

    For one token, yes. For two, the weights have to be those of whole completions: r(aa) = 1, β = 1, λ = 2.
    """
    proxy = TWO_STEPS.solve(reward_of_aa(1.0), TWO_STEPS_REF, 1.0).logps
    wanted = TWO_STEPS.solve(reward_of_aa(1.0), TWO_STEPS_REF, 0.5).logps
    realigned = proxy_logps(TWO_STEPS_REF, proxy, TWO_STEPS_REF, 2.0)
    yield vanishes("the last token: π less the optimum for β/2", realigned[1].exp() - wanted[1].exp(), 1e-12)
    yield vanishes("the first of two tokens", realigned[0].exp() - wanted[0].exp())
    odds = vector((math.e + 1) ** 2 / 4, (math.e**2 + 1) / 2)
    measured = torch.stack([realigned[0, 0], wanted[0, 0]]).exp()
    yield given(vanishes("P(a) less the closed forms, .7756 and .8075", measured - odds / (1 + odds), 1e-12))

    ref_sums = TWO_STEPS.sums(TWO_STEPS_REF)
    whole = proxy_logps(ref_sums, TWO_STEPS.sums(proxy), ref_sums, 2.0)
    yield instead(vanishes("whole completions weighted: log π", whole - TWO_STEPS.sums(wanted), 1e-12))


# ---------------------------------------------------------------- likelihoods

LIKELIHOODS = PAPER.section("Likelihoods should decrease when using DPO (§5.4)")


@LIKELIHOODS.claim("C49", "Eq 16")
def implicit_rewards_fall_by_a_kl_divergence() -> Iterator[Finding]:
    """Under π_ref, the mean of β log π/π_ref at a state is -β KL(π_ref ‖ π), which is never above 0."""
    policies = torch.stack([optimum().logps, *random_logps(20, seed=19)])
    actions = torch.zeros(len(TREE.states), dtype=torch.long)
    sides = [eq_16(logps, REF_LOGPS, actions, BETA) for logps in policies]
    left, _, _ = torch.stack(sides).unbind(-1)
    divergences = kl(REF_LOGPS, policies)
    yield vanishes("15 states of 21 policies", left + BETA * divergences, 1e-12)
    yield below("largest", 0, left)


@LIKELIHOODS.claim("C50", "Eq 16")
def whole_completions_of_the_reference_fall_too() -> Iterator[Finding]:
    """Over completions drawn from π_ref, the mean implicit reward is -β KL(π_ref ‖ π) of whole completions."""
    logps = torch.stack([optimum().logps, *random_logps(20, seed=20)])
    rewards = log_ratios_of(logps)
    means = TREE.sums(rewards) @ REF_PATH_LOGPS.exp()
    yield vanishes("21 policies", means + BETA * kl(REF_PATH_LOGPS, TREE.sums(logps)), 1e-12)
    yield below("largest", 0, means)


LIKELIHOODS.elsewhere(
    "C51",
    "Fig. 3",
    "After SFT, the implicit rewards of chosen and rejected both fall, and their margin grows.",
    f"{TRAINED}: token_figures.py",
)


def chosen_probs(ref_logps: Tensor, returns: Tensor) -> Tensor:
    """P_w, how often each completion is the chosen one of two that π_ref draws, (paths,)."""
    wins = (returns[:, None] - returns).sigmoid() @ ref_logps.exp()
    return 2 * ref_logps.exp() * wins


@LIKELIHOODS.claim("C52", "§5.4")
def after_sft_on_chosen_the_chosen_must_fall() -> Iterator[Finding]:
    """With SFT on the chosen responses as π_ref, their mean implicit reward is -β KL(π_ref ‖ π*): it must fall.

    P_w of pairs from another policy, a table that fits it exactly as π_ref, and π* of the same rewards.
    """
    chosen = chosen_probs(REF_PATH_LOGPS, RETURNS)
    sft_logps = TREE.policy_of(chosen.log())
    sft_path_logps = TREE.sums(sft_logps)
    yield given(vanishes("the table's probabilities less P_w", sft_path_logps.exp() - chosen, 1e-12))

    best = TREE.solve(REWARDS, sft_logps, BETA)
    mean = float(chosen @ TREE.sums(token_rewards(best.logps, sft_logps, BETA)))
    divergence = float(kl(chosen.log(), tilted(chosen.log(), RETURNS, BETA)))
    yield same_value("mean of the chosen, -β KL(P_w ‖ π*)", -BETA * divergence, mean)
    yield judged("it is", "< 0", mean, mean < 0)


def implicit_rewards(ref_logps: Tensor, returns: Tensor, beta: float) -> tuple[float, float, float]:
    """The means of β log π*/π_ref of chosen, all and rejected completions, of pairs that π_ref draws."""
    log_ratios = token_rewards(tilted(ref_logps, returns, beta), ref_logps, beta)
    chosen = float(chosen_probs(ref_logps, returns) @ log_ratios)
    average = float(ref_logps.exp() @ log_ratios)
    return chosen, average, 2 * average - chosen


@functools.cache
def notices_world() -> tuple[Tensor, Tensor]:
    """log π_ref and the rewards of the demonstrations of scripts/lab/notices.py, by their kinds: both (18,).

    `make_sft_row`: 60% have all five facts right, in the others each is wrong with probability 0.4; 0, 1 or 2
    superfluous clauses with 0.6, 0.25, 0.15. Reward: right less wrong facts, less 0.5 per superfluous clause.
    """
    probs = []
    rewards = []
    for wrong in range(6):
        chance = 0.4 * math.comb(5, wrong) * 0.4**wrong * 0.6 ** (5 - wrong)
        if wrong == 0:
            chance += 0.6
        for superfluous, share in enumerate((0.6, 0.25, 0.15)):
            probs.append(chance * share)
            rewards.append(5 - 2 * wrong - 0.5 * superfluous)
    return vector(*probs).log(), vector(*rewards)


def turning_beta(ref_logps: Tensor, returns: Tensor) -> float:
    """The β above which the chosen's mean implicit reward is positive."""
    return bisect(lambda beta: implicit_rewards(ref_logps, returns, beta)[0], 0.1, 5)


def two_arms(beta: float) -> float:
    """The mean implicit reward of the chosen at the optimum: uniform π_ref, r = (1, 0), pairs of different arms."""
    log_ratios = token_rewards(tilted(EVEN, vector(1, 0), beta), EVEN, beta)
    wins = vector(1, -1).sigmoid()
    return float(wins @ log_ratios)


@LIKELIHOODS.claim("C53", "Fig. 3", expected=Verdict.CORRECTED)
def without_sft_the_chosen_stay_above_zero() -> Iterator[Finding]:
    """Without SFT first, the implicit rewards of the chosen stay above zero, and their average has no trend.

    It depends on who wrote the pairs, and on β. At the optimum for pairs that π_ref itself wrote, the average is below
    zero at every β, and the chosen below a β that can be computed. In the paper, another model wrote them (C54).
    """
    ref_logps, rewards = notices_world()
    tree = implicit_rewards(REF_PATH_LOGPS, RETURNS, 0.1)
    notices = implicit_rewards(ref_logps, rewards, 0.1)
    yield above("β = 0.1, chosen: least of the tree and the notices", 0, vector(tree[0], notices[0]))
    yield given(same_digits("notices: chosen, average, rejected", "-.659, -1.778, -2.897", *notices))

    # r - β log Z at β = 0.3, of the arms' (e^(1/β) + 1)/2
    log_z = 0.3 * math.log((math.exp(1 / 0.3) + 1) / 2)
    by_hand = 1 / (1 + math.exp(-1)) - log_z
    yield given(same_value("two arms, r = (1, 0), β = 0.3: chosen", by_hand, two_arms(0.3), 1e-12))
    turns = [turning_beta(ref_logps, rewards), bisect(two_arms, 0.1, 2)]
    yield instead(same_digits("β where the sign turns: notices, two arms", "1.272, .459", *turns))
    averages = []
    for beta in (0.1, 0.3, 1, 3, 10, 100):
        _, average, _ = implicit_rewards(ref_logps, rewards, beta)
        averages.append(average)
    yield instead(below("largest average, β from 0.1 to 100", 0, vector(*averages)))


@LIKELIHOODS.claim("C54", "§5.4")
def the_sign_follows_from_two_divergences() -> Iterator[Finding]:
    """Whoever wrote the pairs, the mean of the chosen is β (KL(P_w ‖ π_ref) - KL(P_w ‖ π)).

    The paper's identities are its cases P_w = π_ref. It rises where training brings π nearer to P_w than π_ref was:
    pairs of a writer far from π_ref, and π* of them.
    """
    chosen = random_logps(20, seed=21)
    policies = TREE.sums(random_logps(20, seed=22))
    chosen_logps = TREE.sums(chosen)
    means = (chosen_logps.exp() * BETA * (policies - REF_PATH_LOGPS)).sum(-1)
    divergences = kl(chosen_logps, REF_PATH_LOGPS) - kl(chosen_logps, policies)
    yield vanishes("20 P_w and policies", means - BETA * divergences, 1e-12)

    writer = tilted(REF_PATH_LOGPS, RETURNS, BETA)
    mean = chosen_probs(writer, RETURNS) @ token_rewards(writer, REF_PATH_LOGPS, BETA)
    yield above("pairs of π* itself: mean of the chosen under π*", 0, mean)


LIKELIHOODS.elsewhere(
    "C55",
    "Fig. 3",
    "The likelihood of the chosen responses falls in training.",
    f"{TRAINED}: token_figures.py; C52 is the exact part",
)


@LIKELIHOODS.claim("C56", "§5.4", expected=Verdict.CORRECTED)
def the_likelihood_of_all_data_decreases() -> Iterator[Finding]:
    """With π_ref trained on the chosen, DPO decreases the likelihood of all data.

    Only on average. P_w = π_ref = (.6, .4), π* = (.9, .1): the first becomes likelier. Where the data cover all
    completions, all cannot fall.
    """
    ref_logps = vector(0.6, 0.4).log()
    rewards = token_rewards(vector(0.9, 0.1).log(), ref_logps, BETA)
    changes = tilted(ref_logps, rewards, BETA) - ref_logps
    yield below("largest change of log π", 0, changes)
    yield given(same_value("log(.9/.6)", math.log(1.5), float(changes.max())))
    yield instead(same_digits("mean change under P_w", "-.311", float(ref_logps.exp() @ changes)))


def cpl_loss(logits: Tensor, weights: Tensor) -> Tensor:
    """CPL with α = γ = 1, which is TYPO's preference term without its regulariser."""
    path_logps = logits.log_softmax(0)
    no_samples = torch.zeros(len(PAIRS), 1, dtype=torch.float64)
    return weights @ typo_loss(path_logps[PAIRS], no_samples, 0.0)


@LIKELIHOODS.claim("C57", "Fig. 3, §5.4", expected=Verdict.CORRECTED)
def cpl_rises_without_sft_and_falls_with_it() -> Iterator[Finding]:
    """CPL's implicit rewards of the chosen, log π, fall after SFT on the chosen, and increase if SFT is not used.

    After SFT they fall for every reward, by KL(P_w ‖ π). Without it they change by KL(P_w ‖ π_0) - KL(P_w ‖ π), which
    has either sign. From a uniform π_0 and its pairs, they rise for small rewards and fall for large ones.
    """
    start = uniform_logps(len(TREE.paths))
    slopes = []
    falls = []
    rises = []
    divergences = []
    for scale in (0.3, 1.0, 3.0):
        returns = scale * RETURNS
        trained = returns.log_softmax(0)
        weights = preferences(returns) / (len(PAIRS) / 2)
        chosen = torch.zeros_like(returns).index_add(0, CHOSEN, weights)
        slopes.append(torch.func.grad(cpl_loss)(trained, weights))
        falls.append(chosen @ (trained - chosen.log()))
        rises.append(chosen @ (trained - start))
        divergences.append(kl(chosen.log(), start) - kl(chosen.log(), trained))

    yield given(vanishes("gradient of the loss at softmax(r)", torch.stack(slopes), 1e-12))
    yield below("rewards × 0.3, 1, 3, after SFT: largest change", 0, torch.stack(falls))
    yield above("from uniform, rewards × 0.3", 0, rises[0])
    yield above("from uniform, rewards × 3", 0, rises[2])
    yield instead(vanishes("from uniform, less the two KL", torch.stack(rises) - torch.stack(divergences)))


@LIKELIHOODS.claim("C58", "§5.4")
def the_implied_q_need_not_rise() -> Iterator[Finding]:
    """DPO's implied Q-function, the logits of the model, does not necessarily increase over time.

    In a table it cannot: a step leaves the mean of a state's logits as it is, so that some rise and some fall.
    200 steps of gradient descent from π_ref.
    """
    weights = preferences(RETURNS) / len(PAIRS)

    def loss(logits: Tensor) -> Tensor:
        return weights @ sum_losses(logits.log_softmax(-1))

    gradient_of = torch.func.grad(loss)
    logits = REF_LOGPS
    for _ in range(200):
        logits = logits - 2.0 * gradient_of(logits)
    changes = BETA * (logits - REF_LOGPS)
    falling = int((changes < 0).sum())
    yield judged("of 45 entries of Q, those that fell", "> 0", falling, falling > 0)
    yield vanishes("mean change at each state", changes.mean(1))
    yield above("largest rise", 0.1, changes.max())


# ---------------------------------------------------------------- beyond the token MDP

BEYOND = PAPER.section("Beyond the token MDP (§6, appendices)")
GRID = torch.linspace(-6, 6, 65, dtype=torch.float64)
NUM_STEPS = 4
SHRINKAGE = 0.8
STEP_SCALE = 0.6
GRID_BETA = 0.5
STEP_LOGPS = gaussian_steps(GRID, NUM_STEPS, SHRINKAGE, STEP_SCALE)


def end_rewards() -> Tensor:
    """-(x_0 - 1)² at the last step, else 0, (T, X, X)."""
    rewards = torch.zeros_like(STEP_LOGPS)
    rewards[-1] = -((GRID - 1) ** 2)
    return rewards


def gaussian_value(x: Tensor) -> Tensor:
    """V*(x_T) in closed form: β log E exp(-(x_0 - 1)²/β) of a Gaussian x_0, whose mean is shrunk x_T."""
    mean = SHRINKAGE**NUM_STEPS * x
    variance = STEP_SCALE**2 * sum(SHRINKAGE ** (2 * step) for step in range(NUM_STEPS))
    log_factor = -0.5 * math.log(1 + 2 * variance / GRID_BETA)
    return GRID_BETA * log_factor - (mean - 1) ** 2 / (1 + 2 * variance / GRID_BETA)


@BEYOND.claim("C59", "Lemma 2")
def diffusion_has_the_bijection_too() -> Iterator[Finding]:
    """Rewards and optimal Q-functions are one to one in the diffusion MDP, and the optimum is the tilted reference.

    Four Gaussian denoising steps on a grid of 65 points, random rewards at all steps; and -(x_0 - 1)², β = 1/2, whose
    V* has a closed form. The sums stand for integrals, which must exist: Q* = 0 on the whole line has no V*.
    """
    rewards = normal(*STEP_LOGPS.shape, seed=23)
    q = solve_chain(rewards, STEP_LOGPS, GRID_BETA).q
    yield vanishes("r → Q* → r", inverse_chain(q, STEP_LOGPS, GRID_BETA) - rewards, 1e-9)
    random_q = normal(*STEP_LOGPS.shape, seed=27, scale=5)
    inverse = inverse_chain(random_q, STEP_LOGPS, GRID_BETA)
    q = solve_chain(inverse, STEP_LOGPS, GRID_BETA).q
    yield vanishes("Q → r → Q*", q - random_q, 1e-9)

    best = solve_chain(end_rewards(), STEP_LOGPS, GRID_BETA)
    wanted = tilted(end_logps(STEP_LOGPS), -((GRID - 1) ** 2), GRID_BETA)
    yield vanishes("π*(x_0 | x_T) less π_ref exp(r/β)/Z", end_logps(best.logps).exp() - wanted.exp())
    inside = GRID.abs() < 2
    differences = best.v[0] - gaussian_value(GRID)
    yield given(vanishes("V*(x_T) less the closed form, |x_T| < 2", differences[inside], 1e-8))


@BEYOND.claim("C59a", "App. B", expected=Verdict.CORRECTED)
def theorem_1_applies_to_diffusion() -> Iterator[Finding]:
    """Theorem 1 applies to the diffusion MDP: log-ratios of the denoising steps give the preferences of the rewards.

    If both of a pair start from the same noise x_T. The initial state (c, T) leaves x_T out; a sampler draws it, and
    then V*(x_T) does not cancel.
    """
    best = solve_chain(end_rewards(), STEP_LOGPS, GRID_BETA)
    # of all x_T and x_0: the log-ratio of any way between them
    log_ratios = GRID_BETA * (best.logps - STEP_LOGPS)
    rewards = -((GRID - 1) ** 2)
    staying = log_ratios[:3].diagonal(dim1=1, dim2=2).sum(0)
    totals = staying[:, None] + log_ratios[3]  # stays at x_T for three steps, then goes to x_0

    inside = (GRID.abs() < 2).nonzero().flatten()
    starts = inside.repeat_interleave(len(inside))
    ends = inside.repeat(len(inside))
    implicit = totals[starts, ends]
    returns = rewards[ends]
    errors = preferences_of_all(implicit) - preferences_of_all(returns)
    yield vanishes("any two ways: P of log-ratios less P of r", errors)
    corrected = preferences_of_all(implicit + best.v[0, starts]) - preferences_of_all(returns)
    yield instead(vanishes("with V*(x_T) added", corrected))
    row = totals[inside[0], inside]
    same_noise = preferences_of_all(row) - preferences_of_all(rewards[inside])
    yield instead(vanishes("two ways from the same x_T", same_noise))


def preferences_of_all(returns: Tensor) -> Tensor:
    """σ(r_i - r_j), (n,) → (n, n)."""
    return (returns[:, None] - returns).sigmoid()


@BEYOND.claim("C60", "App. B.2")
def pairs_may_come_from_any_policy() -> Iterator[Finding]:
    """Off-policy data are valid: the loss is least at π* for pairs from any distribution that connects trajectories.

    Three distributions of pairs on the tree, whose most and least frequent pair differ by a factor over 1,000.
    """
    distances = []
    spreads = []
    for seed in (24, 25, 26):
        pair_weights = normal(len(TREE.paths), len(TREE.paths), seed=seed, scale=1.5)
        symmetric = pair_weights + pair_weights.T
        frequencies = symmetric[CHOSEN, REJECTED].softmax(0)
        spreads.append(frequencies.max() / frequencies.min())
        trained = train(frequencies * preferences(RETURNS))
        distances.append(trained.exp() - optimum().logps.exp())
    yield vanishes("trained π less π*", torch.stack(distances), 1e-8)
    yield above("most over least frequent pair", 1000, torch.stack(spreads))


REFINER_BETA = 0.5
GENERATOR_BETA = 0.25
IMAGE_REWARDS = torch.stack([vector(1, 0), vector(0.2, 0.8)])  # of prompt z and image y
REFINER_REF = vector(0.4, 0.6).log()
GENERATOR_REF = uniform_logps(2).expand(2, 2)


def hybrid_optimum(refiner_ref: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V_β(x), log π(z|x) and log π(y|z) of E[r] - β KL of the refiner - γ KL of the generator."""
    generator = tilted(GENERATOR_REF, IMAGE_REWARDS, GENERATOR_BETA)
    values = GENERATOR_BETA * log_partition(GENERATOR_REF, IMAGE_REWARDS, GENERATOR_BETA)
    refiner = tilted(refiner_ref, values, REFINER_BETA)
    return REFINER_BETA * log_partition(refiner_ref, values, REFINER_BETA), refiner, generator


def hybrid_objective(parameters: Tensor) -> Tensor:
    """E[r] - β KL - γ E[KL] of the policies with six logits, two of the refiner and four of the generator."""
    refiner = parameters[:2].log_softmax(0)
    generator = parameters[2:].view(2, 2).log_softmax(1)
    generator_values = objective(generator, GENERATOR_REF, IMAGE_REWARDS, GENERATOR_BETA)
    return objective(refiner, REFINER_REF, generator_values, REFINER_BETA)


def hybrid_loss(parameters: Tensor) -> Tensor:
    """The expected Eq 18 over all ordered pairs of (z, y), uniformly."""
    refiner = token_rewards(parameters[:2].log_softmax(0), REFINER_REF, REFINER_BETA)
    generator = token_rewards(parameters[2:].view(2, 2).log_softmax(1), GENERATOR_REF, GENERATOR_BETA)
    returns = (refiner[:, None] + generator).flatten()  # Eq 17
    pairs = ordered_pairs(4)
    rewards = IMAGE_REWARDS.flatten()[pairs]
    wanted = (rewards[:, 0] - rewards[:, 1]).sigmoid()
    no_reference = torch.zeros_like(rewards)
    return wanted @ dpo_loss(returns[pairs], no_reference, 1.0)


@BEYOND.claim("C61", "Eqs 17, 18")
def a_refiner_and_a_generator_train_together() -> Iterator[Finding]:
    """A prompt refiner and a generator can be trained end to end by DPO, with a strength of its own for each, β and γ.

    Two prompts, two images, r = [[1, 0], [.2, .8]], β = 1/2, γ = 1/4. The generator's V_γ is the refiner's reward.
    """
    start = torch.cat([REFINER_REF, GENERATOR_REF.flatten()])
    value, refiner, generator = hybrid_optimum(REFINER_REF)
    _, uniform_refiner, _ = hybrid_optimum(uniform_logps(2))
    yield given(same_digits("uniform refiner: π*(z)", ".5904, .4096", *uniform_refiner.exp().tolist()))

    best = minimise(lambda parameters: -hybrid_objective(parameters), start)
    yield same_value("V(x), Newton's maximum of the objective", -best.loss, float(value), 1e-9)
    refiner_rewards = token_rewards(refiner, REFINER_REF, REFINER_BETA)
    generator_rewards = token_rewards(generator, GENERATOR_REF, GENERATOR_BETA)
    sums = refiner_rewards[:, None] + generator_rewards + value
    yield vanishes("Eq 17 + V(x) less r", sums - IMAGE_REWARDS, 1e-12)

    trained = minimise(hybrid_loss, start).parameters
    trained_refiner = trained[:2].softmax(0)
    trained_generator = trained[2:].view(2, 2).softmax(1)
    yield vanishes("Eq 18's minimiser, π(z) less the optimum's", trained_refiner - refiner.exp(), 1e-8)
    yield vanishes("and π(y|z)", trained_generator - generator.exp(), 1e-8)


BEYOND.elsewhere(
    "C62",
    "F.2",
    "Without SFT, DPO's samples are bad.",
    TRAINED,
)


@BEYOND.claim("C63", "App. H")
def a_random_order_avoids_position_bias() -> Iterator[Finding]:
    """The order of the two summaries is drawn for each comparison, so that a judge's bias for a place favours neither.

    A judge with log-odds d for the better summary and b for the first place. Equal summaries get 1/2. Unequal ones are
    ordered rightly, but the win rate is nearer to 1/2 than without bias.
    """
    gaps = torch.linspace(-3, 3, 13, dtype=torch.float64)
    bias = 2.0
    rates = ((gaps + bias).sigmoid() + (gaps - bias).sigmoid()) / 2
    yield vanishes("equal summaries, rate - 1/2", float(rates[6] - 0.5), 1e-12)
    yield vanishes("rates of (A, B) and (B, A), sum - 1", rates + rates.flip(0) - 1, 1e-12)
    fixed = float(vector(1 + bias).sigmoid())
    unbiased = float(vector(1).sigmoid())
    digits = ".953, .611, .731"
    yield given(
        same_digits("d = 1, b = 2: fixed order, random order, no bias", digits, fixed, float(rates[8]), unbiased)
    )


WIN_CHANCE = 0.3
OUTCOMES = vector(20, 0, 5)  # A's two outcomes, and B's only one
OUTCOME_PROBS = vector(WIN_CHANCE, 1 - WIN_CHANCE)


@BEYOND.claim("C64", "§4, §6", expected=Verdict.CORRECTED)
def the_theory_carries_over_to_agents() -> Iterator[Finding]:
    """The derivations indicate that DPO on whole trajectories could learn optimal behaviour of agents and in dialogues.

    So they could where the world answers deterministically, as §3.1 assumes. Else V*(s') does not cancel. Arm A pays 20
    with probability 0.3, else 0; B always pays 5, π_ref uniform, β = 1. The realised returns of A win with 0.305 only,
    and DPO takes B, where the optimum takes A.
    """
    wins = OUTCOME_PROBS * (OUTCOMES[:2] - OUTCOMES[2]).sigmoid()
    win_rate = wins.sum()
    weights = torch.stack([win_rate, 1 - win_rate])
    pairs = torch.tensor([(0, 1), (1, 0)])

    def losses(logps: Tensor) -> Tensor:
        return dpo_loss(logps[pairs], EVEN[pairs], 1.0)

    def log_odds_of(weights: Tensor) -> float:
        policy = fit_policy(losses, weights, EVEN).policy
        return float(policy.log()[0] - policy.log()[1])

    log_odds = log_odds_of(weights)
    optimal = tilted(EVEN, vector(6, 5), 1.0)
    best_log_odds = float(optimal[0] - optimal[1])
    yield same_value("log-odds of A, those of the optimum", best_log_odds, log_odds)
    yield given(same_value("log(p/(1 - p)), p = .3 σ(15) + .7 σ(-5)", math.log(win_rate / (1 - win_rate)), log_odds))
    yield given(same_digits("DPO, the optimum (mean returns 6 and 5)", "-.825, 1", log_odds, best_log_odds))

    deterministic = vector(1, -1).sigmoid()
    yield instead(same_value("where A always pays 6", best_log_odds, log_odds_of(deterministic)))


# ---------------------------------------------------------------- figures


def draw_table(axes: "Axes", table: Tensor, order: list[int], limit: float) -> "AxesImage":
    """The rewards (S, A) along the trajectories in an order, a row for each and a column for each step."""
    steps = torch.full((len(order), TREE.horizon), math.nan)
    for row, index in enumerate(order):
        rewards = TREE.along(table, TREE.paths[index])
        steps[row, : len(rewards)] = rewards
    axes.set_facecolor("#dddddd")
    labels = [str(step + 1) for step in range(TREE.horizon)]
    axes.set_xticks(range(TREE.horizon), labels)
    axes.spines[:].set_visible(False)
    return axes.imshow(steps.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")


@PAPER.figure(
    "Token rewards of the 31 trajectories, the best return on top; grey after the end. DPO recovers the same token "
    "rewards β log π*/π_ref (right) from a dense reward and from a sparse one with the same returns (left)."
)
def token_rewards_on_the_tree() -> "Figure":
    order = RETURNS.argsort(descending=True).tolist()
    recovered = log_ratios_of(optimum().logps)
    panels = {
        "dense": ("a dense reward", REWARDS),
        "sparse": ("the sparse reward of equal returns", TREE.at_the_end(RETURNS)),
        "recovered": ("what DPO recovers from either", recovered),
    }
    labels = ["".join("ab■"[token] for token in TREE.paths[index]) for index in order]

    figure, axes_of = canvas([list(panels)], (10, 5.5))
    for name, (title, table) in panels.items():
        axes = axes_of[name]
        image = draw_table(axes, table, order, limit=5)
        label_axes(axes, title, "step t", "")
        axes.set_yticks([])
    axes_of["dense"].set_yticks(range(len(labels)), labels, fontsize=7, family="monospace")
    axes_of["dense"].set_ylabel("trajectory (■ = EOS)")
    figure.colorbar(image, ax=list(axes_of.values()), label="reward of the token", shrink=0.8)
    return figure


@PAPER.figure(
    "Root mean square of learned less true token rewards, against the number of judged pairs: ten seeds, and the slope "
    "-1/2 through their mean (C22)."
)
def distance_of_token_rewards() -> "Figure":
    figure, axes_of = canvas([["distance"]], (5.5, 4))
    axes = axes_of["distance"]
    counts = torch.tensor(JUDGMENTS).double() * len(PAIRS) / 2
    distances = sampled_distances()
    centre = (distances.log().mean() + counts.log().mean() / 2).exp()
    axes.loglog(counts, centre / counts.sqrt(), color=GREY, linestyle="--", label="slope -1/2")
    axes.loglog(counts, distances.mean(1), color=BLUE, marker="o", label="mean of ten seeds")
    axes.loglog(counts, distances, color=BLUE, marker=".", linestyle="none", alpha=0.4)
    label_axes(axes, "Token rewards learned from n pairs", "pairs n", "distance (units of reward)")
    return figure


@PAPER.figure(
    "Mean implicit reward at the optimum for pairs that π_ref wrote, against β: chosen, all and rejected. The average "
    "is negative at every β; the chosen are below zero up to the dotted β (C53)."
)
def implicit_rewards_against_beta() -> "Figure":
    figure, axes_of = canvas([["tree", "notices"]], (10, 4))
    worlds = {"tree": (REF_PATH_LOGPS, RETURNS), "notices": notices_world()}
    titles = {"tree": "the token tree, 31 trajectories", "notices": "the notices' demonstrations"}
    betas = torch.logspace(-1, 1, 60).tolist()
    for name, (ref_logps, returns) in worlds.items():
        axes = axes_of[name]
        means = [implicit_rewards(ref_logps, returns, beta) for beta in betas]
        lines = zip(("chosen", "average", "rejected"), (GREEN, GREY, ORANGE), zip(*means, strict=True), strict=True)
        for label, color, values in lines:
            axes.semilogx(betas, values, color=color, label=label)
        axes.axhline(0, color="black", linewidth=0.8)
        turn = turning_beta(ref_logps, returns)
        axes.axvline(turn, color=GREEN, linestyle=":", label=f"β = {turn:.2f}")
        label_axes(axes, titles[name], "β (units of reward per nat)", "mean of β log π*/π_ref (reward)")
    return figure


@PAPER.figure(
    "Proxy tuning: the probability of the first of two tokens against β in Eq 14 and in Eq 15 as printed (C46). "
    "π_base = (.5, .5), π_proxy = (.8, .2). Left: π_ref = π_base, β_t = 0.1; right: π_ref = (.9, .1), β_t = 1."
)
def proxy_tuning_by_two_equations() -> "Figure":
    figure, axes_of = canvas([["exponent", "reference"]], (10, 4))
    cases = {"exponent": (EVEN, 0.1), "reference": (SKEWED, 1.0)}
    titles = {"exponent": "the exponent lacks 1/β_t", "reference": "the ratio lacks π_ref"}
    betas = torch.linspace(0, 3, 61).tolist()
    for name, (ref_logps, proxy_beta) in cases.items():
        axes = axes_of[name]
        eq_14 = [proxy_logps(EVEN, TUNED, ref_logps, beta)[0].exp() for beta in betas]
        eq_15 = [equation_15(EVEN, TUNED, ref_logps, beta, proxy_beta)[0].exp() for beta in betas]
        axes.plot(betas, eq_14, color=BLUE, label="Eq 14")
        axes.plot(betas, eq_15, color=ORANGE, linestyle="--", label="Eq 15")
        axes.set_ylim(0, 1)
        label_axes(axes, titles[name], "β", "probability of the first token")
    return figure


@PAPER.figure(
    "Denoising on a grid, from x_T = 0 in four steps, r = -(x_0 - 1)², β = 1/2. Left: densities of x_0 of π_ref and "
    "of π*. Right: V*(x_T), which does not cancel between two images that start from different noise (C59a)."
)
def diffusion_on_a_grid() -> "Figure":
    figure, axes_of = canvas([["density", "value"]], (10, 4))
    best = solve_chain(end_rewards(), STEP_LOGPS, GRID_BETA)
    spacing = float(GRID[1] - GRID[0])
    start = int(GRID.abs().argmin())

    axes = axes_of["density"]
    densities = {"π_ref": (STEP_LOGPS, GREY), "π*": (best.logps, BLUE)}
    for label, (logps, color) in densities.items():
        probs = end_logps(logps)[start].exp()
        axes.plot(GRID, probs / spacing, color=color, label=label)
    axes.axvline(1, color=GREEN, linestyle=":", label="best reward")
    axes.set_xlim(-4, 4)
    label_axes(axes, "from x_T = 0", "x_0", "density of x_0")

    axes = axes_of["value"]
    axes.plot(GRID, gaussian_value(GRID), color=GREY, linewidth=4, alpha=0.5, label="closed form")
    axes.plot(GRID, best.v[0], color=BLUE, label="backward induction")
    axes.set_xlim(-4, 4)
    axes.set_ylim(-2.2, 0)
    label_axes(axes, "the value of the noise", "x_T", "V*(x_T) (units of reward)")
    return figure


def main(args: Args) -> None:
    paper_command(PAPER, args)


if __name__ == "__main__":
    checked_command(main, Args)
