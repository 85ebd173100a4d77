"""Worlds that can be enumerated: all groups of K samples of a few completions, and all sequences of a bigram model."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # (logps, ref_logps, target_logps, β) → losses (B,)


class Task(NamedTuple):
    """The completions of one prompt: what π_sft and the reward model say of them."""

    ref_logps: Tensor  # (S,)
    rewards: Tensor  # (S,)


# ---------------------------------------------------------------- groups of K samples


class Groups(NamedTuple):
    """Groups of K completions by their indices (B, K), and the weight of each group (B,)."""

    completions: Tensor
    weights: Tensor


def single_group(*completions: int) -> Groups:
    """One group with weight 1."""
    return Groups(torch.tensor([completions]), torch.ones(1, dtype=torch.float64))


def all_groups(ref_logps: Tensor, k: int) -> Groups:
    """All multisets of K independent samples, with their probabilities."""
    num_completions = len(ref_logps)
    multisets = itertools.combinations_with_replacement(range(num_completions), k)
    completions = torch.tensor(list(multisets))
    counts = torch.nn.functional.one_hot(completions, num_completions).sum(1).double()
    log_orders = math.lgamma(k + 1) - torch.lgamma(counts + 1).sum(1)
    log_probs = log_orders + counts @ ref_logps
    return Groups(completions, log_probs.exp())


def drawn_groups(ref_logps: Tensor, k: int, num_groups: int, seed: int) -> Groups:
    """Groups of K independent samples, with equal weights."""
    generator = torch.Generator().manual_seed(seed)
    probs = ref_logps.exp().expand(num_groups, -1)
    completions = torch.multinomial(probs, k, replacement=True, generator=generator)
    weights = torch.full((num_groups,), 1 / num_groups, dtype=torch.float64)
    return Groups(completions, weights)


def group_losses(
    loss: Loss,
    task: Task,
    logps: Tensor,
    completions: Tensor,
    beta: float,
    beta_r: float,
) -> Tensor:
    """The losses (B,) of groups (B, K) at log π_θ (S,), as a training run computes them."""
    rewards = task.rewards[completions]
    target_logps = (rewards / beta_r).log_softmax(1)
    return loss(logps[completions], task.ref_logps[completions], target_logps, beta)


def expected_loss(
    loss: Loss,
    task: Task,
    logps: Tensor,
    groups: Groups,
    beta: float,
    beta_r: float,
) -> Tensor:
    """The weighted sum of the losses of the groups."""
    losses = group_losses(loss, task, logps, groups.completions, beta, beta_r)
    return groups.weights @ losses


# ---------------------------------------------------------------- the same groups by how often they hold a completion


class Counts(NamedTuple):
    """How often each group holds each completion (B, S), and the weight of each group (B,)."""

    counts: Tensor
    weights: Tensor


def counted(groups: Groups, num_completions: int) -> Counts:
    """Groups by their counts. Equal groups become one, with the sum of their weights."""
    num_groups = len(groups.weights)
    counts = torch.zeros(num_groups, num_completions, dtype=torch.float64)
    ones = torch.ones_like(groups.completions, dtype=torch.float64)
    counts.scatter_add_(1, groups.completions, ones)
    distinct, group_of = torch.unique(counts, dim=0, return_inverse=True)
    weights = torch.zeros(len(distinct), dtype=torch.float64)
    weights.index_add_(0, group_of, groups.weights)
    return Counts(distinct, weights)


def infinite_group(proposal_logps: Tensor) -> Counts:
    """The limit K → ∞: one group that holds each completion in proportion to the proposal."""
    return Counts(proposal_logps.exp()[None], torch.ones(1, dtype=torch.float64))


def counted_loss(
    loss: Loss,
    task: Task,
    logps: Tensor,
    groups: Counts,
    beta: float,
    beta_r: float,
) -> Tensor:
    """`expected_loss` of counted groups, up to a constant.

    A completion that occurs c times has c equal terms in each sum. They become one term with log c added to β ρ and to
    the target's logit, which changes DPO-rw's loss by a constant and EXO's not at all.
    """
    log_counts = groups.counts.log().clamp(min=-1e4)  # of a completion that is not there: q and p underflow to 0
    target_logps = (task.rewards / beta_r + log_counts).log_softmax(1)
    ref_logps = task.ref_logps - log_counts / beta
    losses = loss(logps.expand_as(log_counts), ref_logps, target_logps, beta)
    return groups.weights @ losses


# ---------------------------------------------------------------- all sequences of a small vocabulary


class BigramWorld(NamedTuple):
    """All sequences, a bigram model that is π_sft, and rewards that no bigram model can follow."""

    sequences: Tensor  # (S, length)
    sft: Tensor  # the parameters of π_sft
    task: Task

    def logps(self, parameters: Tensor) -> Tensor:
        """log π (S,) of the bigram model."""
        return bigram_logps(parameters, self.sequences)


def all_sequences(vocabulary: int, length: int) -> Tensor:
    """Every sequence of tokens, (vocabulary ** length, length)."""
    tokens = range(vocabulary)
    sequences = itertools.product(tokens, repeat=length)
    return torch.tensor(list(sequences))


def bigram_logps(parameters: Tensor, sequences: Tensor) -> Tensor:
    """log π of each sequence. The parameters are the logits of the first token, then those after each token."""
    vocabulary = int(sequences.max()) + 1
    table = parameters.view(vocabulary + 1, vocabulary).log_softmax(1)
    return table[contexts(sequences), sequences].sum(1)


def contexts(sequences: Tensor) -> Tensor:
    """The row of the bigram table for each token: 0 for the first one, else 1 plus the token before."""
    start = torch.zeros_like(sequences[:, :1])
    previous = sequences[:, :-1]
    return torch.cat([start, previous + 1], 1)


def random_world(seed: int, vocabulary: int = 3, length: int = 3) -> BigramWorld:
    """Standard normal logits of π_sft, and a standard normal reward of each pair of first and last token."""
    generator = torch.Generator().manual_seed(seed)
    sequences = all_sequences(vocabulary, length)
    num_parameters = (vocabulary + 1) * vocabulary
    sft = torch.randn(num_parameters, generator=generator, dtype=torch.float64)
    table = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
    rewards = table[sequences[:, 0], sequences[:, -1]]
    ref_logps = bigram_logps(sft, sequences)
    return BigramWorld(sequences, sft, Task(ref_logps, rewards))


def matched_bigram(logps: Tensor, sequences: Tensor) -> Tensor:
    """The bigram model's log-probs with the smallest KL(π ‖ ·): its frequencies are those of π."""
    vocabulary = int(sequences.max()) + 1
    frequencies = torch.zeros(vocabulary + 1, vocabulary, dtype=torch.float64)
    places = (contexts(sequences), sequences)
    weights = logps.exp()[:, None].expand_as(sequences)
    frequencies.index_put_(places, weights, accumulate=True)
    return bigram_logps(frequencies.log().flatten(), sequences)


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-9) -> Tensor:
    """The parameters at which L-BFGS stops, where no entry of the gradient is above the tolerance.

    It is faster than Newton's method over many groups.
    """
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=500,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    optimizer.step(closure)
    return parameters.detach()
