"""What a test changes inside the process of a run before it starts: faults that no file and no signal can make."""

import datetime
import errno
import io
import os
import resource
import signal
import sys
import time


def limit_files(size: int) -> None:
    """No file of this process grows beyond so many bytes, as behind `ulimit -f`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_room_for_status() -> None:
    """The disk is full when the run says for the first time that it is there."""
    plain = os.replace

    def replace(source, target):  # noqa: ANN001, ANN202
        if os.path.basename(target) == "status.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(source, target)

    os.replace = replace


def limit_files_of_main(size: int) -> None:
    """The same for the first of several processes alone."""
    if os.environ["RANK"] == "0":
        limit_files(size)


def poison(row: int, gradient: bool) -> None:
    """The log-prob of one row is NaN in training, or its gradient infinite; its rank is printed."""
    import torch

    from shared.model import Policy

    plain = Policy.logps

    def logps(self, batch):  # noqa: ANN001, ANN202
        found = plain(self, batch)
        hit = (batch.rows == row - 1).nonzero()
        if torch.is_grad_enabled() and len(hit):
            print(f"poisoned rank {os.environ.get('RANK', 0)}", flush=True)
            if gradient:
                found.register_hook(lambda g: g.index_fill(0, hit[0], torch.inf))
            else:
                found = found.index_fill(0, hit[0], torch.nan)
        return found

    Policy.logps = logps


def short_timeout(seconds: float) -> None:
    """Collectives give up after so many seconds."""
    import torch.distributed as dist

    plain, timeout = dist.init_process_group, datetime.timedelta(seconds=seconds)
    dist.init_process_group = lambda *words, **options: plain(*words, **{**options, "timeout": timeout})


def kill_in_export(moves: int) -> None:
    """SIGKILL while the files of the exported model are moved to their place, before number `moves`."""
    plain, left = os.replace, [moves]

    def replace(source, target):  # noqa: ANN001, ANN202
        if os.path.basename(os.path.dirname(source)) == ".export":
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        plain(source, target)

    os.replace = replace


def slow_export(seconds: float) -> None:
    """Every file of the exported model waits so long before it is moved to its place."""
    plain = os.replace

    def replace(source, target):  # noqa: ANN001, ANN202
        if os.path.basename(os.path.dirname(source)) == ".export":
            time.sleep(seconds)
        plain(source, target)

    os.replace = replace


def terminate_in_export() -> None:
    """SIGTERM when the exported model is about to be written."""
    from transformers import PreTrainedModel

    plain = PreTrainedModel.save_pretrained

    def save_pretrained(*words, **options) -> None:  # noqa: ANN002, ANN003
        os.kill(os.getpid(), signal.SIGTERM)
        plain(*words, **options)

    PreTrainedModel.save_pretrained = save_pretrained


def terminate_in_close() -> None:
    """SIGTERM when nothing is left to do but to say how the run ended."""
    from shared.run import Run

    plain = Run.close

    def close(self, code, reason):  # noqa: ANN001, ANN202
        os.kill(os.getpid(), signal.SIGTERM)
        plain(self, code, reason)

    Run.close = close


def late_second_rank() -> None:
    """The second rank joins the process group seconds after the first has claimed the output directory."""
    import shared.run

    plain = shared.run.from_main

    def from_main(value):  # noqa: ANN001, ANN202
        time.sleep(5)
        return plain(value)

    if os.environ["RANK"] == "1":
        shared.run.from_main = from_main


def unreadable(path: str) -> None:
    """Reading a file's bytes fails, as on a damaged disk."""
    import shared.checkpoint

    plain = shared.checkpoint.sha256

    def sha256(file):  # noqa: ANN001, ANN202
        if str(file) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(file)

    shared.checkpoint.sha256 = sha256


def heed_ctrl_c() -> None:
    """As in the foreground of a terminal; what a shell starts in its background ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def answer_yes() -> None:
    """Somebody who types "y" at every question."""
    sys.stdin = io.StringIO("y\n" * 9)


def terminate_in(phase: str, rank: int = 0) -> None:
    """SIGTERM to one rank in the middle of its reference pass or evaluation; it says so where it goes on with that."""
    import torch

    from shared.model import Policy

    plain, calls, trained = Policy.logps, [0], [False]

    def logps(self, batch):  # noqa: ANN001, ANN202
        trained[0] |= torch.is_grad_enabled()
        if not torch.is_grad_enabled() and trained[0] == (phase == "evaluation"):
            calls[0] += 1
            if calls[0] == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            if calls[0] == 100:
                print(f"the {phase} went on", flush=True)
        return plain(self, batch)

    if int(os.environ.get("RANK", 0)) == rank:
        Policy.logps = logps


def edit_while_read(path: str) -> None:
    """The last row of a file changes behind its hash, before it is tokenised."""
    import shared.data

    plain = shared.data.tokenise

    def tokenise(*words):  # noqa: ANN002, ANN202
        with open(path, "r+b") as file:
            lines = file.read().splitlines(keepends=True)
            file.seek(0)
            file.writelines(lines[::-1])
        return plain(*words)

    shared.data.tokenise = tokenise


def edit_before_second_rank_reads(path: str) -> None:
    """A row is added to a file when the first rank has read it, but not the second."""
    import shared.run

    plain = shared.run.load

    def load(*words):  # noqa: ANN002, ANN202
        time.sleep(2)
        with open(path, "a") as file:
            file.write('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        return plain(*words)

    if os.environ["RANK"] == "1":
        shared.run.load = load


def spoil_generator() -> None:
    """The model that is decoded from has weights that are not numbers."""
    import torch

    import shared.model

    plain = shared.model.load_generator

    def load_generator(*words):  # noqa: ANN002, ANN202
        model = plain(*words)
        torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
        return model

    shared.model.load_generator = load_generator
