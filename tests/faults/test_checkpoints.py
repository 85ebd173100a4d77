"""Killed, damaged, full, occupied: what a run finds on disk, and what it leaves there (faults 1-21, a, b)."""

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
import worlds
from conftest import ALGORITHMS
from harness import checkpoints, close, cut, files, lines, refused, run, same, start, weights

fault, slow = pytest.mark.fault, pytest.mark.slow
KILLS = int(os.environ.get("KILLS", "20"))
every_algorithm = pytest.mark.parametrize(
    "algorithm", [pytest.param(name, marks=[slow] * (name != "dpo")) for name in ALGORITHMS]
)
alone_and_on_two = pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])


@fault(1, 2)
@every_algorithm
def test_killed_and_resumed(world: dict, through_of: Callable[..., Path], tmp_path: Path, algorithm: str) -> None:
    """With --resume from the start; what continues the log is the newest checkpoint's step."""
    out, options = tmp_path / "out", {**world, "script": f"algos/{algorithm}.py", "resume": True}
    process = start(out, **options)
    process.until(lambda: len(checkpoints(out)) > 6)
    process.send(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL and not (out / "model.safetensors").exists()
    newest = [name for name in checkpoints(out) if not name.endswith(".tmp")][-1]
    ended = run(out, **options)
    assert f"resumed from {out / 'checkpoints' / newest}\n" in ended.log and "step 1/" not in ended.log
    same(out, through_of(algorithm, 1))
    assert ended.status == {"state": "done", "step": 12, "reason": ""}


@fault(3)
@slow
def test_killed_at_random_times(world: dict, tmp_path: Path) -> None:
    """Half of the kills while a checkpoint is being written; none is ever found torn. `KILLS=50`: more of them."""
    rng, out, through = random.Random(0), tmp_path / "out", tmp_path / "through"
    options = {**world, "keep": 2, "lr_schedule": "constant", "resume": True}
    for kill in range(KILLS):
        process = start(out, **{**options, "max_steps": 100_000})
        process.until("resumed from" if kill else "step 1/")
        time.sleep(rng.uniform(0, 0.6))
        if kill % 2:
            process.until(lambda: any(name.endswith(".tmp") for name in checkpoints(out)))
            time.sleep(rng.uniform(0, 0.01))
        process.send(signal.SIGKILL)
        assert process.end() == -signal.SIGKILL and "skipped" not in process.log, process.log[-3000:]
    options["max_steps"] = int(checkpoints(out)[-1][5:11]) + 5
    assert "skipped" not in run(out, **options).log
    run(through, **{**options, "save_every": 0})
    same(out, through)


@fault(3)
@slow
def test_a_long_run_killed_ten_times(world: dict, tmp_path: Path) -> None:
    """500 steps, saved at every seventh: the same lines and the same weights, byte for byte."""
    rng, out, through = random.Random(1), tmp_path / "out", tmp_path / "through"
    options = {**world, "max_steps": 500, "save_every": 7, "keep": 2, "resume": True}
    for step in sorted(rng.sample(range(10, 490), 10)):
        process = start(out, **options)
        process.until(lambda step=step: len(lines(out)) >= step)
        time.sleep(rng.uniform(0, 0.01))
        process.send(signal.SIGKILL)
        assert process.end() == -signal.SIGKILL and "skipped" not in process.log, process.log[-3000:]
    assert "resumed from" in run(out, **options).log
    run(through, **{**options, "save_every": 0})
    same(out, through)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path, word: bytes) -> None:
    """One bit of the data of a tensor, or just behind a word."""
    data = bytearray(file.read_bytes())
    at = data.index(word) + len(word)
    if file.suffix == ".safetensors":  # the header tells where the tensor's data begin
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        at = 8 + int.from_bytes(data[:8], "little") + header[word.decode()]["data_offsets"][0]
    data[at] ^= 1
    file.write_bytes(data)


SHARD = "rank-00000-of-00001.safetensors"
WEIGHT = b"lm.model.layers.0.mlp.up_proj.weight"
DAMAGES = [  # of checkpoints 12, 11, ..., and what is said of them
    ("manifest.json", truncate, "no readable manifest.json"),
    ("manifest.json", empty, "no readable manifest.json"),
    ("manifest.json", Path.unlink, "no readable manifest.json"),
    (SHARD, truncate, f"{SHARD} is missing or of another size"),
    (SHARD, empty, f"{SHARD} is missing or of another size"),
    (SHARD, Path.unlink, f"{SHARD} is missing or of another size"),  # weights and optimizer
    ("state.json", Path.unlink, "state.json is missing or of another size"),  # what schedule and order follow from
    ("state.json", functools.partial(flip, word=b'"step": '), "state.json has another sha256"),
    (SHARD, functools.partial(flip, word=WEIGHT), f"{SHARD} has another sha256"),
    (SHARD, functools.partial(flip, word=WEIGHT + b"|exp_avg"), f"{SHARD} has another sha256"),
    (SHARD, functools.partial(flip, word=WEIGHT + b"|exp_avg_sq"), f"{SHARD} has another sha256"),
]


@fault(4, 5, 6, 7)
def test_damaged_checkpoints_are_passed_over(world: dict, through: Path, tmp_path: Path) -> None:
    """Eleven newer ones, each damaged in another way, all named; the run goes on from the only whole one."""
    out = cut(through, tmp_path / "out", 12)
    for step, (name, damage, _) in zip(range(12, 1, -1), DAMAGES, strict=True):
        damage(out / "checkpoints" / f"step-{step:06d}" / name)
    ended = run(out, resume=True, **world)
    for step, (_, _, words) in zip(range(12, 1, -1), DAMAGES, strict=True):
        assert f"skipped {out / 'checkpoints'}/step-{step:06d}: {words}" in ended.log, (step, ended.log)
    assert f"resumed from {out / 'checkpoints'}/step-000001\n" in ended.log
    same(out, through)


@fault(4)
def test_what_else_lies_among_the_checkpoints(world: dict, through: Path, tmp_path: Path) -> None:
    """A file that cannot be read is as a damaged one; a copy by hand is left alone, what a kill left is removed."""
    out = cut(through, tmp_path / "out", 6)
    folder = out / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / "step-000002.bak")
    shutil.copytree(folder / "step-000004", folder / "step-000004.tmp")
    unreadable = functools.partial(hooks.unreadable, str(folder / "step-000006" / SHARD))
    ended = run(out, hook=unreadable, resume=True, **world)
    assert f"skipped {folder}/step-000006: {SHARD} cannot be read (Input/output error)" in ended.log, ended.log
    assert f"resumed from {folder}/step-000005\n" in ended.log
    names = {path.name for path in folder.iterdir()}
    assert names == {f"step-{step:06d}" for step in range(1, 13)} | {"step-000002.bak"}
    same(out, through)


@fault(7)
@slow
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("bytes", "cytes", 1),
        lambda text: text.replace("sha256", "sha257", 1),
        lambda text: "[]",
        lambda text: "null",
        lambda text: "{}",
        lambda text: json.dumps({"state.json": json.loads(text)["state.json"]}),
    ],
    ids=["bytes", "sha256", "list", "null", "nothing", "without weights"],
)
def test_a_manifest_that_says_something_else(world: dict, through: Path, tmp_path: Path, change: Callable) -> None:
    out = cut(through, tmp_path / "out", 12)
    manifest = out / "checkpoints" / "step-000012" / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    ended = run(out, resume=True, **world)
    assert f"skipped {manifest.parent}: " in ended.log and "step-000011\n" in ended.log
    same(out, through)


@fault(4, 5)
@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_s_file_is_missing(world: dict, through_of: Callable[..., Path], tmp_path: Path, rank: int) -> None:
    out = cut(through_of("dpo", 2), tmp_path / "out", 12)
    (out / "checkpoints" / "step-000012" / f"rank-0000{rank}-of-00002.safetensors").unlink()
    ended = run(out, processes=2, resume=True, **world)
    assert f"rank-0000{rank}-of-00002.safetensors is missing" in ended.log and "step-000011\n" in ended.log
    same(out, through_of("dpo", 2))


def nothing_partial(out: Path, steps: int) -> None:
    """Whole checkpoints of the first steps alone, and no model."""
    assert checkpoints(out) == [f"step-{step:06d}" for step in range(1, steps + 1)]
    torn = [name for name in files(out) if name.endswith((".tmp", ".safetensors")) and "checkpoints" not in name]
    assert not (out / ".export").exists()
    assert not torn and not (out / "config.json").exists(), torn


@fault(8)
@alone_and_on_two
def test_no_room_for_a_checkpoint(world: dict, through_of: Callable[..., Path], tmp_path: Path, processes: int) -> None:
    out, through = tmp_path / "out", through_of("dpo", processes)
    cut(through, out, 4)
    before = {name: data for name, data in files(out).items() if "checkpoints" in name}
    limit = functools.partial(hooks.limit_files, 100_000)
    ended = start(out, processes=processes, hook=limit, resume=True, **world)
    assert ended.end() == 4 and "Traceback" not in ended.log, ended.log[-3000:]
    assert str(out / "checkpoints" / "step-000005") in ended.log
    assert ended.status["state"] == "storage" and ended.status["step"] == 5
    nothing_partial(out, 4)
    assert before == {name: data for name, data in files(out).items() if "checkpoints" in name}
    run(out, processes=processes, resume=True, **world)
    same(out, through)


@fault(8)
@slow
def test_no_room_on_the_first_rank_alone(world: dict, tmp_path: Path) -> None:
    """The other one ends too, soon, and does not say something else about it."""
    out, limit = tmp_path / "out", functools.partial(hooks.limit_files_of_main, 100_000)
    ended = start(out, processes=2, hook=limit, **world)
    ended.until(lambda: ended.processes[0].exitcode is not None)
    assert ended.processes[0].exitcode == 4
    ended.processes[1].join(30)
    assert ended.processes[1].exitcode and ended.status["state"] == "storage", (ended.status, ended.log[-3000:])
    nothing_partial(out, 0)


@fault(8)
@slow
def test_no_room_for_the_model(world: dict, through: Path, tmp_path: Path) -> None:
    out = cut(through, tmp_path / "out", 12)
    ended = run(out, code=4, hook=functools.partial(hooks.limit_files, 50_000), resume=True, **world)
    harness.check_message(ended, str(out))
    assert ended.status["state"] == "storage" and ended.status["step"] == 12
    nothing_partial(out, 12)
    run(out, resume=True, **world)
    same(out, through)


@fault(8)
def test_no_room_from_the_start(world: dict, tmp_path: Path) -> None:
    ended = run(tmp_path / "out", code=4, hook=hooks.no_room_for_status, **world)
    harness.check_message(ended, f"{tmp_path / 'out' / 'status.json'}: cannot be written")
    assert "status.json" not in ended.log.replace(f"dpo.py: {tmp_path / 'out' / 'status.json'}", ""), ended.log


@fault(8)
@slow
def test_no_room_for_the_token_ids(world: dict, tmp_path: Path) -> None:
    ended = run(tmp_path / "out", code=4, hook=functools.partial(hooks.limit_files, 4_000), **world)
    harness.check_message(ended, f"{tmp_path / 'out'}.cache")
    assert not list(Path(f"{tmp_path / 'out'}.cache").rglob("*.*")), "a torn file in the cache"


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    found = subprocess.run(mount, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"a small tmpfs needs root: {found.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Three megabytes: five checkpoints."""
    with mounted(tmp_path / "disk", "size=3m") as disk:
        yield disk


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing can be made in; root, who may write everywhere, needs a read-only file system for that."""
    if os.getuid() == 0:
        with mounted(tmp_path / "locked", "ro") as folder:
            yield folder
    else:
        (tmp_path / "locked").mkdir(mode=0o555)
        yield tmp_path / "locked"


@fault(8)
@slow
def test_a_full_disk(world: dict, through: Path, tmp_path: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    ended = run(out, code=4, beside=tmp_path / "beside", **world)
    step = ended.status["step"]
    harness.check_message(ended, str(out / "checkpoints" / f"step-{step:06d}"))
    assert ended.status["state"] == "storage" and step > 1
    nothing_partial(out, step - 1)
    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
    run(out, beside=tmp_path / "beside", resume=True, **world)
    same(out, through)


@fault(8)
@slow
def test_a_disk_that_somebody_else_fills(world: dict, through: Path, tmp_path: Path, small_disk: Path) -> None:
    """Then neither the log nor status.json can be written: one line and the exit code say it all the same."""
    out, options = small_disk / "out", {**world, "max_steps": 1000, "save_every": 0, "beside": tmp_path / "beside"}
    process = start(out, **options)
    process.until(lambda: len(harness.lines(out)) > 2)
    with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(64 if filler.tell() > 2_900_000 else 65536))
    assert process.end() == 4 and "Traceback" not in process.log, process.log[-3000:]
    harness.check_message(process, str(out))
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
    run(out, beside=tmp_path / "beside", resume=True, **world)
    same(out, through)


@fault(9)
@pytest.mark.parametrize("out", ["rows.jsonl/out", "/proc/out"])
def test_an_output_directory_that_cannot_be(world: dict, tmp_path: Path, out: str) -> None:
    refused(world["train_data"].parent / out, f"{out}: cannot be written", state=None, beside=tmp_path / "log", **world)


@fault(9)
@slow
@every_algorithm
def test_a_folder_that_cannot_be_written(world: dict, tmp_path: Path, locked: Path, algorithm: str) -> None:
    out, options = locked / "out", {**world, "script": f"algos/{algorithm}.py"}
    refused(out, f"{out}: cannot be written", state=None, beside=tmp_path / "log", **options)


@fault(10)
@every_algorithm
def test_an_occupied_output_directory(world: dict, through: Path, tmp_path: Path, algorithm: str) -> None:
    """A finished run of dpo, and one that was killed before its end; neither changes by a byte."""
    for step in (12, 3):
        out = shutil.copytree(through, tmp_path / f"{step}") if step == 12 else cut(through, tmp_path / f"{step}", 3)
        before = files(out)
        refused(out, "holds another run", state=None, script=f"algos/{algorithm}.py", **world)
        assert files(out) == before


@fault(10, 18)
@slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_an_occupied_output_directory_on_two_ranks(world: dict, through: Path, tmp_path: Path, torchrun: bool) -> None:
    out = shutil.copytree(through, tmp_path / "out")
    before = files(out)
    process = start(out, processes=2, torchrun=torchrun, **world)
    assert process.end(60) and "holds another run" in process.log
    assert files(out) == before


@fault(11, 12, 13, 14)
def test_resumed_as_another_run(world: dict, through: Path, tmp_path: Path) -> None:
    """Every difference is listed, and nothing is written; the budget of a micro-batch may change."""
    out, rows = cut(through, tmp_path / "out", 6), tmp_path / "rows.jsonl"
    worlds.write_jsonl(rows, worlds.read_jsonl(world["train_data"])[::-1])
    before = {name: data for name, data in files(out).items() if name != "status.json"}
    changed = {"beta": 0.2, "label_smoothing": 0.1, "learning_rate": 2e-4, "batch_size": 4, "seed": 1, "epochs": 9.0}
    differences = ["beta 0.1 → 0.2", "label_smoothing 0.0 → 0.1", "learning_rate 0.0001 → 0.0002", "batch_size 8 → 4"]
    differences += [
        "seed 0 → 1",
        "epochs 1.0 → 9.0",
        f"train_data '{world['train_data']}' → '{rows}'",
        "the train rows",
    ]
    options = {**world, **changed, "micro_batch_tokens": 100, "train_data": rows}
    refused(out, "another run", *differences, resume=True, **options)
    assert before == {name: data for name, data in files(out).items() if name != "status.json"}


@fault(12)
@slow
@pytest.mark.parametrize("change", ["edited in place", "held-out rows added", "held-out rows edited"])
def test_resumed_with_other_rows(world: dict, tmp_path: Path, change: str) -> None:
    out, rows, held_out = tmp_path / "out", tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    shutil.copy(world["train_data"], rows)
    worlds.make_rows(5, 3, path=held_out)
    options = {**world, "train_data": rows, "max_steps": 2}
    run(out, **options, **({"eval_data": held_out} if change == "held-out rows edited" else {}))
    path = rows if change == "edited in place" else held_out
    worlds.write_jsonl(path, worlds.read_jsonl(path)[1:])
    if change != "edited in place":
        options["eval_data"] = held_out
    words = {"edited in place": "the train rows", "held-out rows added": "eval_data None → "}
    refused(out, words.get(change, "the eval rows"), resume=True, **options)


@fault(11)
def test_resumed_for_fewer_steps_than_are_done(world: dict, tmp_path: Path) -> None:
    """With a constant rate the last step may be another one, but not one that lies behind."""
    out, options = tmp_path / "out", {**world, "lr_schedule": "constant", "max_steps": 3}
    run(out, **options)
    before = files(out)
    refused(
        out, f"{out / 'checkpoints'}/step-000003 is beyond the last step, 2", resume=True, **options | {"max_steps": 2}
    )
    assert {**before, "status.json": b""} == {**files(out), "status.json": b""}


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
    world: dict, through_of: Callable[..., Path], tmp_path: Path, first: str, second: str
) -> None:
    out = cut(through_of(first, 1), tmp_path / "out", 6)
    refused(out, f"'{first}' → '{second}'", resume=True, script=f"algos/{second}.py", **world)


@fault(15)
@slow
@pytest.mark.parametrize("change", ["another directory", "other shapes", "fewer layers", "other values"])
def test_resumed_with_another_model(world: dict, tmp_path: Path, change: str) -> None:
    """The starting model's values are those of the reference too."""
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(world["model"], model)
    run(out, **{**world, "model": model, "max_steps": 2})
    shapes = {"other shapes": {"intermediate_size": 48}, "fewer layers": {"num_hidden_layers": 1}}
    path = tmp_path / "other" if change == "another directory" else model
    worlds.make_model(path, "llama", seed=5, initializer_range=0.15, **shapes.get(change, {}))
    refused(out, "model", resume=True, **{**world, "model": path, "max_steps": 4})


@fault(15)
@slow
def test_resumed_with_another_reference(world: dict, tmp_path: Path) -> None:
    out, reference = tmp_path / "out", worlds.make_model(tmp_path / "reference", seed=5, initializer_range=0.15)
    options = {**world, "reference": reference, "max_steps": 2}
    run(out, **options)
    worlds.make_model(reference, seed=6, initializer_range=0.15)
    refused(out, "reference", resume=True, **options)


@fault(17, 14)
@slow
@pytest.mark.parametrize("algorithm", ["dpo", "ensemble_dpo"])
def test_saved_on_two_ranks_resumed_on_one(
    world: dict, through_of: Callable[..., Path], tmp_path: Path, algorithm: str
) -> None:
    """In micro-batches of another size too."""
    script, two = f"algos/{algorithm}.py", through_of(algorithm, 2)
    out = cut(two, tmp_path / "out", 6)
    ended = run(out, resume=True, script=script, micro_batch_tokens=120, **world)
    assert "resumed from" in ended.log and "step-000006\n" in ended.log
    close(out, two)


@fault(18)
def test_two_runs_on_one_output_directory(world: dict, through: Path, tmp_path: Path) -> None:
    """The second is refused, with and without --resume; the first goes on as if nothing had been."""
    out = tmp_path / "out"
    first = start(out, **world)
    first.until(lambda: (out / "status.json").exists())
    first.send(signal.SIGSTOP)
    for resume in (False, True):
        refused(out, "another run is writing there", state=None, resume=resume, **world)
    assert first.status["state"] == "running"
    first.send(signal.SIGCONT)
    assert first.end() == 0
    same(out, through)


class Malicious:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.path}'",)


@fault(19)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin"])
def test_a_malicious_base_model(world: dict, tmp_path: Path, name: str) -> None:
    """The only weights there are, or a file beside them."""
    model, mark = shutil.copytree(world["model"], tmp_path / "model"), tmp_path / "executed"
    (model / name).write_bytes(pickle.dumps(Malicious(mark)))
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
        refused(tmp_path / "out", str(model), **{**world, "model": model})
    else:
        run(tmp_path / "out", **{**world, "model": model, "max_steps": 1})
    assert not mark.exists()
    pickle.loads((model / name).read_bytes())
    assert mark.exists(), "the pickle does nothing"


@fault(19)
@slow
def test_a_malicious_checkpoint(world: dict, through: Path, tmp_path: Path) -> None:
    out, mark = cut(through, tmp_path / "out", 6), tmp_path / "executed"
    step = out / "checkpoints" / "step-000006"
    for name in ("optimizer.pt", ".metadata", "rank-00001-of-00001.safetensors", "__0_0.distcp"):
        (step / name).write_bytes(pickle.dumps(Malicious(mark)))
    process = start(out, resume=True, **world)
    assert process.end() in (0, 2, 4) and "Traceback" not in process.log
    if process.end() == 0:
        same(out, through)
    assert not mark.exists()


@fault(20)
@every_algorithm
def test_files_are_safetensors_and_json(through_of: Callable[..., Path], algorithm: str) -> None:
    """By their names and by what they begin with, the caches' too."""
    from safetensors import safe_open

    out = through_of(algorithm, 1)
    found = [p for folder in (out, Path(f"{out}.cache")) for p in folder.rglob("*") if p.is_file()]
    assert len({p.suffix for p in found} & {".safetensors", ".json"}) == 2
    for path in found:
        if path.suffix == ".safetensors":
            safe_open(path, "pt")
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.name in ("metrics.jsonl", "README.md", ".lock", "chat_template.jinja"), path


@fault(21)
def test_tied_weights_are_exported_once(tmp_path: Path, world: dict) -> None:
    from safetensors import safe_open

    options = {**world, "model": worlds.make_model(tmp_path / "qwen2", "qwen2", seed=4), "max_steps": 1}
    found = []
    for processes in (1, 2):
        run(tmp_path / f"{processes}", processes=processes, **options)
        found.append(set(safe_open(tmp_path / f"{processes}" / "model.safetensors", "pt").keys()))
    assert found[0] == found[1] and "model.embed_tokens.weight" in found[0] and "lm_head.weight" not in found[0]


@fault(21)
@every_algorithm
def test_the_export_loads_plainly(through_of: Callable[..., Path], algorithm: str) -> None:
    import torch
    import transformers

    auto = transformers.AutoModelForSequenceClassification if algorithm == "rm" else transformers.AutoModelForCausalLM
    model, found = auto.from_pretrained(through_of(algorithm, 1), output_loading_info=True)
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), found
    tokenizer = transformers.AutoTokenizer.from_pretrained(through_of(algorithm, 1))
    assert torch.isfinite(model(**tokenizer("a ok", return_tensors="pt", return_token_type_ids=False)).logits).all()


@fault("b")
@pytest.mark.parametrize("moves", [0, 3, pytest.param(1, marks=slow), pytest.param(5, marks=slow)])
def test_killed_while_the_model_is_exported(world: dict, through: Path, tmp_path: Path, moves: int) -> None:
    """What is there loads not at all, or is the whole model; --resume completes it."""
    out = cut(through, tmp_path / "out", 12)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        (out / name).unlink()
    process = start(out, hook=functools.partial(hooks.kill_in_export, moves), resume=True, **world)
    assert process.end() == -signal.SIGKILL, process.log[-3000:]
    half_or_whole(out, through)
    run(out, resume=True, **world)
    same(out, through)
    assert not (out / ".export").exists() and (out / "tokenizer.json").exists()


@fault("b")
@slow
def test_killed_at_some_time_of_the_export(world: dict, through: Path, tmp_path: Path) -> None:
    """Its files are moved slowly, so that the kills fall between the first that is written and the last move."""
    rng, out, codes = random.Random(0), cut(through, tmp_path / "out", 12), []
    slowly = functools.partial(hooks.slow_export, 0.01)
    while codes.count(-signal.SIGKILL) < 6:
        for path in [out / "config.json", out / "model.safetensors", *(out / ".export").glob("*")]:
            path.unlink(missing_ok=True)
        process = start(out, hook=slowly, resume=True, **world)
        while process.running and not list((out / ".export").glob("*")):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.06))
        process.send(signal.SIGKILL)
        codes.append(process.end())
        half_or_whole(out, through)
        assert len(codes) < 40, f"most exports were over before their process was killed: {codes}"


def half_or_whole(out: Path, through: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (out / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(out)
        AutoTokenizer.from_pretrained(out)
        assert weights(out) == weights(through)
    else:
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)
