"""Exact expectations by enumeration: of the policy gradient, of the best of N samples, and over all sequences.

The last part is a language model so small that all its completions can be listed. It is a table (prefixes, tokens) of
log-probs, one row for each prefix after which a token follows.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------- the policy gradient


class Moments(NamedTuple):
    """Mean and variance of a random vector."""

    mean: Tensor
    variance: float  # summed over the entries: the trace of the covariance


def gradient_moments(logps: Tensor, advantages: Tensor) -> Moments:
    """Moments of the one-sample estimate ∇ log π(y) A(y), y ~ π, of a policy gradient.

    logps, advantages: (completions,). The gradient is that of softmax logits: ∇ log π(y) = e_y - π.
    """
    policy = logps.exp()
    units = torch.eye(len(policy), dtype=policy.dtype)
    scores = units - policy  # one row for each y
    gradients = scores * advantages[:, None]

    mean = policy @ gradients
    squares = (gradients - mean).square().sum(1)
    variance = policy @ squares
    return Moments(mean, float(variance))


# ---------------------------------------------------------------- the best of N samples


def best_of(policy: Tensor, rewards: Tensor, n: int) -> Tensor:
    """The distribution of the best of n samples, (completions,). No two rewards are equal.

    P(best = y) = F(y)^n - F(y')^n, with F the distribution function of the rewards and y' the next worse completion.
    """
    order = rewards.argsort()
    at_most = policy[order].cumsum(0)  # P(a sample is at most as good)
    powers = at_most**n  # P(the best is at most as good)

    best = torch.zeros_like(policy)
    best[order] = powers
    best[order[1:]] -= powers[:-1]
    return best


def win_rate(policy: Tensor, baseline: Tensor, rewards: Tensor) -> float:
    """P(r(y) > r(y')) for y from the policy and y' from the baseline; a tie counts half."""
    levels, level_of = rewards.unique(return_inverse=True)  # in ascending order
    mass = torch.zeros(len(levels), dtype=baseline.dtype).index_add(0, level_of, baseline)
    beaten = mass.cumsum(0) - mass / 2
    return float(policy @ beaten[level_of])


# ---------------------------------------------------------------- all sequences

WORDS = 3
END = WORDS  # the token that ends a sequence
HORIZON = 6  # a sequence of so many words ends by itself
Sequence = tuple[int, ...]


def sequences_of_words(length: int) -> list[Sequence]:
    """All sequences of so many words, without END."""
    return list(itertools.product(range(WORDS), repeat=length))


PREFIXES: list[Sequence] = []  # from short to long
for length in range(HORIZON):
    PREFIXES += sequences_of_words(length)

COMPLETIONS = [(*prefix, END) for prefix in PREFIXES]
COMPLETIONS += sequences_of_words(HORIZON)
ROW_OF = {prefix: row for row, prefix in enumerate(PREFIXES)}


def random_model(seed: int) -> Tensor:
    """Log-probs of the next token after each prefix, (prefixes, tokens), at random."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(PREFIXES), WORDS + 1)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.log_softmax(1)


def along(table: Tensor, sequence: Sequence) -> Tensor:
    """The sum of a table's entries at the tokens of a sequence."""
    rows = [ROW_OF[sequence[:t]] for t in range(len(sequence))]
    return table[rows, sequence].sum()


def along_completions(table: Tensor) -> Tensor:
    """The sum of a table's entries along each completion, (completions,)."""
    sums = [along(table, completion) for completion in COMPLETIONS]
    return torch.stack(sums)


def along_prefixes(table: Tensor) -> Tensor:
    """The sum of a table's entries along each prefix, (prefixes,)."""
    sums = [along(table, prefix) for prefix in PREFIXES]
    return torch.stack(sums)


def soft_value(ref: Tensor, rewards: Tensor, beta: float) -> float:
    """V(x) by soft Bellman backups from the ends: V(s) = β log Σ_a π_ref(a|s) exp(V(s, a)/β).

    ref: a model (prefixes, tokens). rewards: (completions,), the values of the ends.
    """
    values = dict(zip(COMPLETIONS, rewards.unbind(), strict=True))
    for prefix in reversed(PREFIXES):
        next_values = [values[(*prefix, token)] for token in range(WORDS + 1)]
        log_weights = ref[ROW_OF[prefix]] + torch.stack(next_values) / beta
        values[prefix] = beta * log_weights.logsumexp(0)
    return float(values[()])
