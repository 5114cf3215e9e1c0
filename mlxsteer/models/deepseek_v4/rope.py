"""Rotary positions: interleaved pairs on the last `rd` dims of a row, plain or YaRN (spec C.4).

The leading dims are covered by frequencies of infinite period, so a whole row turns in one
operation and nothing is cut apart and joined again.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlxsteer.models.deepseek_v4.config import ModelArgs
from mlxsteer.models.deepseek_v4.fusing import Switch


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


class Rope:
    """Rotation for rows of one width. Holds no parameters.

    periods [width/2]: positions per radian of each pair; infinite for pairs that stand still.
    """

    def __init__(self, periods: np.ndarray):
        self.periods = mx.array(periods)
        self._back = -self.periods
        self._inverse = np.float32(1) / periods
        self._phases = lru_cache(maxsize=8)(self._make_phases)
        self._phases_mx = lru_cache(maxsize=8)(lambda *of: mx.array(self._phases(*of)))

    def __call__(
        self, x: mx.array, offset: int | mx.array, *, step: int = 1, inverse: bool = False
    ) -> mx.array:
        """Rotate `x` [B, ..., T, width]; row i stands at position `(offset + i) * step`.

        `offset` is one int, or an array [B] with one offset per batch row.
        """
        if Switch.on_host and x.shape[-2] == 1 and x.dtype == mx.float32:
            return self._turned_by_phases(x, offset, step, inverse)
        return mx.fast.rope(
            x,
            x.shape[-1],
            traditional=True,
            base=None,
            scale=float(step),
            offset=offset,
            freqs=self._back if inverse else self.periods,
        )

    def _turned_by_phases(
        self, x: mx.array, offset: int | mx.array, step: int, inverse: bool
    ) -> mx.array:
        """One token on a CPU, where `mx.fast.rope` is twenty operations: pairs are complex."""
        starts = (offset,) if isinstance(offset, int) else tuple(map(int, np.array(offset)))
        phases = self._phases_mx(starts, x.shape[-2], step, inverse)
        phases = phases.reshape(-1, *[1] * (x.ndim - 3), *phases.shape[1:])
        return (x.view(mx.complex64) * phases).view(mx.float32)

    def turned(self, x: np.ndarray, position: int, *, inverse: bool = False) -> np.ndarray:
        """Rows x [..., width] float32, all of one position."""
        phases = self._phases((position,), 1, 1, inverse)[0, 0]
        return (x.view(np.complex64) * phases).view(np.float32)

    def _make_phases(self, starts: tuple[int, ...], T: int, step: int, inverse: bool) -> np.ndarray:
        """exp(i angle), [B or 1, T, width/2]. Angles are float32, as everywhere."""
        positions = (np.array(starts)[:, None] + np.arange(T)) * step
        angles = positions.astype(np.float32)[..., None] * self._inverse
        turns = np.exp((-1j if inverse else 1j) * angles.astype(np.float64))
        return turns.astype(np.complex64)


@lru_cache(maxsize=16)
def _shared(width: int, inverse_frequencies: tuple[float, ...]) -> Rope:
    inv = np.array(inverse_frequencies, dtype=np.float32)
    still = np.full(width // 2 - len(inv), np.inf, dtype=np.float32)
    return Rope(np.concatenate([still, _periods(inv)]))


def rope_of(args: ModelArgs, ratio: int, width: int) -> Rope:
    """The rotation of a layer's rows of `width`; layers that turn alike share it."""
    return _shared(width, tuple(inverse_frequencies(args, ratio)))
