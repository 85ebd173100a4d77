"""The papers' tabular experiments: every number that is known beforehand, to the digits given."""

import itertools
import math
from pathlib import Path

import bandits
import pytest
import torch

from algos.exo import exo_loss

TABLE = """
0.00001  1     0     0      1     0     0      .6    .3    .1
0.1      .999  .001  0      .805  .185  .009   .5667 .3224 .1109
0.5      .7912 .1978 .0110  .5049 .3764 .1188  .5031 .3604 .1365
1        .6316 .3158 .0526  .4532 .3913 .1554  .4710 .3761 .1529
2        .5232 .3700 .1068  .4267 .3965 .1767  .4442 .3869 .1689
10       .4253 .3969 .1778  .4054 .3995 .1952  .4111 .3972 .1916
"""
ROWS = [
    (method, float(line.split()[0]), line.split()[1 + 3 * column : 4 + 3 * column])
    for line in TABLE.strip().splitlines()
    for column, method in enumerate(("DPO", "IPO", "TYPO"))
]


def agrees(got: torch.Tensor, expected: list[str]) -> None:
    """Agreement to the digits given, to four where only whole numbers or tenths are."""
    places = max(len(text.partition(".")[2]) for text in expected)
    tolerance = 0.5 * 10 ** -(places if places > 1 else 4)
    torch.testing.assert_close(got, bandits.vector(*map(float, expected)), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "lam", "expected"), ROWS)
def test_interpolation(method: str, lam: float, expected: list[str]) -> None:
    optimum = bandits.interpolation(method, lam)
    agrees(optimum.policy, expected)
    assert optimum.gradient < 1e-8


@pytest.mark.parametrize("lam", [1e-5, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("setting", ["interpolation", "good", "bad"])
def test_dpo_has_its_closed_form(setting: str, lam: float) -> None:
    pi_star, ref = bandits.SETTINGS[setting]
    expected = (ref.log() + pi_star.log() / lam).softmax(0)
    torch.testing.assert_close(bandits.interpolation("DPO", lam, setting).policy, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["DPO", "IPO", "TYPO"])
def test_large_lambda_keeps_the_reference(method: str) -> None:
    agrees(bandits.interpolation(method, 1e5).policy, [".4000", ".4000", ".2000"])


def test_preservation() -> None:
    agrees(bandits.interpolation("DPO", 1.0, "good").policy, [".783", ".196", ".022"])
    agrees(bandits.interpolation("DPO", 1.0, "bad").policy, [".6667", ".1111", ".2222"])
    agrees(bandits.interpolation("TYPO", 1.0, "bad").policy, [".5272", ".1949", ".2779"])
    for lam in (1e-5, 0.01, 1.0, 100.0):
        policy = bandits.interpolation("TYPO", lam, "good").policy
        torch.testing.assert_close(policy, bandits.vector(0.6, 0.3, 0.1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 10.0, 1000.0])
def test_pdpo_on_a_pair(alpha: float, beta: float) -> None:
    assert bandits.pdpo_pair(beta, alpha) == pytest.approx(math.log(alpha - 1), abs=1e-8)


def test_pdpo_is_bounded_and_dpo_is_not() -> None:
    assert bandits.pdpo_bounded(1.0, 1.5, 0.6) == pytest.approx(0.4)
    assert bandits.pdpo_bounded(1.0, 11.0, 0.6) == pytest.approx(0.06)
    assert all(bandits.dpo_slope(bandits.vector(h)[0], 1.0) < 0 for h in (0, 10, 100, 500))


def test_pdpo_on_two_arms_jointly() -> None:
    first, second = bandits.pdpo_arms(torch.tensor([[0, 1]]), 2, 1.0, 10.0).tolist()
    assert math.log(first / second) == pytest.approx(2.398, abs=5e-4)
    assert math.log(first / second) == pytest.approx(math.log(11), abs=1e-8)


@pytest.mark.parametrize("inverse_tau", [0.5, 2.0])
@pytest.mark.parametrize("arms", [2, 3, 4, 8])
def test_transitive_closure(arms: int, inverse_tau: float) -> None:
    assert bandits.spread(arms, False, inverse_tau) == pytest.approx((arms - 1) * inverse_tau)
    assert bandits.spread(arms, True, inverse_tau) == pytest.approx(2 * (arms - 1) / arms * inverse_tau)


@pytest.mark.parametrize("graph", bandits.GRAPHS)
def test_distillation_needs_connected_pairs(graph: str) -> None:
    target, optima = bandits.theorem_1(graph)
    assert all(optimum.loss < 1e-16 for optimum in optima)
    distances = [bandits.distance(optimum.policy, target) for optimum in optima]
    assert min(distances) > 0.01 if graph == "two separate pairs" else max(distances) < 1e-8


def test_theorem_2_does_not_hold() -> None:
    first, second, reference = bandits.theorem_2()
    assert first == pytest.approx(-0.841, abs=5e-4)
    assert second == pytest.approx(-0.841, abs=5e-4)
    assert reference == 0


@pytest.mark.parametrize(("beta", "beta_r"), [(1.0, 1.0), (0.5, 0.1), (0.1, 0.5)])
@pytest.mark.parametrize("name", ["EXO", "DPO-rw"])
def test_gradients_are_those_of_the_divergences(name: str, beta: float, beta_r: float) -> None:
    assert bandits.gradient_error(name, *bandits.group((0, 0, 1, 1, 2)), beta, beta_r) < 1e-12
    assert bandits.gradient_error(name, *bandits.group((0, 1, 2)), beta, beta_r) > 0.1


@pytest.mark.parametrize("name", ["EXO", "DPO-rw"])
def test_the_bias_falls_with_the_draws(name: str) -> None:
    bias = {k: bandits.gradient_error(name, *bandits.draws(k)) for k in (2, 4, 8, 16, 32)}
    assert all(bias[k] > 1.8 * bias[2 * k] > 0 for k in (2, 4, 8, 16))
    assert bias[32] < 0.05


def test_draws_are_all_tuples() -> None:
    rows, weights = bandits.draws(3)
    tuples = torch.tensor(list(itertools.product(range(3), repeat=3)))
    chances = bandits.SFT[tuples].prod(1)
    losses = [
        bandits.expected_loss("EXO", bandits.LOGITS, *groups, 0.5, 0.5)
        for groups in ((rows, weights), (tuples, chances))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)


def test_exo_seeks_the_main_mode_and_dpo_rw_the_mean() -> None:
    means, scales, losses = bandits.landscape("EXO")
    assert float(means[losses.argmin()]) == pytest.approx(2, abs=0.1)
    for start, mean in (("main mode", 2), ("wide", 2), ("minor mode", -2)):
        assert bandits.match("EXO", bandits.STARTS[start])[0] == pytest.approx(mean, abs=0.1)
    stops = [bandits.match("DPO-rw", start) for start in bandits.STARTS.values()]
    assert all(stop == pytest.approx(stops[0], abs=1e-8) for stop in stops)
    forward = bandits.gaussian(*stops[0][:2])
    assert bandits.moments(forward) == pytest.approx(bandits.moments(bandits.bimodal()), abs=1e-8)
    assert bandits.mass(forward, -1, 1) > 0.3 > 0.06 > bandits.mass(bandits.bimodal(), -1, 1)


def test_exo_loss_of_the_grid_is_the_reverse_divergence() -> None:
    log_p, log_target = bandits.gaussian(1.0, 1.5), bandits.bimodal()
    expected = float((log_p.exp() * (log_p - log_target)).sum())
    ref_logps = bandits.uniform(len(log_p))[None]
    assert float(exo_loss(log_p[None], ref_logps, log_target[None], 1.0)) == pytest.approx(expected, rel=1e-10)
    assert float(bandits.matching_loss("EXO", log_p[None])) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", bandits.step_one())
def test_step_one(name: str) -> None:
    expected, got = bandits.step_one()[name]
    assert float(got.mean()) == pytest.approx(float(expected), rel=1e-12)


def test_a_check_fails_where_it_should() -> None:
    assert bandits.digits("", "2.398", 2.3984).ok and not bandits.digits("", "2.398", 2.3974).ok
    assert bandits.digits("", "1, 0, 0", 0.9996, 0.0004, 0).ok and not bandits.digits("", "1, 0, 0", 0.99, 0.01, 0).ok
    assert bandits.close("", 1.0, 1.0).ok and not bandits.close("", 1.0, 1.00001).ok


def test_main_says_when_something_disagrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bandits, "SECTIONS", (bandits.check_step_one,))
    monkeypatch.setattr(bandits, "FIGURES", {})
    bandits.main(bandits.Args(output_dir=tmp_path))
    monkeypatch.setattr(bandits, "step_one", lambda: {"one": (1.0, bandits.vector(2))})
    with pytest.raises(SystemExit) as stop:
        bandits.main(bandits.Args(output_dir=tmp_path))
    assert stop.value.code == 1
    assert "NOT" in capsys.readouterr().out


@pytest.mark.parametrize("name", bandits.FIGURES)
def test_figures_are_drawn(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bandits.FIGURES[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size > 10_000
