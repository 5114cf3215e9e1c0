"""Which tokens a forward pass adds to which positions, as plain integers and index arrays.

Rows of a batch may stand at different positions and may bring fewer tokens than the others
(right padding). All of it is known on the host, so no array is read back. One `Span` is made
per forward pass and shared by all layers.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np


class Windows(NamedTuple):
    """How a span of tokens fills windows of `m` tokens, for B rows.

    Sources index the tokens `[pending (m slots) | new (T)]` of a row. N is the largest number
    of windows that any row closes; what a row has beyond its own count is never visible.
    """

    first: list[int]  # [B] index of the first window that closes
    closed: list[int]  # [B] how many close
    sources: mx.array | None  # [B or 1, N*m] tokens of the closing windows; None: N is 0
    pending: mx.array  # [B or 1, m] tokens left over, slot = position mod m


class Span:
    """The new tokens of one forward pass.

    Args:
        starts: position of each row's first new token.
        lengths: how many of the T new tokens are real, per row.
        T: width of the input.
        dtype: type of the streams, in which rows are stored.
    """

    def __init__(self, starts: list[int], lengths: list[int], T: int, dtype: mx.Dtype):
        self.starts, self.lengths, self.T, self.dtype = starts, lengths, T, dtype
        self.ends = [s + n for s, n in zip(starts, lengths, strict=True)]
        self.aligned = len(set(starts)) == 1  # all rows start at one position
        self.even = self.aligned and all(n == T for n in lengths)
        self.is_step = T == 1 and all(n == 1 for n in lengths)
        self._windows: dict[int, Windows] = {}
        self._positions: dict[int, mx.array] = {}

    @property
    def B(self) -> int:
        return len(self.starts)

    @cached_property
    def offset(self) -> int | mx.array:
        """Where each row starts: one int if it is the same for all, else an array [B]."""
        return self.starts[0] if self.aligned else mx.array(self.starts, dtype=mx.int32)

    def window_offset(self, m: int) -> int | mx.array:
        """The offset of tokens; with m, of the first window of m that closes, in windows."""
        if not m:
            return self.offset
        first = [s // m for s in self.starts]
        return first[0] if self.aligned else mx.array(first, dtype=mx.int32)

    def position(self, m: int = 0) -> mx.array:
        """[B] int32 where each row's first new token stands; or the start of its window of m."""
        if m not in self._positions:
            at = [s // m * m for s in self.starts] if m else self.starts
            self._positions[m] = mx.array(at, dtype=mx.int32)
        return self._positions[m]

    def shifted(self, i: int) -> int | mx.array:
        """The offset of token `i` of the span."""
        return self.offset if i == 0 else self.offset + i

    @cached_property
    def rows(self) -> mx.array:
        """Batch indices [B, 1], to index by row."""
        return mx.arange(self.B)[:, None]

    def visible(self, m: int, i: int) -> int:
        """The largest number of compressed rows that any batch row sees from token `i`."""
        return max((s + i + 1) // m for s in self.starts)

    def visible_counts(self, m: int, i0: int, i1: int) -> mx.array:
        """[B or 1, i1-i0] how many compressed rows each of the tokens sees."""
        t = self._starts[:, None] + np.arange(i0, i1)[None]
        return mx.array((t + 1) // m, dtype=mx.uint32)

    def slots(self, m: int) -> mx.array:
        """[B or 1, T] each new token's place in its window of m."""
        return mx.array((self._starts[:, None] + np.arange(self.T)[None]) % m, dtype=mx.uint32)

    @cached_property
    def _starts(self) -> np.ndarray:
        """[1] when aligned, else [B]."""
        return np.array(self.starts[:1] if self.aligned else self.starts, dtype=np.int64)

    @cached_property
    def _uneven(self) -> tuple[np.ndarray, np.ndarray]:
        """(starts, ends), each [1] when even, else [B]."""
        n = 1 if self.even else self.B
        return np.array(self.starts[:n], np.int64), np.array(self.ends[:n], np.int64)

    def ring_order(self, W: int) -> mx.array | None:
        """[B or 1, W] ring slots in order of time; None where the ring is in order already."""
        order = (self._starts[:, None] + np.arange(W)[None]) % W
        return None if (order[:, 0] == 0).all() else mx.array(order, dtype=mx.uint32)

    def ring_sources(self, W: int) -> mx.array:
        """[B or 1, W] what each ring slot holds afterwards: index into `[ring in order | new]`."""
        starts, ends = self._uneven
        slot = np.arange(W)[None]
        newest = ends[:, None] - 1
        position = newest - (newest - slot) % W
        return mx.array(position - starts[:, None] + W, dtype=mx.uint32)

    def unwritten(self, W: int, i0: int, n: int) -> mx.array | None:
        """[B or 1, 1, n] True where band key `i0 + j` is a position of at least 0.

        Band keys are `[ring in order (W) | new (T)]`. None when all of them are.
        """
        first = W - self._starts
        if (first <= i0).all():
            return None
        return mx.array((np.arange(i0, i0 + n)[None] >= first[:, None])[:, None])

    def windows(self, m: int) -> Windows:
        """How the new tokens fill windows of `m`."""
        if m not in self._windows:
            self._windows[m] = self._fill(m)
        return self._windows[m]

    def _fill(self, m: int) -> Windows:
        starts, ends = self._uneven
        closed = ends // m - starts // m
        N = int(closed.max())

        def source(k: np.ndarray, j: np.ndarray) -> np.ndarray:
            """Token j of the k-th window from the first: a pending slot, or a new token."""
            past_start = k * m + j - (starts % m)[:, None]
            return np.where(past_start < 0, j, m + np.minimum(past_start, self.T - 1))

        k, j = np.divmod(np.arange(N * m), m)
        sources = mx.array(source(k[None], j[None]), dtype=mx.uint32) if N else None
        slots = np.arange(m)[None]
        pending = mx.array(source(closed[:, None], slots), dtype=mx.uint32)
        starts_all, ends_all = np.array(self.starts), np.array(self.ends)
        return Windows(
            (starts_all // m).tolist(),
            (ends_all // m - starts_all // m).tolist(),
            sources,
            pending,
        )


def band(t: int, W: int) -> mx.array:
    """[1, t, t+W-1] True where query i sees key j of `[W-1 before | t own]`: i <= j < i+W."""
    i, j = mx.arange(t)[:, None], mx.arange(t + W - 1)[None]
    return ((i <= j) & (j < i + W))[None]


def pick(x: mx.array, index: mx.array) -> mx.array:
    """`x` [B, S, ...] at `index` [B or 1, n] of its second axis -> [B, n, ...]."""
    if index.shape[0] == 1:
        return mx.take(x, index[0], axis=1)
    return x[mx.arange(x.shape[0])[:, None], index]
