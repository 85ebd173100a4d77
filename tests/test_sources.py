"""The same rows from every container, and files that cannot be read."""

import gzip
import json
from pathlib import Path

import pytest
import tiny
from tokenised import FIRST, ended, ids, load, pieces, plain

from shared import UserError


def write_containers(folder: Path, rows: list[dict]) -> list[str]:
    """The same rows in every container; their sources."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    array = json.dumps(rows, indent=1)
    (folder / "lines.jsonl").write_text(lines)
    (folder / "lines-with-bom.jsonl").write_text(lines, encoding="utf-8-sig")
    (folder / "array.json").write_text(array)
    (folder / "array-with-bom.json").write_text(array, encoding="utf-8-sig")
    (folder / "lines-after-a-blank-one.json").write_text("\n" + lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet")
    for name in ("lines.jsonl", "array.json", "table.parquet"):
        content = (folder / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    files = [str(path) for path in folder.iterdir()]

    (folder / "files").mkdir()
    (folder / "files" / "1.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (folder / "files" / "2.json").write_text(json.dumps(rows[1:]))

    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(folder / "splits")
    others = [str(folder / name) for name in ("files", "saved", "splits", "splits:train")]
    return files + others


def test_every_container_gives_the_same_groups(tmp_path: Path) -> None:
    rows = tiny.make_rows(5, 3)
    expected = []
    for row in rows:
        prompt = ids(plain(), row["prompt"], special=True)
        expected.append([prompt, ended(plain(), row["chosen"]), ended(plain(), row["rejected"])])

    sources = write_containers(tmp_path, rows)
    assert len(sources) == 13
    for source in sources:
        groups = load(source, plain())
        assert [pieces(groups, i) for i in range(len(groups))] == expected, source


UNREADABLE = [
    ("latin.jsonl", "line 2: not UTF-8"),
    ("truncated.jsonl.gz", "cannot be read"),
    ("truncated.parquet", "cannot be read"),
    ("latin.parquet", "latin.parquet: cannot be read"),
    ("files:test", "files:test: a directory of files has no splits"),
    ("files/rows.jsonl:test", "rows.jsonl:test: a file has no splits"),
    ("rows.csv", "must end in"),
    ("empty", "no file that ends in"),
    ("absent.jsonl", "neither a file, a directory nor a data set on the hub"),
]


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of things that are no rows."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("unreadable")
    (folder / "empty").mkdir()
    (folder / "files").mkdir()
    (folder / "files" / "rows.jsonl").write_text('{"text": "ok"}')
    (folder / "rows.csv").write_text("a,b")
    (folder / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    (folder / "truncated.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9999)[:40])
    (folder / "truncated.parquet").write_bytes(b"PAR1 and nothing more")
    texts = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "latin.parquet")
    return folder


@pytest.mark.parametrize("name, message", UNREADABLE)
def test_what_cannot_be_read_is_one_clear_line(unreadable: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(str(unreadable / name), plain(), FIRST)
    assert "\n" not in str(error.value)
