"""Compressed rows: one row per window of `m` tokens, pooled by learned gates (spec C.5).

Where windows overlap (m = 4) each token has two halves: `a` goes to the next window's row, `b`
to its own. The projections and the pooling run in float32.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxsteer.models.deepseek_v4.cache import OpenWindow
from mlxsteer.models.deepseek_v4.config import SPARSE, ModelArgs
from mlxsteer.models.deepseek_v4.positions import Span, pick


def pool(slots: mx.array) -> mx.array:
    """Gate-weighted sum over the slots of each window, per channel.

    slots [B, N, S, 2, c] (kv, gate) float32 -> rows [B, N, c].
    """
    kv, gate = slots[..., 0, :], slots[..., 1, :]
    return (mx.softmax(gate, axis=2) * kv).sum(axis=2)


def project_float32(linear: nn.Module, x: mx.array) -> mx.array:
    """`linear(x)` in float32, or in the weight's own type if it is dense and narrower."""
    if "scales" in linear:
        return linear(x.astype(mx.float32))
    return linear(x.astype(linear.weight.dtype)).astype(mx.float32)


class Compressor(nn.Module):
    """Makes rows of width `c` from the layer's normed input."""

    def __init__(self, args: ModelArgs, m: int, c: int):
        super().__init__()
        self._m, self._c = m, c
        C = 2 * c if m == SPARSE else c
        self.wkv = nn.Linear(args.hidden_size, C, bias=False)
        self.wgate = nn.Linear(args.hidden_size, C, bias=False)
        self.norm = nn.RMSNorm(c, eps=args.rms_norm_eps)
        self.ape = mx.zeros((m, C))

    def __call__(self, x: mx.array, window: OpenWindow | None, span: Span) -> mx.array | None:
        """Take the span's tokens x [B, T, D] in; the normed rows [B, N, c] that close, if any.

        Rows carry no position yet. Of N rows, batch row b owns its first `closed[b]`.
        """
        assert window is not None
        rows = self._step(x, window, span) if span.is_step else self._extend(x, window, span)
        return None if rows is None else self.norm(rows.astype(x.dtype))

    def _tokens(self, x: mx.array, span: Span) -> mx.array:
        """kv and gate of every new token, [B, T, 2, C] float32."""
        kv, gate = project_float32(self.wkv, x), project_float32(self.wgate, x)
        slots = mx.arange(span.T) + span.starts[0] if span.aligned else self._slots(span)
        return mx.stack([kv, gate + self.ape[slots % self._m]], axis=2)

    def _slots(self, span: Span) -> mx.array:
        return mx.array(span.starts)[:, None] + mx.arange(span.T)

    def _step(self, x: mx.array, window: OpenWindow, span: Span) -> mx.array | None:
        """One token per row: store it; close the windows that it fills."""
        tokens, m = self._tokens(x, span), self._m
        if span.aligned:
            slot = span.starts[0] % m
            window.pending[:, slot : slot + 1] = tokens
        else:
            window.pending[mx.arange(span.B), mx.array([s % m for s in span.starts])] = tokens[:, 0]
        full = [b for b, end in enumerate(span.ends) if end % m == 0]
        if not full:
            return None
        rows = pool(self._with_overlap(window.pending[:, None], window.previous))
        if window.previous is not None:
            left = window.pending[..., : self._c]
            if len(full) < span.B:
                closing = mx.array([end % m == 0 for end in span.ends])[:, None, None, None]
                left = mx.where(closing, left, window.previous)
            window.previous = left
        return rows

    def _extend(self, x: mx.array, window: OpenWindow, span: Span) -> mx.array | None:
        """Any number of tokens per row."""
        fill = span.windows(self._m)
        source = mx.concatenate([window.pending, self._tokens(x, span)], axis=1)
        window.pending = pick(source, fill.pending)
        if fill.sources is None:
            return None
        slots = mx.unflatten(pick(source, fill.sources), 1, (-1, self._m))
        rows = pool(self._with_overlap(slots, window.previous))
        if window.previous is not None:
            window.previous = self._left_over(slots, window.previous, fill.closed)
        return rows

    def _with_overlap(self, slots: mx.array, previous: mx.array | None) -> mx.array:
        """Slots [B, N, m, 2, C] of N windows -> all the slots that their rows pool."""
        if previous is None:
            return slots
        c = self._c
        a = mx.concatenate([previous[:, None], slots[:, :-1, ..., :c]], axis=1)
        return mx.concatenate([a, slots[..., c:]], axis=2)

    def _left_over(self, slots: mx.array, previous: mx.array, closed: list[int]) -> mx.array:
        """The `a` half of each batch row's last full window, [B, m, 2, c]."""
        halves = mx.concatenate([previous[:, None], slots[..., : self._c]], axis=1)
        if len(set(closed)) == 1:
            return halves[:, closed[0]]
        return halves[mx.arange(len(closed)), mx.array(closed)]
