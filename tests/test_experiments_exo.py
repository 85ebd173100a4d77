"""The EXO paper's experiments: numbers from what the stages leave, and verdicts on made-up outputs, both ways."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_outputs import Outputs

from scripts.experiments import exo
from scripts.lab.experiments import Reproduction, reproduction_of
from scripts.lab.frontier import Curve, at_equal_kl, divergence_from, interpolated, log_weights, optimum_of
from scripts.lab.pipeline import Artifact, Plan

NUM_POSTS = 40


# ---------------------------------------------------------------- the frontier


def test_interpolation() -> None:
    x = torch.tensor([[0.0, 4.0, 1.0], [0.0, 1.0, 2.0]])
    y = torch.tensor([[0.0, 8.0, 5.0], [1.0, 1.0, 3.0]])
    at = torch.tensor([[0.5, 1.0, 2.0, 4.0], [0.5, 1.5, 1.75, 2.0]])
    expected = torch.tensor([[2.5, 5.0, 6.0, 8.0], [1.0, 2.0, 2.5, 3.0]])
    torch.testing.assert_close(interpolated(x, y, at), expected)


def curve(kls: list[float], values: list[float]) -> Curve:
    """Policies on one post."""
    return Curve(exo.tensor_of(kls).unsqueeze(1), exo.tensor_of(values).unsqueeze(1))


def test_curves_are_compared_where_both_have_points() -> None:
    """Reward 3 √KL against 2 √KL at KL 1 and 4, and one more point of ours that theirs does not reach."""
    ours = curve([0, 1, 4, 9], [0, 3, 6, -9])
    theirs = curve([0, 1, 4], [0, 2, 4])
    grid = [4 * i / 20 for i in range(1, 21)]
    expected = sum(kl if kl <= 1 else 1 + (kl - 1) / 3 for kl in grid) / 20
    statistic = at_equal_kl(ours, theirs)
    assert float(statistic(torch.ones(1, 1).double())) == pytest.approx(expected)


def test_a_post_counts_as_often_as_it_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[0.0], [1.0], [3.0]]).double()
    kls = scales * torch.rand(3, 5, generator=generator).double()
    values = torch.rand(3, 5, generator=generator).double()
    flat = Curve(kls, torch.zeros_like(values))
    drawn = torch.tensor([0, 0, 3, 4, 4])
    counts = torch.tensor([[2.0, 0, 0, 1, 2]]).double()
    drawn_flat = Curve(kls[:, drawn], torch.zeros(3, 5).double())
    repeated = at_equal_kl(Curve(kls[:, drawn], values[:, drawn]), drawn_flat)
    weighted = at_equal_kl(Curve(kls, values), flat)
    torch.testing.assert_close(weighted(counts), repeated(torch.ones(1, 5).double()))


def test_the_optimum_from_samples_is_the_tilted_reference() -> None:
    """Each of three completions with the frequency that π_ref gives it: the weights are exact."""
    frequencies = {0.0: 5, 1.0: 3, -2.0: 2}
    rewards = torch.tensor([[reward for reward, n in frequencies.items() for _ in range(n)]])
    beta = 0.7
    tilted = {}
    for reward, n in frequencies.items():
        tilted[reward] = n / 10 * math.exp(reward / beta)
    total = sum(tilted.values())
    policy = {reward: value / total for reward, value in tilted.items()}
    kl = sum(p * math.log(p / (frequencies[reward] / 10)) for reward, p in policy.items())
    mean = sum(p * reward for reward, p in policy.items())
    found_kl, found_mean = optimum_of(rewards, beta)
    assert float(found_kl) == pytest.approx(kl)
    assert float(found_mean) == pytest.approx(mean)


def test_divergence_of_densities() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25]]).double()
    log_ratios = p.log() + 3.0  # a number for each prompt cancels
    q = torch.tensor([[0.2, 0.4, 0.4]]).double()
    expected = 0.5 * math.log(2.5) + 0.5 * math.log(0.25 / 0.4)
    assert float(divergence_from(log_weights(log_ratios), q.log())) == pytest.approx(expected)


# ---------------------------------------------------------------- made-up outputs


class Written(Outputs):
    """Files as the stages leave them."""

    def results(self, policies: dict[str, dict]) -> Any:
        row_rewards = [0.0] * NUM_POSTS
        return self.json({"policies": policies, "row_rewards": row_rewards})


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def numbers(kl: float, reward: float, weak: float | None = None, spread: float = 1.0, size: int = 4) -> dict:
    """The numbers of a policy: each sample's reward is around the mean."""
    rng = random.Random(f"{kl} {reward}")
    rewards = []
    for _ in range(NUM_POSTS):
        level = reward + rng.gauss(0, 0.2)
        rewards.append([level + spread * (-1) ** i for i in range(size)])
    shift = 0.0 if weak is None else weak - reward
    selector = [[value + shift for value in row] for row in rewards]
    return {"step_kls": [[kl] * size] * NUM_POSTS, "rewards": rewards, "selector_rewards": selector}


def run_of(slopes: dict[str, float], spread: float = 1.0) -> dict[str, dict]:
    """Methods whose reward rises by a slope for each √nat, from SFT at 2."""
    policies = {"sft": numbers(0, 2)}
    for method, slope in slopes.items():
        for i, point in enumerate(exo.checkpoint_names(method)):
            kl = 0.5 * (i + 1) * 4 / len(exo.steps_of(method))
            policies[point] = numbers(kl, 2 + slope * math.sqrt(kl), spread=spread)
    return policies


def verdict(check: Callable, runs: list) -> Reproduction:
    return reproduction_of(check(runs))


HIGH, LOW = 1.5, 1.0


@pytest.mark.parametrize(
    "slopes, expected",
    [({"exo": HIGH, "dpo": LOW}, Reproduction.REPRODUCED), ({"exo": LOW, "dpo": HIGH}, Reproduction.NOT)],
)
def test_the_frontier_of_pairs(written: Written, slopes: dict, expected: Reproduction) -> None:
    runs = [written.results(run_of(slopes)) for _ in range(2)]
    assert verdict(exo.exo_pref_has_the_better_frontier, runs) is expected


PAIRS = {"exo": 1.2, "dpo": 0.8}
GROUPS = {"exo2": 1.0, "exo4": 1.5, "exo8": 1.5, "dpo2": 0.9, "dpo4": 1.1, "dpo8": 0.8}
RATES = {1e-4: 0.2, 3e-4: 0.6, 1e-3: 0.9}


def controlled(written: Written, pairs: dict, groups: dict, ppo: dict, exo_rates: dict) -> Any:
    rates = {}
    for i, rate in enumerate(exo.RATES):
        rates[f"ppo_{rate:g}"] = numbers(0.5 * (i + 1), 2 + ppo[rate], spread=2.0)
        rates[f"exo_{rate:g}"] = numbers(0.5 * (i + 1), 2 + exo_rates[rate])
    of_pairs = written.results(run_of(pairs))
    of_groups = written.results(run_of(groups))
    return exo.Controlled(of_pairs, of_groups, written.results(rates))


LEVEL = dict.fromkeys(RATES, 1.0)
OTHER_WAY = {name: 2.0 - slope for name, slope in GROUPS.items()}


@pytest.mark.parametrize(
    "check, otherwise",
    [
        (exo.dpo_rw_is_better_than_dpo_pref, Reproduction.NOT),
        (exo.exo_converges_as_groups_grow, Reproduction.PARTLY),
        (exo.dpo_rw_is_worse_with_larger_groups, Reproduction.NOT),
        (exo.exo_has_a_better_frontier_than_ppo, Reproduction.NOT),
        (exo.exo_has_the_best_frontier_of_accuracy, Reproduction.NOT),
    ],
)
def test_the_frontiers_of_groups(written: Written, check: Callable, otherwise: Reproduction) -> None:
    good = controlled(written, PAIRS, GROUPS, RATES, LEVEL)
    bad = controlled(written, {"exo": 0.8, "dpo": 1.2}, OTHER_WAY, {rate: 2.5 for rate in RATES}, LEVEL)
    assert verdict(check, [good, good]) is Reproduction.REPRODUCED
    assert verdict(check, [bad, bad]) is otherwise


def test_speed_and_stability(written: Written) -> None:
    good = controlled(written, PAIRS, GROUPS, RATES, LEVEL)
    fast = exo.exo_is_fast_and_stable([good, good])
    assert [finding.holds for finding in fast] == [True, True, True, False, True]
    bad = controlled(written, {"exo": 0.8, "dpo": 1.2}, OTHER_WAY, {rate: 2.5 for rate in RATES}, LEVEL)
    slow = exo.exo_is_fast_and_stable([bad, bad])
    assert [finding.holds for finding in slow] == [False, False, False, False, True]


def test_sensitivity(written: Written) -> None:
    flat = dict.fromkeys(("exo", "dpo", *GROUPS), 0.2)  # so that the last quarter adds little
    sensitive = controlled(written, flat, flat, RATES, LEVEL)
    assert verdict(exo.ppo_is_sensitive, [sensitive, sensitive]) is Reproduction.REPRODUCED
    steep = dict.fromkeys(flat, 3.0)
    robust = controlled(written, steep, steep, LEVEL, RATES)
    assert verdict(exo.ppo_is_sensitive, [robust, robust]) is Reproduction.NOT


def test_starts(written: Written) -> None:
    def run(without: float) -> Any:
        return written.results({"sft": numbers(0, 2), "with_sft": numbers(1, 3), "without_sft": numbers(5, without)})

    assert verdict(exo.sft_on_chosen_closes_the_gap, [run(-4)] * 2) is Reproduction.REPRODUCED
    assert verdict(exo.sft_on_chosen_closes_the_gap, [run(4)] * 2) is Reproduction.PARTLY


# ---------------------------------------------------------------- tables


def table(written: Written, level: dict[str, float], many: float) -> exo.Table:
    """Policies with these rewards by both judges; the best of 128 has about `many`."""
    policies = {"sft": numbers(0, 2, 2)}
    for policy, reward in level.items():
        policies[policy] = numbers(1, reward, reward)
    scores = [{"scores": [many - 0.01 * k for k in range(exo.NUM_MANY)]} for _ in range(10)]
    chosen = [{"score_chosen": 2.5}] * NUM_POSTS
    completions = exo.Many(written.rows(scores), written.rows(scores))
    return exo.Table(written.results(policies), written.rows(chosen), completions)


LEVELS = {"dpo_pref": 2.2, "exo_pref": 2.9, "ppo": 2.4, "dpo_rw": 2.3, "exo_rw": 3.2}
CHECKS = [
    (exo.exo_pref_wins_on_tldr, "exo_pref", "dpo_pref"),
    (exo.exo_rw_wins_on_tldr, "exo_rw", "dpo_rw"),
    (exo.exo_rw_wins_over_ppo_on_tldr, "exo_rw", "ppo"),
]


@pytest.mark.parametrize("check, ours, theirs", CHECKS)
def test_rankings(written: Written, check: Callable, ours: str, theirs: str) -> None:
    """The chosen completions' true reward is 0, which hardly any policy loses to; so that is a tie or better."""
    good = table(written, LEVELS | {ours: 4.5, theirs: -0.5}, 5)
    assert verdict(check, [good, good]) is Reproduction.REPRODUCED
    bad = table(written, LEVELS | {ours: -0.5, theirs: 4.5}, 5)
    assert verdict(check, [bad, bad]) is Reproduction.NOT


def test_the_best_of_many(written: Written) -> None:
    check = exo.best_of_is_comparable_on_tldr
    near = table(written, LEVELS | {"exo_rw": 9.0}, 9)
    assert verdict(check, [near, near]) is Reproduction.REPRODUCED
    far = table(written, LEVELS | {"exo_rw": -5.0}, 9)
    assert verdict(check, [far, far]) is Reproduction.NOT


def test_win_rates_of_the_best_of_many(written: Written) -> None:
    """By hand: the best of 128 has 2.6, and SFT's samples are 1 or 3 with a post's level on top."""
    contest = exo.contest_of(table(written, LEVELS, 2.6))
    columns = contest.columns("best_of")
    sft = exo.tensor_of(numbers(0, 2, 2)["rewards"])[:10]
    expected = (sft < 2.6).double().mean(1)
    torch.testing.assert_close(columns["RM against SFT"], expected)
    torch.testing.assert_close(columns["RM against chosen"], torch.ones(10).double())
    assert len(contest.columns("exo_rw")["oracle against chosen"]) == NUM_POSTS


# ---------------------------------------------------------------- densities


def density_run(written: Written, tilt: dict[str, float]) -> exo.Densities:
    """Rewards that rise with log π_sft, and policies whose log-ratio is so many times r/β."""
    rng = random.Random(0)
    logps: dict[str, list] = {"sft": []}
    rewards = []
    for _ in range(20):
        sft = [rng.gauss(0, 1) for _ in range(40)]
        row = [0.5 * value + rng.gauss(0, 0.1) for value in sft]
        rewards.append({"scores": row})
        logps["sft"].append(sft)
        for name, share in tilt.items():
            ratios = [share * reward / (exo.BETA * exo.BETA_R) for reward in row]
            logps.setdefault(name, []).append([a + b + 7 for a, b in zip(sft, ratios, strict=True)])
    many = exo.Many(written.rows(rewards), written.rows([]))
    return exo.Densities(many, written.json({"logps": logps}))


def test_densities(written: Written) -> None:
    names = [f"{method}{size}" for method in exo.METHODS for size in exo.SIZES]
    exact = dict.fromkeys(names, 1.0)
    good = density_run(written, exact | {"dpo4": 0.3})
    findings = list(exo.exo_follows_the_optimum([good, good]))
    assert reproduction_of(findings) is Reproduction.REPRODUCED
    divergences = {finding.statement: finding.measured for finding in findings}
    assert divergences["KL(EXO-rw ‖ π*), K = 4"].startswith(("0.00", "-0.00"))
    bad = density_run(written, exact | {"exo4": 0.3, "dpo4": 1.2})
    assert verdict(exo.exo_follows_the_optimum, [bad, bad]) is Reproduction.NOT


# ---------------------------------------------------------------- the plan


def test_groups_have_equally_many_completions(tmp_path: Path) -> None:
    plan = Plan(tmp_path)
    for size in exo.SIZES:
        artifact: Artifact = exo.drawn(plan, 0, size)
        words = artifact.stage.command.split()
        number = int(words[words.index("--num-completions") + 1]) * int(words[words.index("--max-rows") + 1])
        assert number == exo.STEPS * exo.COMPLETIONS
