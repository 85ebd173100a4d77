"""Token-level DPO: rewards, loss, Theorem 1 by enumeration, beam search, proxy tuning, and the program itself."""

import copy
import itertools
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from settings import BETA, OPTIONS, PREFERENCE_METRICS, TOKEN_METRICS
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from algos.dpo import dpo_loss
from algos.token_dpo_beam import (
    beam_search,
    beam_searches,
    proxy_logps,
    token_dpo_loss,
    token_rewards,
)
from scripts.lab.tree_mdp import TreeMDP
from shared import NonFinite
from shared.batches import Batches
from shared.distributed import single_process
from shared.groups import Requires, load_groups
from shared.loading import load_policy_from
from shared.logprobs import sum_over_completions
from shared.reference import add_reference_logps

SCRIPT = "algos/token_dpo_beam.py"
MAX_LENGTH = 512


def double(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Random float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that often ends, another one, pairs and held-out pairs."""
    path = tmp_path_factory.mktemp("token_dpo")
    tiny.make_model(path / "model", "llama", seed=3)
    tiny.make_model(path / "other", "llama", seed=8)
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    model.lm_head.weight.data[model.config.eos_token_id] *= 2.5
    model.save_pretrained(path / "model")

    tiny.make_rows(12, seed=12, path=path / "pairs.jsonl")
    tiny.make_rows(10, seed=13, prompt_words=(1, 30), path=path / "held_out.jsonl")
    return path


# ---------------------------------------------------------------- rewards and loss

TOKEN_DPO_BY_HAND = [
    # rewards of the tokens, numbers of tokens of the two completions, loss
    ((1, 2, 1, 1), (2, 2), 0.313262),  # 3 − 2 = 1: log(1 + e^−1)
    ((1, 2, 1, 1), (1, 3), 3.048587),  # 1 − 4 = −3: log(1 + e³)
    ((5, 2, 2, 1), (1, 3), 0.693147),  # 5 − 5 = 0: log 2
]


def test_the_loss_by_hand() -> None:
    for rewards, lengths, loss in TOKEN_DPO_BY_HAND:
        rewards = torch.tensor(rewards, dtype=torch.float64)
        losses = token_dpo_loss(rewards, torch.tensor([lengths]))
        assert losses.tolist() == [pytest.approx(loss, abs=1e-6)]


def test_token_rewards_sum_to_the_log_ratio(folder: Path) -> None:
    """Packed rows of a policy and of another reference, against stock models in float64: token by token and summed."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    groups = load_groups(str(folder / "pairs.jsonl"), tokenizer, Requires("pair"), MAX_LENGTH, None)
    expected = stock_rewards(folder, tokenizer)
    seen = []
    with single_process("float32") as ranks, torch.no_grad():
        model = load_policy_from(str(folder / "model"), ranks)
        batches = Batches(groups, 12, 400, 1, ranks)
        add_reference_logps(str(folder / "other"), model, batches, None, per_token=True)
        all_batches = list(batches.all_batches())
        assert len(all_batches) > 2
        for batch in all_batches:
            group_index = batch.group_index.tolist()
            expected_of_batch = [rewards for i in group_index for rewards in expected[i]]
            expected_rewards = torch.cat(expected_of_batch)
            expected_sums = torch.stack([rewards.sum() for rewards in expected_of_batch])

            rewards = token_rewards(model(batch), batch.ref_token_logps, BETA)
            assert_close(rewards.double(), expected_rewards, rtol=0, atol=1e-5)
            sums = sum_over_completions(rewards, batch.lengths).double()
            assert_close(sums.flatten(), expected_sums, rtol=1e-6, atol=1e-5)
            seen += group_index
    assert sorted(seen) == list(range(12))


def stock_rewards(folder: Path, tokenizer: Any) -> list[list[Tensor]]:
    """β log π_θ / π_ref of the tokens of each completion of each row, in float64; each has its EOS."""
    policy = reference.load_model(folder / "model")
    other = reference.load_model(folder / "other")
    rewards_of_rows = []
    for row in tiny.read_jsonl(folder / "pairs.jsonl"):
        group = reference.encode(tokenizer, row)
        rewards = []
        for completion in group.completions:
            assert completion[-1] == tokenizer.eos_token_id
            logps = reference.token_logps(policy, group.prompt, completion)
            ref_logps = reference.token_logps(other, group.prompt, completion)
            rewards.append(BETA * (logps - ref_logps))
        rewards_of_rows.append(rewards)
    return rewards_of_rows


LENGTHS = [
    # tokens of the two completions
    (1, 1),
    (1, 300),
    (300, 1),
    (17, 4),
    (2, 90),
    (64, 64),
    (33, 250),
]


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_the_loss_and_its_gradient_are_those_of_dpo(beta: float) -> None:
    """Completions of 1 to 300 tokens; the gradient of every token is that of its completion's sum."""
    lengths = torch.tensor(LENGTHS)
    num_tokens = int(lengths.sum())
    logps = double(num_tokens, seed=1, scale=0.7).requires_grad_()
    ref_logps = double(num_tokens, seed=2, scale=0.7)

    def sums(values: Tensor) -> Tensor:
        completions = values.split(lengths.flatten().tolist())
        totals = [completion.sum() for completion in completions]
        return torch.stack(totals).view(-1, 2)

    rewards = token_rewards(logps, ref_logps, beta)
    losses = token_dpo_loss(rewards, lengths)
    expected = dpo_loss(sums(logps), sums(ref_logps), beta)
    assert losses.shape == (7,)
    assert expected.dtype == torch.float64
    assert_close(losses.double(), expected, rtol=2e-6, atol=1e-12)

    weights = torch.linspace(0.5, 1.5, 7)
    value = (weights * losses).sum()
    (gradient,) = torch.autograd.grad(value, logps)
    expected_value = (weights * expected).sum()
    (expected_gradient,) = torch.autograd.grad(expected_value, logps)
    assert expected_gradient.abs().max() > 0.1 * beta
    assert_close(gradient, expected_gradient, rtol=2e-6, atol=1e-12)


# ---------------------------------------------------------------- Theorem 1

TREE = TreeMDP(num_tokens=3, horizon=4, eos=2)
SCALE = 0.7  # β


def preferences(rewards: Tensor) -> Tensor:
    """Eq 1, P(τ_i ≻ τ_j) (paths, paths)."""
    worths = by_hand(rewards).exp()
    return worths[:, None] / (worths[:, None] + worths)


def losses_of_all_pairs(logps: Tensor, ref: Tensor) -> Tensor:
    """What the code under test makes of all ordered pairs of paths, (paths, paths)."""
    paths = []
    for pair in itertools.product(TREE.paths, repeat=2):
        paths += pair
    ref_logps = TREE.along(ref, *paths)
    rewards = token_rewards(TREE.along(logps, *paths), ref_logps, SCALE)
    lengths = torch.tensor([len(path) for path in paths])
    losses = token_dpo_loss(rewards, lengths.view(-1, 2))
    return losses.view(len(TREE.paths), -1)


def by_hand(table: Tensor) -> Tensor:
    """The sum of a table along each trajectory, (trajectories,)."""
    return torch.stack([TREE.along(table, path).sum() for path in TREE.paths])


@pytest.fixture(scope="module")
def rewards() -> Tensor:
    """Random dense rewards (states, actions)."""
    return double(*TREE.shape, seed=1)


@pytest.fixture(scope="module")
def ref() -> Tensor:
    """A random log π_ref (states, actions)."""
    return double(*TREE.shape, seed=2).log_softmax(1)


def test_soft_bellman_backups_solve_the_kl_regularised_problem(rewards: Tensor, ref: Tensor) -> None:
    """π*(τ) ∝ π_ref(τ) exp(r(τ) / β) over all trajectories, with V*(s_0) as its normaliser; Eqs 12 and 13."""
    assert len(TREE.states) == 15
    assert len(TREE.paths) == 31
    _, v, best = TREE.solve(rewards, ref, SCALE)
    sums = best.exp().sum(1)
    assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)

    log_worths = by_hand(ref + rewards / SCALE)
    assert_close(by_hand(best), log_worths.log_softmax(0), rtol=0, atol=1e-12)
    assert_close(SCALE * log_worths.logsumexp(0), v[0], rtol=0, atol=1e-12)

    objectives = rewards + SCALE * ref
    for state, value in zip(TREE.states[1:], v[1:], strict=True):  # a partial expansion: V*(s_0) has a plus
        objective = TREE.along(objectives, state).sum() + value
        log_probability = TREE.along(best, state).sum()
        assert_close(objective, v[0] + SCALE * log_probability, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed, scale", [(3, 1.0), (4, 10.0)])
def test_shaped_rewards_share_policy_and_preferences(rewards: Tensor, ref: Tensor, seed: int, scale: float) -> None:
    """Half of Theorem 1."""
    best = TREE.solve(rewards, ref, SCALE)
    potential = double(len(TREE.states), seed=seed, scale=scale)
    shaped = TREE.shaped(rewards, potential)
    assert (shaped - rewards).abs().max() > 1
    best_of_shaped = TREE.solve(shaped, ref, SCALE)
    assert_close(best_of_shaped.logps, best.logps, rtol=0, atol=1e-11)
    assert_close(preferences(shaped), preferences(rewards), rtol=0, atol=1e-11)


def test_theorem_1(rewards: Tensor, ref: Tensor) -> None:
    """β log π*/π_ref is a shaped reward, and has the preferences' log-loss."""
    _, v, best = TREE.solve(rewards, ref, SCALE)
    wanted = preferences(rewards)
    implicit = token_rewards(best, ref, SCALE)  # Eq 11
    assert_close(implicit, TREE.shaped(rewards, v), rtol=0, atol=1e-12)  # Eq 10
    assert_close(preferences(implicit), wanted, rtol=0, atol=1e-12)  # Eq 8
    losses = losses_of_all_pairs(best, ref)
    assert_close(losses.double(), -wanted.log(), rtol=1e-6, atol=1e-7)

    probabilities = ref.exp()
    divergence = (probabilities * (ref - best)).sum(1)
    expected_reward = (probabilities * implicit).sum(1)
    assert_close(expected_reward, -SCALE * divergence, rtol=0, atol=1e-12)  # Eq 16


def test_the_expected_loss_is_least_at_the_optimal_policy(rewards: Tensor, ref: Tensor) -> None:
    """Tabular logits from π_ref to convergence under the preferences of the rewards: π*, token by token."""
    best = TREE.solve(rewards, ref, SCALE).logps
    probabilities = preferences(rewards)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = losses_of_all_pairs(logits.log_softmax(1), ref)
        expected_loss = (probabilities * losses).mean()
        expected_loss.backward()
        return expected_loss

    optimizer.step(closure)
    assert (ref - best).abs().max() > 0.5
    trained = logits.detach().log_softmax(1)
    assert_close(trained, best, rtol=0, atol=2e-4)  # float32 sums


# ---------------------------------------------------------------- beam search

EOS = 3
State = tuple[int, ...]
Beams = list[tuple[list[int], float]]  # ids and log π of completions


def make_lm(architecture: str, vocab: int, eos_bias: float = 0.0) -> Any:
    """A tiny language model whose head has a bias: `eos_bias` for the token EOS, and 0."""
    torch.manual_seed(0)
    config = tiny.make_config(architecture, vocab, bos_token_id=0, eos_token_id=EOS)
    model = AutoModelForCausalLM.from_config(config).eval()
    weight = model.lm_head.weight.detach().clone()
    bias = torch.zeros(vocab)
    bias[EOS] = eos_bias
    head = nn.Linear(weight.shape[1], vocab)
    head.weight.data = weight
    head.bias.data = bias
    model.lm_head = head
    return model


def make_constant_lm(vocab: int, logits: dict[int, float]) -> Any:
    """A Llama whose logits are `logits`, else 0, whatever it reads."""
    model = make_lm("llama", vocab)
    model.lm_head.weight.data.zero_()
    for token, logit in logits.items():
        model.lm_head.bias.data[token] = logit
    return model


def make_prompts(n: int, vocab: int, longest: int = 20) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens."""
    rng = random.Random(0)
    prompts = []
    for _ in range(n):
        length = rng.randint(1, longest)
        prompts.append(rng.choices(range(vocab), k=length))
    return prompts


def completions_of(beams: Beams) -> list[list[int]]:
    """The ids of the completions."""
    return [completion for completion, _ in beams]


def logps_of(beams: Beams) -> list[float]:
    """The log π of the completions."""
    return [logp for _, logp in beams]


def brute_force(model: nn.Module, prompt: list[int], vocab: int, longest: int) -> dict[State, float]:
    """log π of every completion, by stock forward passes in float64 without a cache."""
    model = copy.deepcopy(model).double()
    logps = {}
    for length in range(1, longest + 1):
        completions = []
        for completion in itertools.product(range(vocab), repeat=length):
            is_complete = completion[-1] == EOS or length == longest
            if is_complete and EOS not in completion[:-1]:
                completions.append(completion)

        sequences = torch.tensor([[*prompt, *completion] for completion in completions])
        with torch.no_grad():
            logits = model(sequences, use_cache=False).logits
        predicted = logits[:, len(prompt) - 1 : -1].log_softmax(2)
        token_logps = predicted.gather(2, torch.tensor(completions)[..., None])
        sums = token_logps.sum((1, 2)).tolist()
        logps |= dict(zip(completions, sums, strict=True))
    return logps


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_beam_as_wide_as_all_sequences_finds_them_all_in_order(architecture: str, length_penalty: float) -> None:
    """1093 completions of at most 6 tokens of a vocabulary of 4; narrower beams find some, at times not the best."""
    model = make_lm(architecture, 4, eos_bias=-0.5)
    missed = 0
    for prompt in make_prompts(4, 4, 9):
        logps = brute_force(model, prompt, 4, 6)
        assert len(logps) == 1093
        beams = beam_search(model, torch.tensor([prompt]), 1093, 6, EOS, length_penalty)
        check_logps(beams, logps)
        assert len(beams) == 1093
        assert {tuple(completion) for completion in completions_of(beams)} == set(logps)

        scores = {y: logp / len(y) ** length_penalty for y, logp in logps.items()}
        scores_of_beams = [scores[tuple(completion)] for completion in completions_of(beams)]
        best_first = sorted(scores.values(), reverse=True)
        assert scores_of_beams == pytest.approx(best_first, abs=1e-5)

        for width in (1, 3):
            narrow = beam_search(model, prompt, width, 6, EOS, length_penalty)
            check_logps(narrow, logps)
            assert len(narrow) == width
            missed += completions_of(narrow)[0] != completions_of(beams)[0]
    assert 0 < missed < 8


def check_logps(beams: Beams, logps: dict[State, float]) -> None:
    """The beams' log-probs are those of brute force."""
    expected = [logps[tuple(completion)] for completion in completions_of(beams)]
    assert logps_of(beams) == pytest.approx(expected, abs=1e-5)


def generate(
    model: Any, prompts: list[list[int]], width: int, longest: int, length_penalty: float = 0.0, eos: int = EOS
) -> list[Beams]:
    """transformers' own search over a batch padded on the left: every beam with its log π, or greedy's completion."""
    longest_prompt = max(len(prompt) for prompt in prompts)
    ids = []
    mask = []
    for prompt in prompts:
        padding = [0] * (longest_prompt - len(prompt))
        ids.append(padding + prompt)
        mask.append(padding + [1] * len(prompt))

    options = {"do_sample": False, "max_new_tokens": longest, "eos_token_id": eos, "pad_token_id": eos}
    if width > 1:
        options |= {"num_beams": width, "num_return_sequences": width}
        options |= {"length_penalty": length_penalty, "early_stopping": "never", "output_scores": True}
    output = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), return_dict_in_generate=True, **options
    )

    beams = []
    for i, completion in enumerate(output.sequences[:, longest_prompt:].tolist()):
        if eos in completion:
            completion = completion[: completion.index(eos) + 1]
        logp = math.nan
        if width > 1:
            logp = float(output.sequences_scores[i]) * len(completion) ** length_penalty
        beams.append((completion, logp))
    return [beams[i : i + width] for i in range(0, len(beams), width)]


def check_beams(beams: Beams, expected: Beams) -> None:
    """The same completions in the same order, and equal log-probs but for rounding where they are known."""
    assert completions_of(beams) == completions_of(expected)
    for logp, expected_logp in zip(logps_of(beams), logps_of(expected), strict=True):
        if not math.isnan(expected_logp):
            assert logp == pytest.approx(expected_logp, abs=2e-5)


SEARCHES = [
    # width, length_penalty
    (1, 0.0),
    (2, 0.0),
    (5, 0.0),
    (5, 1.0),
    (7, 0.0),
]


@pytest.mark.parametrize(
    "vocab, eos_bias, endings",
    [
        (40, 1.0, {True, False}),
        (40, -1e4, {False}),
        (5, 0.0, {True, False}),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_beams_are_those_of_transformers(architecture: str, vocab: int, eos_bias: float, endings: set[bool]) -> None:
    """50 prompts of 1 to 20 tokens; the EOS likely, or never; the widest beam is wider than the small vocabulary."""
    model = make_lm(architecture, vocab, eos_bias)
    prompts = make_prompts(50, vocab)
    for width, length_penalty in SEARCHES:
        beams_of_prompts = beam_searches(model, prompts, width, 10, [EOS], length_penalty)
        expected_of_prompts = generate(model, prompts, width, 10, length_penalty)
        seen_endings = set()
        for beams, expected in zip(beams_of_prompts, expected_of_prompts, strict=True):
            check_beams(beams, expected)
            for completion in completions_of(beams):
                assert EOS not in completion[:-1]
                has_eos = completion[-1] == EOS
                assert has_eos or len(completion) == 10
                seen_endings.add(has_eos)
        assert seen_endings == endings


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_several_prompts_at_once_are_as_one_at_a_time(architecture: str) -> None:
    model = make_lm(architecture, 40, eos_bias=3.0)
    prompts = make_prompts(12, 40)
    for width, length_penalty in SEARCHES:
        together = beam_searches(model, prompts, width, 10, [EOS], length_penalty)
        for prompt, beams in zip(prompts, together, strict=True):
            alone = beam_search(model, prompt, width, 10, EOS, length_penalty)
            check_beams(alone, beams)


@pytest.mark.parametrize(
    "width, expected",
    [
        (1, [[0, 0, 0]]),
        (2, [[0, 0, 0], [0, 0, 1]]),
        (5, [[3], [0, 3], [0, 0, 0], [0, 0, 1], [0, 0, 2]]),  # the EOS, 3, is the fourth of five at every step
    ],
)
def test_of_equal_tokens_the_better_beam_and_the_lowest_ids(width: int, expected: list[list[int]]) -> None:
    """All of 1000 tokens equally likely, where topk takes any."""
    model = make_constant_lm(1000, {})
    (beams,) = beam_searches(model, [[7, 8]], width, 3, [EOS])
    assert completions_of(beams) == expected
    for completion, logp in beams:
        assert logp == pytest.approx(-len(completion) * math.log(1000), abs=2e-5)


@pytest.mark.parametrize(
    "width, longest, expected",
    [
        (1, 2, [[17, 17]]),
        (2, 2, [[17, 17], [17, 400]]),
        (4, 1, [[17], [400], [900], [0]]),
    ],
)
def test_of_the_likeliest_tokens_the_lowest_ids(width: int, longest: int, expected: list[list[int]]) -> None:
    """Three of 1000 tokens equally likely, far from each other."""
    model = make_constant_lm(1000, {900: 2.0, 17: 2.0, 400: 2.0})
    beams = beam_search(model, [7], width, longest, EOS)
    assert completions_of(beams) == expected


@pytest.mark.parametrize(
    "logits, eos, width, length_penalty, expected, forward_passes",
    [
        ({3: 50.0}, 3, 1, 0.0, [[3]], 1),  # a model that always ends
        ({3: 50.0}, 3, 3, 0.0, [[3], [0, 3], [1, 3]], 2),
        ({3: 50.0}, 3, 1, 1.0, [[3]], 1),
        ({}, 0, 2, 0.0, [[0], [1, 0]], 2),  # a model that finds all tokens equally likely
    ],
)
def test_the_search_ends_when_nothing_can_overtake(
    logits: dict[int, float],
    eos: int,
    width: int,
    length_penalty: float,
    expected: list[list[int]],
    forward_passes: int,
) -> None:
    """As many forward passes as are needed, though more tokens would be allowed."""
    model = make_constant_lm(6, logits)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    beams = beam_search(model, [1], width, 100, eos, length_penalty)
    assert completions_of(beams) == expected
    assert len(calls) == forward_passes


def test_logits_that_are_not_numbers() -> None:
    model = make_constant_lm(10, {1: math.nan})
    with pytest.raises(NonFinite, match="not numbers"):
        beam_search(model, [4, 5], 2, 3, EOS)


# ---------------------------------------------------------------- proxy tuning


def random_logps(seed: int) -> Tensor:
    """(2, 3, 50) log-probs of three positions of two sequences."""
    logits = double(2, 3, 50, seed=seed, scale=4)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.5])
def test_proxy_tuning(beta: float) -> None:
    """Eq 14 as it stands."""
    base = random_logps(1)
    proxy = random_logps(2)
    ref = random_logps(3)
    ratio = proxy.exp() / ref.exp()
    product = base.exp() * ratio**beta
    expected = product / product.sum(-1, keepdim=True)
    steered = proxy_logps(base, proxy, ref, beta).exp()
    assert_close(steered, expected, rtol=1e-12, atol=1e-15)
    sums = steered.sum(-1)
    assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-14), (torch.float32, 4e-6)])
def test_proxy_tuning_at_its_ends(dtype: torch.dtype, rounding: float) -> None:
    """β = 0 is the base, and β = 1 with the reference as the base the proxy, to rounding."""
    base = random_logps(1).to(dtype)
    proxy = random_logps(2).to(dtype)
    ref = random_logps(3).to(dtype)
    not_steered = proxy_logps(base, proxy, ref, 0.0)
    assert_close(not_steered, base, rtol=0, atol=rounding)
    steered_reference = proxy_logps(ref, proxy, ref, 1.0)
    assert_close(steered_reference, proxy, rtol=0, atol=rounding)
    assert (base - proxy).abs().max() > 1


# ---------------------------------------------------------------- the program


def launch(folder: Path, script: str, name: str, processes: int = 1, **options: object) -> None:
    """One run over this file's rows, into `name`."""
    settings = {
        **OPTIONS,
        "model": folder / "model",
        "train_data": folder / "pairs.jsonl",
        "eval_data": folder / "held_out.jsonl",
        "eval_every": 3,
        "beta": BETA,
    }
    tiny.run(script, folder / name, processes, **{**settings, **options})


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A run of one process."""
    launch(folder, SCRIPT, "alone")
    return folder / "alone"


def check_agreement(output_dir: Path, other_dir: Path, metrics: Iterable[str], tolerance: float) -> None:
    """Metrics of two runs, step by step and at the evaluation: to 1e-6 at step one, to `tolerance` after."""
    start, *lines = tiny.read_jsonl(output_dir / "metrics.jsonl")
    other_start, *others = tiny.read_jsonl(other_dir / "metrics.jsonl")
    assert start["step"] == other_start["step"] == 0
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert [line["step"] for line in others] == [1, 2, 3, 3]
    assert len({line["loss"] for line in lines[:3]}) == 3
    for line, other in zip(lines[:3], others[:3], strict=True):
        rel = tolerance
        if line["step"] == 1:
            rel = 1e-6
        for name in metrics:
            check_metric(line, other, name, rel)
    for name in metrics:
        if name != "grad_norm":
            check_metric(lines[3], others[3], f"eval/{name}", tolerance)


def check_metric(line: dict, other: dict, name: str, rel: float) -> None:
    """One metric; those of hundreds of nats also to 1e-4."""
    slack = 1e-4
    if name.endswith(("loss", "grad_norm")):
        slack = 0
    assert line[name] == pytest.approx(other[name], rel=rel, abs=slack), (line["step"], name)


def test_a_run_is_a_run_of_dpo(folder: Path, alone: Path) -> None:
    launch(folder, "algos/dpo.py", "dpo")
    check_agreement(alone, folder / "dpo", ("loss", "grad_norm", *PREFERENCE_METRICS), 1e-6)


@pytest.mark.slow
def test_two_processes(folder: Path, alone: Path) -> None:
    """Several micro-batches each."""
    launch(folder, SCRIPT, "two", processes=2, micro_batch_tokens=200)
    metrics = ("loss", "grad_norm", *PREFERENCE_METRICS, *TOKEN_METRICS)
    check_agreement(folder / "two", alone, metrics, 1e-4)
