"""The plans of a batch's rows become the edits of one forward pass.

Rows are stacked, so a batch of differently steered rows costs what one steered row costs: one
add per place, whatever the number of vectors. Rows without an edit get zeros, which change
nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlxsteer import ops
from mlxsteer.plan import Place, Plan, SiteEdit

PADDING = 0  # phase of a position that holds no token
MAX_CACHED_STACKS = 16

RowKey = tuple[tuple[str, int], ...]


@dataclass
class StackedEdit:
    """One place's edits of B rows.

    projections: [(directions [B, 1, D], shares [B, 1, 1])], clamps: [(directions, values, on)],
    shift and turn: [B, 1, D]; for site `stream` [B, 1, 4, D].
    """

    projections: list[tuple[mx.array, mx.array]] = field(default_factory=list)
    clamps: list[tuple[mx.array, mx.array, mx.array]] = field(default_factory=list)
    shift: mx.array | None = None
    turn: mx.array | None = None

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        """The edited `x`; `mask` [B, T, 1] of 0 and 1 says at which positions."""

        def fit(array: mx.array) -> mx.array:
            return array[:, :, None] if x.ndim > array.ndim else array

        def masked(array: mx.array) -> mx.array:
            array = fit(array)
            if mask is None:
                return array
            return array * (mask[..., None] if array.ndim > mask.ndim else mask)

        for direction, share in self.projections:
            x = ops.project(x, fit(direction), masked(share))
        for direction, value, on in self.clamps:
            x = ops.clamp(x, fit(direction), fit(value), masked(on))
        if self.shift is not None:
            x = ops.add(x, masked(self.shift))
        if self.turn is not None:
            x = ops.add_preserving_norm(x, masked(self.turn))
        return x


class Stacker:
    """Builds the edits of forward passes and keeps the latest: decoding repeats the same rows."""

    def __init__(self) -> None:
        self._kept: OrderedDict[RowKey, dict[Place, StackedEdit]] = OrderedDict()

    def edits(
        self, plans: Sequence[Plan | None], phases: np.ndarray
    ) -> dict[Place, Callable[[mx.array], mx.array]]:
        """Edits for rows with `plans`, at positions of `phases` [B, T] (0 = padding)."""
        if not any(plans):
            return {}
        per_row = [_only_phase(row) for row in phases]
        if all(phase is not None for phase in per_row):
            return dict(self._stack(plans, [phase or PADDING for phase in per_row]))
        return self._masked(plans, phases)

    def _masked(
        self, plans: Sequence[Plan | None], phases: np.ndarray
    ) -> dict[Place, Callable[[mx.array], mx.array]]:
        parts: dict[Place, list[tuple[StackedEdit, mx.array]]] = {}
        for phase in sorted(set(np.unique(phases).tolist()) - {PADDING}):
            mask = mx.array((phases == phase)[..., None], mx.float32)
            for place, edit in self._stack(plans, [phase] * len(plans)).items():
                parts.setdefault(place, []).append((edit, mask))

        def chain(steps: list[tuple[StackedEdit, mx.array]]) -> Callable[[mx.array], mx.array]:
            def edited(x: mx.array) -> mx.array:
                for edit, mask in steps:
                    x = edit(x, mask)
                return x

            return edited

        return {place: chain(steps) for place, steps in parts.items()}

    def _stack(
        self, plans: Sequence[Plan | None], phases: Sequence[int]
    ) -> dict[Place, StackedEdit]:
        key = tuple(
            (plan.key if plan else "", phase) for plan, phase in zip(plans, phases, strict=True)
        )
        if key not in self._kept:
            rows = [
                plan.edit(phase) if plan and phase else {}
                for plan, phase in zip(plans, phases, strict=True)
            ]
            places = {place for row in rows for place in row}
            self._kept[key] = {
                place: _stacked([row.get(place) for row in rows]) for place in places
            }
            while len(self._kept) > MAX_CACHED_STACKS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _only_phase(row: np.ndarray) -> int | None:
    """The phase of all the row's tokens, or None when they differ."""
    present = set(row.tolist()) - {PADDING}
    return next(iter(present), PADDING) if len(present) <= 1 else None


def _stacked(edits: Sequence[SiteEdit | None]) -> StackedEdit:
    rows = [edit or SiteEdit() for edit in edits]
    stacked = StackedEdit(
        shift=_rows([row.shift for row in rows]), turn=_rows([row.turn for row in rows])
    )
    for slot in range(max(len(row.projections) for row in rows)):
        at = [row.projections[slot] if slot < len(row.projections) else None for row in rows]
        directions = _rows([item[0] if item else None for item in at])
        assert directions is not None
        shares = _column([item[1] if item else 0.0 for item in at], directions.ndim)
        stacked.projections.append((directions, shares))
    for slot in range(max(len(row.clamps) for row in rows)):
        at = [row.clamps[slot] if slot < len(row.clamps) else None for row in rows]
        directions = _rows([item[0] if item else None for item in at])
        assert directions is not None
        values = _column([item[1] if item else 0.0 for item in at], directions.ndim)
        on = _column([1.0 if item else 0.0 for item in at], directions.ndim)
        stacked.clamps.append((directions, values, on))
    return stacked


def _rows(arrays: Sequence[np.ndarray | None]) -> mx.array | None:
    """[B, 1, D] (or [B, 1, 4, D]) with zeros where a row has none; None when no row has one."""
    example = next((array for array in arrays if array is not None), None)
    if example is None:
        return None
    zero = np.zeros_like(example)
    stacked = np.stack([zero if array is None else array for array in arrays])
    return mx.array(stacked[:, None], mx.float32)


def _column(values: Sequence[float], ndim: int) -> mx.array:
    return mx.array(np.array(values, np.float32).reshape(-1, *[1] * (ndim - 1)))
