"""Files that appear whole or not at all, and what their bytes are."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from shared import StorageError

BLOCK = 2**20  # bytes that are read and hashed at a time


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the error of a full or missing disk into a StorageError that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be written ({error})") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there replaces `path` when the block succeeds.

    Whoever reads `path` meanwhile sees the old file or the new one, never a part. After an error the temporary file
    is gone and `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def fsync(*paths: Path) -> None:
    """Make files and directories, as they are now, outlast a crash of the machine."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- text and JSON


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears whole or not at all. Raises StorageError."""
    with storage_errors(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object, indent: int = 1) -> None:
    """Write a value as indented JSON in UTF-8, without escapes. Raises StorageError."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False))


# ---------------------------------------------------------------- tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that appears whole or not at all. Raises StorageError."""
    from safetensors.torch import save_file

    with storage_errors(path), replacing(path) as temporary:
        save_file(tensors, temporary, metadata)
        fsync(temporary)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    return tensors, metadata


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, to be hashed."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def missing_path(name: str) -> str | None:
    """What is wrong with a name that is meant as a path but leads nowhere; None if it may be the id of something.

    A path begins with a dot, ~ or /, has several slashes or the ending of a file of rows, or lies in a directory that
    exists.
    """
    path = Path(name)
    if path.exists():
        return None
    has_ending = path.suffix in (".jsonl", ".json", ".parquet", ".gz", ".safetensors")
    is_in_directory = path.parent != Path(".") and path.parent.is_dir()
    if not (has_ending or is_in_directory or name.startswith((".", "~", "/")) or name.count("/") > 1):
        return None

    if any(sign in name for sign in ",*"):
        return "must be one file or a directory of files"
    problem = "no such file or directory"
    if path.parent.is_dir():
        names = [other.name for other in path.parent.iterdir()]
        similar = difflib.get_close_matches(path.name, names, n=1)
        if similar:
            problem += f"; there is {path.with_name(similar[0])}"
    return problem


def is_complete(path: Path) -> bool:
    """Whether a safetensors file exists and is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        safe_open(path, "pt")
    except (OSError, SafetensorError):
        return False
    return True


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/cleanpo`, by default `~/.cache/cleanpo`; created if it is missing. Raises StorageError."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(parent) / "cleanpo"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a directory that can be written"
        raise StorageError(f"{path}: cannot be made ({error.strerror}); {remedy}") from None
    return path
