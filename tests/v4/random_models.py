"""Random checkpoints in official names, for comparisons with other implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.v4 import tiny

# Three shapes: all layer kinds, hash layers, top-k active, windows crossed.
SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {
        "num_hidden_layers": 4,
        "compress_ratios": [0, 4, 128, 4],
        "num_hash_layers": 1,
        "index_topk": 6,
    },
    "wide": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "head_dim": 48,
        "qk_rope_head_dim": 16,
        "o_groups": 3,
        "q_lora_rank": 24,
        "index_n_heads": 24,
        "index_head_dim": 32,
        "sliding_window": 16,
        "num_hidden_layers": 5,
        "compress_ratios": [128, 128, 4, 128, 4],
        "num_hash_layers": 2,
        "index_topk": 9,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.5,
        "activation_rounding": False,
    },
    "long_window": {
        "vocab_size": 96,
        "sliding_window": 128,
        "num_hidden_layers": 3,
        "compress_ratios": [4, 128, 0],
        "num_hash_layers": 0,
        "index_topk": 16,
        "swiglu_limit": 1.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 128,
            "beta_fast": 16,
            "beta_slow": 2,
        },
    },
}


def config(shape: str) -> dict[str, Any]:
    return tiny.config("tiny_fp32") | SHAPES[shape]


def write(folder: Path, shape: str, seed: int) -> Path:
    """A folder with config.json and model.safetensors of a random model."""
    values = config(shape)
    save_file(tensors(values, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def tensors(c: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """All tensors by official name (spec B.2), float32."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, by: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * by).astype(np.float32)

    def linear(out: int, inp: int) -> np.ndarray:
        return normal(out, inp, by=1.2 * inp**-0.5)

    def norm(n: int) -> np.ndarray:
        return 1 + normal(n, by=0.1)

    D, V = c["hidden_size"], c["vocab_size"]
    t = {"embed.weight": normal(V, D), "norm.weight": norm(D), "head.weight": linear(V, D)}
    t |= _hyper("hc_head_", 4, 1, D, normal)
    for layer in range(c["num_hidden_layers"]):
        p = f"layers.{layer}."
        t |= {p + "attn_norm.weight": norm(D), p + "ffn_norm.weight": norm(D)}
        t |= _hyper(p + "hc_attn_", 24, 3, D, normal) | _hyper(p + "hc_ffn_", 24, 3, D, normal)
        t |= {f"{p}attn.{k}": v for k, v in _attention(c, layer, linear, norm, normal).items()}
        t |= {f"{p}ffn.{k}": v for k, v in _ffn(c, layer, linear, normal, rng).items()}
    return t


def _hyper(prefix: str, out: int, scales: int, D: int, normal: Any) -> dict[str, np.ndarray]:
    return {
        prefix + "fn": normal(out, 4 * D, by=(4 * D) ** -0.5),
        prefix + "base": normal(out, by=0.5),
        prefix + "scale": 1 + normal(scales, by=0.2),
    }


def _attention(c: Any, layer: int, linear: Any, norm: Any, normal: Any) -> dict[str, np.ndarray]:
    D, H, d, q = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
    G, o, m, i = c["o_groups"], c["o_lora_rank"], c["compress_ratios"][layer], c["index_head_dim"]
    t = {
        "attn_sink": normal(H),
        "q_norm.weight": norm(q),
        "kv_norm.weight": norm(d),
        "wq_a.weight": linear(q, D),
        "wq_b.weight": linear(H * d, q),
        "wkv.weight": linear(d, D),
        "wo_a.weight": linear(G * o, H * d // G),
        "wo_b.weight": linear(D, G * o),
    }
    if m:
        t |= _compressor("compressor.", d, m, D, linear, norm, normal)
    if m == 4:
        t |= _compressor("indexer.compressor.", i, m, D, linear, norm, normal)
        t["indexer.wq_b.weight"] = linear(c["index_n_heads"] * i, q)
        t["indexer.weights_proj.weight"] = linear(c["index_n_heads"], D)
    return t


def _compressor(p: str, w: int, m: int, D: int, linear: Any, norm: Any, normal: Any) -> Any:
    C = 2 * w if m == 4 else w
    return {
        p + "wkv.weight": linear(C, D),
        p + "wgate.weight": linear(C, D),
        p + "norm.weight": norm(w),
        p + "ape": normal(m, C),
    }


def _ffn(c: Any, layer: int, linear: Any, normal: Any, rng: Any) -> dict[str, np.ndarray]:
    D, I, E, k = (
        c["hidden_size"],
        c["moe_intermediate_size"],
        c["n_routed_experts"],
        c["num_experts_per_tok"],
    )
    t = {"gate.weight": linear(E, D)}
    if layer < c["num_hash_layers"]:
        ids = [rng.permutation(E)[:k] for _ in range(c["vocab_size"])]
        t["gate.tid2eid"] = np.stack(ids).astype(np.int64)
    else:
        t["gate.bias"] = normal(E, by=0.2)
    for name in ["shared_experts", *(f"experts.{e}" for e in range(E))]:
        t |= {f"{name}.w1.weight": linear(I, D), f"{name}.w3.weight": linear(I, D)}
        t[f"{name}.w2.weight"] = linear(D, I)
    return t
