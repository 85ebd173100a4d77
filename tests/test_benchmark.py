"""scripts/benchmark.py: what a run reports, lengths, FLOPs, and that only contenders that train alike are compared."""

import copy
import dataclasses
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from scripts import benchmark
from scripts.lab import contenders, timing, workload
from scripts.lab.contenders import LADDER, PlainLoop, Spec
from scripts.lab.timing import Measurement
from scripts.lab.workload import PROFILES, Shape, Workload
from shared import UserError, last_layer
from shared.command import check_arguments
from shared.groups import Requires, load_groups
from shared.loading import load_tokenizer

ROWS = 7
BATCH_SIZE = 3
TINY_SHAPE = Shape(64, 32, 2, 4, 2, 64)


def make_spec(model: Path, rows: Path, **fields: Any) -> Spec:
    """The Spec of a contender on a tiny model."""
    return Spec(
        model=str(model),
        train_data=str(rows),
        batch_size=BATCH_SIZE,
        micro_batch_tokens=128,
        learning_rate=1e-3,
        **fields,
    )


def numbers_of(losses: list) -> list[float]:
    """Losses and gradient norms of all steps, one after another."""
    numbers = []
    for loss, grad_norm in losses:
        numbers += [loss, grad_norm]
    return numbers


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """A tiny Llama with its rows."""
    folder = tmp_path_factory.mktemp("benchmark")
    tiny.make_rows(ROWS, seed=3, path=folder / "rows.jsonl")
    return make_spec(tiny.make_model(folder / "model"), folder / "rows.jsonl")


@pytest.fixture(scope="module")
def measured(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """A process's run of the project's own dpo."""
    return timing.measure("ours", spec, tmp_path_factory.mktemp("scratch"))


# ---------------------------------------------------------------- a run


def test_a_run_reports_every_step_and_its_time_and_memory(measured: Measurement) -> None:
    steps = math.ceil(ROWS / BATCH_SIZE)
    assert len(measured.result) == steps
    assert len(measured.updates) == steps
    first_loss, _ = measured.result[0]
    assert first_loss == pytest.approx(math.log(2), rel=1e-6)
    assert 0 < measured.updates[0]
    assert measured.updates == sorted(measured.updates)
    assert measured.seconds == measured.updates[-1]
    assert 2**26 < measured.libraries < measured.memory < 2**33
    assert measured.threads >= 1
    assert measured.device


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often the plain loop calls what tells its rungs apart."""
    counts: Counter = Counter()

    def count(module: object, name: str) -> None:
        original: Callable = getattr(module, name)

        def counted(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, name, counted)

    for name in ("load_generator", "load_policy_from", "token_logps"):
        count(contenders, name)
    count(last_layer, "skip_prompt_queries")
    return counts


@pytest.mark.parametrize("tricks", range(len(LADDER)))
def test_every_rung_adds_its_trick_and_trains_as_ours(
    tricks: int, spec: Spec, measured: Measurement, calls: Counter
) -> None:
    is_fused = set()
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: is_fused.add(bool(optimizer.defaults["fused"])))
    try:
        losses = PlainLoop(dataclasses.replace(spec, pairs_per_pass=2, tricks=tricks)).train()
    finally:
        hook.remove()
    assert numbers_of(losses) == pytest.approx(numbers_of(measured.result), rel=1e-4)

    stock_models = [2, 1, 1, 1, 0, 0]
    assert calls["load_generator"] == stock_models[tricks]
    assert calls["load_policy_from"] == (tricks >= 4)
    assert is_fused == {tricks >= 2}
    assert (calls["token_logps"] > 0) == (tricks == 3)
    skipping_passes = calls["skip_prompt_queries"] - calls["load_policy_from"]  # loading checks one pass
    assert (skipping_passes > 0) == (tricks == 5)


def test_another_learning_rate_does_not_agree(spec: Spec, measured: Measurement) -> None:
    faster = dataclasses.replace(spec, pairs_per_pass=2, tricks=3, learning_rate=1.1e-3)
    losses = PlainLoop(faster).train()
    assert losses[0] == pytest.approx(measured.result[0], rel=1e-4)  # before the first update nothing tells
    problem = benchmark.disagreement(losses, measured.result, benchmark.TOLERANCE["float32"])
    assert problem is not None
    assert "of step 2 is" in problem


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("quantity", [0, 1])
@pytest.mark.parametrize("factor", [1.0003, math.nan])
def test_each_number_of_both_steps_is_compared(step: int, quantity: int, factor: float) -> None:
    expected = [[0.7, 3.0], [0.6, 2.0], [0.5, 1.0]]
    losses = copy.deepcopy(expected)
    losses[2] = [0.4, 0.9]
    assert benchmark.disagreement(losses, expected, 1e-4) is None

    losses[step][quantity] *= factor
    name = ("loss", "gradient norm")[quantity]
    problem = benchmark.disagreement(losses, expected, 1e-4)
    assert problem is not None
    assert problem.startswith(f"{name} of step {step + 1} is ")


def test_a_run_that_fails_is_named_with_its_reason(spec: Spec, tmp_path: Path) -> None:
    lost = dataclasses.replace(spec, model="/no/where/at/all")
    with pytest.raises(UserError, match="^ours: failed with exit code 1: .*no such file or directory"):
        timing.measure("ours", lost, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("live, size", [(True, 3), (True, 1), (False, 3)])
def test_trl_trains_as_ours(live: bool, size: int, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    made = workload.prepare(Workload(shape=TINY_SHAPE, max_rows=ROWS, profile=PROFILES["tldr"]), tmp_path)
    spec = make_spec(made.model, made.rows)
    trl = dataclasses.replace(spec, job="trl", live_reference=live, pairs_per_pass=size)
    measured = timing.measure("trl", trl, tmp_path)
    ours = timing.measure("ours", spec, tmp_path)
    assert numbers_of(measured.result) == pytest.approx(numbers_of(ours.result), rel=1e-4)
    assert len(measured.updates) == len(ours.updates)


# ---------------------------------------------------------------- the fastest pass


class Machine:
    """Stands in for `measure`: what a forward pass of so many pairs takes, or that memory does not suffice."""

    def __init__(self, seconds: dict[int | None, float], loss: float = 0.6, live_fits: bool = True):
        self.seconds = seconds
        self.live_fits = live_fits  # the reference beside the model
        self.loss = loss  # of step two

    def measure(self, name: str, spec: Spec, scratch: Path) -> Measurement:
        loss = 0.6
        seconds = 1.0
        if spec.job != "ours":
            loss = self.loss
            seconds = self.seconds[spec.pairs_per_pass]
        if spec.live_reference and not self.live_fits:
            seconds = math.inf
        if seconds == math.inf:
            raise UserError(f"{name}: failed with exit code 1: OutOfMemoryError: CUDA out of memory")
        losses = [[0.7, 3.0], [loss, 2.0]]
        return Measurement(losses, seconds, [0.5, seconds], 10**9, 10**8, 1, "a GPU", [])


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """`tune` of TRL on a machine."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")

    def tune(machine: Machine, **options: Any) -> tuple:
        monkeypatch.setattr(benchmark, "measure", machine.measure)
        args = benchmark.Args(against="trl", against_batch=(4, 8, 16), **options)
        return benchmark.tune(benchmark.make_contenders(args, tmp_path / "model", rows), args, tmp_path)

    return tune


def test_a_pass_that_fails_counts_as_infinitely_slow(tuned: Callable, capsys: pytest.CaptureFixture) -> None:
    fastest, tried = tuned(Machine({4: 3.0, 8: 2.0, 16: math.inf}))
    sizes = {}
    for name, specs in fastest.items():
        sizes[name] = [spec.pairs_per_pass for spec in specs]
    assert sizes == {"ours": [None], "TRL, reference live": [8, 4], "TRL, reference precomputed": [8, 4]}
    failed = tried["TRL, reference live, 16 pairs a pass"]
    assert failed == {
        "failed": "TRL, reference live, 16 pairs a pass: failed with exit code 1: OutOfMemoryError: CUDA out of memory"
    }
    assert "counts as infinitely slow: TRL, reference live, 16 pairs a pass: failed" in capsys.readouterr().out
    assert benchmark.attempt_text("x", failed) == "x failed"


def test_a_contender_that_never_fits_ends_the_comparison(tuned: Callable) -> None:
    with pytest.raises(UserError, match="^TRL, reference live, 4 pairs a pass: failed .*out of memory"):
        tuned(Machine({4: math.inf, 8: math.inf, 16: math.inf}))


def test_the_other_contenders_are_compared_if_one_never_fits(tuned: Callable) -> None:
    """TRL with a live reference holds two models."""
    fastest, _ = tuned(Machine({4: 3.0, 8: 2.0, 16: 4.0}, live_fits=False))
    assert fastest["TRL, reference live"] == []
    assert fastest["TRL, reference precomputed"][0].pairs_per_pass == 8


def test_a_pass_that_fails_in_a_round_makes_place_for_the_next(tuned: Callable, tmp_path: Path) -> None:
    """Later rows may be longer than those of the first two steps."""
    machine = Machine({4: 3.0, 8: 2.0, 16: 4.0})
    candidates, tried = tuned(machine)
    machine.seconds[8] = math.inf
    runs = benchmark.measure_rounds(candidates, 2, tried, tmp_path)
    assert [run.seconds for run in runs["TRL, reference precomputed"]] == [3.0, 3.0]
    assert [run.seconds for run in runs["ours"]] == [1.0, 1.0]
    assert "failed" in tried["TRL, reference precomputed, 8 pairs a pass"]

    machine.seconds = dict.fromkeys(machine.seconds, math.inf)
    assert list(benchmark.measure_rounds(candidates, 1, tried, tmp_path)) == ["ours"]


# of the shapes for GPUs: the parameters
PARAMETERS = {"0.5b": 494e6, "1.5b": 1544e6}
BYTES_OF_STATE = 18  # per parameter: float32 weights, gradients and two moments, and weights in bfloat16
CARD = 85e9  # an H100's 79.2 GiB
SHARE_OF_COMPILED = 0.67  # 1.5B: 69.9 GiB measured with passes of 22,700 tokens


def test_documented_commands_fit_a_card() -> None:
    """By arithmetic: activations that the backward pass needs are 26 hidden + 8 MLP values a token and layer.

    Compiled layers keep less, as measured: what lies between the products is computed again.
    """
    pages = [benchmark.__doc__ or "", (tiny.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")]
    text = re.sub(r"\\\n *", "", "\n".join(pages))
    commands = re.findall(r"bench:(1.5b|0.5b):\w+:\d+:(\d+):\d+:(\S+)", text)
    commands += re.findall(r"--shape (0.5b|1.5b) .*--micro-batch-tokens (\d+)(.*)", text)
    assert len(commands) >= 3
    for shape_name, tokens, options in commands:
        shape = workload.SHAPES[shape_name]
        per_token = shape.num_hidden_layers * (26 * shape.hidden_size + 8 * shape.intermediate_size)
        contenders = options.split(",")
        if all(name.startswith("trl") for name in contenders):
            continue  # whose passes have another size
        if "ours-compiled" in contenders and "ours" not in contenders:
            per_token *= SHARE_OF_COMPILED
        assert BYTES_OF_STATE * PARAMETERS[shape_name] + per_token * int(tokens) < 0.95 * CARD, (shape_name, tokens)


def test_a_disagreement_ends_the_comparison_in_float32_only(tuned: Callable, capsys: pytest.CaptureFixture) -> None:
    machine = Machine({4: 3.0, 8: 2.0, 16: 4.0}, loss=0.63)
    with pytest.raises(UserError, match="loss of step 2 is 0.63, ours 0.6: not the same training"):
        tuned(machine)

    fastest, tried = tuned(machine, dtype="bfloat16")
    assert fastest["TRL, reference live"][0].pairs_per_pass == 8
    attempt = tried["TRL, reference live, 8 pairs a pass"]
    assert attempt["disagreement"] == "loss of step 2 is 0.63, ours 0.6"
    assert "does not agree with ours: TRL, reference live, 8 pairs a pass: loss of step 2" in capsys.readouterr().out
    assert "(not as ours: loss of step 2 is 0.63" in benchmark.attempt_text("x", attempt)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("profile_name", PROFILES)
def test_lengths_are_the_profile_s(profile_name: str, tmp_path: Path) -> None:
    n = 400
    profile = PROFILES[profile_name]
    shape = Shape(1000, 8, 1, 1, 1, 8, tie_word_embeddings=True)
    made = workload.prepare(Workload(shape=shape, max_rows=n, profile=profile, algorithm="typo"), tmp_path)

    z = torch.special.ndtri((torch.arange(n, dtype=torch.double) + 0.5) / n)
    expected = []
    for mean, sigma, longest in profile:
        ideal = mean * torch.exp(sigma * z - sigma**2 / 2)
        assert ideal.mean() == pytest.approx(mean, rel=0.02)
        expected.append(ideal.round().clamp(3, longest).long())
    prompt, completion = expected
    for column, lengths in zip(made.lengths.T, (prompt, completion, completion, completion), strict=True):
        assert torch.equal(column.sort()[0], lengths)  # prompt, chosen, rejected, sample
    orders = {tuple(column.tolist()) for column in made.lengths.T[1:]}
    assert len(orders) == 3

    # the same that training sees, one token per word, with a BOS or an EOS
    tokenizer, _ = load_tokenizer(str(made.model))
    requires = Requires("pair", samples="required")
    groups = load_groups(str(made.rows), tokenizer, requires, workload.POSITIONS, None)
    assert torch.equal(groups.offsets.diff(dim=1), made.lengths)
    words = [len(row["prompt"].split()) + 1 for row in tiny.read_jsonl(made.rows)]
    assert words == made.lengths[:, 0].tolist()
    assert groups.report["kept"] == n
    assert not any("completions" in name for name in groups.report)  # none was truncated


def test_real_rows_are_those_that_both_sides_encode_alike(tmp_path: Path) -> None:
    rows = tiny.make_rows(60, seed=4, path=tmp_path / "rows.jsonl")
    tokenizer = tiny.make_tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def is_encoded_alike(row: dict) -> bool:
        for name in ("chosen", "rejected"):
            if encode(row["prompt"] + row[name]) != encode(row["prompt"]) + encode(row[name]):
                return False
        return True

    expected = [row for row in rows if is_encoded_alike(row)]
    assert 0 < len(expected) < len(rows)
    source = Workload(shape=TINY_SHAPE, max_rows=60, rows=str(tmp_path / "rows.jsonl"))
    usable = []
    for row in workload.real_rows(source, tokenizer):
        usable.append({name: row[name] for name in expected[0]})
    assert usable == expected


# ---------------------------------------------------------------- numbers


class TokenByToken:
    """Torch's count of the FLOPs when every token is computed by itself, so that it meets no key that it must not see.

    Of the last layer's modules only keys and values are counted where its state is not read.
    """

    def __init__(self, lm: Any):
        self.lm = lm
        self.last_layer = f"{type(lm.base_model).__name__}.layers.{len(lm.base_model.layers) - 1}"
        self.flops = 0

    def feed(self, cache: Any, ids: torch.Tensor, is_read: list[bool]) -> None:
        """Count a text that follows what is in the cache."""
        for t in range(len(ids)):
            with FlopCounterMode(display=False) as counter:
                self.lm.base_model(ids[None, t : t + 1], past_key_values=cache)
            counts = {}
            for name, operators in counter.get_flop_counts().items():
                counts[name] = sum(operators.values())
            self.flops += counts["Global"]
            # some versions of transformers multiply positions and frequencies as matrices
            self.flops -= counts.get(f"{type(self.lm.base_model).__name__}.rotary_emb", 0)
            if not is_read[t]:
                self.flops -= counts[self.last_layer]
                self.flops += counts[f"{self.last_layer}.self_attn.k_proj"]
                self.flops += counts[f"{self.last_layer}.self_attn.v_proj"]

    def apply_head(self, tokens: int) -> None:
        """Count the head at so many states."""
        with FlopCounterMode(display=False) as counter:
            self.lm.lm_head(torch.zeros(1, tokens, self.lm.config.hidden_size))
        self.flops += counter.get_total_flops()


@pytest.mark.parametrize("head", [True, False])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(head: bool) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache

    config = tiny.make_config("llama", 50, num_key_value_heads=2, attn_implementation="eager")
    lm = AutoModelForCausalLM.from_config(config).eval()
    counter = TokenByToken(lm)
    lengths = torch.tensor([[5, 3, 7], [9, 1, 4]])
    for prompt, *completions in lengths.tolist():
        cache = DynamicCache()
        counter.feed(cache, torch.randint(50, (prompt,)), [False] * (prompt - 1) + [head])
        for length in completions:
            is_read = [head] * (length - 1) + [not head]
            counter.feed(copy.deepcopy(cache), torch.randint(50, (length,)), is_read)
            if head:
                counter.apply_head(length)
    assert workload.forward_flops(config, lengths, head) == counter.flops


def test_numbers_of_a_contender() -> None:
    def run(seconds: float, updates: list[float], memory: int) -> Measurement:
        return Measurement([], seconds, updates, memory, 4_000_000, 1, "", [])

    ours = [run(2.0, [0.5, 1.0, 1.5], 10_000_000), run(4.0, [1.0, 1.5, 2.0], 10_000_000)]
    runs = [run(6.0, [2.0, 3.0, 4.0], 20_000_000), run(20.0, [4.0, 7.0, 10.0], 30_000_000)]
    lengths = torch.tensor([[10, 1, 1], [20, 2, 2], [5, 3, 4], [6, 1, 2], [7, 1, 1]])
    assert benchmark.summarise(runs, ours, 2, lengths, work=0.4) == {
        "seconds_per_row": 13 / 5,
        "first_update": 3.0,
        "step": 2.0,  # 2 s and 6 s for two steps each
        "rows_per_second": 3 / 4,
        "tokens_per_second": (12 + 9 + 9) / 4,
        "memory": 25.0,
        "libraries": 4.0,
        "mfu": 0.1,
        "seconds_ratio": {"median": 4.0, "least": 3.0, "most": 5.0},
        "memory_ratio": {"median": 2.5, "least": 2.0, "most": 3.0},
    }


# ---------------------------------------------------------------- command line


def test_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(benchmark.SHAPES, "cpu-8k", TINY_SHAPE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    output_dir = tmp_path / "results"
    args = benchmark.Args(
        algorithm="exo", num_completions=4, repeats=1, max_rows=5, batch_size=2, output_dir=output_dir
    )
    benchmark.main(args)

    results = json.loads((output_dir / "exo-4-hh-cpu-8k.json").read_text())
    table = (output_dir / "exo-4-hh-cpu-8k.md").read_text()
    assert table in capsys.readouterr().out
    assert str(tmp_path) not in table + json.dumps(results)  # nothing of the machine's folders
    (run,) = results["runs"]["ours"]
    assert len(run["result"]) == 3
    prompt_tokens = results["rows"]["mean tokens of a prompt"]
    completion_tokens = results["rows"]["of a completion"]
    assert prompt_tokens + 4 * completion_tokens > 5 * 3

    ours = results["contenders"]["ours"]
    assert ours["seconds_ratio"]["median"] == 1
    later_seconds = run["updates"][-1] - run["updates"][0]
    assert ours["rows_per_second"] == pytest.approx(3 / later_seconds)
    assert ours["seconds_per_row"] == pytest.approx(run["seconds"] / 5)
    assert 0 < ours["mfu"] < 1
    assert f"| {ours['step']:.3f} |" in table
    assert results["machine"]["device"] in table
    assert not list((tmp_path / "temporary").iterdir())  # model, rows and runs are gone


REFUSALS: dict[str, dict] = {
    "--max-rows 8: must be more than": {"max_rows": 8, "batch_size": 8},
    "--repeats 0": {"repeats": 0},
    "--against trl: compares dpo on pairs": {"against": "trl", "algorithm": "sft"},
    "--against naive: compares dpo on pairs": {"against": "naive", "num_completions": 4},
    "--against-batch 5: must divide": {"against": "naive", "against_batch": (8, 5)},
    "--tokenizer x: is that of --rows": {"tokenizer": "x"},
    "--rows: gives pairs": {"rows": "x.jsonl", "algorithm": "typo"},
}


@pytest.mark.parametrize("problem, options", REFUSALS.items())
def test_what_cannot_be_measured_is_refused(problem: str, options: dict) -> None:
    args = benchmark.Args(**options)
    with pytest.raises(UserError, match=problem):
        check_arguments(args)
        benchmark.require_measurable(args)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    tiny.make_rows(10, seed=4, path=tmp_path / "rows.jsonl")
    source = Workload(shape=benchmark.SHAPES["cpu-8k"], max_rows=11, rows=str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="usable rows, fewer than --max-rows 11"):
        workload.prepare(source, tmp_path)
