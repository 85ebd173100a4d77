"""The losses alone: values by hand and to 60 digits, gradients, invariances, extremes.

Each loss begins with a table of values that can be checked by hand.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from algos.distill_dpo import distill_loss
from algos.dpo import dpo_loss, plackett_luce_loss
from algos.ensemble_dpo import ensemble_losses
from algos.exo import dpo_rw_loss, exo_loss
from algos.ipo import ipo_loss
from algos.pessimistic_dpo import pessimistic_loss
from algos.rm import rm_loss
from algos.sft import sft_loss
from algos.typo import typo_loss

B = 6  # groups
M = 3  # samples, or reward models
BETA = 0.3
TAU = 0.2
LAM = 0.05
GAMMA = 0.01

Numbers = list[Decimal]
LossFunction = Callable[..., Tensor]

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
group_sizes = pytest.mark.parametrize("k", [2, 4, 8])
dpo_settings = pytest.mark.parametrize(
    "k, epsilon",
    [
        (2, 0.0),
        (2, 0.2),
        (4, 0.0),
        (8, 0.0),
    ],
)
sample_numbers = pytest.mark.parametrize("num_samples", [1, 3])
both_divergences = pytest.mark.parametrize("loss", [exo_loss, dpo_rw_loss])


@pytest.fixture(autouse=True)
def sixty_digits() -> Iterator[None]:
    """Decimals have 60 digits."""
    with localcontext() as context:
        context.prec = 60
        yield


# ---------------------------------------------------------------- inputs


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random float64 numbers around 0."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def log_probs(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    """Random float64 log-probabilities of sequences."""
    return -30 + numbers(*shape, seed=seed, scale=scale)


def policy(k: int) -> Tensor:
    """(B, k) log π_θ of completions."""
    return log_probs(B, k, seed=40)


def reference(k: int) -> Tensor:
    """(B, k) log π_ref of completions."""
    return log_probs(B, k, seed=30 + k)


def target(k: int) -> Tensor:
    """(B, k) log-probabilities of a distribution over completions."""
    return numbers(B, k, seed=31, scale=2).log_softmax(1)


def reward_scores() -> Tensor:
    """(B, 2) scores of one reward model."""
    return numbers(B, 2, seed=32)


def ensemble_scores() -> Tensor:
    """(B, 2, M) scores of M reward models."""
    return numbers(B, 2, M)


def row(values: Sequence[float]) -> Tensor:
    """(1, K) float64."""
    return torch.tensor([values], dtype=torch.float64)


def pair(h: float, dtype: torch.dtype) -> Tensor:
    """(1, 2) numbers whose difference is h, to take a gradient of."""
    return torch.tensor([[h, 0.0]], dtype=dtype, requires_grad=True)


def falling(dtype: torch.dtype) -> Tensor:
    """(1, 4) numbers in the right order, to take a gradient of."""
    return torch.tensor([[3e4, 2e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)


def rising(dtype: torch.dtype) -> Tensor:
    """(1, 4) numbers in the wrong order, to take a gradient of."""
    return torch.tensor([[0.0, 1e4, 2e4, 3e4]], dtype=dtype, requires_grad=True)


# ---------------------------------------------------------------- checks


def check_by_hand(losses: Tensor, loss: float) -> None:
    """A loss, to the six decimals that a table has."""
    assert losses.tolist() == [pytest.approx(loss, abs=6e-7)]


def check_close(losses: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of float64: inputs of size 30, losses up to 1e3."""
    assert_close(losses, expected, rtol=1e-11, atol=1e-12)


def check_values(losses: Tensor, exact: Callable[..., Decimal], *columns: Tensor) -> None:
    """Compare losses (B,) with an equation in decimals, which takes a list of numbers for each of the columns."""
    expected = []
    for rows in zip(*columns, strict=True):
        arguments = [decimals(values) for values in rows]
        value = exact(*arguments)
        expected.append(float(value))
    check_close(losses, torch.tensor(expected, dtype=torch.float64))


def decimals(values: Tensor) -> Numbers:
    """The numbers of a row, exactly."""
    return [Decimal(value) for value in values.tolist()]


def slopes(losses: Tensor, logps: Tensor) -> Tensor:
    """The gradient of the summed losses."""
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    return gradient


def check_gradient(loss: LossFunction, logps: Tensor, *others: object) -> None:
    """Autograd's against central differences; the differences' own error is about 1e-9 of the loss."""
    logps = logps.clone().requires_grad_()
    assert gradcheck(loss, (logps, *others), eps=1e-5, rtol=1e-6, atol=1e-7)
    losses = loss(logps, *others)
    gradient = slopes(losses, logps)
    assert float(gradient.abs().max()) > 1e-3


def check_extreme(losses: Tensor, x: Tensor, loss: float, expected: Sequence[float], rel: float = 1e-6) -> None:
    """The loss of one group x, and its slopes to within `rel`, in the dtype of x."""
    assert losses.dtype == x.dtype
    value = float(losses.detach().sum())
    assert value == pytest.approx(loss, rel=1e-6, abs=1e-12)
    (gradient,) = slopes(losses, x).tolist()
    assert gradient == pytest.approx(list(expected), rel=rel, abs=1e-12)


def check_extreme_group(losses: Tensor, x: Tensor, loss: float) -> None:
    """The loss of a group of four, and that its gradient is finite."""
    value = float(losses.detach())
    gradient = slopes(losses, x)
    assert value == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert bool(gradient.isfinite().all())


def check_at_reference(losses: Tensor, expected: Tensor | float) -> None:
    """The losses of step one, in float32."""
    assert losses.dtype == torch.float32
    expected = torch.as_tensor(expected, dtype=torch.float64)
    expected = expected.expand(losses.shape)
    assert_close(losses.double(), expected, rtol=2e-6, atol=1e-6)


def check_same_form(losses: Tensor, others: Tensor, x: Tensor) -> None:
    """Two forms of a loss of x: the same number, and the same gradient but for rounding."""
    assert torch.equal(losses, others)
    gradient = slopes(losses, x)
    other_gradient = slopes(others, x)
    assert_close(gradient, other_gradient, rtol=2e-6, atol=2e-7)


# ---------------------------------------------------------------- equations to 60 digits


def log_ratios(logps: Numbers, ref_logps: Numbers) -> Numbers:
    """ρ = log π_θ − log π_ref."""
    pairs = zip(logps, ref_logps, strict=True)
    return [logp - ref_logp for logp, ref_logp in pairs]


def implicit_rewards(logps: Numbers, ref_logps: Numbers, beta: float = BETA) -> Numbers:
    """β ρ."""
    ratios = log_ratios(logps, ref_logps)
    return [Decimal(beta) * ratio for ratio in ratios]


def softmax(logits: Numbers) -> Numbers:
    """exp of each number over their sum."""
    worths = [logit.exp() for logit in logits]
    return [worth / sum(worths) for worth in worths]


def exact_bradley_terry(margin: Decimal) -> Decimal:
    """−log σ(margin)."""
    worth = (-margin).exp()
    return (1 + worth).ln()


def exact_plackett_luce(rewards: Numbers) -> Decimal:
    """−log of the product over ranks of worth / worth of all that remain."""
    worths = [reward.exp() for reward in rewards]
    probability = Decimal(1)
    for rank, worth in enumerate(worths):
        probability *= worth / sum(worths[rank:])
    return -probability.ln()


def exact_dpo(logps: Numbers, ref_logps: Numbers, beta: float = BETA, epsilon: float = 0.0) -> Decimal:
    """−(1 − ε) log σ(β h) − ε log σ(−β h)."""
    chosen, rejected = implicit_rewards(logps, ref_logps, beta)
    right = exact_bradley_terry(chosen - rejected)
    wrong = exact_bradley_terry(rejected - chosen)
    return (1 - Decimal(epsilon)) * right + Decimal(epsilon) * wrong


def exact_ipo(logps: Numbers, ref_logps: Numbers) -> Decimal:
    """(h − 1/(2τ))²."""
    chosen, rejected = log_ratios(logps, ref_logps)
    gap = 1 / (2 * Decimal(TAU))
    return (chosen - rejected - gap) ** 2


def exact_exo(logps: Numbers, ref_logps: Numbers, p: Numbers) -> Decimal:
    """KL(q ‖ p) = Σ q log(q / p)."""
    rewards = implicit_rewards(logps, ref_logps)
    pairs = zip(softmax(rewards), p, strict=True)
    return sum(q_k * (q_k / p_k).ln() for q_k, p_k in pairs)


def exact_dpo_rw(logps: Numbers, ref_logps: Numbers, p: Numbers) -> Decimal:
    """−Σ p log q."""
    rewards = implicit_rewards(logps, ref_logps)
    pairs = zip(softmax(rewards), p, strict=True)
    return -sum(p_k * q_k.ln() for q_k, p_k in pairs)


def exact_typo(logps: Numbers, sample_logps: Numbers) -> Decimal:
    """log(1 + π(l) / π(w)) − λ · the mean log π of the samples."""
    chosen, rejected = logps
    mean_of_samples = sum(sample_logps) / len(sample_logps)
    return exact_bradley_terry(chosen - rejected) - Decimal(LAM) * mean_of_samples


def exact_distill(logps: Numbers, ref_logps: Numbers, rewards: Numbers) -> Decimal:
    """(r_1 − r_2 − β h)²."""
    first, second = implicit_rewards(logps, ref_logps)
    first_reward, second_reward = rewards
    return (first_reward - second_reward - (first - second)) ** 2


def exact_p_dpo(logps: Numbers, ref_logps: Numbers) -> Decimal:
    """DPO − γ Σ log π."""
    return exact_dpo(logps, ref_logps) - Decimal(GAMMA) * sum(logps)


def exact_pd_dpo(logps: Numbers, ref_logps: Numbers, rewards: Numbers, sample_logps: Numbers) -> Decimal:
    """Distillation − γ log π of a sample."""
    (sample_logp,) = sample_logps
    return exact_distill(logps, ref_logps, rewards) - Decimal(GAMMA) * sample_logp


# ---------------------------------------------------------------- SFT: −log π


def test_sft_is_the_negative_log_probability_of_each_token() -> None:
    logps = log_probs(17, seed=0).requires_grad_()
    losses = sft_loss(logps)
    assert torch.equal(losses, -logps)
    assert torch.equal(slopes(losses, logps), -torch.ones_like(logps))


# ---------------------------------------------------------------- DPO: −log σ(β h), h = ρ_w − ρ_l

DPO_BY_HAND = [
    # logps, ref_logps, beta, label_smoothing, loss
    ((-1, -3), (-2, -2), 0.5, 0.0, 0.313262),  # ρ = (1, −1), β h = 1: log(1 + e^−1)
    ((-3, -1), (-2, -2), 0.5, 0.0, 1.313262),  # β h = −1: log(1 + e)
    ((-5, -9), (-5, -9), 0.5, 0.0, 0.693147),  # at the reference: log 2
    ((-1, -3), (-2, -2), 0.5, 0.1, 0.413262),  # 0.9 log(1 + e^−1) + 0.1 log(1 + e)
]


def test_dpo_by_hand() -> None:
    for logps, ref_logps, beta, label_smoothing, loss in DPO_BY_HAND:
        losses = dpo_loss(row(logps), row(ref_logps), beta, label_smoothing)
        check_by_hand(losses, loss)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 5.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_dpo_pair(beta: float, epsilon: float) -> None:
    logps = log_probs(9, 2, seed=1)
    ref_logps = log_probs(9, 2, seed=2)
    losses = dpo_loss(logps, ref_logps, beta, label_smoothing=epsilon)

    def exact(logps: Numbers, ref_logps: Numbers) -> Decimal:
        return exact_dpo(logps, ref_logps, beta, epsilon)

    check_values(losses, exact, logps, ref_logps)


@dpo_settings
def test_dpo_gradient(k: int, epsilon: float) -> None:
    """The slopes add up to 0, because a shift of all log-probs changes nothing."""
    logps = log_probs(5, k, seed=7)
    ref_logps = log_probs(5, k, seed=8)
    check_gradient(dpo_loss, logps, ref_logps, 0.3, epsilon)

    logps.requires_grad_()
    losses = dpo_loss(logps, ref_logps, 0.3, epsilon)
    sums = slopes(losses, logps).sum(1)
    assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)


def test_dpo_pair_gradient_closed_form() -> None:
    """Rafailov et al.: −β σ(r_l − r_w) on the chosen completion, the opposite on the rejected."""
    beta = 0.4
    logps = log_probs(7, 2, seed=9).requires_grad_()
    ref_logps = log_probs(7, 2, seed=10)
    losses = dpo_loss(logps, ref_logps, beta)
    gradient = slopes(losses, logps)

    rewards = beta * (logps - ref_logps).detach()
    chosen, rejected = rewards.unbind(1)
    slope = -beta * (rejected - chosen).sigmoid()
    expected = torch.stack([slope, -slope], 1)
    assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@dpo_settings
def test_dpo_ignores_what_depends_on_the_prompt_alone(k: int, epsilon: float) -> None:
    logps = log_probs(6, k, seed=11)
    ref_logps = log_probs(6, k, seed=12)
    shift = log_probs(6, 1, seed=13, scale=20)
    losses = dpo_loss(logps, ref_logps, 0.1, epsilon)
    shifted_reference = dpo_loss(logps, ref_logps + shift, 0.1, epsilon)
    check_close(shifted_reference, losses)
    both_shifted = dpo_loss(logps + shift, ref_logps + shift, 0.1, epsilon)
    check_close(both_shifted, losses)


DPO_EXTREMES = [
    # h, epsilon, loss, slope
    (1e4, 0.0, 0, 0),
    (1e4, 0.1, 1e3, 0.1),
    (-1e4, 0.0, 1e4, -1),
    (-1e4, 0.1, 9e3, -0.9),
]


@both_dtypes
def test_dpo_extreme_pair(dtype: torch.dtype) -> None:
    for h, epsilon, loss, slope in DPO_EXTREMES:
        logps = pair(h, dtype)
        losses = dpo_loss(logps, torch.zeros_like(logps), 1.0, epsilon)
        check_extreme(losses, logps, loss, (slope, -slope))


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_dpo_of_a_pair_at_the_reference(epsilon: float) -> None:
    """π_θ = π_ref: log 2, and the gradient pushes the first up."""
    logps = log_probs(5, 2, seed=14).requires_grad_()
    losses = dpo_loss(logps, logps.detach(), 0.1, epsilon)
    check_close(losses, torch.full_like(losses, math.log(2)))

    slope = -0.1 * (0.5 - epsilon)
    expected = row((slope, -slope)).expand(5, 2)
    check_close(slopes(losses, logps), expected)


@group_sizes
def test_dpo_at_the_reference_in_float32(k: int) -> None:
    logps = reference(k).float()
    losses = dpo_loss(logps, logps, BETA)
    check_at_reference(losses, math.lgamma(k + 1))


# ---------------------------------------------------------------- Plackett–Luce: −log P(y_1 > … > y_K), worths exp(r)

PLACKETT_LUCE_BY_HAND = [
    # rewards, loss
    ((0, 0, 0), 1.791759),  # all 3! orders are equally likely: log 6
    ((0.693147, 0, 0), 1.386294),  # worths 2, 1, 1: −log(2/4 · 1/2) = log 4
    ((0, 0, 0.693147), 2.484907),  # worths 1, 1, 2: −log(1/4 · 1/3) = log 12
    ((1, 0), 0.313262),  # of two: log(1 + e^−1)
]


def test_plackett_luce_by_hand() -> None:
    for rewards, loss in PLACKETT_LUCE_BY_HAND:
        losses = plackett_luce_loss(row(rewards))
        check_by_hand(losses, loss)


@both_dtypes
def test_plackett_luce_of_two_is_the_pair_form(dtype: torch.dtype) -> None:
    rewards = numbers(100, 2, seed=70, scale=5)
    rewards = rewards.to(dtype).requires_grad_()
    pair_form = dpo_loss(rewards, torch.zeros_like(rewards), 1.0)
    ranking_form = plackett_luce_loss(rewards)
    check_same_form(ranking_form, pair_form, rewards)


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_dpo_is_plackett_luce(k: int, beta: float) -> None:
    logps = log_probs(6, k, seed=3)
    ref_logps = log_probs(6, k, seed=4)
    losses = dpo_loss(logps, ref_logps, beta)

    def exact(logps: Numbers, ref_logps: Numbers) -> Decimal:
        rewards = implicit_rewards(logps, ref_logps, beta)
        return exact_plackett_luce(rewards)

    check_values(losses, exact, logps, ref_logps)


def test_label_smoothing_of_a_ranking_is_refused() -> None:
    logps = log_probs(6, 3, seed=3)
    with pytest.raises(ValueError, match="defined for pairs only"):
        dpo_loss(logps, logps, 0.1, label_smoothing=0.1)


def test_plackett_luce_sums_to_one_over_all_orders() -> None:
    (logps,) = log_probs(1, 4, seed=5)
    (ref_logps,) = log_probs(1, 4, seed=6)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    losses = dpo_loss(logps[orders], ref_logps[orders], 0.3)
    probabilities = (-losses).exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 4e-3), (torch.float64, 1e-6)])
def test_dpo_extreme_ranking(dtype: torch.dtype, tolerance: float) -> None:
    """In float32, to the rounding of a reward of 3e4."""
    zeros = torch.zeros(1, 4, dtype=dtype)
    right = falling(dtype)
    losses = dpo_loss(right, zeros, 1.0)
    check_extreme(losses, right, 0, (0, 0, 0, 0))
    wrong = rising(dtype)
    losses = dpo_loss(wrong, zeros, 1.0)
    check_extreme(losses, wrong, 6e4, (-1, -1, -1, 3), tolerance)


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_dpo_of_a_ranking_at_the_reference(k: int) -> None:
    """log K!, and of rank k = 0, 1, … the slope −β (1 − Σ_{i ≤ k} 1 / (K − i))."""
    logps = log_probs(5, k, seed=14).requires_grad_()
    losses = dpo_loss(logps, logps.detach(), 0.1)
    orders = math.factorial(k)
    check_close(losses, torch.full_like(losses, math.log(orders)))

    expected = []
    probability_sum = 0.0
    for rank in range(k):
        probability_sum += 1 / (k - rank)
        expected.append(-0.1 * (1 - probability_sum))
    gradient = slopes(losses, logps)
    check_close(gradient, row(expected).expand(5, k))


# ---------------------------------------------------------------- IPO: (h − 1/(2τ))²

IPO_BY_HAND = [
    # logps, ref_logps, tau, loss
    ((-1, -3), (-2, -2), 0.25, 0.0),  # h = 2 = 1 / (2 · 0.25)
    ((-1, -3), (-2, -2), 0.5, 1.0),  # (2 − 1)²
    ((-3, -1), (-2, -2), 0.5, 9.0),  # (−2 − 1)²
    ((-5, -9), (-5, -9), 0.1, 25.0),  # at the reference: 1 / (4 τ²)
]


def test_ipo_by_hand() -> None:
    for logps, ref_logps, tau, loss in IPO_BY_HAND:
        losses = ipo_loss(row(logps), row(ref_logps), tau)
        check_by_hand(losses, loss)


def test_ipo_values() -> None:
    logps = policy(2)
    ref_logps = reference(2)
    losses = ipo_loss(logps, ref_logps, TAU)
    check_values(losses, exact_ipo, logps, ref_logps)


def test_ipo_gradient() -> None:
    check_gradient(ipo_loss, policy(2), reference(2), TAU)


def test_ipo_at_the_reference() -> None:
    logps = reference(2).float()
    losses = ipo_loss(logps, logps, TAU)
    check_at_reference(losses, 1 / (4 * TAU**2))


@both_dtypes
def test_ipo_extremes(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1, 2, dtype=dtype)
    right = pair(1e4, dtype)
    losses = ipo_loss(right, zeros, 0.5)
    check_extreme(losses, right, 9999**2, (2 * 9999, -2 * 9999))
    wrong = pair(-1e4, dtype)
    losses = ipo_loss(wrong, zeros, 0.5)
    check_extreme(losses, wrong, 10001**2, (-2 * 10001, 2 * 10001))


# ---------------------------------------------------------------- EXO: KL(q ‖ p), and DPO-rw: −Σ p log q

EXO_BY_HAND = [
    # logps, ref_logps, p, beta, KL(q ‖ p), −Σ p log q
    ((-5, -9), (-5, -9), (0.5, 0.5), 1.0, 0.0, 0.693147),  # at the reference q = (1/2, 1/2): 0; log 2
    ((-5, -9), (-5, -9), (0.8, 0.2), 1.0, 0.223144, 0.693147),  # 1/2 log(1/2 / 0.8) + 1/2 log(1/2 / 0.2); log 2
    ((0.693147, 0), (0, 0), (0.8, 0.2), 2.0, 0.0, 0.500402),  # β h = log 4, q = (0.8, 0.2) = p: 0; the entropy of p
    ((0.693147, 0), (0, 0), (0.5, 0.5), 2.0, 0.192745, 0.916291),  # 0.8 log 1.6 + 0.2 log 0.4; −(log 0.8 + log 0.2) / 2
]


def test_exo_by_hand() -> None:
    for logps, ref_logps, p, beta, reverse, forward in EXO_BY_HAND:
        log_p = row(p).log()
        losses = exo_loss(row(logps), row(ref_logps), log_p, beta)
        check_by_hand(losses, reverse)
        losses = dpo_rw_loss(row(logps), row(ref_logps), log_p, beta)
        check_by_hand(losses, forward)


@group_sizes
def test_exo_values(k: int) -> None:
    logps = policy(k)
    ref_logps = reference(k)
    log_p = target(k)
    losses = exo_loss(logps, ref_logps, log_p, BETA)
    check_values(losses, exact_exo, logps, ref_logps, log_p.exp())


@group_sizes
def test_dpo_rw_values(k: int) -> None:
    logps = policy(k)
    ref_logps = reference(k)
    log_p = target(k)
    losses = dpo_rw_loss(logps, ref_logps, log_p, BETA)
    check_values(losses, exact_dpo_rw, logps, ref_logps, log_p.exp())


@both_divergences
@group_sizes
def test_exo_gradient(loss: LossFunction, k: int) -> None:
    check_gradient(loss, policy(k), reference(k), target(k), BETA)


@both_divergences
@group_sizes
def test_exo_ignores_what_depends_on_the_prompt_alone(loss: LossFunction, k: int) -> None:
    """Logs of a constant in π_θ or π_ref cancel in the softmax."""
    logps = log_probs(B, k, seed=52)
    ref_logps = reference(k)
    log_p = target(k)
    shift = numbers(B, 1, seed=53, scale=20)
    losses = loss(logps, ref_logps, log_p, BETA)
    shifted_reference = loss(logps, ref_logps + shift, log_p, BETA)
    check_close(shifted_reference, losses)
    both_shifted = loss(logps + shift, ref_logps + shift, log_p, BETA)
    check_close(both_shifted, losses)


@both_divergences
@group_sizes
def test_exo_has_no_special_completion(loss: LossFunction, k: int) -> None:
    """The loss changes with the completions' targets, but not with their order."""
    logps = log_probs(B, k, seed=52)
    ref_logps = reference(k)
    log_p = target(k)
    losses = loss(logps, ref_logps, log_p, BETA)
    order = torch.arange(k - 1, -1, -1)
    reordered = loss(logps[:, order], ref_logps[:, order], log_p[:, order], BETA)
    assert_close(reordered, losses, rtol=1e-11, atol=0)
    with_other_targets = loss(logps, ref_logps, log_p.roll(1, 1), BETA)
    assert not torch.allclose(with_other_targets, losses)


def test_reverse_and_forward_divergence_from_the_target() -> None:
    """Both least where q = p: EXO at 0, the cross-entropy at p's entropy; elsewhere they are different numbers."""
    logps = log_probs(B, 4, seed=54)
    ref_logps = reference(4)
    log_p = target(4)
    entropy = -(log_p.exp() * log_p).sum(1)

    best = ref_logps + log_p / BETA
    reverse = exo_loss(best, ref_logps, log_p, BETA)
    forward = dpo_rw_loss(best, ref_logps, log_p, BETA)
    check_close(reverse, torch.zeros_like(reverse))
    assert_close(forward, entropy, rtol=1e-12, atol=0)

    reverse = exo_loss(logps, ref_logps, log_p, BETA)
    forward = dpo_rw_loss(logps, ref_logps, log_p, BETA)
    assert not torch.allclose(reverse, forward - entropy, rtol=0.05)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_exo_pair_optimum(epsilon: float) -> None:
    """β h = log((1−ε)/ε): the value 0 and no slope there, slopes of opposite sign on either side."""
    log_p = row((1 - epsilon, epsilon)).log()
    ref_logps = row((-40, -40))

    def loss_and_slope(h: float) -> tuple[float, float]:
        logps = row((h - 40, -40)).requires_grad_()
        losses = exo_loss(logps, ref_logps, log_p, BETA)
        gradient = slopes(losses, logps)
        return float(losses.detach()), float(gradient[0, 0])

    best = math.log((1 - epsilon) / epsilon) / BETA
    _, slope_below = loss_and_slope(best - 0.5)
    loss_at_best, slope_at_best = loss_and_slope(best)
    _, slope_above = loss_and_slope(best + 0.5)
    assert loss_at_best == pytest.approx(0, abs=1e-12)
    assert slope_below < -1e-6
    assert slope_at_best == pytest.approx(0, abs=1e-12)
    assert slope_above > 1e-6


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_dpo_rw_is_dpo_with_smoothed_labels(epsilon: float) -> None:
    logps = log_probs(B, 2, seed=55)
    ref_logps = reference(2)
    p = row((1 - epsilon, epsilon)).clamp_min(1e-300)
    log_p = p.log().expand(B, 2)
    losses = dpo_rw_loss(logps, ref_logps, log_p, BETA)
    smoothed = dpo_loss(logps, ref_logps, BETA, label_smoothing=epsilon)
    check_close(losses, smoothed)


@group_sizes
def test_exo_at_the_reference(k: int) -> None:
    """q is uniform: −log K − the mean of log p, and log K."""
    logps = reference(k).float()
    log_p = target(k)
    reverse = exo_loss(logps, logps, log_p.float(), BETA)
    check_at_reference(reverse, -math.log(k) - log_p.mean(1))
    forward = dpo_rw_loss(logps, logps, log_p.float(), BETA)
    check_at_reference(forward, math.log(k))


def test_exo_of_a_pair_at_the_reference() -> None:
    """At the default ε."""
    logps = reference(2).float()
    log_p = row((0.999, 0.001)).log().float()
    losses = exo_loss(logps, logps, log_p.expand(B, 2), BETA)
    mean_log_p = (math.log(0.999) + math.log(0.001)) / 2
    check_at_reference(losses, -math.log(2) - mean_log_p)


@both_dtypes
def test_exo_extremes(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1, 2, dtype=dtype)
    log_p = row((0.999, 0.001)).log().to(dtype)
    right = pair(1e4, dtype)
    losses = exo_loss(right, zeros, log_p, 1.0)
    check_extreme(losses, right, -math.log(0.999), (0, 0))
    wrong = pair(-1e4, dtype)
    losses = exo_loss(wrong, zeros, log_p, 1.0)
    check_extreme(losses, wrong, -math.log(0.001), (0, 0))


@both_dtypes
def test_dpo_rw_extremes(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1, 2, dtype=dtype)
    log_p = row((0.999, 0.001)).log().to(dtype)
    right = pair(1e4, dtype)
    losses = dpo_rw_loss(right, zeros, log_p, 1.0)
    check_extreme(losses, right, 10, (0.001, -0.001), rel=1e-4)
    wrong = pair(-1e4, dtype)
    losses = dpo_rw_loss(wrong, zeros, log_p, 1.0)
    check_extreme(losses, wrong, 9990, (-0.999, 0.999), rel=1e-4)


@both_dtypes
@both_divergences
def test_exo_extreme_groups_of_four(loss: LossFunction, dtype: torch.dtype) -> None:
    """Rewards of 3e4, and a target that is one completion to every digit."""
    zeros = torch.zeros(1, 4, dtype=dtype)
    log_p = torch.tensor([[0.0, -1e4, -2e4, -3e4]], dtype=dtype)
    right = falling(dtype)
    losses = loss(right, zeros, log_p, 1.0)
    check_extreme_group(losses, right, 0.0)
    wrong = rising(dtype)
    losses = loss(wrong, zeros, log_p, 1.0)
    check_extreme_group(losses, wrong, 3e4)


# ---------------------------------------------------------------- TYPO: log(1 + π(l) / π(w)) − λ mean log π(samples)

TYPO_BY_HAND = [
    # logps, sample_logps, lam, loss
    ((-1, -3), (-4, -6), 0.0, 0.126928),  # log(1 + e^−2)
    ((-3, -1), (-4, -6), 0.0, 2.126928),  # log(1 + e²)
    ((-2, -2), (-4, -6), 0.1, 1.193147),  # log 2 + 0.1 · 5
    ((-2, -2), (-4,), 0.5, 2.693147),  # log 2 + 0.5 · 4
]


def test_typo_by_hand() -> None:
    for logps, sample_logps, lam, loss in TYPO_BY_HAND:
        losses = typo_loss(row(logps), row(sample_logps), lam)
        check_by_hand(losses, loss)


@sample_numbers
def test_typo_values(num_samples: int) -> None:
    logps = policy(2)
    sample_logps = log_probs(B, num_samples, seed=42)
    losses = typo_loss(logps, sample_logps, LAM)
    check_values(losses, exact_typo, logps, sample_logps)


@sample_numbers
def test_typo_gradient(num_samples: int) -> None:
    sample_logps = log_probs(B, num_samples, seed=42)
    sample_logps.requires_grad_()
    check_gradient(typo_loss, policy(2), sample_logps, LAM)


def test_typo_without_its_second_term_is_dpo_without_a_reference() -> None:
    """λ = 0 leaves the supervised term alone; the second term is linear in λ."""
    logps = log_probs(B, 2, seed=58)
    sample_logps = log_probs(B, M, seed=59)
    supervised = typo_loss(logps, sample_logps, 0.0)
    check_close(supervised, dpo_loss(logps, torch.zeros_like(logps), 1.0))
    losses = typo_loss(logps, sample_logps, 0.7)
    check_close(losses - supervised, -0.7 * sample_logps.mean(1))


def test_typo_without_its_second_term_has_no_gradient_on_samples() -> None:
    sample_logps = log_probs(B, M, seed=59).requires_grad_()
    losses = typo_loss(policy(2), sample_logps, 0.0)
    gradient = slopes(losses, sample_logps)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@both_dtypes
def test_typo_extremes(dtype: torch.dtype) -> None:
    sample_logps = torch.zeros(1, 1, dtype=dtype)
    right = pair(1e4, dtype)
    losses = typo_loss(right, sample_logps, 1.0)
    check_extreme(losses, right, 0, (0, 0))
    wrong = pair(-1e4, dtype)
    losses = typo_loss(wrong, sample_logps, 1.0)
    check_extreme(losses, wrong, 1e4, (-1, 1))


# ---------------------------------------------------------------- distillation: (r_1 − r_2 − β h)²

DISTILL_BY_HAND = [
    # logps, ref_logps, rewards, beta, loss
    ((-1, -3), (-2, -2), (3, 1), 1.0, 0.0),  # r_1 − r_2 = 2 = β h
    ((-1, -3), (-2, -2), (1, 3), 1.0, 16.0),  # (−2 − 2)²
    ((-1, -3), (-2, -2), (7, 7), 0.5, 1.0),  # (0 − 1)²
    ((-5, -9), (-5, -9), (3, 1), 0.5, 4.0),  # at the reference: (r_1 − r_2)²
]


def test_distill_by_hand() -> None:
    for logps, ref_logps, rewards, beta, loss in DISTILL_BY_HAND:
        losses = distill_loss(row(logps), row(ref_logps), row(rewards), beta)
        check_by_hand(losses, loss)


def test_distill_values() -> None:
    logps = policy(2)
    ref_logps = reference(2)
    rewards = reward_scores()
    losses = distill_loss(logps, ref_logps, rewards, BETA)
    check_values(losses, exact_distill, logps, ref_logps, rewards)


def test_distill_gradient() -> None:
    check_gradient(distill_loss, policy(2), reference(2), reward_scores(), BETA)


def test_distill_does_not_see_the_order_of_a_pair_nor_rewards_of_the_prompt() -> None:
    logps = log_probs(B, 2, seed=50)
    ref_logps = reference(2)
    rewards = reward_scores()
    losses = distill_loss(logps, ref_logps, rewards, BETA)
    swapped_logps = logps.flip(1)
    swapped = distill_loss(swapped_logps, ref_logps.flip(1), rewards.flip(1), BETA)
    check_close(swapped, losses)
    half_swapped = distill_loss(swapped_logps, ref_logps, rewards, BETA)
    assert not torch.allclose(half_swapped, losses)

    shift = numbers(B, 1, seed=51, scale=10)
    shifted = distill_loss(logps, ref_logps, rewards + shift, BETA)
    check_close(shifted, losses)


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_distill_of_unit_rewards_is_ipo(beta: float) -> None:
    """(1 − β h)² = β² (h − 1/β)²: IPO at τ = β/2."""
    logps = log_probs(B, 2, seed=56)
    ref_logps = reference(2)
    rewards = numbers(B, 1, seed=57) + row((1, 0))
    losses = distill_loss(logps, ref_logps, rewards, beta)
    ipo_losses = ipo_loss(logps, ref_logps, beta / 2)
    check_close(losses, beta**2 * ipo_losses)


def test_distill_at_the_reference() -> None:
    logps = reference(2).float()
    rewards = reward_scores()
    losses = distill_loss(logps, logps, rewards.float(), BETA)
    gaps = rewards[:, 0] - rewards[:, 1]
    check_at_reference(losses, gaps.square())


@both_dtypes
def test_distill_extremes(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1, 2, dtype=dtype)
    right = pair(1e4, dtype)
    losses = distill_loss(right, zeros, zeros, 1.0)
    check_extreme(losses, right, 1e8, (2e4, -2e4))
    wrong = pair(-1e4, dtype)
    losses = distill_loss(wrong, zeros, zeros, 1.0)
    check_extreme(losses, wrong, 1e8, (-2e4, 2e4))


# ---------------------------------------------------------------- pessimism: + γ Ω, Ω = −Σ log π

PESSIMISTIC_BY_HAND = [
    # loss without Ω, logps, gamma, loss
    (1.0, (-2, -3), 0.1, 1.5),  # 1 + 0.1 · (2 + 3)
    (1.0, (-5,), 0.1, 1.5),  # the mean over samples: 1 + 0.1 · 5
    (1.0, (-2, -3), 0.0, 1.0),
]


def test_pessimistic_by_hand() -> None:
    for base_loss, logps, gamma, loss in PESSIMISTIC_BY_HAND:
        base_losses = torch.tensor([base_loss])
        losses = pessimistic_loss(base_losses, row(logps), gamma)
        check_by_hand(losses, loss)


def p_dpo_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """DPO with Ω over the pair."""
    losses = dpo_loss(logps, ref_logps, BETA)
    return pessimistic_loss(losses, logps, GAMMA)


def pd_dpo_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, sample_logps: Tensor) -> Tensor:
    """Distillation with Ω over a sample."""
    losses = distill_loss(logps, ref_logps, rewards, BETA)
    return pessimistic_loss(losses, sample_logps, GAMMA)


def test_p_dpo_values() -> None:
    logps = policy(2)
    ref_logps = reference(2)
    losses = p_dpo_loss(logps, ref_logps)
    check_values(losses, exact_p_dpo, logps, ref_logps)


def test_pd_dpo_values() -> None:
    logps = policy(2)
    ref_logps = reference(2)
    rewards = reward_scores()
    sample_logps = log_probs(B, 1, seed=41)
    losses = pd_dpo_loss(logps, ref_logps, rewards, sample_logps)
    check_values(losses, exact_pd_dpo, logps, ref_logps, rewards, sample_logps)


def test_p_dpo_gradient() -> None:
    check_gradient(p_dpo_loss, policy(2), reference(2))


def test_pd_dpo_gradient() -> None:
    sample_logps = log_probs(B, 1, seed=41)
    sample_logps.requires_grad_()
    check_gradient(pd_dpo_loss, policy(2), reference(2), reward_scores(), sample_logps)


@pytest.mark.parametrize("columns", [1, 2])
def test_pessimistic_adds_the_negative_log_likelihood(columns: int) -> None:
    """One column at half the mean of two gives half the penalty."""
    base_losses = numbers(B, seed=62)
    logps = log_probs(B, columns, seed=63)
    expected = base_losses.clone()
    for column in logps.unbind(1):
        expected -= GAMMA * column
    losses = pessimistic_loss(base_losses, logps, GAMMA)
    assert_close(losses, expected, rtol=1e-12, atol=0)
    assert torch.equal(pessimistic_loss(base_losses, logps, 0.0), base_losses)


def test_pessimistic_optimum_of_the_rejected_completion() -> None:
    """At fixed π_θ(y_w), β h* = log(β/γ − 1) (Fisch et al., Proposition 3, with α = β/γ)."""
    h = math.log(BETA / GAMMA - 1) / BETA
    logps = row((-19, -19 - h)).requires_grad_()
    losses = p_dpo_loss(logps, row((-20, -20)))
    _, slope = slopes(losses, logps)[0].tolist()
    assert abs(slope) < 1e-12


# ---------------------------------------------------------------- ensembles: the distillation loss of each reward model


def test_ensemble_by_hand() -> None:
    """r_1 − r_2 is 2, −2 and 0 of three reward models, β h is 2: (2 − 2)², (−2 − 2)², (0 − 2)²."""
    logps = row((-1, -3))
    ref_logps = row((-2, -2))
    rewards = torch.tensor([[[3, 1, 0], [1, 3, 0]]])
    losses = ensemble_losses(logps, ref_logps, rewards, 1.0)
    assert losses.tolist() == [[0, 16, 4]]


def test_ensemble_values() -> None:
    logps = policy(2)
    ref_logps = reference(2)
    losses = ensemble_losses(logps, ref_logps, ensemble_scores(), BETA)
    assert losses.shape == (B, M)
    for m, rewards in enumerate(ensemble_scores().unbind(2)):
        check_values(losses[:, m], exact_distill, logps, ref_logps, rewards)


def test_ensemble_gradient() -> None:
    check_gradient(ensemble_losses, policy(2), reference(2), ensemble_scores(), BETA)


def test_ensemble_is_one_distillation_per_reward_model() -> None:
    logps = log_probs(B, 2, seed=64)
    ref_logps = reference(2)
    losses = ensemble_losses(logps, ref_logps, ensemble_scores(), BETA)
    for m, rewards in enumerate(ensemble_scores().unbind(2)):
        expected = distill_loss(logps, ref_logps, rewards, BETA)
        assert_close(losses[:, m], expected, rtol=1e-12, atol=0)


def test_ensemble_at_the_reference() -> None:
    logps = reference(2).float()
    rewards = ensemble_scores()
    losses = ensemble_losses(logps, logps, rewards.float(), BETA)
    gaps = rewards[:, 0] - rewards[:, 1]
    check_at_reference(losses, gaps.square())


@both_dtypes
def test_ensemble_extremes(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1, 2, dtype=dtype)
    rewards = torch.zeros(1, 2, 1, dtype=dtype)
    right = pair(1e4, dtype)
    losses = ensemble_losses(right, zeros, rewards, 1.0)
    check_extreme(losses, right, 1e8, (2e4, -2e4))
    wrong = pair(-1e4, dtype)
    losses = ensemble_losses(wrong, zeros, rewards, 1.0)
    check_extreme(losses, wrong, 1e8, (-2e4, 2e4))


# ---------------------------------------------------------------- reward model: −log P(y_1 > … > y_K), worths exp(r)

RM_BY_HAND = [
    # rewards, loss
    ((1, 0), 0.313262),  # log(1 + e^−1)
    ((5, 6), 1.313262),  # log(1 + e)
    ((0, 0, 0), 1.791759),  # log 3!
    ((0.693147, 0, 0), 1.386294),  # worths 2, 1, 1: −log(2/4 · 1/2)
]


def test_rm_by_hand() -> None:
    for rewards, loss in RM_BY_HAND:
        losses = rm_loss(row(rewards))
        check_by_hand(losses, loss)


@group_sizes
def test_rm_values(k: int) -> None:
    rewards = numbers(B, k, seed=40, scale=3)
    losses = rm_loss(rewards)
    check_values(losses, exact_plackett_luce, rewards)


@group_sizes
def test_rm_gradient(k: int) -> None:
    rewards = numbers(B, k, seed=40, scale=3)
    check_gradient(rm_loss, rewards)


@pytest.mark.parametrize("h", [-3.0, 0.0, 0.2, 9.0])
def test_rm_of_a_pair_is_bradley_terry(h: float) -> None:
    chosen = 5 + h
    losses = rm_loss(row((chosen, 5)))
    expected = exact_bradley_terry(Decimal(chosen) - 5)
    assert losses.tolist() == pytest.approx([float(expected)], rel=1e-12)


@both_dtypes
def test_rm_of_a_pair_is_dpo_of_implicit_rewards(dtype: torch.dtype) -> None:
    rewards = numbers(100, 2, seed=71, scale=5)
    rewards = rewards.to(dtype).requires_grad_()
    losses = rm_loss(rewards)
    pair_form = dpo_loss(rewards, torch.zeros_like(rewards), 1.0)
    check_same_form(losses, pair_form, rewards)


@group_sizes
def test_rm_ranks_rewards_as_dpo_ranks_implicit_ones(k: int) -> None:
    logps = log_probs(B, k, seed=60)
    ref_logps = reference(k)
    losses = rm_loss(BETA * (logps - ref_logps))
    check_close(losses, dpo_loss(logps, ref_logps, BETA))

    rewards = numbers(B, k, seed=61)
    check_close(rm_loss(rewards + 7), rm_loss(rewards))
    assert torch.equal(rm_loss(rewards), plackett_luce_loss(rewards))


@group_sizes
def test_rm_of_equal_rewards(k: int) -> None:
    losses = rm_loss(torch.full((B, k), 0.4))
    check_at_reference(losses, math.lgamma(k + 1))


@both_dtypes
def test_rm_extremes(dtype: torch.dtype) -> None:
    right = pair(1e4, dtype)
    check_extreme(rm_loss(right), right, 0, (0, 0))
    wrong = pair(-1e4, dtype)
    check_extreme(rm_loss(wrong), wrong, 1e4, (-1, 1))


@both_dtypes
def test_rm_extreme_groups_of_four(dtype: torch.dtype) -> None:
    right = falling(dtype)
    check_extreme_group(rm_loss(right), right, 0.0)
    wrong = rising(dtype)
    check_extreme_group(rm_loss(wrong), wrong, 6e4)
