"""log π_ref of every group, computed once before training, and cached on disk."""

import gc
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from shared.batches import Batch, Batches
from shared.distributed import all_sum, from_main, inference
from shared.files import bytes_of, cache_directory, is_complete, read_tensors, write_tensors
from shared.loading import compile_layers, load_policy_from
from shared.model import Policy


def add_reference_logps(
    reference: str | None, model: Policy, train: Batches, held_out: Batches | None, per_token: bool = False
) -> None:
    """Set `groups.ref_logps` (n, K), or `groups.ref_token_logps` (total,), of all groups that the run uses.

    π_ref is the model as it is now, unless `reference` names another one. It runs over training's own micro-batches,
    so that at the first step the log-ratios are exactly 0. The result is cached under a hash of everything that it
    depends on: weights, token ids, their order and their layout.
    """
    policy = model
    if reference:
        policy = load_policy_from(reference, train.ranks)
        if model.is_compiled:
            compile_layers(policy)
    model.fingerprints["reference"] = policy.fingerprints["model"]

    for batches in (train, held_out):
        if batches is None:
            continue
        logps = _cached_logps(policy, batches, per_token)
        if per_token:
            batches.groups.ref_token_logps = logps
        else:
            batches.groups.ref_logps = logps

    if reference:
        del policy
        gc.collect()  # FSDP2's modules and hooks refer to each other


def _cached_logps(policy: Policy, batches: Batches, per_token: bool) -> Tensor:
    is_main = batches.ranks.is_main
    path = cache_directory() / f"reference-{_cache_key(policy, batches, per_token)}.safetensors"
    cached = None
    if is_main:
        cached = _read(path)
    cached = from_main(cached)
    if cached is not None:
        return cached

    logps = _compute_logps(policy, batches, per_token)
    if is_main:
        write_tensors(path, {"ref_logps": logps})
    return logps


def _read(path: Path) -> Tensor | None:
    if not is_complete(path):
        return None
    tensors, _ = read_tensors(path)
    return tensors["ref_logps"]


def _compute_logps(policy: Policy, batches: Batches, per_token: bool) -> Tensor:
    groups = batches.groups
    shape: tuple[int, ...] = (len(groups), groups.num_completions)
    if per_token:
        shape = groups.tokens.shape
    logps = torch.zeros(shape, device=batches.ranks.device)

    with inference(policy):
        for batch in _with_progress(batches):
            if per_token:
                logps[batch.target_index] = policy(batch)
            else:
                logps[batch.group_index] = policy.logps(batch)
    return all_sum(logps).cpu()  # each process has computed its own groups, and the others are 0


def _with_progress(batches: Batches) -> Iterator[Batch]:
    """The micro-batches of all groups that the run uses, with a progress bar over the steps."""
    steps = range(1, batches.used_steps + 1)
    for step in tqdm(steps, "reference", disable=batches.ranks.hides_progress):
        yield from batches.of_step(step)


def _cache_key(policy: Policy, batches: Batches, per_token: bool) -> str:
    """A hash of everything that the log-probs depend on."""
    groups = batches.groups
    ranks = batches.ranks
    digest = hashlib.sha256()
    digest.update(bytes_of(groups.tokens))
    digest.update(bytes_of(groups.offsets))
    digest.update(bytes_of(groups.is_counted))
    for step in range(1, batches.used_steps + 1):
        digest.update(bytes_of(batches.groups_of(step)))

    key = [
        policy.fingerprints["model"],
        policy.is_compiled,
        digest.hexdigest(),
        per_token,
        batches.batch_size,
        batches.micro_batch_tokens,
        ranks.world_size,
        ranks.device.type,
        str(ranks.dtype),
        torch.__version__,
    ]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
