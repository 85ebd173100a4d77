"""Files as the stages of an experiment leave them, made up."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiny

from scripts.lab.pipeline import Artifact, Stage


class Outputs:
    """Files with numbers for names in one directory, as if one stage had written them."""

    def __init__(self, directory: Path):
        self.stage = Stage("made-up", "", {}, directory, "")
        self.number = 0

    def json(self, contents: Any) -> Artifact:
        """A JSON file."""
        return self.rows([contents])

    def rows(self, rows: Iterable) -> Artifact:
        """A jsonl file."""
        self.number += 1
        artifact = Artifact(self.stage, f"{self.number}")
        tiny.write_jsonl(artifact.path, rows)
        return artifact
