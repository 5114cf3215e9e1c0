"""Checkpoints in the official layout at any size: real names, random codes, one file per layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlxsteer.convert.layout import model_layout, mtp_layout
from mlxsteer.convert.real_model import CONFIG, official_tensors

Tensor = tuple[str, str, tuple[int, ...]]
Rewrite = Callable[[list[Tensor]], list[Tensor]]

SIZES = {
    "BF16": 2, "F32": 4, "I64": 8, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "F16": 2,
}  # fmt: skip


def config(**changes: Any) -> dict[str, Any]:
    """The real 43 layers, narrow: a layer has some 200 KB."""
    narrow = {
        "vocab_size": 256, "hidden_size": 128, "num_attention_heads": 2, "head_dim": 64,
        "q_lora_rank": 128, "o_lora_rank": 128, "o_groups": 1, "index_n_heads": 2,
        "index_head_dim": 64, "moe_intermediate_size": 128, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    return {**CONFIG, **narrow, **changes}


def small_config(**changes: Any) -> dict[str, Any]:
    """Three layers: a window-only hash layer, and one of either ratio."""
    three = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}
    return config(**{**three, **changes})


def write(folder: Path, settings: dict[str, Any], rewrite: Rewrite = list, seed: int = 0) -> Path:
    """Write a checkpoint, the draft block included; `rewrite` changes a shard's tensor list."""
    folder.mkdir(parents=True)
    units = (*model_layout(settings), mtp_layout(settings))
    weight_map: dict[str, str] = {}
    random = np.random.default_rng(seed)
    for number, unit in enumerate(units, start=1):
        shard = f"model-{number:05d}-of-{len(units):05d}.safetensors"
        tensors = rewrite(list(official_tensors(unit)))
        weight_map |= {name: shard for name, _, _ in tensors}
        write_shard(folder / shard, tensors, random)
    (folder / "config.json").write_text(json.dumps(settings))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def write_shard(path: Path, tensors: Iterable[Tensor], random: np.random.Generator) -> None:
    header: dict[str, object] = {}
    chunks: list[bytes] = []
    position = 0
    for name, dtype, shape in tensors:
        data = values(dtype, shape, random)
        end = position + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        chunks.append(data)
        position = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def values(dtype: str, shape: tuple[int, ...], random: np.random.Generator) -> bytes:
    """Random data that a trained checkpoint could hold: no NaN, scales near 2^-5."""
    count = prod(shape)
    if dtype == "F8_E8M0":
        return random.integers(118, 124, count, np.uint8).tobytes()
    if dtype == "F8_E4M3":
        codes = random.integers(0, 0x7F, count, np.uint8)
        return (codes | (random.integers(0, 2, count, np.uint8) << 7)).tobytes()
    if dtype == "I8":
        return random.integers(0, 256, count, np.uint8).tobytes()
    if dtype == "I64":
        return random.integers(0, 4, count, np.int64).tobytes()
    floats = random.standard_normal(count, np.float32)
    if dtype == "BF16":
        return (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    scales = np.abs(floats) * 0.01 + 0.001  # as good as any for a float32 tensor
    return scales.astype(np.float16 if dtype == "F16" else np.float32).tobytes()


def float32_scales(tensors: list[Tensor]) -> list[Tensor]:
    """As the Base model: FP8 experts, every scale float32."""
    return [_base(*tensor) for tensor in tensors]


def _base(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    if ".experts." in name:
        return fp8_expert(name, "F32", shape)
    return (name, "F32" if dtype == "F8_E8M0" else dtype, shape)


def fp8_experts(tensors: list[Tensor]) -> list[Tensor]:
    """As community repacks: FP8 experts with E8M0 scales."""
    return [fp8_expert(n, "F8_E8M0", s) if ".experts." in n else (n, d, s) for n, d, s in tensors]


def fp8_expert(name: str, scale: str, shape: tuple[int, ...]) -> Tensor:
    rows, cols = shape
    if name.endswith(".weight"):
        return (name, "F8_E4M3", (rows, cols * 2))
    return (name, scale, (-(-rows // 128), -(-cols * 32 // 128)))
