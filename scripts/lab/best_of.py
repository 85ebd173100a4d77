"""The best of N samples by exact order statistics, and how far it is from the policy.

Of M samples of a prompt, N are drawn without replacement, and the one with the highest score is selected. Between equal
scores chance decides. Over all subsets of N, sample k is selected with the probability

    w_k = [C(L_k + E_k, N) - C(L_k, N)] / [C(M, N) E_k]

where L_k samples have a lower score than k, and E_k have the same one, k itself among them: the highest score of the
subset is that of k if the subset lies in the L_k + E_k and not in the L_k samples, and then each of the E_k is as
likely. Σ_k w_k v_k is the mean over all subsets of any value v of the selected sample. It is an unbiased estimate of
what the best of N independent samples has.
"""

import math

import torch
from torch import Tensor

from scripts.lab.statistics import mean_and_interval


def selection_weights(scores: Tensor, num_drawn: int) -> Tensor:
    """The probability that each of M samples is the best of `num_drawn`, (n, M) → (n, M), float64. Rows sum to 1."""
    num_samples = scores.shape[1]
    num_subsets = math.comb(num_samples, num_drawn)
    shares = []  # of the subsets, those that lie in given m samples
    for m in range(num_samples + 1):
        subsets_within = math.comb(m, num_drawn)
        shares.append(subsets_within / num_subsets)
    share_within = torch.tensor(shares, dtype=torch.double)

    each = scores.unsqueeze(2)  # (n, M, 1)
    others = scores.unsqueeze(1)
    num_lower = (others < each).sum(2)
    num_equal = (others == each).sum(2)

    is_highest = share_within[num_lower + num_equal] - share_within[num_lower]
    return is_highest / num_equal


def kl_bound(num_drawn: int) -> float:
    """KL(best of N ‖ policy) ≤ log N - (N - 1) / N, in nats.

    The KL reaches it if no two completions have equal scores and each has a small probability.
    """
    return math.log(num_drawn) - (num_drawn - 1) / num_drawn


def best_of(scores: Tensor, num_drawn: int, values: dict[str, Tensor], seed: int) -> dict:
    """Values of the best of `num_drawn` by the scores: for each its mean, its interval, and `by_prompt`; `kl_bound`.

    scores, and each of the values: (n, M).
    """
    weights = selection_weights(scores, num_drawn)
    numbers: dict = {"kl_bound": kl_bound(num_drawn)}
    by_prompt = {}
    for name, sample_values in values.items():
        expected = (weights * sample_values).sum(1)
        numbers[name] = mean_and_interval(expected, seed)
        by_prompt[name] = expected.tolist()

    numbers["by_prompt"] = by_prompt
    return numbers
