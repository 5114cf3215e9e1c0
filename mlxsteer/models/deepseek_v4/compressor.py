"""Compressed rows: one row per window of `m` tokens, pooled by learned gates (spec C.5).

Where windows overlap (m = 4) each token has two halves: `a` goes to the next window's row, `b`
to its own. The pooling runs in float32; the projections are made by the caller, together with
others of the same input.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxsteer.models.deepseek_v4 import kernels, row_kernels
from mlxsteer.models.deepseek_v4.config import SPARSE, ModelArgs
from mlxsteer.models.deepseek_v4.open_window import OpenWindow
from mlxsteer.models.deepseek_v4.positions import Span, pick


def _sample() -> tuple[Any, ...]:
    slots = mx.random.normal((2, 3, 8, 2, 16), key=mx.random.key(11))
    slots[:, 0, :4, 1] = -mx.inf  # no window before the first
    return (slots,)


@kernels.twin(row_kernels.pool, _sample)
def pool(slots: mx.array) -> mx.array:
    """Gate-weighted sum over the slots of each window, per channel.

    slots [B, N, S, 2, c] (kv, gate) float32 -> rows [B, N, c].
    """
    kv, gate = slots[..., 0, :], slots[..., 1, :]
    return (mx.softmax(gate, axis=2) * kv).sum(axis=2)


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
        self._gate_bias: Any = None  # (ape, what `_bias` made of it)

    def __call__(
        self, projected: mx.array, window: OpenWindow | None, span: Span
    ) -> mx.array | None:
        """Take the span's tokens in; the rows [B, N, c] float32 that close, if any.

        projected [B, T, 2C]: `wkv x` and `wgate x` side by side. Rows are not normed and carry
        no position yet. Of N rows, batch row b owns its first `closed[b]`.
        """
        assert window is not None
        take = self._step if span.is_step else self._extend
        return take(mx.unflatten(projected.astype(mx.float32), -1, (2, -1)), window, span)

    def _bias(self) -> mx.array:
        """[m, 2, C] what each slot adds to kv (nothing) and to the gate (`ape`); made once."""
        if self._gate_bias is None or self._gate_bias[0] is not self.ape:
            made = mx.stack([mx.zeros_like(self.ape), self.ape], axis=1)
            mx.eval(made)
            self._gate_bias = (self.ape, made)
        return self._gate_bias[1]

    def _tokens(self, projected: mx.array, span: Span) -> mx.array:
        """kv and gate of every new token, [B, T, 2, C] float32."""
        bias, m = self._bias(), self._m
        if span.T == 1 and span.aligned:
            slot = span.starts[0] % m
            return projected + bias[slot : slot + 1]
        return projected + bias[span.slots(m)]

    def _step(self, projected: mx.array, window: OpenWindow, span: Span) -> mx.array | None:
        """One token per row: store it; close the windows that it fills."""
        tokens, m = self._tokens(projected, span), self._m
        if span.aligned:
            slot = span.starts[0] % m
            window.pending[:, slot : slot + 1] = tokens
        else:
            window.pending[mx.arange(span.B), span.slots(m)[:, 0]] = tokens[:, 0]
        full = [end % m == 0 for end in span.ends]
        if not any(full):
            return None
        rows = pool(self._with_overlap(window.pending[:, None], window.previous))
        if window.previous is not None:
            left = window.pending[..., : self._c]
            if not all(full):
                left = mx.where(mx.array(full)[:, None, None, None], left, window.previous)
            window.previous = left
        return rows

    def _extend(self, projected: mx.array, window: OpenWindow, span: Span) -> mx.array | None:
        """Any number of tokens per row."""
        fill = span.windows(self._m)
        source = mx.concatenate([window.pending, self._tokens(projected, span)], axis=1)
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
        a = previous[:, None]
        if slots.shape[1] > 1:
            a = mx.concatenate([a, slots[:, :-1, ..., :c]], axis=1)
        return mx.concatenate([a, slots[..., c:]], axis=2)

    def _left_over(self, slots: mx.array, previous: mx.array, closed: list[int]) -> mx.array:
        """The `a` half of each batch row's last full window, [B, m, 2, c]."""
        halves = mx.concatenate([previous[:, None], slots[..., : self._c]], axis=1)
        if len(set(closed)) == 1:
            return halves[:, closed[0]]
        return halves[mx.arange(len(closed)), mx.array(closed)]
