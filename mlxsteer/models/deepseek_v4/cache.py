"""What one layer remembers between forward passes, in mlx-lm's cache protocol (spec D).

Window ring and compressed rows of a layer stand in one buffer, so that a decode step attends
to a slice of it without copying. Every row of a batch has its own position. A cache cannot be
rewound (ring rows are overwritten, gates are folded into rows): see `snapshots` to go back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import _BaseCache

from mlxsteer.errors import ModelError
from mlxsteer.models.deepseek_v4.config import SPARSE, ModelArgs
from mlxsteer.models.deepseek_v4.open_window import OpenWindow
from mlxsteer.models.deepseek_v4.positions import Span, pick

STATE_VERSION = "deepseek_v4 cache 1"
MIN_GROWTH = 64  # rows; beyond that a buffer grows by an eighth of what it holds


class CacheShape(NamedTuple):
    """The sizes that a layer's state depends on."""

    ratio: int
    window: int
    width: int  # of a kv row
    index_width: int  # of an index key; 0 where the layer has no indexer


def layer_shape(args: ModelArgs, layer: int) -> CacheShape:
    """The cache sizes of one layer."""
    m = args.compress_ratios[layer]
    return CacheShape(
        m, args.sliding_window, args.head_dim, args.index_head_dim if m == SPARSE else 0
    )


class DeepseekV4Cache(_BaseCache):
    """State of one layer for B rows.

    kv [B, W + capacity, d]: the window ring (position p at slot p mod W), then compressed rows.
    keys [B, capacity, c]: index keys, where the layer has an indexer.
    """

    def __init__(self, shape: CacheShape):
        self.shape = shape
        self.positions: list[int] = []
        self.kv: mx.array | None = None
        self.keys: mx.array | None = None
        self.open: OpenWindow | None = None
        self.open_keys: OpenWindow | None = None
        self._left: list[int] | None = None  # real tokens still to come, while padding is on

    # -- what the forward pass uses ---------------------------------------------------------

    def span(self, B: int, T: int, dtype: mx.Dtype = mx.float32) -> Span:
        """The positions of the next T tokens of each row. `dtype`: of the streams."""
        starts = self.positions or [0] * B
        if len(starts) != B:
            raise ModelError(
                f"The cache holds {len(starts)} rows and the input has {B}. Use one cache per"
                " batch; rows join and leave through merge, extend and filter."
            )
        left = self._left or [T] * B
        return Span(starts, [max(0, min(T, n)) for n in left], T, dtype)

    def begin(self, span: Span) -> None:
        """Make room for the span's tokens."""
        m = self.shape.ratio
        rows = max(s + span.T for s in span.starts) // m if m else 0
        if self.kv is None:
            self._allocate(span.B, rows, span.dtype)
        elif rows > self.capacity:
            self._grow(rows)

    def advance(self, span: Span) -> None:
        """The span's tokens have been stored."""
        self.positions = span.ends
        if self._left is not None:
            self._left = [max(0, n - span.T) for n in self._left]

    def write_ring(self, span: Span, kv: mx.array) -> None:
        """Store one new kv row per batch row: kv [B, 1, d]."""
        self._put("kv", kv, [s % self.shape.window for s in span.starts])

    def append(self, first: list[int], rows: mx.array, keys: mx.array | None) -> None:
        """Store compressed rows [B, N, d], and their index keys, from row `first` on."""
        self._put("kv", rows, [self.shape.window + w for w in first])
        if keys is not None:
            self._put("keys", keys, first)

    def append_some(
        self, batch: list[int], first: list[int], row: mx.array, key: mx.array | None
    ) -> None:
        """Store one compressed row [B, 1, d] for only the batch rows in `batch`."""
        b, w = mx.array(batch), mx.array([first[i] for i in batch])
        assert self.kv is not None
        self.kv[b, w + self.shape.window] = row[b, 0]
        if key is not None:
            assert self.keys is not None
            self.keys[b, w] = key[b, 0]

    def _put(self, name: str, values: mx.array, first: list[int]) -> None:
        """Write `values` [B, N, ...] from slot `first` on, in place."""
        buffer, N = getattr(self, name), values.shape[1]
        if len(set(first)) == 1:
            buffer[:, first[0] : first[0] + N] = values
        else:
            slots = np.array(first)[:, None] + np.arange(N)[None]
            buffer[mx.arange(len(first))[:, None], mx.array(slots)] = values
        setattr(self, name, buffer)

    def ring_in_order(self, span: Span) -> mx.array:
        """[B, W, d] the ring, oldest position first."""
        assert self.kv is not None
        ring = self.kv[:, : self.shape.window]
        order = span.ring_order(self.shape.window)
        return ring if order is None else pick(ring, order)

    def set_ring(self, ring: mx.array) -> None:
        """Replace the ring: [B, W, d] by slot."""
        assert self.kv is not None
        self.kv[:, : self.shape.window] = ring

    @property
    def capacity(self) -> int:
        """Compressed rows that fit without growing."""
        return 0 if self.kv is None else self.kv.shape[1] - self.shape.window

    def _allocate(self, B: int, rows: int, dtype: mx.Dtype) -> None:
        m, W, d, c = self.shape
        capacity = rows + MIN_GROWTH if m else 0
        self.positions = self.positions or [0] * B
        self.kv = mx.zeros((B, W + capacity, d), dtype)
        if m:
            self.open = OpenWindow.empty(B, m, d)
        if c:
            self.keys = mx.zeros((B, capacity, c), dtype)
            self.open_keys = OpenWindow.empty(B, m, c)

    def fill(self, position: int, dtype: mx.Dtype) -> None:
        """Stand at `position` with zeros for all that came before. For counting and timing."""
        m = self.shape.ratio
        self.positions = [position]
        self._allocate(1, position // m if m else 0, dtype)

    def _grow(self, rows: int) -> None:
        self._widen(rows + max(MIN_GROWTH, rows // 8))

    def _widen(self, capacity: int) -> None:
        more = capacity - self.capacity
        if more <= 0:
            return
        self.kv = _padded(self.kv, more)
        self.keys = _padded(self.keys, more)

    # -- what mlx-lm uses -------------------------------------------------------------------

    @property
    def arrays(self) -> list[mx.array]:
        """Every array of the state, for evaluation."""
        found = [a for a in (self.kv, self.keys) if a is not None]
        for window in (self.open, self.open_keys):
            found += window.arrays if window else []
        return found

    @property
    def offset(self) -> int | mx.array:
        """Position: an int for one row, an array [B] for a batch."""
        if len(self.positions) > 1:
            return mx.array(self.positions)
        return self.positions[0] if self.positions else 0

    @property
    def rows_used(self) -> int:
        """Compressed rows that hold something."""
        m = self.shape.ratio
        return max(self.positions, default=0) // m if m else 0

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and scalars that `from_state` rebuilds the cache from."""
        if self.kv is None:
            return (STATE_VERSION, *self.shape, mx.array(self.positions or [-1]))
        used = self.rows_used
        keys = None if self.keys is None else self.keys[:, :used]
        kv = self.kv[:, : self.shape.window + used]
        windows = [w for w in (self.open, self.open_keys) if w]
        parts = [a for w in windows for a in (w.pending, w.previous)]
        return (STATE_VERSION, *self.shape, mx.array(self.positions), kv, keys, *parts)

    @state.setter
    def state(self, v: Sequence[Any]) -> None:
        _, ratio, window, width, index_width, positions, *arrays = _checked(v)
        DeepseekV4Cache.__init__(self, CacheShape(ratio, window, width, index_width))
        self.positions = [p for p in positions.tolist() if p >= 0]
        if not arrays:
            return
        # An empty array loses its shape on its way through a file.
        B, keys = len(self.positions), arrays[1]
        self.kv = arrays[0]
        if index_width:
            empty = keys is None or keys.size == 0
            self.keys = mx.zeros((B, 0, index_width), self.kv.dtype) if empty else keys
        if ratio:
            self.open = OpenWindow(*arrays[2:4])
        if index_width:
            self.open_keys = OpenWindow(*arrays[4:6])

    def is_trimmable(self) -> bool:
        return False

    def size(self) -> int:
        return max(self.positions, default=0)

    def empty(self) -> bool:
        return self.kv is None

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to grow included; `cache_bytes` counts what is in use."""
        return sum(a.nbytes for a in self.arrays)

    def prepare(self, *, lengths: Any = None, right_padding: Any = None, **_: Any) -> None:
        """The next tokens are padded on the right to one length; `lengths` are real."""
        if lengths is not None and right_padding is not None and max(right_padding) > 0:
            self._left = [int(n) for n in lengths]

    def finalize(self) -> None:
        """Padding has ended. It never entered the state, so there is nothing to undo."""
        self._left = None

    def copied(self) -> DeepseekV4Cache:
        """A copy with array objects of its own, so that in-place writes to this one miss it."""
        kept = copy.copy(self)
        kept.positions = list(self.positions)
        kept.kv, kept.keys = _same(self.kv), _same(self.keys)
        kept.open = None if self.open is None else self.open.copied()
        kept.open_keys = None if self.open_keys is None else self.open_keys.copied()
        return kept

    @classmethod
    def merge(cls, caches: Sequence[DeepseekV4Cache]) -> DeepseekV4Cache:
        """One cache with the rows of all, each at its own position."""
        merged = caches[0].copied()
        merged.positions = merged.positions or [0]
        merged._left = None
        for cache in caches[1:]:
            merged.extend(cache)
        return merged

    def extend(self, other: DeepseekV4Cache) -> None:
        """Take the rows of `other` in, after the own ones."""
        if self.shape != other.shape:
            raise ModelError("Caches of different layers or models cannot be joined in a batch.")
        other_positions = other.positions or [0]
        positions = (self.positions or [0]) + other_positions
        if self.kv is not None or other.kv is not None:
            dtype = (self.kv if self.kv is not None else other.kv).dtype  # type: ignore[union-attr]
            parts = [self._filled(dtype), other._filled(dtype)]
            room = max(p.capacity for p in parts)
            for part in parts:
                part._widen(room)
            self._join(parts)
        self.positions = positions

    def _filled(self, dtype: mx.Dtype) -> DeepseekV4Cache:
        """A shallow copy that has its arrays, even at position 0."""
        part = copy.copy(self)
        if part.kv is None:
            part._allocate(len(self.positions) or 1, 0, dtype)
        return part

    def _join(self, parts: Sequence[DeepseekV4Cache]) -> None:
        self.kv = mx.concatenate([p.kv for p in parts])  # type: ignore[misc]
        if self.shape.ratio:
            self.open = OpenWindow.joined([p.open for p in parts])  # type: ignore[misc]
        if self.shape.index_width:
            self.keys = mx.concatenate([p.keys for p in parts])  # type: ignore[misc]
            self.open_keys = OpenWindow.joined([p.open_keys for p in parts])  # type: ignore[misc]

    def filter(self, batch_indices: Any) -> None:
        """Keep only the given rows."""
        keep = np.array(batch_indices, dtype=np.int64).tolist()
        self.positions = [self.positions[i] for i in keep]
        if self._left is not None:
            self._left = [self._left[i] for i in keep]
        if self.kv is not None:
            self._select(mx.array(keep))

    def _select(self, rows: Any) -> None:
        assert self.kv is not None
        self.kv = self.kv[rows]
        self.keys = None if self.keys is None else self.keys[rows]
        self.open = None if self.open is None else self.open.picked(rows)
        self.open_keys = None if self.open_keys is None else self.open_keys.picked(rows)

    def extract(self, idx: int) -> DeepseekV4Cache:
        """A cache of its own for one row, without room to spare."""
        part = DeepseekV4Cache(self.shape)
        part.positions = [self.positions[idx]]
        if self.kv is not None:
            part.kv, part.keys = self.kv, self.keys
            part.open, part.open_keys = self.open, self.open_keys
            part._select(slice(idx, idx + 1))
            part.kv = mx.contiguous(part.kv[:, : self.shape.window + part.rows_used])
            if part.keys is not None:
                part.keys = mx.contiguous(part.keys[:, : part.rows_used])
        return part


def _padded(x: mx.array | None, more: int) -> mx.array | None:
    if x is None:
        return None
    return mx.concatenate([x, mx.zeros((x.shape[0], more, x.shape[2]), x.dtype)], axis=1)


def _checked(state: Sequence[Any]) -> Sequence[Any]:
    """The state, or ModelError when it is not one that this version wrote."""
    if len(state) < 6 or state[0] != STATE_VERSION:
        raise ModelError(
            "This prompt cache was not written by this version's DeepSeek-V4 module. Process the"
            " prompt again and save it anew."
        )
    ratio, window, width, _, positions, *arrays = state[1:]
    if arrays:
        B, rows = positions.size, max(positions.tolist()) // ratio if ratio else 0
        if arrays[0].shape != (B, window + rows, width):
            raise ModelError(
                f"This prompt cache is damaged: its rows have shape {arrays[0].shape}, and its"
                f" positions need {(B, window + rows, width)}. Process the prompt again."
            )
    return state


def _same(x: mx.array | None) -> mx.array | None:
    return None if x is None else mx.array(x)
