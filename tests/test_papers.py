"""The papers' tabular experiments: every number that is known beforehand, to the digits given."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from algos.exo import exo_loss
from scripts import bandits
from scripts.lab.tabular import total_variation, uniform_logps, vector
from scripts.papers import (
    Args,
    Check,
    Finding,
    Section,
    distillation,
    exo,
    first_step,
    run_experiments,
    same_digits,
    same_value,
    save_figures,
    typo,
)

# ---------------------------------------------------------------- TYPO

INTERPOLATION = [  # λ, method, optimum
    (1e-5, "DPO", ["1", "0", "0"]),
    (1e-5, "IPO", ["1", "0", "0"]),
    (1e-5, "TYPO", [".6", ".3", ".1"]),
    (0.1, "DPO", [".999", ".001", "0"]),
    (0.1, "IPO", [".805", ".185", ".009"]),
    (0.1, "TYPO", [".5667", ".3224", ".1109"]),
    (0.5, "DPO", [".7912", ".1978", ".0110"]),
    (0.5, "IPO", [".5049", ".3764", ".1188"]),
    (0.5, "TYPO", [".5031", ".3604", ".1365"]),
    (1.0, "DPO", [".6316", ".3158", ".0526"]),
    (1.0, "IPO", [".4532", ".3913", ".1554"]),
    (1.0, "TYPO", [".4710", ".3761", ".1529"]),
    (2.0, "DPO", [".5232", ".3700", ".1068"]),
    (2.0, "IPO", [".4267", ".3965", ".1767"]),
    (2.0, "TYPO", [".4442", ".3869", ".1689"]),
    (10.0, "DPO", [".4253", ".3969", ".1778"]),
    (10.0, "IPO", [".4054", ".3995", ".1952"]),
    (10.0, "TYPO", [".4111", ".3972", ".1916"]),
]


def assert_digits(policy: torch.Tensor, expected: list[str]) -> None:
    """Assert agreement to the digits given, to four where only whole numbers or tenths are given."""
    places = 0
    for text in expected:
        _, _, decimals = text.partition(".")
        places = max(places, len(decimals))
    if places <= 1:
        places = 4

    numbers = [float(text) for text in expected]
    tolerance = 0.5 * 10**-places
    assert_close(policy, vector(*numbers), tolerance)


def assert_close(tensor: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(tensor, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("lam", "method", "expected"), INTERPOLATION)
def test_interpolation(lam: float, method: str, expected: list[str]) -> None:
    optimum = typo.optimum(method, lam)
    assert_digits(optimum.policy, expected)
    assert optimum.gradient_norm < 1e-8


@pytest.mark.parametrize("lam", [1e-5, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("setting", ["interpolation", "good", "bad"])
def test_dpo_has_its_closed_form(setting: str, lam: float) -> None:
    pi_star, pi_ref = typo.SETTINGS[setting]
    logits = pi_ref.log() + pi_star.log() / lam
    optimum = typo.optimum("DPO", lam, setting)
    assert_close(optimum.policy, logits.softmax(0), 1e-9)


@pytest.mark.parametrize("method", ["DPO", "IPO", "TYPO"])
def test_large_lambda_keeps_the_reference(method: str) -> None:
    optimum = typo.optimum(method, 1e5)
    assert_digits(optimum.policy, [".4000", ".4000", ".2000"])


PRESERVATION = [  # method, setting, optimum at λ = 1
    ("DPO", "good", [".783", ".196", ".022"]),
    ("DPO", "bad", [".6667", ".1111", ".2222"]),
    ("TYPO", "bad", [".5272", ".1949", ".2779"]),
]


@pytest.mark.parametrize(("method", "setting", "expected"), PRESERVATION)
def test_preservation(method: str, setting: str, expected: list[str]) -> None:
    optimum = typo.optimum(method, 1.0, setting)
    assert_digits(optimum.policy, expected)


@pytest.mark.parametrize("lam", [1e-5, 0.01, 1.0, 100.0])
def test_typo_keeps_a_reference_that_is_the_target(lam: float) -> None:
    pi_star, _ = typo.SETTINGS["good"]
    optimum = typo.optimum("TYPO", lam, "good")
    assert_close(optimum.policy, pi_star, 1e-9)


# ---------------------------------------------------------------- reward-model distillation


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 10.0, 1000.0])
def test_pdpo_on_a_pair(alpha: float, beta: float) -> None:
    margin = distillation.pdpo_margin(beta, alpha)
    assert margin == pytest.approx(math.log(alpha - 1), abs=1e-8)


def test_pdpo_is_bounded() -> None:
    at_the_bound = distillation.pdpo_bounded_loser(1.0, 1.5, winner=0.6)
    inside = distillation.pdpo_bounded_loser(1.0, 11.0, winner=0.6)
    assert at_the_bound == pytest.approx(0.4)
    assert inside == pytest.approx(0.06)


@pytest.mark.parametrize("h", [0, 10, 100, 500])
def test_dpo_is_not_bounded(h: float) -> None:
    assert distillation.dpo_slope(h, 1.0) < 0


def test_pdpo_on_two_arms_jointly() -> None:
    policy = distillation.pdpo_policy(distillation.ONE_PAIR, 2, 1.0, 10.0)
    winner, loser = policy.tolist()
    margin = math.log(winner / loser)
    assert margin == pytest.approx(2.398, abs=5e-4)
    assert margin == pytest.approx(math.log(11), abs=1e-8)


@pytest.mark.parametrize("inverse_tau", [0.5, 2.0])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_transitive_closure(n: int, inverse_tau: float) -> None:
    of_chain = distillation.log_ratio_range(n, False, inverse_tau)
    assert of_chain == pytest.approx((n - 1) * inverse_tau)
    of_closure = distillation.log_ratio_range(n, True, inverse_tau)
    assert of_closure == pytest.approx(2 * (n - 1) / n * inverse_tau)


@pytest.mark.parametrize("graph", ["all pairs", "chain", "two separate pairs"])
def test_distillation_needs_connected_pairs(graph: str) -> None:
    target, optima = distillation.theorem_1(graph)
    assert len(optima) == 2
    for optimum in optima:
        assert optimum.loss < 1e-16
        distance = total_variation(optimum.policy, target)
        if graph == "two separate pairs":
            assert distance > 0.01
        else:
            assert distance < 1e-8


def test_theorem_2_does_not_hold() -> None:
    first, second, reference = distillation.theorem_2()
    assert first == pytest.approx(-0.841, abs=5e-4)
    assert second == pytest.approx(-0.841, abs=5e-4)
    assert reference == 0


# ---------------------------------------------------------------- EXO


@pytest.mark.parametrize(("beta", "beta_r"), [(1.0, 1.0), (0.5, 0.1), (0.1, 0.5)])
@pytest.mark.parametrize("method", ["EXO", "DPO-rw"])
def test_gradients_are_those_of_the_divergences(method: str, beta: float, beta_r: float) -> None:
    proportional = exo.single_group((0, 0, 1, 1, 2))
    once = exo.single_group((0, 1, 2))
    assert exo.gradient_error(method, *proportional, beta, beta_r) < 1e-12
    assert exo.gradient_error(method, *once, beta, beta_r) > 0.1


@pytest.mark.parametrize("method", ["EXO", "DPO-rw"])
def test_the_bias_falls_with_the_samples(method: str) -> None:
    for k in (2, 4, 8, 16):
        doubled = exo.bias(method, 2 * k)
        assert exo.bias(method, k) > 1.8 * doubled > 0
    assert exo.bias(method, 32) < 0.05


def test_multisets_stand_for_all_tuples() -> None:
    multisets, weights = exo.all_samples(3)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)

    every_tuple = itertools.product(range(3), repeat=3)
    tuples = torch.tensor(list(every_tuple))
    probabilities = exo.SFT[tuples].prod(1)
    loss = exo.expected_loss("EXO", exo.LOGITS, multisets, weights, 0.5, 0.5)
    expected = exo.expected_loss("EXO", exo.LOGITS, tuples, probabilities, 0.5, 0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_exo_seeks_the_main_mode() -> None:
    means, losses = exo.landscape("EXO")
    best = losses.argmin()
    assert float(means[best]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("start", "mode"), [("main mode", 2), ("wide", 2), ("minor mode", -2)])
def test_exo_stops_at_a_mode(start: str, mode: float) -> None:
    optimum = exo.descend("EXO", start)
    assert optimum.mean == pytest.approx(mode, abs=0.1)


@pytest.mark.parametrize("start", exo.STARTS)
def test_dpo_rw_seeks_the_mean(start: str) -> None:
    optimum = exo.descend("DPO-rw", start)
    from_wide = exo.descend("DPO-rw", "wide")
    assert optimum == pytest.approx(from_wide, abs=1e-8)

    target = exo.target()
    moments = exo.mean_and_deviation(optimum.logps)
    target_moments = exo.mean_and_deviation(target)
    assert moments == pytest.approx(target_moments, abs=1e-8)

    between_modes = exo.mass(optimum.logps, -1, 1)
    assert between_modes > 0.3
    assert exo.mass(target, -1, 1) < 0.06


def test_exo_loss_of_the_grid_is_the_reverse_divergence() -> None:
    log_p = exo.gaussian(1.0, 1.5)
    log_target = exo.target()
    log_ratios = log_p - log_target
    divergence = log_p.exp() @ log_ratios
    expected = pytest.approx(float(divergence), rel=1e-10)

    ref_logps = uniform_logps(len(log_p))
    loss = exo_loss(log_p[None], ref_logps[None], log_target[None], 1.0)
    assert float(loss) == expected
    matching_loss = exo.matching_losses("EXO", log_p[None])
    assert float(matching_loss) == expected


# ---------------------------------------------------------------- findings and their report


@pytest.mark.parametrize("check", first_step.CHECKS)
def test_first_step(check: Check) -> None:
    (finding,) = check()
    assert finding.holds


def test_digits_agree_where_they_should() -> None:
    assert same_digits("", "2.398", 2.3984).holds
    assert not same_digits("", "2.398", 2.3974).holds
    assert same_digits("", "1, 0, 0", 0.9996, 0.0004, 0).holds
    assert not same_digits("", "1, 0, 0", 0.99, 0.01, 0).holds


def test_values_agree_where_they_should() -> None:
    assert same_value("", 1.0, 1.0).holds
    assert not same_value("", 1.0, 1.00001).holds


def test_a_finding_that_disagrees_ends_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = Args(output_dir=tmp_path)
    run_experiments(args, first_step.SECTIONS, {})
    assert "NOT" not in capsys.readouterr().out

    def one_is_two() -> list[Finding]:
        return [same_value("one is two", 1.0, 2.0)]

    section = Section("wrong", (one_is_two,))
    with pytest.raises(SystemExit) as stop:
        run_experiments(args, [section], {})
    assert stop.value.code == 1
    assert "NOT" in capsys.readouterr().out


@pytest.mark.parametrize("name", bandits.FIGURES)
def test_figures_are_saved(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = {name: bandits.FIGURES[name]}
    save_figures(tmp_path, figures)
    (path,) = tmp_path.iterdir()
    assert path.name == name
    assert path.stat().st_size > 10_000
