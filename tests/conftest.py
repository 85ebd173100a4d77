"""A neutral environment for every test: no hub, and a cache of its own.

`--all` runs the slow tests too. `--fault-table PATH` writes the outcome of each fault of tests/faults into the last
column of a Markdown table, such as the one in docs/reliability.md.

pytest makes the modules in this folder importable, such as `tiny` and `reference`. `algos`, `scripts` and `shared` are
installed packages.
"""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

OUTCOMES = ("skipped", "passed", "failed")  # a fault with several tests has the last of theirs
SIGNS = {"skipped": "not tested", "passed": "✓", "failed": "✗"}
FAULT_COLUMNS = 5
outcome_of_fault: dict[str, str] = {}


@pytest.fixture(scope="session", autouse=True)
def isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty XDG_CACHE_HOME for the whole session."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    return cache


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")
    parser.addoption("--fault-table", metavar="PATH", help="fill in the last column of its table")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(*numbers): the faults of tests/faults that a test is about")
    config.addinivalue_line("markers", "slow: runs with --all only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            for number in mark.args:
                # a report carries the user properties from a worker of pytest-xdist to the main process
                item.user_properties.append(("fault", str(number)))

    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    for name, value in report.user_properties:
        if name == "fault":
            outcomes = [outcome_of_fault.get(value, "skipped"), report.outcome]
            outcome_of_fault[value] = max(outcomes, key=OUTCOMES.index)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--fault-table")
    is_worker = hasattr(session.config, "workerinput")  # only the main process of pytest-xdist has all reports
    if path and not is_worker:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        table = "\n".join(_with_outcome(line) for line in lines)
        Path(path).write_text(table + "\n", encoding="utf-8")


def _with_outcome(line: str) -> str:
    """A line of the table, with the outcome in its last column if it is about a fault that was tested."""
    parts = line.split("|")  # the cells between an empty part at either end
    if len(parts) != FAULT_COLUMNS + 2:
        return line
    fault = parts[1].strip(" ²")
    if fault in outcome_of_fault:
        parts[-2] = f" {SIGNS[outcome_of_fault[fault]]} "
    return "|".join(parts)
