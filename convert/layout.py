"""The tensors of a DeepSeek-V4 model: official names, MLX module paths, shapes, kinds.

One description serves both ends: what a source must hold, and what the result is made of.
Everything follows from config.json; nothing here looks at a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlxsteer.convert.errors import ConvertError

KINDS = ("experts", "attention", "indexer", "shared", "embed", "head")
COMPRESS_RATIOS = (0, 4, 128)


@dataclass(frozen=True)
class Matrix:
    """A weight that a recipe may re-encode.

    `sources` are official names without suffix, one per piece of shape `[rows, cols]`: one per
    expert, or a single one. `stack` is the leading axis of the result (experts, or the groups of
    `wo_a`); 0 means the result is `[rows, cols]` itself.
    """

    path: str
    sources: tuple[str, ...]
    rows: int
    cols: int
    kind: str
    stack: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight in the model, unpacked."""
        if not self.stack:
            return (self.rows, self.cols)
        return (self.stack, self.rows * len(self.sources) // self.stack, self.cols)


@dataclass(frozen=True)
class Plain:
    """A tensor that no recipe touches: router, norms, hyper-connections, compressors."""

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str  # of the official checkpoint; other float types are kept as they are


@dataclass(frozen=True)
class Unit:
    """What goes into one output shard: the embedding, a layer, or the head with its norm."""

    name: str
    layer: int | None
    matrices: tuple[Matrix, ...]
    plains: tuple[Plain, ...]


@dataclass(frozen=True)
class Dims:
    """The sizes of a config.json, by the letters of the reference: see `dims`."""

    layers: int
    vocab: int
    hidden: int
    heads: int
    head_dim: int
    q_rank: int
    o_rank: int
    o_groups: int
    index_heads: int
    index_dim: int
    expert_width: int
    experts: int
    shared: int
    active: int
    hash_layers: int
    streams: int
    ratios: tuple[int, ...]


_CONFIG_KEYS = {
    "layers": "num_hidden_layers", "vocab": "vocab_size", "hidden": "hidden_size",
    "heads": "num_attention_heads", "head_dim": "head_dim", "q_rank": "q_lora_rank",
    "o_rank": "o_lora_rank", "o_groups": "o_groups", "index_heads": "index_n_heads",
    "index_dim": "index_head_dim", "expert_width": "moe_intermediate_size",
    "experts": "n_routed_experts", "shared": "n_shared_experts",
    "active": "num_experts_per_tok", "hash_layers": "num_hash_layers", "streams": "hc_mult",
}  # fmt: skip


def dims(config: Mapping[str, Any]) -> Dims:
    """The sizes in `config`. Raises ConvertError for a model this converter does not know."""
    refuse_other_models(config)
    missing = [key for key in _CONFIG_KEYS.values() if not isinstance(config.get(key), int)]
    if missing:
        raise ConvertError(
            f"config.json lacks {', '.join(missing)}. Take config.json from the official repo."
        )
    layers = config["num_hidden_layers"]
    ratios = config.get("compress_ratios")
    if not isinstance(ratios, list) or len(ratios) < layers:
        raise ConvertError(
            f"config.json must list compress_ratios for all {layers} layers: libraries disagree on"
            " a default. Take config.json from the official repo."
        )
    if unknown := sorted(set(map(str, ratios)) - set(map(str, COMPRESS_RATIOS))):
        raise ConvertError(
            f"config.json has compress ratio {', '.join(unknown)}; V4 knows 0, 4 and 128. This is"
            " another architecture, which mlxsteer cannot convert."
        )
    sizes = {field: config[key] for field, key in _CONFIG_KEYS.items()}
    return Dims(**sizes, ratios=tuple(ratios[:layers]))


def refuse_other_models(config: Mapping[str, Any]) -> None:
    """Raise ConvertError, with the model's name, for anything that is not a V4 text model."""
    kind = config.get("model_type")
    if kind == "deepseek_v41":
        what = "DeepSeek-V4.1, another architecture (engram tables, other hyper-connections)"
    elif config.get("vision_n_layers") or "vision_config" in config:
        what = "a V4 vision model; only text models are supported"
    elif kind != "deepseek_v4":
        what = f"a model of type {kind!r}"
    else:
        return
    raise ConvertError(
        f"This checkpoint is {what}. `mlxsteer convert` reads DeepSeek-V4-Flash and its variants;"
        " what mlx-lm runs needs no conversion: give it to --model directly."
    )


def model_layout(config: Mapping[str, Any]) -> tuple[Unit, ...]:
    """The units of the model in the order in which they are written."""
    size = dims(config)
    embed = Matrix("model.embed_tokens", ("embed",), size.vocab, size.hidden, "embed")
    return (
        Unit("embed", None, (embed,), ()),
        *(_layer(size, index) for index in range(size.layers)),
        _head(size),
    )


def mtp_layout(config: Mapping[str, Any]) -> Unit:
    """The draft block of the preview, `mtp.0`. Known so that sizes add up; never converted."""
    size = dims(config)
    block = _block(size, "mtp.0", "mtp.0", ratio=0, hashed=False)
    projections = tuple(
        Matrix(f"mtp.0.{name}", (f"mtp.0.{name}",), size.hidden, size.hidden, "attention")
        for name in ("e_proj", "h_proj")
    )
    norms = tuple(
        Plain(f"mtp.0.{name}.weight", f"mtp.0.{name}.weight", (size.hidden,), "BF16")
        for name in ("norm", "hnorm", "enorm")
    )
    plains = (*block.plains, *norms, *_hyper_head(size, "mtp.0.hc_head_", "mtp.0.hc_head."))
    return Unit("mtp.0", None, (*block.matrices, *projections), plains)


def _layer(size: Dims, index: int) -> Unit:
    hashed = index < size.hash_layers
    path = f"model.layers.{index}"
    unit = _block(size, f"layers.{index}", path, size.ratios[index], hashed)
    return Unit(unit.name, index, unit.matrices, unit.plains)


def _block(size: Dims, source: str, path: str, ratio: int, hashed: bool) -> Unit:
    matrices = (
        *_attention(size, source, path),
        *(_index_query(size, source, path) if ratio == 4 else ()),
        *_shared(size, source, path),
        *_experts(size, source, path),
    )
    plains = (
        *_norms_and_mixers(size, source, path),
        *_router(size, source, path, hashed),
        *(_compressors(size, source, path, ratio) if ratio else ()),
    )
    return Unit(source, None, tuple(matrices), tuple(plains))


def _attention(size: Dims, source: str, path: str) -> Iterator[Matrix]:
    wide = size.heads * size.head_dim
    groups, rank = size.o_groups, size.o_groups * size.o_rank
    for name, rows, cols, stack in (
        ("wq_a", size.q_rank, size.hidden, 0),
        ("wq_b", wide, size.q_rank, 0),
        ("wkv", size.head_dim, size.hidden, 0),
        ("wo_a", rank, wide // groups, groups),
        ("wo_b", size.hidden, rank, 0),
    ):
        yield Matrix(
            f"{path}.attn.{name}", (f"{source}.attn.{name}",), rows, cols, "attention", stack
        )


def _index_query(size: Dims, source: str, path: str) -> Iterator[Matrix]:
    rows = size.index_heads * size.index_dim
    name = "attn.indexer.wq_b"
    yield Matrix(f"{path}.{name}", (f"{source}.{name}",), rows, size.q_rank, "indexer")


_FFN = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))


def _ffn_shape(size: Dims, name: str, width: int) -> tuple[int, int]:
    return (size.hidden, width) if name == "w2" else (width, size.hidden)


def _shared(size: Dims, source: str, path: str) -> Iterator[Matrix]:
    for name, target in _FFN:
        rows, cols = _ffn_shape(size, name, size.expert_width * size.shared)
        official = f"{source}.ffn.shared_experts.{name}"
        yield Matrix(f"{path}.ffn.shared_experts.{target}", (official,), rows, cols, "shared")


def _experts(size: Dims, source: str, path: str) -> Iterator[Matrix]:
    for name, target in _FFN:
        rows, cols = _ffn_shape(size, name, size.expert_width)
        official = tuple(f"{source}.ffn.experts.{e}.{name}" for e in range(size.experts))
        target_path = f"{path}.ffn.switch_mlp.{target}"
        yield Matrix(target_path, official, rows, cols, "experts", stack=size.experts)


def _norms_and_mixers(size: Dims, source: str, path: str) -> Iterator[Plain]:
    for name in ("attn_norm", "ffn_norm"):
        yield Plain(f"{path}.{name}.weight", f"{source}.{name}.weight", (size.hidden,), "BF16")
    mixes = size.streams * (2 + size.streams)  # pre, post, and the mixing matrix
    for part in ("attn", "ffn"):
        for name, shape in (
            ("base", (mixes,)),
            ("fn", (mixes, size.streams * size.hidden)),
            ("scale", (3,)),
        ):
            yield Plain(f"{path}.{part}_hc.{name}", f"{source}.hc_{part}_{name}", shape, "F32")
    for name, shape, dtype in (
        ("attn.q_norm.weight", (size.q_rank,), "BF16"),
        ("attn.kv_norm.weight", (size.head_dim,), "BF16"),
        ("attn.attn_sink", (size.heads,), "F32"),
    ):
        yield Plain(f"{path}.{name}", f"{source}.{name}", shape, dtype)


def _router(size: Dims, source: str, path: str, hashed: bool) -> Iterator[Plain]:
    gate, target = f"{source}.ffn.gate", f"{path}.ffn.gate"
    yield Plain(f"{target}.weight", f"{gate}.weight", (size.experts, size.hidden), "BF16")
    if hashed:
        yield Plain(f"{target}.tid2eid", f"{gate}.tid2eid", (size.vocab, size.active), "I64")
    else:
        yield Plain(f"{target}.e_score_correction_bias", f"{gate}.bias", (size.experts,), "F32")


def _compressors(size: Dims, source: str, path: str, ratio: int) -> Iterator[Plain]:
    yield from _compressor(size, source, path, "attn.compressor", size.head_dim, ratio)
    if ratio == 4:
        name = "attn.indexer.weights_proj.weight"
        yield Plain(f"{path}.{name}", f"{source}.{name}", (size.index_heads, size.hidden), "BF16")
        yield from _compressor(size, source, path, "attn.indexer.compressor", size.index_dim, 4)


def _compressor(
    size: Dims, source: str, path: str, name: str, dim: int, ratio: int
) -> Iterator[Plain]:
    width = 2 * dim if ratio == 4 else dim  # ratio 4 overlaps: own window and the next
    for part, shape, dtype in (
        ("wkv.weight", (width, size.hidden), "BF16"),
        ("wgate.weight", (width, size.hidden), "BF16"),
        ("norm.weight", (dim,), "BF16"),
        ("ape", (ratio, width), "F32"),
    ):
        yield Plain(f"{path}.{name}.{part}", f"{source}.{name}.{part}", shape, dtype)


def _head(size: Dims) -> Unit:
    head = Matrix("lm_head", ("head",), size.vocab, size.hidden, "head")
    norm = Plain("model.norm.weight", "norm.weight", (size.hidden,), "BF16")
    return Unit("head", None, (head,), (norm, *_hyper_head(size, "hc_head_", "model.hc_head.")))


def _hyper_head(size: Dims, source: str, target: str) -> tuple[Plain, ...]:
    wide = size.streams * size.hidden
    shapes = (("fn", (size.streams, wide)), ("base", (size.streams,)), ("scale", (1,)))
    return tuple(Plain(target + n, source + n, shape, "F32") for n, shape in shapes)
