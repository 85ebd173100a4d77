"""The claims of the DPO paper, mistakes that must turn their verdicts, and the tools that they rest on."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from algos.dpo import dpo_loss
from algos.rm import rm_loss
from scripts.lab import enumeration, tabular
from scripts.lab.claims import run_claim
from scripts.lab.tabular import vector
from scripts.papers import dpo

CLAIMS = {claim.number: claim for claim in dpo.PAPER.claims}


def test_every_number_occurs_once() -> None:
    expected = ["L1", "L2"]
    for letter, count in (("T", 30), ("A", 8), ("E", 28)):
        expected += [f"{letter}{number}" for number in range(1, count + 1)]
    numbers = [*CLAIMS, *(statement.number for statement in dpo.PAPER.elsewhere)]
    assert sorted(numbers) == sorted(expected)


# ---------------------------------------------------------------- planted mistakes


def clear_caches() -> None:
    for value in vars(dpo).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    clear_caches()
    yield
    clear_caches()


def swapped_rm_loss(rewards: Tensor) -> Tensor:
    return rm_loss(rewards.flip(1))


def swapped_dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return dpo_loss(logps.flip(1), ref_logps.flip(1), beta)


def dpo_loss_without_reference(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return dpo_loss(logps, torch.zeros_like(ref_logps), beta)


def dpo_loss_of_means(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """β h halved, as where log-probs are averaged."""
    return dpo_loss(logps, ref_logps, beta / 2)


def objective_with_half_the_penalty(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return tabular.objective(logps, ref_logps, rewards, beta / 2)


def tilted_by_the_product(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return tabular.tilted(ref_logps, rewards, 1 / beta)


def log_partition_of_uniform(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return tabular.log_partition(torch.zeros_like(ref_logps), rewards, beta)


def unnormalised_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return tabular.kl(log_q, log_p)


def projection_upwards(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return rewards + beta * tabular.log_partition(ref_logps, rewards, beta).unsqueeze(-1)


def ascending_weight(theta: Tensor, beta: float, sign: int) -> Tensor:
    return -weighted_gradient(theta, beta, sign)


weighted_gradient = dpo.weighted_gradient


def second_moments(logps: Tensor, advantages: Tensor) -> enumeration.Moments:
    mean, variance = enumeration.gradient_moments(logps, advantages)
    return enumeration.Moments(2 * mean, variance + float(mean.square().sum()))


def hard_value(ref: Tensor, rewards: Tensor, beta: float) -> float:
    return enumeration.soft_value(ref, rewards, beta / 2)


def reversed_ranking(rewards: Tensor, orders: Tensor) -> Tensor:
    return tabular.plackett_luce(rewards, orders.flip(1))


def swapped_losses_by_index(logps: Tensor, ref_logps: Tensor, first: Tensor, second: Tensor, beta: float) -> Tensor:
    return losses_by_index(logps, ref_logps, second, first, beta)


losses_by_index = dpo.losses_by_index


def frontier_further_out(ref_logps: Tensor, rewards: Tensor, divergences: Tensor) -> Tensor:
    return tabular.frontier(ref_logps, rewards, divergences / 2)


def best_of_one_less(policy: Tensor, rewards: Tensor, n: int) -> Tensor:
    return enumeration.best_of(policy, rewards, max(1, n // 2))


def agreement_without_chance(agreement: float, first: float, second: float) -> float:
    return agreement


def along_first_tokens(table: Tensor) -> Tensor:
    """As if every word came after the empty prefix."""
    return enumeration.along_completions(table[:1].expand_as(table))


PLANTED = [
    # section, name in the module, the wrong one, claims that turn
    ("section 3", "rm_loss", swapped_rm_loss, ["T2", "T3"]),
    ("section 3", "objective", objective_with_half_the_penalty, ["T7"]),
    ("section 3", "tilted", tilted_by_the_product, ["T6"]),
    ("section 3", "entropy", lambda log_p: -tabular.entropy(log_p), ["T6"]),
    ("section 3", "rank_by_preference", lambda rewards, rng: [1, 0], ["T2"]),
    ("section 4", "dpo_loss", swapped_dpo_loss, ["T10", "T11", "T12", "T14", "T15", "T17"]),
    ("section 4", "dpo_loss", dpo_loss_without_reference, ["T1", "T11", "T12", "L1", "L2"]),
    ("section 4", "dpo_loss", dpo_loss_of_means, ["T10", "T11", "T12", "T14", "T16", "T17"]),
    ("section 4", "objective", objective_with_half_the_penalty, ["T8", "T9"]),
    ("section 4", "log_partition", log_partition_of_uniform, ["T8", "T9"]),
    ("section 4", "tilted", tilted_by_the_product, ["T13"]),
    ("section 4", "relative_error", lambda beta: 1.0, ["T30"]),
    ("The gradient", "weighted_gradient", ascending_weight, ["T14", "A7"]),
    ("The gradient", "pair_weight", lambda margin: 0.5, ["T15", "T17"]),
    ("The gradient", "unlikelihood", lambda logps: logps[:, 0] - logps[:, 1], ["T17"]),
    ("section 5.1", "projection", projection_upwards, ["T22", "T23", "T24"]),
    ("section 5.1", "log_partition", log_partition_of_uniform, ["T22", "T23", "T25"]),
    ("section 5.1", "rm_loss", lambda rewards: rewards[:, 0], ["T19", "T21"]),
    ("section 5.1", "objective", objective_with_half_the_penalty, ["T22"]),
    ("section 5.2", "kl", unnormalised_kl, ["T26", "T27"]),
    ("section 5.2", "gradient_moments", second_moments, ["T7", "T28"]),
    ("section 5.2", "soft_value", hard_value, ["T27"]),
    ("section 5.2", "log_partition", log_partition_of_uniform, ["T26", "T27", "T28", "T29"]),
    ("appendices", "kl", unnormalised_kl, ["A1"]),
    ("appendices", "plackett_luce", reversed_ranking, ["A3", "A4", "A6"]),
    ("appendices", "losses_by_index", swapped_losses_by_index, ["A8"]),
    ("appendices", "dpo_loss", swapped_dpo_loss, ["A2", "A4", "A5", "A6", "A7", "A8"]),
    ("Experiments", "frontier", frontier_further_out, ["E3", "E15"]),
    ("Experiments", "dpo_loss", dpo_loss_of_means, ["E4"]),
    ("Experiments", "dpo_loss", dpo_loss_without_reference, ["E3", "E4", "E5"]),
    ("Experiments", "NOISE_FREE", dpo.PAIRS, ["E5"]),
    ("Experiments", "along_completions", along_first_tokens, ["E6"]),
    ("Experiments", "best_of", best_of_one_less, ["E14", "E15"]),
    ("Experiments", "kappa", agreement_without_chance, ["E17", "E27"]),
    ("Experiments", "HUMAN_WINS", dpo.JUDGE_WINS["S"], ["E17", "E18"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("section, name, wrong, numbers", PLANTED)
def test_a_planted_mistake_turns_the_verdict(
    section: str,
    name: str,
    wrong: object,
    numbers: list[str],
    monkeypatch: pytest.MonkeyPatch,
    fresh_caches: None,
) -> None:
    assert any(section in CLAIMS[number].section for number in numbers)
    assert getattr(dpo, name) is not wrong
    monkeypatch.setattr(dpo, name, wrong)
    for number in numbers:
        outcome = run_claim(CLAIMS[number])
        assert not outcome.is_expected, (number, outcome.findings)


def test_every_section_has_a_planted_mistake() -> None:
    for claim in dpo.PAPER.claims:
        assert any(section in claim.section for section, *_ in PLANTED), claim.section


# ---------------------------------------------------------------- the tools


def assert_close(tensor: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(tensor, expected, rtol=0, atol=tolerance)


def test_plackett_luce_by_hand() -> None:
    """exp(r) = (3, 2, 1): 3/6 · 2/3, and 1/6 · 2/5."""
    rewards = vector(3, 2, 1).log()
    orders = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert_close(tabular.plackett_luce(rewards, orders), vector(1 / 3, 1 / 15))


def test_all_orders() -> None:
    assert tabular.all_orders(3).tolist() == [list(order) for order in itertools.permutations(range(3))]


@pytest.mark.parametrize("divergence", [0.0, 0.05, 0.4, 1.0])
def test_the_frontier_by_a_grid_of_all_policies(divergence: float) -> None:
    """The best reward of three completions within a KL, among 125,751 policies of a grid with steps of 1/500."""
    refs = vector(0.5, 0.3, 0.2).log()
    rewards = vector(0.0, 1.0, 3.0)
    shares = torch.arange(501, dtype=torch.float64) / 500
    grid = torch.cartesian_prod(shares, shares)
    grid = grid[grid.sum(1) <= 1]
    policies = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], dim=1).clamp_min(1e-300)

    is_near = tabular.kl(policies.log(), refs) <= divergence + 1e-12
    best = (policies[is_near] @ rewards).max()
    largest = tabular.frontier(refs, rewards, vector(divergence))[0]
    assert best - 1e-9 <= largest <= best + 0.02


def test_moments_of_the_policy_gradient() -> None:
    """The mean against autograd of E_π[A] with A fixed, the variance against 200,000 draws."""
    logps = vector(0.5, 0.3, 0.2).log()
    advantages = vector(1.0, -2.0, 4.0)
    mean, variance = enumeration.gradient_moments(logps, advantages)
    assert_close(mean, torch.func.grad(lambda logits: logits.softmax(0) @ advantages)(logps))

    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(logps.exp(), 200_000, replacement=True, generator=generator)
    gradients = torch.func.jacrev(lambda logits: logits.log_softmax(0))(logps) * advantages[:, None]
    assert float(gradients[draws].var(0).sum()) == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_best_of_n_over_all_tuples(n: int) -> None:
    policy = vector(0.5, 0.2, 0.3)
    rewards = vector(1.0, 3.0, 2.0)
    expected = torch.zeros(3, dtype=torch.float64)
    for draws in itertools.product(range(3), repeat=n):
        best = max(draws, key=lambda draw: float(rewards[draw]))
        expected[best] += policy[list(draws)].prod()
    assert_close(enumeration.best_of(policy, rewards, n), expected)


def test_win_rates_count_ties_half() -> None:
    """.5 · (.1 + .2/2) + .5 · (.1 + .2 + .7/2), with rewards 1 = 1 < 2."""
    policy = vector(0.0, 0.5, 0.5)
    baseline = vector(0.1, 0.2, 0.7)
    assert enumeration.win_rate(policy, baseline, vector(0, 1, 2)) == pytest.approx(0.5 * 0.2 + 0.5 * 0.65)
    assert enumeration.win_rate(policy, baseline, vector(1, 1, 1)) == pytest.approx(0.5)


def test_completions_of_the_small_model() -> None:
    assert len(enumeration.PREFIXES) == 364
    assert len(set(enumeration.COMPLETIONS)) == 1_093
    model = enumeration.random_model(seed=0)
    logps = enumeration.along_completions(model)
    assert float(logps.exp().sum()) == pytest.approx(1, abs=1e-12)

    place = enumeration.COMPLETIONS.index((2, 0, enumeration.END))
    rows = [enumeration.PREFIXES.index(prefix) for prefix in [(), (2,), (2, 0)]]
    assert_close(logps[place], model[rows, [2, 0, 3]].sum())
    assert float(enumeration.along_prefixes(model)[0]) == 0


def test_soft_values_lie_between_the_mean_and_the_best() -> None:
    model = enumeration.random_model(seed=0)
    logps = enumeration.along_completions(model)
    rewards = torch.linspace(0, 1, 1_093, dtype=torch.float64)
    mean = float(logps.exp() @ rewards)
    assert enumeration.soft_value(model, rewards, 1e4) == pytest.approx(mean, abs=1e-4)
    assert enumeration.soft_value(model, rewards, 1e-4) == pytest.approx(1, abs=5e-3)


WINS = [
    # wins (winner, loser) of three completions, whether they connect all
    ([(0, 1), (1, 2), (2, 0)], True),
    ([(0, 1), (1, 0), (1, 2), (2, 1)], True),
    ([(0, 1), (1, 2), (0, 2)], False),
    ([(0, 1), (1, 0)], False),
]


@pytest.mark.parametrize("pairs, connects", WINS)
def test_connected_wins(pairs: list[tuple[int, int]], connects: bool) -> None:
    wins = torch.zeros(3, 3)
    for winner, loser in pairs:
        wins[winner, loser] = 1
    assert dpo.is_strongly_connected(wins) == connects
    assert dpo.rises_in_every_direction(torch.tensor(pairs)) == connects


def test_fitted_rewards_of_counts_by_hand() -> None:
    """Two completions that each won against the next with odds 3 have a gap of log 3."""
    odds = torch.zeros(1, len(dpo.PAIRS), dtype=torch.float64)
    for index, (winner, loser) in enumerate(dpo.PAIRS.tolist()):
        odds[0, index] = {1: 0.75, -1: 0.25}.get(loser - winner, 0)
    rewards = dpo.fit_rewards(odds / odds.sum()).parameters
    assert_close(-rewards.diff(), torch.full((3,), math.log(3), dtype=torch.float64), 1e-8)


def test_shares_of_drawn_pairs() -> None:
    shares = dpo.draw_pairs(10_000)
    assert shares.shape == (dpo.RUNS, 12)
    assert_close(shares.sum(1), torch.ones(dpo.RUNS, dtype=torch.float64))
    assert_close(shares.mean(0), dpo.LABELS, 0.003)


def test_relative_error_over_all_completions() -> None:
    weights = (dpo.NORMAL_REWARDS / 0.7).exp()
    spread = float(weights.std(correction=0) / weights.mean())
    assert dpo.relative_error(0.7) == pytest.approx(spread, rel=1e-10)


MARGINS = [0.0, 1.0, -30.0, 30.0]


def test_exact_losses() -> None:
    losses = dpo.exact_log_losses([dpo.Decimal(margin) for margin in MARGINS])
    expected = [math.log1p(math.exp(-margin)) for margin in MARGINS]
    assert losses.tolist() == pytest.approx(expected, rel=1e-14)
    assert dpo.exact_ranking_loss([dpo.Decimal(0)] * 3) == pytest.approx(math.log(6), rel=1e-15)


@pytest.mark.parametrize("exponent", [-0.5, -1.0, 0.25])
def test_slope(exponent: float) -> None:
    values = [3 * size**exponent for size in dpo.SIZES]
    assert dpo.slope(values) == pytest.approx(exponent)
