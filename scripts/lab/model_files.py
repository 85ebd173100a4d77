"""The files of a model directory, and a copy of it in which a few things are changed.

Weights are changed inside their files, by the name of the tensor. All files in which nothing changes are copied byte
for byte.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shared import UserError, first_line
from shared.export import (
    GENERATION_CONFIG,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    copy_files,
    read_json,
    write_generation_config,
    write_tokenizer,
)
from shared.files import is_complete, read_tensors, storage_errors, write_json, write_tensors
from shared.lora import ADAPTER_CONFIG

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CONFIG = "config.json"
CARD = "README.md"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_FILES = (CONFIG, GENERATION_CONFIG, *PROCESSOR_FILES, CARD, "LICENSE*", "NOTICE*", "USE_POLICY*")
DTYPE_KEYS = ("dtype", "torch_dtype")  # the name today, and the one of earlier transformers


@dataclass(kw_only=True)
class Changes:
    """What is different in a copy of a model. Everything else stays."""

    remark: str
    """what was done, for the model card"""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """new values, under the names that the files have"""
    config: dict[str, Any] = field(default_factory=dict)
    """new entries of the configuration, or of its part about text if it has several"""
    tokenizer: "PreTrainedTokenizerBase | None" = None
    """a changed tokenizer"""
    end_ids: list[int] = field(default_factory=list)
    """ids that end a completion, to be added to the generation config"""


# ---------------------------------------------------------------- directories


def refuse_existing(directory: Path) -> None:
    """Raises UserError unless the path is free, or an empty directory."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"--output-dir {directory}: exists; give another directory, or remove it")


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `directory`, which takes its place when the block succeeds.

    Raises UserError if something is there, and StorageError if it cannot be written.
    """
    refuse_existing(directory)
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        with storage_errors(directory):
            temporary.mkdir(parents=True)
            yield temporary
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def directory_of(model: str) -> Path:
    """The directory with a model's files. Those of a hub id are downloaded if need be."""
    from huggingface_hub import snapshot_download

    if Path(model).is_dir():
        return Path(model)
    patterns = [*TOKENIZER_FILES, *OTHER_FILES, "*.safetensors", INDEX]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub's errors have many classes
        raise UserError(f"model {model}: cannot be loaded ({first_line(error)})") from None


def is_written(directory: Path) -> bool:
    """Whether a directory holds a model or an adapter."""
    return (directory / CONFIG).exists() or (directory / ADAPTER_CONFIG).exists()


def is_reward_model(config: "PretrainedConfig") -> bool:
    """Whether a model directory holds a sequence classifier."""
    return any("SequenceClassification" in name for name in config.architectures or [])


# ---------------------------------------------------------------- weights


def files_of_tensors(directory: Path) -> dict[str, Path]:
    """{name of a tensor: the file that holds it}, of the files that transformers would read.

    Raises UserError if there are none, or one is damaged.
    """
    from safetensors import safe_open

    index = read_json(directory / INDEX)
    if (directory / WEIGHTS).exists():
        files = [directory / WEIGHTS]
    elif index is not None:
        files = sorted({directory / name for name in index["weight_map"].values()})
    else:
        raise UserError(f"model {directory}: has no {WEIGHTS}; load and save it with transformers first")

    file_of = {}
    for file in files:
        if not is_complete(file):
            raise UserError(f"model {file}: is missing or not complete")
        with safe_open(file, "pt") as stored:
            file_of.update(dict.fromkeys(stored.keys(), file))
    return file_of


def names_in_files(lm: Any, tensors: dict[str, Tensor], stored: Iterable[str], model: str) -> dict[str, Tensor]:
    """Tensors of a transformers model, under the names of its files rather than of its parameters.

    Tied weights, one tensor under two names, may have either or both. Raises UserError for a tensor without a name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    known = set(stored)
    renamed = {}
    for name, tensor in revert_weight_conversion(lm, tensors).items():
        without_prefix = name.removeprefix(f"{lm.base_model_prefix}.")
        for candidate in (name, without_prefix):
            if candidate in known:
                renamed[candidate] = tensor
                break

    written = {id(tensor) for tensor in renamed.values()}
    for name, tensor in tensors.items():
        if id(tensor) not in written:
            raise UserError(f"model {model}: its files hold no {name}")
    return renamed


def _write_weights(source: Path, changed: dict[str, Tensor], target: Path) -> None:
    """Copy the files of weights, with other tensors in the place of those that change."""
    file_of = files_of_tensors(source)
    for file in sorted(set(file_of.values())):
        of_this_file = {name: tensor for name, tensor in changed.items() if file_of[name] == file}
        if of_this_file:
            tensors, metadata = read_tensors(file)
            write_tensors(target / file.name, tensors | of_this_file, metadata)
        else:
            shutil.copyfile(file, target / file.name)

    index = read_json(source / INDEX)
    if index is not None and not (source / WEIGHTS).exists():
        if changed:
            index["metadata"] = {**index.get("metadata", {}), "total_size": total_size(target)}
        write_json(target / INDEX, index, indent=2)


def total_size(directory: Path) -> int:
    """The bytes of all tensors in the files of a directory, as the index of a model has it."""
    size = 0
    for file in directory.glob("*.safetensors"):
        tensors, _ = read_tensors(file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    return size


# ---------------------------------------------------------------- a copy


def write_copy(source: Path, changes: Changes, output_dir: Path) -> None:
    """Write a copy of a model directory that differs by the changes alone.

    Raises UserError if something is at its place, and StorageError if it cannot be written.
    """
    with new_directory(output_dir) as directory:
        copy_others(source, changes, directory)
        _write_weights(source, changes.tensors, directory)


def copy_others(source: Path, changes: Changes, directory: Path) -> None:
    """Copy all files but the weights, with the changes."""
    copy_files(source, OTHER_FILES, directory)
    if changes.tokenizer is None:
        copy_files(source, TOKENIZER_FILES, directory)
    else:
        write_tokenizer(changes.tokenizer, source, directory)

    if changes.config:
        _change_config(directory / CONFIG, changes.config)
    if changes.end_ids:
        _add_end_ids(source, changes.end_ids, directory)
    if "pad_token_id" in changes.config:
        generation = read_json(directory / GENERATION_CONFIG)
        if generation is not None:
            generation["pad_token_id"] = changes.config["pad_token_id"]
            write_json(directory / GENERATION_CONFIG, generation, indent=2)

    with open(directory / CARD, "a", encoding="utf-8") as card:
        card.write(f"\n## Prepared with cleanpo\n\n{changes.remark}\n")


def _change_config(file: Path, entries: dict[str, Any]) -> None:
    """Set entries in the part about text, and in the whole where it has an entry of that name too."""
    content = read_json(file) or {}
    text_config = content.get("text_config", content)
    for name, value in entries.items():
        text_config[name] = value
        if name in content:
            content[name] = value
        if name == "dtype":
            _set_dtype(content, value)
    write_json(file, content, indent=2)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set the dtype in a configuration and in all its parts that have one."""
    for name, value in config.items():
        if name in DTYPE_KEYS:
            config[name] = dtype
        elif isinstance(value, dict):
            _set_dtype(value, dtype)


def _add_end_ids(source: Path, end_ids: list[int], directory: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if is_reward_model(config):
        return
    default = GenerationConfig.from_model_config(config)
    write_generation_config(config, default, end_ids, source, directory)
