"""What the pages say of this repository."""

import ast
import re
from pathlib import Path

import pytest
import tiny

PAGES = sorted([tiny.ROOT / "README.md", tiny.ROOT / "CONTRIBUTING.md", *(tiny.ROOT / "docs").glob("*.md")])


def named_tests(name: str) -> set[str]:
    """The tests in the file of that name; empty if there is none."""
    names = set()
    for path in (tiny.ROOT / "tests").rglob(f"{name}.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_tests_that_pages_name_exist(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        known: set[str] = set()  # the tests of the files that the line names
        for file, test in re.findall(r"`(?:tests/)?(?:faults/)?(test_\w+)(?:\.py)?(?:::(test_\w+))?`", line):
            if not test and file in known:
                continue
            known |= named_tests(file)
            assert known, f"{page.name}: {file}"
            assert not test or test in known, f"{page.name}: {file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
