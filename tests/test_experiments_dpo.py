"""The DPO paper's experiments: numbers from what the stages leave, and verdicts on made-up outputs, both ways."""

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stage_outputs import Outputs
from torch import Tensor

from scripts.experiments import dpo
from scripts.lab.experiments import Experiment, Reproduction, reproduction_of
from scripts.lab.frontier import Curve

NUM_POSTS = 120
NUM_SEEDS = 2
ONCE = torch.ones(1, 1, dtype=torch.double)


# ---------------------------------------------------------------- numbers


def curve(kls: Sequence[float], values: Sequence[float]) -> Curve:
    """Policies on one post."""
    return Curve(dpo.tensor_of(kls).unsqueeze(1), dpo.tensor_of(values).unsqueeze(1))


@pytest.mark.parametrize("kl, height", [(1.0, 3.0), (2.5, 4.5), (4.0, 6.0), (9.0, 6.0)])
def test_a_policy_against_a_curve(kl: float, height: float) -> None:
    """Between the points the curve is linear. A policy of a larger KL is compared with the end."""
    ours = curve([0, 1, 4], [0, 3, 6])
    statistic = dpo.above_point(ours, curve([kl], [0.5]))
    assert float(statistic(ONCE)) == pytest.approx(height - 0.5)


def test_a_resample_counts_posts() -> None:
    """The curve and the policy are means over the drawn posts."""
    kls = dpo.tensor_of([[0, 0], [2, 4]])
    values = dpo.tensor_of([[0, 0], [1, 5]])
    ours = Curve(kls, values)
    point = Curve(dpo.tensor_of([[1, 1]]), dpo.tensor_of([[0, 2]]))
    counts = dpo.tensor_of([[1, 1], [2, 0]])
    expected = dpo.tensor_of([3 / 3 - 1, 1 / 2 - 0])
    torch.testing.assert_close(dpo.above_point(ours, point)(counts), expected)


def samples_of_the_reference(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(5, 64, generator=generator, dtype=torch.double)


def weights_by_hand(rewards: Sequence[float], beta: float) -> list[float]:
    tilted = [math.exp(reward / beta) for reward in rewards]
    return [value / sum(tilted) for value in tilted]


def test_the_optimal_curve_is_that_of_eq_4() -> None:
    rewards = samples_of_the_reference(0)
    found = dpo.optimal_curve(rewards)
    torch.testing.assert_close(found.values[0], rewards.mean(1))
    assert not found.kls[0].any()
    for i in range(1, len(found.kls)):
        beta = dpo.OPTIMUM_BETAS[i - 1]
        for post, values in enumerate(rewards.tolist()):
            weights = weights_by_hand(values, beta)
            mean = math.fsum(w * value for w, value in zip(weights, values, strict=True))
            kl = math.fsum(w * math.log(64 * w) for w in weights)
            assert float(found.values[i, post]) == pytest.approx(mean)
            assert float(found.kls[i, post]) == pytest.approx(kl)


def test_the_optimal_curve_ends_where_too_few_samples_count() -> None:
    rewards = samples_of_the_reference(1)
    numbers = []
    for beta in dpo.OPTIMUM_BETAS:
        total = 0.0
        for values in rewards.tolist():
            weights = weights_by_hand(values, beta)
            total += 1 / sum(w * w for w in weights)
        numbers.append(total / len(rewards))
        assert dpo.effective_number(rewards, beta) == pytest.approx(numbers[-1])

    num_believed = sum(number > 4 for number in numbers)
    assert 0 < num_believed < len(numbers)
    assert len(dpo.optimal_curve(rewards).kls) == 1 + num_believed


def test_equal_rewards_have_all_samples() -> None:
    rewards = torch.ones(2, 8, dtype=torch.double)
    assert dpo.effective_number(rewards, 0.1) == pytest.approx(8)


def test_accuracy_is_a_share_of_unequal_pairs() -> None:
    rng = random.Random(2)
    scores = [rng.choices([0.0, 0.5, 1.0], k=4) for _ in range(30)]
    rewards = [rng.choices([0.0, 1.0], k=4) for _ in range(30)]

    expected = []
    for row, truth in zip(scores, rewards, strict=True):
        points = []
        for i, j in itertools.combinations(range(4), 2):
            if truth[i] == truth[j]:
                continue
            if row[i] == row[j]:
                points.append(0.5)
            else:
                is_right = (row[i] > row[j]) == (truth[i] > truth[j])
                points.append(float(is_right))
        if points:
            expected.append(sum(points) / len(points))

    assert len(expected) < 30
    found = dpo.accuracy(dpo.tensor_of(scores), dpo.tensor_of(rewards))
    torch.testing.assert_close(found, dpo.tensor_of(expected))


def test_wins_of_the_best_of_n() -> None:
    """The mean over all subsets of three of five completions, with distinct scores and a tie with the opponent."""
    scores = dpo.tensor_of([[0.3, -1.0, 2.0, 0.1, 1.0]])
    rewards = dpo.tensor_of([[1.0, 4.0, 0.0, 2.0, 3.0]])
    wins = [0.0, 1.0, 0.0, 0.5, 1.0]
    subsets = list(itertools.combinations(range(5), 3))
    chosen = [max(subset, key=lambda i: float(scores[0, i])) for subset in subsets]
    expected = sum(wins[i] for i in chosen) / len(subsets)
    found = dpo.best_of_wins(scores, rewards, dpo.tensor_of([[2.0]]), 3)
    assert found.tolist() == pytest.approx([expected])


def test_gains_are_compared_with_the_best() -> None:
    """Gains 4, 1, 3 and -1, on the first of two posts 0, 2, 0 and 0."""
    last = [(0, 8), (2, 0), (0, 6), (0, -2)]
    policies = {"sft": {"rewards": [[0, 0], [0, 0]]}}
    for beta, rewards in zip(dpo.BETAS, last, strict=True):
        policies[f"dpo_{beta:g}_{dpo.STEPS}"] = {"rewards": [[reward] for reward in rewards]}
    statistic = dpo.over_half_of_the_best(policies, f"dpo_{dpo.BETAS[1]:g}")
    counts = dpo.tensor_of([[1, 1], [2, 0]])
    torch.testing.assert_close(statistic(counts), dpo.tensor_of([1 - 4 / 2, 2 - 2 / 2]))


# ---------------------------------------------------------------- made-up outputs


def around(mean: float, size: int, seed: int) -> list[list[float]]:
    """Rewards of each post's samples, around a mean."""
    rng = random.Random(f"{mean} {size} {seed}")
    rewards = []
    for _ in range(NUM_POSTS):
        row = [rng.gauss(mean, 0.5) for _ in range(size)]
        rewards.append(row)
    return rewards


def policy(kl: float, reward: float) -> dict:
    """What evaluation says of a policy whose completions all end."""
    return {
        "rewards": around(reward, 2, seed=0),
        "step_kls": [[kl, kl]] * NUM_POSTS,
        "finished": 1.0,
    }


class Written(Outputs):
    """Files as the stages leave them."""

    def policies(self, policies: dict[str, dict]) -> Any:
        return self.json({"policies": policies})

    def scores(self, scores: Sequence) -> Any:
        return self.rows({"scores": row} for row in scores)

    def runs(self, paths: dict[str, Sequence[tuple[float, float]]]) -> Any:
        """Each method's (KL, reward) after each third of its steps."""
        policies = {"sft": policy(0, 0)}
        for method, path in paths.items():
            for step, (kl, reward) in zip(dpo.steps_of(), path, strict=True):
                policies[f"{method}_{step}"] = policy(kl, reward)
        return self.policies(policies)

    def heat(self, levels: dict[str, Sequence[float]]) -> dpo.Heat:
        """Each policy's reward at each temperature. Its opponents are around 0, the best of 64 around 0.2."""
        by_temperature: dict[str, dict] = {}
        for i, temperature in enumerate(dpo.TEMPERATURES):
            policies = {name: policy(0, rewards[i]) for name, rewards in levels.items()}
            by_temperature[f"{temperature:g}"] = policies

        demonstrations = around(0, 1, seed=5)
        results = {
            "by_temperature": by_temperature,
            "row_rewards": [reward for (reward,) in demonstrations],
        }
        pairs = around(-0.3, 4, seed=7)  # the better one of two is around 0
        return dpo.Heat(self.json(results), self.scores(pairs), self.many())

    def many(self) -> dpo.Many:
        """Completions with rewards around -1, all of which the best checkpoint of the reward model knows."""
        rewards = around(-1, dpo.NUM_MANY, seed=6)
        rewards = rewards[: dpo.MANY_POSTS]
        return self.known(rewards)

    def known(self, rewards: list[list[float]]) -> dpo.Many:
        by_models = []
        for row in rewards:
            scores = [[reward, 0.0] for reward in row]
            by_models.append(scores)
        return dpo.Many(self.scores(rewards), self.scores(by_models))

    def four(self, noise_of_dpo: float, noise_of_rm: float, noise_of_last: float = 0.0) -> dpo.Four:
        """Four completions of each post, whose scores are their rewards and noise."""
        rng = random.Random(8)
        rewards = around(0, 4, seed=9)
        logps: dict[str, list] = {"sft": [], "dpo": []}
        scores = []
        for row in rewards:
            of_sft = [rng.gauss(0, 1) for _ in row]
            logps["sft"].append(of_sft)
            log_ratios = [rng.gauss(reward, noise_of_dpo) for reward in row]
            of_dpo = [a + b for a, b in zip(of_sft, log_ratios, strict=True)]
            logps["dpo"].append(of_dpo)

            best = [rng.gauss(reward, noise_of_rm) for reward in row]
            last = [rng.gauss(reward, noise_of_last) for reward in row]
            scores.append(list(zip(best, last, strict=True)))
        return dpo.Four(self.scores(rewards), self.scores(scores), self.json({"logps": logps}))


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def experiment(number: str) -> Experiment:
    (found,) = [one for one in dpo.STUDY.experiments if one.number == number]
    return found


def verdict(number: str, run: Any) -> Reproduction:
    """The verdict on two seeds that have found the same."""
    return reproduction_of(experiment(number).check([run] * NUM_SEEDS))


GOOD = [(1, 2.5), (2, 3.2), (3, 4)]  # (KL, reward)
WEAK = [(1, 1), (2, 1.5), (3, 2)]
POOR = [(1, -1), (2, -2), (3, -4)]


def frontier_of(written: Written, ours: Sequence, others: Sequence, ppo: tuple[float, float]) -> dpo.Frontier:
    methods: dict[str, Any] = {f"dpo_{beta:g}": ours for beta in dpo.BETAS}
    methods |= {f"unlikelihood_{alpha:g}": others for alpha in dpo.ALPHAS}
    methods["preferred_ft"] = others
    at_end = written.policies({"ppo_oracle": policy(*ppo), "ppo_rm": policy(*ppo)})
    rewards = [[0.0] * 60 + [12.0] * 4] * dpo.MANY_POSTS  # the optimum is steep
    return dpo.Frontier(written.runs(methods), at_end, written.scores(rewards))


def test_the_frontiers(written: Written) -> None:
    better = frontier_of(written, GOOD, WEAK, (2.0, 2.0))
    worse = frontier_of(written, WEAK, GOOD, (2.0, 2.0))
    between = frontier_of(written, GOOD, WEAK, (2.0, 3.5))
    assert verdict("E1", better) == Reproduction.REPRODUCED
    assert verdict("E1", worse) == Reproduction.NOT
    assert verdict("E1", between) == Reproduction.PARTLY
    assert verdict("E2", better) == Reproduction.REPRODUCED
    assert verdict("E2", between) == Reproduction.NOT


def test_training_that_is_stable(written: Written) -> None:
    stable = frontier_of(written, GOOD, WEAK, (2.0, 2.0))
    unstable = frontier_of(written, POOR, WEAK, (2.0, 2.0))
    assert verdict("E23", stable) == Reproduction.REPRODUCED
    assert verdict("E23", unstable) == Reproduction.PARTLY  # completions end all the same


def test_the_course_of_training(written: Written) -> None:
    methods = {f"dpo_{beta:g}": GOOD for beta in dpo.BETAS}
    late = [(1, 0.5), (2, 1), (3, 4)]
    assert verdict("E13", written.runs(methods)) == Reproduction.REPRODUCED
    assert verdict("E13", written.runs(methods | {dpo.MAIN: late})) == Reproduction.PARTLY
    falling = {dpo.MAIN: [(1, 3), (2, 2), (3, 1)]}
    assert verdict("E13", written.runs(methods | falling)) == Reproduction.PARTLY
    assert verdict("E21", written.runs(methods)) == Reproduction.REPRODUCED
    assert verdict("E21", written.runs(methods | {"dpo_5": WEAK})) == Reproduction.PARTLY


HEAT = {
    "sft": [-0.5] * 5,
    "preferred_ft": [-0.5] * 5,
    "dpo": [1.0] * 5,
    "ppo": [0.6, 0.6, 0.4, 0.0, -1.0],
}


@pytest.mark.parametrize("number", ["E7", "E8", "E9", "E10", "E11", "E12"])
def test_what_the_paper_says_of_temperatures(written: Written, number: str) -> None:
    assert verdict(number, written.heat(HEAT)) == Reproduction.REPRODUCED


@pytest.mark.parametrize(
    "number, changes, expected",
    [
        ("E7", {"ppo": [1.5] * 5}, Reproduction.PARTLY),
        ("E7", {"dpo": [-1.0] * 5, "ppo": [-1.0] * 5}, Reproduction.NOT),
        ("E8", {"ppo": [0.6] * 5}, Reproduction.NOT),
        ("E8", {"dpo": [1.0, 1.0, 0.0, 0.0, -3.0]}, Reproduction.NOT),
        ("E9", {"dpo": [-0.2] * 5}, Reproduction.NOT),
        ("E10", {"preferred_ft": [0.2] * 5}, Reproduction.NOT),
        ("E10", {"preferred_ft": [-0.5] * 4 + [0.2]}, Reproduction.PARTLY),
        ("E11", {"dpo": [0.5] * 5}, Reproduction.NOT),
        ("E12", {"preferred_ft": [0.5] * 5}, Reproduction.PARTLY),
        ("E12", {name: [0.0 if name == "dpo" else 0.5] * 5 for name in HEAT}, Reproduction.NOT),
    ],
)
def test_what_it_does_not_say(
    written: Written, number: str, changes: dict[str, list[float]], expected: Reproduction
) -> None:
    assert verdict(number, written.heat(HEAT | changes)) == expected


def test_the_unseen_kind(written: Written) -> None:
    assert verdict("E16", written.heat(HEAT).results) == Reproduction.REPRODUCED
    assert verdict("E16", written.heat(HEAT | {"dpo": [0.0] * 5}).results) == Reproduction.NOT


@pytest.mark.parametrize(
    "noise_of_dpo, noise_of_rm, expected",
    [
        (0.3, 0.3, Reproduction.REPRODUCED),
        (0.1, 0.5, Reproduction.REPRODUCED),
        (0.8, 0.1, Reproduction.PARTLY),  # better than log π_ref
        (100.0, 0.1, Reproduction.NOT),
    ],
)
def test_classifiers(written: Written, noise_of_dpo: float, noise_of_rm: float, expected: Reproduction) -> None:
    made = written.four(noise_of_dpo, noise_of_rm)
    other = written.four(100.0, 0.0)
    assert verdict("E20", dpo.Classifiers(made, other)) == expected
    assert verdict("E25", dpo.Classifiers(other, made)) == expected


def test_the_best_checkpoint(written: Written) -> None:
    overfitted = written.four(0.1, 0.1, 1.0)
    alike = written.four(0.1, 0.3, 0.3)
    assert verdict("E19", dpo.Classifiers(overfitted, alike)) == Reproduction.REPRODUCED
    assert verdict("E19", dpo.Classifiers(alike, overfitted)) == Reproduction.NOT


def stage_of(seconds: float) -> Any:
    return SimpleNamespace(read_record=lambda: {"seconds": seconds})


def test_costs(written: Written) -> None:
    made = frontier_of(written, GOOD, WEAK, (2.0, 2.0))
    many = written.known([list(range(64))] * dpo.MANY_POSTS)
    cheap = dpo.Costs(stage_of(10), stage_of(20), stage_of(30), made, many)
    dear = cheap._replace(dpo=stage_of(60))
    weak = cheap._replace(frontier=frontier_of(written, WEAK, WEAK, (2.0, 3.0)))
    assert verdict("E22", cheap) == Reproduction.REPRODUCED
    assert verdict("E22", dear) == Reproduction.PARTLY
    assert verdict("E22", weak) == Reproduction.PARTLY
    # of rewards 0 to 63 one has the mean 31.5, and the better one of two 42
    assert dpo.smallest_size(many, 31.0) == "1"
    assert dpo.smallest_size(many, 32.0) == "2"
    assert dpo.smallest_size(many, 64.0) == "more than 64"


@pytest.mark.parametrize(
    "with_it, expected", [(1.5, Reproduction.REPRODUCED), (0.5, Reproduction.PARTLY), (-1.0, Reproduction.NOT)]
)
def test_preferred_ft_as_the_reference(written: Written, with_it: float, expected: Reproduction) -> None:
    rewards = {"sft": -0.5, "preferred_ft": 0.0, "from_sft": 1.0, "from_preferred_ft": with_it}
    run = written.policies({name: policy(0, reward) for name, reward in rewards.items()})
    assert verdict("T18", run) == expected
