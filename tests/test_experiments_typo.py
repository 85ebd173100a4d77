"""TYPO's experiments: numbers from what the stages leave, and verdicts on made-up outputs, both ways."""

import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_outputs import Outputs

from scripts.experiments import typo
from scripts.lab import answers
from scripts.lab.experiments import Reproduction, reproduction_of
from scripts.lab.tabular import vector

NUM_PROMPTS = 36


# ---------------------------------------------------------------- numbers


def test_optima_of_bandits_have_closed_forms() -> None:
    """DPO's is the tilt π_ref π*^(1/λ). IPO's, for draws of π_ref, is π_ref exp(E p*(y ≻ y')/λ), by a plain loop."""
    lams = (0.2, 1.0, 5.0)
    for group in answers.GROUPS.values():
        for lam, dpo, ipo in zip(
            lams, typo.bandit_optima("dpo", group, lams), typo.bandit_optima("ipo", group, lams), strict=True
        ):
            tilts, wins = [], []
            for i, q in enumerate(group.pi_ref):
                p = group.pi_star[i]
                reward = sum(r * p / (p + s) for r, s in zip(group.pi_ref, group.pi_star, strict=True))
                tilts.append(q * p ** (1 / lam))
                wins.append(q * math.exp(reward / lam))
            assert dpo.tolist() == pytest.approx([weight / sum(tilts) for weight in tilts], abs=1e-6)
            assert ipo.tolist() == pytest.approx([weight / sum(wins) for weight in wins], abs=1e-6)


def test_optima_of_typo_go_from_the_target_to_the_reference() -> None:
    group = answers.GROUPS["bad"]
    first, last = typo.bandit_optima("typo", group, (1e-5, 1e5))
    assert first.tolist() == pytest.approx(group.pi_star, abs=1e-3)
    assert last.tolist() == pytest.approx(group.pi_ref, abs=1e-3)
    good = answers.GROUPS["good"]
    for policy in typo.bandit_optima("typo", good, typo.LAMS):
        assert policy.tolist() == pytest.approx(good.pi_star, abs=1e-6)


def test_distances_count_what_is_no_answer() -> None:
    chances = typo.with_the_rest(torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.3, 0.1]], dtype=torch.double))
    target = vector(0.6, 0.3, 0.1, 0)
    assert chances[:, 3].tolist() == pytest.approx([0.2, 0], abs=1e-12)
    assert typo.total_variations(chances, target).tolist() == pytest.approx([0.2, 0], abs=1e-12)
    assert typo.likeliest_share(chances).tolist() == pytest.approx([0.5 / 0.8, 0.6])


def test_explained_variance_is_that_of_a_regression() -> None:
    rng = random.Random(0)
    x = [rng.gauss(0, 1) for _ in range(30)]
    y = [2 * value + rng.gauss(0, 3) for value in x]
    drawn = [rng.randrange(30) for _ in range(30)]
    xs, ys = [x[i] for i in drawn], [y[i] for i in drawn]
    x_mean, y_mean = sum(xs) / 30, sum(ys) / 30
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(xs, ys, strict=True)) / sum((a - x_mean) ** 2 for a in xs)
    left = sum((b - y_mean - slope * (a - x_mean)) ** 2 for a, b in zip(xs, ys, strict=True))
    expected = 1 - left / sum((b - y_mean) ** 2 for b in ys)

    counts = torch.tensor([[float(drawn.count(i)) for i in range(30)]]).double()
    statistic = typo.squared_correlation(torch.tensor(y).double(), torch.tensor(x).double())
    assert float(statistic(counts)) == pytest.approx(expected)


# ---------------------------------------------------------------- made-up outputs


class Written(Outputs):
    """Files as the stages leave them."""

    def readout(self, policies: dict[str, Callable[[answers.Group], tuple[float, ...]]]) -> typo.Readout:
        """Policies that give the answers of each group these probabilities, up to 1% at each prompt."""
        rng = random.Random(0)
        rows = []
        logps: dict[str, list] = {name: [] for name in policies}
        for group in answers.GROUPS.values():
            for _ in range(NUM_PROMPTS // 3):
                rows.append({"prompt": f"anna {group.verb} a lamp in may: tag"})
                for name, policy in policies.items():
                    logps[name].append([math.log(p * (1 - rng.random() / 100)) for p in policy(group)])
        held_out = self.rows(rows)
        return typo.Readout(held_out, self.json({"logps": logps}))

    def texts(self, rewards: dict[str, float], margin_of_length: float) -> typo.Texts:
        """Policies of these rewards, a chosen summary of reward 2, and margins that depend on lengths or do not."""
        rng = random.Random(0)
        policies = {}
        for name, reward in rewards.items():
            samples = [[rng.gauss(reward, 0.5) for _ in range(4)] for _ in range(NUM_PROMPTS)]
            policies[name] = {"rewards": samples}
        results = {"policies": policies, "row_rewards": [2.0] * NUM_PROMPTS}

        rows = []
        logps: dict[str, list] = {"sft": [], "dpo": []}
        for _ in range(NUM_PROMPTS):
            chosen, rejected = rng.randint(1, 9), rng.randint(1, 9)
            rows.append({"chosen": "a " * chosen, "rejected": "a " * rejected})
            pair = [margin_of_length * length + rng.gauss(0, 1) for length in (chosen, rejected)]
            logps["sft"].append(pair)
            logps["dpo"].append([value + rng.gauss(0, 1) for value in pair])
        pairs = self.rows(rows)
        return typo.Texts(self.json(results), pairs, self.json({"logps": logps}))


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def verdict(check: Callable, *runs: Any) -> Reproduction:
    return reproduction_of(check(list(runs)))


def reference(group: answers.Group) -> tuple[float, ...]:
    return group.pi_ref


def target(group: answers.Group) -> tuple[float, ...]:
    return group.pi_star


def greedy(group: answers.Group) -> tuple[float, ...]:
    return (0.98, 0.01, 0.01)


def elsewhere(group: answers.Group) -> tuple[float, ...]:
    return (0.3, 0.01, 0.01)


def vague(group: answers.Group) -> tuple[float, ...]:
    """A tenth for what is no answer."""
    return tuple(0.9 * chance for chance in group.pi_ref)


def optimal(method: str, lam: float) -> Callable[[answers.Group], tuple[float, ...]]:
    """The optimum of a bandit, with probabilities above 0."""
    of_groups = {group: typo.bandit_optima(method, group, [lam])[0] + 1e-9 for group in answers.GROUPS.values()}
    return lambda group: tuple(of_groups[group].tolist())


@functools.cache
def as_bandits() -> dict[str, Callable]:
    """Policies as the theory has them."""
    policies: dict[str, Callable] = {"sft": reference}
    for method in typo.METHODS:
        for i, lam in enumerate(typo.LAMS):
            policies[f"{method}_{i}"] = optimal(method, lam)
    return policies


def test_preservation(written: Written) -> None:
    bandits = as_bandits()
    assert verdict(typo.typo_keeps_good_prompts, written.readout(bandits)) is Reproduction.REPRODUCED

    exchanged = {**bandits, "sft": vague}
    for i in range(len(typo.LAMS)):
        exchanged[f"typo_{i}"] = elsewhere
        for rival in typo.RIVALS:
            exchanged[f"{rival}_{i}"] = target
    assert verdict(typo.typo_keeps_good_prompts, written.readout(exchanged)) is Reproduction.NOT


def test_interpolation(written: Written) -> None:
    bandits = as_bandits()
    assert verdict(typo.models_interpolate_as_bandits, written.readout(bandits)) is Reproduction.REPRODUCED

    # the mode, but among what is no answer
    mixed = {**bandits, "dpo_0": elsewhere}
    assert verdict(typo.models_interpolate_as_bandits, written.readout(mixed)) is Reproduction.PARTLY
    flat: dict[str, Callable] = dict.fromkeys(bandits, lambda group: (0.2, 0.2, 0.2))
    flat["sft"] = reference
    assert verdict(typo.models_interpolate_as_bandits, written.readout(flat)) is Reproduction.NOT


def test_each_term_alone(written: Written) -> None:
    policies = {"sft": reference, "supervised": target, "unsupervised": reference}
    assert verdict(typo.each_term_goes_to_its_own_end, written.readout(policies)) is Reproduction.REPRODUCED
    policies = {"sft": reference, "supervised": greedy, "unsupervised": greedy}
    assert verdict(typo.each_term_goes_to_its_own_end, written.readout(policies)) is Reproduction.NOT


def test_prompts_without_preferences(written: Written) -> None:
    policies = {
        "sft": reference,
        "dpo_without": greedy,
        "typo_without": greedy,
        "typo_unlabelled": target,
    }
    assert verdict(typo.unlabelled_prompts_serve, written.readout(policies)) is Reproduction.REPRODUCED
    policies |= {"typo_without": target, "typo_unlabelled": elsewhere}
    assert verdict(typo.unlabelled_prompts_serve, written.readout(policies)) is Reproduction.NOT


def test_truncated_samples(written: Written) -> None:
    policies = {"sft": reference, "plain": reference, "truncated": reference}
    assert verdict(typo.truncated_samples_serve, written.readout(policies)) is Reproduction.REPRODUCED
    policies["truncated"] = greedy
    assert verdict(typo.truncated_samples_serve, written.readout(policies)) is Reproduction.NOT


def text_rewards(typo_reward: float) -> dict[str, float]:
    rewards = {"sft": 2.0}
    for kind in typo.PREFERENCES:
        rewards |= {f"dpo_{kind}": 2.2, f"ipo_{kind}": 2.2, f"typo_{kind}": typo_reward}
    return rewards


def test_win_rates(written: Written) -> None:
    """The win rate is the share of samples above the chosen summary's reward of 2."""
    run = written.texts(text_rewards(3.0), 0)
    results = json.loads(run.results.path.read_text())
    samples = results["policies"]["sft"]["rewards"]
    expected = [sum(reward > 2 for reward in of_post) / 4 for of_post in samples]
    assert typo.wins_of(run, "sft").tolist() == expected
    assert verdict(typo.typo_wins_more_often, run) is Reproduction.REPRODUCED
    assert verdict(typo.typo_wins_more_often, written.texts(text_rewards(1.0), 0)) is Reproduction.NOT


def test_comparisons_of_lengths(written: Written) -> None:
    run = written.texts(text_rewards(2.0), -2.0)
    assert verdict(typo.pairs_become_comparisons_of_lengths, run) is Reproduction.REPRODUCED
    run = written.texts(text_rewards(2.0), 0)
    assert verdict(typo.pairs_become_comparisons_of_lengths, run) is Reproduction.NOT
