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
import tiny
import torch
from harness import checkpoints, close, lines, refused, run, same, start
from marks import ALGORITHMS, every_algorithm, fault, slow
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

Undisturbed = Callable[[str, int], Path]  # algorithm, number of processes → the output directory of its run
on_one_and_two_processes = pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])


def tolerance(algorithm: str) -> float:
    """The relative differences of losses that another order of sums may make."""
    if algorithm == "dpo":
        return 1e-6
    return 1e-5  # these losses change more along a log-prob


@fault(27)
@every_algorithm
def test_the_same_seed_twice(run_options: dict, through_of: Undisturbed, tmp_path: Path, algorithm: str) -> None:
    run(tmp_path / "out", script=f"algos/{algorithm}.py", **run_options)
    same(tmp_path / "out", through_of(algorithm, 1))


@fault(28)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_and_two_ranks(through_of: Undisturbed, algorithm: str) -> None:
    close(through_of(algorithm, 2), through_of(algorithm, 1), tolerance(algorithm))


@fault(29)
@every_algorithm
def test_one_and_many_micro_batches(run_options: dict, through_of: Undisturbed, tmp_path: Path, algorithm: str) -> None:
    run(tmp_path / "out", script=f"algos/{algorithm}.py", micro_batch_tokens=64, **run_options)
    close(tmp_path / "out", through_of(algorithm, 1), tolerance(algorithm))


# ---------------------------------------------------------------- which rows count


def mean_logps(model: nn.Module, groups: list[reference.Group]) -> Tensor:
    """(2,), log π of the chosen and the rejected completion, by stock transformers in float64."""
    logps = []
    for group in groups:
        for completion in group.completions:
            logps.append(reference.token_logps(model, group.prompt, completion).sum())
    return torch.stack(logps).view(len(groups), 2).mean(0)


def gradient_norm(model: nn.Module, value: Tensor) -> float:
    gradients = torch.autograd.grad(value, list(model.parameters()))
    squares = [gradient.square().sum() for gradient in gradients]
    return math.sqrt(sum(squares))


@fault(30)
@pytest.mark.parametrize("processes", [2, pytest.param(1, marks=slow), pytest.param(3, marks=slow)])
def test_every_row_counts_once(run_options: dict, tmp_path: Path, processes: int) -> None:
    """61 rows in batches of 8: each step's mean log-prob and gradient norm is that of its own rows, 5 in the last.

    Nothing is learnt at a rate of 0, so that every loss is ln 2 and its gradient β/2 (∇ log π(y_l) - ∇ log π(y_w)).
    """
    path = tmp_path / "rows.jsonl"
    rows = tiny.make_rows(61, 9, path=path, prompt_words=(1, 12), completion_words=(1, 8))
    options = {**run_options, "train_data": path, "learning_rate": 0, "shuffle": False, "max_steps": 8, "save_every": 0}
    run(tmp_path / "out", processes=processes, **options)
    steps = lines(tmp_path / "out")
    assert len(steps) == 8

    model = reference.load_model(run_options["model"])
    tokenizer = AutoTokenizer.from_pretrained(run_options["model"])
    groups = [reference.encode(tokenizer, row) for row in rows]
    for index, step in enumerate(steps):
        start_of_batch = 8 * index
        batch = groups[start_of_batch : start_of_batch + 8]
        chosen, rejected = mean_logps(model, batch)
        norm = gradient_norm(model, 0.1 / 2 * (rejected - chosen))
        assert step["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert step["logps/chosen"] == pytest.approx(chosen.item(), rel=1e-5)
        assert step["grad_norm"] == pytest.approx(norm, rel=1e-4), (index, len(batch))
    assert len(batch) == 5


# ---------------------------------------------------------------- values that are not finite


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
    run_options: dict, tmp_path: Path, algorithm: str, tensor: str, value: float
) -> None:
    model = shutil.copytree(run_options["model"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights[tensor].view(-1)[3] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    options = {**run_options, "model": model, "script": f"algos/{algorithm}.py"}
    refused(tmp_path / "out", str(model), tensor, **options)


def assert_not_finite(process: harness.Started, step: int) -> None:
    """The run ended before it took a step; the checkpoint of the step before is all there."""
    assert process.end() == 3, process.log[-3000:]
    assert "Traceback" not in process.log, process.log[-3000:]
    harness.check_message(process, f"step {step}")
    assert process.status["state"] == "not finite"
    assert process.status["step"] == step - 1
    assert f"step {step}" in process.status["reason"]
    assert checkpoints(process.out) == [f"step-{step - 1:06d}"]
    assert len(lines(process.out)) == step - 1
    assert not (process.out / "config.json").exists()


def rows_to_blame(process: harness.Started) -> list[int]:
    """The rows that status.json names."""
    match = re.search(r"rows? ([\d, \[\]]+)", process.status["reason"])
    assert match is not None, process.status
    return [int(number) for number in re.findall(r"\d+", match[1])]


@fault(32)
@every_algorithm
def test_a_loss_that_is_not_finite(run_options: dict, tmp_path: Path, algorithm: str) -> None:
    """The first update is too large to compute with: all rows of the second step are named, and the rank."""
    options = {**run_options, "script": f"algos/{algorithm}.py", "learning_rate": 1e38, "save_every": 1, "keep": 1}
    process = start(tmp_path / "out", shuffle=False, **options)
    assert_not_finite(process, step=2)
    assert rows_to_blame(process) == list(range(9, 17))
    harness.check_message(process, "rank 0")


@pytest.fixture
def unshuffled(run_options: dict) -> dict:
    """Options of a run that takes row 18 at its third step, with rows 17 to 24."""
    return {**run_options, "shuffle": False, "keep": 1}


def assert_resumes_as_if_nothing_had_happened(out: Path, through: Path, **options: object) -> None:
    run(out, resume=True, **options)
    run(through, **options)
    same(out, through)


@fault(32)
@on_one_and_two_processes
def test_one_row_s_loss_is_not_finite(unshuffled: dict, tmp_path: Path, processes: int) -> None:
    """Its micro-batch is named, not all of the step, and its rank; without it, the run goes on from the step before."""
    out = tmp_path / "out"
    options = {**unshuffled, "processes": processes, "micro_batch_tokens": 128}
    process = start(out, hook=functools.partial(hooks.poison, 18, gradient=False), **options)
    assert_not_finite(process, step=3)

    rows = set(rows_to_blame(process))
    assert 18 in rows
    assert rows < set(range(17, 25))
    poisoned_rank = re.search("poisoned (rank .)", process.log)
    assert poisoned_rank is not None
    harness.check_message(process, poisoned_rank[1])
    assert_resumes_as_if_nothing_had_happened(out, tmp_path / "through", **options)


@fault(33)
@on_one_and_two_processes
def test_one_gradient_is_infinite(unshuffled: dict, tmp_path: Path, processes: int) -> None:
    """While the loss is finite; the row is among those that are named."""
    out = tmp_path / "out"
    options = {**unshuffled, "processes": processes}
    process = start(out, hook=functools.partial(hooks.poison, 18, gradient=True), **options)
    assert_not_finite(process, step=3)
    assert 18 in rows_to_blame(process)
    assert_resumes_as_if_nothing_had_happened(out, tmp_path / "through", **options)


@fault(32)
@slow
def test_an_evaluation_that_is_not_finite(run_options: dict, tmp_path: Path) -> None:
    """Every line of metrics.jsonl is JSON, which has no NaN."""
    held_out = tmp_path / "held_out.jsonl"
    tiny.make_rows(8, 5, path=held_out, prompt_words=(1, 6), completion_words=(1, 4))
    options = {**run_options, "learning_rate": 1e38, "eval_data": held_out, "eval_every": 1, "save_every": 0}
    process = start(tmp_path / "out", **options)
    assert process.end() == 3
    log = (tmp_path / "out" / "metrics.jsonl").read_text()
    for line in log.splitlines():
        json.loads(line, parse_constant=pytest.fail)
