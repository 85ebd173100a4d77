"""Statistics against pairs counted by hand, the normal interval, and the share of intervals that hold the truth."""

import math

import pytest
import torch
from torch import Tensor

from scripts.lab.statistics import bootstrap, interval_text, mean_and_interval, win_rates


def normal_values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.double)


def test_win_rate_counts_all_pairs_and_ties_half() -> None:
    rewards = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
    baseline = torch.tensor([[1.0, 0.0], [0.0, 0.0], [4.0, 5.0]])

    # pairs by hand: 1-1 is a tie, and 1-0, 2-1, 2-0 are won; four ties; all are lost
    assert win_rates(rewards, baseline).tolist() == [3.5 / 4, 0.5, 0.0]


def test_a_policy_wins_half_of_the_pairs_against_itself() -> None:
    rewards = normal_values(50, 4)
    assert win_rates(rewards, rewards).tolist() == [0.5] * 50


def test_bootstrap_equals_the_normal_interval_of_a_large_sample() -> None:
    values = 3 * normal_values(4_000, seed=1) + 2
    mean = float(values.mean())
    half_width = 1.959964 * float(values.std()) / math.sqrt(4_000)

    low, high = bootstrap(values, seed=0)

    # the quantiles of 2,000 resamples have a standard error of about 6% of a half width
    assert (mean - low) / half_width == pytest.approx(1, abs=0.15)
    assert (high - mean) / half_width == pytest.approx(1, abs=0.15)


def test_bootstrap_covers_the_true_mean_about_95_times_in_100() -> None:
    num_covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(100, generator=generator, dtype=torch.double)
        low, high = bootstrap(values, seed)
        if low <= 0.5 <= high:
            num_covered += 1
    assert 180 <= num_covered <= 198


def test_bootstrap_is_seeded_and_has_no_width_without_spread() -> None:
    values = torch.arange(20.0)
    assert bootstrap(values, 3) == bootstrap(values, 3)
    assert bootstrap(values, 3) != bootstrap(values, 4)

    constant = torch.full((9,), 2.5)
    assert bootstrap(constant, 0) == (2.5, 2.5)
    assert mean_and_interval(constant, 0) == {"mean": 2.5, "interval": (2.5, 2.5)}


def test_an_interval_is_written_in_brackets() -> None:
    number = {"mean": 1.25, "interval": [-0.5, 12.0]}
    assert interval_text(number, ".2f") == "1.25 [-0.50, 12.00]"
