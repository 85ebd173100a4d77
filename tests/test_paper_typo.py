"""TYPO's claims: their verdicts, mistakes that must turn them, and the tools that they rest on."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from algos import dpo, ipo, rm
from algos import typo as typo_algorithm
from scripts.lab import claim_files, qpo, tabular
from scripts.lab.claims import Claim, Verdict, run_claim
from scripts.lab.tabular import fit_policy, random_policies, total_variation, vector
from scripts.papers import typo

CACHED = (typo.sweep, typo.errors_of, typo.learning, typo.constraint_test, typo.hard_constraint)


def claim_of(number: str) -> Claim:
    return claim_files.claim_of(typo.PAPER, number)


def clear_caches() -> None:
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def no_caches() -> Iterator[None]:
    clear_caches()
    yield
    clear_caches()


def test_every_statement_occurs_once() -> None:
    numbers = [claim.number for claim in typo.PAPER.claims]
    numbers += [statement.number for statement in typo.PAPER.elsewhere]
    expected = [f"C{i}" for i in range(1, 60) if i != 51]
    expected += ["C51a", "C51b", "L1", "L2", "L3", "L4", "L5", "L6", "L7"]
    assert sorted(numbers) == sorted(expected)


# ---------------------------------------------------------------- planted mistakes


def without_reference(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return dpo.dpo_loss(logps, torch.zeros_like(ref_logps), beta)


def swapped_dpo(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return dpo.dpo_loss(logps.flip(1), ref_logps.flip(1), beta)


def wide_ipo(logps: Tensor, ref_logps: Tensor, tau: float) -> Tensor:
    return ipo.ipo_loss(logps, ref_logps, tau / 2)  # the gap is 1/τ


def halved_rm(rewards: Tensor) -> Tensor:
    return rm.rm_loss(rewards / 2)


def steep_typo(logps: Tensor, sample_logps: Tensor, lam: float) -> Tensor:
    return typo_algorithm.typo_loss(2 * logps, sample_logps, lam)  # β = 2 in the first term


def rising_typo(logps: Tensor, sample_logps: Tensor, lam: float) -> Tensor:
    return typo_algorithm.typo_loss(logps, sample_logps / 2, lam)


def backward_objective(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return (logps.exp() * rewards).sum(-1) - beta * tabular.kl(ref_logps, logps)


def swapped_tilt(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return tabular.tilted(rewards, ref_logps, beta)


def loser_first(pi_star: Tensor, pairs: Tensor) -> Tensor:
    return tabular.bradley_terry(pi_star, pairs.flip(1))


def scaled_logistic(lam: float) -> Callable[[Tensor], Tensor]:
    return qpo.logistic(2 * lam)


def steep_js(logps: Tensor, ref_logps: Tensor, divergence: qpo.Divergence, lam: float) -> Tensor:
    return qpo.f_dpo_loss(logps, ref_logps, divergence, 2 * lam)


def convex_psi(h: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-h)


def smooth_hinge(lam: float) -> Callable[[Tensor], Tensor]:
    return qpo.logistic(lam)


def steep_squares(logps: Tensor) -> Tensor:
    return logps.exp().abs().sum(-1)  # ‖π‖_1 is 1


PLANTED = [  # a name in typo.py, the mistake, the claims that must turn
    ("bradley_terry", loser_first, ["C1", "C22", "C41", "L5", "L7"]),
    ("rm_loss", halved_rm, ["C3", "C4"]),
    ("dpo_loss", without_reference, ["C6", "C12", "C21", "C33", "C35", "C38", "C51b"]),
    ("dpo_loss", swapped_dpo, ["C7", "C13", "C15", "C16", "C19", "C20", "C43"]),
    ("objective", backward_objective, ["C5", "C19", "C20", "C21", "C49"]),
    ("tilted", swapped_tilt, ["C5", "C6", "C8", "C39"]),
    ("ipo_loss", wide_ipo, ["C2", "C8", "C9", "C10", "C11", "C12", "C16", "L1", "C51a"]),
    ("logistic", scaled_logistic, ["C12"]),
    ("hinge", smooth_hinge, ["L2"]),
    ("f_dpo_loss", steep_js, ["C12", "C48"]),
    ("falling_then_rising", convex_psi, ["C13"]),
    ("typo_loss", steep_typo, ["C22", "C23", "C25", "C26", "C28", "C30", "C40", "C48", "C51a"]),
    ("typo_loss", rising_typo, ["C24", "C25", "C30", "C55"]),
    ("mean_square", steep_squares, ["C31", "C49"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mistake", "numbers"), PLANTED, ids=lambda x: getattr(x, "__name__", None))
def test_a_planted_mistake_turns_the_verdict(
    name: str, mistake: Callable, numbers: list[str], monkeypatch: pytest.MonkeyPatch, no_caches: None
) -> None:
    monkeypatch.setattr(typo, name, mistake)
    unmoved = [number for number in numbers if run_claim(claim_of(number)).is_expected]
    assert unmoved == []


def test_a_wrong_bound_of_eq_20_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = typo.excess_over_bound
    monkeypatch.setattr(typo, "excess_over_bound", lambda gamma, of_gamma: original(of_gamma, gamma))
    assert not run_claim(claim_of("C34")).is_expected


def test_a_wrong_gaussian_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = typo.gaussian_losses
    monkeypatch.setattr(typo, "gaussian_losses", lambda vectors, gamma: original(vectors, 2 * gamma))
    assert not run_claim(claim_of("C37")).is_expected


# ---------------------------------------------------------------- the tools


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_inverse_slopes(alpha: float) -> None:
    rho = torch.linspace(-3, 2, 50, dtype=torch.float64)
    for divergence in (qpo.REVERSE_KL, qpo.FORWARD_KL, qpo.JENSEN_SHANNON, qpo.alpha_divergence(alpha)):
        torch.testing.assert_close(divergence.inverse(divergence.slope(rho)), rho)


def test_a_slope_is_the_difference_quotient() -> None:
    u = vector(0.2, 1.0, 3.0)
    for divergence in (qpo.FORWARD_KL, qpo.JENSEN_SHANNON, qpo.alpha_divergence(0.5)):
        quotient = (divergence.generator(u + 1e-6) - divergence.generator(u - 1e-6)) / 2e-6
        torch.testing.assert_close(divergence.slope(u.log()), quotient, rtol=1e-7, atol=1e-7)


def test_the_reverse_kl_gives_the_tilt() -> None:
    ref_logps, rewards = random_policies(2, 4, seed=0)
    policy = qpo.f_tilted(ref_logps, rewards, qpo.REVERSE_KL, 0.7)
    torch.testing.assert_close(policy, tabular.tilted(ref_logps, rewards, 0.7))


def test_f_tilted_is_the_best_of_many() -> None:
    ref_logps, rewards = random_policies(2, 3, seed=1)
    policies = random_policies(20_000, 3, seed=2)

    def value(logps: Tensor) -> Tensor:
        ratios = (logps - ref_logps).exp()
        divergence = (ref_logps.exp() * qpo.JENSEN_SHANNON.generator(ratios)).sum(-1)
        return (logps.exp() * rewards).sum(-1) - 0.5 * divergence

    best = qpo.f_tilted(ref_logps, rewards, qpo.JENSEN_SHANNON, 0.5)
    assert float(best.exp().sum()) == pytest.approx(1, abs=1e-12)
    excess = value(policies) - value(best)
    assert -1e-3 < float(excess.max()) < 0


def test_pairs_by_enumeration() -> None:
    pi_star = vector(0.6, 0.3, 0.1)
    pi_ref = vector(0.4, 0.4, 0.2)
    data = qpo.drawn_pairs(pi_star, pi_ref)
    total = 2 * (0.4 * 0.4 + 0.4 * 0.2 + 0.4 * 0.2)
    for (winner, loser), weight in zip(data.pairs.tolist(), data.weights.tolist(), strict=True):
        label = pi_star[winner] / (pi_star[winner] + pi_star[loser])
        assert weight == pytest.approx(float(2 * pi_ref[winner] * pi_ref[loser] * label / total))

    assert qpo.chain_pairs(pi_star).pairs.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert qpo.uniform_pairs(pi_star).weights.sum() == pytest.approx(1)


def test_many_problems_at_once_are_as_one_at_a_time() -> None:
    pi_star, pi_ref = typo.SECOND_BAD
    data = qpo.uniform_pairs(pi_star)
    for method in typo.QPO_METHODS:
        policies = typo.optima(method, pi_ref, data, [0.2, 3.0])
        for lam, policy in zip((0.2, 3.0), policies, strict=True):

            def losses(logps: Tensor, method: str = method, lam: float = lam) -> Tensor:
                return typo.losses_of(method, logps, pi_ref.log(), data.pairs, lam)

            alone = fit_policy(losses, data.weights, pi_ref.log())
            assert total_variation(policy, alone.policy) < 1e-8


def test_adam_is_torch_s() -> None:
    start = vector(0.3, -0.2, 0.5)[None]
    target = vector(0.6, 0.3, 0.1)

    def losses(logits: Tensor, step: int) -> Tensor:
        return -100 * (logits.log_softmax(1) * target).sum(1)  # so that the clipping matters

    path = qpo.adam_path(losses, start, vector(0.01)[:, None], 30)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.01)
    for step in range(30):
        optimizer.zero_grad()
        losses(parameter, step).sum().backward()
        torch.nn.utils.clip_grad_norm_([parameter], 10.0)
        optimizer.step()
    torch.testing.assert_close(path[-1], parameter.detach())


def test_grids_find_the_tilt() -> None:
    policy = typo.best_on_grid(typo.rlhf_on_grid)
    tilt = tabular.tilted(typo.INTERPOLATION.pi_ref.log(), typo.INTERPOLATION.pi_star.log(), 0.1)
    torch.testing.assert_close(policy, tilt.exp(), rtol=0, atol=1e-6)


def test_typo_mixes_two_responses() -> None:
    policy = typo.optima("TYPO", vector(0.3, 0.7), qpo.uniform_pairs(vector(0.8, 0.2)), [0.5])[0]
    assert float(policy[0]) == pytest.approx(19 / 30, abs=1e-9)


def test_the_circle_has_its_radius() -> None:
    logps = typo.circle(0.45)
    torch.testing.assert_close(typo.mean_square(logps), torch.full((len(logps),), 0.45, dtype=torch.float64))
    assert math.isclose(float(logps.exp().sum(1).max()), 1)


def test_the_false_statement_is_known() -> None:
    false = [claim.number for claim in typo.PAPER.claims if claim.expected == Verdict.FALSE]
    assert false == ["C13"]
