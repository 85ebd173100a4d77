"""Columns beside those of a form: each is used, refused, or named."""

from collections import Counter
from pathlib import Path

import pytest
from tokenised import FIRST, GOOD, PAIR, TALK, USER, load, plain, write

from scripts.lab.row_files import first_examples, read_examples, summary
from shared.groups import Requires, describe

# ---------------------------------------------------------------- columns that are not used

DEMONSTRATION = {"prompt": USER, "completion": GOOD}
RANKED = {"prompt": USER, "completions": [GOOD, "no"], "scores": [2, 1]}


@pytest.mark.parametrize(
    "row, requires, names",
    [
        ({**PAIR, "source": "web", "id": 7}, Requires(), ["id", "source"]),
        ({**PAIR, "finished": [True, True], "flag": False}, Requires(), ["finished", "flag"]),
        ({**PAIR, "input": "x", "messages": TALK}, Requires(), ["input", "messages"]),
        ({**PAIR, "score_chosen": 2, "score_rejected": 1}, Requires(), None),
        ({**RANKED, "finished": [True, False]}, Requires(), None),
        ({**RANKED, "score_chosen": 2}, Requires(), ["score_chosen"]),
        ({**DEMONSTRATION, "scores": [1], "tools": [{"name": "f"}]}, FIRST, ["scores", "tools"]),
        ({**DEMONSTRATION, "id": None, "source": "", "tools": [], "meta": {"a": [None]}}, FIRST, None),
    ],
    ids=str,
)
def test_columns_that_are_not_used_are_named(
    tmp_path: Path, row: dict, requires: Requires, names: list[str] | None
) -> None:
    report = load(write(tmp_path / "rows.jsonl", [row]), plain(), requires).report
    assert report.get("not used") == names
    if names:
        assert describe(report).endswith(f"; not used: {', '.join(names)}")
    else:
        assert "not used" not in describe(report)


def test_a_column_of_a_later_row_is_named_once(tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "chosen": "ok", "id": 1}, {**PAIR, "rejected": "a", "id": 2, "source": "web"}]
    report = load(write(tmp_path / "rows.jsonl", rows), plain()).report
    assert describe(report) == "rows 3, kept 3; not used: id, source"


def test_the_scripts_name_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "rows.jsonl", [{**PAIR, "id": 7}])
    unused: set[str] = set()
    assert len(list(read_examples(source, Counter(), unused=unused))) == 1
    assert summary(source, 1, Counter(), unused) == "rows 1, kept 1; not used: id"

    first_examples(source, 1)
    assert capsys.readouterr().err == f"{source}: rows 1, kept 1; not used: id\n"
