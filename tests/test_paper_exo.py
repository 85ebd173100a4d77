"""The statements of the EXO paper: the verdict of each, mistakes that must turn it, and the tools they rest on."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from algos.dpo import dpo_loss
from algos.exo import dpo_rw_loss, exo_loss
from scripts.lab import enumerated
from scripts.lab.claims import run_claim
from scripts.lab.tabular import kl, log_partition, minimise, objective, tilted, vector
from scripts.papers import exo

CLAIMS = {claim.number: claim for claim in exo.PAPER.claims}


def test_each_statement_has_one_number() -> None:
    numbers = [statement.number for statement in [*exo.PAPER.claims, *exo.PAPER.elsewhere]]
    assert len(numbers) == len(set(numbers)) == 79


# ---------------------------------------------------------------- planted mistakes


def clear_caches() -> None:
    for function in vars(exo).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, object], None]]:
    """Replace a name of the paper's file, with empty caches before and after."""
    clear_caches()

    def replace(name: str, value: object) -> None:
        assert hasattr(exo, name)
        monkeypatch.setattr(exo, name, value)

    yield replace
    monkeypatch.undo()
    clear_caches()


def objective_with_a_wrong_sign(*arguments: Tensor) -> Tensor:
    return -objective(*arguments)


def tilted_by_the_product(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return tilted(ref_logps, beta * rewards, 1.0)


def partition_without_reference(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return log_partition(torch.zeros_like(ref_logps), rewards, beta)


def reward_loss_swapped(rewards: Tensor) -> Tensor:
    return -(rewards[:, 1] - rewards[:, 0]).sigmoid().log()


def dpo_loss_swapped(logps: Tensor, ref_logps: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    return dpo_loss(logps.flip(1), ref_logps.flip(1), beta, label_smoothing)


def experts_swapped(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    return ((1 - beta) * logps + beta * ref_logps).log_softmax(-1)


def exo_loss_with_half_the_target(logps: Tensor, ref_logps: Tensor, target_logps: Tensor, beta: float) -> Tensor:
    half = (target_logps / 2).log_softmax(-1)
    return exo_loss(logps, ref_logps, half, beta)


def exo_loss_doubled(*arguments: Tensor) -> Tensor:
    return 2 * exo_loss(*arguments)


def exo_loss_without_reference(logps: Tensor, ref_logps: Tensor, target_logps: Tensor, beta: float) -> Tensor:
    return exo_loss(logps, torch.zeros_like(ref_logps), target_logps, beta)


def pairs_swapped(logps: Tensor, ref_logps: Tensor, target_logps: Tensor, beta: float) -> Tensor:
    return exo_loss(logps, ref_logps, target_logps.flip(-1), beta)


def gradients_without_the_others(completions: Tensor, logps: Tensor, rewards: Tensor, with_baseline: bool) -> Tensor:
    """Half of the group's mean as the baseline, with a completion's own reward in it."""
    scores = torch.eye(len(logps), dtype=torch.float64) - logps.exp()
    advantages = rewards[completions]
    if with_baseline:
        advantages = advantages - 0.5 * advantages.mean(1, keepdim=True)
    return (advantages[..., None] * scores[completions]).mean(1)


def losses_swapped(method: str) -> enumerated.Loss:
    return {"EXO": dpo_rw_loss, "DPO-rw": exo_loss}[method]


def columns_swapped() -> dict:
    """The published tables with GPT-4's columns in place of the reward model's."""
    tables: dict = {}
    for name, table in exo.TABLES.items():
        tables[name] = {method: rates[2:] + rates[:2] for method, rates in table.items()}
    return tables


MISTAKES = [  # the name, what is put in its place, the claims whose verdict turns
    # the objective and its optimum
    ("objective", objective_with_a_wrong_sign, "A1 A2 A5 B3 C5"),
    ("tilted", tilted_by_the_product, "A1 A2 A4 A7 B1 B3"),
    ("log_partition", partition_without_reference, "A2 A7 B3 C1"),
    ("rm_loss", reward_loss_swapped, "A3"),
    ("dpo_loss", dpo_loss_swapped, "A8 C10 D2 N3 N5"),
    # the generalised objective
    ("product_of_experts", experts_swapped, "B1 B2 C2 C4 C5"),
    # EXO's loss and its gradient
    ("exo_loss", exo_loss_without_reference, "C2 C4 C5 N1"),
    ("exo_loss", dpo_rw_loss, "C3 C4 C5 C6 C9"),
    ("policy_gradients", gradients_without_the_others, "A6 N2"),
    # learning from preferences
    ("exo_loss", pairs_swapped, "C8 C10 N3 N4 N5 N8"),
    ("exo_loss", exo_loss_with_half_the_target, "C3 C8 N4"),
    # comparison with DPO
    ("dpo_rw_loss", exo_loss, "D1 D2 D3 D5 D6"),
    # mode seeking
    ("loss_of", losses_swapped, "C4 D3 D5 D6 D8 D9"),
    # what follows from the equations
    ("exo_loss", exo_loss_doubled, "V1 N1 N2 N3 N4"),
    # the controlled task
    ("loss_of", losses_swapped, "F2e F3 F9 N6"),
    # published tables
    ("TABLES", columns_swapped(), "X1 X2 X4"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, mistake, numbers", MISTAKES)
def test_a_planted_mistake_turns_the_verdict(
    name: str, mistake: object, numbers: str, plant: Callable[[str, object], None]
) -> None:
    plant(name, mistake)
    for number in numbers.split():
        outcome = run_claim(CLAIMS[number])
        assert not outcome.is_expected, f"{number}: {outcome.findings}"


# ---------------------------------------------------------------- groups of samples


def test_multisets_stand_for_all_tuples() -> None:
    groups = enumerated.all_groups(exo.SFT_LOGPS, 3)
    assert float(groups.weights.sum()) == pytest.approx(1, abs=1e-12)

    tuples = torch.tensor(list(itertools.product(range(3), repeat=3)))
    every_tuple = enumerated.Groups(tuples, exo.SFT[tuples].prod(1))
    logps = exo.LOGITS.log_softmax(0)
    loss = enumerated.expected_loss(exo_loss, exo.ARMS, logps, groups, 0.5, 0.5)
    expected = enumerated.expected_loss(exo_loss, exo.ARMS, logps, every_tuple, 0.5, 0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [exo_loss, dpo_rw_loss])
def test_counted_groups_have_the_same_gradient(loss: enumerated.Loss) -> None:
    groups = enumerated.drawn_groups(exo.SFT_LOGPS, 5, 200, seed=0)
    counts = enumerated.counted(groups, 3)
    assert len(counts.weights) <= 21  # multisets of 5
    assert float(counts.weights.sum()) == pytest.approx(1)

    def explicit(logits: Tensor) -> Tensor:
        return enumerated.expected_loss(loss, exo.ARMS, logits.log_softmax(0), groups, 0.5, 0.3)

    def by_counts(logits: Tensor) -> Tensor:
        return enumerated.counted_loss(loss, exo.ARMS, logits.log_softmax(0), counts, 0.5, 0.3)

    gradient = torch.func.grad(by_counts)(exo.LOGITS)
    expected = torch.func.grad(explicit)(exo.LOGITS)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    if loss is exo_loss:
        value = float(by_counts(exo.LOGITS))
        assert value == pytest.approx(float(explicit(exo.LOGITS)), rel=1e-10)


@pytest.mark.parametrize("method", exo.METHODS)
def test_an_infinite_group_is_a_proportional_one(method: str) -> None:
    infinite = enumerated.infinite_group(exo.SFT_LOGPS)

    def loss(logits: Tensor) -> Tensor:
        return enumerated.counted_loss(exo.loss_of(method), exo.ARMS, logits.log_softmax(0), infinite, 0.5, 0.5)

    expected = exo.gradient_of_groups(method, exo.PROPORTIONAL, exo.LOGITS)
    torch.testing.assert_close(torch.func.grad(loss)(exo.LOGITS), expected, rtol=1e-12, atol=1e-14)


def test_draws_have_the_frequencies_of_the_policy() -> None:
    groups = enumerated.drawn_groups(exo.SFT_LOGPS, 4, 25_000, seed=1)
    frequencies = groups.completions.flatten().bincount(minlength=3) / 100_000
    torch.testing.assert_close(frequencies.double(), exo.SFT, rtol=0, atol=0.006)


def test_rloo_leaves_the_completion_out() -> None:
    logps = exo.LOGITS.log_softmax(0)
    group = torch.tensor([[0, 2, 2]])
    (gradient,) = exo.policy_gradients(group, logps, exo.REWARDS, with_baseline=True)

    expected = torch.zeros(3, dtype=torch.float64)
    others_of = [(2, 2), (0, 2), (0, 2)]
    for completion, others in zip((0, 2, 2), others_of, strict=True):
        baseline = exo.REWARDS[list(others)].mean()
        advantage = exo.REWARDS[completion] - baseline
        score = torch.eye(3)[completion] - logps.exp()
        expected += advantage * score / 3
    torch.testing.assert_close(gradient, expected)


# ---------------------------------------------------------------- enumerated sequences


def test_bigram_probabilities_of_sequences() -> None:
    sequences = enumerated.all_sequences(2, 3)
    assert sequences.tolist() == [list(tokens) for tokens in itertools.product((0, 1), repeat=3)]
    table = vector(0.2, 0.8, 0.4, 0.6, 0.7, 0.3)  # the first token; after token 0; after token 1
    probs = enumerated.bigram_logps(table.log(), sequences).exp()
    assert float(probs.sum()) == pytest.approx(1)
    assert float(probs[0b101]) == pytest.approx(0.8 * 0.7 * 0.6)


def test_the_matched_bigram_is_the_nearest() -> None:
    world = exo.main_world()
    log_target = tilted(world.task.ref_logps, world.task.rewards, 1.0)
    matched = enumerated.matched_bigram(log_target, world.sequences)
    least = float(kl(log_target, matched))

    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        parameters = 2 * torch.randn(12, generator=generator, dtype=torch.float64)
        assert float(kl(log_target, world.logps(parameters))) > least
    assert float(kl(matched, enumerated.matched_bigram(matched, world.sequences))) == pytest.approx(0, abs=1e-12)


def test_descent_reaches_newton_s_optimum() -> None:
    world = enumerated.random_world(2, vocabulary=2)

    def loss(parameters: Tensor) -> Tensor:
        return -objective(world.logps(parameters), world.task.ref_logps, world.task.rewards, 0.5)

    descended = world.logps(enumerated.descend(loss, world.sft))
    optimum = minimise(loss, world.sft)
    newton = world.logps(optimum.parameters)
    torch.testing.assert_close(descended.exp(), newton.exp(), rtol=0, atol=1e-7)


def test_no_random_policy_is_above_the_frontier() -> None:
    task = exo.ARMS
    optimum = tilted(task.ref_logps, task.rewards, 0.3)
    assert float(exo.excess_reward(optimum[None], task)) == pytest.approx(0, abs=1e-5)
    assert float(exo.excess_reward(vector(0.1, 0.2, 0.7).log()[None], task)) < 0


def test_masses_add_up() -> None:
    for name, tail in exo.masses(0, 0, 0.5).items():
        assert tail + exo.masses(0, 0.5, 1)[name] == pytest.approx(1)


# ---------------------------------------------------------------- Fig. 1


@pytest.mark.parametrize("start", exo.STARTS)
def test_dpo_rw_has_one_optimum(start: str) -> None:
    optimum = exo.fit_gaussian("DPO-rw", 0, start)
    from_wide = exo.fit_gaussian("DPO-rw", 0, "wide")
    assert optimum == pytest.approx(from_wide, abs=1e-8)


def test_descent_agrees_with_the_landscape() -> None:
    for method in exo.METHODS:
        means, losses = exo.landscape(method)
        best = exo.best_gaussian(method, 0)
        assert float(means[losses.argmin()]) == pytest.approx(best.mean, abs=0.05)
        assert float(losses.min()) == pytest.approx(best.loss, abs=1e-3)


def test_the_target_has_little_between_its_modes() -> None:
    assert exo.mass(exo.target(), -1, 1) < 0.06
    assert float(exo.target().exp().sum()) == pytest.approx(1)


def test_exo_loss_of_the_line_is_the_reverse_divergence() -> None:
    log_p = exo.gaussian(1.0, 1.5)
    divergence = float(log_p.exp() @ (log_p - exo.target()))
    loss = exo_loss(log_p[None], exo.GRID_TASK.ref_logps[None], exo.target()[None], 1.0)
    assert float(loss) == pytest.approx(divergence, rel=1e-10)


def test_the_best_pair_gaussian_is_the_best_of_a_grid() -> None:
    mean, scale = exo.best_of_a_grid()
    fitted = exo.best_gaussian("EXO", 2)
    assert (fitted.mean, fitted.scale) == pytest.approx((mean, scale), abs=0.1)


# ---------------------------------------------------------------- numbers


def test_binomial_p_value() -> None:
    assert exo.binomial_p_value(8, 10) == 2 * (45 + 10 + 1) / 1024
    assert exo.binomial_p_value(5, 10) == 1


@pytest.mark.parametrize("n", [1, 4, 128])
def test_the_best_of_n_beats_a_sample(n: int) -> None:
    assert exo.win_rate_of_best(n) == pytest.approx(n / (n + 1), abs=1e-6)


def test_ties_take_half_of_their_mass() -> None:
    share = exo.tied_mass(0.946, 128)
    assert share == pytest.approx(2 * (1 - 0.946), abs=1e-3)


def test_win_rate_counts_ties_half() -> None:
    task = enumerated.Task(vector(0.5, 0.25, 0.25).log(), vector(0, 1, 1))
    assert exo.win_rate_against_sft(task.ref_logps, task) == pytest.approx(0.5)
    always_best = vector(1e-12, 1, 1e-12).log_softmax(0) - vector(40, 0, 40)
    assert exo.win_rate_against_sft(always_best.log_softmax(0), task) == pytest.approx(0.75)


def test_noisy_margin_is_the_log_odds_for_dpo() -> None:
    assert exo.noisy_margin(exo.dpo_pref, math.log(3)) == pytest.approx(math.log(3))
