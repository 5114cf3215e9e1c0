"""The activation rounding that the model was trained with (spec C.8, points 2 and 3).

kv rows pass through e4m3 in blocks of 64 with power-of-two scales; index queries and keys are
turned by a Hadamard matrix and pass through e2m1 in blocks of 32. Everything in float32; each
function is one group of operations that a kernel could replace.
"""

from __future__ import annotations

import mlx.core as mx

from mlxsteer.models.deepseek_v4.config import INDEX_ROUNDING_BLOCK, KV_ROUNDING_BLOCK

_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
_MANTISSA = 0x7FFFFF
_EXPONENT = 0x7F800000


def power_of_two_above(x: mx.array) -> mx.array:
    """The least power of two that is at least `x`, for positive normal float32 `x`; exact."""
    bits = x.view(mx.uint32)
    return ((bits + _MANTISSA) & _EXPONENT).view(mx.float32)


def _blocks(x: mx.array, block: int, largest: float, floor: float) -> tuple[mx.array, mx.array]:
    """`x` [..., n*block] in blocks [..., n, block], divided by its scales, and the scales."""
    x = mx.unflatten(x.astype(mx.float32), -1, (-1, block))
    amax = mx.maximum(mx.max(mx.abs(x), axis=-1, keepdims=True), floor)
    scale = power_of_two_above(amax * (1.0 / largest))
    return x / scale, scale


def round_e4m3(x: mx.array) -> mx.array:
    """Nearest values of e4m3 times power-of-two scales per 64 of the last axis, float32."""
    y, scale = _blocks(x, KV_ROUNDING_BLOCK, _E4M3_MAX, 1e-4)
    y = mx.from_fp8(mx.to_fp8(y), dtype=mx.float32)
    return mx.flatten(y * scale, -2, -1)


def round_e2m1(x: mx.array) -> mx.array:
    """Nearest values of e2m1 (ties to even codes) times power-of-two scales per 32, float32."""
    y, scale = _blocks(x, INDEX_ROUNDING_BLOCK, _E2M1_MAX, _E2M1_MAX * 2.0**-126)
    y = mx.clip(y, -_E2M1_MAX, _E2M1_MAX)
    size = mx.abs(y)
    step = mx.where(size < 2.0, 0.5, mx.where(size < 4.0, 1.0, 2.0))
    return mx.flatten(mx.round(y / step) * step * scale, -2, -1)


def round_kv(rows: mx.array, nope: int) -> mx.array:
    """A kv row [..., d] after RoPE: its first `nope` dims through e4m3, the rest as they are."""
    rounded = round_e4m3(rows[..., :nope]).astype(rows.dtype)
    return mx.concatenate([rounded, rows[..., nope:]], axis=-1)


def round_index(x: mx.array) -> mx.array:
    """An index query or key [..., c] after RoPE: Hadamard of order c, then e2m1."""
    turned = mx.hadamard_transform(x.astype(mx.float32), scale=x.shape[-1] ** -0.5)
    return round_e2m1(turned).astype(x.dtype)
