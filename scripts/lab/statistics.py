"""Means with 95% bootstrap intervals, win rates and AUROC, and how a number with its interval is written.

A number is a dictionary with a `mean` and an `interval`, [low, high]. The intervals are percentiles over resampled
prompts. Completions are not resampled, because completions of one prompt are not independent.
"""

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


# ---------------------------------------------------------------- AUROC


def auroc(suspicion: Tensor, wrong: Tensor, weights: Tensor) -> float:
    """P(suspicion of a wrong token > that of a correct one) + P(equal) / 2, over all pairs of such tokens.

    This is the Mann-Whitney U divided by its maximum. It is computed exactly.

    suspicion, wrong: (n, T), for n prompts with T tokens each. weights: (n,), how often each prompt counts.
    """
    correct = ~wrong
    values, rank = suspicion.unique(return_inverse=True)
    num_values = len(values)
    token_weights = weights.double().unsqueeze(1).expand_as(suspicion)

    # how many tokens of each kind have each value, in ascending order
    num_wrong = torch.bincount(rank[wrong], token_weights[wrong], num_values)
    num_correct = torch.bincount(rank[correct], token_weights[correct], num_values)

    # for each value, the correct tokens below it and half of those that equal it
    num_below = num_correct.cumsum(0) - num_correct / 2
    wins = num_wrong @ num_below
    pairs = num_wrong.sum() * num_correct.sum()
    return float(wins / pairs)


def auroc_and_interval(suspicion: Tensor, wrong: Tensor, seed: int) -> dict:
    """The AUROC over all prompts, and its 95% interval from 2,000 resamples of the prompts."""
    n = len(suspicion)
    resampled = []
    for indices in resample_prompts(n, seed):
        counts = indices.bincount(minlength=n)
        resampled.append(auroc(suspicion, wrong, counts))

    values = torch.tensor(resampled, dtype=torch.double)
    interval = percentile_interval(values)
    all_once = torch.ones(n)
    return {"mean": auroc(suspicion, wrong, all_once), "interval": interval}
