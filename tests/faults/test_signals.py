"""Asked to stop, killed, stuck: what becomes of a run and its processes (faults 22-26, c, d)."""

import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import harness
import hooks
import pytest
import worlds
from conftest import ALGORITHMS, undisturbed
from harness import checkpoints, lines, refused, run, same, start, weights, workers

fault, slow = pytest.mark.fault, pytest.mark.slow


@pytest.fixture(scope="module")
def longer(world: dict) -> dict:
    """Steps slow enough that a signal meets one that is not the last."""
    return {**world, "max_steps": 60, "micro_batch_tokens": 64, "save_every": 0}


@pytest.fixture(scope="module")
def longer_through(longer: dict, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Undisturbed runs of it."""
    return undisturbed(tmp_path_factory.mktemp("longer"), longer)


def preempted(process: harness.Started) -> int:
    """The step at which a run that ended because it was asked to has saved everything, and no model."""
    assert process.status["state"] == "preempted", (process.status, process.log[-3000:])
    step = process.status["step"]
    assert checkpoints(process.out) == [f"step-{step:06d}"] * (step > 0)
    assert not (process.out / "config.json").exists() and not (process.out / "model.safetensors").exists()
    return step


@fault(22)
@pytest.mark.parametrize("algorithm", [pytest.param(name, marks=[slow] * (name != "dpo")) for name in ALGORITHMS])
def test_asked_to_stop(longer: dict, longer_through: Callable[..., Path], tmp_path: Path, algorithm: str) -> None:
    out, options = tmp_path / "out", {**longer, "script": f"algos/{algorithm}.py"}
    process = start(out, **options)
    process.until(lambda: len(lines(out)) > 2)
    process.send(signal.SIGTERM)
    assert process.end(10) == 75 and "Traceback" not in process.log, process.log[-3000:]
    assert preempted(process) == len(lines(out)) < 60
    assert run(out, resume=True, **options).status["state"] == "done"
    same(out, longer_through(algorithm, 1))


def test_interrupted_from_the_keyboard(longer: dict, longer_through: Callable[..., Path], tmp_path: Path) -> None:
    out, options = tmp_path / "out", {**longer, "save_every": 1}
    process = start(out, hook=hooks.heed_ctrl_c, **options)
    process.until(lambda: len(lines(out)) > 2)
    process.send(signal.SIGINT)
    assert process.end(10) == 130 and "Traceback" not in process.log, process.log[-3000:]
    assert process.log.endswith("dpo.py: interrupted\n"), process.log[-300:]
    assert process.status["state"] == "interrupted" and process.status["step"] >= 2, process.status
    assert run(out, resume=True, **options).status["state"] == "done"
    same(out, longer_through("dpo", 1))


@fault(22)
@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_asked_to_stop(
    longer: dict, longer_through: Callable[..., Path], tmp_path: Path, rank: int
) -> None:
    """All of them stop at the same step."""
    out = tmp_path / "out"
    process = start(out, processes=2, **longer)
    process.until(lambda: len(lines(out)) > 2)
    os.kill(process.processes[rank].pid, signal.SIGTERM)
    assert process.end(10) == 75 and [p.exitcode for p in process.processes] == [75, 75], process.log[-3000:]
    assert preempted(process) == len(lines(out)) < 60
    run(out, processes=2, resume=True, **longer)
    same(out, longer_through("dpo", 2))


@fault(22)
@pytest.mark.parametrize("saved", [True, pytest.param(False, marks=slow)])
def test_asked_to_stop_after_the_last_step(world: dict, through: Path, tmp_path: Path, saved: bool) -> None:
    """Where the last step is saved the export can wait for --resume; else it is what must not be lost."""
    out, options = tmp_path / "out", {**world, "save_every": 12 if saved else 0}
    process = start(out, hook=hooks.terminate_in_export, **options)
    assert process.end(60) == (75 if saved else 0) and "Traceback" not in process.log, process.log[-3000:]
    if saved:
        assert preempted(process) == 12
        run(out, resume=True, **options)
    same(out, through)
    assert not (out / ".export").exists()


@fault(22)
def test_asked_to_stop_while_it_ends(world: dict, through: Path, tmp_path: Path) -> None:
    """The run ends as it would have, and says so: with its model, or with what was refused."""
    ended = run(tmp_path / "out", hook=hooks.terminate_in_close, **world)
    assert ended.status == {"state": "done", "step": 12, "reason": ""}
    same(tmp_path / "out", through)
    refused(tmp_path / "no", "--beta", hook=hooks.terminate_in_close, **{**world, "beta": -1})


@fault(22)
def test_asked_to_stop_before_all_ranks_are_there(world: dict, tmp_path: Path) -> None:
    process = start(tmp_path / "out", processes=2, hook=hooks.late_second_rank, **world)
    process.until(lambda: process.status and process.status["state"] == "running")
    process.send(signal.SIGTERM)
    assert process.end(20) == 75 and process.processes[1].exitcode == 75, process.log[-3000:]
    assert "Traceback" not in process.log and preempted(process) == 0


@fault(23)
@slow
def test_torchrun_is_asked_to_stop(longer: dict, longer_through: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(out, processes=2, torchrun=True, **longer)
    process.until(lambda: len(lines(out)) > 2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.end(30) and not workers(out)
    assert preempted(process) == len(lines(out)) < 60
    run(out, processes=2, resume=True, **longer)
    same(out, longer_through("dpo", 2))


@fault(24)
@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_killed(longer: dict, longer_through: Callable[..., Path], tmp_path: Path, rank: int) -> None:
    """What the last checkpoint holds goes on."""
    out, options = tmp_path / "out", {**longer, "save_every": 1, "max_steps": 60}
    process = start(out, processes=2, torchrun=True, **options)
    process.until(lambda: len(lines(out)) > 2)
    (victim,) = [pid for pid in workers(out) if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()]
    os.kill(victim, signal.SIGKILL)
    assert process.end(30) and not workers(out), process.log[-3000:]
    assert rank == 0 or process.status["state"] == "failed", process.status
    run(out, processes=2, resume=True, **options)
    same(out, longer_through("dpo", 2))


@fault(25)
@slow
def test_torchrun_is_killed(longer: dict, tmp_path: Path) -> None:
    """Before it is asked for, and between two steps: no worker is left."""
    out = tmp_path / "out"
    process = start(out, processes=2, torchrun=True, **{**longer, "max_steps": 100_000})
    process.until(lambda: len(lines(out)) > 2)
    assert len(workers(out)) == 2
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while workers(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers(out)


@fault(26)
@pytest.mark.parametrize("torchrun, runs", [(False, 3), pytest.param(True, 20, marks=slow)])
def test_normal_ends(world: dict, tmp_path: Path, torchrun: bool, runs: int) -> None:
    for i in range(runs):
        out = tmp_path / f"{i}"
        process = run(out, processes=2, torchrun=torchrun, **{**world, "max_steps": 1, "save_every": 0})
        seconds = time.time() - (out / "config.json").stat().st_mtime
        assert seconds <= 10 and process.status["state"] == "done", (i, seconds)
        assert not workers(out)


@fault("c")
@slow
def test_a_rank_that_is_stuck_is_named(longer: dict, tmp_path: Path) -> None:
    """The others give up when a collective takes longer than its time-out."""
    out = tmp_path / "out"
    process = start(out, processes=2, hook=functools.partial(hooks.short_timeout, 10), **longer)
    process.until(lambda: len(lines(out)) > 2)
    os.kill(process.processes[1].pid, signal.SIGSTOP)
    process.processes[0].join(40)
    assert process.processes[0].exitcode, "it waits on"
    assert process.status["state"] == "failed" and "rank 1" in process.status["reason"], process.status


@pytest.fixture(scope="module")
def held_out(world: dict) -> dict:
    """So many held-out rows that a pass over them takes seconds."""
    path = world["model"].parent / "held_out.jsonl"
    worlds.make_rows(400, 7, path=path, prompt_words=(1, 6), completion_words=(1, 4))
    return {**world, "eval_data": path, "micro_batch_tokens": 32, "save_every": 0}


@fault("d")
@pytest.mark.parametrize("processes, rank", [(1, 0), pytest.param(2, 0, marks=slow), pytest.param(2, 1, marks=slow)])
def test_asked_to_stop_in_the_reference_pass(held_out: dict, tmp_path: Path, processes: int, rank: int) -> None:
    out, options = tmp_path / "out", {**held_out, "eval_every": 0, "processes": processes}
    process = start(out, hook=functools.partial(hooks.terminate_in, "reference", rank), **options)
    process.processes[rank].join(60)
    assert process.processes[rank].exitcode == 75 and "went on" not in process.log, process.log[-3000:]
    assert process.end(10) and preempted(process) == 0  # where one rank has ended, torchrun ends the others
    run(out, resume=True, **options)
    run(tmp_path / "through", **options)
    same(out, tmp_path / "through")


@fault("d")
@slow
def test_asked_to_stop_again_and_again(held_out: dict, tmp_path: Path) -> None:
    """As a scheduler and torchrun both do: that it is ending already does not make it end in another way."""
    process = start(tmp_path / "out", **held_out)
    process.until(lambda: process.status and process.status["state"] == "running")
    process.until("first row")
    while process.running:
        process.send(signal.SIGTERM)
        time.sleep(0.0001)
    assert process.end() == 75 and "Traceback" not in process.log, process.log[-3000:]
    assert preempted(process) == 0


@fault("d")
@slow
@pytest.mark.parametrize("last", [False, True], ids=["", "of the last step"])
@pytest.mark.parametrize("processes, rank", [(1, 0), (2, 0), (2, 1)])
def test_asked_to_stop_in_an_evaluation(held_out: dict, tmp_path: Path, processes: int, rank: int, last: bool) -> None:
    """Saved as of its step; the resumed run trains on as if nothing had been."""
    out, options = tmp_path / "out", {**held_out, "eval_every": 100 if last else 5, "processes": processes}
    process = start(out, hook=functools.partial(hooks.terminate_in, "evaluation", rank), **options)
    assert process.end(60) == 75 and "went on" not in process.log, process.log[-3000:]
    assert preempted(process) == (12 if last else 5)
    run(out, resume=True, **options)
    through = tmp_path / "through"
    shutil.copytree(f"{out}.cache", f"{through}.cache")
    run(through, **options)
    ours, theirs = ([line for line in lines(path) if "loss" in line] for path in (out, through))
    assert ours == theirs and weights(out) == weights(through)
    assert last or "eval/loss" in lines(out)[-1]
