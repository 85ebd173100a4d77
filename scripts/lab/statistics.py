"""Means with 95% bootstrap intervals, over prompts or over seeds and prompts, win rates, AUROC, and the Wald test.

A number is a dictionary with a `mean` and an `interval`, [low, high]. The intervals are percentiles over resampled
prompts. Completions are not resampled, because completions of one prompt are not independent.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2_000  # of the prompts, for each interval


def win_rates(rewards: Tensor, baseline: Tensor) -> Tensor:
    """For each prompt, the share of pairs of samples that win; a tie counts half. (n, K), (n, K') → (n,)."""
    ours = rewards.unsqueeze(2)
    theirs = baseline.unsqueeze(1)
    signs = (ours - theirs).sign()  # (n, K, K')
    wins = (signs + 1) / 2
    return wins.mean((1, 2))


def bootstrap(values: Tensor, seed: int) -> tuple[float, float]:
    """The 95% percentile interval of the mean of `values` (n,), one per prompt, from 2,000 resamples of the prompts."""
    indices = resample_prompts(len(values), seed)
    resampled = values.double()[indices]
    means = resampled.mean(1)
    return percentile_interval(means)


def resample_prompts(n: int, seed: int) -> Tensor:
    """Indices of n prompts, drawn with replacement, for each resample: (2,000, n)."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    shape = (RESAMPLES, n)
    return torch.randint(n, shape, generator=generator)


def percentile_interval(values: Tensor) -> tuple[float, float]:
    """The 95% interval of a statistic from its value in each resample."""
    tails = torch.tensor([0.025, 0.975], dtype=torch.double)
    quantiles = values.quantile(tails)
    low, high = quantiles.tolist()
    return low, high


def mean_and_interval(values: Tensor, seed: int) -> dict:
    """The mean of `values` (n,), one per prompt, and its 95% interval."""
    mean = float(values.mean())
    interval = bootstrap(values, seed)
    return {"mean": mean, "interval": interval}


def interval_text(number: dict, form: str) -> str:
    """A number as "mean [low, high]". `form` is the format of all three, such as ".2f"."""
    mean = format(number["mean"], form)
    low, high = number["interval"]
    return f"{mean} [{low:{form}}, {high:{form}}]"


# ---------------------------------------------------------------- seeds and prompts

Statistic = Callable[[Tensor], Tensor]  # how often each prompt counts in each resample, (R, n) → its value there, (R,)


def mean_over_seeds(values: Sequence[Tensor], seed: int = 0) -> dict:
    """The mean of the seeds' means and its 95% interval over seeds and prompts.

    values: for each seed (n,), one number per prompt. A paired comparison has the differences there.
    """
    statistics = [_mean_of(column) for column in values]
    num_prompts = [len(column) for column in values]
    return over_seeds(statistics, num_prompts, seed)


def _mean_of(values: Tensor) -> Statistic:
    """The mean of `values` (n,) in each resample."""

    def statistic(counts: Tensor) -> Tensor:
        sums = counts @ values.double()
        return sums / counts.sum(1)

    return statistic


def over_seeds(statistics: Sequence[Statistic], num_prompts: Sequence[int], seed: int = 0) -> dict:
    """The mean over seeds of a statistic of each seed's prompts, and its 95% interval from 2,000 resamples.

    A resample has S seeds, drawn with replacement, and for each of them its prompts, drawn with replacement. Its
    variance between seeds is (S - 1)/S of an unbiased one, so that the interval is narrow with few seeds.
    """
    generator = torch.Generator()
    generator.manual_seed(seed)
    num_seeds = len(statistics)
    drawn_seeds = torch.randint(num_seeds, (RESAMPLES, num_seeds), generator=generator)

    resampled = torch.zeros(RESAMPLES, num_seeds, dtype=torch.double)
    total = 0.0
    for i, statistic in enumerate(statistics):
        n = num_prompts[i]
        all_once = torch.ones(1, n, dtype=torch.double)
        total += float(statistic(all_once))

        drawn = drawn_seeds == i
        shape = (int(drawn.sum()), n)
        indices = torch.randint(n, shape, generator=generator)
        resampled[drawn] = statistic(counts_of(indices))

    means = resampled.mean(1)
    return {"mean": total / num_seeds, "interval": percentile_interval(means)}


def counts_of(indices: Tensor) -> Tensor:
    """How often each of n indices is in each resample, (R, n) → (R, n)."""
    counts = torch.zeros(indices.shape, dtype=torch.double)
    ones = torch.ones_like(counts)
    return counts.scatter_add(1, indices, ones)


class WaldTest(NamedTuple):
    """The test of a mean of zero: z, its distance from 0 in standard errors, and the two-sided p of a normal z."""

    z: float
    p: float


def wald_test(values: Sequence[Tensor]) -> WaldTest:
    """Test that the mean over seeds of `values`, for each seed (n,), is zero; for paired differences, as a rule.

    Only the prompts are a sample, the seeds are fixed: the squared standard error is Σ_s (Var_s / n_s) / S².
    """
    sum_of_means = 0.0
    variance = 0.0  # of that sum
    for column in values:
        numbers = column.double()
        sum_of_means += float(numbers.mean())
        variance += float(numbers.var()) / len(numbers)

    z = sum_of_means / math.sqrt(variance)
    p = math.erfc(abs(z) / math.sqrt(2))
    return WaldTest(z, p)


# ---------------------------------------------------------------- AUROC


def auroc(suspicion: Tensor, wrong: Tensor, weights: Tensor) -> float:
    """P(suspicion of a wrong token > that of a correct one) + P(equal) / 2, over all pairs of such tokens.

    This is the Mann-Whitney U divided by its maximum. It is computed exactly.

    suspicion, wrong: (n, T), for n prompts with T tokens each. weights: (n,), how often each prompt counts.
    """
    statistic = auroc_of(suspicion, wrong)
    counts = weights.double().unsqueeze(0)
    return float(statistic(counts))


def auroc_of(suspicion: Tensor, wrong: Tensor) -> Statistic:
    """The AUROC of `auroc`, as a function of how often each prompt counts in each resample."""
    values, rank = suspicion.unique(return_inverse=True)
    is_wrong = wrong.double()

    # how many tokens of each kind have each value, in ascending order, for each prompt
    none = torch.zeros(len(suspicion), len(values), dtype=torch.double)
    num_wrong = none.scatter_add(1, rank, is_wrong)
    num_correct = none.scatter_add(1, rank, 1 - is_wrong)

    def statistic(counts: Tensor) -> Tensor:
        wrong_counts = counts @ num_wrong
        correct_counts = counts @ num_correct
        # for each value, the correct tokens below it and half of those that equal it
        num_below = correct_counts.cumsum(1) - correct_counts / 2
        wins = (wrong_counts * num_below).sum(1)
        pairs = wrong_counts.sum(1) * correct_counts.sum(1)
        return wins / pairs

    return statistic


def auroc_and_interval(suspicion: Tensor, wrong: Tensor, seed: int) -> dict:
    """The AUROC over all prompts, and its 95% interval from 2,000 resamples of the prompts."""
    n = len(suspicion)
    counts = counts_of(resample_prompts(n, seed))
    statistic = auroc_of(suspicion, wrong)
    interval = percentile_interval(statistic(counts))
    return {"mean": auroc(suspicion, wrong, torch.ones(n)), "interval": interval}


def auroc_over_seeds(suspicion: Sequence[Tensor], wrong: Sequence[Tensor], seed: int = 0) -> dict:
    """The mean of the seeds' AUROC and its 95% interval over seeds and prompts; (n, T) for each seed."""
    statistics = list(map(auroc_of, suspicion, wrong))
    num_prompts = [len(tokens) for tokens in suspicion]
    return over_seeds(statistics, num_prompts, seed)
