"""Proxy tuning: Eq 14 at every token against float64 without a cache, its limits, torchrun, resumption, mistakes."""

import json
import os
import shutil
import subprocess
from functools import partial

import evaluate
import notices
import proxy
import pytest
import reference
import sample
import streaming
import torch
import worlds
from transformers import AutoTokenizer, GenerationConfig

from shared import UserError
from shared.run import check_arguments

ENDS = list(range(1, 400, 9))  # the EOS and many more, so that completions end at different lengths
PADDED = 416  # embeddings for the tokenizer's 400 tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A larger base, and small proxies of another architecture, whose positions are absolute."""
    path = tmp_path_factory.mktemp("models")

    def make(name, *how, ends=ENDS, **more):
        worlds.make_model(path / name, *how, initializer_range=0.2, **more)
        GenerationConfig(eos_token_id=ends).save_pretrained(path / name)
        return str(path / name)

    return {
        "base": make("base", hidden_size=48, num_hidden_layers=3),
        "padded base": make("padded_base", hidden_size=48, vocab_size=PADDED),
        "proxy": make("proxy", "gpt2", seed=1),
        "reference": make("reference", "gpt2", seed=2),
        "padded proxy": make("padded_proxy", "gpt2", seed=1, vocab_size=PADDED),
        "few ends": make("few_ends", "gpt2", seed=3, ends=[1]),
        "short": make("short", "gpt2", seed=4, n_positions=48),
        "stranger": make("stranger", "gpt2", 380, seed=5),
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Pairs with prompts of many lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    worlds.make_rows(12, seed=3, path=path)
    return path


def run(model, rows, output, pair=(), beta=None, **options):
    """What sampling writes, steered where there is a pair of proxy and reference."""
    proxy = dict(zip(("proxy", "proxy_reference"), pair, strict=False), beta=beta)
    options = {"num_completions": 3, "max_new_tokens": 16, "batch_size": 16, **proxy, **options}
    sample.main(sample.Args(model=model, rows=str(rows), output=output, **options))
    return worlds.read_jsonl(output)


# ---------------------------------------------------------------- values


class Recorder(sample.Steering):
    """Keeps every step's tokens and log-probs."""

    steps: list = []

    def __call__(self, input_ids, logits):
        logps = super().__call__(input_ids, logits)
        self.steps.append((input_ids.tolist(), logps.double()))
        return logps


def exact(model, ids, size, penalty=1.0):
    """log π(·|ids) over the first `size` tokens by the stock model, in one pass over all ids."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1, :size]
    seen = list(set(ids))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("base", "proxy", "beta", "penalty"),
    [("base", "proxy", 0.7, 1.0), ("base", "padded proxy", 2.0, 1.0), ("padded base", "proxy", 1.0, 1.5)],
)
def test_every_token_is_drawn_from_equation_14(base, proxy, beta, penalty, models, monkeypatch):
    """Prompts of different lengths in one batch, rows that go on beside rows that have ended."""
    monkeypatch.setattr(Recorder, "steps", [])
    paths = [models[name] for name in (base, proxy, "reference")]
    policy, tokenizer, ends = sample.load(paths[0], "float32")
    pair, more = sample.load_pair(*paths[1:], "float32", tokenizer)
    assert more == set(ends) == set(ENDS)
    prompts = [tokenizer(row["prompt"]).input_ids for row in worlds.make_rows(8, seed=5)]
    prompts = sorted(prompts, key=len, reverse=True)  # as they stand in the batch
    assert len(set(map(len, prompts))) > 5
    how = sample.Sampling(max_new_tokens=12, repetition_penalty=penalty)
    drawn = [y for (y,) in sample.draw(policy, ends, prompts, 1, how, steer=partial(Recorder, pair, beta))]
    assert len(Recorder.steps) == 12 and min(map(len, drawn)) < 6
    large, small, ref = (reference.load_model(path) for path in paths)
    for row, (prompt, new) in enumerate(zip(prompts, drawn, strict=True)):
        for step in range(len(new)):
            ids, logps = Recorder.steps[step][0][row], Recorder.steps[step][1][row]
            so_far = prompt + new[:step]
            assert ids[len(ids) - len(so_far) :] == so_far and torch.isfinite(logps[new[step]])
            with torch.no_grad():
                ratio = exact(small, so_far, 400) - exact(ref, so_far, 400)
                expected = (exact(large, so_far, 400, penalty) + beta * ratio).log_softmax(-1)
            torch.testing.assert_close(logps[:400], expected, rtol=0, atol=3e-5)
            assert logps[400:].tolist() == [-torch.inf] * (PADDED - 400 if base == "padded base" else 0)


HOW = {"sampled": {}, "greedy": {"top_k": 1}, "warped": {"temperature": 0.6, "top_k": 20, "top_p": 0.8}}


@pytest.mark.parametrize("how", HOW)
def test_beta_0_is_the_base(how, models, rows, tmp_path):
    pair = (models["proxy"], models["reference"])
    for form in ({}, {"num_completions": None, "reference_samples": 2}):
        options = {**HOW[how], **form}
        expected = run(models["base"], rows, tmp_path / "base", **options)
        assert run(models["base"], rows, tmp_path / "steered", pair, 0.0, **options) == expected
        assert run(models["base"], rows, tmp_path / "other", pair, 0.5, **options) != expected


@pytest.mark.parametrize("how", HOW)
def test_steering_its_own_reference_by_1_is_the_proxy(how, models, rows, tmp_path):
    """The base's own directory knows fewer ends: a completion ends where the proxy's does."""
    pair = (models["proxy"], models["few ends"])
    for form in ({}, {"num_completions": None, "reference_samples": 2}):
        options = {**HOW[how], **form}
        expected = run(models["proxy"], rows, tmp_path / "proxy", **options)
        assert run(models["few ends"], rows, tmp_path / "steered", pair, 1.0, **options) == expected


def test_prompts_must_leave_room_in_the_smallest_model(models, rows, tmp_path):
    written = run(models["base"], rows, tmp_path / "out", (models["short"], models["reference"]), 1.0)
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    prompts = [row["prompt"] for row in worlds.read_jsonl(rows)]
    fitting = [prompt for prompt in prompts if len(tokenizer(prompt).input_ids) + 16 <= 48]
    assert [row["prompt"] for row in written] == fitting and 0 < len(fitting) < len(prompts)


# ---------------------------------------------------------------- runs


def test_two_processes_write_the_same_rows(models, rows, tmp_path):
    pair, options = (models["proxy"], models["reference"]), {"batch_size": 4}
    run(models["base"], rows, tmp_path / "one", pair, 2.0, **options)
    words = {"proxy": pair[0], "proxy_reference": pair[1], "beta": 2.0, "num_completions": 3}
    words |= {"model": models["base"], "rows": rows, "output": tmp_path / "two", "max_new_tokens": 16, **options}
    line = worlds.command("scripts/sample.py", 2, words)
    assert subprocess.run(line, cwd=worlds.ROOT, env=worlds.environment(tmp_path), timeout=120).returncode == 0
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def test_an_interrupted_run_continues_with_the_same_proxy_only(models, rows, tmp_path, monkeypatch):
    proxy = shutil.copytree(models["proxy"], tmp_path / "proxy")
    output, pair = tmp_path / "out", (str(proxy), models["reference"])
    expected = run(models["base"], rows, tmp_path / "whole", pair, 2.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(streaming, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(models["base"], rows, output, pair, 2.0)
    others = {
        "proxy '.*/proxy' → '.*/padded_proxy'": ((models["padded proxy"], pair[1]), 2.0),
        "proxy_reference '.*/reference' → '.*/few_ends'": ((pair[0], models["few ends"]), 2.0),
        "beta 2.0 → 1.0": (pair, 1.0),
        "proxy '.*' → None": ((), None),
    }
    for message, (other, beta) in others.items():
        with pytest.raises(UserError, match=f"was started with other settings .*{message}"):
            run(models["base"], rows, output, other, beta)
    weights = proxy / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    os.utime(weights)  # as if trained again
    with pytest.raises(UserError, match="was started with other settings .*model files"):
        run(models["base"], rows, output, pair, 2.0)
    os.utime(weights, ns=times)
    assert run(models["base"], rows, output, pair, 2.0) == expected


@pytest.mark.parametrize("given", [(1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_flags_go_together(given, models, rows, tmp_path):
    whole = (models["proxy"], models["reference"], 0.0)
    *pair, beta = [value if one else None for one, value in zip(given, whole, strict=True)]
    with pytest.raises(UserError, match="--proxy, --proxy-reference and --beta go together"):
        run(models["base"], rows, tmp_path / "out", pair, beta)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("stranger", "reference"), "^--proxy .*/stranger: has another tokenizer"),
        (("proxy", "stranger"), "^--proxy-reference .*/stranger: has another tokenizer"),
        (("proxy", "/no/such/directory"), "/no/such/directory: no such directory"),
    ],
)
def test_another_vocabulary_is_refused(pair, message, models, rows, tmp_path):
    with pytest.raises(UserError, match=message):
        run(models["base"], rows, tmp_path / "out", [models.get(name, name) for name in pair], 1.0)
    assert not list(tmp_path.iterdir())


def test_beta_may_be_0_but_not_below(models):
    def args(beta):
        return sample.Args(model="m", rows="r", output="o", beta=beta)

    check_arguments(args(0.0))
    for beta in (-0.5, float("inf"), float("nan")):
        with pytest.raises(UserError, match="--beta .*: must be a finite number of at least 0"):
            check_arguments(args(beta))


# ---------------------------------------------------------------- scripts/proxy.py


def test_sweep_over_beta(tmp_path, capsys):
    """β = 0 has the rewards of the policy's own samples; steering the reference by 1 gives the proxy's."""
    notices.world(tmp_path, sft_rows=1, prompt_rows=1, held_out_rows=10)
    base, tuned, rows = str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "held_out.jsonl"
    tokenizer = notices.make_tokenizer()
    for part in (tokenizer, notices.make_model(tokenizer, seed=9)):
        part.save_pretrained(tuned)
    options = {"model": base, "proxy": tuned, "proxy_reference": base, "rows": str(rows), "max_new_tokens": 12}
    args = proxy.Args(**options, betas=(0.0, 1.0, 1.5), output=tmp_path / "proxy.json", num_prompts=8)
    proxy.main(args)
    found = json.loads(args.output.read_text(encoding="utf-8"))["policies"]
    assert [one.pop("policy") for one in found] == ["β = 0", "β = 1", "β = 1.5", "proxy by itself"]
    prompts = [row["prompt"] for row in worlds.read_jsonl(rows)[:8]]
    for one, directory in ((found[0], base), (found[1], tuned), (found[3], tuned)):
        policy, _, ends = sample.load(directory, "float32")
        encoded = [tokenizer(x).input_ids for x in prompts]
        drawn = list(sample.draw(policy, ends, encoded, 2, sample.Sampling(max_new_tokens=12)))
        rewards = [
            notices.oracle(x, sample.decode(tokenizer, y)) for x, ys in zip(prompts, drawn, strict=True) for y in ys
        ]
        assert one["reward"]["mean"] == pytest.approx(sum(rewards) / 16)
        by_prompt = torch.tensor([(a + b) / 2 for a, b in zip(rewards[::2], rewards[1::2], strict=True)])
        assert one["reward"]["interval"] == list(evaluate.bootstrap(by_prompt, seed=0))
        assert one["length"]["mean"] == pytest.approx(sum(len(y) for ys in drawn for y in ys) / 16)
    assert found[0] != found[1] == found[3] != found[2]
    low, high = found[2]["reward"]["interval"]
    assert f"| β = 1.5 | {found[2]['reward']['mean']:.2f} [{low:.2f}, {high:.2f}] | " in capsys.readouterr().out
    assert (tmp_path / "proxy.png").read_bytes()[:4] == b"\x89PNG" and not list(tmp_path.glob("*.tmp"))
    args.betas = (1.0, -1.0)
    with pytest.raises(UserError, match="--betas 1.0 -1.0: must be finite numbers of at least 0"):
        proxy.main(args)
