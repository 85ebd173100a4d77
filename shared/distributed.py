"""One process, many under torchrun, and several machines: a process group, and FSDP2 where there is what to cut."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from shared import UserError

TIMEOUT = float(os.environ.get("CLEANPO_TIMEOUT", 1800))  # seconds that a process waits for the others


@dataclass(frozen=True)
class Place:
    """Where this process computes: its rank of `world`, its device, and the dtype of its forward pass.

    The weights are cut over `shards` consecutive processes; the next ones hold a copy.
    """

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    shards: int = 1
    store: dist.Store | None = None  # which all processes read and write

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def silent(self) -> str:
        """After a collective that timed out: the processes that have not noticed, which the others waited for."""
        self.store.set(f"timed out {self.rank}", "")
        time.sleep(10)
        return ", ".join(str(rank) for rank in range(self.world) if not self.store.check([f"timed out {rank}"]))


def setup(dtype: str, shard_size: int | None) -> Place:
    """Join the process group that torchrun describes, or make a group of one. Raises UserError for a bad shard size."""
    # gradients of a saturated loss lie below 1e-38, where a CPU takes five times as long; threads to come inherit it
    torch.set_flush_denormal(True)
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # scatter-adds in backward passes would sum in any order; the same run must give the same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        _end_with(os.getppid())
        store, rank, world = next(rendezvous("env://"))
    dist.init_process_group(backend, rank=rank, world_size=world, store=store, timeout=timedelta(seconds=TIMEOUT))
    if shard_size and world % shard_size:
        raise UserError(f"--shard-size {shard_size}: must divide the number of processes, {world}")
    return Place(rank, world, device, getattr(torch, dtype), shard_size or world, store)


def _end_with(parent: int) -> None:
    """End this process when torchrun has died: nothing else would."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shard(model: nn.Module, blocks: list[nn.Module], place: Place) -> Callable[[bool], None]:
    """FSDP2 in place: float32 master weights cut over the processes, compute in `place.dtype`, gradients in float32.

    One process in float32 has nothing to cut and nothing to cast, and stays without. → a function to call before each
    forward pass that has a backward pass, with whether that is its step's last one: until then copies do not exchange
    their gradients, and those of uncut weights are only added up.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if place.world == 1 and place.dtype == torch.float32:
        for p in model.parameters():  # what was read from a file is a view of it, which changes as the file does
            p.data = p.data.to(place.device, copy=True)
        model.to(place.device)
        return lambda last: None
    copies = place.world // place.shards
    mesh = init_device_mesh(place.device.type, (copies, place.shards), mesh_dim_names=("copies", "shards"))
    mesh = mesh if copies > 1 else mesh["shards"]
    policy = MixedPrecisionPolicy(param_dtype=place.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, model):
        # uncut weights need not be gathered again
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=place.shards > 1)
    return model.set_requires_all_reduce if place.shards > 1 else model.set_requires_gradient_sync


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, and sharded parameters again afterwards: FSDP2 keeps gathered ones after a lone forward pass."""
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    dist.all_reduce(tensor)
    return tensor


def from_main(value):
    """The first process's value, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]
