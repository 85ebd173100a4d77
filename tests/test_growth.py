"""scripts/growth.py: what a point measures, on one process and on two, and its tables."""

from pathlib import Path

import pytest

from scripts import growth
from scripts.lab.workload import Lengths, Profile, Shape
from shared import UserError

VOCABULARY = 256
WIDTH = 32
LAYERS = 2
INNER_WIDTH = 64


def tiny_point(**fields: object) -> growth.Point:
    """Three steps of four pairs, with prompts of six tokens and completions of four."""
    return growth.Point(
        value=0,
        shape=Shape(VOCABULARY, WIDTH, LAYERS, 2, 2, INNER_WIDTH),
        profile=Profile(Lengths(6, 0, 6), Lengths(4, 0, 4)),
        rows=12,
        batch_size=4,
        **fields,
    )


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_point(processes: int, tmp_path: Path) -> None:
    numbers = growth.measure_point(tiny_point(processes=processes, again=True, saving=True), tmp_path)
    assert numbers["tokens"] == 4 * (6 + 4 + 4)
    assert numbers["ids"] == pytest.approx(12 * 14 * 4 / 1e6)
    for name in ("first", "again", "step", "memory", "libraries", "saving"):
        assert numbers[name] > 0, name
    assert numbers["extra"] >= 0

    # weights and two moments in float32, of both processes together; headers, state and manifest are small
    layer = 4 * WIDTH**2 + 3 * WIDTH * INNER_WIDTH + 2 * WIDTH
    parameters = 2 * VOCABULARY * WIDTH + LAYERS * layer + WIDTH
    assert 12 * parameters < numbers["checkpoint"] * 1e6 < 12 * parameters + 30_000


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_fails_is_named_with_its_reason(tmp_path: Path, processes: int) -> None:
    point = tiny_point(processes=processes, options={"max_steps": -1})
    reason = "^first: failed with exit code 1: shared.UserError: --max-steps -1: .*[0-9]$"
    with pytest.raises(UserError, match=reason):
        growth.measure_point(point, tmp_path)


def test_tables_have_the_columns_of_their_points() -> None:
    points = [{"value": 2, "step": 0.5, "memory": 12.3}, {"value": 4, "step": 1.25, "memory": 20.0}]
    lines = growth.markdown({"cores": 3}, {"completions": points}).splitlines()
    assert lines[2] == "Machine: cores 3."
    assert lines[4:] == [
        "| completions | step (s) | memory (MB) |",
        "|---|---|---|",
        "| 2 | 0.500 | 12 |",
        "| 4 | 1.250 | 20 |",
    ]


def test_an_unknown_sweep_is_refused() -> None:
    with pytest.raises(UserError, match="--sweeps 'rose': must be one of 'tokens"):
        growth.main(growth.Args(sweeps=("rose",)))
    with pytest.raises(UserError, match="--sweeps: needs at least one of 'tokens"):
        growth.main(growth.Args(sweeps=()))
