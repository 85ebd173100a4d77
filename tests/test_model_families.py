"""Which families of models are trained, and that every other one is refused in one line.

The models are random, with transformers' own small initial weights: a layer that packed rows compute wrongly then
changes the values by less than rounding may.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shared import UserError
from shared.distributed import single_process
from shared.groups import Groups, check_fit
from shared.loading import load_policy, load_policy_from, load_reward_model, load_tokenizer

SIZES: dict[str, object] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
DELTA_RULE = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
STATE_SPACE = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 16}

TRAINED: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gpt_neox": {},
    "gpt2": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "olmo2": {},
    "phi3": {},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
}
REFUSED: dict[str, dict[str, object]] = {
    "qwen3_5_text": DELTA_RULE,
    "qwen3_next": {**DELTA_RULE, **EXPERTS, "shared_expert_intermediate_size": 32},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "falcon_h1": STATE_SPACE,
    "bamba": {**STATE_SPACE, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1, "lru_width": 32},
    "bloom": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "use_mamba_kernels": False,
    },
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
}


def save_model(family: str, directory: Path, **overrides: object) -> Path:
    """A random model of a family, of transformers' own initial weights, and its tokenizer."""
    config = AutoConfig.for_model(family, **{**SIZES, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    return directory


def load(directory: Path) -> nn.Module:
    with single_process("float32") as ranks:
        return load_policy_from(str(directory), ranks)


def load_for_rewards(directory: Path) -> nn.Module:
    args = SimpleNamespace(model=str(directory), activation_checkpointing=False, seed=0)
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


@pytest.mark.parametrize("family", TRAINED)
def test_a_family_is_trained(family: str, tmp_path: Path) -> None:
    """Nothing of the check at loading stays behind."""
    policy = load(save_model(family, tmp_path / family, **TRAINED[family]))
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert policy.lm.training
    assert policy.lm.config._attn_implementation == "spans"
    assert not policy.lm.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused(family: str, tmp_path: Path) -> None:
    message = refusal(save_model(family, tmp_path / family, **REFUSED[family]))
    assert "is not supported" in message


def test_a_reward_model_is_checked_by_its_rewards(tmp_path: Path) -> None:
    load_for_rewards(save_model("qwen3", tmp_path / "qwen3"))
    jamba = save_model("jamba", tmp_path / "jamba", **REFUSED["jamba"])
    with pytest.raises(UserError, match="JambaForSequenceClassification is not supported"):
        load_for_rewards(jamba)


@pytest.mark.parametrize("window", [1, 2, 7])
def test_a_window_shortens_the_rows_of_the_check(window: int, tmp_path: Path) -> None:
    """Within it, packed rows are exact."""
    load(save_model("mistral", tmp_path / "model", sliding_window=window))


@pytest.mark.parametrize("family", ["stablelm", "gemma2", "gpt_oss", "deepseek_v3", "nemotron", "cohere"])
def test_an_inner_error_stands_at_the_end(family: str, tmp_path: Path) -> None:
    """What packed rows cannot give comes first: the error itself says nothing to a user."""
    message = refusal(save_model(family, tmp_path / "model", **EXPERTS))
    beginning, _, inner_error = message.partition(f" is not supported; {NOT_IN_ROWS} (")
    assert beginning.endswith("ForCausalLM")
    assert inner_error.endswith(")")
    print(inner_error)


# ---------------------------------------------------------------- what is not a language model by itself


@pytest.mark.parametrize("base, name", [("org/base", "org/base"), (None, "another model")])
def test_an_adapter_is_refused(base: str | None, name: str, tmp_path: Path) -> None:
    tiny.make_tokenizer().save_pretrained(tmp_path)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError) as refused:
        load_tokenizer(str(tmp_path))
    remedy = "merge it into its base model first"
    assert str(refused.value) == f"model {tmp_path}: is a LoRA adapter of {name}; {remedy}"


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


VISION = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {"model_type": "gemma3_text", **SIZES}, "vision_config": VISION},
    "mistral3": {
        "text_config": {"model_type": "mistral", **SIZES},
        "vision_config": {"model_type": "pixtral", **VISION},
    },
    "qwen2_vl": {"text_config": {"model_type": "qwen2_vl_text", **SIZES}, "vision_config": {"depth": 1}},
    "qwen3_5": {"text_config": {"model_type": "qwen3_5_text", **SIZES, **DELTA_RULE}, "vision_config": {"depth": 1}},
}


def save_wrapper(wrapper: str, directory: Path) -> Path:
    """The configuration of a multimodal model, without weights, and a tokenizer."""
    config = AutoConfig.for_model(wrapper, **WRAPPERS[wrapper])
    config.save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_multimodal_model_is_refused(wrapper: str, tmp_path: Path) -> None:
    """Its sizes are those of its text part."""
    save_wrapper(wrapper, tmp_path)
    _, config = load_tokenizer(str(tmp_path), str(tmp_path))
    groups = Groups(torch.tensor([1, 2, 400]).int(), torch.tensor([[0, 1, 2, 3]]), torch.arange(1), {})
    with pytest.raises(UserError, match="the model embeds 400"):
        check_fit(groups, config, "rows.jsonl")

    message = refusal(tmp_path)
    text_type = WRAPPERS[wrapper]["text_config"]["model_type"]
    assert "is a multimodal model; its text part cannot be trained inside it" in message
    assert message.endswith(f"save that part as a {text_type} model first")


def test_a_run_from_a_multimodal_model_ends_with_one_line(tmp_path: Path) -> None:
    model = save_wrapper("gemma3", tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    tiny.make_rows(4, seed=2, path=rows, prompt_words=(1, 5), completion_words=(1, 5))
    process = tiny.start("algos/dpo.py", tmp_path / "out", model=model, train_data=rows, max_steps=1)
    assert process.wait(timeout=120) == 2
    log = tiny.read_log(tmp_path / "out")
    assert "is a multimodal model" in log
    assert "Traceback" not in log


# ---------------------------------------------------------------- mixtures of experts


@pytest.mark.parametrize("coefficient, lines", [(0.02, 2), (0.0, 0)])
def test_the_load_balancing_loss_is_said_to_be_left_out(
    coefficient: float, lines: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once for a policy that is trained, and once for a reward model."""
    model = save_model("mixtral", tmp_path / "model", **EXPERTS, router_aux_loss_coef=coefficient)
    args = SimpleNamespace(model=str(model), activation_checkpointing=False, seed=0)
    with single_process("float32") as ranks:
        load_policy(args, ranks)
        load_reward_model(args, ranks, tiny.make_tokenizer())
    printed = capsys.readouterr().out
    assert printed.count("its load-balancing loss (router_aux_loss_coef 0.02) is left out") == lines
    assert printed.count("load-balancing") == lines
