"""Checkpoints as model directories: equal to what a run that ended there exports, while training goes on too."""

import functools
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import tiny
from transformers import AutoModelForSequenceClassification

from scripts import export
from shared import UserError
from shared.distributed import single_process
from shared.loading import load_tokenizer

CARD = "README.md"
OF_RUN = (CARD, ".lock", "run.json", "status.json", "metrics.jsonl")


@pytest.fixture(scope="session")
def steady(run_options: dict) -> dict:
    """The options of a run of six steps whose learning rate does not depend on their number."""
    held_out = run_options["model"].parent / "held_out.jsonl"
    tiny.make_rows(8, seed=21, path=held_out)
    steps = {"max_steps": 6, "save_every": 2, "eval_every": 1}
    return {**run_options, **steps, "lr_schedule": "constant", "eval_data": held_out}


@pytest.fixture(scope="session")
def steady_of(steady: dict, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A function from an algorithm and a number of processes to the output directory of their run."""
    folder = tmp_path_factory.mktemp("steady")

    @functools.cache
    def output_directory(algorithm: str, processes: int) -> Path:
        out = folder / f"{algorithm}-{processes}"
        harness.run(out, script=f"algos/{algorithm}.py", processes=processes, **steady)
        return out

    return output_directory


@pytest.fixture(scope="session")
def run(steady_of: Callable[[str, int], Path]) -> Path:
    """A run of dpo that has ended."""
    return steady_of("dpo", 1)


def write(run: Path, **arguments: Any) -> None:
    """Start the command in this process."""
    with single_process("float32") as ranks:
        export.write_models(export.Args(run=run, **arguments), ranks)


def model_files(model: Path) -> dict[str, bytes]:
    """The files of a model directory but its card, and those of a run around it."""
    names = {path.name for path in model.iterdir() if path.is_file()}
    return {name: (model / name).read_bytes() for name in names.difference(OF_RUN)}


def assert_same_model(model: Path, expected: Path) -> None:
    assert model_files(model).keys() >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert model_files(model) == model_files(expected)


# ---------------------------------------------------------------- one checkpoint


def test_the_model_is_that_of_a_run_which_ended_there(steady: dict, run: Path, tmp_path: Path) -> None:
    before = (run / "status.json").read_bytes()
    harness.run(tmp_path / "ended", **{**steady, "max_steps": 4})
    write(run, step=4, output_dir=tmp_path / "model")
    assert_same_model(tmp_path / "model", tmp_path / "ended")
    assert model_files(run)["model.safetensors"] != model_files(tmp_path / "model")["model.safetensors"]
    card = (tmp_path / "model" / CARD).read_text()
    assert "This is the checkpoint of step 4." in card
    assert "trained by dpo" in card
    assert (run / "status.json").read_bytes() == before


@pytest.mark.parametrize("algorithm, processes", [("dpo", 2), ("rm", 1)])
def test_the_last_step(steady_of: Callable[[str, int], Path], tmp_path: Path, algorithm: str, processes: int) -> None:
    """Of shards of two processes, and of a reward model with its pad token and `reward_mean`."""
    run = steady_of(algorithm, processes)
    checkpoint = run / "checkpoints" / "step-000006"
    assert len(list(checkpoint.glob("*.safetensors"))) == processes
    write(run, step=6, output_dir=tmp_path / "model")
    assert_same_model(tmp_path / "model", run)
    if algorithm == "rm":
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        assert classifier.config.reward_mean != 0
        assert "reward_of_text" in (tmp_path / "model" / CARD).read_text()


@pytest.mark.slow
def test_exported_by_two_processes(steady_of: Callable[[str, int], Path], tmp_path: Path) -> None:
    run = steady_of("rm", 2)
    line = [*tiny.command("scripts/export.py", 2, {"step": 6, "output_dir": tmp_path / "model"}), str(run)]
    subprocess.run(line, cwd=tiny.ROOT, env=tiny.environment(tmp_path / "cache"), check=True)
    assert_same_model(tmp_path / "model", run)


# ---------------------------------------------------------------- the best


def values_of(run: Path, name: str) -> dict[int, float]:
    lines = tiny.read_jsonl(run / "metrics.jsonl")
    return {line["step"]: line[name] for line in lines if name in line}


def chosen(run: Path, **arguments: Any) -> int:
    args = export.Args(run=run, **arguments)
    checkpoints = sorted((run / "checkpoints").iterdir())
    path = export.choose(args, checkpoints, export.log_lines(run))
    return int(path.name.removeprefix("step-"))


def rewrite(run: Path, copy: Path, losses: list[float]) -> Path:
    """A copy of a run, with other held-out losses of the steps 1 to 6."""
    shutil.copytree(run, copy)
    lines = [{"step": 1, "loss": 0.0}]
    lines += [{"step": step, "eval/loss": loss, "eval/odd": -loss} for step, loss in enumerate(losses, 1)]
    tiny.write_jsonl(copy / "metrics.jsonl", lines)
    return copy


def test_the_best_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 2, 4 and 6 have checkpoints."""
    other = rewrite(run, tmp_path / "run", [0.1, 0.6, 0.2, 0.5, 0.2, 0.5])
    assert chosen(other, best="loss") == chosen(other, best="eval/loss") == 4
    assert chosen(other, best="loss", better="higher") == 2
    assert chosen(other, best="odd", better="higher") == 4
    printed = capsys.readouterr().out
    assert "step 4 has the lowest eval/loss, 0.5, of 2, 4, 6" in printed
    assert "better was 0.1 at step 1, of which there is no checkpoint" in printed


def test_the_best_of_a_real_run(run: Path, tmp_path: Path) -> None:
    values = values_of(run, "eval/rewards/margins")
    assert set(values) >= {2, 4, 6}
    best = max((2, 4, 6), key=lambda step: values[step])
    write(run, best="rewards/margins", output_dir=tmp_path / "model")
    assert f"checkpoint of step {best}." in (tmp_path / "model" / CARD).read_text()


# ---------------------------------------------------------------- while training goes on


def test_every_checkpoint_of_a_run_that_goes_on(steady: dict, tmp_path: Path) -> None:
    """The models appear while the run goes on, and the command ends with the run."""
    run = tmp_path / "run"
    first = run / "models" / "step-000060"
    options = {**steady, "max_steps": 10_000, "save_every": 30, "keep": 1000, "eval_every": 0, "log_every": 30}
    training = harness.start(run, **options)
    states = []

    def stop_after_first() -> None:
        training.until((first / "config.json").exists)
        states.append(training.status["state"])
        training.send(signal.SIGTERM)

    stopper = threading.Thread(target=stop_after_first)
    stopper.start()
    export.wait_for_start(run)
    write(run, every=60)
    stopper.join()
    assert states == ["running"]
    assert training.end() == 75
    names = sorted(os.listdir(run / "models"))
    assert names == [f"step-{step:06d}" for step in range(60, 60 * len(names) + 1, 60)]

    harness.run(tmp_path / "ended", **{**options, "max_steps": 60, "save_every": 0})
    assert_same_model(first, tmp_path / "ended")


def test_a_run_that_does_not_start(steady: dict, tmp_path: Path) -> None:
    harness.refused(tmp_path / "run", **{**steady, "train_data": tmp_path / "nowhere.jsonl"})
    with pytest.raises(UserError, match="ended before its first step: .*nowhere"):
        export.wait_for_start(tmp_path / "run")


def test_models_that_are_there_stay(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "models"
    write(run, every=2, output_dir=directory)
    assert sorted(path.name for path in directory.iterdir()) == ["step-000002", "step-000004", "step-000006"]
    capsys.readouterr()
    write(run, every=2, output_dir=directory)
    assert capsys.readouterr().out == ""
    write(run, every=3, output_dir=directory)
    assert "there was no checkpoint of the steps 3;" in capsys.readouterr().out


def test_a_checkpoint_that_the_run_has_deleted(run: Path, tmp_path: Path) -> None:
    """While the run goes on it is passed over, and what is wrong with one that is there ends the command."""
    args = export.Args(run=run, every=1)
    gone = run / "checkpoints" / "step-000003"
    damaged = shutil.copytree(run / "checkpoints" / "step-000002", tmp_path / "step-000002")
    (damaged / "manifest.json").write_text("{}")
    with single_process("float32") as ranks:
        assert export.write_if_there(args, None, gone, tmp_path / "model", ranks) is None
        with pytest.raises(UserError, match=r"manifest\.json"):
            export.write_if_there(args, None, damaged, tmp_path / "model", ranks)
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"step": 3}, "--step 3: .* has checkpoints of the steps 2, 4, 6"),
        ({"best": "rewards/rejected"}, "give --better lower or --better higher"),
        ({"best": "nll", "better": "lower"}, "--best nll: not in metrics.jsonl, which has .*logps/chosen.*loss"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(run, output_dir=tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()


def test_a_run_without_what_is_asked_for(steady: dict, run: Path, tmp_path: Path) -> None:
    other = rewrite(run, tmp_path / "other", [0.5])
    with pytest.raises(UserError, match="evaluated at the steps 1, checkpoints are of 2, 4, 6; let --save-every"):
        chosen(other, best="loss")
    (other / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has evaluated no held-out rows"):
        chosen(other, best="loss")
    shutil.rmtree(other / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoints yet"):
        write(other, step=2)
    with pytest.raises(UserError, match=r"model: is no run, it has no run\.json"):
        export.main(export.Args(run=steady["model"], step=2))
    with pytest.raises(UserError, match="give one of --step, --best and --every"):
        export.main(export.Args(run=run, step=2, every=2))


def test_damaged_changed_and_taken(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    shard = next((other / "checkpoints" / "step-000004").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="has another sha256 than its manifest says"):
        write(other, step=4, output_dir=tmp_path / "model")
    with pytest.raises(UserError, match="exists; give another directory"):
        write(run, step=4, output_dir=run)

    changed = tiny.make_model(tmp_path / "changed", seed=5)
    with pytest.raises(UserError, match="changed: has changed since the run"):
        write(run, step=2, output_dir=tmp_path / "model", model=str(changed))
    assert not (tmp_path / "model").exists()


def test_a_starting_model_that_has_moved(steady: dict, run: Path, tmp_path: Path) -> None:
    base = shutil.copytree(steady["model"], tmp_path / "base")
    write(run, step=6, output_dir=tmp_path / "model", model=str(base))
    assert_same_model(tmp_path / "model", run)
    with pytest.raises(UserError, match="nowhere: no such file or directory"):
        write(run, step=6, output_dir=tmp_path / "other", model=str(tmp_path / "nowhere"))


def test_a_checkpoint_is_no_model(run: Path, tmp_path: Path) -> None:
    """The message is the command that makes one of it, which works."""
    checkpoint = run / "checkpoints" / "step-000002"
    expected = f"is a checkpoint, not a model; write one by: python scripts/export.py {run} --step 2 --output-dir DIR"
    with pytest.raises(UserError, match=expected):
        load_tokenizer(str(checkpoint))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("config.json"))
    with pytest.raises(UserError, match="is a run that has not exported its model; .* --step 6"):
        load_tokenizer(str(unfinished))

    line = [*tiny.command("scripts/export.py", 1, {}), str(run), "--step", "3"]
    ended = subprocess.run(
        line, cwd=tiny.ROOT, env=tiny.environment(tmp_path / "cache"), capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr == f"export.py: --step 3: {run} has checkpoints of the steps 2, 4, 6\n"
