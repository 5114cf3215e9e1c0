"""Tiny random float32 models of mlx-lm's decoder families, made in a few milliseconds.

Each is a real mlx-lm model of that family with a small config; two calls with the same family
and seed give models of equal weights, so one can stay unhooked beside the other.
"""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxsteer.fitting import ModelShape
from mlxsteer.grammar import parse
from mlxsteer.models.hooks import Hooks
from mlxsteer.plan import Plan, build
from mlxsteer.vector import SteeringVector

VOCABULARY = 64
HIDDEN = 32

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
_QWEN3_NEXT: dict[str, Any] = {
    **_MOE,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 16,
    "partial_rotary_factor": 0.5,
    "full_attention_interval": 2,
}
_DEEPSEEK_V3: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_MAMBA2: dict[str, Any] = {
    "num_heads": 4,
    "head_dim": 16,
    "intermediate_size": 64,
    "state_size": 8,
    "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4,
    "n_groups": 2,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": (0.0, 100.0),
    "time_step_rank": "auto",
}
_NEMOTRON_H: dict[str, Any] = {
    "attention_bias": False,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_proj_bias": False,
    "ssm_state_size": 8,
    "conv_kernel": 4,
    "n_groups": 2,
    "time_step_limit": (0.0, 100.0),
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "hybrid_override_pattern": ["M", "-", "*", "-"],
}
_GEMMA3N_TEXT: dict[str, Any] = {
    **_COMMON,
    "model_type": "gemma3n_text",
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "sliding_window": 16,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 4,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}

# What each family's config has beside _COMMON.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": _MOE,
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "mistral3": {"text_config": {**_COMMON, "model_type": "llama"}},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "phi3": {},
    "deepseek_v3": _DEEPSEEK_V3,
    "qwen3_next": _QWEN3_NEXT,
    "gemma2": {},
    "olmo2": {},
    "cohere": {},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.35,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mamba2": _MAMBA2,
    "nemotron_h": _NEMOTRON_H,
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": HIDDEN,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    },
    "hunyuan": {
        "attention_bias": False,
        "moe_topk": 1,
        "num_experts": 1,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": False,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "rwkv7": {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "gptj": {
        "n_ctx": 64,
        "n_embd": HIDDEN,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "layer_norm_epsilon": 1e-5,
    },
    "gemma3n": {"text_config": _GEMMA3N_TEXT},
    "iquestloopcoder": {},
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """The tiny config of `family`."""
    return {**_COMMON, "model_type": family, **CONFIGS[family], **changes}


def tiny_model(
    family: str, seed: int = 0, dtype: mx.Dtype = mx.float32, **changes: Any
) -> nn.Module:
    """A random model of `family`; `changes` are fields of its config."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(seed)  # some families draw their decay rates when they are made
    model = module.Model(module.ModelArgs.from_dict(config_of(family, **changes)))
    key = mx.random.key(seed)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        weights.append((name, _random(name, array, own).astype(dtype)))
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


def tiny_tokens(rows: int, length: int, seed: int = 0) -> mx.array:
    """Random token ids [rows, length]."""
    return mx.random.randint(0, VOCABULARY, (rows, length), key=mx.random.key(seed))


def _random(name: str, array: mx.array, key: mx.array) -> mx.array:
    noise = mx.random.normal(array.shape, key=key)
    if "embed" in name:
        return noise
    if array.ndim == 1:  # norms, biases and gates stay near what they were made as
        return array + 0.1 * noise
    return noise * (2.0 / array.shape[-1]) ** 0.5


def tiny_shape(hooks: Hooks) -> ModelShape:
    """The shape of a tiny model; every median residual norm is 1."""
    return ModelShape(
        label=f"tiny {hooks.architecture}",
        n_layers=hooks.n_layers,
        d_model=HIDDEN,
        residual_norm=lambda: np.ones(hooks.n_layers, np.float32),
        stamp={"architecture": hooks.architecture},
    )


def tiny_plan(hooks: Hooks, *terms: tuple[str, SteeringVector]) -> Plan:
    """The plan of (amount, vector) pairs; an amount is what follows the name: `3`, `1r@all`."""
    pairs = [(parse(f"v:{amount}")[0], vector) for amount, vector in terms]
    return build(pairs, tiny_shape(hooks))


def random_vector(seed: int, n_layers: int = 4, **fields: Any) -> SteeringVector:
    """A vector with another random direction, of length near √D, at every layer."""
    rng = np.random.default_rng(seed)
    arrays = {layer: rng.normal(size=HIDDEN) for layer in range(n_layers)}
    return SteeringVector.from_arrays(arrays, n_layers=n_layers, name=f"random{seed}", **fields)
