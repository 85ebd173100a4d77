"""One code path for one process, many under torchrun, and several machines: FSDP2 over a process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where this process computes: its rank of `world`, its device, and the dtype of its forward pass."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0


def setup(dtype: str) -> Place:
    """Join the process group that torchrun describes, or make a group of one."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # scatter-adds in backward passes would sum in any order; the same run must give the same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    return Place(dist.get_rank(), dist.get_world_size(), device, getattr(torch, dtype))


def shard(model: nn.Module, blocks: list[nn.Module], place: Place) -> None:
    """FSDP2 in place: float32 master weights cut over the processes, compute in `place.dtype`, gradients in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(place.device.type, (place.world,))
    policy = MixedPrecisionPolicy(param_dtype=place.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, model):
        # one process has nothing to gather again
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=place.world > 1)


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
    dist.broadcast_object_list(values, src=0)
    return values[0]
