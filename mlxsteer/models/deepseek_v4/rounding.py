"""The activation rounding that the model was trained with (spec C.8, points 2 and 3).

kv rows pass through e4m3 in blocks of 64 with power-of-two scales; index queries and keys are
turned by a Hadamard matrix and pass through e2m1 in blocks of 32. Everything in float32; each
function is one group of operations that a kernel could replace.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxsteer.models.deepseek_v4 import kernels, row_kernels
from mlxsteer.models.deepseek_v4.config import INDEX_ROUNDING_BLOCK, KV_ROUNDING_BLOCK
from mlxsteer.models.deepseek_v4.fusing import counting, fused

_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
_MANTISSA = 0x7FFFFF
_EXPONENT = 0x7F800000


def power_of_two_above(x: mx.array) -> mx.array:
    """The least power of two that is at least `x`, for positive normal float32 `x`; exact."""
    bits = x.view(mx.uint32)
    return ((bits + _MANTISSA) & _EXPONENT).view(mx.float32)


def _blocks(x: mx.array, block: int) -> tuple[mx.array, mx.array]:
    """`x` [..., n*block] as blocks [..., n, block], and the largest size in each [..., n, 1]."""
    x = mx.unflatten(x, -1, (-1, block))
    return x, mx.max(mx.abs(x), axis=-1, keepdims=True)


@fused
def to_e4m3(x: mx.array, amax: mx.array) -> mx.array:
    """The nearest values of e4m3 (ties to even) times a power of two that fits `amax`."""
    scale = power_of_two_above(mx.maximum(amax, 1e-4) * (1.0 / _E4M3_MAX))
    y = x / scale
    # 8 steps per power of two, and even steps of 2^-9 below 2^-6
    power = (mx.maximum(mx.abs(y), 2.0**-6).view(mx.uint32) & _EXPONENT).view(mx.float32)
    step = power * 0.125
    return mx.round(y / step) * step * scale


@fused
def to_e2m1(x: mx.array, amax: mx.array) -> mx.array:
    """The nearest values of e2m1 (ties to even codes) times a power of two that fits `amax`."""
    scale = power_of_two_above(mx.maximum(amax, _E2M1_MAX * 2.0**-126) * (1.0 / _E2M1_MAX))
    y = mx.clip(x / scale, -_E2M1_MAX, _E2M1_MAX)
    size = mx.abs(y)
    step = mx.where(size < 2.0, 0.5, mx.where(size < 4.0, 1.0, 2.0))
    return mx.round(y / step) * step * scale


def round_e4m3(x: mx.array) -> mx.array:
    """`to_e4m3` per 64 of the last axis, float32."""
    return mx.flatten(to_e4m3(*_blocks(x.astype(mx.float32), KV_ROUNDING_BLOCK)), -2, -1)


def _sample() -> tuple[Any, ...]:
    return mx.random.normal((3, 64), key=mx.random.key(4)), mx.float32


@kernels.twin(row_kernels.round_e2m1, _sample)
def round_e2m1(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """`to_e2m1` per 32 of the last axis. x float32."""
    return mx.flatten(to_e2m1(*_blocks(x, INDEX_ROUNDING_BLOCK)), -2, -1).astype(dtype)


def round_kv(rows: mx.array, nope: int, dtype: mx.Dtype) -> mx.array:
    """A kv row [..., d] after RoPE: its first `nope` dims through e4m3, the rest as they are."""
    d = rows.shape[-1]
    if d % KV_ROUNDING_BLOCK:
        rounded = round_e4m3(rows[..., :nope])
        rows = mx.concatenate([rounded, rows[..., nope:].astype(mx.float32)], axis=-1)
        return rows.astype(dtype)
    x, amax = _blocks(rows.astype(mx.float32), KV_ROUNDING_BLOCK)
    block = counting(d // KV_ROUNDING_BLOCK)[:, None]
    return mx.flatten(_head_rounded(x, amax, block, nope // KV_ROUNDING_BLOCK, dtype), -2, -1)


@fused
def _head_rounded(
    x: mx.array, amax: mx.array, block: mx.array, n: int, dtype: mx.Dtype
) -> mx.array:
    """`to_e4m3` for the first n blocks; the others as they are."""
    return mx.where(block < n, to_e4m3(x, amax), x).astype(dtype)


def round_index(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """An index query or key [..., c] after RoPE: Hadamard of order c, then e2m1."""
    turned = mx.hadamard_transform(x.astype(mx.float32), scale=x.shape[-1] ** -0.5)
    return round_e2m1(turned, dtype)
