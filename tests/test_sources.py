"""The same rows from every container, and files that cannot be read."""

import gzip
import json
from pathlib import Path

import pytest
import tiny
from tokenised import FIRST, ended, ids, load, pieces, plain

from shared import UserError
from shared.sources import files_of, read_rows, source_hash


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
    ("absent.jsonl", "no such file or directory"),
    ("fils", "no such file or directory; there is .*files$"),
    ("latin.jsonl,truncated.parquet", "must be one file or a directory of files"),
    ("*.jsonl", "must be one file or a directory of files"),
    ("model", "model: is a model, not rows"),
    ("spread.json", "line 1: not valid JSON .*; rows are a list, or one object a line"),
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
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "spread.json").write_text('{\n"text": "a"\n}')
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


@pytest.mark.parametrize("name", ["pears.jsonl", "./pears", "~/pears", "data/more/pears", "tests/pears"])
def test_a_path_that_leads_nowhere_asks_no_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tiny.ROOT)
    with pytest.raises(UserError, match="no such file or directory"):
        files_of(name)


def test_the_ending_of_a_file_counts_before_the_cache(tmp_path: Path) -> None:
    """Its content may have been read under another name."""
    for name in ("rows.jsonl", "rows.txt"):
        (tmp_path / name).write_text('{"text": "ok ok"}\n')
    load(str(tmp_path / "rows.jsonl"), plain(), FIRST)
    with pytest.raises(UserError, match="rows.txt: the file's name must end in"):
        load(str(tmp_path / "rows.txt"), plain(), FIRST)


# ---------------------------------------------------------------- splits in one directory


def write_files(folder: Path, *names: str) -> str:
    """A directory of files of one row, whose text is the file's name; its path."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return str(folder)


def texts_of(source: str) -> list[str]:
    return [row["text"] for _, row in read_rows(source)]


@pytest.mark.parametrize(
    "names, splits",
    [
        (["test.jsonl", "train.jsonl"], "dir:test or dir:train"),
        (["a-eval.json", "a-train-00000-of-00002.json", "a-train-00001-of-00002.json"], "dir:eval or dir:train"),
        (["Validation_prefs.jsonl", "train_prefs.jsonl"], "dir:train or dir:validation"),
        (["dev.jsonl", "test.jsonl"], "dir:dev or dir:test"),
        (["rows.jsonl", "test.jsonl"], "dir:test"),
        (["held_out.jsonl", "sft.jsonl"], "dir:held_out"),
    ],
    ids=str,
)
def test_files_of_different_splits_are_refused(tmp_path: Path, names: list[str], splits: str) -> None:
    source = write_files(tmp_path / "dir", *names)
    expected = f"{source}: the files look like different splits ({', '.join(names)}); give one file, or "
    with pytest.raises(UserError) as error:
        texts_of(source)
    assert str(error.value) == expected + splits.replace("dir:", f"{source}:")

    with pytest.raises(UserError, match="look like different splits"):
        source_hash(source)


@pytest.mark.parametrize(
    "split, names",
    [
        ("train", ["a-train-1.jsonl", "a-train-2.jsonl"]),
        ("test", ["a-test.jsonl"]),
        ("val", ["a-valid.jsonl"]),
        ("validation", ["a-valid.jsonl"]),
    ],
)
def test_the_files_of_one_split(tmp_path: Path, split: str, names: list[str]) -> None:
    everything = ["a-train-1.jsonl", "a-train-2.jsonl", "a-test.jsonl", "a-valid.jsonl", "latest.jsonl"]
    source = write_files(tmp_path / "dir", *everything)
    assert texts_of(f"{source}:{split}") == names
    assert source_hash(f"{source}:{split}") != source_hash(f"{source}/latest.jsonl")


def test_a_split_without_files_is_refused(tmp_path: Path) -> None:
    source = write_files(tmp_path / "dir", "train.jsonl", "test.jsonl")
    with pytest.raises(UserError, match="dir:eval: no file of this split; there are test, train"):
        texts_of(f"{source}:eval")


@pytest.mark.parametrize(
    "names", [["a.jsonl", "b.json"], ["more.jsonl", "train.jsonl"], ["test-1.jsonl", "test-2.jsonl"]]
)
def test_files_of_one_split_are_read_together(tmp_path: Path, names: list[str]) -> None:
    assert texts_of(write_files(tmp_path / "dir", *names)) == names


def test_unknown_columns_name_the_file(tmp_path: Path) -> None:
    source = write_files(tmp_path / "dir", "infos.jsonl", "train.jsonl")
    (tmp_path / "dir" / "infos.jsonl").write_text('{"default": 1}\n')
    with pytest.raises(UserError, match="infos.jsonl, line 1: unknown columns default"):
        load(source, plain(), FIRST)
