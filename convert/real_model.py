"""The published DeepSeek-V4-Flash, known without its weights: sizes can be told offline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxsteer.convert.checkpoint import Checkpoint, ShardFile
from mlxsteer.convert.headers import TensorEntry
from mlxsteer.convert.layout import Matrix, Unit, model_layout, mtp_layout

REPO = "deepseek-ai/DeepSeek-V4-Flash"

# The keys of the published config.json that decide shapes.
CONFIG: Mapping[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "hc_mult": 4,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
}


def real_checkpoint() -> Checkpoint:
    """The published checkpoint as its headers describe it (spec B.1); it has no files to read."""
    return official_checkpoint(CONFIG, REPO)


def official_checkpoint(config: Mapping[str, Any], name: str) -> Checkpoint:
    """A checkpoint in the official formats and sharding for `config`, headers only."""
    units = (*model_layout(config), mtp_layout(config))
    tensors: dict[str, TensorEntry] = {}
    shards = {}
    for number, unit in enumerate(units, start=1):
        shard = f"model-{number:05d}-of-{len(units):05d}.safetensors"
        position = 0
        for tensor, dtype, shape in official_tensors(unit):
            entry = TensorEntry(tensor, dtype, shape, shard, position)
            tensors[tensor] = entry
            position += entry.nbytes
        shards[shard] = ShardFile(shard, position)
    return Checkpoint(name, config, tensors, shards, weights_are_here=False)


def official_tensors(unit: Unit) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """`(name, dtype, shape)` of every official tensor of a unit (spec B.2)."""
    for plain in unit.plains:
        yield plain.source, plain.dtype, plain.shape
    for matrix in unit.matrices:
        for source in matrix.sources:
            yield from _official_matrix(matrix, source)


def _official_matrix(matrix: Matrix, source: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    rows, cols = matrix.rows, matrix.cols
    if matrix.kind in ("embed", "head"):
        yield f"{source}.weight", "BF16", (rows, cols)
    elif matrix.kind == "experts":
        yield f"{source}.weight", "I8", (rows, cols // 2)
        yield f"{source}.scale", "F8_E8M0", (rows, cols // 32)
    else:
        yield f"{source}.weight", "F8_E4M3", (rows, cols)
        yield f"{source}.scale", "F8_E8M0", (-(-rows // 128), -(-cols // 128))
