"""LoRA: adapters against a float64 loop of transformers and peft, and as models that every command reads."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import harness
import pytest
import reference
import tiny
import torch
from safetensors.torch import load_file, save_file
from settings import BATCH, BETA, OPTIONS, STEPS
from test_exactness_family import GAMMAS, ROWS, with_samples, with_score_lists, with_scores
from test_family_table import REFUSED
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from scripts import evaluate, export, heatmap, prepare_model, sample, score
from shared import UserError, packing
from shared.batches import Batches
from shared.distributed import single_process
from shared.loading import load_policy, load_policy_from, load_tokenizer
from shared.rows import Counts

peft = pytest.importorskip("peft")

RANK = 4
LORA: dict[str, Any] = {**OPTIONS, "lora_rank": RANK, "learning_rate": 1e-2}
ARCHITECTURES = ("llama", "qwen2", "gpt_neox", "gpt2")  # qwen2 and gpt2 have tied weights, gpt2 has Conv1D
ADAPTER = "adapter_model.safetensors"
PROBE = torch.arange(3, 40)[None]
Adapt = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with all that a form may carry, a language model of each architecture, and a reward model."""
    path = tmp_path_factory.mktemp("lora")
    pairs = with_scores(tiny.make_rows(ROWS, seed=12, k=2), 1)
    tiny.write_jsonl(path / "plain.jsonl", pairs)
    tiny.write_jsonl(path / "pairs.jsonl", with_samples(pairs, 2))
    tiny.write_jsonl(path / "ensemble.jsonl", with_score_lists(pairs, 30, models=3))
    tiny.make_rows(ROWS, seed=11, k=1, path=path / "texts.jsonl")
    for architecture in ARCHITECTURES:
        tiny.make_model(path / architecture, architecture, seed=3, bos=architecture != "gpt2")
    tiny.make_reward_model(path / "classifier")
    return path


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """An adapter that peft has made: of two modules alone, with a rank-stabilised scale and B other than 0."""
    path = folder / "adapter"
    config = peft.LoraConfig(r=RANK, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"])
    save_with_peft(folder / "llama", path, config)
    return path


def save_with_peft(base: Path, path: Path, config: Any) -> None:
    """Save an arbitrary adapter of a language model, with its tokenizer."""
    config.task_type = config.task_type or "CAUSAL_LM"
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomise(adapted)
    adapted.save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)


def randomise(adapted: nn.Module) -> None:
    """Give what is trained values that show."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


# ---------------------------------------------------------------- the float64 loop


def new_adapter(model: nn.Module, **settings: Any) -> nn.Module:
    """What --lora-rank makes of a model, by peft's own means."""
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **settings))


def new_reward_adapter(model: nn.Module) -> nn.Module:
    return new_adapter(model, task_type="SEQ_CLS", modules_to_save=["score"])


def check_run(
    out: Path,
    script: str,
    model: Path,
    data: Path,
    loss: reference.Loss,
    adapt: Adapt,
    processes: int = 1,
    **options: Any,
) -> nn.Module:
    """A run, step by step, and the adapter at its end, which are those of the loop. Returns the loop's model."""
    base = model
    if (model / "adapter_config.json").exists():
        base = Path(json.loads((model / "adapter_config.json").read_text())["base_model_name_or_path"])
    rewards = script == "rm"
    expected, trained = reference.train(
        base,
        tiny.read_jsonl(data),
        loss,
        batch_size=BATCH,
        steps=STEPS,
        peak=LORA["learning_rate"],
        weight_decay=LORA["weight_decay"],
        max_grad_norm=LORA["max_grad_norm"],
        adapt=adapt,
        rewards=rewards,
    )
    options = {**LORA, **options}
    harness.run(out, script=f"algos/{script}.py", processes=processes, model=model, train_data=data, **options)
    lines = tiny.training_lines(out / "metrics.jsonl")
    for line, wanted in zip(lines, expected, strict=True):
        tolerance = 1e-6 if line["step"] == 1 else 1e-4
        assert line["loss"] == pytest.approx(wanted["loss"], rel=tolerance), line["step"]
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2 * tolerance), line["step"]
    compare_adapters(out, trained)
    return trained


def compare_adapters(out: Path, trained: nn.Module) -> None:
    """The saved tensors have the loop's names and values."""
    saved = load_file(out / ADAPTER)
    wanted = peft.get_peft_model_state_dict(trained)
    assert set(saved) == set(wanted)
    for name, tensor in saved.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-3, atol=1e-4)
    names = [name for name in saved if "lora_B" in name]
    assert min(float(saved[name].abs().max()) for name in names) > 0.005


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=PROBE, use_cache=False).logits.double()


def check_that_all_load(out: Path, base: Path, trained: nn.Module, merged: Path) -> None:
    """peft, transformers and the merged model give the logits of the loop's model."""
    wanted = logits_of(trained)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits_of(plain) - wanted).abs().max() > 0.05
    by_peft = logits_of(peft.PeftModel.from_pretrained(plain, out))
    by_transformers = logits_of(AutoModelForCausalLM.from_pretrained(out))
    prepare_model.main(prepare_model.Merge(model=str(out), output_dir=merged))
    by_merging = logits_of(AutoModelForCausalLM.from_pretrained(merged))
    torch.testing.assert_close(by_peft, wanted, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(by_transformers, by_peft, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(by_merging, by_peft, rtol=1e-5, atol=1e-4)


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "architecture, processes",
    [
        ("llama", 1),
        ("gpt2", 2),
        slow("qwen2", 1),
        slow("gpt_neox", 1),
        slow("gpt2", 1),
        slow("llama", 2),
        slow("qwen2", 2),
        slow("gpt_neox", 2),
    ],
)
def test_dpo(architecture: str, processes: int, folder: Path, tmp_path: Path) -> None:
    base = folder / architecture
    data = folder / "pairs.jsonl"
    trained = check_run(tmp_path / "out", "dpo", base, data, reference.dpo(BETA), new_adapter, processes, beta=BETA)
    assert harness.values_of(tmp_path / "out", "loss")[0] == pytest.approx(math.log(2), rel=1e-7)
    assert harness.values_of(tmp_path / "out", "rewards/margins")[0] == 0
    check_that_all_load(tmp_path / "out", base, trained, tmp_path / "merged")


ALGORITHMS = {
    "sft": ("texts", reference.sft(), {}),
    "ipo": ("pairs", reference.ipo(0.2), {"tau": 0.2}),
    "exo": ("pairs", reference.exo(BETA, 0.02), {"beta": BETA, "epsilon": 0.02}),
    "typo": ("pairs", reference.typo(0.3), {"lam": 0.3}),
    "distill_dpo": ("pairs", reference.distill_dpo(BETA), {"beta": BETA}),
    "pessimistic_dpo": (
        "pairs",
        reference.pessimistic_dpo(BETA, "dpo", STEPS, *GAMMAS.values()),
        {"beta": BETA, **GAMMAS},
    ),
    "ensemble_dpo": (
        "ensemble",
        reference.ensemble_dpo(BETA, STEPS, *GAMMAS.values()),
        {"beta": BETA, "micro_batch_tokens": 256, **GAMMAS},
    ),
    "token_dpo_beam": ("pairs", reference.token_dpo(BETA), {"beta": BETA}),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", ALGORITHMS)
def test_algorithms(script: str, folder: Path, tmp_path: Path) -> None:
    data, loss, options = ALGORITHMS[script]
    check_run(tmp_path / "out", script, folder / "llama", folder / f"{data}.jsonl", loss, new_adapter, **options)


@pytest.mark.parametrize("processes", [1, slow(2)])
def test_rm(processes: int, folder: Path, tmp_path: Path) -> None:
    """The head is trained beside the adapter; peft and the merged model give the rewards of the loop's model."""
    out = tmp_path / "out"
    base = folder / "classifier"
    rm = reference.rm()
    trained = check_run(out, "rm", base, folder / "plain.jsonl", rm, new_reward_adapter, processes)
    wanted = logits_of(trained)

    prepare_model.main(prepare_model.Merge(model=str(out), output_dir=tmp_path / "merged"))
    by_merging = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    by_peft = peft.PeftModel.from_pretrained(plain, out)
    for model in (by_peft, by_merging):
        torch.testing.assert_close(logits_of(model), wanted, rtol=1e-3, atol=1e-3)
    entries = json.loads((out / "reward_config.json").read_text())
    check_card(out, tmp_path / "merged")
    assert by_merging.config.reward_mean == entries["reward_mean"]
    assert by_merging.config.pad_token_id == AutoTokenizer.from_pretrained(out).pad_token_id


def check_card(out: Path, merged: Path) -> None:
    """The code of the adapter's card gives the rewards of the merged model's."""
    rewards = []
    for path in (out, merged):
        (code,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        defined: dict[str, Any] = {}
        exec(code.replace('FOLDER = "."', f"FOLDER = {str(path)!r}"), defined)
        rewards.append(defined["reward_of_text"]("Q: ", "ok fitodi"))
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


# ---------------------------------------------------------------- to go on with an adapter


@pytest.mark.parametrize("processes", [1, slow(2)])
def test_going_on(processes: int, folder: Path, adapter: Path, tmp_path: Path) -> None:
    """The adapter is trained on, as it is, and π_ref is the base with the adapter as it starts."""

    def load(model: nn.Module) -> nn.Module:
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)

    loss = reference.dpo(BETA)
    out = tmp_path / "out"
    check_run(out, "dpo", adapter, folder / "pairs.jsonl", loss, load, processes, beta=BETA)
    assert harness.values_of(out, "rewards/margins")[0] == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    assert settings["use_rslora"]
    assert settings["lora_alpha"] == 6
    assert settings["base_model_name_or_path"] == str(folder / "llama")


def test_an_adapter_is_merged_to_train_in_full(folder: Path, adapter: Path, tmp_path: Path) -> None:
    """It trains as the merged model does, and is scored as a reference of its own."""
    prepare_model.main(prepare_model.Merge(model=str(adapter), output_dir=tmp_path / "merged"))
    options = {**OPTIONS, "train_data": folder / "pairs.jsonl", "max_steps": 2}
    harness.run(tmp_path / "a", model=adapter, **options)
    harness.run(tmp_path / "b", model=tmp_path / "merged", reference=adapter, **options)
    harness.same(tmp_path / "a", tmp_path / "b")
    assert harness.values_of(tmp_path / "a", "rewards/margins")[0] == 0


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "processes, options",
    [(1, {}), slow(2, {"dtype": "bfloat16"}), slow(2, {"dtype": "bfloat16", "shard_size": 1})],
)
def test_resume(processes: int, options: dict, folder: Path, tmp_path: Path) -> None:
    """Bit for bit, from a checkpoint that holds what is trained alone; another seed is another adapter."""
    options = {**LORA, **options, "model": folder / "llama", "train_data": folder / "pairs.jsonl", "save_every": 2}
    through = tmp_path / "through"
    harness.run(through, processes=processes, **options)
    out = tmp_path / "out"
    shutil.copytree(through, out)
    shutil.rmtree(out / "checkpoints" / "step-000003")
    (out / ADAPTER).unlink()
    harness.run(out, processes=processes, resume=True, **options)
    assert "resumed from" in (tmp_path / "out.log").read_text()
    assert harness.lines(out) == harness.lines(through)
    assert (out / ADAPTER).read_bytes() == (through / ADAPTER).read_bytes()

    (checkpoint, *_) = sorted((through / "checkpoints" / "step-000002").glob("*.safetensors"))
    names = {name.partition("|")[0] for name in load_file(checkpoint)}
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    size = sum(path.stat().st_size for path in checkpoint.parent.glob("*.safetensors"))
    assert size < (folder / "llama" / "model.safetensors").stat().st_size


def test_the_cache_of_the_reference_knows_the_adapter(folder: Path, adapter: Path, tmp_path: Path) -> None:
    """The log-probs of another adapter of the same base model are not taken."""
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = {name: 2 * tensor for name, tensor in load_file(adapter / ADAPTER).items()}
    save_file(tensors, other / ADAPTER)
    options = {**LORA, "train_data": folder / "pairs.jsonl", "max_steps": 1, "beside": tmp_path / "shared"}
    for name, model in (("first", adapter), ("second", other)):
        harness.run(tmp_path / name, model=model, **options)
        assert harness.values_of(tmp_path / name, "rewards/margins") == [0]
    assert len(list(tmp_path.glob("shared.cache/cleanpo/reference-*"))) == 2


# ---------------------------------------------------------------- commands


def test_sft_then_dpo_then_every_command(folder: Path, tmp_path: Path) -> None:
    """Two adapters in a row, a reward model's, and all that reads them."""
    data = folder / "pairs.jsonl"
    base = folder / "llama"
    harness.run(tmp_path / "sft", script="algos/sft.py", model=base, train_data=folder / "texts.jsonl", **LORA)
    harness.run(tmp_path / "dpo", model=tmp_path / "sft", train_data=data, **LORA)
    harness.run(tmp_path / "rm", script="algos/rm.py", model=tmp_path / "sft", train_data=data, **LORA)
    for name in ("sft", "dpo", "rm"):
        settings = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(base)

    adapters = {name: tmp_path / name for name in ("sft", "dpo", "rm")}
    merged = {}
    for name, path in adapters.items():
        merged[name] = tmp_path / f"merged-{name}"
        prepare_model.main(prepare_model.Merge(model=str(path), output_dir=merged[name]))
    assert results_of(adapters, data, tmp_path / "a") == results_of(merged, data, tmp_path / "b")


def results_of(models: dict[str, Path], data: Path, out: Path) -> list:
    """Samples of a policy with scores of a reward model, the comparison of two policies, and token rewards."""
    out.mkdir()
    sft, dpo, rm = (str(models[name]) for name in ("sft", "dpo", "rm"))
    sampling: dict[str, Any] = {"max_new_tokens": 8, "seed": 1}
    samples = out / "samples.jsonl"
    sample.main(sample.Args(model=dpo, rows=str(data), output=samples, num_completions=2, max_rows=4, **sampling))
    scored = out / "scored.jsonl"
    score.main(score.Args(rows=str(samples), output=scored, reward_models=(rm,)))

    results = out / "results.json"
    policies = (f"sft={sft}", f"dpo={dpo}")
    evaluate.main(evaluate.Args(policies=policies, rows=data, output=results, reward=rm, num_prompts=4, **sampling))
    compared = json.loads(results.read_text())["policies"]
    for policy in compared.values():
        del policy["path"]

    page = out / "heatmap.html"
    args = heatmap.Args(policy=dpo, reference=sft, beta=BETA, rows=str(data), output=page, max_rows=1)
    rows, _ = heatmap.encode(args, Counts())
    return [tiny.read_jsonl(scored), compared, heatmap.rewards_of_tokens(args, rows)]


@pytest.mark.slow
def test_export_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    harness.run(out, model=folder / "llama", train_data=folder / "pairs.jsonl", save_every=3, **LORA)
    with single_process("float32") as ranks:
        export.write_models(export.Args(run=out, step=3, output_dir=tmp_path / "model"), ranks)
    for name in (ADAPTER, "adapter_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (out / name).read_bytes()


# ---------------------------------------------------------------- what is refused


def changed(adapter: Path, path: Path, **settings: Any) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(adapter, path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return path


def test_flags_that_do_not_fit(folder: Path, adapter: Path, tmp_path: Path) -> None:
    data = folder / "pairs.jsonl"
    merge_first = "merge it first by scripts/prepare_model.py merge"
    options = {"train_data": data, "model": adapter}
    harness.refused(tmp_path / "a", "--lora-rank 3: the adapter", "has 4", merge_first, lora_rank=3, **options)
    harness.refused(tmp_path / "b", "--lora-alpha 8: the adapter", "has 6", lora_rank=4, lora_alpha=8, **options)
    harness.refused(tmp_path / "c", "--lora-alpha: give --lora-rank too", lora_alpha=8, **options)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"use_dora": True}, "is no plain LoRA adapter (use_dora); without --lora-rank it is merged"),
        ({"init_lora_weights": "pissa"}, "has changed the weights of its base model"),
        ({"modules_to_save": ["lm_head"]}, "trains whole modules too (lm_head)"),
        ({"peft_type": "LOHA"}, "is no LoRA adapter but LOHA"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head, outside the layers"),
    ],
)
def test_adapters_that_cannot_be_trained_on(settings: dict, words: str, adapter: Path, tmp_path: Path) -> None:
    path = changed(adapter, tmp_path / "adapter", **settings)
    with single_process("float32") as ranks, pytest.raises(UserError) as refused:
        load_policy(arguments(path), ranks)
    assert words in str(refused.value)


def arguments(model: Path) -> SimpleNamespace:
    """What loading a policy to train reads."""
    return SimpleNamespace(
        model=str(model), lora_rank=RANK, lora_alpha=None, seed=0, activation_checkpointing=False, compile=False
    )


@pytest.mark.parametrize(
    "base, words",
    [
        (None, "is an adapter that does not name its base model"),
        ("./gone", "is an adapter of ./gone: no such file"),
        ("ADAPTER", "is an adapter too; merge it"),
        ("org/gone", "model org/gone, the base model of"),
    ],
)
def test_adapters_without_a_base_model(base: str | None, words: str, adapter: Path, tmp_path: Path) -> None:
    if base == "ADAPTER":
        base = str(adapter)
    path = changed(adapter, tmp_path / "adapter", base_model_name_or_path=base)
    with pytest.raises(UserError) as refused:
        load_tokenizer(str(path))
    assert str(path) in str(refused.value)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda tensor: None, "do not fit its base model"),
        (lambda tensor: tensor[:, :5].contiguous(), "of another size|cannot be merged"),
        (lambda tensor: tensor / 0, "not finite"),
    ],
)
def test_adapters_that_cannot_be_read(damage: Callable, words: str, adapter: Path, tmp_path: Path) -> None:
    """One of their tensors is missing, misshapen or infinite; to train on, and to merge."""
    path = changed(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / ADAPTER)
    first = min(tensors)
    damaged = damage(tensors.pop(first))
    if damaged is not None:
        tensors[first] = damaged
    save_file(tensors, path / ADAPTER)
    with single_process("float32") as ranks:
        with pytest.raises(UserError, match=words):
            load_policy(arguments(path), ranks)
        with pytest.raises(UserError, match=words):
            load_policy_from(str(path), ranks)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("LoraConfig", {"use_dora": True, "r": RANK}),
        ("LoHaConfig", {"r": RANK, "target_modules": ["q_proj", "down_proj"]}),
        ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("LoraConfig", {"r": RANK, "target_modules": ["q_proj", "lm_head"]}),
    ],
)
def test_other_adapters_are_merged(kind: str, settings: dict, folder: Path, tmp_path: Path) -> None:
    save_with_peft(folder / "llama", tmp_path / "adapter", getattr(peft, kind)(**settings))
    plain = AutoModelForCausalLM.from_pretrained(folder / "llama")
    before = logits_of(plain)
    wanted = logits_of(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    assert (wanted - before).abs().max() > 0.05
    prepare_model.main(prepare_model.Merge(model=str(tmp_path / "adapter"), output_dir=tmp_path / "merged"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-3)


def test_adapters_that_cannot_be_merged(folder: Path, tmp_path: Path) -> None:
    """Virtual tokens are no weights, and a tied weight has two meanings."""
    save_with_peft(folder / "llama", tmp_path / "prompt", peft.PromptTuningConfig(num_virtual_tokens=3))
    tied = peft.LoraConfig(r=RANK, target_modules=["q_proj", "embed_tokens"])
    save_with_peft(folder / "qwen2", tmp_path / "tied", tied)
    for name, words in (("prompt", r"its adapter \(PROMPT_TUNING\) cannot be merged"), ("tied", "is tied to another")):
        with single_process("float32") as ranks, pytest.raises(UserError, match=words):
            load_policy_from(str(tmp_path / name), ranks)


def test_other_commands_that_prepare_models(adapter: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an adapter of .*llama; merge it first by: python"):
        prepare_model.main(prepare_model.PadToken(model=str(adapter), output_dir=tmp_path / "out"))
    with pytest.raises(UserError, match="is no adapter"):
        prepare_model.main(prepare_model.Merge(model=str(folder / "llama"), output_dir=tmp_path / "out"))


def test_without_peft(folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with single_process("float32") as ranks:
        for model in (folder / "llama", adapter):
            with pytest.raises(UserError, match="need peft: pip install"):
                load_policy(arguments(model), ranks)


# ---------------------------------------------------------------- families


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name not in REFUSED] + ["gemma3", "llava"])
def test_every_adapter_is_trained(family: str, tmp_path: Path) -> None:
    """No tensor of an adapter is left without a gradient, and packed rows are checked with the adapter in place."""
    model = families.save_model(family, tmp_path)
    with single_process("float32") as ranks:
        policy = load_policy(arguments(model), ranks)
        groups = packing._arbitrary_groups(policy.lm.config.get_text_config())
        (batch,) = Batches(groups, len(groups), len(groups.tokens), None, ranks).of_step(1)
        policy.logps(batch).sum().backward()
        names = dict(policy.named_parameters())
        assert all(".lora_" in name for name in names)
        missing = [name for name, parameter in names.items() if parameter.grad is None]
        assert not missing
