"""The algorithms, and the marks that the tests of faults share."""

from collections.abc import Callable

import pytest
import tiny

ALGORITHMS = sorted(path.stem for path in (tiny.ROOT / "algos").glob("[a-z]*.py"))
OTHER_ALGORITHMS = [name for name in ALGORITHMS if name != "dpo"]

fault = pytest.mark.fault
slow = pytest.mark.slow


def every_algorithm(test: Callable) -> Callable:
    """Parametrise a test by algorithm: dpo always, the others when the slow tests run."""
    others = [pytest.param(name, marks=slow) for name in OTHER_ALGORITHMS]
    return pytest.mark.parametrize("algorithm", ["dpo", *others])(test)
