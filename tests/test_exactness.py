"""The command lines against a float64 loop that shares no code with them."""

import gc
import math
import shutil
import weakref
from pathlib import Path

import pytest
import reference
import streaming
import torch
import worlds
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import attention
from shared.data import Batches, Needs, load
from shared.model import Policy, add_reference_logps, load_policy, load_reward_model

STEPS, BATCH, BETA, RATE, DECAY, CLIP = 3, 4, 0.1, 1e-3, 0.1, 1.0
OPTIONS = dict(
    batch_size=BATCH,
    max_steps=STEPS,
    learning_rate=RATE,
    lr_schedule="constant",
    warmup_steps=0,
    weight_decay=DECAY,
    max_grad_norm=CLIP,
    max_length=512,
    max_prompt_length=256,
    dtype="float32",
    shuffle=False,
    log_every=1,
)
PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one, two and four completions."""
    path = tmp_path_factory.mktemp("exactness")
    for k in (1, 2, 4):
        worlds.make_rows(STEPS * BATCH, seed=10 + k, k=k, path=path / f"rows{k}.jsonl")
    return path


@pytest.fixture(scope="module", params=worlds.ARCHITECTURES)
def model(request: pytest.FixtureRequest, folder: Path) -> Path:
    """One tiny model per architecture; GPT-2's has no BOS and pads with its EOS, as the original does."""
    return make_model(folder, request.param)


def make_model(folder: Path, architecture: str) -> Path:
    """The model of one architecture, made once."""
    path = folder / architecture
    if not path.exists():
        worlds.make_model(path, architecture, seed=3, bos=architecture != "gpt2")
    return path


def compare(lines: list[dict], expected: list[dict], keys: tuple[str, ...] = ()) -> None:
    """Losses and gradient norms to 2e-6 at step one and 1e-4 after; the other metrics to rounding."""
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, wanted in zip(lines, expected, strict=True):
        tolerance = 2e-6 if line["step"] == 1 else 1e-4
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=tolerance), (line["step"], key)
        assert line["learning_rate"] == pytest.approx(wanted["learning_rate"], rel=1e-12)
        for key in keys:
            assert line[key] == pytest.approx(wanted[key], rel=tolerance, abs=1e-3), (line["step"], key)


def compare_models(output_dir: Path, trained: torch.nn.Module, rows: list[dict]) -> None:
    """What was saved loads with stock classes and gives the log-probs of the float64 loop's last weights."""
    saved = AutoModelForCausalLM.from_pretrained(output_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(output_dir / "model.safetensors").values())
    with torch.no_grad():
        for row in rows[:4]:
            group = reference.encode(tokenizer, row)
            for completion in group.completions:
                ours = reference.token_logps(saved, group.prompt, completion).double()
                theirs = reference.token_logps(trained, group.prompt, completion)
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def train_reference(model: Path, rows: list[dict], loss: reference.Loss, **options: object):  # noqa: ANN201
    """The float64 loop with this file's settings."""
    settings = dict(batch_size=BATCH, steps=STEPS, peak=RATE, weight_decay=DECAY, max_grad_norm=CLIP)
    return reference.train(model, rows, loss, **{**settings, **options})


def check(
    script: str, model: Path, data: Path, loss: reference.Loss, output_dir: Path, **options: object
) -> list[dict]:
    """One run against the float64 loop: metrics of each step and the model at the end."""
    rows = worlds.read_jsonl(data)
    lines = worlds.run(script, output_dir, model=model, train_data=data, **{**OPTIONS, **options})
    extra = {}
    if "lr_schedule" in options:
        extra = dict(schedule=options["lr_schedule"], warmup=options["warmup_steps"])
    expected, trained = train_reference(model, rows, loss, **extra)
    compare(lines, expected, PAIR_METRICS if script == "algos/dpo.py" else ())
    assert lines[0]["loss"] != lines[1]["loss"]
    compare_models(output_dir, trained, rows)
    return lines


def test_reference_agrees_with_the_models_own_loss(folder: Path) -> None:
    """The float64 loop's first SFT loss is what transformers makes of labels that hide the prompt."""
    path, rows = make_model(folder, "gpt_neox"), worlds.read_jsonl(folder / "rows1.jsonl")[:BATCH]
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    total, count = 0.0, 0
    for group in (reference.encode(tokenizer, row) for row in rows):
        (completion,) = group.completions
        assert completion[-1] == tokenizer.eos_token_id and group.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(group.prompt[1:]) == group.row["prompt"]
        assert tokenizer.decode(completion[:-1]) == group.row["completion"]
        ids = torch.tensor([group.prompt + completion])
        labels = torch.tensor([[-100] * len(group.prompt) + completion])
        total += float(model(input_ids=ids, labels=labels).loss.detach()) * len(completion)
        count += len(completion)
    history, _ = train_reference(path, rows, reference.sft(), steps=1)
    assert history[0]["loss"] == pytest.approx(total / count, rel=1e-6)


def test_sft(model: Path, folder: Path, tmp_path: Path) -> None:
    check("algos/sft.py", model, folder / "rows1.jsonl", reference.sft(), tmp_path / "out")


def test_dpo(model: Path, folder: Path, tmp_path: Path) -> None:
    loss = reference.dpo(BETA)
    lines = check("algos/dpo.py", model, folder / "rows2.jsonl", loss, tmp_path / "out", beta=BETA)
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert lines[0]["rewards/margins"] == 0 and lines[0]["rewards/accuracies"] == 0


def test_dpo_of_four_ranked_completions(folder: Path, tmp_path: Path) -> None:
    """Plackett–Luce, with a schedule and warm-up on the way."""
    model, loss = make_model(folder, "llama"), reference.dpo(BETA)
    options = dict(beta=BETA, lr_schedule="linear", warmup_steps=1)
    lines = check("algos/dpo.py", model, folder / "rows4.jsonl", loss, tmp_path / "out", **options)
    assert lines[0]["loss"] == pytest.approx(math.log(24), rel=1e-6)
    assert lines[0]["rewards/margins"] == 0


def test_dpo_with_label_smoothing(folder: Path, tmp_path: Path) -> None:
    model, loss = make_model(folder, "llama"), reference.dpo(BETA, label_smoothing=0.2)
    options = dict(beta=BETA, label_smoothing=0.2)
    lines = check("algos/dpo.py", model, folder / "rows2.jsonl", loss, tmp_path / "out", **options)
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_another_reference_and_evaluations(folder: Path, tmp_path: Path) -> None:
    """An optimizer made after a reference pass, and steps between evaluations, train as if there were none."""
    model, other = make_model(folder, "llama"), worlds.make_model(folder / "other", "llama", seed=8)
    held_out = folder / "held_out.jsonl"
    rows, held = worlds.read_jsonl(folder / "rows2.jsonl"), worlds.make_rows(6, seed=30, path=held_out)
    loss, options = reference.dpo(BETA), dict(beta=BETA, reference=other, eval_data=held_out, eval_every=1)
    data, out = folder / "rows2.jsonl", tmp_path / "out"
    lines = worlds.run("algos/dpo.py", out, model=model, train_data=data, **{**OPTIONS, **options})
    expected, trained = train_reference(model, rows, loss, reference_dir=other)
    compare(lines, expected, PAIR_METRICS)
    compare_models(out, trained, rows)

    evaluations = [line for line in worlds.read_jsonl(out / "metrics.jsonl") if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [1, 2, 3]
    wanted = reference.evaluate(model, other, trained, held, loss)
    for key in ("loss", *PAIR_METRICS):
        assert evaluations[-1][f"eval/{key}"] == pytest.approx(wanted[key], rel=1e-4, abs=1e-3), key


def test_activation_checkpointing_keeps_less_and_changes_nothing(folder: Path) -> None:
    """The same gradients to the bit, from fewer saved activations."""
    tokenizer, found = AutoTokenizer.from_pretrained(make_model(folder, "qwen3")), []
    groups = load(str(folder / "rows4.jsonl"), tokenizer, Needs(), 512, None)
    with streaming.alone("float32") as place:
        for checkpointing in (False, True):
            policy, kept = load_policy(str(folder / "qwen3"), place, checkpointing), []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: (kept.append(x.numel()), x)[1], lambda x: x
            ):
                loss = policy.logps(next(Batches(groups, BATCH, 1 << 20, None, place)(1))).sum()
            loss.backward()
            gradients = [p.grad for p in policy.parameters()]
            found.append((gradients, sum(kept)))
    (plain, much), (again, little) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert little < 0.7 * much


def test_the_last_layer_is_computed_where_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention, and no other layer's, is told to leave prompts out. Its MLP, queries and output projection see,
    of each group, the prompt's end and completions but for their ends, or for a reward model these ends; keys and
    values are those of all tokens."""
    path, told, plain = make_model(folder, "qwen3"), [], attention._per_segment
    monkeypatch.setattr(attention, "_per_segment", lambda *args: (told.append(args[-1]), plain(*args))[1])
    tokenizer = AutoTokenizer.from_pretrained(path)
    groups = load(str(folder / "rows4.jsonl"), tokenizer, Needs(), 512, None)
    with streaming.alone("float32") as place:
        batch = next(Batches(groups, BATCH, 1 << 20, None, place)(1))
        reward_model = load_reward_model(str(path), place, False, tokenizer, 0)
        completions = int(batch.lengths.sum()) - batch.lengths.numel()
        for model, read in ((load_policy(str(path), place), BATCH + completions), (reward_model, 4 * BATCH)):
            seen = {}
            for name, part in model.lm.base_model.layers[-1].named_modules():
                part.register_forward_hook(lambda m, args, y, seen=seen, name=name: seen.update({name: args}))
            told.clear()
            model(batch)
            assert told == [False] * (len(told) - 1) + [True] and len(told) == model.lm.config.num_hidden_layers
            rows = {name: args[0].shape[1] for name, args in seen.items() if name.endswith(("_proj", "mlp")) and args}
            parts = ("mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj")
            whole = ("self_attn.k_proj", "self_attn.v_proj")
            assert rows == dict.fromkeys(parts, read) | dict.fromkeys(whole, batch.input_ids.shape[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_do_not_change_with_their_file(folder: Path, tmp_path: Path, dtype: str) -> None:
    """What is read from a file may be a mapping of it, which another program's write would change."""
    path = Path(shutil.copytree(make_model(folder, "llama"), tmp_path / "model")) / "model.safetensors"
    with streaming.alone(dtype) as place:
        policy = load_policy(str(path.parent), place)
        local = [p.to_local() if hasattr(p, "to_local") else p for p in policy.parameters()]
        before = [p.detach().clone() for p in local]
        with open(path, "r+b") as file:  # in place, behind the header
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            file.write(bytes(path.stat().st_size - file.tell()))
        assert all(torch.equal(a, b) for a, b in zip(local, before, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_reference_is_gone_after_its_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Training holds one model; FSDP's cycles would keep the other until some garbage collection."""
    path, loaded, init = str(make_model(folder, "llama")), [], Policy.__init__
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Policy, "__init__", lambda self, lm: (init(self, lm), loaded.append(weakref.ref(self)))[0])
    groups = load(str(folder / "rows2.jsonl"), AutoTokenizer.from_pretrained(path), Needs(), 512, None)
    with streaming.alone(dtype) as place:
        policy = load_policy(path, place)
        other, batches = str(make_model(folder, "qwen2")), Batches(groups, BATCH, 1 << 20, None, place)
        gc.disable()
        try:
            add_reference_logps(other, policy, batches)
            assert [model() is None for model in loaded] == [False, True]
        finally:
            gc.enable()
