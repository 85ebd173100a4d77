"""Tiny random models of many families of transformers, and of multimodal models around them."""

from pathlib import Path
from typing import Any

import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

Settings = dict[str, Any]

SIZES: Settings = {
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
EXPERTS: Settings = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
DELTA_RULE: Settings = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
STATE_SPACE: Settings = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
}
MAMBA: Settings = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}
LATENT: Settings = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
WINDOW = 16  # of the windowed models; the longest rows of the tests have several times as many tokens
EVERY_WINDOW: Settings = {"sliding_window": WINDOW}
ONE_WINDOW: Settings = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, Settings] = {
    "apertus": {},
    "arcee": {},
    "bamba": {**STATE_SPACE, "attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "rotary_dim": 8},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {**ONE_WINDOW, "logit_scale": 0.3},
    "cwm": ONE_WINDOW,
    "deepseek_v2": {**EXPERTS, **LATENT, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "deepseek_v3": {**EXPERTS, **LATENT, "first_k_dense_replace": 1},
    "diffllama": {},
    "ernie4_5": {},
    "exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "falcon": {"alibi": False, "head_dim": None},
    "falcon_h1": STATE_SPACE,
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": ONE_WINDOW,
    "gemma4_text": {**ONE_WINDOW, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 3.0},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_neox": {},
    "gpt_oss": {**EXPERTS, "sliding_window": WINDOW},
    "gptj": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    "granitemoe": {**EXPERTS, "logits_scaling": 4.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "jetmoe": {**EXPERTS, "kv_channels": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "mamba": {"state_size": 8},
    "mamba2": MAMBA,
    "minicpm3": {**LATENT, "scale_emb": 1.0},
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "minimax_m2": EXPERTS,
    "ministral": ONE_WINDOW,
    "ministral3": {},
    "mistral": EVERY_WINDOW,
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "nanochat": {"final_logit_softcapping": 3.0},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "use_mamba_kernels": False,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": ONE_WINDOW,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": EVERY_WINDOW,
    "phimoe": EXPERTS,
    "qwen2": {**ONE_WINDOW, "use_sliding_window": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_5_text": DELTA_RULE,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**DELTA_RULE, **EXPERTS, "shared_expert_intermediate_size": 32},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1, "lru_width": 32},
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": EVERY_WINDOW,
    "vaultgemma": {},
}

VISION: Settings = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION: Settings = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
SECTIONS: Settings = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
MULTIMODAL: dict[str, tuple[Settings, Settings]] = {  # the settings of the text part and of the vision part
    "gemma3": ({"model_type": "gemma3_text", **ONE_WINDOW}, VISION),
    "gemma4": (
        {"model_type": "gemma4_text", **ONE_WINDOW, "hidden_size_per_layer_input": 0},
        {**VISION, "head_dim": 16},
    ),
    "internvl": ({"model_type": "qwen2"}, {**VISION, "image_size": [16, 16], "patch_size": [8, 8]}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **VISION, "projection_dim": 32}),
    "mistral3": ({"model_type": "mistral", **EVERY_WINDOW}, {"model_type": "pixtral", **VISION, "head_dim": 16}),
    "paligemma": ({"model_type": "gemma"}, {"model_type": "siglip_vision_model", **VISION}),
    "qwen2_5_vl": ({"model_type": "qwen2_5_vl_text", **SECTIONS}, QWEN_VISION),
    "qwen3_5": ({"model_type": "qwen3_5_text", **DELTA_RULE}, QWEN_VISION),
    "qwen3_vl": (
        {"model_type": "qwen3_vl_text", **SECTIONS},
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "smolvlm": ({"model_type": "llama"}, VISION),
}


def config_of(family: str, **overrides: object) -> Any:
    """The configuration of a tiny model."""
    if family in MULTIMODAL:
        text, vision = MULTIMODAL[family]
        options = {"mm_tokens_per_image": 4, "projection_dim": 32, "audio_config": None, **overrides}
        return AutoConfig.for_model(family, text_config={**SIZES, **text}, vision_config=vision, **options)
    settings = {**SIZES, **FAMILIES[family], **overrides}
    if settings["head_dim"] is None:
        del settings["head_dim"]
    return AutoConfig.for_model(family, **settings)


def save_model(family: str, directory: Path, scale: float = 1.0, **overrides: object) -> Path:
    """A random model and its tokenizer.

    Its weights are `scale` times transformers' own initial ones. With another scale than 1, biases and norms are
    perturbed as well, since zero biases and unit norms would hide mistakes. A vision part is in bfloat16.
    """
    auto_class = AutoModelForCausalLM
    if family in MULTIMODAL:
        auto_class = AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class.from_config(config_of(family, **overrides))
        if scale != 1:
            _enlarge(model, scale)
    if family in MULTIMODAL:
        model.to(torch.bfloat16)
    model.save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    return directory


def _enlarge(model: nn.Module, scale: float) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data *= scale
