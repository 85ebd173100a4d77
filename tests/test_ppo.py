"""PPO: its formulas in float64 loops, three steps against a plain loop, the optimal frontier, sampling, mistakes."""

import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import reference
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.baselines import ppo
from scripts.lab import notices, on_policy
from scripts.lab.on_policy import Sampler
from scripts.lab.row_files import EncodedRow
from scripts.lab.tabular import kl, normal, tilted
from shared import NonFinite, UserError
from shared.command import exit_hooks
from shared.distributed import Ranks

EPSILON = 0.2
LAM = 0.9
CPU = Ranks(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A run joins a process group and adds exit hooks, as a command of its own would."""
    yield
    exit_hooks.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------- formulas


LENGTHS = [3, 1, 5]
TOKENS = sum(LENGTHS)


def completions(values: Tensor) -> list[list[float]]:
    """Values (N,) as one list for each completion."""
    return [part.tolist() for part in values.split(LENGTHS)]


def test_token_rewards() -> None:
    logps = normal(TOKENS, seed=0)
    ref_logps = normal(TOKENS, seed=1)
    rewards = normal(len(LENGTHS), seed=2)

    expected = []
    for i, (ours, theirs) in enumerate(zip(completions(logps), completions(ref_logps), strict=True)):
        for t in range(LENGTHS[i]):
            expected.append(-0.3 * (ours[t] - theirs[t]))
        expected[-1] += float(rewards[i])
    values = ppo.token_rewards(logps, ref_logps, rewards, torch.tensor(LENGTHS), beta=0.3)
    assert values.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_advantages_are_sums_of_temporal_differences(lam: float) -> None:
    rewards = normal(TOKENS, seed=0)
    values = normal(TOKENS, seed=1)
    expected = []
    for of_tokens, v in zip(completions(rewards), completions(values), strict=True):
        expected += plain_gae(of_tokens, v, lam)
    advantages = ppo.gae(rewards, values, torch.tensor(LENGTHS), lam)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12)


def plain_gae(rewards: list[float], values: list[float], lam: float) -> list[float]:
    """Σ_k λ^k δ_{t+k}, straight from the definition."""
    after = [*values[1:], 0.0]
    deltas = [r + v_next - v for r, v_next, v in zip(rewards, after, values, strict=True)]
    advantages = []
    for t in range(len(deltas)):
        advantages.append(sum(lam**k * delta for k, delta in enumerate(deltas[t:])))
    return advantages


def test_with_lambda_1_the_return_is_the_sum_of_the_rewards_to_come() -> None:
    rewards = normal(TOKENS, seed=0)
    values = normal(TOKENS, seed=1)
    returns = ppo.gae(rewards, values, torch.tensor(LENGTHS), 1.0) + values
    expected = []
    for of_tokens in completions(rewards):
        expected += [math.fsum(of_tokens[t:]) for t in range(len(of_tokens))]
    assert returns.tolist() == pytest.approx(expected, rel=1e-12)


def plain_policy_loss(logp: float, old_logp: float, advantage: float) -> float:
    """The clipped surrogate of one token."""
    ratio = math.exp(logp - old_logp)
    if advantage > 0:
        return -min(ratio, 1 + EPSILON) * advantage
    return -max(ratio, 1 - EPSILON) * advantage


def plain_value_loss(value: float, old_value: float, target: float, clip: float | None) -> float:
    """The loss of V at one token."""
    candidates = [value]
    if clip is not None:
        candidates.append(min(max(value, old_value - clip), old_value + clip))
    return max((candidate - target) ** 2 for candidate in candidates) / 2


def slope_of(function: Callable[[float], float], x: float) -> float:
    """A central difference."""
    step = 1e-6
    return (function(x + step) - function(x - step)) / (2 * step)


def test_the_clipped_surrogate_and_its_gradient() -> None:
    logps = normal(40, seed=0, scale=0.4).requires_grad_()
    old_logps = normal(40, seed=1, scale=0.4)
    advantages = normal(40, seed=2)
    losses = ppo.policy_loss(logps, old_logps, advantages, EPSILON)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    assert 5 < int((gradient == 0).sum()) < 35, "some tokens are clipped, and some are not"

    triples = list(zip(logps.tolist(), old_logps.tolist(), advantages.tolist(), strict=True))
    expected = [plain_policy_loss(*triple) for triple in triples]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    for i, (_, old, advantage) in enumerate(triples):
        slope = slope_of(partial(plain_policy_loss, old_logp=old, advantage=advantage), logps[i].item())
        assert float(gradient[i]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_loss_of_the_values_and_its_gradient(clip: float | None) -> None:
    values = normal(40, seed=0).requires_grad_()
    old_values = normal(40, seed=1)
    returns = normal(40, seed=2)
    losses = ppo.value_loss(values, old_values, returns, clip)
    (gradient,) = torch.autograd.grad(losses.sum(), values)

    triples = list(zip(values.tolist(), old_values.tolist(), returns.tolist(), strict=True))
    expected = [plain_value_loss(*triple, clip) for triple in triples]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    for i, (_, old, target) in enumerate(triples):
        slope = slope_of(partial(plain_value_loss, old_value=old, target=target, clip=clip), values[i].item())
        assert float(gradient[i]) == pytest.approx(slope, abs=1e-7)


def test_moments_are_those_of_all_values_so_far() -> None:
    parts = [normal(5, seed=0, scale=3.0) + 2, normal(1, seed=1), normal(17, seed=2) - 4]
    moments = ppo.Moments()
    for part in parts:
        moments.add(part)
    together = torch.cat(parts)
    assert moments.mean == pytest.approx(float(together.mean()), rel=1e-12)
    assert moments.variance == pytest.approx(float(together.var(correction=0)), rel=1e-12)
    scaled = moments.normalise(together)
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-12)
    assert float(scaled.std(correction=0)) == pytest.approx(1, rel=1e-12)


def test_equal_rewards_are_shifted_only() -> None:
    moments = ppo.Moments()
    moments.add(torch.full((3,), 2.0))
    assert moments.normalise(torch.full((3,), 2.0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "divergence, expected", [(6.0, 0.5), (6.6, 0.505), (60.0, 0.51), (5.4, 0.495), (0.0, 0.49), (-1.0, 0.49)]
)
def test_beta_follows_the_kl(divergence: float, expected: float) -> None:
    assert ppo.adapted(0.5, divergence, target=6.0, gain=0.1) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- three steps against a plain loop


class Run(NamedTuple):
    """What a run has left."""

    directory: Path
    samples: list[list[EncodedRow]]  # of each step
    lines: list[dict]


def run_ppo(monkeypatch: pytest.MonkeyPatch, directory: Path, **options: Any) -> Run:
    """Run `main` in this process, and note the samples."""
    samples: list[list[EncodedRow]] = []
    sample = Sampler.sample

    def noted(self: Sampler, prompts: list[EncodedRow], count: int) -> list[EncodedRow]:
        samples.append(sample(self, prompts, count))
        return samples[-1]

    monkeypatch.setattr(Sampler, "sample", noted)
    ppo.main(ppo.Args(output_dir=str(directory), **options))
    return Run(directory, samples, tiny.read_jsonl(directory / "metrics.jsonl"))


class Token(NamedTuple):
    """What is known of sampled tokens before the updates of their step: a number of one, a tensor of several."""

    old_logp: Any
    advantage: Any
    old_value: Any
    target: Any


class PlainPPO:
    """The same algorithm in float64, one completion at a time, with the stock model."""

    def __init__(self, args: ppo.Args):
        self.args = args
        self.policy = reference.load_model(Path(args.model))
        self.ref = reference.load_model(Path(args.model))
        self.reward_model = reference.load_reward_model(Path(args.reward))
        self.head = nn.Linear(tiny.HIDDEN, 1, dtype=torch.double)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=args.learning_rate, **settings)
        self.value_optimizer = torch.optim.AdamW(self.head.parameters(), lr=args.value_learning_rate, **settings)
        self.rewards: list[float] = []
        self.beta = args.beta

    def forward(self, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor]:
        """log π and V of each token (T,)."""
        ids = torch.tensor([prompt + completion])
        states = self.policy.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        logps = self.policy.lm_head(states).log_softmax(-1)[range(len(completion)), completion]
        return logps, self.head(states.detach())[:, 0]

    def step(self, number: int, samples: list[EncodedRow]) -> dict[str, float]:
        """Train on the samples of a step; returns what is logged."""
        pairs = [[(row.prompt, completion.ids) for completion in row.completions] for row in samples]
        with torch.no_grad():
            all_tokens, ratios, rewards = self.before(pairs)
        self.optimizer.param_groups[0]["lr"] = self.args.learning_rate
        if number <= self.args.value_warmup_steps:
            self.optimizer.param_groups[0]["lr"] = 0.0

        losses: list[list[float]] = []
        size = math.ceil(len(pairs) / self.args.minibatches)
        for epoch in range(self.args.epochs):
            generator = torch.Generator().manual_seed(((self.args.seed + number) << 20) + epoch)
            order = torch.randperm(len(pairs), generator=generator).tolist()
            for start in range(0, len(pairs), size):
                losses += self.update(order[start : start + size], pairs, all_tokens)

        line = {"reward": reference.mean(rewards), "kl": reference.mean(ratios), "beta": self.beta}
        for i, name in enumerate(("policy_loss", "value_loss", "clip_fraction")):
            line[name] = reference.mean(loss[i] for loss in losses)
        error = min(max(line["kl"] / self.args.target_kl - 1, -0.2), 0.2)
        self.beta *= 1 + self.args.kl_gain * error
        return line

    def before(self, pairs: list) -> tuple[list[list[list[Token]]], list[float], list[float]]:
        """The tokens of each completion of each prompt, the log-ratio and the reward of each completion."""
        rewards = [float(reference.reward(self.reward_model, *pair)) for pair in itertools.chain(*pairs)]
        self.rewards += rewards
        mean = reference.mean(self.rewards)
        deviation = math.sqrt(reference.mean((reward - mean) ** 2 for reward in self.rewards))

        tokens = []
        ratios = []
        for reward, pair in zip(rewards, itertools.chain(*pairs), strict=True):
            logps, values = self.forward(*pair)
            log_ratios = logps - reference.token_logps(self.ref, *pair)
            ratios.append(float(log_ratios.sum()))
            of_tokens = [-self.beta * ratio for ratio in log_ratios.tolist()]
            of_tokens[-1] += (reward - mean) / deviation
            advantages = plain_gae(of_tokens, values.tolist(), self.args.gae_lambda)
            tokens.append(list(zip(logps.tolist(), advantages, values.tolist(), strict=True)))

        everything = [advantage for completion in tokens for _, advantage, _ in completion]
        centre = reference.mean(everything)
        spread = math.sqrt(reference.mean((advantage - centre) ** 2 for advantage in everything)) + 1e-8
        white = []
        for completion in tokens:
            white.append([Token(logp, (a - centre) / spread, value, a + value) for logp, a, value in completion])
        count = self.args.num_completions
        return [white[i : i + count] for i in range(0, len(white), count)], ratios, rewards

    def update(self, members: list[int], pairs: list, all_tokens: list) -> list[list[float]]:
        """One step of both optimizers; returns both losses of each token, and whether it was clipped."""
        policy_losses = []
        value_losses = []
        clipped = []
        for i in members:
            for pair, tokens in zip(pairs[i], all_tokens[i], strict=True):
                logps, values = self.forward(*pair)
                old = Token(*torch.tensor(tokens, dtype=torch.double).unbind(1))
                ratios = (logps - old.old_logp).exp()
                bounded = ratios.clamp(1 - self.args.clip, 1 + self.args.clip)
                policy_losses.append(-torch.min(ratios * old.advantage, bounded * old.advantage))

                changes = (values - old.old_value).clamp(-self.args.value_clip, self.args.value_clip)
                errors = (values - old.target) ** 2
                errors_of_near = (old.old_value + changes - old.target) ** 2
                value_losses.append(torch.max(errors, errors_of_near) / 2)
                clipped.append(((ratios - 1).abs() > self.args.clip).double())

        for losses, parameters, optimizer in (
            (policy_losses, list(self.policy.parameters()), self.optimizer),
            (value_losses, list(self.head.parameters()), self.value_optimizer),
        ):
            optimizer.zero_grad()
            torch.cat(losses).mean().backward()
            norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in parameters))
            for parameter in parameters:
                parameter.grad *= min(1.0, self.args.max_grad_norm / norm)
            optimizer.step()
        columns = [torch.cat(values).detach() for values in (policy_losses, value_losses, clipped)]
        return torch.stack(columns, 1).tolist()


def test_three_steps_equal_a_plain_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With rewards of a model, normalised; an adapted β; clipped values; and a policy that waits for one step."""
    model = tiny.make_model(tmp_path / "model")
    reward_model = tiny.make_reward_model(tmp_path / "rm")
    tiny.make_rows(8, seed=3, path=tmp_path / "rows.jsonl", prompt_words=(1, 8))
    options: dict[str, Any] = {
        "model": str(model),
        "reward": str(reward_model),
        "train_data": str(tmp_path / "rows.jsonl"),
        "beta": 0.2,
        "target_kl": 0.01,
        "kl_gain": 0.5,
        "normalise_rewards": True,
        "value_clip": 0.1,
        "gae_lambda": LAM,
        "value_warmup_steps": 1,
        "max_new_tokens": 6,
        "steps": 3,
        "batch_size": 5,
        "num_completions": 2,
        "epochs": 2,
        "minibatches": 2,
        "micro_batch_tokens": 64,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.5,
        "seed": 7,
    }
    run = run_ppo(monkeypatch, tmp_path / "ppo", **options)

    plain = PlainPPO(ppo.Args(output_dir="unused", **options))
    for number, (samples, line) in enumerate(zip(run.samples, run.lines, strict=True), 1):
        expected = plain.step(number, samples)
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert abs(run.lines[2]["kl"]) > 0.1, "the policy has moved"
    assert run.lines[2]["clip_fraction"] > 0
    assert run.lines[0]["beta"] != run.lines[2]["beta"]

    trained = reference.load_model(run.directory)
    for row in run.samples[-1]:
        for completion in row.completions:
            ours = reference.token_logps(trained, row.prompt, completion.ids)
            theirs = reference.token_logps(plain.policy, row.prompt, completion.ids)
            assert torch.allclose(ours, theirs, atol=1e-4)


# ---------------------------------------------------------------- a world whose completions can be listed

WORDS = ("a", "b", "c", "d", "e", "f")
SPECIAL = ("<s>", "</s>")
END = 1
PROMPTS = ([0, 2, 3], [0, 4], [0, 5, 6, 7, 2])
LIMIT = 2  # tokens of a completion


def all_completions() -> list[list[int]]:
    """Those that end at once, and all others of two tokens."""
    vocabulary = range(len(SPECIAL) + len(WORDS))
    listed = [[END]]
    for first, second in itertools.product(vocabulary, vocabulary):
        if first != END:
            listed.append([first, second])
    return listed


COMPLETIONS = all_completions()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model over eight words, and its prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("world")
    ids = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(ids, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    texts = [" ".join((*SPECIAL, *WORDS)[i] for i in prompt[1:]) for prompt in PROMPTS]
    tiny.write_jsonl(folder / "prompts.jsonl", [{"prompt": text} for text in texts])
    return {"model": str(folder / "model"), "train_data": str(folder / "prompts.jsonl")}


@torch.no_grad()
def logps_of(directory: str | Path) -> Tensor:
    """log π of all completions of each prompt (3, 57), float64."""
    model = reference.load_model(Path(directory))
    rows = []
    for prompt in PROMPTS:
        rows.append([float(reference.token_logps(model, prompt, ids).sum()) for ids in COMPLETIONS])
    return torch.tensor(rows, dtype=torch.double)


def table_reward(table: Tensor) -> Callable[..., Callable[[list[EncodedRow]], Tensor]]:
    """What stands in for `load_reward`: the rewards (3, 57) of a table."""

    def reward(rows: list[EncodedRow]) -> Tensor:
        values = []
        for row in rows:
            of_prompt = table[PROMPTS.index(row.prompt)]
            values.append([float(of_prompt[COMPLETIONS.index(completion.ids)]) for completion in row.completions])
        return torch.tensor(values, dtype=torch.double)

    return lambda *_: reward


def frontier(ref_logps: Tensor, rewards: Tensor, divergence: float) -> float:
    """The largest E[r] at a mean KL over the prompts, by bisection over β of π_ref exp(r/β) / Z."""
    low = -4.0  # log10 β
    high = 4.0
    for _ in range(60):
        middle = (low + high) / 2
        optimum = tilted(ref_logps, rewards, 10**middle)
        if float(kl(optimum, ref_logps).mean()) > divergence:
            low = middle
        else:
            high = middle
    return float((tilted(ref_logps, rewards, 10**high).exp() * rewards).sum(1).mean())


@pytest.mark.slow
def test_ppo_reaches_the_optimal_frontier(
    world: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At least 90% of the reward that the best policy of the same KL gains over the reference."""
    rewards = normal(len(PROMPTS), len(COMPLETIONS), seed=1)
    monkeypatch.setattr(ppo, "load_reward", table_reward(rewards))
    options = {"steps": 60, "batch_size": 3, "num_completions": 64, "epochs": 2, "minibatches": 1}
    options |= {"beta": 0.3, "learning_rate": 3e-3, "max_new_tokens": LIMIT, "reward": "table"}
    run = run_ppo(monkeypatch, tmp_path / "ppo", lr_schedule="linear", **world, **options)

    ref_logps = logps_of(world["model"])
    logps = logps_of(run.directory)
    assert torch.allclose(logps.exp().sum(1), torch.ones(3, dtype=torch.double)), "all completions are listed"
    divergence = float(kl(logps, ref_logps).mean())
    start = float((ref_logps.exp() * rewards).sum(1).mean())
    reached = float((logps.exp() * rewards).sum(1).mean())
    optimum = frontier(ref_logps, rewards, divergence)
    print(f"KL {divergence:.3f}: reward {reached:.3f} from {start:.3f}, optimum {optimum:.3f}")
    assert divergence > 0.5
    assert reached - start >= 0.9 * (optimum - start)
    assert reached <= optimum + 1e-9


@pytest.mark.slow
def test_the_kl_comes_to_its_target(world: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a β that is far too small, with rewards that are normalised."""
    rewards = 10 * normal(len(PROMPTS), len(COMPLETIONS), seed=1) + 3
    monkeypatch.setattr(ppo, "load_reward", table_reward(rewards))
    options = {"steps": 60, "batch_size": 3, "num_completions": 32, "epochs": 2, "minibatches": 1}
    options |= {"target_kl": 1.0, "kl_gain": 1.0, "normalise_rewards": True, "beta": 0.2}
    options |= {"learning_rate": 3e-3, "max_new_tokens": LIMIT, "reward": "table"}
    run = run_ppo(monkeypatch, tmp_path / "ppo", **world, **options)

    first = [line["kl"] for line in run.lines[:30]]
    last = [line["kl"] for line in run.lines[-10:]]
    assert max(first) > 2
    assert reference.mean(last) == pytest.approx(1.0, abs=0.2)


def test_samples_have_the_probabilities_of_the_policy(world: dict[str, str]) -> None:
    """Prompts of three lengths, completions that end early, and a cache that loses those that have ended."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(world["model"])
    sampler = Sampler(world["model"], tokenizer, LIMIT, CPU)
    assert sampler.eos_ids == [END]
    count = 4_000
    rows = sampler.sample([EncodedRow(None, prompt) for prompt in PROMPTS], count)

    probabilities = logps_of(world["model"]).exp()
    for row, expected in zip(rows, probabilities, strict=True):
        counts = Counter(tuple(completion.ids) for completion in row.completions)
        observed = torch.tensor([counts[tuple(ids)] for ids in COMPLETIONS], dtype=torch.double)
        assert observed.sum() == count
        chi_square = ((observed - count * expected) ** 2 / (count * expected)).sum()
        freedom = len(COMPLETIONS) - 1
        assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_long_samples_are_those_of_a_loop_without_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the likeliest token in the place of a drawn one, and not all prompts at once."""
    monkeypatch.setattr(on_policy, "SEQUENCES_AT_ONCE", 13)
    tiny.make_model(tmp_path / "model", initializer_range=0.2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    sampler = Sampler(str(tmp_path / "model"), tokenizer, 12, CPU)
    sampler.eos_ids = list(range(1, 400, 9))
    sampler._next_ids = lambda logits: logits.argmax(-1, keepdim=True)
    prompts = [[0, *range(30, 30 + 7 * i)] for i in range(9)]
    rows = sampler.sample([EncodedRow(None, prompt) for prompt in prompts], 2)

    model = reference.load_model(tmp_path / "model")
    lengths = set()
    for prompt, row in zip(prompts, rows, strict=True):
        ids: list[int] = []
        while len(ids) < 12 and not (ids and ids[-1] in sampler.eos_ids):
            ids.append(int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        assert [completion.ids for completion in row.completions] == [ids, ids]
        lengths.add(len(ids))
    assert len(lengths) > 3, "they end at different lengths"


# ---------------------------------------------------------------- what a run leaves, and mistakes


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The notices' untrained model, and a few posts."""
    folder = tmp_path_factory.mktemp("board")
    notices.save_model(folder / "base", 0)
    rng = random.Random(0)
    tiny.write_jsonl(folder / "prompts.jsonl", [{"prompt": notices.make_notice(rng)[0]} for _ in range(6)])
    return {"model": str(folder / "base"), "train_data": str(folder / "prompts.jsonl"), "reward": "notices"}


SHORT = {"steps": 1, "batch_size": 2, "num_completions": 2, "epochs": 1, "max_new_tokens": 4}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_leaves_a_model_and_its_log(
    board: dict[str, str], dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = SHORT | {"dtype": dtype, "learning_rate": 1e-3}
    run = run_ppo(monkeypatch, tmp_path / "ppo", **board, **options)
    (samples,) = run.samples
    tokenizer = PreTrainedTokenizerFast.from_pretrained(board["model"])
    rewards = []
    for row in samples:
        for completion in row.completions:
            text = tokenizer.decode(completion.ids, skip_special_tokens=True)
            rewards.append(notices.oracle(row.example.prompt, text))
    (line,) = run.lines
    assert line["reward"] == pytest.approx(reference.mean(rewards))
    assert line["kl"] == pytest.approx(0, abs=1e-5)
    assert all(math.isfinite(value) for value in line.values())

    record = json.loads((run.directory / "run.json").read_text())
    assert record["algorithm"] == "ppo"
    assert record["args"] == dataclasses.asdict(ppo.Args(output_dir=str(run.directory), **board, **options))
    before = AutoModelForCausalLM.from_pretrained(board["model"]).lm_head.weight
    after = AutoModelForCausalLM.from_pretrained(run.directory).lm_head.weight
    assert 0 < (after - before).abs().max().item() < 0.1


def test_prompts_without_room(board: dict[str, str], tmp_path: Path) -> None:
    options = SHORT | {"max_new_tokens": 250}
    with pytest.raises(UserError, match="no usable row.*prompt too long 6"):
        ppo.main(ppo.Args(output_dir=str(tmp_path / "ppo"), **board, **options))


def test_a_reward_model_with_another_tokenizer(board: dict[str, str], tmp_path: Path) -> None:
    stranger = str(tiny.make_reward_model(tmp_path / "rm"))
    with pytest.raises(UserError, match=f"--reward {stranger}: has another tokenizer than the policy"):
        ppo.main(ppo.Args(output_dir=str(tmp_path / "ppo"), **board | {"reward": stranger}, **SHORT))


def test_prompts_that_the_oracle_cannot_read(board: dict[str, str], tmp_path: Path) -> None:
    rows = str(tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "thank you all"}]))
    with pytest.raises(UserError, match="--reward notices: not a notice"):
        ppo.main(ppo.Args(output_dir=str(tmp_path / "ppo"), **board | {"train_data": rows}, **SHORT))


def test_several_processes(board: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="ppo: runs in one process, not in 2"):
        ppo.main(ppo.Args(output_dir=str(tmp_path / "ppo"), **board, **SHORT))
    assert not (tmp_path / "ppo").exists()


@pytest.mark.parametrize("name", ["warmup_steps", "value_warmup_steps"])
def test_a_policy_that_would_never_learn(board: dict[str, str], name: str, tmp_path: Path) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=f"{flag} 1: must be less than --steps 1"):
        ppo.main(ppo.Args(output_dir=str(tmp_path / "ppo"), **board, **SHORT | {name: 1}))


def test_a_reward_that_is_not_a_number(world: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = torch.full((len(PROMPTS), len(COMPLETIONS)), torch.nan)
    monkeypatch.setattr(ppo, "load_reward", table_reward(table))
    options = SHORT | {"max_new_tokens": LIMIT, "reward": "table"}
    with pytest.raises(NonFinite, match="step 1: loss nan.*the weights were not updated"):
        ppo.main(ppo.Args(output_dir=str(tmp_path / "ppo"), **world, **options))
    assert not (tmp_path / "ppo" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_command_line(board: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "ppo"
    environment = {**os.environ, **tiny.environment(tmp_path / "cache")}

    def run(**options: Any) -> subprocess.CompletedProcess:
        line = tiny.command(str(tiny.ROOT / "scripts/baselines/ppo.py"), 1, {**board, **SHORT, **options})
        return subprocess.run(line, env=environment, capture_output=True, text=True)

    assert run(output_dir=out).returncode == 0
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    again = run(output_dir=out)
    assert again.returncode == 2
    assert again.stderr.strip().endswith("holds another run or a model; give another directory, or delete it")
    assert "Traceback" not in again.stderr
