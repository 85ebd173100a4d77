"""One process, many under torchrun, or several machines: the process group, sharded weights, and shared values."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from shared import UserError
from shared.command import UNEXPECTED, end

TIMEOUT = float(os.environ.get("CLEANPO_TIMEOUT", 1800))  # seconds that a process waits for the others
REPORT_TIME = 10  # seconds that every process has to report that it waited in vain
# After the time-out of its collectives NCCL ends a process without a word. It has so many seconds more, which suffice
# to find the silent ranks and to write them down.
NCCL_MARGIN = 60
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the old name
ALLOCATOR_SETTING = "expandable_segments:True"
FLOAT32_COSTS = (
    "float32 on a GPU: products do without its fastest units, and attention is one call per completion; "
    "--dtype bfloat16 is many times faster, and keeps weights and optimizer state in float32"
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The process group, seen from one of its processes, and the device and dtype of this process.

    Weights are sharded over `shard_size` consecutive ranks, and each further group of that many ranks holds a replica.
    """

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of the forward pass
    shard_size: int = 1
    store: dist.Store | None = None  # key-value store that all processes share

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def hides_progress(self) -> bool | None:
        """Whether to hide progress bars. None, for tqdm's `disable`, shows them in a terminal but not in a file."""
        if self.is_main:
            return None
        return True

    def unresponsive_ranks(self) -> str:
        """After a collective timed out: the ranks that did not time out, because they never joined it.

        Every process that timed out reports to the store. This call waits 10 s for the reports.
        """
        assert self.store is not None, "a process group of one has no other ranks to wait for"
        self.store.set(f"timed out {self.rank}", "")
        time.sleep(REPORT_TIME)

        unresponsive = []
        for rank in range(self.world_size):
            if not self.store.check([f"timed out {rank}"]):
                unresponsive.append(str(rank))
        return ", ".join(unresponsive)


def join_processes(dtype: str, shard_size: int | None) -> Ranks:
    """Join the process group that torchrun describes, or make a group of one. Raises UserError for a bad shard size.

    shard_size: ranks that share one copy of the weights; None means all of them.
    """
    # Gradients of a saturated loss lie below 1e-38, where a CPU is five times slower. New threads inherit the setting.
    torch.set_flush_denormal(True)
    device, backend = _choose_device()
    if device.type == "cuda":
        _compute_deterministically()
        if dtype == "float32" and int(os.environ.get("RANK", 0)) == 0:
            print(FLOAT32_COSTS, file=sys.stderr)

    store: dist.Store = dist.HashStore()
    rank = 0
    world_size = 1
    if "RANK" in os.environ:
        _exit_with(os.getppid())
        store, rank, world_size = next(rendezvous("env://"))
    seconds = TIMEOUT
    if device.type == "cuda" and world_size > 1:
        seconds += NCCL_MARGIN
        end_without_activity()
    timeout = timedelta(seconds=seconds)
    dist.init_process_group(backend, rank=rank, world_size=world_size, store=store, timeout=timeout)

    if shard_size and world_size % shard_size:
        raise UserError(f"--shard-size {shard_size}: must divide the number of processes, {world_size}")
    return Ranks(rank, world_size, device, getattr(torch, dtype), shard_size or world_size, store)


@contextmanager
def single_process(dtype: str) -> Iterator[Ranks]:
    """Make a process group of this process alone, also under torchrun, and destroy it at the end.

    It leaves the process's numerical settings as they are.
    """
    device, backend = _choose_device()
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    try:
        yield Ranks(0, 1, device, getattr(torch, dtype))
    finally:
        dist.destroy_process_group()


def _choose_device() -> tuple[torch.device, str]:
    """This process's device, made the current one, and the backend of its process group.

    Raises UserError if this machine has fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(f"--nproc-per-node {processes}: is more than the GPUs of this machine, {gpus}")

    _avoid_fragmentation()
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device, "cpu:gloo,cuda:nccl"


def _avoid_fragmentation() -> None:
    """Let the GPU's allocator extend its segments, unless the user has set it: no two rows have the same length."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        # PyTorch may have read the variables when it was imported
        torch._C._accelerator_setAllocatorSettings(ALLOCATOR_SETTING)


def _compute_deterministically() -> None:
    """Let the same run give the same bits on a GPU, where scatter-adds would otherwise sum in any order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _exit_with(parent: int) -> None:
    """Exit when the process `parent` (torchrun) has died, because nothing else would end this one."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Activity:
    """When this process last began or ended something that others may wait for."""

    def __init__(self) -> None:
        self._noted_at = math.inf  # before the first forward pass, which may come late, nothing is overdue

    def note(self) -> None:
        """Say that a forward pass begins."""
        self._noted_at = time.monotonic()

    def renew(self) -> None:
        """Say that something else has ended."""
        if self._noted_at < math.inf:
            self.note()

    def is_overdue(self) -> bool:
        """Whether nothing has been said for the whole time that processes wait for each other."""
        return time.monotonic() - self._noted_at > TIMEOUT


activity = Activity()


def end_without_activity() -> None:
    """End this process when its activity is overdue, because on a GPU no collective raises an error for that."""

    def watch() -> None:
        while not activity.is_overdue():
            time.sleep(1)
        end(UNEXPECTED, f"timed out: no progress for {TIMEOUT:g} s")

    threading.Thread(target=watch, daemon=True).start()


def copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device. A GPU copies it from pinned memory, while this process goes on."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def shard(model: nn.Module, blocks: list[nn.Module], ranks: Ranks, read: Set[nn.Module]) -> Callable[[bool], None]:
    """Let a model keep float32 weights and gradient sums, and compute in `ranks.dtype`. Several processes share it.

    They share it by FSDP2. One process alone does without, because FSDP2's hooks would take the host as long as all its
    other work. But FSDP2 keeps the cast weights for layers that are computed again in the backward pass.

    The weights are the first process's. Of the others, `model` may lie on the meta device. Each block is copied to all
    processes and cut before the next one, so that none but the first holds more of the model than its shard.

    Frozen weights of the modules that a forward pass reads are sharded too. FSDP2 does not see the others, which no
    process gathers, nor frozen weights without shards, of which it would keep a copy.

    Returns `sync(last)`. Call it before each training forward pass; `last` says whether its micro-batch is the last of
    the step. Until then, replicas do not exchange their gradients, and unsharded weights only accumulate them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    is_recomputed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    if ranks.world_size == 1 and (ranks.dtype == torch.float32 or not is_recomputed):
        _move(model, ranks.device, read)
        if ranks.dtype != torch.float32:
            _cast_weights(model, ranks.dtype)
        return lambda last: None

    replicas = ranks.world_size // ranks.shard_size
    names = ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, (replicas, ranks.shard_size), mesh_dim_names=names)
    if replicas == 1:
        mesh = mesh["shard"]

    is_sharded = ranks.shard_size > 1  # only sharded weights are gathered for a forward pass and freed after it
    policy = MixedPrecisionPolicy(param_dtype=ranks.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    for module in (*blocks, model):
        _copy_from_main(module, ranks)
        modules = set(module.modules())
        whole = _frozen_parameters(modules - read)
        if not is_sharded:
            whole |= _frozen_parameters(modules & read)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=is_sharded, ignored_params=whole)
    if not is_sharded:
        for parameter in _frozen_parameters(read):
            parameter.data = parameter.data.to(ranks.device, copy=True)
    root: Any = model
    if is_sharded:
        return root.set_requires_all_reduce
    return root.set_requires_gradient_sync


def _cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a model hold its trained weights in another dtype while it runs.

    The cast is a step of the forward pass. So gradients reach the float32 weights, where micro-batches are summed.
    """
    places = []
    for part in model.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.requires_grad:
                places.append((part, name, weight))

    def cast(module: nn.Module, args: tuple) -> None:
        casts: dict[nn.Parameter, Any] = {}  # tied weights are cast once
        for part, name, weight in places:
            if weight not in casts:
                casts[weight] = weight.to(dtype)
            part._parameters[name] = casts[weight]

    def restore(module: nn.Module, args: tuple, output: object) -> None:
        for part, name, weight in places:
            part._parameters[name] = weight

    model.register_forward_pre_hook(cast)
    model.register_forward_hook(restore)


class _Place(NamedTuple):
    """Where a module holds a tensor."""

    module: str  # its name, "" for the outermost one
    kind: str  # "_parameters" or "_buffers", or "" for a plain attribute
    name: str
    tensor: int  # its index among the tensors; tied weights are one tensor in two places


def _copy_from_main(module: nn.Module, ranks: Ranks) -> None:
    """Put the first process's tensors of a module, but those that are cut already, into it on every process."""
    if ranks.world_size == 1:
        return
    places, tensors = _uncut_tensors(module)
    places, descriptions = from_main((places, [(x.shape, x.dtype, x.requires_grad) for x in tensors]))

    copies = []
    for i, (shape, dtype, requires_grad) in enumerate(descriptions):
        if ranks.is_main:
            copy = tensors[i].detach().to(ranks.device).contiguous()
        else:
            copy = torch.empty(shape, dtype=dtype, device=ranks.device)
        dist.broadcast(copy, 0)
        copies.append((copy, requires_grad))

    parameters: dict[int, nn.Parameter] = {}
    for place in places:
        copy, requires_grad = copies[place.tensor]
        part = module.get_submodule(place.module)
        if place.kind == "_parameters":
            parameter = parameters.setdefault(place.tensor, nn.Parameter(copy, requires_grad))
            part._parameters[place.name] = parameter
        elif place.kind == "_buffers":
            part._buffers[place.name] = copy
        else:
            setattr(part, place.name, copy)


def _uncut_tensors(module: nn.Module) -> tuple[list[_Place], list[Tensor]]:
    """All tensors that a module and its parts hold and that FSDP2 has not cut, and where they are."""
    from torch.distributed.tensor import DTensor

    places = []
    tensors: list[Tensor] = []
    indices: dict[int, int] = {}  # by identity
    for path, part in module.named_modules():
        held = [("_parameters", *item) for item in part._parameters.items()]
        held += [("_buffers", *item) for item in part._buffers.items()]
        held += [("", *item) for item in vars(part).items()]
        for kind, name, tensor in held:
            if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
                continue
            if id(tensor) not in indices:
                indices[id(tensor)] = len(tensors)
                tensors.append(tensor)
            places.append(_Place(path, kind, name, indices[id(tensor)]))
    return places, tensors


def _frozen_parameters(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters without gradients of some modules, but not of their parts."""
    frozen = set()
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                frozen.add(parameter)
    return frozen


def _move(model: nn.Module, device: torch.device, read: Set[nn.Module]) -> None:
    """Copy to the device what a forward pass reads, and let the rest of the model, which is frozen, stay where it is.

    All weights are copied. Those that were read from a file map it, and would change when the file does.
    """
    unread = _frozen_parameters(set(model.modules()) - read)
    for _, parameter in nn.Module.named_parameters(model):  # frozen ones too
        place = parameter.device if parameter in unread else device
        parameter.data = parameter.data.to(place, copy=True)
    for part in read:
        part._buffers.update({name: buffer.to(device) for name, buffer in part.named_buffers(recurse=False)})


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients inside. At the end, free the full weights that FSDP2 keeps after a forward pass without backward."""
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            reshard = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum the tensor over all processes, in place."""
    dist.all_reduce(tensor)
    activity.renew()
    return tensor


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Every process must call it."""
    activity.renew()
    full_tensor = getattr(tensor, "full_tensor", None)
    if full_tensor is None:
        return tensor
    return full_tensor()


def from_main(value: Value) -> Value:
    """The first process's value, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
        activity.renew()
    return values[0]
