"""DPO's numbers do not depend on processes, on the micro-batch budget, or on being killed and resumed.

Those of the other algorithms: tests/faults/test_numbers.py and test_sizes.py.
"""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
from exactness import check_agreement
from transformers import AutoTokenizer

SCRIPT = "algos/dpo.py"
BATCH = 16
STEPS = 20
ROWS = 97  # the last batch of an epoch has one row
HUGE = 1 << 20
OPTIONS: dict[str, Any] = {
    "beta": 0.1,
    "batch_size": BATCH,
    "max_steps": STEPS,
    "learning_rate": 3e-4,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 512,
    "max_prompt_length": 256,
    "dtype": "float32",
    "seed": 5,
    "log_every": 1,
}
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with grouped heads, and pairs."""
    path = tmp_path_factory.mktemp("invariance")
    tiny.make_model(path / "model", "llama", seed=4, num_key_value_heads=2, initializer_range=0.15)
    tiny.make_rows(ROWS, seed=20, k=2, path=path / "pairs.jsonl")
    tiny.make_rows(9, seed=22, k=2, path=path / "held_out.jsonl")
    return path


def options_of(folder: Path, budget: int, options: dict[str, object]) -> dict[str, Any]:
    """This file's settings, and what differs in one run."""
    inputs = {"model": folder / "model", "train_data": folder / "pairs.jsonl"}
    return {**OPTIONS, **inputs, "micro_batch_tokens": budget, **options}


def launch(folder: Path, output_dir: Path, processes: int, budget: int, **options: object) -> list[dict]:
    """One run with this file's settings."""
    return tiny.run(SCRIPT, output_dir, processes, **options_of(folder, budget, options))


def small_budget(folder: Path) -> int:
    """A budget that makes about eight micro-batches of a batch, but holds every group."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = tiny.read_jsonl(folder / "pairs.jsonl")
    sizes = [reference.encode(tokenizer, row).size for row in rows]
    tokens_per_batch = sum(sizes) / len(sizes) * BATCH
    return max(max(sizes), round(tokens_per_batch / 8))


# ---------------------------------------------------------------- processes and micro-batches


@pytest.fixture(scope="module")
def plain_run(folder: Path) -> list[dict]:
    """One process, one micro-batch per step."""
    return launch(folder, folder / "plain", 1, HUGE)


@pytest.mark.parametrize("processes, splits_batches", [(1, True), (2, False), (2, True)])
def test_dpo_processes_and_micro_batches(
    folder: Path, plain_run: list[dict], tmp_path: Path, processes: int, splits_batches: bool
) -> None:
    budget = HUGE
    if splits_batches:
        budget = small_budget(folder)
    lines = launch(folder, tmp_path / "out", processes, budget)
    check_agreement(lines, plain_run, STEPS, ("loss", "grad_norm", "logps/chosen", "logps/rejected"))
    margins = [line["rewards/margins"] for line in lines]
    expected_margins = [line["rewards/margins"] for line in plain_run]
    assert margins == pytest.approx(expected_margins, rel=1e-4, abs=1e-4)
    assert len({line["loss"] for line in lines}) == STEPS


def test_a_process_without_groups(folder: Path, tmp_path: Path) -> None:
    """Batches of one on two processes."""
    options = {"batch_size": 1, "max_steps": 4}
    alone = launch(folder, tmp_path / "one", 1, HUGE, **options)
    lines = launch(folder, tmp_path / "two", 2, HUGE, **options)
    check_agreement(lines, alone, 4, ("loss", "grad_norm"))


# ---------------------------------------------------------------- killed and resumed


def read_without_times(path: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock gave."""
    lines = tiny.read_jsonl(path)
    for line in lines:
        for name in TIMES:
            line.pop(name, None)
    return lines


def kill_when_exists(process: subprocess.Popen[str], path: Path) -> int:
    """SIGKILL as soon as `path` exists; the exit code."""
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def test_killed_and_resumed(folder: Path, tmp_path: Path) -> None:
    """Bitwise as without interruption: every metric, the model's bytes; an epoch has five steps.

    The checkpoint falls between two lines of the log and right behind an evaluation.
    """
    budget = small_budget(folder)
    options = {
        "batch_size": 24,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "lr_schedule": "linear",
        "warmup_steps": 2,
        "save_every": 4,
        "log_every": 3,
        "eval_every": 2,
        "eval_data": folder / "held_out.jsonl",
    }
    whole = tmp_path / "whole"
    launch(folder, whole, 1, budget, **options)

    broken = tmp_path / "broken"
    process = tiny.start(SCRIPT, broken, **options_of(folder, budget, options))
    exit_code = kill_when_exists(process, broken / "checkpoints" / "step-000004")
    error = tiny.first_error(tiny.read_log(broken))
    assert exit_code == -signal.SIGKILL, f"the run ended before it was killed, exit code {exit_code}\n{error}"
    assert not (broken / "model.safetensors").exists()

    launch(folder, broken, 1, budget, resume=True, **options)
    lines = read_without_times(broken / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 10]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4, 6, 8, 10]
    assert lines == read_without_times(whole / "metrics.jsonl")
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
