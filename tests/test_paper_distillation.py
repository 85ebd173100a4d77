"""Reward-model distillation: every verdict, mistakes that must turn verdicts, and the tools against other means."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from algos import distill_dpo, dpo, ensemble_dpo, ipo, pessimistic_dpo, rm
from scripts.lab import pessimism, tabular
from scripts.lab.claims import run_claim
from scripts.lab.pessimism import Ball, gap_matrix, least_divergent, pessimistic_score
from scripts.lab.tabular import kl, matrix, normal, ordered_pairs, tilted, uniform_logps, vector
from scripts.papers import distillation
from scripts.papers.distillation import PAPER

CLAIMS = {claim.number: claim for claim in PAPER.claims}


def test_every_statement_has_one_number() -> None:
    numbers = [claim.number for claim in PAPER.claims] + [statement.number for statement in PAPER.elsewhere]
    theory = [f"T{i}" for i in range(1, 53)]
    experiments = [f"X{i}" for i in range(1, 19)]
    assert sorted(numbers) == sorted([*theory, *experiments, "L1", "L2"])


# ---------------------------------------------------------------- planted mistakes


def times_beta(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return (ref_logps + rewards * beta).log_softmax(-1)


def wrong_side(rewards: Tensor) -> Tensor:
    return rm.rm_loss(rewards.flip(1))


def swapped_dpo(logps: Tensor, ref_logps: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    return dpo.dpo_loss(logps.flip(1), ref_logps.flip(1), beta, label_smoothing)


def dpo_without_reference(logps: Tensor, ref_logps: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    return dpo.dpo_loss(logps, torch.zeros_like(ref_logps), beta, label_smoothing)


def distill_with_a_plus(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return distill_dpo.distill_loss(logps, ref_logps, -rewards, beta)


def distill_with_half_beta(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return distill_dpo.distill_loss(logps, ref_logps, rewards, beta / 2)


def best_case(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return pessimism.advantages(logps, ref_logps, rewards).amax(-1) - beta * kl(logps, ref_logps)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return tabular.kl(log_q, log_p)


def double_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 2 * tabular.kl(log_p, log_q)


def reverse_kls(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return kl(tilted(ref_logps, rewards, beta), ref_logps)


def with_double_beta(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return ensemble_dpo.ensemble_losses(logps, ref_logps, rewards, 2 * beta)


def scaled_models(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    losses = ensemble_dpo.ensemble_losses(logps, ref_logps, rewards, beta)
    return losses * torch.arange(losses.shape[1] + 1, 1, -1)


def half_omega(losses: Tensor, logps: Tensor, gamma: float) -> Tensor:
    return pessimistic_dpo.pessimistic_loss(losses, logps, gamma / 2)


def negative_omega(losses: Tensor, logps: Tensor, gamma: float) -> Tensor:
    return pessimistic_dpo.pessimistic_loss(losses, logps, -gamma)


def squared_gap(logps: Tensor, ref_logps: Tensor, tau: float) -> Tensor:
    return ipo.ipo_loss(logps, ref_logps, 2 * tau)


def ascend(loss: Callable[[Tensor], Tensor], start: Tensor, rate: float, num_steps: int) -> Tensor:
    return tabular.descend(loss, start, -rate, num_steps)


def bag_of_one(theta: Tensor, counts: Tensor) -> Tensor:
    """With log Z in place of n log Z."""
    return (counts * theta).sum(-1) - theta.logsumexp(-1)


def bound_by_the_mean(theta: Tensor, counts: Tensor) -> Tensor:
    return (counts * theta).sum(-1) - counts.sum(-1) * theta.mean(-1)


MISTAKES = [  # section, name in the module, what is wrong there, claims that must turn
    ("The objective, reward models and DPO", "tilted", times_beta, ["T1"]),
    ("The objective, reward models and DPO", "rm_loss", wrong_side, ["T3"]),
    ("The objective, reward models and DPO", "dpo_loss", dpo_without_reference, ["T4"]),
    ("Pitfalls of DPO", "dpo_loss", dpo_without_reference, ["T6"]),
    ("Pitfalls of DPO", "dpo_loss", swapped_dpo, ["T5", "T6", "T7"]),
    ("Reward-model distillation", "distill_loss", distill_with_a_plus, ["T9", "T10", "T11", "T12", "T13", "T14"]),
    ("Reward-model distillation", "distill_loss", distill_with_half_beta, ["T9", "T11", "T12", "T13", "T14"]),
    ("Pessimism over reward models", "kl", reverse_kl, ["T21"]),
    ("Pessimism over reward models", "pessimistic_score", best_case, ["T18", "T19", "T52"]),
    ("Pessimism over reward models", "forward_kls", reverse_kls, ["T20"]),
    ("Pessimism over reward models", "objective", best_case, ["T20"]),
    ("Pessimistic distillation: what is optimised", "ensemble_losses", with_double_beta, ["T23", "T25", "T26"]),
    ("Pessimistic distillation: what is optimised", "ensemble_losses", scaled_models, ["T23", "T49", "T51"]),
    ("Pessimistic distillation: what is optimised", "kl", reverse_kl, ["T25", "T26"]),
    ("Pessimistic DPO", "kl", double_kl, ["T27", "T28"]),
    ("Pessimistic DPO", "pessimistic_loss", half_omega, ["T29", "T30"]),
    ("One pair", "pessimistic_loss", half_omega, ["T31", "T32", "T33", "T34", "T35", "T36", "T38"]),
    ("One pair", "pessimistic_loss", negative_omega, ["T31", "T32", "T33", "T35", "T36"]),
    ("One pair", "distill_loss", distill_with_half_beta, ["T37"]),
    ("A bag of words", "bag_logps", bag_of_one, ["T39", "T40"]),
    ("A bag of words", "descend", ascend, ["T41", "T43"]),
    ("A bag of words", "upper_bounds", bound_by_the_mean, ["T39"]),
    ("A bag of words", "dpo_loss", dpo_without_reference, ["L2"]),
    ("Transitive closure", "ipo_loss", squared_gap, ["T44", "T45", "T46", "T48"]),
    ("Transitive closure", "pessimistic_loss", half_omega, ["T46", "T48"]),
    ("Transitive closure", "dpo_loss", swapped_dpo, ["T47", "T48"]),
    ("Experiments", "GAMMA_END", 1e-1, ["X17"]),
]


def clear_caches() -> None:
    for value in vars(distillation).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """The module with empty caches, which are emptied again behind the test."""
    clear_caches()
    yield monkeypatch
    monkeypatch.undo()
    clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize(("section", "name", "mistake", "numbers"), MISTAKES)
def test_a_planted_mistake_turns_the_verdict(
    section: str, name: str, mistake: object, numbers: list[str], module: pytest.MonkeyPatch
) -> None:
    module.setattr(distillation, name, mistake)
    for number in numbers:
        claim = CLAIMS[number]
        assert claim.section == section
        outcome = run_claim(claim)
        assert not outcome.is_expected, (number, outcome.findings)


def test_mistakes_are_planted_in_every_section() -> None:
    assert {mistake[0] for mistake in MISTAKES} == {claim.section for claim in PAPER.claims}


# ---------------------------------------------------------------- the tools


def test_the_pessimistic_score_against_loops() -> None:
    ref = [0.5, 0.3, 0.2]
    policy = [0.2, 0.2, 0.6]
    rewards = [[1.0, -1.0, 0.0], [-0.5, 1.2, 0.3]]
    advantages = []
    for reward in rewards:
        advantages.append(sum((p - q) * r for p, q, r in zip(policy, ref, reward, strict=True)))
    divergence = sum(p * math.log(p / q) for p, q in zip(policy, ref, strict=True))

    score = pessimistic_score(vector(*policy).log(), vector(*ref).log(), matrix(rewards), 0.7)
    assert float(score) == pytest.approx(min(advantages) - 0.7 * divergence, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_hull_against_a_grid(seed: int) -> None:
    rewards = normal(3, 4, seed=seed)
    ref_logps = normal(4, seed=seed + 10).log_softmax(0)
    best = least_divergent(ref_logps, rewards, 0.7)

    steps = range(101)
    weights = [(i / 100, j / 100, (100 - i - j) / 100) for i, j in itertools.product(steps, steps) if i + j <= 100]
    divergences = pessimism.forward_kls(ref_logps, matrix(weights) @ rewards, 0.7)
    assert best.divergence <= float(divergences.min()) + 1e-12
    assert best.divergence == pytest.approx(float(divergences.min()), abs=1e-3)
    assert float(best.weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(best.weights @ rewards, best.rewards)


def test_the_hull_of_a_reward_and_its_double_is_at_the_reward() -> None:
    best = least_divergent(uniform_logps(3), matrix([(1, -1, 0), (2, -2, 0)]), 1.0)
    torch.testing.assert_close(best.weights, vector(1, 0))


def test_the_gap_matrix_against_a_loop() -> None:
    pairs = ordered_pairs(4)
    weights = normal(len(pairs), seed=0).abs()
    rewards = normal(4, seed=1)
    expected = 0.0
    for weight, (first, second) in zip(weights.tolist(), pairs.tolist(), strict=True):
        expected += weight * float(rewards[first] - rewards[second]) ** 2
    assert float(rewards @ gap_matrix(pairs, weights, 4) @ rewards) == pytest.approx(expected)


def test_the_ball_against_its_boundary() -> None:
    weights = vector(0.3, 0.1, 0.2, 0.1, 0.1, 0.2)
    matrix_of_gaps = gap_matrix(ordered_pairs(3), weights, 3)
    ball = Ball(vector(1, -0.5, 0.2), matrix_of_gaps, 0.04)
    points = ball.boundary(20_000)
    differences = points - ball.rewards
    sizes = (differences @ matrix_of_gaps * differences).sum(1)
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.04))

    logps = vector(0.2, 0.2, 0.6).log()
    ref_logps = vector(0.5, 0.3, 0.2).log()
    by_points = pessimistic_score(logps, ref_logps, points, 0.7)
    assert float(ball.score(logps, ref_logps, 0.7)) == pytest.approx(float(by_points), abs=1e-7)


def test_descent_on_a_parabola() -> None:
    path = tabular.descend(lambda x: (x**2).sum(), vector(1, -2), 0.25, 3)
    torch.testing.assert_close(path, matrix([(1, -2), (0.5, -1), (0.25, -0.5), (0.125, -0.25)]))


def test_a_bag_of_words_is_a_distribution() -> None:
    theta = vector(0.3, -1.0, 0.5)
    total = 0.0
    for tokens in itertools.product(range(3), repeat=4):
        counts = torch.bincount(torch.tensor(tokens), minlength=3).double()
        total += math.exp(distillation.bag_logps(theta, counts))
    assert total == pytest.approx(1)


def test_the_optima_of_all_settings_at_once_are_those_of_each() -> None:
    for closed, i in itertools.product((False, True), (5, 12)):
        beta, alpha = distillation.SETTINGS[i].tolist()
        pairs = distillation.chain(3, closed)
        on_pairs = distillation.pdpo_policy(pairs, 3, beta, alpha)
        exact = distillation.exact_pdpo_policy(pairs, 3, beta, alpha)
        torch.testing.assert_close(distillation.three_arms(closed).on_pairs[i], on_pairs)
        torch.testing.assert_close(distillation.three_arms(closed).exact[i], exact)


@pytest.mark.parametrize("level", [0.66, 0.7])
def test_the_level_set_is_where_the_loss_has_that_level(level: float) -> None:
    rewards = distillation.level_set_boundary(level, 50)
    losses = distillation.mean_dpo_loss(tilted(distillation.BALL_REF, rewards, distillation.BETA))
    torch.testing.assert_close(losses, torch.full_like(losses, level))


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("alpha", [1.5, 10.0])
def test_the_margin_of_p_dpo_against_a_grid(alpha: float, beta: float) -> None:
    margins = torch.linspace(-4, 6, 100_001, dtype=torch.float64)
    losses = torch.log1p(torch.exp(-margins)) + margins / alpha
    best = float(margins[losses.argmin()])
    assert distillation.pdpo_margin(beta, alpha) == pytest.approx(best, abs=1e-4)
