"""Which families of models are trained, and that every other one is refused in one line; multimodal models.

Where nothing else is said, models are random, with transformers' own small initial weights: a layer that packed rows
compute wrongly then changes the values by less than rounding may.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import reference
import tiny
import torch
from families import save_model
from safetensors import safe_open
from safetensors.torch import load_file
from settings import OPTIONS
from torch import nn
from transformers import AutoModelForSequenceClassification

from shared import UserError, attention, loading
from shared.batches import Batches
from shared.distributed import single_process
from shared.groups import Groups, check_fit
from shared.loading import load_generator, load_policy, load_policy_from, load_reward_model, load_scorer, load_tokenizer


def load(directory: Path) -> nn.Module:
    with single_process("float32") as ranks:
        return load_policy_from(str(directory), ranks)


def load_for_rewards(directory: Path) -> nn.Module:
    args = SimpleNamespace(
        model=str(directory), activation_checkpointing=False, compile=False, seed=0, lora_rank=None, lora_alpha=None
    )
    with single_process("float32") as ranks:
        return load_reward_model(args, ranks, tiny.make_tokenizer())


def refusal(directory: Path) -> str:
    """The message of the one line with which a model is refused."""
    with pytest.raises(UserError) as refused:
        load(directory)
    message = str(refused.value)
    assert message.startswith(f"model {directory}: ")
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what packed rows compute


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3_text", "gemma3"])
def test_nothing_of_the_check_stays_behind(family: str, tmp_path: Path) -> None:
    policy = load(save_model(family, tmp_path / family))
    config = policy.lm.config.get_text_config()
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert policy.lm.training
    assert config._attn_implementation == "spans"
    assert not policy.lm.get_input_embeddings()._forward_hooks
    if "gemma3" in family:
        windows = [layer.self_attn.sliding_window for layer in policy.text_model.layers]
        assert windows == [families.WINDOW, None]
        assert config.sliding_window == families.WINDOW


RECURRENT = "it has recurrent or convolution layers, which go on from one completion into the next"
REFUSED = {
    **dict.fromkeys(("bamba", "falcon_h1", "jamba", "lfm2", "mamba2", "minimax", "nemotron_h"), RECURRENT),
    **dict.fromkeys(("qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "qwen3_5"), RECURRENT),
    "bloom": "its attention has position biases",
    "gemma2": "its attention has soft caps on its scores",
    "gpt_oss": "its attention has sinks",
    "gptj": "its attention cannot be told which tokens see each other",
    "nemotron": "its layers do not tell its attention which tokens see each other",
    "phimoe": "it draws random numbers in training, beside dropout",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused(family: str, tmp_path: Path) -> None:
    """With small weights, as with the large ones of the table of families."""
    directory = save_model(family, tmp_path / family)
    assert refusal(directory) == f"model {directory}: its architecture is not supported: {REFUSED[family]}"


def test_a_reward_model_is_checked_by_its_rewards(tmp_path: Path) -> None:
    load_for_rewards(save_model("qwen3", tmp_path / "qwen3"))
    with pytest.raises(UserError, match=RECURRENT):
        load_for_rewards(save_model("jamba", tmp_path / "jamba"))


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("window", [1, 2, 7, 4096])
def test_a_window_of_any_size(window: int, tmp_path: Path) -> None:
    load(save_model("mistral", tmp_path / "model", scale=10, sliding_window=window))


def test_a_window_that_attention_is_not_told_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the rows of the check are shorter than the window."""

    def without_window(*inputs: Any, sliding_window: int, **others: Any) -> Any:
        return attention.span_attention(*inputs, **others)

    monkeypatch.setattr(loading, "span_attention", without_window)
    directory = save_model("mistral", tmp_path / "model", scale=10, sliding_window=4096)
    assert refusal(directory).endswith("packed rows give other values than it does")


# ---------------------------------------------------------------- what is not a language model by itself


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ],
)
def test_a_quantised_checkpoint_is_refused(quantization: dict, tmp_path: Path) -> None:
    directory = save_model("llama", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    assert refusal(directory) == f"model {directory}: is quantised; give the full-precision checkpoint"


# ---------------------------------------------------------------- multimodal models


def test_sizes_are_those_of_the_text_part(tmp_path: Path) -> None:
    model = str(save_model("mistral3", tmp_path))
    _, config = load_tokenizer(model, model)
    groups = Groups(torch.tensor([1, 2, 400]).int(), torch.tensor([[0, 1, 2, 3]]), torch.arange(1), {})
    with pytest.raises(UserError, match="the model embeds 400"):
        check_fit(groups, config, "rows.jsonl")


def run_options(family: str, folder: Path) -> dict[str, Any]:
    """The options of two steps from the multimodal model of a family."""
    rows = folder / "rows.jsonl"
    tiny.make_rows(8, seed=2, path=rows)
    options = {**OPTIONS, "batch_size": 2, "max_steps": 2, "save_every": 1}
    return {**options, "model": save_model(family, folder / "model", scale=10), "train_data": rows}


def check_export(model: Path, exported: Path) -> None:
    """The vision part has the bytes that it had. The text part is trained, and in float32."""
    before = load_file(model / "model.safetensors")
    after = load_file(exported / "model.safetensors")
    assert after.keys() == before.keys()
    frozen = [name for name in before if any(part in name for part in reference.VISION_PARTS)]
    assert len(frozen) >= 10
    for name, tensor in after.items():
        if name in frozen:
            assert tensor.dtype == before[name].dtype == torch.bfloat16
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
        else:
            assert tensor.dtype == torch.float32
            assert not torch.equal(tensor, before[name].float()), name


@pytest.mark.parametrize(
    "family", ["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava", "qwen3_vl"))]
)
def test_the_vision_part_is_frozen_and_exported_as_it_was(family: str, tmp_path: Path) -> None:
    """No checkpoint holds it, and no optimizer sees it."""
    options = run_options(family, tmp_path)
    lines = tiny.run("algos/dpo.py", tmp_path / "out", **options)
    check_export(options["model"], tmp_path / "out")
    assert tiny.read_log(tmp_path / "out").count("its text part is trained; frozen are its ") == 1

    (shard,) = (tmp_path / "out" / "checkpoints" / "step-000002").glob("*.safetensors")
    with safe_open(shard, "pt") as checkpoint:
        names = " ".join(checkpoint.keys())
    assert "q_proj.weight|exp_avg" in names
    assert not any(part in names for part in reference.VISION_PARTS)

    resumed = tiny.run("algos/dpo.py", tmp_path / "out", **{**options, "max_steps": 3}, resume=True)
    assert [line["step"] for line in resumed] == [1, 2, 3]
    assert resumed[:2] == lines
    check_export(options["model"], tmp_path / "out")


@pytest.mark.slow
def test_two_processes_train_a_multimodal_model(tmp_path: Path) -> None:
    """To the same losses, and with the same export, as one process."""
    options = run_options("gemma3", tmp_path)
    one = tiny.run("algos/dpo.py", tmp_path / "one", **options)
    two = tiny.run("algos/dpo.py", tmp_path / "two", processes=2, **options)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4)
    check_export(options["model"], tmp_path / "two")


def test_a_reward_model_of_a_multimodal_model(tmp_path: Path) -> None:
    """Its export gives the same rewards in plain transformers."""
    options = run_options("gemma3", tmp_path)
    tiny.run("algos/rm.py", tmp_path / "out", **options)
    assert "its text part is trained" in tiny.read_log(tmp_path / "out")
    tokens = torch.arange(5, 25)
    groups = Groups(tokens.int(), torch.tensor([[0, 8, 20]]), torch.arange(1), {})
    with single_process("float32") as ranks:
        scorer = load_scorer(str(tmp_path / "out"), ranks)
        (batch,) = Batches(groups, 1, len(tokens), None, ranks).of_step(1)
        reward = scorer(batch)[0, 0]
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(reward, stock(input_ids=tokens[None]).logits[0, 0])


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_a_multimodal_model_generates(family: str, tmp_path: Path) -> None:
    generator = load_generator(str(save_model(family, tmp_path)), torch.float32, "cpu")
    tokens = generator.generate(input_ids=torch.tensor([[5, 6, 7]]), min_new_tokens=4, max_new_tokens=4)
    assert tokens.shape == (1, 7)


def test_a_reward_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="for this kind of AutoModel: AutoModelForSequenceClassification"):
        load_for_rewards(save_model("llava", tmp_path))


# ---------------------------------------------------------------- mixtures of experts


@pytest.mark.parametrize("coefficient, lines", [(0.02, 2), (0.0, 0)])
def test_the_load_balancing_loss_is_said_to_be_left_out(
    coefficient: float, lines: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once for a policy that is trained, and once for a reward model."""
    model = save_model("mixtral", tmp_path / "model", router_aux_loss_coef=coefficient)
    args = SimpleNamespace(
        model=str(model), activation_checkpointing=False, compile=False, seed=0, lora_rank=None, lora_alpha=None
    )
    with single_process("float32") as ranks:
        load_policy(args, ranks)
        load_reward_model(args, ranks, tiny.make_tokenizer())
    printed = capsys.readouterr().out
    assert printed.count("its load-balancing loss (router_aux_loss_coef 0.02) is left out") == lines
    assert printed.count("load-balancing") == lines
