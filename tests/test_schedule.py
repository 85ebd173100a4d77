"""The learning rate of each step."""

import math
from types import SimpleNamespace

import pytest

from shared.schedule import learning_rate

PEAK = 2.0


def rates(schedule: str, warmup_steps: int, last_step: int) -> list[float]:
    """The rates of all steps, and the one that would follow."""
    args = SimpleNamespace(learning_rate=PEAK, warmup_steps=warmup_steps, lr_schedule=schedule)
    steps = range(1, last_step + 2)
    return [learning_rate(step, last_step, args) for step in steps]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up(schedule: str) -> None:
    """Step s of W has s/W of the rate."""
    assert rates(schedule, warmup_steps=4, last_step=12)[:4] == [0.5, 1.0, 1.5, 2.0]


def test_constant() -> None:
    assert rates("constant", warmup_steps=4, last_step=12)[4:] == [PEAK] * 9


def test_linear() -> None:
    """After the warm-up the rate falls from all of it to 0 just after the last step."""
    expected = [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates("linear", warmup_steps=4, last_step=12)[4:] == pytest.approx(expected)


def test_cosine() -> None:
    half = math.sqrt(0.5)
    expected = [PEAK, 1 + half, 1.0, 1 - half, 0.0]
    assert rates("cosine", warmup_steps=0, last_step=4) == pytest.approx(expected)
