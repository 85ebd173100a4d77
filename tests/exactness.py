"""Comparisons of a command line with the float64 loop of tests/reference.py."""

from collections.abc import Sequence
from pathlib import Path

import harness
import pytest
import reference
import tiny
import torch
from safetensors.torch import load_file
from settings import BATCH, LEARNING_RATE, MAX_GRAD_NORM, OPTIONS, PREFERENCE_METRICS, STEPS, WEIGHT_DECAY
from torch import nn
from transformers import AutoTokenizer


def compare_run(
    script: str,
    output_dir: Path,
    model: Path,
    data: Path,
    loss: reference.Loss,
    metrics: Sequence[str] = PREFERENCE_METRICS,
    encode: reference.Encode = reference.encode,
    **options: object,
) -> list[dict]:
    """One run against the float64 loop: metrics of each step and the model at the end. Returns the run's lines."""
    options = {**OPTIONS, **options}
    harness.run(output_dir, script=script, model=model, train_data=data, **options)
    lines = tiny.training_lines(output_dir / "metrics.jsonl")
    rows = tiny.read_jsonl(data)
    schedule = {"schedule": options["lr_schedule"], "warmup": options["warmup_steps"]}
    expected, trained = train_reference(model, rows, loss, encode_row=encode, **schedule)
    compare_metrics(lines, expected, metrics)
    compare_models(output_dir, trained, rows, encode)
    assert lines[0]["loss"] != lines[1]["loss"]
    return lines


def train_reference(
    model: Path, rows: list[dict], loss: reference.Loss, **options: object
) -> tuple[list[dict], nn.Module]:
    """The float64 loop with the settings that all files share."""
    settings: dict[str, object] = {
        "batch_size": BATCH,
        "steps": STEPS,
        "peak": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
    }
    return reference.train(model, rows, loss, **{**settings, **options})


def compare_metrics(lines: list[dict], expected: list[dict], metrics: Sequence[str] = (), rounding: float = 1) -> None:
    """Losses and gradient norms to 2e-6 at step one and 1e-4 after; the other metrics to rounding.

    `rounding` is a factor on these tolerances, for a model that rounds more than others.
    """
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, wanted in zip(lines, expected, strict=True):
        step = line["step"]
        tolerance = 1e-4
        if step == 1:
            tolerance = 2e-6
        tolerance *= rounding
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(wanted[name], rel=tolerance), (step, name)
        assert line["learning_rate"] == pytest.approx(wanted["learning_rate"], rel=1e-12)
        for name in metrics:
            assert line[name] == pytest.approx(wanted[name], rel=tolerance, abs=1e-3), (step, name)


def check_first_loss(lines: list[dict], loss: float, rel: float = 1e-6) -> None:
    """The loss of step one is a number that is known."""
    assert lines[0]["loss"] == pytest.approx(loss, rel=rel)


def check_agreement(lines: list[dict], others: list[dict], steps: int, metrics: Sequence[str]) -> None:
    """Step by step: 1e-6 at step one, 1e-4 after, in float32."""
    all_steps = list(range(1, steps + 1))
    assert [line["step"] for line in lines] == all_steps
    assert [line["step"] for line in others] == all_steps
    for name in metrics:
        ours = [line[name] for line in lines]
        theirs = [line[name] for line in others]
        gaps = tiny.differences(ours, theirs)
        assert gaps[0] <= 1e-6, (name, gaps)
        assert max(gaps) <= 1e-4, (name, gaps)


def evaluation_lines(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl that report evaluations."""
    lines = tiny.read_jsonl(output_dir / "metrics.jsonl")
    return [line for line in lines if "eval/loss" in line]


def compare_evaluation(line: dict, expected: dict) -> None:
    """The loss and the metrics over held-out rows, after the last step."""
    for name in ("loss", *PREFERENCE_METRICS):
        assert line[f"eval/{name}"] == pytest.approx(expected[name], rel=1e-4, abs=1e-3), name


def compare_models(
    output_dir: Path, trained: nn.Module, rows: list[dict], encode: reference.Encode = reference.encode
) -> None:
    """What was saved loads with stock classes and gives the log-probs of the float64 loop's last weights."""
    weights = load_file(output_dir / "model.safetensors")
    for name, tensor in weights.items():
        is_frozen = any(part in name for part in reference.VISION_PARTS)
        assert is_frozen or tensor.dtype == torch.float32
    saved = reference.model_class(output_dir).from_pretrained(output_dir).eval()
    assert saved.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(output_dir)

    with torch.no_grad():
        for row in rows[:4]:
            group = encode(tokenizer, row)
            for completion in group.completions:
                ours = reference.token_logps(saved, group.prompt, completion)
                theirs = reference.token_logps(trained, group.prompt, completion)
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)
