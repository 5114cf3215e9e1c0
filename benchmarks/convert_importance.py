"""Does measuring importance help the 2-bit recipes? One table, about a minute on a CPU.

    python benchmarks/convert_importance.py

A random-weight DeepSeek-V4 whose activations look like a trained model's: the embedding is low
rank plus a few outlier channels, which the norms amplify like those of trained models. It is
converted with q2 plainly, and with importance measured on other tokens than those it is judged on.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, RANK, OUTLIERS = 256, 12, 6

SETTINGS: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 512, "hidden_size": HIDDEN,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128,
    "qk_rope_head_dim": 64, "q_lora_rank": 128, "o_lora_rank": 128, "o_groups": 2,
    "index_n_heads": 16, "index_head_dim": 128, "index_topk": 64, "sliding_window": 16,
    "moe_intermediate_size": 256, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "num_hash_layers": 1, "hc_mult": 4, "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000, "compress_rope_theta": 160000,
    "compress_ratios": [0, 0, 4, 0], "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16,
                     "original_max_position_embeddings": 64, "type": "yarn"},
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Errors of a recipe: of the experts' weights, and of the logits on held-out tokens."""

    recipe: str
    weights: float
    logits: float


def write_model(folder: Path) -> Path:
    """The official layout with dense bf16 matrices, so that quantising is all that errs."""
    from mlxsteer.convert.layout import model_layout
    from mlxsteer.convert.real_model import official_tensors

    random = np.random.default_rng(0)
    header: dict[str, object] = {}
    chunks, position = [], 0
    for unit in model_layout(SETTINGS):
        for name, dtype, shape in official_tensors(unit):
            if name.endswith(".scale"):
                continue
            if dtype == "I8":
                shape = (shape[0], shape[1] * 2)
            dtype = dtype if dtype in ("F32", "I64") else "BF16"
            data = as_bytes(values(name, shape, random), dtype)
            end = position + len(data)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            chunks.append(data)
            position = end
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    body = len(text).to_bytes(8, "little") + text + b"".join(chunks)
    (folder / "model.safetensors").write_bytes(body)
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return folder


def values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Weights by what they are: see the module's first lines."""
    if name.endswith("tid2eid"):
        return random.integers(0, SETTINGS["n_routed_experts"], shape)
    if name == "embed.weight":
        low = random.standard_normal((shape[0], RANK)) @ random.standard_normal((RANK, shape[1]))
        low[:, :OUTLIERS] *= 8
        return low / np.sqrt(RANK) + 0.1 * random.standard_normal(shape)
    if "norm" in name:
        gains = np.exp(0.6 * random.standard_normal(shape))
        gains[:OUTLIERS] *= 4
        return gains
    if name.endswith(("_base", "_scale", "ape", "bias", "attn_sink")):
        return 0.1 * random.standard_normal(shape)
    return random.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else prod(shape))


def as_bytes(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "I64":
        return array.astype("<i8").tobytes()
    floats = array.astype("<f4")
    if dtype == "BF16":
        return (floats.view("<u4") >> 16).astype("<u2").tobytes()
    return floats.tobytes()


def measure(folder: Path) -> list[Row]:
    """Plain and calibrated q2, judged on tokens that calibration did not see."""
    from mlxsteer.convert.collect import collect
    from mlxsteer.convert.importance import load_importance, save_importance
    from mlxsteer.convert.plan import make_plan
    from mlxsteer.convert.recipes import RECIPES
    from mlxsteer.convert.run import convert
    from mlxsteer.convert.sources import LocalSource

    source = LocalSource(write_model(folder / "source"))
    plans = {name: make_plan(source.checkpoint, RECIPES[name]) for name in ("lossless", "q2")}
    convert(source, plans["lossless"], folder / "whole")
    random = np.random.default_rng(1)
    texts = [random.integers(0, 512, 128).tolist() for _ in range(12)]
    moments, tokens = collect(folder / "whole", texts[:8])
    save_importance(folder / "importance.safetensors", moments, tokens, "random")
    importance = load_importance(folder / "importance.safetensors", plans["q2"])
    expected = logits(folder / "whole", texts[8:])
    rows = []
    for name, weights in (("q2", None), ("q2, calibrated", importance)):
        result = convert(source, plans["q2"], folder / name, importance=weights)
        error = logits(folder / name, texts[8:]) - expected
        relative = float(np.sqrt((error**2).mean() / (expected**2).mean()))
        rows.append(Row(name, result.errors["experts"]["error"], relative))
    return rows


def logits(folder: Path, texts: list[list[int]]) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    from mlxsteer.models.deepseek_v4 import Model, ModelArgs

    model, _ = load_model(folder, get_model_classes=lambda config: (Model, ModelArgs))
    model.set_dtype(mx.float32)
    return np.concatenate([np.array(model(mx.array([text]))[0]) for text in texts])


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        rows = measure(Path(place))
    print(f"{'recipe':16} {'expert weights, weighted':>26} {'logits':>10}")
    for row in rows:
        print(f"{row.recipe:16} {100 * row.weights:25.1f}% {100 * row.logits:9.1f}%")


if __name__ == "__main__":
    main()
