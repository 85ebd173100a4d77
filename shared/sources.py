"""Containers of rows: jsonl, json and parquet files (each also .gz), directories, saved datasets, hub ids."""

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shared import UserError, first_line
from shared.files import missing_path, sha256_of

if TYPE_CHECKING:
    from datasets import Dataset

ENDINGS = (".jsonl", ".json", ".parquet")
MARKERS = ("dataset_info.json", "dataset_dict.json")  # one of them is in the directory of every saved dataset
# Words of a file's name that say which split its rows are.
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "eval": "eval",
    "evaluation": "eval",
    "dev": "dev",
    "held": "held_out",
    "heldout": "held_out",
    "holdout": "held_out",
}
BinaryFile = io.BufferedReader | gzip.GzipFile


def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """Yield (location, row) of every row of a source; the location is "FILE, line N" for error messages.

    A source is a file, a directory of files, a saved dataset or a hub id; all but a file also as `path:split`. Raises
    UserError where it cannot be read.
    """
    for part in files_of(source):
        if isinstance(part, Path):
            yield from _read_file(part)
            continue
        for number, row in enumerate(part, 1):
            yield f"{source}, row {number}", row


def files_of(source: str) -> "list[Path] | list[Dataset]":
    """The files behind a source, or the opened dataset if the source is not made of plain files."""
    path, split = _path_and_split(source)
    location = Path(path)

    if location.is_file():
        if split:
            raise UserError(f"{source}: a file has no splits")
        if _ending(location) is None:
            raise UserError(f"{source}: the file's name must end in {', '.join(ENDINGS)}, each also with .gz")
        return [location]

    is_saved_dataset = any((location / marker).exists() for marker in MARKERS)
    if location.is_dir() and not is_saved_dataset:
        return _files_of_split(location, split)

    return [_open_dataset(path, split)]


def source_hash(source: str) -> str:
    """SHA-256 over the hashes of a source's files, or over the fingerprint that `datasets` keeps."""
    digest = hashlib.sha256()
    for part in files_of(source):
        digest.update(_fingerprint(part).encode())
    return digest.hexdigest()


def _fingerprint(part: "Path | Dataset") -> str:
    if not isinstance(part, Path):
        return part._fingerprint
    try:
        return sha256_of(part)
    except OSError as error:
        raise UserError(f"{part}: cannot be read ({error.strerror})") from None


def _path_and_split(source: str) -> tuple[str, str | None]:
    if os.path.exists(source) or ":" not in source:
        return source, None
    path, split = source.rsplit(":", 1)
    return path, split


# ---------------------------------------------------------------- directories and datasets


def _files_of_split(directory: Path, split: str | None) -> list[Path]:
    """The files of a split, told by their names, or all files if they look like one split."""
    files = _files_in(directory)
    names_of_splits = {path.name: _split_in_name(path.name) for path in files}
    splits = sorted({name for name in names_of_splits.values() if name})
    if split is None:
        held_out = set(splits) - {"train"}
        if held_out and len(set(names_of_splits.values())) > 1:
            names = ", ".join(names_of_splits)
            choices = " or ".join(f"{directory}:{name}" for name in splits)
            raise UserError(f"{directory}: the files look like different splits ({names}); give one file, or {choices}")
        return files

    if not splits:
        raise UserError(f"{directory}:{split}: a directory of files has no splits; name one of its files")
    wanted = SPLITS.get(split.lower(), split)
    of_split = [path for path in files if names_of_splits[path.name] == wanted]
    if not of_split:
        raise UserError(f"{directory}:{split}: no file of this split; there are {', '.join(splits)}")
    return of_split


def _split_in_name(name: str) -> str | None:
    """The split whose name is a word of a file's name."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word in SPLITS:
            return SPLITS[word]
    return None


def _files_in(directory: Path) -> list[Path]:
    if (directory / "config.json").exists() or (directory / "adapter_config.json").exists():
        raise UserError(f"{directory}: is a model, not rows")
    files = sorted(path for path in directory.iterdir() if _ending(path))
    if not files:
        raise UserError(f"{directory}: no file that ends in {', '.join(ENDINGS)} (or .gz) in this directory")
    return files


def _ending(path: Path) -> str | None:
    """Which of ENDINGS a file name has, with or without .gz."""
    for ending in ENDINGS:
        if path.name.endswith((ending, ending + ".gz")):
            return ending
    return None


def _open_dataset(path: str, split: str | None) -> "Dataset":
    name = split or "train"
    is_saved = os.path.isdir(path)
    problem = missing_path(path)
    if problem:
        raise UserError(f"{path}: {problem}")
    try:
        import datasets

        if is_saved:
            dataset = datasets.load_from_disk(path)
        else:
            dataset = datasets.load_dataset(path, split=name)
    except Exception as error:  # the hub's errors share no base class
        reason = first_line(error)
        raise UserError(f"{path}: neither a file, a directory nor a data set on the hub ({reason})") from None

    if isinstance(dataset, datasets.DatasetDict):
        if name not in dataset:
            raise UserError(f"{path}: no split {name!r}; there are {', '.join(dataset)}")
        return dataset[name]
    if is_saved and split:
        raise UserError(f"{path}: a data set without splits, but {split!r} was asked for")
    return dataset


# ---------------------------------------------------------------- files


def _read_file(path: Path) -> Iterator[tuple[str, dict]]:
    ending = _ending(path)
    assert ending is not None, "it has been checked with the source"
    unit = "line" if ending == ".jsonl" else "row"
    for number, row in _numbered_rows(path, ending):
        location = f"{path}, {unit} {number}"
        if not isinstance(row, dict):
            raise UserError(f"{location}: a row must be an object with named columns, not {type(row).__name__}")
        yield location, row


def _numbered_rows(path: Path, ending: str) -> Iterator[tuple[int, object]]:
    """Yield (number, row), where the number is that of the line in a file of lines, else of the row, from 1."""
    try:
        with _open(path) as file:
            if ending == ".parquet":
                yield from _parquet_rows(file)
            elif _begins_with_bracket(file):
                yield from _json_array(path, file)
            else:
                yield from _json_lines(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def _open(path: Path) -> BinaryFile:
    if path.suffix == ".gz":
        return gzip.open(path)
    return open(path, "rb")


def _parquet_rows(file: BinaryFile) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        if isinstance(file, gzip.GzipFile):
            table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()))
        else:
            table = pyarrow.parquet.ParquetFile(file)
        rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError, OverflowError) as error:  # OverflowError: dates beyond Python's
        raise OSError(error) from None


def _begins_with_bracket(file: BinaryFile) -> bool:
    """Whether a JSON file is one array, whatever its name, rather than one object per line."""
    start = file.peek(64).removeprefix(codecs.BOM_UTF8)
    return start.lstrip().startswith(b"[")


def _json_array(path: Path, file: BinaryFile) -> Iterator[tuple[int, object]]:
    try:
        rows = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)})") from None
    yield from enumerate(rows, 1)


def _json_lines(path: Path, file: BinaryFile) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 ({error.reason} at byte {error.start})"
            raise UserError(f"{path}, line {number}: {problem}") from None
        except (ValueError, RecursionError) as error:
            hint = ""
            if line.strip() in (b"{", b"{}"):
                hint = "; rows are a list, or one object a line"
            raise UserError(f"{path}, line {number}: not valid JSON ({first_line(error)}){hint}") from None
        yield number, row
