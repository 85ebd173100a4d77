"""The small layer under the algorithms. Here: the ways a run may end, which `run.command` turns into exit codes."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Arguments, data or model are wrong: exit 2, before the first step."""


class NonFinite(Exception):
    """A loss or gradient is not finite: exit 3, before the update."""


class StorageError(Exception):
    """A checkpoint or a result could not be written or read: exit 4."""


class Preempted(BaseException):
    """Asked to stop; the state is saved: exit 75. No `Exception`, so that nothing on the way takes it for an error."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full, or not there, becomes a StorageError that names the path."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be written ({error})") from None


def sync(*paths: Path) -> None:
    """Files and directories as they are now outlast a crash of the machine."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
