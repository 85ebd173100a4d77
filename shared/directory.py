"""The output directory of a run: one run at a time writes there, and status.json says how it stands."""

import fcntl
import json
import sys
from pathlib import Path
from typing import TextIO

from shared import StorageError
from shared.files import write_text

RESULTS = ("metrics.jsonl", "model.safetensors", "adapter_model.safetensors")  # what shows that a directory holds a run
STATES = {0: "done", 2: "refused", 3: "not finite", 4: "storage", 75: "preempted", 130: "interrupted"}  # by exit code


class OutputDirectory:
    """A directory with the files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: TextIO | None = None  # held open as long as the process lives
        self._earlier_status: str | None = None  # the content of status.json, as the run before has left it

    def claim(self, may_hold_run: bool) -> str | None:
        """Create and lock the directory. Returns what is wrong with it, or None."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "another run is writing there"
        except OSError as error:
            return f"cannot be written ({error.strerror})"

        holds_run = any((self.path / name).exists() for name in RESULTS)
        if holds_run and not may_hold_run:
            return "holds another run or a model; give --resume or another directory, or delete it"
        if (self.path / "status.json").exists():
            self._earlier_status = (self.path / "status.json").read_text(encoding="utf-8")
        return None

    def write(self, name: str, text: str) -> None:
        """Write a file that appears whole or not at all. Raises StorageError."""
        write_text(self.path / name, text)

    def write_status(self, state: str, step: int, reason: str) -> None:
        """Write status.json. Raises StorageError."""
        self.write("status.json", json.dumps({"state": state, "step": step, "reason": reason}))

    def write_final_status(self, code: int, step: int, reason: str, is_main: bool) -> None:
        """Write how the run ended, unless another process has. The first one that fails knows why; the others follow.

        A --resume that is refused leaves what the run before has written. A problem is printed, because nothing else
        can be done about it.
        """
        try:
            status = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
            if status["state"] != "running" or not (code or is_main):
                return
            if STATES.get(code) == "refused" and self._earlier_status is not None:
                self.write("status.json", self._earlier_status)
            else:
                self.write_status(STATES.get(code, "failed"), step, reason)
        except FileNotFoundError:
            pass  # the file could not be written when the run started, which is the reason for its end
        except (StorageError, OSError, ValueError) as error:
            print(f"{self.path}/status.json: cannot be written ({error})", file=sys.stderr)
