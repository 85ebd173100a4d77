"""scripts/growth.py: what a point measures, on one process and on two, and its tables."""

from pathlib import Path

import growth
import pytest

from shared import UserError

VOCABULARY, WIDTH, LAYERS, INNER = 256, 32, 2, 64
SHAPE = (VOCABULARY, WIDTH, LAYERS, 2, 2, INNER)
PROFILE = ((6, 0, 6), (4, 0, 4))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_point(processes: int, tmp_path: Path) -> None:
    options = {"save_every": 1}
    found = growth.point(tmp_path, PROFILE, SHAPE, rows=12, batch=4, processes=processes, options=options, again=True)
    assert found["tokens"] == 4 * (6 + 4 + 4) and found["ids"] == pytest.approx(12 * 14 * 4 / 1e6)
    layer = 4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH
    parameters = 2 * VOCABULARY * WIDTH + LAYERS * layer + WIDTH
    # weights and two moments in float32, of both processes together; headers, state and manifest are small
    assert 12 * parameters < found["checkpoint"] * 1e6 < 12 * parameters + 30_000
    assert all(found[name] > 0 for name in ("first", "again", "step", "memory", "libraries", "saving"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_fails_is_named_with_its_reason(tmp_path: Path, processes: int) -> None:
    with pytest.raises(UserError, match="^first: failed: shared.UserError: --max-steps -1: .*[0-9]$"):
        growth.point(tmp_path, PROFILE, SHAPE, rows=12, batch=4, processes=processes, options={"max_steps": -1})


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
    with pytest.raises(UserError, match="--sweeps 'rose': must be of 'tokens"):
        growth.main(growth.Args(sweeps=("rose",)))
    with pytest.raises(UserError, match="--sweeps: needs at least one of 'tokens"):
        growth.main(growth.Args(sweeps=()))
