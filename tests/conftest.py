"""A neutral environment for every test: no hub, an own cache, `scripts` and the repository importable.

`--all` runs the slow tests too. `--fault-table PATH` writes what became of each fault of tests/faults into the last
column of a Markdown table, as docs/reliability.md has one.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for folder in (ROOT / "scripts", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

OUTCOMES = ("skipped", "passed", "failed")  # a fault with several tests has the last of theirs
SIGNS = {"skipped": "not tested", "passed": "✓", "failed": "✗"}
faults: dict[str, str] = {}


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
    for item in items:  # a report carries these from a worker to the main process
        item.user_properties += [("fault", str(n)) for mark in item.iter_markers("fault") for n in mark.args]
    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        for _, fault in (found for found in report.user_properties if found[0] == "fault"):
            faults[fault] = max(faults.get(fault, "skipped"), report.outcome, key=OUTCOMES.index)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--fault-table")
    if path and not hasattr(session.config, "workerinput"):  # the main process of pytest-xdist has all reports
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines):
            cells = line.split("|")
            fault = cells[1].strip(" ²") if len(cells) == 7 else None
            if fault in faults:
                lines[i] = "|".join([*cells[:-2], f" {SIGNS[faults[fault]]} ", ""])
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
