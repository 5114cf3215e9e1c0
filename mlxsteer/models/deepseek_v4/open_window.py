"""The window of tokens that a compressor has not made a row of yet (spec C.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlxsteer.models.deepseek_v4.config import SPARSE


class OpenWindow:
    """The tokens that have not filled a window yet, as a compressor projected them (float32).

    pending [B, m, 2, C]: kv and gate (with `ape`) at slot position mod m.
    previous [B, m, 2, c]: where windows overlap, the half that the last full window leaves for
    the next row. Gates of -inf stand for "nothing there".
    """

    __slots__ = ("pending", "previous")

    def __init__(self, pending: mx.array, previous: mx.array | None):
        self.pending, self.previous = pending, previous

    @classmethod
    def empty(cls, B: int, m: int, width: int) -> OpenWindow:
        """Before the first token. `width`: of the rows that the compressor makes."""
        if m != SPARSE:
            return cls(mx.zeros((B, m, 2, width)), None)
        previous = mx.stack([mx.zeros((B, m, width)), mx.full((B, m, width), -mx.inf)], axis=2)
        return cls(mx.zeros((B, m, 2, 2 * width)), previous)

    @property
    def arrays(self) -> list[mx.array]:
        return [self.pending] if self.previous is None else [self.pending, self.previous]

    def picked(self, rows: Any) -> OpenWindow:
        """Only the given batch rows."""
        previous = None if self.previous is None else self.previous[rows]
        return OpenWindow(self.pending[rows], previous)

    def copied(self) -> OpenWindow:
        """With array objects of its own."""
        previous = None if self.previous is None else mx.array(self.previous)
        return OpenWindow(mx.array(self.pending), previous)

    @classmethod
    def joined(cls, parts: Sequence[OpenWindow]) -> OpenWindow:
        """Batch rows of several, one after the other."""
        previous = [p.previous for p in parts if p.previous is not None]
        return cls(
            mx.concatenate([p.pending for p in parts]),
            mx.concatenate(previous) if previous else None,
        )
