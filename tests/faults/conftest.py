"""One tiny model with rows for every algorithm, and runs of it that nothing happened to."""

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest
import worlds

ALGORITHMS = sorted(path.stem for path in (worlds.ROOT / "algos").glob("[a-z]*.py"))


def make_rows(n: int, seed: int, path: Path) -> list[dict]:
    """Pairs with scores and samples of π_ref, as every algorithm reads them."""
    rng, rows = random.Random(seed), worlds.make_rows(n, seed, prompt_words=(1, 12), completion_words=(1, 8))
    for row in rows:
        row |= {"score_chosen": rng.gauss(0.5, 1), "score_rejected": rng.gauss(0, 1)}
        row["reference_samples"] = [worlds.text(rng, rng.randint(1, 8)) for _ in range(2)]
    worlds.write_jsonl(path, rows)
    return rows


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The options of a run of twelve steps, over epochs of five, that saves at each one."""
    folder = tmp_path_factory.mktemp("world")
    worlds.make_model(folder / "model", "llama", seed=4, initializer_range=0.15)
    make_rows(39, 20, folder / "rows.jsonl")
    options = {"model": folder / "model", "train_data": folder / "rows.jsonl", "batch_size": 8, "max_steps": 12}
    return options | {"learning_rate": 1e-4, "log_every": 1, "save_every": 1, "keep": 20}


def undisturbed(folder: Path, options: dict) -> Callable[..., Path]:
    """The output directory of an undisturbed run, made once: an algorithm's on so many processes."""

    @functools.cache
    def make(algorithm: str, processes: int) -> Path:
        out = folder / f"{algorithm}-{processes}"
        harness.run(out, script=f"algos/{algorithm}.py", processes=processes, **options)
        return out

    return make


@pytest.fixture(scope="session")
def through_of(world: dict, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Undisturbed runs of the world."""
    return undisturbed(tmp_path_factory.mktemp("through"), world)


@pytest.fixture(scope="session")
def through(through_of: Callable[..., Path]) -> Path:
    """An undisturbed run of dpo."""
    return through_of("dpo", 1)


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """Runs that a failed test has left are killed."""
    yield
    while harness.started:
        harness.started.pop().kill()
