"""The command line, the output directory and how a run ends, by real processes."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import worlds

from algos import dpo, sft
from shared import UserError
from shared.run import check_arguments, learning_rate, parse

REQUIRED = ["--model", "m", "--train-data", "d", "--output-dir", "o"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    worlds.make_model(path / "model", "llama", seed=4)
    worlds.make_rows(24, seed=20, k=2, path=path / "pairs.jsonl")
    worlds.make_rows(4, seed=20, k=4, path=path / "four.jsonl")
    return path


def arguments(monkeypatch: pytest.MonkeyPatch, *words: str, of: type = dpo.Args):  # noqa: ANN201
    monkeypatch.setattr(sys, "argv", ["dpo.py", *words])
    return parse(of, "Title.\n\nMore.")


def test_arguments_as_users_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(monkeypatch, *REQUIRED, "--lr", "1e-4", "--batch_size", "8", "--no-shuffle", "--max-steps=3")
    assert (args.learning_rate, args.batch_size, args.shuffle, args.max_steps) == (1e-4, 8, False, 3)
    assert arguments(monkeypatch, *REQUIRED, "--learning-rate", "2").learning_rate == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_zero_on_every_thread(threads: int) -> None:
    """A saturated loss's gradients would otherwise take a CPU many times as long."""
    code = "import torch; from shared.distributed import setup; setup('float32', None); "
    code += f"torch.set_num_threads({threads}); x = torch.full((2**22,), 1e-38) * 0.1; "
    code += "print(int(x.view(torch.int32).count_nonzero()))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


@pytest.mark.parametrize(
    "words, shown",
    [
        (["--bet", "0.5"], "--bet"),
        (["--beta", "abc"], "abc"),
        (["--lr-schedule", "cubic"], "constant"),
        (["--nothing"], "--nothing"),
    ],
)
def test_unknown_words_end_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], shown: str
) -> None:
    with pytest.raises(SystemExit) as end:
        arguments(monkeypatch, *REQUIRED, *words)
    assert end.value.code == 2 and shown in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["beta", "learning_rate", "batch_size", "micro_batch_tokens", "epochs", "max_grad_norm"]
)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: must be a finite number"):
        check_arguments(SimpleNamespace(**{name: value}))


@pytest.mark.parametrize("name, value", [("beta", 0), ("label_smoothing", 2), ("max_steps", 0), ("max_length", 0)])
def test_other_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UserError):
        check_arguments(SimpleNamespace(**{name: value}))


def test_config_replays_and_flags_override(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = arguments(monkeypatch, *REQUIRED, "--beta", "0.3", "--lr", "1e-6")
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"args": dataclasses.asdict(before), "steps": 1}))
    again = arguments(monkeypatch, "--config", str(path), "--beta", "0.4")
    assert again == dataclasses.replace(before, beta=0.4)
    with pytest.raises(UserError, match="not a run.json of this algorithm"):
        arguments(monkeypatch, "--config", str(path), of=sft.Args)


@pytest.mark.parametrize("schedule, shape", [("constant", lambda x: 1), ("linear", lambda x: 1 - x)])
def test_learning_rate(schedule: str, shape) -> None:  # noqa: ANN001
    """Step s of warm-up has s/W of the rate; behind it the rate falls from all of it to 0 just after the last step."""
    args = SimpleNamespace(learning_rate=2.0, warmup_steps=4, lr_schedule=schedule)
    rates = [learning_rate(step, 12, args) for step in range(1, 14)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([2.0 * shape(i / 8) for i in range(9)])
    args = SimpleNamespace(learning_rate=2.0, warmup_steps=0, lr_schedule="cosine")
    cosine = [learning_rate(step, 4, args) for step in range(1, 6)]
    assert cosine == pytest.approx([1 + math.cos(math.pi * i / 4) for i in range(5)])


def run(folder: Path, out: Path, **options: object) -> subprocess.CompletedProcess[str]:
    options = {"model": folder / "model", "train_data": folder / "pairs.jsonl", "output_dir": out, **options}
    line = worlds.command("algos/dpo.py", 1, {"batch_size": 8, "max_steps": 2, "learning_rate": 1e-4, **options})
    environment = worlds.environment(Path(f"{out}.cache"))
    return subprocess.run(line, cwd=worlds.ROOT, env=environment, capture_output=True, text=True, timeout=120)


MISTAKES = [
    (dict(model="nowhere"), "model nowhere: cannot be loaded"),
    (dict(model="./runs/nowhere"), "model ./runs/nowhere: no such directory"),
    (dict(train_data="nowhere.jsonl"), "nowhere.jsonl: neither a file"),
    (dict(max_length=100000), "--max-length 100000: the model has 512 positions"),
    (dict(beta=0), "--beta 0.0: must be a finite number above 0"),
    (dict(train_data="four.jsonl", label_smoothing=0.1), "line 1: this run needs two completions, chosen and rejected"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", MISTAKES, ids=lambda value: str(value)[:40])
def test_a_users_mistake_is_one_line(folder: Path, tmp_path: Path, options: dict, message: str) -> None:
    if options.get("train_data") == "four.jsonl":
        options = {**options, "train_data": folder / "four.jsonl"}
    ended = run(folder, tmp_path / "out", **options)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert message in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_sliding_window_is_refused_where_it_would_matter(folder: Path, tmp_path: Path) -> None:
    """Packed rows show a token all that comes before it; a window shorter than a row would not."""
    model = worlds.make_model(tmp_path / "model", "mistral", seed=4, sliding_window=24)
    ended = run(folder, tmp_path / "out", model=model)
    assert ended.returncode == 2
    assert all(words in ended.stderr.splitlines()[-1] for words in ("beyond 24 tokens", "--max-length"))
    assert run(folder, tmp_path / "short", model=model, max_length=24).returncode == 0


def test_what_a_run_leaves(folder: Path, tmp_path: Path) -> None:
    """The files, a second run refused, and a finished run resumed to the same end; files are safetensors and JSON."""
    out = tmp_path / "out"
    ended = run(folder, out, save_every=1, keep=1, track=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((out / "status.json").read_text()) == {"state": "done", "step": 2, "reason": ""}
    written = json.loads((out / "run.json").read_text())
    assert written["args"]["batch_size"] == 8 and written["data"]["train"]["kept"] == 24 and written["steps"] == 2
    assert "rows 24, kept 24" in ended.stdout and " | " in ended.stdout and "step 2/2 | loss 0.6" in ended.stdout
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000002"]
    endings = {p.suffix for p in (out / "checkpoints").rglob("*") if p.is_file()}
    assert endings == {".safetensors", ".json"} and list((out / "events").iterdir())
    assert "trained by dpo" in (out / "README.md").read_text()

    refused = run(folder, out)
    assert refused.returncode == 2 and "holds another run" in refused.stderr
    before = (out / "metrics.jsonl").read_text(), (out / "model.safetensors").read_bytes()
    assert run(folder, out, resume=True, beta=0.2).stderr.splitlines()[-1].endswith("another run: beta 0.1 → 0.2")
    rows = tmp_path / "edited.jsonl"
    worlds.write_jsonl(rows, worlds.read_jsonl(folder / "pairs.jsonl")[::-1])
    assert run(folder, out, resume=True, train_data=rows).stderr.splitlines()[-1].endswith(", the train rows")
    assert run(folder, out, resume=True).returncode == 0
    assert before == ((out / "metrics.jsonl").read_text(), (out / "model.safetensors").read_bytes())


def test_a_damaged_checkpoint_is_passed_over(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(folder, out, save_every=1, max_steps=3).returncode == 0
    metrics, model = (out / "metrics.jsonl").read_text(), (out / "model.safetensors").read_bytes()
    damaged = next((out / "checkpoints" / "step-000003").glob("rank-*"))
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    ended = run(folder, out, save_every=1, max_steps=3, resume=True)
    assert ended.returncode == 0 and "sha256" in ended.stdout and "resumed from" in ended.stdout
    assert model == (out / "model.safetensors").read_bytes() and len(metrics.splitlines()) == 1


def test_the_reference_cache_follows_the_models_configuration(folder: Path, tmp_path: Path) -> None:
    """The same weights with other rotary frequencies are another model: step one is ln 2 all the same."""
    model = worlds.make_model(tmp_path / "model", "llama", seed=4)
    for base in (10000.0, 100.0):
        config = json.loads((model / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = base
        (model / "config.json").write_text(json.dumps(config))
        out = tmp_path / f"out-{base}"
        options = {"batch_size": 8, "max_steps": 1, "log_every": 1, "output_dir": out, "model": model}
        line = worlds.command("algos/dpo.py", 1, {**options, "train_data": folder / "pairs.jsonl"})
        environment = worlds.environment(tmp_path / "one cache")
        subprocess.run(line, cwd=worlds.ROOT, env=environment, check=True, capture_output=True, timeout=120)
        assert worlds.training_lines(out / "metrics.jsonl")[0]["rewards/margins"] == 0


def test_a_machine_without_git(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's commit is then unknown; with it, it is that of the code."""
    shell = {"shell": True, "cwd": worlds.ROOT, "capture_output": True, "text": True}
    head = subprocess.run("git rev-parse HEAD", **shell).stdout.strip() or None  # this machine may have none either
    for path, commit in (("with", head), ("without", None)):
        if path == "without":
            monkeypatch.setenv("PATH", str(tmp_path))
        ended = run(folder, tmp_path / path, max_steps=1)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert json.loads((tmp_path / path / "run.json").read_text())["commit"] == commit


def test_values_that_are_not_finite_end_with_exit_code_3(folder: Path, tmp_path: Path) -> None:
    ended = run(folder, tmp_path / "out", learning_rate=1e38, max_steps=5, save_every=1)
    assert ended.returncode == 3 and "step 2: loss" in ended.stderr and "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "not finite"
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-000001"]


def test_asked_to_stop_saves_and_resumes(folder: Path, tmp_path: Path) -> None:
    """SIGTERM: a checkpoint at the next step, exit code 75; resumed, the same bytes as without interruption."""
    options = dict(model=folder / "model", train_data=folder / "pairs.jsonl", batch_size=8, max_steps=40, log_every=1)
    worlds.run("algos/dpo.py", tmp_path / "through", **options)
    process = worlds.start("algos/dpo.py", tmp_path / "out", **options)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "preempted"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    worlds.run("algos/dpo.py", tmp_path / "out", resume=True, **options)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("through", "out")]
    assert weights[0] == weights[1]
