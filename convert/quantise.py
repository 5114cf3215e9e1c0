"""Few bits, chosen with care: search scales (and biases) for the least weighted squared error.

`mx.quantize` fits a group by its smallest and largest value; at 2 or 3 bits that wastes most of
the error budget on outliers. Here every group tries clipped ranges, refines each by weighted
least squares, and keeps the best, the one of `mx.quantize` among them: never worse than MLX's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.convert.formats import Format

CLIPS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5)
REFINEMENTS = 3
# 8 bits have nothing to gain from clipping, and little from refinement.
FEW_BITS = 6


@dataclass(frozen=True)
class Quantised:
    """A block `[rows, cols]` in MLX's layout, with its sums of weighted squares.

    `error` is sum h (w - w')^2, `mlx_error` the same for `mx.quantize`, `power` sum h w^2, with
    h the importance of the input column.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    error: float
    mlx_error: float
    power: float


def quantise(values: mx.array, target: Format, importance: mx.array | None = None) -> Quantised:
    """Quantise float32 `values` `[rows, cols]`; `importance` `[cols]` weighs the columns."""
    cols = values.shape[1]
    weights = mx.ones((cols,)) if importance is None else importance.astype(mx.float32)
    if target.mode == "affine":
        return _affine(values, target, weights)
    return _microscaled(values, target, weights)


def _affine(values: mx.array, target: Format, weights: mx.array) -> Quantised:
    group = target.group_size
    w = values.reshape(values.shape[0], -1, group)  # [rows, groups, group]
    h = weights.reshape(-1, group)
    top = 2**target.bits - 1
    packed, s0, b0 = mx.quantize(
        values.astype(mx.bfloat16), group_size=group, bits=target.bits, mode="affine"
    )
    scale, bias = s0.astype(mx.float32)[..., None], b0.astype(mx.float32)[..., None]
    theirs = mx.dequantize(
        packed, scale[..., 0], bias[..., 0], group_size=group, bits=target.bits, dtype=mx.float32
    )
    mlx_error = h * mx.square(w - theirs.reshape(w.shape))
    error = _group_error(w, h, _codes(w, scale, bias, top), scale, bias)
    for other in _candidates(w, h, target.bits):
        codes = _codes(w, *other, top)
        new = _group_error(w, h, codes, *other)
        better = new < error
        scale, bias, error = (
            mx.where(better, a, b) for a, b in zip((*other, new), (scale, bias, error), strict=True)
        )
        mx.eval(scale, bias, error)  # one candidate at a time in memory
    codes = _codes(w, scale, bias, top).astype(mx.uint32).reshape(values.shape)
    return Quantised(
        pack(codes, target.bits),
        scale[..., 0].astype(mx.bfloat16),
        bias[..., 0].astype(mx.bfloat16),
        _number(error),
        _number(mlx_error),
        _number(h * mx.square(w)),
    )


def _candidates(w: mx.array, h: mx.array, bits: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Scale and bias pairs `[rows, groups, 1]`, already rounded to bf16 as they are stored."""
    top = 2**bits - 1
    low, high = w.min(-1, keepdims=True), w.max(-1, keepdims=True)
    for clip in CLIPS if bits < FEW_BITS else CLIPS[:1]:
        scale = clip * (high - low) / top
        bias = (low + high) / 2 - scale * (top / 2)
        for _ in range(REFINEMENTS):
            codes = _codes(w, scale, bias, top)
            scale = _rounded(_least_squares_scale(w, h, codes, scale))
            bias = _rounded((h * (w - scale * codes)).sum(-1, keepdims=True) / _mass(h))
        yield scale, bias


def _least_squares_scale(w: mx.array, h: mx.array, codes: mx.array, scale: mx.array) -> mx.array:
    """argmin over s of sum h (w - s q - b)^2 with the best b; the old one where q is constant."""
    mass = _mass(h)
    mean_q = (h * codes).sum(-1, keepdims=True) / mass
    mean_w = (h * w).sum(-1, keepdims=True) / mass
    spread = (h * mx.square(codes - mean_q)).sum(-1, keepdims=True)
    cross = (h * (codes - mean_q) * (w - mean_w)).sum(-1, keepdims=True)
    return mx.where(spread > 0, cross / mx.maximum(spread, 1e-30), scale)


def _mass(h: mx.array) -> mx.array:
    return h.sum(-1, keepdims=True)


def _rounded(x: mx.array) -> mx.array:
    return x.astype(mx.bfloat16).astype(mx.float32)


def _codes(w: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    """Nearest codes 0..top, as float32."""
    inverse = mx.where(scale == 0, 0, 1 / mx.where(scale == 0, 1, scale))
    return mx.clip(mx.round((w - bias) * inverse), 0, top)


def _group_error(
    w: mx.array, h: mx.array, codes: mx.array, scale: mx.array, bias: mx.array
) -> mx.array:
    return (h * mx.square(w - scale * codes - bias)).sum(-1, keepdims=True)


def _number(terms: mx.array) -> float:
    return float(np.array(terms.sum()))


def pack(codes: mx.array, bits: int) -> mx.array:
    """uint32 codes `[rows, cols]` as MLX stores them: a little-endian stream of `bits` each."""
    lanes = codes.reshape(codes.shape[0], -1, 32)  # 32 codes fill exactly `bits` words
    words: list[list[mx.array]] = [[] for _ in range(bits)]
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        code = lanes[..., lane]
        words[word].append(code << shift)
        if shift + bits > 32:
            words[word + 1].append(code >> (32 - shift))
    packed = mx.stack([reduce(mx.bitwise_or, parts) for parts in words], axis=-1)
    return packed.reshape(codes.shape[0], -1)


# Powers of two to try around MLX's: one lower clips the largest values, one higher wastes a step.
EXPONENT_STEPS = (0, -1, 1)


def _microscaled(values: mx.array, target: Format, weights: mx.array) -> Quantised:
    """mxfp4 and mxfp8 with the best power of two per group; nvfp4 as `mx.quantize` does it."""
    settings: Any = {"group_size": target.group_size, "bits": target.bits, "mode": target.mode}
    packed, scales, *_ = mx.quantize(values, **settings)
    group = target.group_size

    def error_of(p: mx.array, s: mx.array) -> mx.array:
        back = mx.dequantize(p, s, dtype=mx.float32, **settings)
        loss = weights * mx.square(values - back)
        return loss.reshape(values.shape[0], -1, group).sum(-1, keepdims=True)

    error = first = error_of(packed, scales)
    for step in EXPONENT_STEPS if target.mode != "nvfp4" else ():
        moved = mx.clip(scales.astype(mx.int32) + step, 0, 254).astype(mx.uint8)
        recoded = _encode(values, moved, target)
        new = error_of(recoded, moved)
        better = new < error
        words = packed.reshape(*new.shape[:2], -1)
        packed = mx.where(better, recoded.reshape(words.shape), words).reshape(packed.shape)
        scales = mx.where(better[..., 0], moved, scales)
        error = mx.minimum(new, error)
    power = _number(weights * mx.square(values))
    return Quantised(packed, scales, None, _number(error), _number(first), power)


def _encode(values: mx.array, exponents: mx.array, target: Format) -> mx.array:
    """Codes of `values` under given E8M0 exponents, nearest value first."""
    inverse = mx.power(2.0, 127.0 - exponents.astype(mx.float32))
    scaled = values * mx.repeat(inverse, target.group_size, axis=1)
    if target.mode == "mxfp8":
        return mx.to_fp8(scaled).view(mx.uint32)
    size = mx.abs(scaled)
    codes = mx.zeros(values.shape, mx.uint32)
    for middle in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):  # between 0 .5 1 1.5 2 3 4 6
        codes = codes + (size > middle)
    codes = codes.astype(mx.uint32) | ((scaled < 0).astype(mx.uint32) << 3)
    return pack(codes, 4)
