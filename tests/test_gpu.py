"""The parts of scripts/gpu_check.py: on a GPU the real checks, without one their rehearsal at a small shape."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from scripts import gpu_check
from scripts.lab import gpu_parts, gpu_probes
from scripts.lab.commands import ROOT
from scripts.lab.contenders import OPTIONS
from scripts.lab.workload import PROFILES, SHAPES, Workload, prepare
from shared import UserError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
SHAPE = "cpu-1k"


def slow_on_a_cpu(test: Callable) -> Callable:
    """On a GPU every run of the tests includes this one."""
    if torch.cuda.is_available():
        return test
    return pytest.mark.slow(test)


Check = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the parts write: results, and in `temporary` models, rows and runs."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "temporary").mkdir()
    return folder


@pytest.fixture(scope="module")
def check(folder: Path) -> Check:
    """Run gpu_check.py with the accelerator that there is; returns its exit code and what it printed."""

    def run(*parts: str) -> tuple[int, str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OUT": str(folder / "results"),
            "TMPDIR": str(folder / "temporary"),
        }
        command = [sys.executable, "scripts/gpu_check.py", *parts]
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return process.returncode, process.stdout + process.stderr

    return run


# ---------------------------------------------------------------- probes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", gpu_probes.PROBES)
def test_a_probe(name: str, device: str) -> None:
    with gpu_probes.deterministic():
        assert gpu_probes.PROBES[name](torch.device(device))


def test_a_wrong_result_is_an_error() -> None:
    x = torch.ones(4)
    with pytest.raises(AssertionError, match="out: 1.00e-03 > 0.0001"):
        gpu_probes.require_close("out", x * 1.001, x, 1e-4)
    with pytest.raises(AssertionError, match="out: two runs differ"):
        gpu_probes.require_same_bits("out", [x], [x.nextafter(2 * x)])


def test_the_settings_of_the_process_are_restored() -> None:
    with gpu_probes.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


# ---------------------------------------------------------------- parts


@slow_on_a_cpu
def test_the_first_steps_are_those_of_float32(check: Check, folder: Path) -> None:
    exit_code, output = check(f"prepare:{SHAPE}", "train")
    assert exit_code == 0, output
    assert f"PASS prepare:{SHAPE}" in output
    assert "PASS train" in output
    expected = json.loads((folder / "results" / "expected.json").read_text())
    assert expected["shape"] == SHAPE
    assert len(expected["lines"]) == 4

    # a gradient that is 4% off is found
    expected["lines"][0]["grad_norm"] *= 1.04
    (folder / "results" / "expected.json").write_text(json.dumps(expected))
    exit_code, output = check("train")
    assert exit_code == 1
    assert "beyond their tolerance: grad_norm of step 1" in output


@slow_on_a_cpu
def test_a_killed_run_resumes_to_the_same_bits(check: Check) -> None:
    exit_code, output = check("resume")
    assert exit_code == 0, output
    assert "PASS resume" in output


@slow_on_a_cpu
def test_all_probes_in_a_process_of_their_own(check: Check) -> None:
    exit_code, output = check("probe")
    assert exit_code == 0, output
    for name in gpu_probes.PROBES:
        assert f"    PASS {name}: " in output


@slow_on_a_cpu
def test_a_contender_is_measured(check: Check) -> None:
    exit_code, output = check(f"bench:{SHAPE}:hh:8:2048:3:ours")
    assert exit_code == 0, output
    assert f"    {SHAPE} hh ours: step " in output


@slow_on_a_cpu
def test_a_step_is_profiled(check: Check, folder: Path) -> None:
    exit_code, output = check(f"profile:{SHAPE}:8:2048")
    assert exit_code == 0, output
    table = (folder / "results" / f"profile-{SHAPE}.txt").read_text()
    assert "aten::mm" in table
    assert (folder / "results" / f"trace-{SHAPE}.json.gz").stat().st_size > 0


ALGORITHMS = sorted(path.stem for path in (ROOT / "algos").glob("[a-z]*.py"))


@needs_gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_begins_as_on_a_cpu(algorithm: str, tmp_path: Path) -> None:
    """In bfloat16, against float32."""
    rows = Workload(shape=SHAPES[SHAPE], profile=PROFILES["tldr"], max_rows=16, algorithm="typo")
    made = prepare(rows, tmp_path)
    options = {"model": made.model, "train_data": made.rows, "batch_size": 8, "log_every": 1, "save_every": 0}
    options |= OPTIONS.get(algorithm, {})
    script = f"algos/{algorithm}.py"
    ours = tiny.run(script, tmp_path / "gpu", gpu=True, dtype="bfloat16", **options)
    expected = tiny.run(script, tmp_path / "cpu", **options)
    assert ours[0]["loss"] == pytest.approx(expected[0]["loss"], rel=2e-2)
    assert ours[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=5e-2)
    assert len(ours) == 2


def test_without_expected_numbers_train_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_parts, "KEPT_RESULTS", tmp_path)
    with pytest.raises(UserError, match="expected.json: is missing; run the part `prepare` first"):
        gpu_parts.read_expected()


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "part, problem",
    {
        "": "must be one of prepare, probe",
        "rose": "must be one of prepare, probe",
        "train:0.5b": "takes no options",
        "prepare:0.5c": "'0.5c' must be one of cpu-1k",
        "bench:0.5b:hh": "must be bench:SHAPE:PROFILE:BATCH:BUDGET:STEPS:NAMES",
        "bench:0.5b:hh:64:16384:5:ours,torch": "'torch' must be one of ours, ours-compiled, trl-2",
        "bench:0.5b:hg:64:16384:5:ours": "'hg' must be one of hh",
        "bench:0.5b:hh:64:16384:0:ours": "'0' must be a number above 0",
        "profile:0.5b:64": "must be profile, profile:SHAPE or",
    }.items(),
)
def test_a_part_that_does_not_exist_is_refused(part: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        gpu_check.main(gpu_check.Args(parts=(part,)))


def test_a_part_beyond_its_time_limit_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "time_limit", lambda part: 0.1)
    assert not gpu_check.run_part("probe")
