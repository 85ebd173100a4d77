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
import tiny
from conftest import undisturbed
from harness import checkpoints, lines, refused, run, same, start, weights, workers
from marks import every_algorithm, fault, slow

Undisturbed = Callable[[str, int], Path]  # algorithm, number of processes → the output directory of its run
LONGER = 60  # steps
one_rank_of_two = pytest.mark.parametrize("rank", [0, 1])


@pytest.fixture(scope="module")
def longer(run_options: dict) -> dict:
    """Steps slow enough that a signal meets one that is not the last."""
    return {**run_options, "max_steps": LONGER, "micro_batch_tokens": 64, "save_every": 0}


@pytest.fixture(scope="module")
def longer_through(longer: dict, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Undisturbed runs of it."""
    return undisturbed(tmp_path_factory.mktemp("longer"), longer)


def start_and_wait(out: Path, **options: object) -> harness.Started:
    """Start a run, and wait until it has logged three steps."""
    process = start(out, **options)
    process.until(lambda: len(lines(out)) > 2)
    return process


def assert_ended(process: harness.Started, code: int, seconds: float) -> None:
    assert process.end(seconds) == code, process.log[-3000:]
    assert "Traceback" not in process.log, process.log[-3000:]


def preempted(process: harness.Started) -> int:
    """The step at which a run that ended because it was asked to has saved everything, and no model."""
    assert process.status["state"] == "preempted", (process.status, process.log[-3000:])
    step = process.status["step"]
    expected = []
    if step > 0:
        expected.append(f"step-{step:06d}")
    assert checkpoints(process.out) == expected
    assert not (process.out / "config.json").exists()
    assert not (process.out / "model.safetensors").exists()
    return step


def assert_preempted_on_the_way(process: harness.Started) -> None:
    """Every step that it took is logged, and the last of them is saved."""
    step = preempted(process)
    assert step == len(lines(process.out))
    assert step < LONGER


def resume_to_the_end(out: Path, through: Path, **options: object) -> None:
    """Resume a run to its end, which must be bitwise that of the undisturbed one."""
    ended = run(out, resume=True, **options)
    assert ended.status["state"] == "done"
    same(out, through)


# ---------------------------------------------------------------- asked to stop


@fault(22)
@every_algorithm
def test_asked_to_stop(longer: dict, longer_through: Undisturbed, tmp_path: Path, algorithm: str) -> None:
    out = tmp_path / "out"
    options = {**longer, "script": f"algos/{algorithm}.py"}
    process = start_and_wait(out, **options)
    process.send(signal.SIGTERM)
    assert_ended(process, code=75, seconds=10)
    assert_preempted_on_the_way(process)
    resume_to_the_end(out, longer_through(algorithm, 1), **options)


def test_interrupted_from_the_keyboard(longer: dict, longer_through: Undisturbed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {**longer, "save_every": 1}
    process = start_and_wait(out, hook=hooks.heed_ctrl_c, **options)
    process.send(signal.SIGINT)
    assert_ended(process, code=130, seconds=10)
    assert process.log.endswith("dpo.py: interrupted\n"), process.log[-300:]
    assert process.status["state"] == "interrupted", process.status
    assert process.status["step"] >= 2, process.status
    resume_to_the_end(out, longer_through("dpo", 1), **options)


@fault(22)
@slow
@one_rank_of_two
def test_one_rank_is_asked_to_stop(longer: dict, longer_through: Undisturbed, tmp_path: Path, rank: int) -> None:
    """All of them stop at the same step."""
    out = tmp_path / "out"
    process = start_and_wait(out, processes=2, **longer)
    os.kill(process.processes[rank].pid, signal.SIGTERM)
    assert process.end(10) == 75, process.log[-3000:]
    assert [rank_process.exitcode for rank_process in process.processes] == [75, 75], process.log[-3000:]
    assert_preempted_on_the_way(process)
    resume_to_the_end(out, longer_through("dpo", 2), processes=2, **longer)


@fault(22)
def test_asked_to_stop_after_the_last_step_is_saved(run_options: dict, through: Path, tmp_path: Path) -> None:
    """The export can wait for --resume."""
    out = tmp_path / "out"
    options = {**run_options, "save_every": 12}
    process = start(out, hook=hooks.terminate_in_export, **options)
    assert_ended(process, code=75, seconds=60)
    assert preempted(process) == 12
    resume_to_the_end(out, through, **options)
    assert not (out / ".export").exists()


@fault(22)
@slow
def test_asked_to_stop_after_the_last_step_is_not_saved(run_options: dict, through: Path, tmp_path: Path) -> None:
    """The export must not be lost."""
    out = tmp_path / "out"
    process = start(out, hook=hooks.terminate_in_export, **{**run_options, "save_every": 0})
    assert_ended(process, code=0, seconds=60)
    same(out, through)
    assert not (out / ".export").exists()


@fault(22)
def test_asked_to_stop_while_it_ends(run_options: dict, through: Path, tmp_path: Path) -> None:
    """The run ends as it would have, and says so: with its model, or with what was refused."""
    out = tmp_path / "out"
    ended = run(out, hook=hooks.terminate_in_close, **run_options)
    assert ended.status == {"state": "done", "step": 12, "reason": ""}
    same(out, through)
    refused(tmp_path / "no", "--beta", hook=hooks.terminate_in_close, **{**run_options, "beta": -1})


def is_running(process: harness.Started) -> bool:
    """Whether status.json says so."""
    status = process.status
    return status is not None and status["state"] == "running"


@fault(22)
def test_asked_to_stop_before_all_ranks_are_there(run_options: dict, tmp_path: Path) -> None:
    process = start(tmp_path / "out", processes=2, hook=hooks.late_second_rank, **run_options)
    process.until(lambda: is_running(process))
    process.send(signal.SIGTERM)
    assert_ended(process, code=75, seconds=20)
    assert process.processes[1].exitcode == 75, process.log[-3000:]
    assert preempted(process) == 0


# ---------------------------------------------------------------- torchrun


@fault(23)
@slow
def test_torchrun_is_asked_to_stop(longer: dict, longer_through: Undisturbed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_and_wait(out, processes=2, torchrun=True, **longer)
    os.kill(process.pid, signal.SIGTERM)
    assert process.end(30)
    assert not workers(out)
    assert_preempted_on_the_way(process)
    resume_to_the_end(out, longer_through("dpo", 2), processes=2, **longer)


def worker_of_rank(out: Path, rank: int) -> int:
    """The process of one rank that torchrun started."""
    variable = f"\0RANK={rank}\0"
    (pid,) = [pid for pid in workers(out) if variable in Path(f"/proc/{pid}/environ").read_text()]
    return pid


@fault(24)
@slow
@one_rank_of_two
def test_one_rank_is_killed(longer: dict, longer_through: Undisturbed, tmp_path: Path, rank: int) -> None:
    """The run goes on from the last checkpoint."""
    out = tmp_path / "out"
    options = {**longer, "save_every": 1}
    process = start_and_wait(out, processes=2, torchrun=True, **options)
    os.kill(worker_of_rank(out, rank), signal.SIGKILL)
    assert process.end(30), process.log[-3000:]
    assert not workers(out), process.log[-3000:]
    if rank == 1:  # the first rank is left to say it
        assert process.status["state"] == "failed", process.status
    resume_to_the_end(out, longer_through("dpo", 2), processes=2, **options)


@fault(25)
@slow
def test_torchrun_is_killed(longer: dict, tmp_path: Path) -> None:
    """Without a warning, between two steps: no worker is left."""
    out = tmp_path / "out"
    process = start_and_wait(out, processes=2, torchrun=True, **{**longer, "max_steps": 100_000})
    assert len(workers(out)) == 2
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while workers(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers(out)


@fault(26)
@pytest.mark.parametrize("torchrun, runs", [(False, 3), pytest.param(True, 20, marks=slow)])
def test_normal_ends(run_options: dict, tmp_path: Path, torchrun: bool, runs: int) -> None:
    options = {**run_options, "max_steps": 1, "save_every": 0}
    for number in range(runs):
        out = tmp_path / f"{number}"
        process = run(out, processes=2, torchrun=torchrun, **options)
        seconds = time.time() - (out / "config.json").stat().st_mtime
        assert seconds <= 10, number
        assert process.status["state"] == "done"
        assert not workers(out)


@fault("c")
@slow
@pytest.mark.parametrize("make_impatient", [hooks.short_timeout, hooks.as_on_gpus])
def test_a_rank_that_is_stuck_is_named(longer: dict, tmp_path: Path, make_impatient: Callable) -> None:
    """The others give up when a collective takes longer than its time-out, or, as on GPUs, when nothing goes on."""
    hook = functools.partial(make_impatient, 10)
    process = start_and_wait(tmp_path / "out", processes=2, hook=hook, **longer)
    first, second = process.processes
    os.kill(second.pid, signal.SIGSTOP)
    first.join(40)
    assert first.exitcode, "it waits on"
    assert process.status["state"] == "failed", process.status
    assert "rank 1" in process.status["reason"], process.status


# ---------------------------------------------------------------- asked to stop between the steps


@pytest.fixture(scope="module")
def held_out(run_options: dict) -> dict:
    """So many held-out rows that a pass over them takes seconds."""
    path = run_options["model"].parent / "held_out.jsonl"
    tiny.make_rows(400, 7, path=path, prompt_words=(1, 6), completion_words=(1, 4))
    return {**run_options, "eval_data": path, "micro_batch_tokens": 32, "save_every": 0}


@fault("d")
@pytest.mark.parametrize("processes, rank", [(1, 0), pytest.param(2, 0, marks=slow), pytest.param(2, 1, marks=slow)])
def test_asked_to_stop_in_the_reference_pass(held_out: dict, tmp_path: Path, processes: int, rank: int) -> None:
    out = tmp_path / "out"
    through = tmp_path / "through"
    options = {**held_out, "eval_every": 0, "processes": processes}
    process = start(out, hook=functools.partial(hooks.terminate_in, "reference", rank), **options)

    asked = process.processes[rank]
    asked.join(60)
    assert asked.exitcode == 75, process.log[-3000:]
    assert "went on" not in process.log, process.log[-3000:]
    assert process.end(10)  # where one rank has ended, torchrun ends the others
    assert preempted(process) == 0

    run(through, **options)
    resume_to_the_end(out, through, **options)


@fault("d")
@slow
def test_asked_to_stop_again_and_again(held_out: dict, tmp_path: Path) -> None:
    """As a scheduler and torchrun both do. A run that is ending already does not end in another way."""
    process = start(tmp_path / "out", **held_out)
    process.until(lambda: is_running(process))
    process.until("first row")
    while process.running:
        process.send(signal.SIGTERM)
        time.sleep(0.0001)
    assert_ended(process, code=75, seconds=120)
    assert preempted(process) == 0


@fault("d")
@slow
@pytest.mark.parametrize("eval_every, step", [(5, 5), (100, 12)], ids=["", "of the last step"])
@pytest.mark.parametrize("processes, rank", [(1, 0), (2, 0), (2, 1)])
def test_asked_to_stop_in_an_evaluation(
    held_out: dict, tmp_path: Path, processes: int, rank: int, eval_every: int, step: int
) -> None:
    """The run is saved as of its step. The resumed run trains on as if nothing had happened."""
    out = tmp_path / "out"
    through = tmp_path / "through"
    options = {**held_out, "eval_every": eval_every, "processes": processes}
    process = start(out, hook=functools.partial(hooks.terminate_in, "evaluation", rank), **options)
    assert process.end(60) == 75, process.log[-3000:]
    assert "went on" not in process.log, process.log[-3000:]
    assert preempted(process) == step

    run(out, resume=True, **options)
    shutil.copytree(f"{out}.cache", f"{through}.cache")
    run(through, **options)
    training_lines = [line for line in lines(out) if "loss" in line]
    assert training_lines == [line for line in lines(through) if "loss" in line]
    assert weights(out) == weights(through)
    if step < 12:
        assert "eval/loss" in lines(out)[-1]
