"""scripts/benchmark.py: what a run reports, lengths, FLOPs, and that only contenders that train alike are compared."""

import copy
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import benchmark
import pytest
import torch
import worlds
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import shared.model
from shared import UserError
from shared.data import Needs, load
from shared.model import load_tokenizer

ROWS, BATCH = 7, 3


def make_spec(model: Path, rows: Path, **own: object) -> dict:
    """A contender's spec on a tiny model, as `run_all` makes it."""
    common = {"algorithm": "dpo", "batch_size": BATCH, "micro_batch_tokens": 128, "dtype": "float32"}
    common |= {"learning_rate": 1e-3, "model": str(model), "train_data": str(rows), "pass_size": 2}
    return common | own


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A tiny Llama with its rows."""
    folder = tmp_path_factory.mktemp("benchmark")
    worlds.make_rows(ROWS, seed=3, path=folder / "rows.jsonl")
    return make_spec(worlds.make_model(folder / "model"), folder / "rows.jsonl")


@pytest.fixture(scope="module")
def measured(spec: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A worker's run of the project's own dpo."""
    return benchmark.measure("ours", spec | {"contender": "ours"}, tmp_path_factory.mktemp("scratch"))


# ---------------------------------------------------------------- a run


def test_a_run_reports_every_step_and_its_time_and_memory(measured: dict) -> None:
    steps = math.ceil(ROWS / BATCH)
    assert len(measured["result"]) == len(measured["updates"]) == steps
    assert measured["result"][0][0] == pytest.approx(math.log(2), rel=1e-6)
    assert 0 < measured["updates"][0] and measured["updates"][-1] <= measured["seconds"]
    assert measured["updates"] == sorted(measured["updates"])
    assert 2**26 < measured["libraries"] < measured["memory"] < 2**33
    assert measured["threads"] >= 1 and measured["device"]


@pytest.mark.parametrize("tricks", range(len(benchmark.LADDER)))
def test_every_rung_adds_its_trick_and_trains_as_ours(
    tricks: int, spec: dict, measured: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fused = Counter(), set()

    def spy(name: str, original: Callable, *args: object) -> object:
        calls[name] += 1
        return original(*args)

    for name in ("load_generator", "load_policy", "token_logps"):
        monkeypatch.setattr(benchmark, name, partial(spy, name, getattr(benchmark, name)))
    monkeypatch.setattr(shared.model, "skip_unread", partial(spy, "skip_unread", shared.model.skip_unread))
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: fused.add(bool(optimizer.defaults["fused"])))
    try:
        found = benchmark.naive(spec | {"tricks": tricks})()
    finally:
        hook.remove()
    assert list(chain(*found)) == pytest.approx(list(chain(*measured["result"])), rel=1e-4)
    loaded = [(2, 0), (1, 0), (1, 0), (1, 0), (0, 1), (0, 1)]
    assert (calls["load_generator"], calls["load_policy"]) == loaded[tricks]
    assert calls["skip_unread"] == (tricks == 5)
    assert fused == {tricks >= 2}
    assert (calls["token_logps"] > 0) == (tricks == 3)


def test_another_learning_rate_does_not_agree(spec: dict, measured: dict) -> None:
    found = benchmark.naive(spec | {"tricks": 3, "learning_rate": 1.1e-3})()
    assert found[0] == pytest.approx(measured["result"][0], rel=1e-4)  # before the first update nothing tells
    with pytest.raises(UserError, match="^x: .* of step 2 .*not the same training"):
        benchmark.agree("x", {"result": found}, measured, benchmark.TOLERANCE["float32"])


@pytest.mark.parametrize("step, what", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("factor", [1.0003, math.nan])
def test_each_number_of_both_steps_is_compared(step: int, what: int, factor: float) -> None:
    wanted = [[0.7, 3.0], [0.6, 2.0], [0.5, 1.0]]
    found = copy.deepcopy(wanted)
    found[2] = [0.4, 0.9]
    benchmark.agree("x", {"result": found}, {"result": wanted}, 1e-4)
    found[step][what] *= factor
    with pytest.raises(UserError, match=f"{('loss', 'gradient norm')[what]} of step {step + 1}"):
        benchmark.agree("x", {"result": found}, {"result": wanted}, 1e-4)


def test_a_run_that_fails_is_named_with_its_reason(spec: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^ours: failed with exit code 1: .*no such directory"):
        benchmark.measure("ours", spec | {"contender": "ours", "model": "/no/where/at/all"}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("live, size", [(True, 3), (True, 1), (False, 3)])
def test_trl_trains_as_ours(live: bool, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setitem(benchmark.SHAPES, "cpu-8k", ((64, 32, 2, 4, 2, 64), False))
    args = benchmark.Args(max_rows=ROWS, batch_size=BATCH, profile="tldr")
    model, rows, _ = benchmark.prepare(args, tmp_path)
    spec = make_spec(model, rows, live=live, pass_size=size)
    found, wanted = (benchmark.measure(name, spec | {"contender": name}, tmp_path) for name in ("trl", "ours"))
    assert list(chain(*found["result"])) == pytest.approx(list(chain(*wanted["result"])), rel=1e-4)
    assert len(found["updates"]) == len(wanted["updates"])


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("profile", benchmark.PROFILES)
def test_lengths_are_the_profile_s(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.SHAPES, "cpu-8k", ((1000, 8, 1, 1, 1, 8), True))
    n = 400
    args = benchmark.Args(profile=profile, max_rows=n, algorithm="typo")
    model, path, lengths = benchmark.prepare(args, tmp_path)
    wanted = []
    for mean, sigma, most in benchmark.PROFILES[profile]:
        z = torch.special.ndtri((torch.arange(n, dtype=torch.double) + 0.5) / n)
        ideal = mean * torch.exp(sigma * z - sigma**2 / 2)
        assert ideal.mean() == pytest.approx(mean, rel=0.02)
        wanted.append(ideal.round().clamp(3, most).long())
    for i in range(4):  # prompt, chosen, rejected, sample
        assert torch.equal(lengths[:, i].sort()[0], wanted[min(i, 1)])
    assert len({tuple(column.tolist()) for column in lengths.T[1:]}) == 3  # each drawn apart
    # the same that training sees, one token per word, with a BOS or an EOS
    groups = load(str(path), load_tokenizer(str(model))[0], Needs(2, samples=True), benchmark.POSITIONS, None)
    assert torch.equal(groups.offsets.diff(dim=1), lengths)
    words = [len(row["prompt"].split()) + 1 for row in worlds.read_jsonl(path)]
    assert words == lengths[:, 0].tolist()
    assert groups.report["kept"] == n and "completions cut" not in groups.report


def test_real_rows_are_those_that_both_sides_encode_alike(tmp_path: Path) -> None:
    made = worlds.make_rows(60, seed=4, path=tmp_path / "rows.jsonl")
    tokenizer = worlds.make_tokenizer()
    args = benchmark.Args(rows=str(tmp_path / "rows.jsonl"))

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pairs = [(row["prompt"], row[name]) for row in made for name in ("chosen", "rejected")]
    alike = [ids(x + y) == ids(x) + ids(y) for x, y in pairs]
    wanted = [row for row, *both in zip(made, alike[::2], alike[1::2], strict=True) if all(both)]
    assert 0 < len(wanted) < len(made)
    found = [{name: row[name] for name in wanted[0]} for row in benchmark.real_rows(args, tokenizer)]
    assert found == wanted


# ---------------------------------------------------------------- numbers


def count_flops(lm, prompt: torch.Tensor, completions: list[torch.Tensor], head: bool) -> int:
    """What torch counts when every token is computed by itself, so that it meets no key that it may not see.

    Of the last layer's modules only keys and values are counted where its state is not read.
    """
    from transformers import DynamicCache

    last = f"{type(lm.base_model).__name__}.layers.{len(lm.base_model.layers) - 1}"
    total = 0

    def feed(cache: DynamicCache, ids: torch.Tensor, read: list[bool]) -> None:
        nonlocal total
        for t, is_read in enumerate(read):
            with FlopCounterMode(display=False) as counter:
                lm.base_model(ids[None, t : t + 1], past_key_values=cache)
            counts = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
            kept = sum(counts[f"{last}.self_attn.{name}"] for name in ("k_proj", "v_proj"))
            total += counts["Global"] - (0 if is_read else counts[last] - kept)

    with torch.no_grad():
        cache = DynamicCache()
        feed(cache, prompt, [False] * (len(prompt) - 1) + [head])
        for completion in completions:
            feed(copy.deepcopy(cache), completion, [head] * (len(completion) - 1) + [not head])
            with FlopCounterMode(display=False) as counter:
                lm.lm_head(torch.zeros(1, len(completion) if head else 0, lm.config.hidden_size))
            total += counter.get_total_flops()
    return total


@pytest.mark.parametrize("head", [True, False])
def test_flops_are_those_that_torch_counts(head: bool) -> None:
    from transformers import AutoModelForCausalLM

    config = worlds.make_config("llama", 50, num_key_value_heads=2, attn_implementation="eager")
    lm = AutoModelForCausalLM.from_config(config).eval()
    groups = [(5, [3, 7]), (9, [1, 4])]
    counted = 0
    for prompt, completions in groups:
        draw = [torch.randint(50, (length,)) for length in (prompt, *completions)]
        counted += count_flops(lm, draw[0], draw[1:], head)
    lengths = torch.tensor([[p, *cs] for p, cs in groups])
    assert benchmark.forward_flops(config, lengths, head) == counted


def test_numbers_of_a_contender() -> None:
    def run(seconds: float, updates: list[float], memory: int) -> dict:
        return {"seconds": seconds, "updates": updates, "memory": memory, "libraries": 4_000_000}

    base = [run(2.0, [0.5, 1.0, 1.5], 10_000_000), run(4.0, [1.0, 1.5, 2.0], 10_000_000)]
    runs = [run(6.0, [2.0, 3.0, 4.0], 20_000_000), run(20.0, [4.0, 7.0, 10.0], 30_000_000)]
    lengths = torch.tensor([[10, 1, 1], [20, 2, 2], [5, 3, 4], [6, 1, 2], [7, 1, 1]])
    found = benchmark.summarise(runs, base, 2, lengths, work=0.4)
    assert found == {
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
    monkeypatch.setitem(benchmark.SHAPES, "cpu-8k", ((64, 32, 2, 4, 2, 64), False))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    common = dict(max_rows=5, batch_size=2, output_dir=tmp_path / "results")
    benchmark.main(benchmark.Args(algorithm="exo", num_completions=4, repeats=1, **common))
    results = json.loads((tmp_path / "results" / "exo-4-hh-cpu-8k.json").read_text())
    table = (tmp_path / "results" / "exo-4-hh-cpu-8k.md").read_text()
    assert table in capsys.readouterr().out
    assert str(tmp_path) not in table + json.dumps(results)  # nothing of the machine's folders
    ours, (run,) = results["contenders"]["ours"], results["runs"]["ours"]
    assert len(run["result"]) == 3 and ours["seconds_ratio"]["median"] == 1
    lengths = results["rows"]["mean tokens of a prompt"], results["rows"]["of a completion"]
    assert lengths[0] + 4 * lengths[1] > 5 * 3
    later = run["updates"][-1] - run["updates"][0]
    assert ours["rows_per_second"] == pytest.approx(3 / later)
    assert ours["seconds_per_row"] == pytest.approx(run["seconds"] / 5)
    assert 0 < ours["mfu"] < 1
    assert f"| {ours['step']:.3f} |" in table and results["machine"]["device"] in table
    assert not list((tmp_path / "temporary").iterdir())  # model, rows and runs are gone


@pytest.mark.parametrize(
    "problem, options",
    {
        "--max-rows 8: must be more than": {"max_rows": 8, "batch_size": 8},
        "--repeats 0": {"repeats": 0},
        "--against trl: compares dpo on pairs": {"against": "trl", "algorithm": "sft"},
        "--against naive: compares dpo on pairs": {"against": "naive", "num_completions": 4},
        "--against-batch 5: must divide": {"against": "naive", "against_batch": (8, 5)},
        "--tokenizer x: is that of --rows": {"tokenizer": "x"},
        "--rows: gives pairs": {"rows": "x.jsonl", "algorithm": "typo"},
    }.items(),
)
def test_what_cannot_be_measured_is_refused(problem: str, options: dict) -> None:
    with pytest.raises(UserError, match=problem):
        benchmark.check(benchmark.Args(**options))


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    worlds.make_rows(10, seed=4, path=tmp_path / "rows.jsonl")
    args = benchmark.Args(rows=str(tmp_path / "rows.jsonl"), max_rows=11, batch_size=2)
    with pytest.raises(UserError, match="usable rows, fewer than --max-rows 11"):
        benchmark.prepare(args, tmp_path)
