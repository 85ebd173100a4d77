"""Token-level DPO: rewards, loss, Theorem 1 by enumeration, beam search, proxy tuning, and the program itself."""

import copy
import itertools
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import streaming
import tiny
import torch
from shared.data import Batches, Needs, load
from test_exactness import BETA, OPTIONS
from test_exactness_family import ALL_METRICS, TOKEN_METRICS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from algos.dpo import dpo_loss
from algos.token_dpo_beam import (
    beam_search,
    beam_searches,
    held_out_prompts,
    proxy_logps,
    token_dpo_loss,
    token_rewards,
)
from shared import NonFinite, UserError
from shared.logprobs import sequence_logps
from shared.model import add_reference_logps, load_policy
from shared.rows import parse

SCRIPT = "algos/token_dpo_beam.py"


def double(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Random float64 numbers."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- rewards and loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that often ends, another one, pairs, and held-out pairs of which one prompt is too long."""
    path = tmp_path_factory.mktemp("token_dpo")
    for name, seed in (("model", 3), ("other", 8)):
        tiny.make_model(path / name, "llama", seed=seed)
    model, tokenizer = (auto.from_pretrained(path / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 2.5
    model.save_pretrained(path / "model")
    tiny.make_rows(12, seed=12, path=path / "pairs.jsonl")
    held_out = tiny.make_rows(10, seed=13, prompt_words=(1, 30))
    held_out[2]["prompt"] = tiny.text(random.Random(1), 202)
    tiny.write_jsonl(path / "held_out.jsonl", held_out)
    return path


def test_token_rewards_sum_to_the_log_ratio(folder: Path) -> None:
    """Packed rows of a policy and of another reference, against stock models in float64: token by token and summed."""
    tokenizer, data = AutoTokenizer.from_pretrained(folder / "model"), str(folder / "pairs.jsonl")
    rows = [reference.encode(tokenizer, row) for row in tiny.read_jsonl(folder / "pairs.jsonl")]
    policy, other = (reference.load_model(folder / name) for name in ("model", "other"))
    groups = load(data, tokenizer, Needs(completions=2), 512, None)
    seen = 0
    with streaming.alone("float32") as place, torch.no_grad():
        model = load_policy(str(folder / "model"), place)
        batches = Batches(groups, 12, 400, 1, place)
        add_reference_logps(str(folder / "other"), model, batches, per_token=True)
        for batch in batches:
            rewards = token_rewards(model(batch), batch.ref_logps, BETA)
            sums = sequence_logps(rewards, batch.lengths)
            parts = iter(rewards.double().split(batch.lengths.flatten().tolist()))
            for i, k in itertools.product(range(len(batch.rows)), range(2)):
                group = rows[batch.rows[i]]
                ours, theirs = (reference.token_logps(m, group.prompt, group.completions[k]) for m in (policy, other))
                assert group.completions[k][-1] == tokenizer.eos_token_id
                torch.testing.assert_close(next(parts), BETA * (ours - theirs), rtol=0, atol=1e-5)
                assert float(sums[i, k]) == pytest.approx(float(BETA * (ours.sum() - theirs.sum())), abs=1e-5)
                seen += 1
    assert seen == 2 * len(rows) and len(list(batches)) > 2


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_the_loss_and_its_gradient_are_dpo_s(beta: float) -> None:
    """Completions of 1 to 300 tokens; the gradient of every token is that of its completion's sum."""
    lengths = torch.tensor([[1, 1], [1, 300], [300, 1], [17, 4], [2, 90], [64, 64], [33, 250]])
    logps = [double(int(lengths.sum()), seed=seed, scale=0.7) for seed in (1, 2)]
    tokens, ours = (logps[0].clone().requires_grad_() for _ in range(2))
    losses = token_dpo_loss(token_rewards(ours, logps[1], beta), lengths)
    sums, ref = (
        torch.stack([part.sum() for part in x.split(lengths.flatten().tolist())]).view(-1, 2)
        for x in (tokens, logps[1])
    )
    expected = dpo_loss(sums, ref, beta)
    assert losses.shape == (7,) and expected.dtype == torch.float64
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=1e-12)
    weights = torch.linspace(0.5, 1.5, 7)
    found, wanted = (
        torch.autograd.grad((weights * values).sum(), x)[0] for values, x in ((losses, ours), (expected, tokens))
    )
    assert wanted.abs().max() > 0.1 * beta
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-12)


# ---------------------------------------------------------------- Theorem 1


TOKENS, END, HORIZON, SCALE = 3, 2, 4, 0.7  # SCALE is β
State = tuple[int, ...]


def terminal(state: State) -> bool:
    """After the EOS, or after the last action."""
    return len(state) == HORIZON or END in state


EVERY = [state for n in range(HORIZON + 1) for state in itertools.product(range(TOKENS), repeat=n)]
STATES = [state for state in EVERY if not terminal(state)]
PATHS = [state for state in EVERY if terminal(state) and not terminal(state[:-1])]
ROW = {state: i for i, state in enumerate(STATES)}


def along(table: Tensor, *paths: State) -> Tensor:
    """The values of a (states, actions) table on the way from the empty state along paths, one after another."""
    return table[tuple(torch.tensor([(ROW[path[:t]], a) for path in paths for t, a in enumerate(path)]).T)]


def solve(rewards: Tensor, ref: Tensor) -> tuple[dict[State, Tensor], Tensor]:
    """Eqs 5 to 7 from the last states backwards: V* of each state, log π* (states, actions)."""
    q, v = torch.zeros_like(rewards), {}
    for state in reversed(STATES):
        for action in range(TOKENS):
            after = v.get((*state, action), torch.zeros((), dtype=torch.float64))  # 0 at terminal states
            q[ROW[state], action] = rewards[ROW[state], action] + SCALE * ref[ROW[state], action] + after
        v[state] = SCALE * (q[ROW[state]] / SCALE).exp().sum().log()
    values = torch.stack([v[state] for state in STATES])
    return v, (q - values[:, None]) / SCALE


def shape(rewards: Tensor, potential: dict[State, Tensor]) -> Tensor:
    """Definition 1, r + Φ(s') − Φ(s); Φ is 0 where the dictionary has none."""
    shaped = rewards.clone()
    for state, action in itertools.product(STATES, range(TOKENS)):
        shaped[ROW[state], action] += potential.get((*state, action), 0.0) - potential[state]
    return shaped


def preferences(rewards: Tensor) -> Tensor:
    """Eq 1, P(τ_i ≻ τ_j) (paths, paths)."""
    worths = torch.stack([along(rewards, path).sum() for path in PATHS]).exp()
    return worths[:, None] / (worths[:, None] + worths)


def losses_of_all_pairs(logps: Tensor, ref: Tensor) -> Tensor:
    """What the code under test makes of all ordered pairs of paths, (paths, paths)."""
    pairs = list(itertools.product(PATHS, repeat=2))
    rewards = token_rewards(*(along(table, *itertools.chain(*pairs)) for table in (logps, ref)), SCALE)
    lengths = torch.tensor([[len(path) for path in pair] for pair in pairs])
    return token_dpo_loss(rewards, lengths).view(len(PATHS), -1)


@pytest.fixture(scope="module")
def mdp() -> tuple[Tensor, Tensor]:
    """Random dense rewards and log π_ref, (states, actions) each."""
    return double(len(STATES), TOKENS, seed=1), double(len(STATES), TOKENS, seed=2).log_softmax(1)


def test_soft_bellman_backups_solve_the_kl_regularised_problem(mdp: tuple[Tensor, Tensor]) -> None:
    """π*(τ) ∝ π_ref(τ) exp(r(τ) / β) over all trajectories, with V*(s_0) as its normaliser; Eqs 12 and 13."""
    rewards, ref = mdp
    assert len(STATES) == 15 and len(PATHS) == 31
    v, best = solve(rewards, ref)
    torch.testing.assert_close(best.exp().sum(1), torch.ones(15, dtype=torch.float64), rtol=0, atol=1e-12)
    worths = torch.stack([along(ref, path).sum() + along(rewards, path).sum() / SCALE for path in PATHS])
    chances = torch.stack([along(best, path).sum() for path in PATHS])
    torch.testing.assert_close(chances, worths.log_softmax(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(v[()], SCALE * worths.logsumexp(0), rtol=0, atol=1e-12)
    for state in STATES[1:]:  # a partial expansion: V*(s_0) has a plus
        objective = (along(rewards, state) + SCALE * along(ref, state)).sum() + v[state]
        torch.testing.assert_close(objective, v[()] + SCALE * along(best, state).sum(), rtol=0, atol=1e-12)


def test_theorem_1(mdp: tuple[Tensor, Tensor]) -> None:
    """Shaped rewards share π* and preferences; β log π*/π_ref is one of them, and has the preferences' log-loss."""
    rewards, ref = mdp
    v, best = solve(rewards, ref)
    wanted = preferences(rewards)
    for seed, scale in ((3, 1.0), (4, 10.0)):
        potential = dict(zip(STATES, double(15, seed=seed, scale=scale), strict=True))
        shaped = shape(rewards, potential)
        assert (shaped - rewards).abs().max() > 1
        torch.testing.assert_close(solve(shaped, ref)[1], best, rtol=0, atol=1e-11)
        torch.testing.assert_close(preferences(shaped), wanted, rtol=0, atol=1e-11)

    implicit = token_rewards(best, ref, SCALE)  # Eq 11
    torch.testing.assert_close(implicit, shape(rewards, v), rtol=0, atol=1e-12)  # Eq 10
    torch.testing.assert_close(preferences(implicit), wanted, rtol=0, atol=1e-12)  # Eq 8
    torch.testing.assert_close(losses_of_all_pairs(best, ref).double(), -wanted.log(), rtol=1e-6, atol=1e-7)
    divergence = (ref.exp() * (ref - best)).sum(1)
    torch.testing.assert_close((ref.exp() * implicit).sum(1), -SCALE * divergence, rtol=0, atol=1e-12)  # Eq 16


def test_the_expected_loss_is_least_at_the_optimal_policy(mdp: tuple[Tensor, Tensor]) -> None:
    """Tabular logits from π_ref to convergence under the preferences of the rewards: π*, token by token."""
    rewards, ref = mdp
    _, best = solve(rewards, ref)
    chances, logits = preferences(rewards), ref.clone().requires_grad_()
    options = dict(max_iter=300, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS([logits], **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (chances * losses_of_all_pairs(logits.log_softmax(1), ref)).mean()
        value.backward()
        return value

    optimizer.step(closure)
    assert (ref - best).abs().max() > 0.5
    torch.testing.assert_close(logits.detach().log_softmax(1), best, rtol=0, atol=2e-4)  # float32 sums


# ---------------------------------------------------------------- beam search


EOS = 3


def make_lm(architecture: str, vocab: int, eos: float = 0.0, seed: int = 0) -> nn.Module:
    """A tiny language model whose head has a bias: `eos` for the token EOS, and 0."""
    torch.manual_seed(seed)
    config = tiny.make_config(architecture, vocab, bos_token_id=0, eos_token_id=EOS)
    model = AutoModelForCausalLM.from_config(config).eval()
    weight = model.lm_head.weight.detach().clone()
    model.lm_head = nn.Linear(*reversed(weight.shape))
    model.lm_head.weight.data, model.lm_head.bias.data = weight, torch.zeros(vocab)
    model.lm_head.bias.data[EOS] = eos
    return model


def make_prompts(n: int, vocab: int, longest: int = 20) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens."""
    rng = random.Random(0)
    return [rng.choices(range(vocab), k=rng.randint(1, longest)) for _ in range(n)]


def brute_force(model: nn.Module, prompt: list[int], vocab: int, longest: int) -> dict[State, float]:
    """log π of every completion, by stock forward passes in float64 without a cache."""
    model, scores = copy.deepcopy(model).double(), {}
    for length in range(1, longest + 1):
        every = itertools.product(range(vocab), repeat=length)
        paths = [y for y in every if EOS not in y[:-1] and (y[-1] == EOS or length == longest)]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *y] for y in paths]), use_cache=False).logits
        logps = logits[:, len(prompt) - 1 : -1].log_softmax(2)
        found = logps.gather(2, torch.tensor(paths)[..., None]).sum((1, 2))
        scores |= dict(zip(paths, found.tolist(), strict=True))
    return scores


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_beam_as_wide_as_all_sequences_finds_them_all_in_order(architecture: str, length_penalty: float) -> None:
    """1093 completions of at most 6 tokens of a vocabulary of 4; narrower beams find some, at times not the best."""
    model, prompts, missed = make_lm(architecture, 4, eos=-0.5), make_prompts(4, 4, 9), 0
    for prompt in prompts:
        scores = brute_force(model, prompt, 4, 6)
        found = beam_search(model, torch.tensor([prompt]), len(scores), 6, EOS, length_penalty)
        assert len(scores) == len(found) == 1093 and {tuple(y) for y, _ in found} == set(scores)
        assert [logp for _, logp in found] == pytest.approx([scores[tuple(y)] for y, _ in found], abs=1e-5)
        ranked = sorted((logp / len(y) ** length_penalty for y, logp in scores.items()), reverse=True)
        assert [scores[tuple(y)] / len(y) ** length_penalty for y, _ in found] == pytest.approx(ranked, abs=1e-5)
        for width in (1, 3):
            narrow = beam_search(model, prompt, width, 6, EOS, length_penalty)
            assert len(narrow) == width
            assert [logp for _, logp in narrow] == pytest.approx([scores[tuple(y)] for y, _ in narrow], abs=1e-5)
            missed += narrow[0][0] != found[0][0]
    assert 0 < missed < 8


def generate(
    model: nn.Module, prompts: list[list[int]], width: int, longest: int, length_penalty: float = 0.0, eos: int = EOS
) -> list[list[tuple[list[int], float]]]:
    """transformers' own search over a batch padded on the left: every beam with its score, or greedy's completion."""
    most = max(map(len, prompts))
    ids = torch.tensor([[0] * (most - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (most - len(p)) + [1] * len(p) for p in prompts])
    how = dict(num_beams=width, num_return_sequences=width, length_penalty=length_penalty, early_stopping="never")
    how = (how if width > 1 else {}) | dict(do_sample=False, max_new_tokens=longest, eos_token_id=eos, pad_token_id=eos)
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **how)
    found = []
    for i, y in enumerate(out.sequences[:, most:].tolist()):
        y = y[: y.index(eos) + 1] if eos in y else y
        found.append((y, float(out.sequences_scores[i]) * len(y) ** length_penalty if width > 1 else math.nan))
    return [found[i : i + width] for i in range(0, len(found), width)]


def check_beams(found: list[list[tuple[list[int], float]]], expected: list[list[tuple[list[int], float]]]) -> None:
    """The same completions in the same order, their scores equal to rounding."""
    assert [[y for y, _ in beams] for beams in found] == [[y for y, _ in beams] for beams in expected]
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert math.isnan(theirs[1]) or ours[1] == pytest.approx(theirs[1], abs=2e-5)


@pytest.mark.parametrize(("vocab", "eos"), [(40, 1.0), (40, -1e4), (5, 0.0)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_beams_are_those_of_transformers(architecture: str, vocab: int, eos: float) -> None:
    """50 prompts of 1 to 20 tokens; the EOS likely, or never; the widest beam is wider than the small vocabulary."""
    model, prompts, longest = make_lm(architecture, vocab, eos), make_prompts(50, vocab), 10
    for width, penalty in ((1, 0.0), (2, 0.0), (5, 0.0), (5, 1.0), (7, 0.0)):
        found = beam_searches(model, prompts, width, longest, EOS, penalty)
        check_beams(found, generate(model, prompts, width, longest, penalty))
        every = [y for beams in found for y, _ in beams]
        assert all(EOS not in y[:-1] and (y[-1] == EOS or len(y) == longest) for y in every)
        assert {y[-1] == EOS for y in every} == ({True, False} if eos >= 0 else {False})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_several_prompts_at_once_are_as_one_at_a_time(architecture: str) -> None:
    model, prompts = make_lm(architecture, 40, eos=3.0), make_prompts(12, 40)
    for width, penalty in ((1, 0.0), (3, 0.0), (4, 1.0)):
        together = beam_searches(model, prompts, width, 10, EOS, penalty)
        for prompt, beams in zip(prompts, together, strict=True):
            check_beams([beam_search(model, prompt, width, 10, EOS, penalty)], [beams])


def edited(vocab: int, bias: dict[int, float]) -> nn.Module:
    """A Llama whose logits are `bias`, else 0, whatever it reads."""
    model = make_lm("llama", vocab)
    model.lm_head.weight.data.zero_()
    for token, value in bias.items():
        model.lm_head.bias.data[token] = value
    return model


def test_of_equal_scores_the_better_beam_and_the_lowest_ids() -> None:
    """All of 1000 tokens equally likely, where topk takes any; then three of them, far from each other."""
    flat = edited(1000, {})
    for width, expected in (
        (1, [[0, 0, 0]]),
        (2, [[0, 0, 0], [0, 0, 1]]),
        (5, [[3], [0, 3], [0, 0, 0], [0, 0, 1], [0, 0, 2]]),  # the EOS, 3, is the fourth of five at every step
    ):
        (found,) = beam_searches(flat, [[7, 8]], width, 3, EOS)
        check_beams([found], [[(y, -len(y) * math.log(1000)) for y in expected]])
    some = edited(1000, {900: 2.0, 17: 2.0, 400: 2.0})
    for width, longest, expected in (
        (1, 2, [[17, 17]]),
        (2, 2, [[17, 17], [17, 400]]),
        (4, 1, [[17], [400], [900], [0]]),
    ):
        assert [y for y, _ in beam_search(some, [7], width, longest, EOS)] == expected


def test_the_search_ends_when_nothing_can_overtake() -> None:
    """As many forward passes as are needed, though more tokens would be allowed."""
    passes, flat, sure = [], edited(6, {}), edited(6, {EOS: 50.0})
    for model in (flat, sure):
        model.register_forward_hook(lambda *_: passes.append(1))
    for model, eos, width, penalty, expected, needed in (
        (sure, EOS, 1, 0.0, [[EOS]], 1),
        (sure, EOS, 3, 0.0, [[EOS], [0, EOS], [1, EOS]], 2),
        (flat, 0, 2, 0.0, [[0], [1, 0]], 2),
        (sure, EOS, 1, 1.0, [[EOS]], 1),
    ):
        passes.clear()
        assert [y for y, _ in beam_search(model, [1], width, 100, eos, penalty)] == expected
        assert len(passes) == needed


def test_logits_that_are_not_numbers() -> None:
    model = make_lm("llama", 10)
    model.lm_head.bias.data[1] = math.nan
    with pytest.raises(NonFinite, match="not numbers"):
        beam_search(model, [4, 5], 2, 3, EOS)


# ---------------------------------------------------------------- proxy tuning


def test_proxy_tuning() -> None:
    """Eq 14 as it stands; β = 0 is the base, and β = 1 with the reference as the base the proxy, to rounding."""
    base, proxy, ref = (double(2, 3, 50, seed=seed, scale=4).log_softmax(-1) for seed in (1, 2, 3))
    for beta in (0.3, 1.0, 2.5):
        product = base.exp() * (proxy.exp() / ref.exp()) ** beta
        found = proxy_logps(base, proxy, ref, beta)
        torch.testing.assert_close(found.exp(), product / product.sum(-1, keepdim=True), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64), rtol=0, atol=1e-13)
    for dtype, exact in ((torch.float64, 1e-14), (torch.float32, 4e-6)):
        base, proxy, ref = (x.to(dtype) for x in (base, proxy, ref))
        torch.testing.assert_close(proxy_logps(base, proxy, ref, 0.0), base, rtol=0, atol=exact)
        torch.testing.assert_close(proxy_logps(ref, proxy, ref, 1.0), proxy, rtol=0, atol=exact)
    assert (base - proxy).abs().max() > 1


# ---------------------------------------------------------------- the program


LONGEST, KEPT = 16, [0, 1, 3, 4, 5, 6, 7]  # of eight prompts, the third has no room for that many more
SETTINGS = {**OPTIONS, "beta": BETA, "eval_every": 3, "max_prompt_length": 511}
DECODING = dict(beam_widths="1,3", num_prompts=8, max_new_tokens=LONGEST)


def launch(folder: Path, script: str, name: str, processes: int = 1, **options: object) -> None:
    """One run over this file's rows, into `name`."""
    data = dict(model=folder / "model", train_data=folder / "pairs.jsonl", eval_data=folder / "held_out.jsonl")
    tiny.run(script, folder / name, processes, **{**data, **SETTINGS, **options})


@pytest.fixture(scope="module")
def alone(folder: Path) -> None:
    """A run of one process, in the folder of this name."""
    launch(folder, SCRIPT, "alone", **DECODING)


def agree(folder: Path, name: str, other: str, keys: set[str], later: float) -> None:
    """Metrics of two runs, step by step and at the evaluation: to 1e-6 at step one, to `later` after."""
    ours, theirs = (tiny.read_jsonl(folder / run / "metrics.jsonl") for run in (name, other))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 3]
    assert len({line["loss"] for line in ours[:3]}) == 3
    for line, wanted in zip(ours, theirs, strict=True):
        for key in wanted.keys() & (keys | {f"eval/{key}" for key in keys}):
            slack = 0 if key.endswith(("loss", "grad_norm")) else 1e-4  # sums of hundreds of nats
            tolerance = 1e-6 if line["step"] == 1 else later
            assert line[key] == pytest.approx(wanted[key], rel=tolerance, abs=slack), (line["step"], key)


def test_a_run_is_dpo_s_run(folder: Path, alone: None) -> None:
    launch(folder, "algos/dpo.py", "dpo")
    agree(folder, "alone", "dpo", {"loss", "grad_norm", *ALL_METRICS}, 1e-6)


def test_what_is_decoded(folder: Path, alone: None) -> None:
    """beams.jsonl against transformers' searches with the exported model, prompt by prompt in the file's order."""
    model, tokenizer = (auto.from_pretrained(folder / "alone") for auto in (AutoModelForCausalLM, AutoTokenizer))
    exact, held_out = reference.load_model(folder / "alone"), tiny.read_jsonl(folder / "held_out.jsonl")
    prompts = [tokenizer(row["prompt"]).input_ids for row in held_out]
    assert 512 - LONGEST < len(prompts[2]) < 512 and len(prompts) == 10
    rows, prompts = tiny.read_jsonl(folder / "alone" / "beams.jsonl"), [prompts[i] for i in KEPT]
    assert [row["prompt"] for row in rows] == [held_out[i]["prompt"] for i in KEPT]
    assert [row["widths"] for row in rows] == [[1, 3]] * len(KEPT)
    eos = tokenizer.eos_token_id
    for i, width in enumerate((1, 3)):
        best = [beams[0][0] for beams in generate(model, prompts, width, LONGEST, eos=eos)]
        for row, prompt, ids in zip(rows, prompts, best, strict=True):
            assert row["completions"][i] == tokenizer.decode(ids, skip_special_tokens=True)
            assert (row["finished"][i], row["lengths"][i]) == (ids[-1] == eos, len(ids))
            with torch.no_grad():
                logp = float(reference.token_logps(exact, prompt, ids).sum())
            assert row["logps"][i] == pytest.approx(logp, abs=1e-4)
    assert {end for row in rows for end in row["finished"]} == {True, False}
    assert any(row["completions"][0] != row["completions"][1] for row in rows)
    for row, example in zip(rows, parse(str(folder / "alone" / "beams.jsonl"), Counter()), strict=True):
        assert (example.prompt, list(example.completions)) == (row["prompt"], row["completions"])
        assert list(example.ended) == row["finished"]


def test_two_processes(folder: Path, alone: None) -> None:
    """Seven prompts on two processes, several micro-batches each."""
    launch(folder, SCRIPT, "two", processes=2, micro_batch_tokens=200, **DECODING)
    agree(folder, "two", "alone", {"loss", "grad_norm", *ALL_METRICS, *TOKEN_METRICS}, 1e-4)
    ours, theirs = (tiny.read_jsonl(folder / name / "beams.jsonl") for name in ("two", "alone"))
    for row, other in zip(ours, theirs, strict=True):
        assert row.pop("logps") == pytest.approx(other.pop("logps"), abs=1e-3)
        assert row == other


@pytest.mark.parametrize("widths", ["1,0", "", "1,,2", "1,2,", "-1", "2.5", "1, 2", "five"])
def test_widths_that_are_none(widths: str) -> None:
    with pytest.raises(UserError, match=f"--beam-widths {widths}: must be numbers above 0"):
        held_out_prompts(None, None, SimpleNamespace(beam_widths=widths))
    assert held_out_prompts(None, None, SimpleNamespace(beam_widths="1,20,5")) == {}


def test_a_mistake_ends_in_one_line_and_exit_code_2(folder: Path) -> None:
    options = dict(model=folder / "model", train_data=folder / "pairs.jsonl", beam_widths="1,0")
    process = tiny.start(SCRIPT, folder / "mistake", **options)
    assert process.wait(timeout=120) == 2
    *before, line = Path(f"{folder / 'mistake'}.log").read_text(encoding="utf-8").splitlines()
    assert not any("Traceback" in other for other in before)
    assert "--beam-widths 1,0: must be numbers above 0" in line
    assert not (folder / "mistake" / "metrics.jsonl").exists()


def test_no_room_for_new_tokens_ends_before_training(folder: Path) -> None:
    options = dict(model=folder / "model", train_data=folder / "pairs.jsonl", eval_data=folder / "held_out.jsonl")
    process = tiny.start(SCRIPT, folder / "full", max_new_tokens=512, **options)
    assert process.wait(timeout=120) == 2
    log = Path(f"{folder / 'full'}.log").read_text(encoding="utf-8")
    assert "--max-new-tokens 512: no prompt of --eval-data leaves room" in log and "Traceback" not in log
    assert not (folder / "full" / "metrics.jsonl").exists()
