"""From r to Q*: the verdicts of all claims, mistakes that turn them, and the tools that they rest on."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from scripts.lab.claims import run_claim
from scripts.lab.grid_mdp import end_logps, gaussian_steps, solve_chain
from scripts.lab.notices import make_notice, make_sft_row, oracle
from scripts.lab.tree_mdp import Solution, TreeMDP
from scripts.papers import r_to_q

CLAIMS = {claim.number: claim for claim in r_to_q.PAPER.claims}
CACHED = ("optimum", "sampled_distances", "is_unconnected", "notices_world", "language_model_logits")


def test_every_statement_appears_once() -> None:
    """C1 to C64, and this project's own numbers, which end with a letter."""
    statements = [*r_to_q.PAPER.claims, *r_to_q.PAPER.elsewhere]
    numbers = Counter(statement.number for statement in statements)
    assert max(numbers.values()) == 1
    assert {f"C{i}" for i in range(1, 65)} == {number for number in numbers if number[-1].isdigit()}


# ---------------------------------------------------------------- planted mistakes

original_token_rewards = r_to_q.token_rewards
original_dpo_loss = r_to_q.dpo_loss
original_eq_16 = r_to_q.eq_16
original_shaped = TreeMDP.shaped
original_inverse = TreeMDP.inverse
original_solve = TreeMDP.solve
original_solve_chain = r_to_q.solve_chain
original_end_logps = r_to_q.end_logps


def loss_of_means(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Eq 9 with means in place of sums."""
    completions = rewards.split(lengths.flatten().tolist())
    means = torch.stack([completion.mean() for completion in completions]).view(-1, 2)
    return -torch.nn.functional.logsigmoid(means[:, 0] - means[:, 1])


def swapped_dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return original_dpo_loss(logps.flip(1), ref_logps.flip(1), beta)


def dpo_loss_without_reference(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return original_dpo_loss(logps, torch.zeros_like(ref_logps), beta)


def proxy_without_reference(base: Tensor, proxy: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return (base + beta * proxy).log_softmax(-1)


def proxy_with_half(base: Tensor, proxy: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return (base + beta / 2 * (proxy - ref_logps)).log_softmax(-1)


def rewards_without_beta(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return original_token_rewards(logps, ref_logps, 1.0)


def rewards_with_minus(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return original_token_rewards(ref_logps, logps, beta)


def shaped_with_minus(tree: TreeMDP, rewards: Tensor, potential: Tensor, terminal: float = 0.0) -> Tensor:
    return original_shaped(tree, rewards, -potential, terminal)


def shaped_at_the_end(tree: TreeMDP, rewards: Tensor, potential: Tensor, terminal: float = 0.0) -> Tensor:
    """A potential that is 0 at all next states."""
    return rewards - potential.unsqueeze(-1)


def inverse_without_next(tree: TreeMDP, q: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return q - beta * ref_logps


def inverse_without_reference(tree: TreeMDP, q: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return original_inverse(tree, q, torch.zeros_like(ref_logps), beta)


def solve_without_reference(tree: TreeMDP, rewards: Tensor, ref_logps: Tensor, beta: float) -> Solution:
    return original_solve(tree, rewards, torch.zeros_like(ref_logps), beta)


def eq_16_with_minus(logps: Tensor, ref_logps: Tensor, actions: Tensor, beta: float) -> Tensor:
    return -original_eq_16(logps, ref_logps, actions, beta)


def chosen_of_rejected(ref_logps: Tensor, returns: Tensor) -> Tensor:
    wins = (returns - returns[:, None]).sigmoid() @ ref_logps.exp()
    return 2 * ref_logps.exp() * wins


def swapped_typo_loss(logps: Tensor, sample_logps: Tensor, lam: float) -> Tensor:
    return torch.nn.functional.softplus(logps[:, 0] - logps[:, 1])


def chain_without_end(rewards: Tensor, ref_logps: Tensor, beta: float) -> Any:
    return original_solve_chain(rewards, ref_logps, beta, end_values=torch.ones(rewards.shape[-1]).double())


def best_of_one(n: int, probs: Tensor, scores: Tensor) -> Tensor:
    """The distribution of a single draw."""
    return probs


def first_value_only(values: Tensor, state: tuple[int, ...]) -> float:
    """V* of the initial state everywhere."""
    return float(values[0])


Mistake = tuple[object, str, Callable, list[str]]

MISTAKES: dict[str, Mistake] = {
    "means for sums": (r_to_q, "token_dpo_loss", loss_of_means, ["C1", "C11", "C12"]),
    "chosen and rejected swapped": (r_to_q, "dpo_loss", swapped_dpo_loss, ["C5", "C14", "C19", "C60", "C64"]),
    "no reference in the loss": (r_to_q, "dpo_loss", dpo_loss_without_reference, ["C5", "C13", "C21"]),
    "no π_ref in Bellman's equation": (
        TreeMDP,
        "solve",
        solve_without_reference,
        ["C2", "C3", "C6", "C7", "C10", "C17", "C33"],
    ),
    "no V* in the inverse": (TreeMDP, "inverse", inverse_without_next, ["C8", "C15"]),
    "no π_ref in the inverse": (TreeMDP, "inverse", inverse_without_reference, ["C8", "C15"]),
    "the potential's sign": (TreeMDP, "shaped", shaped_with_minus, ["C15", "C17"]),
    "no next potential": (TreeMDP, "shaped", shaped_at_the_end, ["C16", "C17", "C20", "C21"]),
    "no β in the token reward": (
        r_to_q,
        "token_rewards",
        rewards_without_beta,
        ["C11", "C17", "C18", "C25", "C50", "C52"],
    ),
    "the token reward's sign": (
        r_to_q,
        "token_rewards",
        rewards_with_minus,
        ["C23", "C25", "C26", "C53", "C54", "C61"],
    ),
    "V* of the start for all": (r_to_q, "value_of", first_value_only, ["C31", "C32"]),
    "candidates not ranked": (r_to_q, "best_of", best_of_one, ["C41"]),
    "a proxy without π_ref": (r_to_q, "proxy_logps", proxy_without_reference, ["C45", "C46"]),
    "half of β for a proxy": (r_to_q, "proxy_logps", proxy_with_half, ["C45", "C46", "C48"]),
    "the sign of Eq 16": (r_to_q, "eq_16", eq_16_with_minus, ["C49"]),
    "rejected for chosen": (r_to_q, "chosen_probs", chosen_of_rejected, ["C53"]),
    "CPL's pair swapped": (r_to_q, "typo_loss", swapped_typo_loss, ["C57"]),
    "V = 1 at the end of a chain": (r_to_q, "solve_chain", chain_without_end, ["C59"]),
}


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """No cached result from before, and none of a mistake after."""
    clear_caches()
    yield
    clear_caches()


def clear_caches() -> None:
    for name in CACHED:
        getattr(r_to_q, name).cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_turns_the_verdict(name: str, monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    target, attribute, mistake, numbers = MISTAKES[name]
    monkeypatch.setattr(target, attribute, mistake)
    unchanged = [number for number in numbers if run_claim(CLAIMS[number]).is_expected]
    assert unchanged == []


# ---------------------------------------------------------------- tools

TREE = TreeMDP(num_tokens=3, horizon=3, eos=2)


def test_the_states_and_trajectories_of_a_tree() -> None:
    paths = [(2,), (0, 2), (1, 2)]
    for first, second in itertools.product(range(2), repeat=2):
        paths += [(first, second, last) for last in range(3)]
    assert TREE.states == [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert sorted(TREE.paths) == sorted(paths)
    assert len(TreeMDP(num_tokens=2, horizon=3).paths) == 8


def test_sums_and_sparse_rewards() -> None:
    table = r_to_q.normal(*TREE.shape, seed=1)
    sums = []
    for path in TREE.paths:
        rewards = [float(table[TREE.row_of[path[:t]], action]) for t, action in enumerate(path)]
        sums.append(sum(rewards))
        assert TREE.along(table, path).tolist() == rewards
    expected = torch.tensor(sums, dtype=torch.float64)
    assert_close(TREE.sums(table), expected)
    sparse = TREE.at_the_end(expected)
    assert_close(TREE.sums(sparse), expected)
    assert int((sparse != 0).sum()) == len(TREE.paths)


def test_the_policy_of_a_distribution_over_trajectories() -> None:
    """Against conditional probabilities by counting."""
    path_logps = r_to_q.normal(len(TREE.paths), seed=2).log_softmax(0)
    probs = dict(zip(TREE.paths, path_logps.exp().tolist(), strict=True))

    def mass(prefix: tuple[int, ...]) -> float:
        return sum(prob for path, prob in probs.items() if path[: len(prefix)] == prefix)

    policy = TREE.policy_of(path_logps)
    assert_close(TREE.sums(policy), path_logps)
    for row, state in enumerate(TREE.states):
        for action in range(3):
            conditional = mass((*state, action)) / mass(state)
            assert float(policy[row, action].exp()) == pytest.approx(conditional, abs=1e-12)


def test_a_potential_that_is_not_zero_at_the_end() -> None:
    """All returns change by the same Φ(end) - Φ(s_0)."""
    rewards = r_to_q.normal(*TREE.shape, seed=3)
    potential = r_to_q.normal(len(TREE.states), seed=4)
    shaped = TREE.shaped(rewards, potential, terminal=1.5)
    differences = TREE.sums(shaped) - TREE.sums(rewards)
    assert_close(differences, torch.full_like(differences, 1.5 - float(potential[0])))


def test_a_chain_against_all_its_ways() -> None:
    """Three steps on five points: log Σ over all ways, and the distribution of the end."""
    grid = torch.linspace(-2, 2, 5, dtype=torch.float64)
    ref_logps = gaussian_steps(grid, 3, shrinkage=0.5, scale=0.8)
    rewards = r_to_q.normal(*ref_logps.shape, seed=5)
    best = solve_chain(rewards, ref_logps, 0.7)
    for start in range(5):
        worths = []
        ends = torch.zeros(5, dtype=torch.float64)
        for way in itertools.product(range(5), repeat=3):
            points = (start, *way)
            steps = range(3)
            logp = sum(float(ref_logps[t, points[t], points[t + 1]]) for t in steps)
            reward = sum(float(rewards[t, points[t], points[t + 1]]) for t in steps)
            worths.append(math.exp(logp + reward / 0.7))
            ends[way[-1]] += worths[-1]
        assert float(best.v[0, start]) == pytest.approx(0.7 * math.log(sum(worths)), abs=1e-12)
        assert_close(end_logps(best.logps)[start].exp(), ends / sum(worths))


def test_the_best_of_n_against_all_draws() -> None:
    probs = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    scores = torch.tensor([0.1, 0.9, 0.4], dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for draws in itertools.product(range(3), repeat=4):
        best = max(draws, key=lambda i: float(scores[i]))
        expected[best] += probs[list(draws)].prod()
    assert_close(r_to_q.best_of(4, probs, scores), expected)


def test_who_is_chosen_against_all_pairs() -> None:
    ref_logps = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    returns = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for i, j in itertools.product(range(3), repeat=2):
        pair = float(ref_logps[i].exp() * ref_logps[j].exp())
        wins = 1 / (1 + math.exp(float(returns[j] - returns[i])))
        expected[i] += pair * wins
        expected[j] += pair * (1 - wins)
    assert_close(r_to_q.chosen_probs(ref_logps, returns), expected)


def test_the_notices_world_is_that_of_the_demonstrations() -> None:
    """The shares of rewards of 4,000 demonstrations, to five standard deviations."""
    rng = random.Random(0)
    counts: Counter[float] = Counter()
    for _ in range(4000):
        row = make_sft_row(*make_notice(rng), rng)
        counts[oracle(row["prompt"], row["completion"])] += 1

    logps, rewards = r_to_q.notices_world()
    shares: Counter[float] = Counter()
    for prob, reward in zip(logps.exp().tolist(), rewards.tolist(), strict=True):
        shares[reward] += prob
    assert sum(shares.values()) == pytest.approx(1)
    assert set(counts) <= set(shares)
    for reward, share in shares.items():
        deviation = math.sqrt(share * (1 - share) / 4000)
        assert counts[reward] / 4000 == pytest.approx(share, abs=5 * deviation)
