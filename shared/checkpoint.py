"""Checkpoints: every process writes its own shard, and nothing is gathered; safetensors and JSON only.

    DIRECTORY/checkpoints/step-000100/
        rank-00000-of-00002.safetensors    a shard of the parameters and of Adam's moments, split along dimension 0
        state.json                         the step, the arguments, and sums that are not logged yet
        manifest.json                      the size and the SHA-256 of each other file, written last

A checkpoint is written under another name, and renamed when it is complete. Any number of processes can load it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shared import StorageError
from shared.distributed import Ranks, all_sum, from_main
from shared.files import fsync, sha256_of, storage_errors

MOMENTS = ("exp_avg", "exp_avg_sq")

Manifest = dict[str, dict[str, Any]]  # file name → {"bytes": size, "sha256": hash}


# ---------------------------------------------------------------- save


def save(
    directory: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict, keep: int, ranks: Ranks
) -> None:
    """Write a checkpoint, then delete all but the newest `keep`. After a StorageError, older ones are as they were."""
    final = directory / "checkpoints" / f"step-{step:06d}"
    temporary = final.with_suffix(".tmp")
    if ranks.is_main:
        _make_directory(temporary)
    dist.barrier()

    try:
        with storage_errors(final):
            files = _write_shard(temporary, model, optimizer, ranks)
            if ranks.is_main:
                state_file = temporary / "state.json"
                state_file.write_text(json.dumps({"step": step, **state}))
                files.append(state_file)
            fsync(*files)

            manifest = _gather_manifest(files, ranks)
            if ranks.is_main:
                _publish(temporary, final, manifest)
                _rotate(final, keep)
    except StorageError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_directory(temporary: Path) -> None:
    """Make the directory to write to, and remove those of processes that were killed."""
    for abandoned in temporary.parent.glob("*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with storage_errors(temporary):
        temporary.mkdir(parents=True)


def _write_shard(temporary: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> list[Path]:
    """Write this process's part of the weights and moments. Only the first replica writes, and the others have no file.

    Returns the files that were written.
    """
    from safetensors.torch import save_file

    if ranks.rank >= ranks.shard_size:
        return []

    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = _local(parameter.detach()).contiguous()
        for moment in MOMENTS:
            tensors[f"{name}|{moment}"] = _local(optimizer.state[parameter][moment]).contiguous()

    file = temporary / f"rank-{ranks.rank:05d}-of-{ranks.shard_size:05d}.safetensors"
    save_file(tensors, file)
    return [file]


def _gather_manifest(files: list[Path], ranks: Ranks) -> Manifest:
    """The size and hash of every process's files."""
    entries = {}
    for file in files:
        entries[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    entries_of_ranks: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(entries_of_ranks, entries)
    manifest = {}
    for entries in entries_of_ranks:
        manifest.update(entries)
    return manifest


def _publish(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest, and give the directory its final name."""
    manifest_file = temporary / "manifest.json"
    manifest_file.write_text(json.dumps(manifest))
    fsync(manifest_file, temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    fsync(final.parent)


def _rotate(current: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` up to the current one.

    Those of later steps go too: a run that is at this step now has found them damaged when it resumed.
    """
    checkpoints = published(current.parent)
    end = checkpoints.index(current) + 1
    outdated = checkpoints[:end][:-keep]
    damaged = checkpoints[end:]
    for checkpoint in outdated + damaged:
        shutil.rmtree(checkpoint)


def published(directory: Path) -> list[Path]:
    """The checkpoints that have their final name, oldest first."""
    names = [path for path in directory.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(names, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The last step that was done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


# ---------------------------------------------------------------- find


def newest(directory: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says. A line is printed for each damaged one."""
    checkpoints = from_main(published(directory / "checkpoints"))
    for checkpoint in reversed(checkpoints):
        problem = problem_of(checkpoint, ranks)
        problems = torch.tensor(float(problem is not None), device=ranks.device)
        if not all_sum(problems):
            return checkpoint
        if problem:
            print(f"skipped {checkpoint}: {problem}")
    return None


def problem_of(checkpoint: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, if anything. Each process reads its share of the files."""
    entries = []
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, entry in sorted(manifest.items()):
            entries.append((checkpoint / name, entry["bytes"], entry["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "no readable manifest.json"

    if "state.json" not in manifest or len(entries) < 2:
        return "manifest.json does not name all files"
    for file, size, sha256 in entries[ranks.rank :: ranks.world_size]:
        problem = _file_problem(file, size, sha256)
        if problem:
            return problem
    return None


def _file_problem(file: Path, size: int, sha256: str) -> str | None:
    if not file.is_file() or file.stat().st_size != size:
        return f"{file.name} is missing or of another size"
    try:
        actual = sha256_of(file)
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    if actual != sha256:
        return f"{file.name} has another sha256 than its manifest says"
    return None


# ---------------------------------------------------------------- load


def load(path: Path, step: int, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
    """Load this process's part of every tensor, whatever number of processes wrote the checkpoint."""
    load_weights(path, model, ranks)
    files = _open_shards(path)
    for name, parameter in model.named_parameters():
        start = _first_index(parameter, ranks)
        state = {"step": torch.tensor(float(step), device=ranks.device)}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, requires_grad=False)
            _load_part(files, f"{name}|{moment}", state[moment], start)
        optimizer.state[parameter] = state


def load_weights(path: Path, model: nn.Module, ranks: Ranks) -> None:
    """Load this process's part of the weights alone."""
    files = _open_shards(path)
    for name, parameter in model.named_parameters():
        _load_part(files, name, parameter.detach(), _first_index(parameter, ranks))


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors in a checkpoint, as the model names its parameters."""
    return set(_open_shards(path)[0].keys())


def _open_shards(path: Path) -> list[Any]:
    """The checkpoint's safetensors files in the order of the ranks that wrote them."""
    from safetensors import safe_open

    manifest = json.loads((path / "manifest.json").read_text())
    names = sorted(name for name in manifest if name.startswith("rank-"))
    return [safe_open(path / name, "pt") for name in names]


def _first_index(parameter: Tensor, ranks: Ranks) -> int:
    """The index in dimension 0 at which this process's shard begins; FSDP2 splits as torch.chunk does."""
    size = parameter.shape[0]
    shard = ranks.rank % ranks.shard_size
    per_shard = -(-size // ranks.shard_size)  # rounded up
    return shard * per_shard


def _load_part(files: list[Any], name: str, target: Tensor, start: int) -> None:
    """Copy the part of a stored tensor that begins at index `start` of dimension 0 into this process's shard of it."""
    local = _local(target)
    end = start + len(local)
    parts = []
    file_start = 0
    for file in files:
        stored = file.get_slice(name)
        file_size = stored.get_shape()[0]
        part_start = max(0, start - file_start)
        part_end = max(0, min(file_size, end - file_start))
        parts.append(stored[part_start:part_end])
        file_start += file_size
    local.copy_(torch.cat(parts))


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor that FSDP2 has sharded, or else the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    return to_local()
