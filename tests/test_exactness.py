"""The command lines of SFT and DPO against a float64 loop that shares no code with them, and what a run holds."""

import gc
import json
import math
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import reference
import tiny
import torch
from exactness import (
    check_first_loss,
    compare_evaluation,
    compare_metrics,
    compare_models,
    compare_run,
    evaluation_lines,
    train_reference,
)
from safetensors.torch import load_file
from settings import BATCH, BETA, OPTIONS, PREFERENCE_METRICS, STEPS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import attention
from shared import reference as reference_pass
from shared.attention import Spans
from shared.batches import Batch, Batches
from shared.distributed import Ranks, single_process
from shared.groups import Groups, Requires, load_groups
from shared.loading import load_policy_from, load_reward_model
from shared.model import PackedModel, Policy

HUGE = 1 << 20  # a budget that holds every batch
LABEL_OF_PROMPT = -100  # for the loss of transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one, two and four completions."""
    path = tmp_path_factory.mktemp("exactness")
    for k in (1, 2, 4):
        tiny.make_rows(STEPS * BATCH, seed=10 + k, k=k, path=path / f"rows{k}.jsonl")
    return path


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request: pytest.FixtureRequest, folder: Path) -> Path:
    """One tiny model per architecture."""
    return make_model(folder, request.param)


def make_model(folder: Path, architecture: str) -> Path:
    """The model of one architecture, made once; GPT-2's has no BOS and pads with its EOS, as the original does."""
    path = folder / architecture
    if not path.exists():
        tiny.make_model(path, architecture, seed=3, bos=architecture != "gpt2")
    return path


# ---------------------------------------------------------------- runs


def test_reference_agrees_with_the_models_own_loss(folder: Path) -> None:
    """The float64 loop's first SFT loss is what transformers makes of labels that hide the prompt."""
    path = make_model(folder, "gpt_neox")
    rows = tiny.read_jsonl(folder / "rows1.jsonl")[:BATCH]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()

    total = 0.0
    count = 0
    for row in rows:
        group = reference.encode(tokenizer, row)
        (completion,) = group.completions
        assert group.prompt[0] == tokenizer.bos_token_id
        assert completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(group.prompt[1:]) == row["prompt"]
        assert tokenizer.decode(completion[:-1]) == row["completion"]

        ids = torch.tensor([group.prompt + completion])
        labels = torch.tensor([[LABEL_OF_PROMPT] * len(group.prompt) + completion])
        mean_of_completion = float(model(input_ids=ids, labels=labels).loss.detach())
        total += mean_of_completion * len(completion)
        count += len(completion)

    history, _ = train_reference(path, rows, reference.sft(), steps=1)
    check_first_loss(history, total / count)


def test_sft(model: Path, folder: Path, tmp_path: Path) -> None:
    data = folder / "rows1.jsonl"
    compare_run("algos/sft.py", tmp_path / "out", model, data, reference.sft(), metrics=())


def test_dpo(model: Path, folder: Path, tmp_path: Path) -> None:
    data = folder / "rows2.jsonl"
    lines = compare_run("algos/dpo.py", tmp_path, model, data, reference.dpo(BETA), beta=BETA)
    check_first_loss(lines, math.log(2))
    assert lines[0]["rewards/margins"] == 0
    assert lines[0]["rewards/accuracies"] == 0


def test_dpo_of_four_ranked_completions(folder: Path, tmp_path: Path) -> None:
    """Plackett–Luce, with a schedule and warm-up on the way."""
    model = make_model(folder, "llama")
    options = {"beta": BETA, "lr_schedule": "linear", "warmup_steps": 1}
    loss = reference.dpo(BETA)
    lines = compare_run("algos/dpo.py", tmp_path / "out", model, folder / "rows4.jsonl", loss, **options)
    check_first_loss(lines, math.log(24))
    assert lines[0]["rewards/margins"] == 0


@pytest.mark.parametrize(
    "family, k", [("mistral", 2), ("gemma3_text", 4), ("qwen3_moe", 2), ("mixtral", 4), ("gemma3", 2), ("mistral3", 4)]
)
def test_dpo_of_windows_experts_and_text_parts(family: str, k: int, folder: Path, tmp_path: Path) -> None:
    """Rows of several windows, mixtures of experts, and multimodal models."""
    model = families.save_model(family, tmp_path / "model", scale=10)
    data = folder / f"rows{k}.jsonl"
    groups = [reference.encode(AutoTokenizer.from_pretrained(model), row) for row in tiny.read_jsonl(data)]
    lengths = [len(group.prompt + group.completions[-1]) for group in groups]
    assert max(lengths) > 3 * families.WINDOW
    lines = compare_run("algos/dpo.py", tmp_path / "out", model, data, reference.dpo(BETA), beta=BETA)
    check_first_loss(lines, math.log(math.factorial(k)))


@pytest.mark.parametrize("family", ["olmo3", "olmoe", "llava"])
def test_sft_of_windows_experts_and_text_parts(family: str, folder: Path, tmp_path: Path) -> None:
    model = families.save_model(family, tmp_path / "model", scale=10)
    compare_run("algos/sft.py", tmp_path / "out", model, folder / "rows1.jsonl", reference.sft(), metrics=())


def test_a_head_that_is_declared_tied_but_is_not(folder: Path, tmp_path: Path) -> None:
    """The file's own head is trained and exported, as transformers loads it."""
    model = tiny.make_model(tmp_path / "model", "llama", seed=3)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    before = load_file(model / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], before["model.embed_tokens.weight"])

    compare_run("algos/dpo.py", tmp_path / "out", model, folder / "rows2.jsonl", reference.dpo(BETA), beta=BETA)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


def test_dpo_with_label_smoothing(folder: Path, tmp_path: Path) -> None:
    model = make_model(folder, "llama")
    options = {"beta": BETA, "label_smoothing": 0.2}
    loss = reference.dpo(**options)
    lines = compare_run("algos/dpo.py", tmp_path / "out", model, folder / "rows2.jsonl", loss, **options)
    check_first_loss(lines, math.log(2))


def test_another_reference_and_evaluations(folder: Path, tmp_path: Path) -> None:
    """An optimizer made after a reference pass, and steps between evaluations, train as if there were none."""
    model = make_model(folder, "llama")
    other = tiny.make_model(folder / "other", "llama", seed=8)
    data = folder / "rows2.jsonl"
    rows = tiny.read_jsonl(data)
    held_out = tiny.make_rows(6, seed=30, path=folder / "held_out.jsonl")
    output_dir = tmp_path / "out"
    options = {"beta": BETA, "reference": other, "eval_data": folder / "held_out.jsonl", "eval_every": 1}
    lines = tiny.run("algos/dpo.py", output_dir, model=model, train_data=data, **OPTIONS, **options)

    loss = reference.dpo(BETA)
    expected, trained = train_reference(model, rows, loss, reference_dir=other)
    compare_metrics(lines, expected, PREFERENCE_METRICS)
    compare_models(output_dir, trained, rows)

    evaluations = evaluation_lines(output_dir)
    assert [line["step"] for line in evaluations] == [0, 1, 2, 3]
    expected_evaluation = reference.evaluate(model, other, trained, held_out, loss)
    compare_evaluation(evaluations[-1], expected_evaluation)


# ---------------------------------------------------------------- what a run computes and holds


def load_rows(path: Path, tokenizer_of: Path) -> Groups:
    """The groups of a file, without truncation."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    return load_groups(str(path), tokenizer, Requires(), 512, None)


def first_batch(groups: Groups, ranks: Ranks) -> Batch:
    """The first BATCH groups as one micro-batch."""
    (batch,) = Batches(groups, BATCH, HUGE, None, ranks).of_step(1)
    return batch


def backward(policy: Policy, batch: Batch) -> int:
    """Set the gradients of the summed log-probs; how many numbers were kept for the backward pass."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = policy.logps(batch).sum()
    loss.backward()
    return kept


def test_activation_checkpointing_keeps_less_and_changes_nothing(folder: Path) -> None:
    """The same gradients to the bit, from fewer saved activations."""
    path = make_model(folder, "qwen3")
    groups = load_rows(folder / "rows4.jsonl", path)
    with single_process("float32") as ranks:
        batch = first_batch(groups, ranks)
        plain = load_policy_from(str(path), ranks)
        kept = backward(plain, batch)
        checkpointed = load_policy_from(str(path), ranks, activation_checkpointing=True)
        kept_with_checkpoints = backward(checkpointed, batch)

        for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
    assert kept_with_checkpoints < 0.7 * kept


def test_the_last_layer_is_computed_where_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy reads of each group the prompt's end and the completions but for their ends, a reward model the ends."""
    path = make_model(folder, "qwen3")
    groups = load_rows(folder / "rows4.jsonl", path)
    args = SimpleNamespace(
        model=str(path), activation_checkpointing=False, compile=False, seed=0, lora_rank=None, lora_alpha=None
    )
    with single_process("float32") as ranks:
        batch = first_batch(groups, ranks)
        completion_tokens = int(batch.lengths.sum())
        policy = load_policy_from(str(path), ranks)
        check_last_layer(policy, batch, BATCH + completion_tokens - batch.lengths.numel(), monkeypatch)
        reward_model = load_reward_model(args, ranks, AutoTokenizer.from_pretrained(path))
        check_last_layer(reward_model, batch, batch.lengths.numel(), monkeypatch)


def check_last_layer(model: PackedModel, batch: Batch, num_read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention, and no other layer's, is told to leave prompts out. Its MLP, queries and output projection see
    `num_read` positions; keys and values are those of all tokens."""
    skips = []  # of each layer's attention, whether it leaves anything out
    per_segment = attention._per_segment

    def record_skips(query: Tensor, key: Tensor, value: Tensor, spans: Spans, *settings: Any) -> Tensor:
        skips.append(any(spans.skipped))
        return per_segment(query, key, value, spans, *settings)

    positions = {}  # of each part of the last layer, the number that it sees

    def record_positions(name: str, part: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            positions[name] = args[0].shape[1]

        part.register_forward_hook(hook)

    for name, part in model.lm.base_model.layers[-1].named_modules():
        if name.endswith(("_proj", "mlp")):
            record_positions(name, part)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_per_segment", record_skips)
        model(batch)

    assert skips == [False] * (tiny.LAYERS - 1) + [True]
    row_length = batch.input_ids.shape[1]
    assert positions == {
        "mlp": num_read,
        "mlp.gate_proj": num_read,
        "mlp.up_proj": num_read,
        "mlp.down_proj": num_read,
        "self_attn.q_proj": num_read,
        "self_attn.o_proj": num_read,
        "self_attn.k_proj": row_length,
        "self_attn.v_proj": row_length,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_do_not_change_with_their_file(folder: Path, tmp_path: Path, dtype: str) -> None:
    """What is read from a file may be a mapping of it, which another program's write would change."""
    model = shutil.copytree(make_model(folder, "llama"), tmp_path / "model")
    with single_process(dtype) as ranks:
        policy = load_policy_from(str(model), ranks)
        weights = [in_memory(parameter) for parameter in policy.parameters()]
        before = [weight.clone() for weight in weights]
        overwrite_tensors(model / "model.safetensors")
        for weight, weight_before in zip(weights, before, strict=True):
            assert torch.equal(weight, weight_before)


def in_memory(parameter: nn.Parameter) -> Tensor:
    """The memory of a parameter, or of this process's shard of it."""
    weight = parameter.detach()
    if hasattr(weight, "to_local"):
        return weight.to_local()
    return weight


def overwrite_tensors(path: Path) -> None:
    """Put zeros into a safetensors file, in place, behind its header."""
    with open(path, "r+b") as file:
        header_size = int.from_bytes(file.read(8), "little")
        start = 8 + header_size
        file.seek(start)
        file.write(bytes(path.stat().st_size - start))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_reference_is_gone_after_its_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Training holds one model; FSDP's cycles would keep the other until some garbage collection."""
    path = make_model(folder, "llama")
    other = make_model(folder, "qwen2")
    groups = load_rows(folder / "rows2.jsonl", path)
    loaded = []

    def load_and_remember(path: str, ranks: Ranks) -> Policy:
        policy = load_policy_from(path, ranks)
        loaded.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(reference_pass, "load_policy_from", load_and_remember)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with single_process(dtype) as ranks:
        policy = load_policy_from(str(path), ranks)
        batches = Batches(groups, BATCH, HUGE, None, ranks)
        gc.disable()
        try:
            reference_pass.add_reference_logps(str(other), policy, batches, None)
            assert [model() for model in loaded] == [None]
        finally:
            gc.enable()
