"""One result on any number of processes, changed between resumptions, and in bfloat16 (fault a)."""

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from harness import cut, lines, run, values_of
from marks import ALGORITHMS, fault, slow
from safetensors import safe_open

STEPS = 20
GAMMA = {"gamma_start": 5e-4, "gamma_end": 5e-3}
OPTIONS = {"exo": {"beta_r": 0.7}, "pessimistic_dpo": GAMMA, "ensemble_dpo": GAMMA}
RANKED = ("dpo", "exo", "rm")  # algorithms that take more than two completions


def scored_rows(k: int, seed: int) -> list[dict]:
    """k completions, each with the scores of three reward models, and a sample of π_ref; every third is truncated."""
    rng = random.Random(seed)
    texts = tiny.make_rows(45, seed, k=max(k, 3), prompt_words=(1, 12), completion_words=(1, 8))
    rows = []
    for number, row in enumerate(texts):
        scores = [[rng.gauss(0, 1) for _ in range(3)] for _ in range(k)]
        scored = {
            "prompt": row["prompt"],
            "completions": row["completions"][:k],
            "scores": scores,
            "reference_samples": [tiny.text(rng, rng.randint(1, 8))],
            "reference_samples_finished": [number % 3 > 0],
        }
        rows.append(scored)
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two and of four completions with scores."""
    folder = tmp_path_factory.mktemp("sizes")
    for k in (2, 4):
        tiny.write_jsonl(folder / f"rows-{k}.jsonl", scored_rows(k, 30 + k))
    return folder


def options_for(algorithm: str, k: int, folder: Path, run_options: dict) -> dict[str, Any]:
    """20 steps over rows of k completions, in epochs of six."""
    return {
        **run_options,
        "script": f"algos/{algorithm}.py",
        "train_data": folder / f"rows-{k}.jsonl",
        "max_steps": STEPS,
        "learning_rate": 3e-4,
        "micro_batch_tokens": 128,
        **OPTIONS.get(algorithm, {}),
    }


def agree(ours: list[dict], theirs: list[dict]) -> None:
    """Losses and gradient norms to 1e-6, relative, at step one and 1e-4 after; all else that is logged to 1e-4."""
    steps = list(range(1, STEPS + 1))
    assert [line["step"] for line in ours] == steps
    assert [line["step"] for line in theirs] == steps
    for name in ours[0]:
        our_values = [line[name] for line in ours]
        their_values = [line[name] for line in theirs]
        if name in ("loss", "grad_norm"):
            gaps = tiny.differences(our_values, their_values)
            assert gaps[0] <= 1e-6, (name, gaps)
            assert max(gaps) <= 1e-4, (name, gaps)
        else:
            assert our_values == pytest.approx(their_values, rel=1e-4, abs=1e-4), name


def sizes() -> list:
    """(algorithm, k): ensemble_dpo on pairs always, all others with the slow tests."""
    cases = [pytest.param("ensemble_dpo", 2)]
    for algorithm in ALGORITHMS:
        if algorithm != "ensemble_dpo":
            cases.append(pytest.param(algorithm, 2, marks=slow))
    for algorithm in RANKED:
        cases.append(pytest.param(algorithm, 4, marks=slow))
    return cases


@fault("a")
@pytest.mark.parametrize("algorithm, k", sizes())
def test_any_number_of_processes(run_options: dict, folder: Path, tmp_path: Path, algorithm: str, k: int) -> None:
    """1, 2 and 4 processes, with replicas of the weights, and another number at every resumption."""
    options = options_for(algorithm, k, folder, run_options)
    options["seconds"] = 300

    outs = {}
    for processes in (1, 2, 4):
        outs[processes] = tmp_path / f"{processes}"
        run(outs[processes], processes=processes, **options)

    # two replicas: of a process each, and of two shards each
    two_replicas = tmp_path / "2-replicas"
    run(two_replicas, processes=2, shard_size=1, **options)
    four_in_replicas = tmp_path / "4-replicas"
    run(four_in_replicas, processes=4, shard_size=2, **options)

    # two processes to step 7, four to step 13, then one
    two_four = cut(outs[2], tmp_path / "two-four", 7)
    ended = run(two_four, processes=4, resume=True, **options)
    assert "step-000007\n" in ended.log
    shards = list((two_four / "checkpoints" / "step-000013").glob("rank-*"))
    assert len(shards) == 4
    two_four_one = cut(two_four, tmp_path / "two-four-one", 13)
    ended = run(two_four_one, resume=True, **options)
    assert "step-000013\n" in ended.log

    expected = lines(outs[1])
    losses = {line["loss"] for line in expected}
    assert len(losses) == STEPS
    for out in (outs[2], outs[4], two_replicas, four_in_replicas, two_four, two_four_one):
        agree(lines(out), expected)


def dtypes_in(path: Path) -> set[str]:
    """The dtypes of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}


@fault("a")
@slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16(run_options: dict, folder: Path, tmp_path: Path, algorithm: str) -> None:
    """Losses within rounding of float32 on one process and on two; weights and optimizer are float32.

    Log-probs of some ten nats are rounded by some hundredths; ipo's loss changes by up to ten for each nat.
    """
    tolerance = 0.02
    if algorithm == "ipo":
        tolerance = 0.05
    options = options_for(algorithm, 2, folder, run_options)
    options["save_every"] = STEPS
    run(tmp_path / "float32", **options)
    exact_losses = values_of(tmp_path / "float32", "loss")
    exact_norms = values_of(tmp_path / "float32", "grad_norm")

    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        run(out, processes=processes, dtype="bfloat16", **options)
        losses = values_of(out, "loss")
        norms = values_of(out, "grad_norm")
        assert norms[0] == pytest.approx(exact_norms[0], rel=0.05)
        assert losses == pytest.approx(exact_losses, rel=tolerance, abs=tolerance)
        assert losses[1:] != exact_losses[1:]

        checkpointed = list((out / "checkpoints").glob("*/*.safetensors"))
        for path in (out / "model.safetensors", *checkpointed):
            assert dtypes_in(path) == {"F32"}
