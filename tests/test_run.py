"""The output directory and how a run ends, by real processes."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from shared import UserError
from shared.batches import load_batches
from shared.distributed import Ranks
from shared.groups import Requires

FLUSHED = """
import torch
from shared.distributed import join_processes

join_processes("float32", None)
torch.set_num_threads({threads})
denormals = torch.full((2**22,), 1e-38) * 0.1
print(int(denormals.view(torch.int32).count_nonzero()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    tiny.make_model(path / "model", "llama", seed=4)
    tiny.make_rows(24, seed=20, k=2, path=path / "pairs.jsonl")
    tiny.make_rows(4, seed=20, k=4, path=path / "four.jsonl")
    return path


def run(folder: Path, out: Path, cache: Path | None = None, **changes: object) -> subprocess.CompletedProcess[str]:
    """Two steps of dpo over 24 pairs, to its end."""
    options: dict[str, Any] = {
        "model": folder / "model",
        "train_data": folder / "pairs.jsonl",
        "output_dir": out,
        "batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-4,
        **changes,
    }
    line = tiny.command("algos/dpo.py", 1, options)
    environment = tiny.environment(cache or Path(f"{out}.cache"))
    return subprocess.run(line, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=120)


def run_to_the_end(folder: Path, out: Path, cache: Path | None = None, **options: object) -> str:
    """What a run that must succeed prints."""
    ended = run(folder, out, cache, **options)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def refusal(folder: Path, out: Path, **options: object) -> str:
    """The last line on stderr of a run that must be refused."""
    ended = run(folder, out, **options)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def checkpoints(out: Path) -> list[str]:
    return [path.name for path in (out / "checkpoints").iterdir()]


def results(out: Path) -> tuple[str, bytes]:
    """The log and the weights."""
    log = (out / "metrics.jsonl").read_text()
    weights = (out / "model.safetensors").read_bytes()
    return log, weights


@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_zero_on_every_thread(threads: int) -> None:
    """A saturated loss's gradients would otherwise take a CPU many times as long."""
    line = [sys.executable, "-c", FLUSHED.format(threads=threads)]
    ended = subprocess.run(line, cwd=tiny.ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "0\n"


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("model", "nowhere", "model nowhere: cannot be loaded"),
        ("model", "./runs/nowhere", "model ./runs/nowhere: no such file or directory"),
        ("train_data", "nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("max_length", 100000, "--max-length 100000: the model has 512 positions"),
        ("beta", 0, "--beta 0.0: must be a finite number above 0"),
    ],
)
def test_a_users_mistake_is_one_line(folder: Path, tmp_path: Path, option: str, value: object, message: str) -> None:
    assert message in refusal(folder, tmp_path / "out", **{option: value})
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_rows_of_four_completions_where_pairs_are_needed(folder: Path, tmp_path: Path) -> None:
    message = refusal(folder, tmp_path / "out", train_data=folder / "four.jsonl", label_smoothing=0.1)
    assert "line 1: this run needs two completions, chosen and rejected" in message
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_reward_model_is_no_policy(folder: Path, tmp_path: Path) -> None:
    """With tied embeddings, all weights of a language model are there."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = tiny.make_model(tmp_path / "tied", "qwen2", seed=4)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    classifier.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "rm")
    assert "is a reward model" in refusal(folder, tmp_path / "out", model=tmp_path / "rm")


def test_a_warm_up_that_is_longer_than_the_run(folder: Path, tmp_path: Path) -> None:
    message = refusal(folder, tmp_path / "out", warmup_steps=3)
    assert message.endswith("--warmup-steps 3: the run has 2 steps")


def test_evaluation_rows_of_another_number_of_reward_models(tmp_path: Path) -> None:
    rows = tiny.make_rows(2, seed=1)
    sources = {}
    for name, scores in (("train_data", [[1, 2], [0, 1]]), ("eval_data", [[1], [0]])):
        scored = [{**row, "scores": scores} for row in rows]
        sources[name] = str(tiny.write_jsonl(tmp_path / f"{name}.jsonl", scored))
    lengths = {"max_length": 512, "max_prompt_length": None, "batch_size": 1, "micro_batch_tokens": 512}
    args = SimpleNamespace(**sources, **lengths, shuffle=False, output_dir=str(tmp_path), resume=False)
    ranks = Ranks(0, 1, torch.device("cpu"), torch.float32)
    config = tiny.make_config("llama", vocab=1000)
    with pytest.raises(UserError, match="eval_data.jsonl: 1 scores for each completion, the training rows have 2"):
        load_batches(args, ranks, tiny.make_tokenizer(), config, Requires("pair", scores=True))


# ---------------------------------------------------------------- what a run leaves


def test_what_a_run_leaves(folder: Path, tmp_path: Path) -> None:
    """Every file, as safetensors and JSON, and what is printed."""
    out = tmp_path / "out"
    printed = run_to_the_end(folder, out, save_every=1, keep=1, track=True)
    assert "rows 24, kept 24" in printed
    assert " | " in printed
    assert "step 2/2 | loss 0.6" in printed

    assert read_json(out / "status.json") == {"state": "done", "step": 2, "reason": ""}
    description = read_json(out / "run.json")
    assert description["args"]["batch_size"] == 8
    assert description["data"]["train"]["kept"] == 24
    assert description["steps"] == 2

    assert checkpoints(out) == ["step-000002"]
    endings = {path.suffix for path in (out / "checkpoints").rglob("*") if path.is_file()}
    assert endings == {".safetensors", ".json"}
    assert list((out / "events").iterdir())
    assert "trained by dpo" in (out / "README.md").read_text()


def test_a_finished_run_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    """It can be resumed to the same end, but not with other arguments or rows."""
    out = tmp_path / "out"
    options = {"save_every": 1, "keep": 1, "track": True}
    run_to_the_end(folder, out, **options)
    before = results(out)
    status = (out / "status.json").read_bytes()
    assert "holds another run" in refusal(folder, out)
    assert refusal(folder, out, resume=True, beta=0.2).endswith("another run: beta 0.1 → 0.2")
    assert "unless --lr-schedule is constant" in refusal(folder, out, resume=True, max_steps=3)

    rows = tiny.read_jsonl(folder / "pairs.jsonl")
    reversed_rows = tiny.write_jsonl(tmp_path / "reversed.jsonl", rows[::-1])
    assert refusal(folder, out, resume=True, train_data=reversed_rows).endswith("another run: the train rows")
    assert (out / "status.json").read_bytes() == status

    run_to_the_end(folder, out, resume=True)
    assert results(out) == before


def test_resume_compares_contents(folder: Path, tmp_path: Path) -> None:
    """The same rows and model under other names; held-out rows, which change no weights, may be added."""
    out = tmp_path / "out"
    run_to_the_end(folder, out, save_every=1, keep=1)
    before = (out / "model.safetensors").read_bytes()
    moved = {
        "model": shutil.copytree(folder / "model", tmp_path / "moved"),
        "train_data": shutil.copy(folder / "pairs.jsonl", tmp_path / "moved.jsonl"),
    }
    run_to_the_end(folder, out, resume=True, **moved, eval_data=folder / "pairs.jsonl")
    assert (out / "model.safetensors").read_bytes() == before


def test_held_out_rows_are_evaluated_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    """And not again when a run goes on after a step."""
    out = tmp_path / "out"
    options = {"eval_data": folder / "pairs.jsonl", "eval_every": 1, "save_every": 1, "lr_schedule": "constant"}
    printed = run_to_the_end(folder, out, max_steps=1, **options)
    assert "step 1/1 | loss 0.6" in printed
    assert "rewards/chosen 0 | rewards/rejected 0 |" in printed
    run_to_the_end(folder, out, resume=True, **options)

    evaluations = [line for line in tiny.read_jsonl(out / "metrics.jsonl") if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    assert evaluations[0]["eval/loss"] == pytest.approx(math.log(2))
    assert evaluations[0]["eval/rewards/margins"] == 0


def test_a_damaged_checkpoint_is_passed_over(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"save_every": 1, "max_steps": 3}
    run_to_the_end(folder, out, **options)
    log, weights = results(out)
    assert len(log.splitlines()) == 1

    (shard,) = (out / "checkpoints" / "step-000003").glob("rank-*")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)

    printed = run_to_the_end(folder, out, resume=True, **options)
    assert "sha256" in printed
    assert "resumed from" in printed
    _, resumed_weights = results(out)
    assert resumed_weights == weights


def test_the_reference_cache_follows_the_models_configuration(folder: Path, tmp_path: Path) -> None:
    """The same weights with other rotary frequencies are another model: step one is ln 2 all the same."""
    model = tiny.make_model(tmp_path / "model", "llama", seed=4)
    for base in (10000.0, 100.0):
        config = read_json(model / "config.json")
        config["rope_parameters"]["rope_theta"] = base
        (model / "config.json").write_text(json.dumps(config))
        out = tmp_path / f"out-{base}"
        run_to_the_end(folder, out, cache=tmp_path / "cache", model=model, max_steps=1, log_every=1)
        first_line = tiny.training_lines(out / "metrics.jsonl")[0]
        assert first_line["rewards/margins"] == 0


def test_a_policy_that_does_not_move_stays_at_the_reference(folder: Path, tmp_path: Path) -> None:
    """In another epoch the rows are packed otherwise, which may round otherwise; docs/reliability.md has the bound."""
    options = {"max_steps": 6, "learning_rate": 0, "dtype": "bfloat16", "log_every": 1}
    run_to_the_end(folder, tmp_path / "out", **options)
    lines = tiny.training_lines(tmp_path / "out" / "metrics.jsonl")
    assert lines[-1]["epoch"] == 2
    for values in lines:
        assert abs(values["rewards/margins"]) <= 1e-3
        assert values["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_activation_checkpointing_prints_no_warning(folder: Path, tmp_path: Path) -> None:
    ended = run(folder, tmp_path / "out", activation_checkpointing=True, max_steps=1)
    assert ended.returncode == 0
    assert ended.stderr == ""


def assert_commit(folder: Path, out: Path, commit: str | None) -> None:
    ended = run(folder, out, max_steps=1)
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert read_json(out / "run.json")["commit"] == commit


def test_the_commit_of_the_code(folder: Path, tmp_path: Path) -> None:
    shell = {"shell": True, "cwd": tiny.ROOT, "capture_output": True, "text": True}
    head = subprocess.run("git rev-parse HEAD", **shell).stdout.strip()
    assert_commit(folder, tmp_path / "out", head or None)  # this machine may have no git


def test_a_machine_without_git(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's commit is then unknown."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_commit(folder, tmp_path / "out", None)


# ---------------------------------------------------------------- how a run ends


def test_values_that_are_not_finite_end_with_exit_code_3(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run(folder, out, learning_rate=1e38, max_steps=5, save_every=1)
    assert ended.returncode == 3
    assert "step 2: loss" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert read_json(out / "status.json")["state"] == "not finite"
    assert checkpoints(out) == ["step-000001"]


def test_asked_to_stop_saves_and_resumes(folder: Path, tmp_path: Path) -> None:
    """SIGTERM: a checkpoint at the next step, exit code 75; resumed, the same bytes as without interruption."""
    out = tmp_path / "out"
    options = {
        "model": folder / "model",
        "train_data": folder / "pairs.jsonl",
        "batch_size": 8,
        "max_steps": 40,
        "log_every": 1,
    }
    process = tiny.start("algos/dpo.py", out, **options)
    wait_for_lines(process, out / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert read_json(out / "status.json")["state"] == "preempted"
    assert not (out / "model.safetensors").exists()

    tiny.run("algos/dpo.py", out, resume=True, **options)
    through = tmp_path / "through"
    tiny.run("algos/dpo.py", through, **options)
    assert (out / "model.safetensors").read_bytes() == (through / "model.safetensors").read_bytes()


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    """Wait until a file has so many lines, or the process has ended."""
    while process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
