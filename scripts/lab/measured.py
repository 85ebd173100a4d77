"""The numbers that the stages of an experiment have left in their files, as float64 tensors."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.lab.pipeline import Artifact
from scripts.lab.row_files import read_jsonl


def tensor_of(numbers: Sequence) -> Tensor:
    """Nested lists of numbers."""
    return torch.tensor(numbers, dtype=torch.double)


def read(artifact: Artifact) -> dict:
    """A JSON file."""
    return json.loads(artifact.path.read_text(encoding="utf-8"))


def policies_in(results: Artifact) -> dict[str, dict]:
    """The numbers of each policy, as evaluate.py writes them."""
    return read(results)["policies"]


def rewards_of(numbers: dict) -> Tensor:
    """The true reward of each sample of a policy in `policies_in`, (n, K)."""
    return tensor_of(numbers["rewards"])


def logps_in(results: Artifact) -> dict[str, Tensor]:
    """log π of each row's completions under each policy, as logps.py writes them, (n, K) each."""
    return {name: tensor_of(logps) for name, logps in read(results)["logps"].items()}


def scores_of(rows: Artifact) -> Tensor:
    """The scores of each row's completions, as score.py writes them: (n, K), or with M models (n, K, M)."""
    return tensor_of([row["scores"] for row in read_jsonl(rows.path)])
