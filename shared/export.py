"""Write the trained model as a Hugging Face directory."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from shared.distributed import Ranks, unsharded
from shared.files import storage_errors
from shared.model import PackedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAST_FILE = "config.json"  # nothing can be loaded without it, so it appears when all others are there


def export(
    model: PackedModel, tokenizer: "PreTrainedTokenizerBase", directory: Path, model_card: str, ranks: Ranks
) -> None:
    """Write the weights, gathered, with configuration, tokenizer and model card. Raises StorageError.

    Trained weights are in float32, frozen ones in the dtype of the starting model's files.
    """
    state_dict = _gather(model, ranks)
    if not ranks.is_main:
        return

    temporary = directory / ".export"
    try:
        with storage_errors(directory):
            model.lm.save_pretrained(temporary, state_dict=state_dict)
            model.lm.config.dtype = "float32"  # the text part's, whatever a frozen part has
            model.lm.config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(model_card)
            files = sorted(temporary.iterdir(), key=lambda file: file.name == LAST_FILE)
            for file in files:
                os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _gather(model: PackedModel, ranks: Ranks) -> dict[str, Tensor | None]:
    """All weights by name, in the memory of the first process; None on the others."""
    state_dict: dict[str, Tensor | None] = {}
    gathered: dict[int, Tensor | None] = {}
    for name, tensor in model.lm.state_dict(keep_vars=True).items():
        # tied weights are one tensor under two names
        if id(tensor) not in gathered:
            weights = unsharded(tensor)
            if ranks.is_main:
                gathered[id(tensor)] = weights.detach().cpu()
            else:
                gathered[id(tensor)] = None
        state_dict[name] = gathered[id(tensor)]
    return state_dict
