"""DPO's numbers do not depend on processes, on the micro-batch budget, or on being killed and resumed.

Those of the other algorithms: tests/faults/test_numbers.py and test_sizes.py.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import tiny
from transformers import AutoTokenizer

BATCH, STEPS, ROWS = 16, 20, 97  # the last batch of an epoch has one row
HUGE = 1 << 20
OPTIONS = dict(
    batch_size=BATCH,
    max_steps=STEPS,
    learning_rate=3e-4,
    lr_schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    max_length=512,
    max_prompt_length=256,
    dtype="float32",
    seed=5,
    log_every=1,
)
TIMES = ("seconds", "tokens_per_second")
Run = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with grouped heads, and pairs."""
    path = tmp_path_factory.mktemp("invariance")
    tiny.make_model(path / "model", "llama", seed=4, num_key_value_heads=2, initializer_range=0.15)
    tiny.make_rows(ROWS, seed=20, k=2, path=path / "pairs.jsonl")
    tiny.make_rows(9, seed=22, k=2, path=path / "held_out.jsonl")
    return path


def launch(folder: Path, script: str, output_dir: Path, processes: int, budget: int, **options: object) -> list[dict]:
    """One run with this file's settings."""
    options = {**OPTIONS, "model": folder / "model", "train_data": folder / "pairs.jsonl", **options}
    return tiny.run(script, output_dir, processes, micro_batch_tokens=budget, **options)


def eighth(folder: Path, data: str) -> int:
    """A budget that makes about eight micro-batches of a batch, but holds every group."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    groups = [reference.encode(tokenizer, row) for row in tiny.read_jsonl(folder / data)]
    sizes = [len(group.prompt) + sum(map(len, [*group.completions, *group.samples])) for group in groups]
    return max(max(sizes), round(sum(sizes) / len(sizes) * BATCH / 8))


def agree(lines: list[dict], others: list[dict], steps: int, keys: tuple[str, ...] = ("loss",)) -> None:
    """Step by step: 1e-6 at step one, 1e-4 after, in float32."""
    assert [line["step"] for line in lines] == [line["step"] for line in others] == list(range(1, steps + 1))
    for key in keys:
        gaps = tiny.differences([line[key] for line in lines], [line[key] for line in others])
        assert gaps[0] <= 1e-6 and max(gaps) <= 1e-4, (key, gaps)


@pytest.fixture(scope="module")
def dpo_alone(folder: Path) -> list[dict]:
    """One process, one micro-batch per step."""
    return launch(folder, "algos/dpo.py", folder / "dpo-1-huge", 1, HUGE, beta=0.1)


@pytest.mark.parametrize("processes,split", [(1, True), (2, False), (2, True)])
def test_dpo_processes_and_micro_batches(
    folder: Path, dpo_alone: list[dict], tmp_path: Path, processes: int, split: bool
) -> None:
    budget = eighth(folder, "pairs.jsonl") if split else HUGE
    lines = launch(folder, "algos/dpo.py", tmp_path / "out", processes, budget, beta=0.1)
    agree(lines, dpo_alone, STEPS, ("loss", "grad_norm", "logps/chosen", "logps/rejected"))
    margins = [[line["rewards/margins"] for line in run] for run in (lines, dpo_alone)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-4, abs=1e-4)
    assert len({line["loss"] for line in lines}) == STEPS


def test_a_process_without_groups(folder: Path, tmp_path: Path) -> None:
    """Batches of one on two processes."""
    options = dict(beta=0.1, batch_size=1, max_steps=4)
    alone = launch(folder, "algos/dpo.py", tmp_path / "one", 1, HUGE, **options)
    lines = launch(folder, "algos/dpo.py", tmp_path / "two", 2, HUGE, **options)
    agree(lines, alone, 4, ("loss", "grad_norm"))


def untimed(path: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock gave."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in tiny.read_jsonl(path)]


def kill_at(process, path: Path) -> int:  # noqa: ANN001
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
    options = dict(max_steps=10, save_every=4, beta=0.1, lr_schedule="linear", warmup_steps=2, batch_size=24)
    options |= dict(log_every=3, eval_every=2, eval_data=folder / "held_out.jsonl")
    options["learning_rate"], budget = 1e-3, eighth(folder, "pairs.jsonl")
    through = tmp_path / "through"
    launch(folder, "algos/dpo.py", through, 1, budget, **options)

    broken = tmp_path / "broken"
    line = {**OPTIONS, "model": folder / "model", "train_data": folder / "pairs.jsonl", **options}
    process = tiny.start("algos/dpo.py", broken, micro_batch_tokens=budget, **line)
    code = kill_at(process, broken / "checkpoints" / "step-000004")
    log = Path(f"{broken}.log").read_text(encoding="utf-8")
    assert code == -signal.SIGKILL, f"the run ended before it was killed, exit code {code}\n{tiny.first_error(log)}"
    assert not (broken / "model.safetensors").exists()

    launch(folder, "algos/dpo.py", broken, 1, budget, resume=True, **options)
    ours, theirs = untimed(broken / "metrics.jsonl"), untimed(through / "metrics.jsonl")
    assert [line["step"] for line in ours if "loss" in line] == [3, 6, 9, 10]
    assert [line["step"] for line in ours if "eval/loss" in line] == [2, 4, 6, 8, 10]
    assert ours == theirs
    assert (broken / "model.safetensors").read_bytes() == (through / "model.safetensors").read_bytes()
