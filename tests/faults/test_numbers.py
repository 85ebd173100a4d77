"""Determinism, values that are not finite, and which rows count for how much (faults 27-33)."""

import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import harness
import hooks
import pytest
import reference
import torch
import worlds
from conftest import ALGORITHMS
from harness import checkpoints, close, lines, refused, run, same, start
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

fault, slow = pytest.mark.fault, pytest.mark.slow
every_algorithm = pytest.mark.parametrize(
    "algorithm", [pytest.param(name, marks=[slow] * (name != "dpo")) for name in ALGORITHMS]
)
SPREAD = {True: 1e-6, False: 1e-5}  # of dpo's losses, and of those that change more along a log-prob


@fault(27)
@every_algorithm
def test_the_same_seed_twice(world: dict, through_of: Callable[..., Path], tmp_path: Path, algorithm: str) -> None:
    run(tmp_path / "out", script=f"algos/{algorithm}.py", **world)
    same(tmp_path / "out", through_of(algorithm, 1))


@fault(28)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_and_two_ranks(through_of: Callable[..., Path], algorithm: str) -> None:
    close(through_of(algorithm, 2), through_of(algorithm, 1), SPREAD[algorithm == "dpo"])


@fault(29)
@every_algorithm
def test_one_and_many_micro_batches(
    world: dict, through_of: Callable[..., Path], tmp_path: Path, algorithm: str
) -> None:
    run(tmp_path / "out", script=f"algos/{algorithm}.py", micro_batch_tokens=64, **world)
    close(tmp_path / "out", through_of(algorithm, 1), SPREAD[algorithm == "dpo"])


@fault(30)
@pytest.mark.parametrize("processes", [2, pytest.param(1, marks=slow), pytest.param(3, marks=slow)])
def test_every_row_counts_once(world: dict, tmp_path: Path, processes: int) -> None:
    """61 rows in batches of 8: each step's mean log-prob and gradient norm is that of its own rows, 5 in the last.

    Against stock transformers in float64. Nothing is learnt at a rate of 0, so that every loss is ln 2 and its
    gradient β/2 (∇ log π(y_l) - ∇ log π(y_w)).
    """
    out, path = tmp_path / "out", tmp_path / "rows.jsonl"
    rows = worlds.make_rows(61, 9, path=path, prompt_words=(1, 12), completion_words=(1, 8))
    options = {**world, "train_data": path, "learning_rate": 0, "shuffle": False, "max_steps": 8, "save_every": 0}
    run(out, processes=processes, **options)
    model, tokenizer = reference.load_model(world["model"]), AutoTokenizer.from_pretrained(world["model"])
    for i, line in enumerate(lines(out)):
        batch = rows[8 * i : 8 * i + 8]
        groups = [reference.encode(tokenizer, row) for row in batch]
        logps = [torch.stack([reference.token_logps(model, g.prompt, y).sum() for y in g.completions]) for g in groups]
        chosen, rejected = torch.stack(logps).mean(0).unbind()
        gradients = torch.autograd.grad(0.1 / 2 * (rejected - chosen), list(model.parameters()))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert line["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert line["logps/chosen"] == pytest.approx(chosen.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4), (i, len(batch))
    assert i == 7 and len(batch) == 5


@fault(31)
@pytest.mark.parametrize(
    "algorithm, tensor, value",
    [
        ("dpo", "model.layers.1.mlp.up_proj.weight", math.nan),
        pytest.param("dpo", "model.norm.weight", math.inf, marks=slow),
        pytest.param("sft", "model.embed_tokens.weight", -math.inf, marks=slow),
        pytest.param("rm", "model.layers.0.self_attn.q_proj.weight", math.nan, marks=slow),
    ],
)
def test_a_base_model_with_a_value_that_is_not_finite(
    world: dict, tmp_path: Path, algorithm: str, tensor: str, value: float
) -> None:
    model = shutil.copytree(world["model"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights[tensor].view(-1)[3] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "out", str(model), tensor, script=f"algos/{algorithm}.py", **{**world, "model": model})


def not_finite(process: harness.Started, step: int) -> list[int]:
    """The rows that a run names which ended before it took a step; the checkpoint of the step before is all there."""
    assert process.end() == 3 and "Traceback" not in process.log, process.log[-3000:]
    harness.check_message(process, f"step {step}")
    assert (process.status["state"], process.status["step"]) == ("not finite", step - 1)
    assert f"step {step}" in process.status["reason"]
    assert checkpoints(process.out) == [f"step-{step - 1:06d}"] and len(lines(process.out)) == step - 1
    assert not (process.out / "config.json").exists()
    return [int(n) for n in re.findall(r"\d+", re.search(r"rows? ([\d, \[\]]+)", process.status["reason"])[1])]


@fault(32)
@every_algorithm
def test_a_loss_that_is_not_finite(world: dict, tmp_path: Path, algorithm: str) -> None:
    """The first update is too large to compute with: all rows of the second step are named, and the rank."""
    options = {**world, "script": f"algos/{algorithm}.py", "learning_rate": 1e38, "save_every": 1, "keep": 1}
    process = start(tmp_path / "out", shuffle=False, **options)
    assert not_finite(process, 2) == list(range(9, 17))
    harness.check_message(process, "rank 0")


@fault(32)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_one_row_s_loss_is_not_finite(world: dict, tmp_path: Path, processes: int) -> None:
    """Its micro-batch is named, not all of the step, and its rank; without it, the run goes on from the step before."""
    out, options = tmp_path / "out", {**world, "shuffle": False, "keep": 1, "processes": processes}
    options["micro_batch_tokens"] = 128
    process = start(out, hook=functools.partial(hooks.poison, 18, gradient=False), **options)
    assert {18} <= set(not_finite(process, 3)) < set(range(17, 25))
    harness.check_message(process, re.search("poisoned (rank .)", process.log)[1])
    run(out, resume=True, **options)
    run(tmp_path / "through", **options)
    same(out, tmp_path / "through")


@fault(33)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_one_gradient_is_infinite(world: dict, tmp_path: Path, processes: int) -> None:
    """While the loss is finite; the row is among those that are named."""
    out, options = tmp_path / "out", {**world, "shuffle": False, "keep": 1, "processes": processes}
    process = start(out, hook=functools.partial(hooks.poison, 18, gradient=True), **options)
    assert 18 in not_finite(process, 3)
    run(out, resume=True, **options)
    run(tmp_path / "through", **options)
    same(out, tmp_path / "through")


@fault(32)
@slow
def test_an_evaluation_that_is_not_finite(world: dict, tmp_path: Path) -> None:
    """Every line of metrics.jsonl is JSON, which has no NaN."""
    held_out = tmp_path / "held_out.jsonl"
    worlds.make_rows(8, 5, path=held_out, prompt_words=(1, 6), completion_words=(1, 4))
    options = {**world, "learning_rate": 1e38, "eval_data": held_out, "eval_every": 1, "save_every": 0}
    process = start(tmp_path / "out", **options)
    assert process.end() == 3
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
