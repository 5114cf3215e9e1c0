"""Names and layouts of checkpoints: official, transformers-style prefixes, mlx-community.

`sanitize` brings any of them to this module's parameter names (spec B.7). Official FP8 and FP4
tensors keep their bits: codes are viewed as words, scales are repeated per group of 32 (B.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import mlx.core as mx

from mlxsteer.models.deepseek_v4.config import ModelArgs

FP8_BLOCK, GROUP = 128, 32

_TOP = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "hc_head_fn": "model.hc_head.fn",
    "hc_head_base": "model.hc_head.base",
    "hc_head_scale": "model.hc_head.scale",
}
_PROJ = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"(.*\.ffn)\.experts\.(\d+)\.(\w+)\.(\w+)$")
_FLOAT32 = re.compile(
    r"\.(ffn\.gate|compressor\.wkv|compressor\.wgate|indexer\.weights_proj)\.weight$"
)


def official_name(key: str) -> str:
    """This module's name of an official tensor (spec B.7); other names come back as they are."""
    key = key.removeprefix("language_model.")
    stem, dot, last = key.rpartition(".")
    if key in _TOP:
        return _TOP[key]
    if stem in _TOP:
        return f"{_TOP[stem]}{dot}{last}"
    if key.startswith("layers."):
        key = f"model.{key}"
    key = re.sub(r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2", key)
    key = re.sub(r"\.ffn\.gate\.bias$", ".ffn.gate.e_score_correction_bias", key)
    return re.sub(
        r"\.(shared_experts|experts\.\d+)\.(w[123])\.",
        lambda found: f".{found[1]}.{_PROJ[found[2]]}.",
        key,
    )


def sanitize(
    args: ModelArgs, weights: Mapping[str, mx.array]
) -> tuple[dict[str, mx.array], set[str]]:
    """Parameters by this module's names, and the paths that came as official FP8 or FP4.

    Draft blocks (`mtp.*`) and layers beyond the model's are left out.
    """
    named = {official_name(k): v for k, v in weights.items() if not _is_draft(args, k)}
    packed = _pack(named)
    _stack_experts(named, args.n_routed_experts)
    packed = {_stacked_path(path) for path in packed}
    return {key: _laid_out(args, key, value) for key, value in named.items()}, packed


def _laid_out(args: ModelArgs, key: str, value: mx.array) -> mx.array:
    """One tensor in the shape and type that the module works with."""
    if ".attn.wo_a." in key and value.ndim == 2:
        return value.reshape(args.o_groups, args.o_lora_rank, -1)
    if key.endswith(".tid2eid"):
        return value.astype(mx.int32)
    if _FLOAT32.search(key) and mx.issubdtype(value.dtype, mx.floating):
        return value.astype(mx.float32)
    return value


def _is_draft(args: ModelArgs, key: str) -> bool:
    found = re.match(r"(?:language_model\.)?(?:model\.)?(?:mtp\.|layers\.(\d+)\.)", key)
    return found is not None and (not found[1] or int(found[1]) >= args.num_hidden_layers)


def _pack(named: dict[str, mx.array]) -> set[str]:
    """Bring official `X.weight` + `X.scale` pairs to MLX's packed layout, in place."""
    paths = {k.removesuffix(".scale") for k in named if k.endswith(".scale")}
    paths = {p for p in paths if f"{p}.weight" in named}
    for path in paths:
        weight, scale = named[f"{path}.weight"], named.pop(f"{path}.scale")
        layout: Callable[[mx.array], mx.array] = _fp8_scales
        if weight.dtype == mx.int8 or weight.shape[-1] * 2 == scale.shape[-1] * GROUP:
            layout = _fp4_scales
        named[f"{path}.weight"] = weight.view(mx.uint32)
        named[f"{path}.scales"] = layout(scale)
    return paths


def _fp4_scales(scale: mx.array) -> mx.array:
    return scale.view(mx.uint8)


def _fp8_scales(scale: mx.array) -> mx.array:
    """One byte per 128x128 block -> one per row and group of 32."""
    return mx.repeat(mx.repeat(scale.view(mx.uint8), FP8_BLOCK // GROUP, 1), FP8_BLOCK, 0)


def _stacked_path(path: str) -> str:
    return re.sub(r"\.experts\.\d+\.", ".switch_mlp.", path)


def _stack_experts(named: dict[str, mx.array], E: int) -> None:
    """Join `experts.E.X.*` into `switch_mlp.X.*` [E, ...], in place."""
    groups: dict[tuple[str, str, str], dict[int, mx.array]] = {}
    for key in [k for k in named if _EXPERT.match(k)]:
        found = _EXPERT.match(key)
        assert found is not None
        ffn, e, proj, kind = found.groups()
        groups.setdefault((ffn, proj, kind), {})[int(e)] = named.pop(key)
    for (ffn, proj, kind), experts in groups.items():
        if len(experts) == E:  # otherwise the loader reports the missing tensor by name
            stacked = mx.stack([experts[e] for e in range(E)])
            named[f"{ffn}.switch_mlp.{proj}.{kind}"] = stacked
