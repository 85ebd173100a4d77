"""Statistics against pairs counted by hand, the normal interval, and the share of intervals that hold the truth."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.lab import statistics
from scripts.lab.statistics import (
    bootstrap,
    interval_text,
    mean_and_interval,
    mean_over_seeds,
    wald_test,
    win_rates,
)


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


# ---------------------------------------------------------------- seeds and prompts


def test_two_levels_equal_a_plain_loop() -> None:
    """The same draws by numpy, one resample at a time."""
    values = [normal_values(7, seed=1), 3 + normal_values(5, seed=2), normal_values(9, seed=3)]
    number = mean_over_seeds(values, seed=4)

    columns = [column.numpy() for column in values]
    rng = np.random.default_rng(0)
    means = []
    for _ in range(6_000):
        total = 0.0
        for i in rng.integers(3, size=3):
            n = len(columns[i])
            drawn = columns[i][rng.integers(n, size=n)]
            total += drawn.mean()
        means.append(total / 3)

    assert number["mean"] == pytest.approx(np.mean([column.mean() for column in values]))
    low, high = np.quantile(means, [0.025, 0.975])
    width = high - low
    assert number["interval"][0] == pytest.approx(low, abs=0.07 * width)
    assert number["interval"][1] == pytest.approx(high, abs=0.07 * width)


def test_two_levels_have_the_variance_of_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Var = (Var_s(mean_s) + mean_s(Var_s / n)) / S, with the variances of what is resampled, not of its model."""
    monkeypatch.setattr(statistics, "RESAMPLES", 40_000)
    offsets = torch.linspace(-2, 2, 12).double().unsqueeze(1)
    values = offsets + 4 * normal_values(12, 30, seed=5)
    low, high = mean_over_seeds(list(values), seed=0)["interval"]

    between = float(values.mean(1).var(correction=0))
    within = float(values.var(1, correction=0).mean()) / 30
    half_width = 1.959964 * math.sqrt((between + within) / 12)
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.02)


def test_two_levels_cover_the_mean_of_a_normal_model_about_95_times_in_100() -> None:
    """10 seeds of variance 1, 20 prompts of variance 4: the interval has 9/10 of the variance between seeds."""
    num_covered = 0
    for seed in range(60):
        values = normal_values(10, 1, seed=2 * seed) + 2 * normal_values(10, 20, seed=2 * seed + 1)
        low, high = mean_over_seeds(list(values), seed)["interval"]
        if low <= 0 <= high:
            num_covered += 1
    assert 50 <= num_covered <= 59


def test_one_seed_is_an_interval_over_prompts() -> None:
    values = normal_values(500, seed=6)
    low, high = mean_over_seeds([values])["interval"]
    expected_low, expected_high = bootstrap(values, seed=1)
    assert low == pytest.approx(expected_low, abs=0.01)
    assert high == pytest.approx(expected_high, abs=0.01)


def test_seeds_that_differ_widen_the_interval() -> None:
    same = [normal_values(400, seed=i) for i in range(3)]
    shifted = [column + 10 * i for i, column in enumerate(same)]
    low, high = mean_over_seeds(same)["interval"]
    assert high - low < 0.3
    low, high = mean_over_seeds(shifted)["interval"]
    assert low < 1  # all three draws may be of the first seed: one time in 27
    assert high > 19
    assert mean_over_seeds(shifted, 0) == mean_over_seeds(shifted, 0) != mean_over_seeds(shifted, 1)


def test_auroc_over_seeds_equals_a_plain_loop() -> None:
    wrong = [normal_values(12, 4, seed=i) > 0.5 for i in range(2)]
    suspicion = [(normal_values(12, 4, seed=9 + i) + 2 * wrong[i]).round(decimals=1) for i in range(2)]  # with ties
    number = statistics.auroc_over_seeds(suspicion, wrong)

    def auroc(i: int, prompts: np.ndarray) -> float:
        values = suspicion[i][prompts].numpy()
        is_wrong = wrong[i][prompts].numpy()
        wins = np.greater.outer(values[is_wrong], values[~is_wrong])
        ties = np.equal.outer(values[is_wrong], values[~is_wrong])
        return float(wins.mean() + ties.mean() / 2)

    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(1_500):
        draws = [auroc(int(i), rng.integers(12, size=12)) for i in rng.integers(2, size=2)]
        resampled.append(np.mean(draws))
    assert number["mean"] == pytest.approx(np.mean([auroc(i, np.arange(12)) for i in range(2)]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert number["interval"] == pytest.approx((low, high), abs=0.15 * (high - low))


def test_wald_test_by_hand() -> None:
    # one seed: mean 2, variance 2.5, standard error √.5; z = 2 √2, p = 2 Φ(-2.828427)
    test = wald_test([torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])])
    assert test.z == pytest.approx(2.828427, abs=1e-6)
    assert test.p == pytest.approx(0.0046777, abs=1e-7)

    # two seeds: means 2 and -1, squared errors .5 and 1/3; z = .5 / √(.8333 / 4)
    test = wald_test([torch.arange(5.0), torch.tensor([-2.0, -1.0, 0.0])])
    assert test.z == pytest.approx(0.5 / math.sqrt((0.5 + 1 / 3) / 4))
    assert wald_test([torch.tensor([1.0, -1.0])]).p == 1


def test_wald_test_rejects_a_true_zero_one_time_in_twenty() -> None:
    num_rejected = 0
    for seed in range(400):
        values = normal_values(2, 80, seed=seed)
        if wald_test(list(values)).p < 0.05:
            num_rejected += 1
    assert 8 <= num_rejected <= 34
