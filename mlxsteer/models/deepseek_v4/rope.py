"""Rotary positions: interleaved pairs on the last `rd` dims of a row, plain or YaRN (spec C.4).

The leading dims are covered by frequencies of infinite period, so a whole row turns in one
operation and nothing is cut apart and joined again.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlxsteer.models.deepseek_v4.config import ModelArgs


def inverse_frequencies(args: ModelArgs, ratio: int) -> np.ndarray:
    """Radians per position of the `rd/2` pairs, float64 (spec C.4; YaRN, Peng et al. 2023).

    Layers without compressed rows use theta alone. All others use YaRN for everything, at
    every position, without its attention scaling.
    """
    rd = args.qk_rope_head_dim
    theta = args.compress_rope_theta if ratio else args.rope_theta
    f = np.power(float(theta), -np.arange(0, rd, 2, dtype=np.float64) / rd)
    if not ratio:
        return f
    assert args.rope_scaling is not None  # checked with the config
    scaling = args.rope_scaling
    original = scaling["original_max_position_embeddings"]

    def corr(rotations: float) -> float:
        return rd * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(corr(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(corr(scaling.get("beta_slow", 1))), rd - 1)
    ramp = np.clip((np.arange(rd // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return f * (1 - ramp) + f / scaling["factor"] * ramp


def _periods(inv: np.ndarray) -> np.ndarray:
    """Float32 numbers whose float32 inverses come nearest to `inv`: MLX takes the inverse."""
    one, p = np.float32(1), np.float32(1) / inv
    near = np.stack([p, np.nextafter(p, one * 0), np.nextafter(p, one * np.inf)])
    error = np.abs((one / near).astype(np.float64) - inv)
    return near[error.argmin(axis=0), np.arange(len(inv))]


def turn(x: mx.array, periods: mx.array, offset: int | mx.array, step: int = 1) -> mx.array:
    """Rotate interleaved pairs of `x` [B, ..., T, 2n] by position / `periods` [n]."""
    return mx.fast.rope(
        x,
        x.shape[-1],
        traditional=True,
        base=None,
        scale=float(step),
        offset=offset,
        freqs=periods,
    )


class Rope:
    """Rotation for rows of one width. Holds no parameters."""

    def __init__(self, args: ModelArgs, ratio: int, width: int):
        inv = inverse_frequencies(args, ratio).astype(np.float32)
        still = np.full((width - args.qk_rope_head_dim) // 2, np.inf, dtype=np.float32)
        self.periods = mx.array(np.concatenate([still, _periods(inv)]))
        self._back = -self.periods

    def __call__(
        self, x: mx.array, offset: int | mx.array, *, step: int = 1, inverse: bool = False
    ) -> mx.array:
        """Rotate `x` [B, ..., T, width]; row i stands at position `(offset + i) * step`.

        `offset` is one int, or an array [B] with one offset per batch row.
        """
        return turn(x, self._back if inverse else self.periods, offset, step)
