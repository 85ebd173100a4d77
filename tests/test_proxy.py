"""Proxy tuning: Eq 14 at every token against float64 without a cache, its limits, torchrun, resumption, mistakes."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import reference
import tiny
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from scripts import proxy, sample
from scripts.lab import notices, row_files
from scripts.lab.sampling import Sampling, Steering, load_proxies, load_sampler, sample_completions
from scripts.lab.statistics import mean_and_interval
from shared import UserError
from shared.command import check_arguments

EOS_IDS = list(range(1, 400, 9))  # the EOS and many more, so that completions end at different lengths
VOCAB = 400  # tokens of the tokenizer
PADDED_VOCAB = 416  # embeddings of the padded models
BETA = 2.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A larger base, and small proxies of another architecture, whose positions are absolute."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str, *model, eos_ids=EOS_IDS, **config) -> str:
        tiny.make_model(folder / name, *model, initializer_range=0.2, **config)
        GenerationConfig(eos_token_id=eos_ids).save_pretrained(folder / name)
        return str(folder / name)

    return {
        "base": make("base", hidden_size=48, num_hidden_layers=3),
        "padded base": make("padded_base", hidden_size=48, vocab_size=PADDED_VOCAB),
        "proxy": make("proxy", "gpt2", seed=1),
        "reference": make("reference", "gpt2", seed=2),
        "padded proxy": make("padded_proxy", "gpt2", seed=1, vocab_size=PADDED_VOCAB),
        "few ends": make("few_ends", "gpt2", seed=3, eos_ids=[1]),
        "short": make("short", "gpt2", seed=4, n_positions=48),
        "stranger": make("stranger", "gpt2", 380, seed=5),
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with prompts of many lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tiny.make_rows(12, seed=3, path=path)
    return path


def run(model: str, rows: Path, output: Path, **options) -> list[dict]:
    """The rows that sampling writes, in the place of earlier ones."""
    output.unlink(missing_ok=True)
    defaults = {"num_completions": 3, "max_new_tokens": 16, "batch_size": 16}
    args = sample.Args(model=model, rows=str(rows), output=output, **{**defaults, **options})
    sample.main(args)
    return tiny.read_jsonl(output)


def steering(proxy_path: str, reference_path: str, beta: float) -> dict:
    """The options that steer."""
    return {"proxy": proxy_path, "proxy_reference": reference_path, "beta": beta}


# ---------------------------------------------------------------- values


class Recorder(Steering):
    """Keeps every step's tokens and log-probs."""

    steps: list[tuple[list[list[int]], Tensor]] = []

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        logps = super().__call__(input_ids, logits)
        self.steps.append((input_ids.tolist(), logps.double()))
        return logps


def stock_logps(model, ids: list[int], penalty: float = 1.0) -> Tensor:
    """log π(·|ids) over the tokenizer's tokens by the stock model, in one forward pass over all ids."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1, :VOCAB]
    for token in set(ids):
        if logits[token] > 0:
            logits[token] /= penalty
        else:
            logits[token] *= penalty
    return logits.log_softmax(-1)


def tokenised_prompts(tokenizer) -> list[list[int]]:
    """Prompts of different lengths, in the order in which a batch holds them."""
    prompts = [tokenizer(row["prompt"]).input_ids for row in tiny.make_rows(8, seed=5)]
    assert len({len(ids) for ids in prompts}) > 5
    return sorted(prompts, key=len, reverse=True)


@pytest.mark.parametrize(
    ("base", "proxy_name", "beta", "penalty"),
    [("base", "proxy", 0.7, 1.0), ("base", "padded proxy", 2.0, 1.0), ("padded base", "proxy", 1.0, 1.5)],
)
def test_every_token_is_sampled_from_equation_14(base, proxy_name, beta, penalty, models, monkeypatch) -> None:
    """Prompts of different lengths are in one batch, and rows go on beside rows that have ended."""
    monkeypatch.setattr(Recorder, "steps", [])
    paths = [models[base], models[proxy_name], models["reference"]]
    policy, tokenizer, eos_ids = load_sampler(paths[0], "float32")
    pair, proxy_eos_ids = load_proxies(paths[1], paths[2], "float32", tokenizer)
    assert eos_ids == EOS_IDS
    assert proxy_eos_ids == set(EOS_IDS)

    prompts = tokenised_prompts(tokenizer)
    sampling = Sampling(max_new_tokens=12, repetition_penalty=penalty)
    steer = partial(Recorder, pair, beta)
    completions = [ids for (ids,) in sample_completions(policy, eos_ids, prompts, 1, sampling, steer=steer)]
    assert len(Recorder.steps) == 12
    assert min(map(len, completions)) < 6

    large, small, ref = (reference.load_model(path) for path in paths)
    for row, step, so_far, token in states(prompts, completions):
        ids, logps = Recorder.steps[step]
        padding = len(ids[row]) - len(so_far)
        assert ids[row][padding:] == so_far

        ratio = stock_logps(small, so_far) - stock_logps(ref, so_far)
        expected = (stock_logps(large, so_far, penalty) + beta * ratio).log_softmax(-1)
        torch.testing.assert_close(logps[row, :VOCAB], expected, rtol=0, atol=3e-5)
        assert torch.isfinite(logps[row, token])
        assert torch.isneginf(logps[row, VOCAB:]).all()
    assert logps.shape[1] == {"base": VOCAB, "padded base": PADDED_VOCAB}[base]


def states(prompts: list[list[int]], completions: list[list[int]]) -> Iterator[tuple[int, int, list[int], int]]:
    """Row, step, the ids so far and the next one, at every token of the completions."""
    for row, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
        for step, token in enumerate(ids):
            yield row, step, prompt + ids[:step], token


WAYS = {"sampled": {}, "greedy": {"top_k": 1}, "warped": {"temperature": 0.6, "top_k": 20, "top_p": 0.8}}
FORMS = {"completions": {}, "reference samples": {"num_completions": None, "reference_samples": 2}}


@pytest.fixture(params=WAYS)
def ways(request: pytest.FixtureRequest) -> list[dict]:
    """The options of one way to sample, in both forms of output."""
    return [{**WAYS[request.param], **form} for form in FORMS.values()]


def check_same(written: list[dict], expected: list[dict]) -> None:
    """Equal rows, whose log-probs may differ by rounding."""
    for row, expected_row in zip(written, expected, strict=True):
        logps = expected_row.get("logps", [])
        assert row.pop("logps", []) == pytest.approx(logps, rel=1e-5, abs=1e-5)
        assert row == {name: value for name, value in expected_row.items() if name != "logps"}


def test_beta_0_is_the_base(ways, models, rows, tmp_path) -> None:
    pair = (models["proxy"], models["reference"])
    for options in ways:
        expected = run(models["base"], rows, tmp_path / "base", **options)
        steered = run(models["base"], rows, tmp_path / "steered", **steering(*pair, 0.0), **options)
        other = run(models["base"], rows, tmp_path / "other", **steering(*pair, 0.5), **options)
        check_same(steered, expected)
        assert other != expected


def test_steering_its_own_reference_by_1_is_the_proxy(ways, models, rows, tmp_path) -> None:
    """The base's own directory knows fewer EOS ids: a completion ends where the proxy's does."""
    base = models["few ends"]
    for options in ways:
        expected = run(models["proxy"], rows, tmp_path / "proxy", **options)
        steered = run(base, rows, tmp_path / "steered", **steering(models["proxy"], base, 1.0), **options)
        check_same(steered, expected)


def test_prompts_must_leave_room_in_the_smallest_model(models, rows, tmp_path) -> None:
    options = steering(models["short"], models["reference"], 1.0)
    written = run(models["base"], rows, tmp_path / "out", **options)

    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    prompts = [row["prompt"] for row in tiny.read_jsonl(rows)]
    fitting = [prompt for prompt in prompts if len(tokenizer(prompt).input_ids) + 16 <= 48]
    assert [row["prompt"] for row in written] == fitting
    assert 0 < len(fitting) < len(prompts)


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_two_processes_write_the_same_rows(models, rows, tmp_path) -> None:
    options = {"batch_size": 4, **steering(models["proxy"], models["reference"], BETA)}
    run(models["base"], rows, tmp_path / "single", **options)

    options |= {"model": models["base"], "rows": rows, "output": tmp_path / "two"}
    options |= {"num_completions": 3, "max_new_tokens": 16}
    line = tiny.command("scripts/sample.py", 2, options)
    done = subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(tmp_path), timeout=120)
    assert done.returncode == 0
    assert (tmp_path / "two").read_bytes() == (tmp_path / "single").read_bytes()


@pytest.fixture
def interrupted(models, rows, tmp_path, monkeypatch) -> dict:
    """The options of a run that was killed before its output was complete; its proxy is a directory of its own."""
    proxy_path = shutil.copytree(models["proxy"], tmp_path / "proxy")
    options = steering(str(proxy_path), models["reference"], BETA)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_files, "_join_parts", interrupt)
        run(models["base"], rows, tmp_path / "out", **options)
    return options


def test_an_interrupted_run_continues(interrupted, models, rows, tmp_path) -> None:
    expected = run(models["base"], rows, tmp_path / "whole", **interrupted)
    assert run(models["base"], rows, tmp_path / "out", **interrupted) == expected


def test_an_interrupted_run_continues_with_the_same_proxy_only(interrupted, models, rows, tmp_path) -> None:
    unsteered = {"proxy": None, "proxy_reference": None, "beta": None}
    changes = {
        "proxy '.*/proxy' → '.*/padded_proxy'": {"proxy": models["padded proxy"]},
        "proxy_reference '.*/reference' → '.*/few_ends'": {"proxy_reference": models["few ends"]},
        "beta 2.0 → 1.0": {"beta": 1.0},
        "proxy '.*' → None": unsteered,
    }
    for message, change in changes.items():
        with pytest.raises(UserError, match=f"was started with other settings .*{message}"):
            run(models["base"], rows, tmp_path / "out", **{**interrupted, **change})

    os.utime(tmp_path / "proxy" / "model.safetensors")  # as if trained again
    with pytest.raises(UserError, match="was started with other settings .*model files"):
        run(models["base"], rows, tmp_path / "out", **interrupted)


@pytest.mark.parametrize(
    "given",
    [
        ("proxy",),
        ("proxy_reference",),
        ("beta",),
        ("proxy", "proxy_reference"),
        ("proxy", "beta"),
        ("proxy_reference", "beta"),
    ],
)
def test_flags_go_together(given, models, rows, tmp_path) -> None:
    options = steering(models["proxy"], models["reference"], 0.0)
    with pytest.raises(UserError, match="--proxy, --proxy-reference and --beta go together"):
        run(models["base"], rows, tmp_path / "out", **{name: options[name] for name in given})


@pytest.mark.parametrize(
    ("proxy_name", "reference_name", "message"),
    [
        ("stranger", "reference", "^--proxy .*/stranger: has another tokenizer"),
        ("proxy", "stranger", "^--proxy-reference .*/stranger: has another tokenizer"),
        ("proxy", "/no/such/directory", "/no/such/directory: no such file or directory"),
    ],
)
def test_another_vocabulary_is_refused(proxy_name, reference_name, message, models, rows, tmp_path) -> None:
    reference_path = models.get(reference_name, reference_name)
    options = steering(models[proxy_name], reference_path, 1.0)
    with pytest.raises(UserError, match=message):
        run(models["base"], rows, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_beta_may_be_0_but_not_below() -> None:
    args = sample.Args(model="m", rows="r", output=Path("o"), beta=0.0)
    check_arguments(args)
    for beta in (-0.5, float("inf"), float("nan")):
        args.beta = beta
        with pytest.raises(UserError, match="--beta .*: must be a finite number of at least 0"):
            check_arguments(args)


# ---------------------------------------------------------------- scripts/proxy.py


@pytest.fixture
def sweep_args(tmp_path: Path) -> proxy.Args:
    """A sweep over β on notices; the policy is the proxy's reference."""
    tokenizer = notices.make_tokenizer()
    for name, seed in (("base", 0), ("tuned", 9)):
        tokenizer.save_pretrained(tmp_path / name)
        notices.make_model(tokenizer, seed).save_pretrained(tmp_path / name)

    return proxy.Args(
        model=str(tmp_path / "base"),
        proxy=str(tmp_path / "tuned"),
        proxy_reference=str(tmp_path / "base"),
        betas=(0.0, 1.0, 1.5),
        rows=str(write_prompts(tmp_path / "prompts.jsonl", 10)),
        output=tmp_path / "proxy.json",
        num_prompts=8,
        max_new_tokens=12,
    )


def write_prompts(path: Path, n: int) -> Path:
    stream = notices.unique_notices(random.Random(0))
    return tiny.write_jsonl(path, [{"prompt": next(stream)[0]} for _ in range(n)])


def numbers_of_samples(directory: str, prompts: list[str]) -> dict[str, dict]:
    """Reward and length of what the policy in `directory` writes by itself, two samples per prompt."""
    policy, tokenizer, eos_ids = load_sampler(directory, "float32")
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    rewards = []
    lengths = []
    completions = sample_completions(policy, eos_ids, encoded, 2, Sampling(max_new_tokens=12))
    for prompt, (first, second) in zip(prompts, completions, strict=True):
        reward = notices.oracle(prompt, tokenizer.decode(first, skip_special_tokens=True))
        reward += notices.oracle(prompt, tokenizer.decode(second, skip_special_tokens=True))
        rewards.append(reward / 2)
        lengths.append((len(first) + len(second)) / 2)

    numbers = {"reward": rewards, "length": lengths}
    return {name: mean_and_interval(torch.tensor(values), seed=0) for name, values in numbers.items()}


def test_sweep_over_beta(sweep_args: proxy.Args, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """β = 0 has the rewards of the policy's own samples; steering the reference by 1 gives the proxy's."""
    proxy.main(sweep_args)
    results = json.loads(sweep_args.output.read_text(encoding="utf-8"))
    policies = {policy.pop("policy"): policy for policy in results["policies"]}
    assert list(policies) == ["β = 0", "β = 1", "β = 1.5", "proxy by itself"]

    prompts = [row["prompt"] for row in tiny.read_jsonl(sweep_args.rows)[:8]]
    own = numbers_of_samples(sweep_args.model, prompts)
    tuned = numbers_of_samples(sweep_args.proxy, prompts)
    for measure in ("reward", "length"):
        for name, expected in (("β = 0", own), ("β = 1", tuned), ("proxy by itself", tuned)):
            number = policies[name][measure]
            assert number["mean"] == pytest.approx(expected[measure]["mean"])
            assert number["interval"] == list(expected[measure]["interval"])
    assert policies["β = 0"] != policies["β = 1"]
    assert policies["β = 1.5"] != policies["β = 1"]

    reward = policies["β = 1.5"]["reward"]
    low, high = reward["interval"]
    assert f"| β = 1.5 | {reward['mean']:.2f} [{low:.2f}, {high:.2f}] | " in capsys.readouterr().out
    assert (tmp_path / "proxy.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.tmp"))


def test_betas_must_not_be_negative(sweep_args: proxy.Args) -> None:
    sweep_args.betas = (1.0, -1.0)
    with pytest.raises(UserError, match="--betas 1.0 -1.0: must be finite numbers of at least 0"):
        proxy.main(sweep_args)
