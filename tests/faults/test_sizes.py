"""One result on any number of processes, changed between resumptions, and in bfloat16 (fault a)."""

import random
from pathlib import Path

import pytest
import worlds
from conftest import ALGORITHMS
from harness import cut, lines, run
from safetensors import safe_open

fault, slow = pytest.mark.fault, pytest.mark.slow
STEPS = 20
GAMMA = {"gamma_start": 5e-4, "gamma_end": 5e-3}
OPTIONS = {"exo": {"beta_r": 0.7}, "pessimistic_dpo": GAMMA, "ensemble_dpo": GAMMA}
RANKED = ("dpo", "exo", "rm")  # algorithms that take more than two completions


def scored_rows(k: int, seed: int) -> list[dict]:
    """k completions, each with the scores of three reward models, and a sample of π_ref, some of them cut off."""
    rng, rows = random.Random(seed), []
    for i, row in enumerate(worlds.make_rows(45, seed, k=max(k, 3), prompt_words=(1, 12), completion_words=(1, 8))):
        found = {"prompt": row["prompt"], "completions": row["completions"][:k]}
        found["scores"] = [[rng.gauss(0, 1) for _ in range(3)] for _ in range(k)]
        found |= {"reference_samples": [worlds.text(rng, rng.randint(1, 8))], "reference_samples_finished": [i % 3 > 0]}
        rows.append(found)
    return rows


@pytest.fixture(scope="module")
def sized(world: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """The options of 20 steps over pairs, and over four completions ranked by their scores; epochs of six."""
    folder = tmp_path_factory.mktemp("sizes")
    options = {**world, "max_steps": STEPS, "learning_rate": 3e-4, "micro_batch_tokens": 128}
    paths = {k: worlds.write_jsonl(folder / f"rows-{k}.jsonl", scored_rows(k, 30 + k)) for k in (2, 4)}
    return {k: {**options, "train_data": path} for k, path in paths.items()}


def agree(ours: list[dict], theirs: list[dict]) -> None:
    """Losses and gradient norms to 1e-6, relative, at step one and 1e-4 after; all else that is logged to 1e-4."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for name in ours[0]:
        a, b = ([line[name] for line in found] for found in (ours, theirs))
        if name in ("loss", "grad_norm"):
            gaps = worlds.differences(a, b)
            assert gaps[0] <= 1e-6 and max(gaps) <= 1e-4, (name, gaps)
        else:
            assert a == pytest.approx(b, rel=1e-4, abs=1e-4), name


@fault("a")
@pytest.mark.parametrize(
    "algorithm, k",
    [
        *(pytest.param(name, 2, marks=[slow] * (name != "ensemble_dpo")) for name in ALGORITHMS),
        *(pytest.param(name, 4, marks=slow) for name in RANKED),
    ],
)
def test_any_number_of_processes(sized: dict[int, dict], tmp_path: Path, algorithm: str, k: int) -> None:
    """1, 2 and 4 processes; 2 with a copy of the weights each, 4 with two halves; 2 to step 7, 4 to step 13, then 1."""
    options = {**sized[k], **OPTIONS.get(algorithm, {}), "script": f"algos/{algorithm}.py", "seconds": 300}
    outs = {processes: tmp_path / f"{processes}" for processes in (1, 2, 4)}
    for processes, out in outs.items():
        run(out, processes=processes, **options)
    copies = [tmp_path / f"{processes}-copies" for processes in (2, 4)]
    for processes, out in zip((2, 4), copies, strict=True):
        run(out, processes=processes, shard_size=processes // 2, **options)
    four = cut(outs[2], tmp_path / "two-four", 7)
    assert "step-000007\n" in run(four, processes=4, resume=True, **options).log
    assert len(list((four / "checkpoints" / "step-000013").glob("rank-*"))) == 4
    back = cut(four, tmp_path / "two-four-one", 13)
    assert "step-000013\n" in run(back, resume=True, **options).log
    alone = lines(outs[1])
    assert len({line["loss"] for line in alone}) == STEPS
    for out in (outs[2], outs[4], *copies, four, back):
        agree(lines(out), alone)


@fault("a")
@slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16(sized: dict[int, dict], tmp_path: Path, algorithm: str) -> None:
    """Losses within rounding of float32 on one process and on two; weights and optimizer are float32.

    Log-probs of some ten nats are rounded by some hundredths; ipo's loss changes by up to ten for each nat.
    """
    most = 0.05 if algorithm == "ipo" else 0.02
    options = {**sized[2], **OPTIONS.get(algorithm, {}), "script": f"algos/{algorithm}.py", "save_every": STEPS}
    run(tmp_path / "float32", **options)
    wanted, (norm, *_) = ([line[name] for line in lines(tmp_path / "float32")] for name in ("loss", "grad_norm"))
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        run(out, processes=processes, dtype="bfloat16", **options)
        found = [line["loss"] for line in lines(out)]
        assert lines(out)[0]["grad_norm"] == pytest.approx(norm, rel=0.05)
        assert found == pytest.approx(wanted, rel=most, abs=most)
        assert found[1:] != wanted[1:]
        for path in (out / "model.safetensors", *(out / "checkpoints").glob("*/*.safetensors")):
            with safe_open(path, "pt") as file:
                assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}
