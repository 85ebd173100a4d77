"""What a test changes inside the process of a run before it starts: faults that no file and no signal can make."""

import datetime
import errno
import io
import os
import resource
import signal
import sys
import time
from typing import Any

PathName = str | os.PathLike[str]


def _is_exported(source: PathName) -> bool:
    """Whether a file is one of the exported model's, on its way to its place."""
    folder = os.path.dirname(source)
    return os.path.basename(folder) == ".export"


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


# ---------------------------------------------------------------- disks


def limit_files(size: int) -> None:
    """No file of this process grows beyond so many bytes, as behind `ulimit -f`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_files_of_main(size: int) -> None:
    """The same for the first of several processes alone."""
    if _rank() == 0:
        limit_files(size)


def no_room_for_status() -> None:
    """The disk is full when the run first says how it stands."""
    original = os.replace

    def replace(source: PathName, target: PathName) -> None:
        if os.path.basename(target) == "status.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    os.replace = replace  # type: ignore[assignment]


def unreadable(path: str) -> None:
    """Reading a file's bytes fails, as on a damaged disk."""
    import shared.checkpoint

    original = shared.checkpoint.sha256_of

    def sha256_of(file: Any) -> str:
        if str(file) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(file)

    shared.checkpoint.sha256_of = sha256_of


def slow_export(seconds: float) -> None:
    """Every file of the exported model waits so long before it is moved to its place."""
    original = os.replace

    def replace(source: PathName, target: PathName) -> None:
        if _is_exported(source):
            time.sleep(seconds)
        original(source, target)

    os.replace = replace  # type: ignore[assignment]


# ---------------------------------------------------------------- numbers


def poison(row: int, gradient: bool) -> None:
    """The log-prob of one row is NaN in training, or its gradient infinite; its rank is printed."""
    import torch
    from torch import Tensor

    from shared.model import Policy

    original = Policy.logps

    def infinite_at(index: Tensor) -> Any:
        return lambda gradients: gradients.index_fill(0, index, torch.inf)

    def logps(self: Policy, batch: Any) -> Tensor:
        values = original(self, batch)
        positions = (batch.group_index == row - 1).nonzero()
        if not torch.is_grad_enabled() or len(positions) == 0:
            return values

        print(f"poisoned rank {_rank()}", flush=True)
        if gradient:
            values.register_hook(infinite_at(positions[0]))
            return values
        return values.index_fill(0, positions[0], torch.nan)

    Policy.logps = logps  # type: ignore[method-assign]


def spoil_generator() -> None:
    """The model that is decoded from has weights that are not numbers."""
    import torch

    import shared.loading

    original = shared.loading.load_generator

    def load_generator(*arguments: Any) -> Any:
        model = original(*arguments)
        torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
        return model

    shared.loading.load_generator = load_generator


# ---------------------------------------------------------------- signals


def kill_in_export(moves: int) -> None:
    """SIGKILL while the files of the exported model are moved to their place, after so many moves."""
    original = os.replace
    moves_left = moves

    def replace(source: PathName, target: PathName) -> None:
        nonlocal moves_left
        if _is_exported(source):
            if moves_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            moves_left -= 1
        original(source, target)

    os.replace = replace  # type: ignore[assignment]


def terminate_in_export() -> None:
    """SIGTERM when the exported model is about to be written."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.save_pretrained

    def save_pretrained(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(*arguments, **options)

    PreTrainedModel.save_pretrained = save_pretrained


def terminate_in_close() -> None:
    """SIGTERM when nothing is left to do but to write how the run ended."""
    from shared.run import Run

    original = Run._close

    def close(self: Run, code: int, reason: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, code, reason)

    Run._close = close  # type: ignore[method-assign]


def terminate_in(phase: str, rank: int = 0) -> None:
    """SIGTERM to one rank amid the forward passes of its "reference" or "evaluation".

    It prints that the phase went on if 80 more of them follow.
    """
    import torch

    from shared.model import Policy

    original = Policy.logps
    calls = 0
    has_trained = False

    def logps(self: Policy, batch: Any) -> torch.Tensor:
        nonlocal calls, has_trained
        if torch.is_grad_enabled():
            has_trained = True
        elif has_trained == (phase == "evaluation"):
            calls += 1
            if calls == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            if calls == 100:
                print(f"the {phase} went on", flush=True)
        return original(self, batch)

    if _rank() == rank:
        Policy.logps = logps  # type: ignore[method-assign]


def heed_ctrl_c() -> None:
    """As in the foreground of a terminal; a shell's background processes ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------------------------------------------------------------- other processes


def short_timeout(seconds: float) -> None:
    """Collectives give up after so many seconds."""
    import torch.distributed as dist

    original = dist.init_process_group
    timeout = datetime.timedelta(seconds=seconds)

    def init_process_group(*arguments: Any, **options: Any) -> None:
        options["timeout"] = timeout
        original(*arguments, **options)

    dist.init_process_group = init_process_group


def as_on_gpus(seconds: float) -> None:
    """No collective gives up. A process without activity for so many seconds ends."""
    import shared.distributed

    short_timeout(1000)
    shared.distributed.TIMEOUT = seconds
    shared.distributed.end_without_activity()


def late_second_rank() -> None:
    """The second rank joins the process group seconds after the first has claimed the output directory."""
    import shared.run

    original = shared.run.from_main

    def from_main(value: Any) -> Any:
        time.sleep(5)
        return original(value)

    if _rank() == 1:
        shared.run.from_main = from_main


def edit_while_read(path: str) -> None:
    """The last row of a file changes after the file was hashed, before it is tokenised."""
    import shared.groups

    original = shared.groups.tokenise

    def tokenise(*arguments: Any) -> Any:
        with open(path, "r+b") as file:
            lines = file.read().splitlines(keepends=True)
            file.seek(0)
            file.writelines(lines[::-1])
        return original(*arguments)

    shared.groups.tokenise = tokenise


def edit_before_second_rank_reads(path: str) -> None:
    """A row is added to a file when the first rank has read it, but not the second."""
    import shared.batches

    original = shared.batches.load_groups

    def load_groups(*arguments: Any) -> Any:
        time.sleep(2)
        with open(path, "a") as file:
            file.write('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        return original(*arguments)

    if _rank() == 1:
        shared.batches.load_groups = load_groups


def answer_yes() -> None:
    """A user who types "y" at every question."""
    sys.stdin = io.StringIO("y\n" * 9)
