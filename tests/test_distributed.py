"""What a process does on a GPU before the first tensor is there, on a CPU that passes for a machine with GPUs."""

import pytest
import torch
import torch.distributed as dist

from shared import UserError, distributed
from shared.command import _is_first_of_machine
from shared.distributed import Activity, _choose_device, copied, join_processes


class Machine:
    """A machine with so many GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int):
        self.settings: list[str] = []  # of the allocator
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.settings.append)
        for name in distributed.ALLOCATOR_VARIABLES:
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, 2)


def test_a_process_has_the_gpu_of_its_local_rank(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _choose_device() == (torch.device("cuda", 0), "cpu:gloo,cuda:nccl")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert _choose_device() == (torch.device("cuda", 1), "cpu:gloo,cuda:nccl")


@pytest.mark.parametrize("local_rank", ["0", "2"])
def test_more_processes_than_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch, local_rank: str) -> None:
    """Every process of the machine says so, because one that waited for another would wait in vain."""
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--nproc-per-node 3: is more than the GPUs of this machine, 2"):
        _choose_device()


def test_a_launcher_that_gives_no_local_world_size(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc-per-node 3"):
        _choose_device()


def test_segments_of_the_allocator_are_extended(machine: Machine) -> None:
    _choose_device()
    assert machine.settings == ["expandable_segments:True"]


@pytest.mark.parametrize("name", distributed.ALLOCATOR_VARIABLES)
def test_an_allocator_that_the_user_has_set(machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    _choose_device()
    assert machine.settings == []


@pytest.mark.parametrize(
    "variables, is_first",
    [
        ({}, True),
        ({"RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"RANK": "9", "LOCAL_RANK": "1"}, False),
    ],
)
def test_one_process_of_a_machine_tells_the_user(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_first: bool
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _is_first_of_machine() == is_first


@pytest.mark.parametrize("dtype, lines", [("float32", 1), ("bfloat16", 0)])
def test_what_float32_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, dtype: str, lines: int
) -> None:
    monkeypatch.setattr(distributed, "_choose_device", lambda: (torch.device("cuda", 0), "gloo"))
    monkeypatch.setattr(distributed, "_compute_deterministically", lambda: None)
    join_processes(dtype, None)
    torch.set_flush_denormal(False)
    dist.destroy_process_group()
    printed = capsys.readouterr().err
    assert printed.count("\n") == lines
    assert ("--dtype bfloat16" in printed) == bool(lines)


def test_a_run_is_overdue_when_nothing_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now)
    activity = Activity()
    activity.renew()
    now = 1e6
    assert not activity.is_overdue()  # loading may take any time

    activity.note()
    now += distributed.TIMEOUT
    assert not activity.is_overdue()
    now += 1
    assert activity.is_overdue()
    activity.renew()
    assert not activity.is_overdue()


def test_a_copy_on_a_cpu_is_the_tensor() -> None:
    x = torch.arange(3)
    assert copied(x, "cpu") is x
