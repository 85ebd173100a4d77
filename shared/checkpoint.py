"""Checkpoints: every process writes its own shards, nothing is gathered; safetensors and JSON only.

    OUT/checkpoints/step-000100/rank-00000-of-00002.safetensors    parameters and Adam's moments, rows of dimension 0
                                state.json                         step, arguments, what the log has summed up
                                manifest.json                      size and sha256 of each file, written last

A directory is written under another name and renamed when it is complete. Any number of processes can read it.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shared import StorageError, sha256, sync, writing
from shared.distributed import Place, all_sum, from_main

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(out: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict, keep: int, place: Place) -> None:
    """Write `step`, then delete all but the newest `keep`. Raises StorageError; older checkpoints stay as they were."""
    from safetensors.torch import save_file

    final = out / "checkpoints" / f"step-{step:06d}"
    temporary = final.with_suffix(".tmp")
    if place.main:
        for left in final.parent.glob("*.tmp"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with writing(temporary):
            temporary.mkdir(parents=True)
    dist.barrier()
    tensors, writes = {}, place.rank < place.shards  # the others hold copies
    for name, p in model.named_parameters() if writes else ():
        tensors[name] = _local(p.detach())
        tensors |= {f"{name}|{moment}": _local(optimizer.state[p][moment]) for moment in MOMENTS}
    try:
        with writing(final):
            files = [temporary / f"rank-{place.rank:05d}-of-{place.shards:05d}.safetensors"] * writes
            for file in files:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
            if place.main:
                files.append(temporary / "state.json")
                files[-1].write_text(json.dumps({"step": step, **state}))
            sync(*files)
            entries = [None] * place.world
            dist.all_gather_object(entries, {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files})
            if place.main:
                _finish(temporary, final, {k: v for e in entries for k, v in e.items()}, keep)
    except StorageError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _finish(temporary: Path, final: Path, manifest: dict, keep: int) -> None:
    """The manifest, the rename, and then the rotation."""
    (temporary / "manifest.json").write_text(json.dumps(manifest))
    sync(temporary / "manifest.json", temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    sync(final.parent)
    found = _saved(final.parent)
    for old in [*found[: found.index(final) + 1][:-keep], *found[found.index(final) + 1 :]]:
        shutil.rmtree(old)  # those beyond this step are what a resumed run left behind, damaged


def _saved(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdecimal()), key=lambda p: int(p.name[5:]))


def newest(out: Path, place: Place) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says; the damaged ones before it are named."""
    for path in from_main(_saved(out / "checkpoints")[::-1]):
        problem = _problem(path, place)
        if not all_sum(torch.tensor(float(bool(problem)), device=place.device)):
            return path
        if problem:
            print(f"skipped {path}: {problem}")
    return None


def load(path: Path, step: int, model: nn.Module, optimizer: Optimizer, place: Place) -> None:
    """Read this process's rows of every tensor, whatever number of processes wrote them."""
    from safetensors import safe_open

    names = sorted(json.loads((path / "manifest.json").read_text()))
    files = [safe_open(path / name, "pt") for name in names if name.startswith("rank-")]
    for name, p in model.named_parameters():
        moments = {moment: torch.zeros_like(p, requires_grad=False) for moment in MOMENTS}
        steps = torch.tensor(float(step), device=place.device)
        optimizer.state[p] = {"step": steps, **moments}
        targets = {name: p.detach()} | {f"{name}|{moment}": tensor for moment, tensor in moments.items()}
        first = place.rank % place.shards * -(-p.shape[0] // place.shards)  # rows are dealt as torch.chunk deals them
        for key, target in targets.items():
            local = _local(target)
            local.copy_(_rows(files, key, first, first + len(local)))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _rows(files: list, key: str, start: int, end: int) -> Tensor:
    """Rows start:end of a tensor whose rows lie in `files`, one part after another."""
    parts, at = [], 0
    for file in files:
        part = file.get_slice(key)
        n = part.get_shape()[0]
        parts.append(part[max(0, start - at) : max(0, min(n, end - at))])
        at += n
    return torch.cat(parts)


def _problem(path: Path, place: Place) -> str | None:
    """What is wrong with a checkpoint; each process reads its share of the files."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        entries = [(path / name, entry["bytes"], entry["sha256"]) for name, entry in sorted(manifest.items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "no readable manifest.json"
    if "state.json" not in manifest or len(entries) < 2:
        return "manifest.json does not name all files"
    for file, size, known in entries[place.rank :: place.world]:
        if not file.is_file() or file.stat().st_size != size:
            return f"{file.name} is missing or of another size"
        try:
            if sha256(file) != known:
                return f"{file.name} has another sha256 than its manifest says"
        except OSError as error:
            return f"{file.name} cannot be read ({error.strerror})"
    return None
