"""A tiny model with rows for every algorithm, and runs of it that nothing happened to."""

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest
import tiny


def make_rows(n: int, seed: int, path: Path) -> list[dict]:
    """Pairs with scores and samples of π_ref, as every algorithm reads them."""
    rng = random.Random(seed)
    rows = tiny.make_rows(n, seed, prompt_words=(1, 12), completion_words=(1, 8))
    for row in rows:
        row["score_chosen"] = rng.gauss(0.5, 1)
        row["score_rejected"] = rng.gauss(0, 1)
        row["reference_samples"] = [tiny.text(rng, rng.randint(1, 8)) for _ in range(2)]
    tiny.write_jsonl(path, rows)
    return rows


@pytest.fixture(scope="session")
def run_options(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The options of a run of twelve steps, over epochs of five, that saves at each step."""
    folder = tmp_path_factory.mktemp("run_options")
    tiny.make_model(folder / "model", "llama", seed=4, initializer_range=0.15)
    make_rows(39, 20, folder / "rows.jsonl")
    return {
        "model": folder / "model",
        "train_data": folder / "rows.jsonl",
        "batch_size": 8,
        "max_steps": 12,
        "learning_rate": 1e-4,
        "log_every": 1,
        "save_every": 1,
        "keep": 20,
    }


def undisturbed(folder: Path, options: dict) -> Callable[[str, int], Path]:
    """A function from an algorithm and a number of processes to the output directory of their undisturbed run.

    Each of these runs happens once.
    """

    @functools.cache
    def output_directory(algorithm: str, processes: int) -> Path:
        out = folder / f"{algorithm}-{processes}"
        harness.run(out, script=f"algos/{algorithm}.py", processes=processes, **options)
        return out

    return output_directory


@pytest.fixture(scope="session")
def through_of(run_options: dict, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Undisturbed runs with the options of `run_options`."""
    return undisturbed(tmp_path_factory.mktemp("through"), run_options)


@pytest.fixture(scope="session")
def through(through_of: Callable[[str, int], Path]) -> Path:
    """An undisturbed run of dpo."""
    return through_of("dpo", 1)


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """Kills the runs that a failed test has left."""
    yield
    while harness.started:
        harness.started.pop().kill()
