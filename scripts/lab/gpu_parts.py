"""The parts of gpu_check.py, each for a process of its own.

python -m scripts.lab.gpu_parts PART
"""

import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.lab import gpu_probes
from scripts.lab.commands import ROOT
from scripts.lab.contenders import Spec, load_algorithm
from scripts.lab.timing import measure
from scripts.lab.workload import (
    PROFILES,
    SHAPES,
    Prepared,
    Shape,
    Workload,
    encoded_lengths,
    forward_flops,
    llama_config,
    make_tokenizer,
    random_rows,
    write_rows,
)
from shared import UserError
from shared.files import write_json, write_text
from shared.loading import load_tokenizer

KEPT_RESULTS = ROOT / "runs" / "gpu"
RESULTS = Path(os.environ.get("OUT", KEPT_RESULTS))
SCRATCH = Path(tempfile.gettempdir()) / "gpu_check"  # models and rows are made there once
EXPECTED = "expected.json"

PEAK_FLOPS = {"cuda": 790e12, "cpu": 300e9}  # per second, of a large matrix product

# of a contender: what differs from the Spec of all
CONTENDERS: dict[str, dict[str, Any]] = {
    "ours": {"job": "ours"},
    "ours-compiled": {"job": "ours", "options": {"compile": True}},
    **{f"trl-{n}": {"job": "trl", "pairs_per_pass": n} for n in (2, 4, 8, 16, 32)},
    **{f"trl-{n}-liger": {"job": "trl", "pairs_per_pass": n, "liger": True} for n in (2, 4, 8, 16, 32)},
}


def device() -> torch.device:
    """The GPU, or for a rehearsal the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("cpu")


def fastest_dtype() -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    if torch.cuda.is_available():
        return "bfloat16"
    return "float32"


# ---------------------------------------------------------------- model and rows


def make_workload(shape_name: str, num_rows: int, profile_name: str) -> Prepared:
    """A model of this shape and rows with lengths of this profile, the same on every machine."""
    workload = Workload(shape=SHAPES[shape_name], profile=PROFILES[profile_name], max_rows=num_rows)
    tokenizer = make_tokenizer(workload)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    model = SCRATCH / f"model-{shape_name}"
    if not model.exists():
        make_exact_model(model, workload.shape, tokenizer)
    rows = SCRATCH / f"{profile_name}-{shape_name}-{num_rows}.jsonl"
    write_rows(rows, random_rows(workload))
    return Prepared(model, rows, encoded_lengths(rows, tokenizer, "dpo"))


def make_exact_model(path: Path, shape: Shape, tokenizer: Any) -> None:
    """Write a model whose weights bfloat16 holds exactly, and which every version of the libraries draws alike."""
    from transformers import LlamaForCausalLM, logging

    logging.disable_progress_bar()
    with torch.device("meta"):
        lm = LlamaForCausalLM(llama_config(shape, tokenizer))
    lm = lm.to(torch.bfloat16).to_empty(device="cpu")
    lm.tie_weights()
    for name, parameter in lm.named_parameters():
        if parameter.dim() == 1:  # of a norm
            parameter.data = torch.ones_like(parameter)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.data = values.bfloat16()
    lm.tie_weights()

    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        lm.save_pretrained(f"{temporary}/model")
        tokenizer.save_pretrained(f"{temporary}/model")
        os.rename(f"{temporary}/model", path)


# ---------------------------------------------------------------- runs of dpo


def dpo_command(output_dir: Path, options: dict[str, Any]) -> list[str]:
    """The command line of a run in the file's order."""
    command = [sys.executable, str(ROOT / "algos" / "dpo.py"), "--output-dir", str(output_dir)]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            if not value:
                flag = "--no-" + name.replace("_", "-")
            command.append(flag)
        else:
            command += [flag, str(value)]
    return command


def environment(**variables: str) -> dict[str, str]:
    """The environment of a run: this repository first, no hub, a cache beside the models."""
    paths = [str(ROOT)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "XDG_CACHE_HOME": str(SCRATCH / "cache"),
        **variables,
    }


def empty_output(name: str) -> Path:
    """An output directory that does not exist yet."""
    path = SCRATCH / name
    shutil.rmtree(path, ignore_errors=True)
    return path


def first_steps(shape_name: str, dtype: str, micro_batch_tokens: int) -> dict[str, Any]:
    """The options of a run of four steps."""
    model, rows, _ = make_workload(shape_name, 32, "hh")
    return {
        "model": model,
        "train_data": rows,
        "dtype": dtype,
        "micro_batch_tokens": micro_batch_tokens,
        "batch_size": 8,
        "lr": 1e-5,
        "lr_schedule": "constant",
        "max_steps": 4,
        "log_every": 1,
        "save_every": 0,
        "eval_every": 0,
        "shuffle": False,
    }


def read_log(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what the clock says."""
    lines = []
    for text in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        del line["seconds"], line["tokens_per_second"]
        lines.append(line)
    return lines


# ---------------------------------------------------------------- the parts


def prepare(shape_name: str = "0.5b") -> None:
    """Write expected.json: the first steps of dpo on the CPU, in float32."""
    output_dir = empty_output("expected")
    command = dpo_command(output_dir, first_steps(shape_name, "float32", 2048))
    subprocess.run(command, check=True, env=environment(CUDA_VISIBLE_DEVICES=""))
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / EXPECTED, {"shape": shape_name, "lines": read_log(output_dir)})


def read_expected() -> dict:
    """What `prepare` wrote, on this machine or on another from where it was carried along."""
    for directory in (RESULTS, KEPT_RESULTS):
        if (directory / EXPECTED).exists():
            return json.loads((directory / EXPECTED).read_text(encoding="utf-8"))
    raise UserError(f"{KEPT_RESULTS / EXPECTED}: is missing; run the part `prepare` first, on a CPU")


def train() -> None:
    """dpo in bfloat16, compared with expected.json."""
    expected = read_expected()
    output_dir = empty_output("train")
    command = dpo_command(output_dir, first_steps(expected["shape"], "bfloat16", 16384))
    subprocess.run(command, check=True, env=environment())

    problems = []
    for line, wanted in zip(read_log(output_dir), expected["lines"], strict=True):
        numbers = []
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins"):
            numbers.append(f"{name} {line[name]:.6g} ({wanted[name]:.6g})")
        print(f"    {line['step']} {' '.join(numbers)}")
        problems += numbers_beyond_tolerance(line, wanted)
    assert not problems, f"beyond their tolerance: {', '.join(problems)}"


def numbers_beyond_tolerance(line: dict, wanted: dict) -> list[str]:
    """The names of the numbers of a step that rounding does not explain.

    At the first step the loss is log 2 exactly, the gradient norm agrees to 3e-2 and log-probs to 2e-3, relative.
    Later rounding has also changed the weights: the loss agrees to 0.05, and the gradient norm to 0.15, relative.
    """
    is_first = line["step"] == 1
    loss_tolerance = 0.05
    relative_tolerances = {"grad_norm": 0.15}
    if is_first:
        loss_tolerance = 1e-6
        relative_tolerances = {"grad_norm": 3e-2, "logps/chosen": 2e-3, "logps/rejected": 2e-3}

    names = []
    if not abs(line["loss"] - wanted["loss"]) <= loss_tolerance:
        names.append(f"loss of step {line['step']}")
    for name, tolerance in relative_tolerances.items():
        if not abs(line[name] / wanted[name] - 1) <= tolerance:
            names.append(f"{name} of step {line['step']}")
    return names


def resume() -> None:
    """Two runs at once: one goes through; one is killed at its first checkpoint and resumed. Both end the same."""
    shape_name = "cpu-1k"
    if torch.cuda.is_available():
        shape_name = "cpu-8k"
    model, rows, _ = make_workload(shape_name, 96, "hh")
    options = {
        "model": model,
        "train_data": rows,
        "dtype": fastest_dtype(),
        "micro_batch_tokens": 2048,
        "batch_size": 16,
        "max_steps": 6,
        "log_every": 1,
        "save_every": 3,
        "lr": 1e-4,
    }
    whole = empty_output("whole")
    broken = empty_output("broken")
    start: dict[str, Any] = {"env": environment(), "stdout": subprocess.DEVNULL}
    whole_run = subprocess.Popen(dpo_command(whole, options), **start)
    broken_run = subprocess.Popen(dpo_command(broken, options), **start)
    checkpoint = broken / "checkpoints" / "step-000003"
    while not checkpoint.exists() and broken_run.poll() is None:
        time.sleep(0.001)
    broken_run.send_signal(signal.SIGKILL)
    assert broken_run.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert whole_run.wait() == 0

    subprocess.run(dpo_command(broken, {**options, "resume": True}), check=True, **start)
    assert read_log(whole) == read_log(broken), "metrics differ"
    weights = (whole / "model.safetensors").read_bytes()
    assert weights == (broken / "model.safetensors").read_bytes(), "weights differ"


def probe() -> None:
    """All of `gpu_probes`, each as a line."""
    print("   ", gpu_probes.rates(device()), flush=True)
    failed = []
    with gpu_probes.deterministic():
        for name, run in gpu_probes.PROBES.items():
            error = error_of(name, run)
            if error is not None:
                failed.append(name)
            if "CUDA error" in str(error):  # every later call would fail too
                break
    assert not failed, f"failed: {', '.join(failed)}"


def error_of(name: str, run: gpu_probes.Probe) -> Exception | None:
    """Run a probe and print what became of it; returns its error, if any."""
    try:
        print(f"    PASS {name}: {run(device())}", flush=True)
        return None
    except Exception as error:
        print(f"    FAIL {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        traceback.print_exc()
        return error


def bench(shape_name: str, profile_name: str, batch_size: str, budget: str, steps: str, names: str) -> None:
    """Time, memory and MFU of each contender, one line each."""
    pairs = int(batch_size)
    model, rows, lengths = make_workload(shape_name, pairs * int(steps), profile_name)
    common = Spec(
        model=str(model),
        train_data=str(rows),
        batch_size=pairs,
        micro_batch_tokens=int(budget),
        learning_rate=1e-6,
        dtype=fastest_dtype(),
    )
    _, config = load_tokenizer(str(model))
    later_flops = 3 * forward_flops(config, lengths[pairs:])

    for name in names.split(","):
        spec = dataclasses.replace(common, **CONTENDERS[name])
        started = time.perf_counter()
        try:
            run = measure(name, spec, SCRATCH)
        except UserError as error:
            print(f"    {shape_name} {profile_name} FAILED {error}", flush=True)
            continue
        gaps = [end - start for start, end in zip(run.updates, run.updates[1:], strict=False)]
        step_seconds = statistics.median_high(gaps)
        mfu = later_flops / sum(gaps) / PEAK_FLOPS[device().type]
        print(
            f"    {shape_name} {profile_name} {name}: step {step_seconds:.3f} s, {pairs / step_seconds:.1f} pairs/s, "
            f"MFU {mfu:.1%}, memory {run.memory / 2**30:.1f} GiB, first update {run.updates[0]:.1f} s, "
            f"in all {time.perf_counter() - started:.0f} s; {run.result[:3]}",
            flush=True,
        )


def profile(shape_name: str = "0.5b", batch_size: str = "64", budget: str = "16384") -> None:
    """The fourth step of dpo under the profiler: its kernels by time, and a trace."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.profiler import ProfilerActivity, schedule
    from torch.profiler import profile as torch_profile

    model, rows, _ = make_workload(shape_name, 4 * int(batch_size), "hh")
    spec = Spec(
        model=str(model),
        train_data=str(rows),
        output_dir=str(empty_output("profile")),
        batch_size=int(batch_size),
        micro_batch_tokens=int(budget),
        learning_rate=1e-6,
        dtype=fastest_dtype(),
    )
    module, args = load_algorithm(spec)
    activities = [ProfilerActivity.CPU]
    sort_key = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        sort_key = "self_cuda_time_total"
    steps = schedule(wait=2, warmup=1, active=1)
    with torch_profile(activities=activities, schedule=steps, acc_events=True) as profiler:
        register_optimizer_step_post_hook(lambda *_: profiler.step())
        module.main(args)

    table = profiler.key_averages().table(sort_by=sort_key, row_limit=45, max_name_column_width=90)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS / f"profile-{shape_name}.txt", table)
    profiler.export_chrome_trace(str(RESULTS / f"trace-{shape_name}.json.gz"))
    for line in table.splitlines()[:34]:
        print(f"    {line[:60]} {line[-110:]}")


PARTS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "probe": probe,
    "train": train,
    "resume": resume,
    "bench": bench,
    "profile": profile,
}


if __name__ == "__main__":
    part, *options = sys.argv[1].split(":")
    PARTS[part](*options)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort an ordinary interpreter exit
