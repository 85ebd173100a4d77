"""Killed, damaged, full, occupied: what a run meets on disk, and what it leaves there (faults 1-21, a, b)."""

import contextlib
import functools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import hooks
import pytest
import tiny
from harness import checkpoints, close, cut, files, lines, refused, run, same, start, weights
from marks import every_algorithm, fault, slow

KILLS = int(os.environ.get("KILLS", "20"))
STEPS = 12  # of the undisturbed run, which saves at each of them
DONE = {"state": "done", "step": STEPS, "reason": ""}
SHARD = "rank-00000-of-00001.safetensors"
WEIGHT = "lm.model.layers.0.mlp.up_proj.weight"

Undisturbed = Callable[[str, int], Path]  # algorithm, number of processes → the output directory of its run

on_one_and_two_processes = pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])


def checkpoint_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def assert_killed(process: harness.Started) -> None:
    assert process.end() == -signal.SIGKILL, process.log[-3000:]


def kill(process: harness.Started) -> None:
    """SIGKILL while the process runs. It must not have met a damaged checkpoint before."""
    process.send(signal.SIGKILL)
    assert_killed(process)
    assert "skipped" not in process.log, process.log[-3000:]


def assert_resumed_from(ended: harness.Started, step: int) -> None:
    checkpoint = checkpoint_of(ended.out, step)
    assert f"resumed from {checkpoint}\n" in ended.log, ended.log


def assert_skipped(ended: harness.Started, step: int, problem: str) -> None:
    checkpoint = checkpoint_of(ended.out, step)
    assert f"skipped {checkpoint}: {problem}" in ended.log, (step, ended.log)


def assert_ended_by_storage(ended: harness.Started, step: int) -> None:
    assert ended.status["state"] == "storage", ended.log[-3000:]
    assert ended.status["step"] == step


def resume_to_the_end(out: Path, through: Path, **options: object) -> harness.Started:
    """Resume a run to its end, which must be bitwise that of the undisturbed one."""
    ended = run(out, resume=True, **options)
    same(out, through)
    return ended


# ---------------------------------------------------------------- killed


@fault(1, 2)
@every_algorithm
def test_killed_and_resumed(run_options: dict, through_of: Undisturbed, tmp_path: Path, algorithm: str) -> None:
    """With --resume from the start. The newest checkpoint's step continues the log."""
    out = tmp_path / "out"
    options = {**run_options, "script": f"algos/{algorithm}.py"}
    process = start(out, resume=True, **options)
    process.until(lambda: len(checkpoints(out)) > 6)
    kill(process)
    assert not (out / "model.safetensors").exists()

    complete = [name for name in checkpoints(out) if not name.endswith(".tmp")]
    newest = out / "checkpoints" / complete[-1]
    ended = resume_to_the_end(out, through_of(algorithm, 1), **options)
    assert f"resumed from {newest}\n" in ended.log
    assert "step 1/" not in ended.log
    assert ended.status == DONE


@fault(3)
@slow
def test_killed_at_random_times(run_options: dict, tmp_path: Path) -> None:
    """Half of the kills while a checkpoint is being written; none is ever torn. `KILLS=50` kills more often."""
    rng = random.Random(0)
    out = tmp_path / "out"
    options = {**run_options, "keep": 2, "lr_schedule": "constant"}

    def checkpoint_is_being_written() -> bool:
        return any(name.endswith(".tmp") for name in checkpoints(out))

    first_words = "step 1/"
    for number in range(KILLS):
        process = start(out, resume=True, **options | {"max_steps": 100_000})
        process.until(first_words)
        first_words = "resumed from"
        time.sleep(rng.uniform(0, 0.6))
        if number % 2 == 1:
            process.until(checkpoint_is_being_written)
            time.sleep(rng.uniform(0, 0.01))
        kill(process)

    newest = checkpoints(out)[-1]
    step = newest.removeprefix("step-").removesuffix(".tmp")
    options["max_steps"] = int(step) + 5
    through = tmp_path / "through"
    run(through, **options | {"save_every": 0})
    ended = resume_to_the_end(out, through, **options)
    assert "skipped" not in ended.log


@fault(3)
@slow
def test_a_long_run_killed_ten_times(run_options: dict, tmp_path: Path) -> None:
    """500 steps, saved at every seventh: the same lines and the same weights, byte for byte."""
    rng = random.Random(1)
    out = tmp_path / "out"
    through = tmp_path / "through"
    options = {**run_options, "max_steps": 500, "save_every": 7, "keep": 2}

    steps = rng.sample(range(10, 490), 10)
    for step in sorted(steps):
        process = start(out, resume=True, **options)
        process.until(lambda step=step: len(lines(out)) >= step)
        time.sleep(rng.uniform(0, 0.01))
        kill(process)

    run(through, **options | {"save_every": 0})
    ended = resume_to_the_end(out, through, **options)
    assert "resumed from" in ended.log


# ---------------------------------------------------------------- damaged


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def flip_step(file: Path) -> None:
    """A bit of the step's number in state.json."""
    name = b'"step": '
    content = file.read_bytes()
    flip_bit(file, content.index(name) + len(name))


def flip_tensor(file: Path, name: str) -> None:
    """A bit of a tensor's values; a safetensors file holds the size of its header, the header, and the values."""
    content = file.read_bytes()
    header_size = int.from_bytes(content[:8], "little")
    values_start = 8 + header_size
    header = json.loads(content[8:values_start])
    tensor_start, _ = header[name]["data_offsets"]
    flip_bit(file, values_start + tensor_start)


flip_weight = functools.partial(flip_tensor, name=WEIGHT)
flip_first_moment = functools.partial(flip_tensor, name=f"{WEIGHT}|exp_avg")
flip_second_moment = functools.partial(flip_tensor, name=f"{WEIGHT}|exp_avg_sq")

DAMAGES = [  # the file, what is done to it, and the problem that is printed
    ("manifest.json", truncate, "no readable manifest.json"),
    ("manifest.json", empty, "no readable manifest.json"),
    ("manifest.json", Path.unlink, "no readable manifest.json"),
    (SHARD, truncate, f"{SHARD} is missing or of another size"),
    (SHARD, empty, f"{SHARD} is missing or of another size"),
    (SHARD, Path.unlink, f"{SHARD} is missing or of another size"),
    ("state.json", Path.unlink, "state.json is missing or of another size"),
    ("state.json", flip_step, "state.json has another sha256"),
    (SHARD, flip_weight, f"{SHARD} has another sha256"),
    (SHARD, flip_first_moment, f"{SHARD} has another sha256"),
    (SHARD, flip_second_moment, f"{SHARD} has another sha256"),
]


@fault(4, 5, 6, 7)
def test_damaged_checkpoints_are_passed_over(run_options: dict, through: Path, tmp_path: Path) -> None:
    """Eleven newer ones, each damaged in another way, are all named. The run goes on from the only whole one."""
    out = cut(through, tmp_path / "out", STEPS)
    damaged_steps = range(STEPS, 1, -1)
    for step, (name, damage, _) in zip(damaged_steps, DAMAGES, strict=True):
        file = checkpoint_of(out, step) / name
        damage(file)

    ended = resume_to_the_end(out, through, **run_options)
    for step, (_, _, problem) in zip(damaged_steps, DAMAGES, strict=True):
        assert_skipped(ended, step, problem)
    assert_resumed_from(ended, 1)


@fault(4)
def test_what_else_lies_among_the_checkpoints(run_options: dict, through: Path, tmp_path: Path) -> None:
    """An unreadable file is like a damaged one; a copy by hand is left alone; what a kill left is removed."""
    out = cut(through, tmp_path / "out", 6)
    copied_by_hand = checkpoint_of(out, 2).with_suffix(".bak")
    left_by_a_kill = checkpoint_of(out, 4).with_suffix(".tmp")
    shutil.copytree(checkpoint_of(out, 2), copied_by_hand)
    shutil.copytree(checkpoint_of(out, 4), left_by_a_kill)

    unreadable = str(checkpoint_of(out, 6) / SHARD)
    hook = functools.partial(hooks.unreadable, unreadable)
    ended = resume_to_the_end(out, through, hook=hook, **run_options)
    assert_skipped(ended, 6, f"{SHARD} cannot be read (Input/output error)")
    assert_resumed_from(ended, 5)

    written = [checkpoint_of(out, step).name for step in range(1, STEPS + 1)]
    assert checkpoints(out) == sorted([*written, copied_by_hand.name])


def only_state(text: str) -> str:
    manifest = json.loads(text)
    return json.dumps({"state.json": manifest["state.json"]})


OTHER_MANIFESTS = {
    "bytes": lambda text: text.replace("bytes", "cytes", 1),
    "sha256": lambda text: text.replace("sha256", "sha257", 1),
    "list": lambda text: "[]",
    "null": lambda text: "null",
    "nothing": lambda text: "{}",
    "without weights": only_state,
}


@fault(7)
@slow
@pytest.mark.parametrize("change", OTHER_MANIFESTS)
def test_a_manifest_that_says_something_else(run_options: dict, through: Path, tmp_path: Path, change: str) -> None:
    out = cut(through, tmp_path / "out", STEPS)
    manifest = checkpoint_of(out, STEPS) / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(OTHER_MANIFESTS[change](text))

    ended = resume_to_the_end(out, through, **run_options)
    assert_skipped(ended, STEPS, "")
    assert_resumed_from(ended, STEPS - 1)


@fault(4, 5)
@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_s_file_is_missing(run_options: dict, through_of: Undisturbed, tmp_path: Path, rank: int) -> None:
    through = through_of("dpo", 2)
    out = cut(through, tmp_path / "out", STEPS)
    file = checkpoint_of(out, STEPS) / f"rank-0000{rank}-of-00002.safetensors"
    file.unlink()

    ended = resume_to_the_end(out, through, processes=2, **run_options)
    assert f"{file.name} is missing" in ended.log
    assert_resumed_from(ended, STEPS - 1)


# ---------------------------------------------------------------- no room


def checkpoint_files(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(out).items() if "checkpoints" in name}


def assert_nothing_partial(out: Path, last_step: int) -> None:
    """There are whole checkpoints of the first steps alone, and no model."""
    complete = [checkpoint_of(out, step).name for step in range(1, last_step + 1)]
    assert checkpoints(out) == complete
    for name in files(out):
        assert "checkpoints" in name or not name.endswith((".tmp", ".safetensors")), name
    assert not (out / ".export").exists()
    assert not (out / "config.json").exists()


@fault(8)
@on_one_and_two_processes
def test_no_room_for_a_checkpoint(run_options: dict, through_of: Undisturbed, tmp_path: Path, processes: int) -> None:
    through = through_of("dpo", processes)
    out = cut(through, tmp_path / "out", 4)
    before = checkpoint_files(out)

    limit = functools.partial(hooks.limit_files, 100_000)
    ended = run(out, code=4, processes=processes, hook=limit, resume=True, **run_options)
    assert str(checkpoint_of(out, 5)) in ended.log
    assert_ended_by_storage(ended, 5)
    assert_nothing_partial(out, 4)
    assert checkpoint_files(out) == before
    resume_to_the_end(out, through, processes=processes, **run_options)


@fault(8)
@slow
def test_no_room_on_the_first_rank_alone(run_options: dict, tmp_path: Path) -> None:
    """The second one soon ends too, and does not say something else about it."""
    out = tmp_path / "out"
    limit = functools.partial(hooks.limit_files_of_main, 100_000)
    ended = start(out, processes=2, hook=limit, **run_options)
    first, second = ended.processes
    ended.until(lambda: first.exitcode is not None)
    assert first.exitcode == 4
    second.join(30)
    assert second.exitcode
    assert ended.status["state"] == "storage", ended.log[-3000:]
    assert_nothing_partial(out, 0)


@fault(8)
@slow
def test_no_room_for_the_model(run_options: dict, through: Path, tmp_path: Path) -> None:
    out = cut(through, tmp_path / "out", STEPS)
    limit = functools.partial(hooks.limit_files, 50_000)
    ended = run(out, code=4, hook=limit, resume=True, **run_options)
    harness.check_message(ended, str(out))
    assert_ended_by_storage(ended, STEPS)
    assert_nothing_partial(out, STEPS)
    resume_to_the_end(out, through, **run_options)


@fault(8)
def test_no_room_from_the_start(run_options: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status = out / "status.json"
    ended = run(out, code=4, hook=hooks.no_room_for_status, **run_options)
    harness.check_message(ended, f"{status}: cannot be written")
    rest = ended.log.replace(f"dpo.py: {status}", "")
    assert "status.json" not in rest, "the message comes twice"


@fault(8)
@slow
def test_no_room_for_the_token_ids(run_options: dict, tmp_path: Path) -> None:
    cache = tmp_path / "out.cache"
    limit = functools.partial(hooks.limit_files, 4_000)
    ended = run(tmp_path / "out", code=4, hook=limit, **run_options)
    harness.check_message(ended, str(cache))
    assert not list(cache.rglob("*.*")), "a torn file in the cache"


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    ended = subprocess.run(mount, capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"a small tmpfs needs root: {ended.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Three megabytes: five checkpoints."""
    with mounted(tmp_path / "disk", "size=3m") as disk:
        yield disk


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing can be made. Root may write everywhere, and needs a read-only file system for that."""
    folder = tmp_path / "locked"
    if os.getuid() == 0:
        with mounted(folder, "ro"):
            yield folder
    else:
        folder.mkdir(mode=0o555)
        yield folder


@fault(8)
@slow
def test_a_full_disk(run_options: dict, through: Path, tmp_path: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    options = {**run_options, "beside": tmp_path / "beside"}
    ended = run(out, code=4, **options)
    step = ended.status["step"]
    assert step > 1
    harness.check_message(ended, str(checkpoint_of(out, step)))
    assert_ended_by_storage(ended, step)
    assert_nothing_partial(out, step - 1)

    enlarge(small_disk)
    resume_to_the_end(out, through, **options)


def fill(disk: Path) -> Path:
    """Write a file until nothing more goes on the disk, at last in small pieces."""
    path = disk / "filler"
    with open(path, "wb", buffering=0) as file:
        with pytest.raises(OSError):
            while file.tell() <= 2_900_000:
                file.write(bytes(65536))
            while True:
                file.write(bytes(64))
    return path


@fault(8)
@slow
def test_a_disk_that_somebody_else_fills(run_options: dict, through: Path, tmp_path: Path, small_disk: Path) -> None:
    """Then neither the log nor status.json can be written. One line and the exit code say it all the same."""
    out = small_disk / "out"
    options = {**run_options, "beside": tmp_path / "beside"}
    process = start(out, **options | {"max_steps": 1000, "save_every": 0})
    process.until(lambda: len(lines(out)) > 2)
    filler = fill(small_disk)
    assert process.end() == 4, process.log[-3000:]
    assert "Traceback" not in process.log, process.log[-3000:]
    harness.check_message(process, str(out))

    filler.unlink()
    enlarge(small_disk)
    resume_to_the_end(out, through, **options)


# ---------------------------------------------------------------- the output directory


@fault(9)
@pytest.mark.parametrize("out", ["rows.jsonl/out", "/proc/out"])
def test_an_output_directory_that_cannot_be(run_options: dict, tmp_path: Path, out: str) -> None:
    folder = run_options["train_data"].parent
    message = f"{out}: cannot be written"
    refused(folder / out, message, state=None, beside=tmp_path / "log", **run_options)


@fault(9)
@slow
@every_algorithm
def test_a_folder_that_cannot_be_written(run_options: dict, tmp_path: Path, locked: Path, algorithm: str) -> None:
    out = locked / "out"
    options = {**run_options, "script": f"algos/{algorithm}.py", "beside": tmp_path / "log"}
    refused(out, f"{out}: cannot be written", state=None, **options)


@fault(10)
@every_algorithm
def test_an_occupied_output_directory(run_options: dict, through: Path, tmp_path: Path, algorithm: str) -> None:
    """A finished run of dpo, and one that was killed before its end; neither changes by a byte."""
    finished = shutil.copytree(through, tmp_path / "finished")
    killed = cut(through, tmp_path / "killed", 3)
    for out in (finished, killed):
        before = files(out)
        refused(out, "holds another run", state=None, script=f"algos/{algorithm}.py", **run_options)
        assert files(out) == before


@fault(10, 18)
@slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_an_occupied_output_directory_on_two_ranks(
    run_options: dict, through: Path, tmp_path: Path, torchrun: bool
) -> None:
    out = shutil.copytree(through, tmp_path / "out")
    before = files(out)
    process = start(out, processes=2, torchrun=torchrun, **run_options)
    assert process.end(60)
    assert "holds another run" in process.log
    assert files(out) == before


@fault(18)
def test_two_runs_on_one_output_directory(run_options: dict, through: Path, tmp_path: Path) -> None:
    """The second is refused, with and without --resume; the first goes on as if nothing had been."""
    out = tmp_path / "out"
    first = start(out, **run_options)
    first.until(lambda: (out / "status.json").exists())
    first.send(signal.SIGSTOP)
    for resume in (False, True):
        refused(out, "another run is writing there", state=None, resume=resume, **run_options)
    assert first.status["state"] == "running"

    first.send(signal.SIGCONT)
    assert first.end() == 0
    same(out, through)


# ---------------------------------------------------------------- resumed as another run


def files_but_status(out: Path) -> dict[str, bytes]:
    content = files(out)
    content.pop("status.json", None)
    return content


OTHER_ARGUMENTS = [
    ("beta", 0.2, "beta 0.1 → 0.2"),
    ("label_smoothing", 0.1, "label_smoothing 0.0 → 0.1"),
    ("learning_rate", 2e-4, "learning_rate 0.0001 → 0.0002"),
    ("batch_size", 4, "batch_size 8 → 4"),
    ("seed", 1, "seed 0 → 1"),
    ("epochs", 9.0, "epochs 1.0 → 9.0"),
]


@fault(11, 12, 13, 14)
def test_resumed_as_another_run(run_options: dict, through: Path, tmp_path: Path) -> None:
    """Every difference is listed, and nothing is written. The budget of a micro-batch may change."""
    out = cut(through, tmp_path / "out", 6)
    new_rows = tmp_path / "rows.jsonl"
    reversed_rows = tiny.read_jsonl(run_options["train_data"])[::-1]
    tiny.write_jsonl(new_rows, reversed_rows)

    options = {**run_options, "micro_batch_tokens": 100, "train_data": new_rows}
    differences = ["the train rows"]
    for name, value, difference in OTHER_ARGUMENTS:
        options[name] = value
        differences.append(difference)

    before = files_but_status(out)
    refused(out, "another run", *differences, resume=True, **options)
    assert files_but_status(out) == before


@fault(12)
@slow
def test_resumed_with_other_rows(run_options: dict, tmp_path: Path) -> None:
    """Training rows are compared by their content. Held-out rows change no weights, and may be others."""
    rows = shutil.copy(run_options["train_data"], tmp_path / "rows.jsonl")
    held_out = tmp_path / "held_out.jsonl"
    tiny.make_rows(5, 3, path=held_out)
    options = {**run_options, "train_data": rows, "lr_schedule": "constant"}
    out = tmp_path / "out"
    run(out, **options | {"max_steps": 2})
    run(out, **options | {"max_steps": 3, "resume": True, "eval_data": held_out})

    tiny.write_jsonl(rows, tiny.read_jsonl(rows)[1:])
    refused(out, "the train rows", **options | {"max_steps": 4, "resume": True})


@fault(11)
def test_resumed_for_fewer_steps_than_are_done(run_options: dict, tmp_path: Path) -> None:
    """With a constant rate the last step may be another one, but not one that lies behind."""
    out = tmp_path / "out"
    options = {**run_options, "lr_schedule": "constant"}
    run(out, **options | {"max_steps": 3})
    before = files_but_status(out)
    message = f"{checkpoint_of(out, 3)} is beyond the last step, 2"
    refused(out, message, resume=True, **options | {"max_steps": 2})
    assert files_but_status(out) == before


SAME_ARGUMENTS = [
    ("dpo", "distill_dpo"),
    ("distill_dpo", "dpo"),
    ("rm", "sft"),
    ("sft", "rm"),
    ("dpo", "token_dpo_beam"),
]


@fault(11)
@slow
@pytest.mark.parametrize("first, second", SAME_ARGUMENTS)
def test_resumed_with_another_loss(
    run_options: dict, through_of: Undisturbed, tmp_path: Path, first: str, second: str
) -> None:
    out = cut(through_of(first, 1), tmp_path / "out", 6)
    refused(out, f"'{first}' → '{second}'", resume=True, script=f"algos/{second}.py", **run_options)


OTHER_SHAPES = {"other shapes": {"intermediate_size": 48}, "fewer layers": {"num_hidden_layers": 1}}


@fault(15)
@slow
@pytest.mark.parametrize("change", ["other shapes", "fewer layers", "other values"])
def test_resumed_with_another_model(run_options: dict, tmp_path: Path, change: str) -> None:
    """The starting model's values are those of the reference too."""
    out = tmp_path / "out"
    model = shutil.copytree(run_options["model"], tmp_path / "model")
    run(out, **run_options | {"model": model, "max_steps": 2})

    shapes = OTHER_SHAPES.get(change, {})
    tiny.make_model(model, "llama", seed=5, initializer_range=0.15, **shapes)
    refused(out, "model", resume=True, **run_options | {"model": model, "max_steps": 4})


@fault(15)
@slow
def test_resumed_with_another_reference(run_options: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reference = tiny.make_model(tmp_path / "reference", seed=5, initializer_range=0.15)
    options = {**run_options, "reference": reference, "max_steps": 2}
    run(out, **options)
    tiny.make_model(reference, seed=6, initializer_range=0.15)
    refused(out, "reference", resume=True, **options)


@fault(17, 14)
@slow
@pytest.mark.parametrize("algorithm", ["dpo", "ensemble_dpo"])
def test_saved_on_two_ranks_resumed_on_one(
    run_options: dict, through_of: Undisturbed, tmp_path: Path, algorithm: str
) -> None:
    """In micro-batches of another size too."""
    on_two_ranks = through_of(algorithm, 2)
    out = cut(on_two_ranks, tmp_path / "out", 6)
    ended = run(out, resume=True, script=f"algos/{algorithm}.py", micro_batch_tokens=120, **run_options)
    assert_resumed_from(ended, 6)
    close(out, on_two_ranks)


# ---------------------------------------------------------------- pickles


class Malicious:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.path}'",)


def write_malicious(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Malicious(mark)))


def assert_not_executed(file: Path, mark: Path) -> None:
    """Nothing has read the pickle, which would have made the file `mark`."""
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists(), "the pickle does nothing"


@fault(19)
def test_a_base_model_whose_only_weights_are_malicious(run_options: dict, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    model = shutil.copytree(run_options["model"], tmp_path / "model")
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    write_malicious(file, mark)
    refused(tmp_path / "out", str(model), **run_options | {"model": model})
    assert_not_executed(file, mark)


@fault(19)
def test_a_base_model_with_a_malicious_file(run_options: dict, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    model = shutil.copytree(run_options["model"], tmp_path / "model")
    file = model / "training_args.bin"
    write_malicious(file, mark)
    run(tmp_path / "out", **run_options | {"model": model, "max_steps": 1})
    assert_not_executed(file, mark)


@fault(19)
@slow
def test_a_malicious_checkpoint(run_options: dict, through: Path, tmp_path: Path) -> None:
    out = cut(through, tmp_path / "out", 6)
    mark = tmp_path / "executed"
    for name in ("optimizer.pt", ".metadata", "rank-00001-of-00001.safetensors", "__0_0.distcp"):
        write_malicious(checkpoint_of(out, 6) / name, mark)

    process = start(out, resume=True, **run_options)
    code = process.end()
    assert code in (0, 2, 4)
    assert "Traceback" not in process.log
    if code == 0:
        same(out, through)
    assert not mark.exists()


@fault(20)
@every_algorithm
def test_files_are_safetensors_and_json(through_of: Undisturbed, algorithm: str) -> None:
    """By their names and by their first bytes, the caches' too."""
    from safetensors import safe_open

    out = through_of(algorithm, 1)
    cache = Path(f"{out}.cache")
    suffixes = set()
    for path in [*out.rglob("*"), *cache.rglob("*")]:
        if path.is_dir():
            continue
        suffixes.add(path.suffix)
        if path.suffix == ".safetensors":
            safe_open(path, "pt")
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.name in ("metrics.jsonl", "README.md", ".lock", "chat_template.jinja"), path
    assert {".safetensors", ".json"} <= suffixes


# ---------------------------------------------------------------- the exported model


@fault(21)
def test_tied_weights_are_exported_once(tmp_path: Path, run_options: dict) -> None:
    from safetensors import safe_open

    model = tiny.make_model(tmp_path / "qwen2", "qwen2", seed=4)
    names_of = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        run(out, processes=processes, **run_options | {"model": model, "max_steps": 1})
        exported = safe_open(out / "model.safetensors", "pt")
        names_of[processes] = set(exported.keys())

    assert names_of[1] == names_of[2]
    assert "model.embed_tokens.weight" in names_of[1]
    assert "lm_head.weight" not in names_of[1]


@fault(21)
@every_algorithm
def test_the_export_loads_plainly(through_of: Undisturbed, algorithm: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    out = through_of(algorithm, 1)
    model_class = AutoModelForCausalLM
    if algorithm == "rm":
        model_class = AutoModelForSequenceClassification
    model, report = model_class.from_pretrained(out, output_loading_info=True)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[name], report

    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("a ok", return_tensors="pt", return_token_type_ids=False)
    logits = model(**inputs).logits
    assert torch.isfinite(logits).all()


def assert_half_or_whole(out: Path, through: Path) -> None:
    """What there is of the model does not load at all, or is the whole one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (out / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(out)
        AutoTokenizer.from_pretrained(out)
        assert weights(out) == weights(through)
    else:
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)


@fault("b")
@pytest.mark.parametrize("moves", [0, 3, pytest.param(1, marks=slow), pytest.param(5, marks=slow)])
def test_killed_while_the_model_is_exported(run_options: dict, through: Path, tmp_path: Path, moves: int) -> None:
    """After so many of its files have been moved to their place. --resume completes it."""
    out = cut(through, tmp_path / "out", STEPS)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        (out / name).unlink()
    hook = functools.partial(hooks.kill_in_export, moves)
    process = start(out, hook=hook, resume=True, **run_options)
    assert_killed(process)
    assert_half_or_whole(out, through)

    resume_to_the_end(out, through, **run_options)
    assert not (out / ".export").exists()
    assert (out / "tokenizer.json").exists()


@fault("b")
@slow
def test_killed_at_some_time_of_the_export(run_options: dict, through: Path, tmp_path: Path) -> None:
    """The files are moved slowly, so that the kills fall between the first that is written and the last move."""
    rng = random.Random(0)
    out = cut(through, tmp_path / "out", STEPS)
    slowly = functools.partial(hooks.slow_export, 0.01)

    def exported_files() -> list[Path]:
        return list((out / ".export").glob("*"))

    attempts = 0
    kills = 0
    while kills < 6:
        (out / "config.json").unlink(missing_ok=True)
        (out / "model.safetensors").unlink(missing_ok=True)
        for path in exported_files():
            path.unlink()
        process = start(out, hook=slowly, resume=True, **run_options)
        while process.running and not exported_files():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.06))
        process.send(signal.SIGKILL)
        if process.end() == -signal.SIGKILL:
            kills += 1
        assert_half_or_whole(out, through)
        attempts += 1
        assert attempts < 40, f"{kills} of {attempts} processes were killed before their export was over"
