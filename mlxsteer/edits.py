"""The plans of a batch's rows become the edits of one forward pass.

Rows are stacked, so a batch of differently steered rows costs what one steered row costs: one
add per place, whatever the number of vectors. Rows without an edit get zeros, which change
nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add

import mlx.core as mx
import numpy as np

from mlxsteer import ops
from mlxsteer.plan import STEADY, Place, Plan, SiteEdit
from mlxsteer.vector import Encoder

PADDING = 0  # phase of a position that holds no token
MAX_CACHED_STACKS = 16
PHASE_CODES = 16  # phases are sets of four bits
FULL, SHARE = 2, 1  # how the terms of a timing act at a position; 0 is not at all

Edits = dict[Place, Callable[[mx.array], mx.array]]
RowKey = tuple[tuple[str, int], ...]
Weights = Sequence[np.ndarray | None]
StackedFeature = tuple[mx.array, mx.array, mx.array, tuple[mx.array, mx.array, mx.array]]


@dataclass
class StackedPart:
    """One slot's edits of B rows at one place.

    projections: [(directions [B, 1, D], shares [B, 1, 1])], clamps: [(directions, values, on)],
    features: [(directions, values, on, (rows [B, 1, D], biases, thresholds))],
    shift and turn: [B, 1, D]; for site `stream` [B, 1, 4, D].
    """

    projections: list[tuple[mx.array, mx.array]] = field(default_factory=list)
    clamps: list[tuple[mx.array, mx.array, mx.array]] = field(default_factory=list)
    features: list[StackedFeature] = field(default_factory=list)
    shift: mx.array | None = None
    turn: mx.array | None = None


@dataclass
class StackedEdit:
    """One place's edits of B rows: the steady part, and by slot those that act at a share."""

    parts: dict[int, StackedPart]

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | None = None,
        weights: Mapping[int, mx.array] | None = None,
    ) -> mx.array:
        """The edited `x`. mask [B, T, 1] of 0 and 1 says at which positions; weights
        {slot: [B, T, 1]} at which share of the strength."""
        scaled = [
            (part, _product(mask, weights[slot] if weights and slot != STEADY else None))
            for slot, part in self.parts.items()
        ]
        for part, scale in scaled:
            for direction, share in part.projections:
                x = ops.project(x, _fit(direction, x), _scaled(share, scale, x))
        for part, scale in scaled:
            for direction, value, on in part.clamps:
                on = _scaled(on, scale, x)
                x = ops.clamp(x, _fit(direction, x), _fit(value, x), on)
        read = x
        for part, scale in scaled:
            for direction, value, on, (row, bias, threshold) in part.features:
                encoder = (_fit(row, x), _fit(bias, x), _fit(threshold, x))
                on = _scaled(on, scale, x)
                direction, value = _fit(direction, x), _fit(value, x)
                x = ops.clamp_feature(x, read, direction, value, on, encoder)
        shifts = [_scaled(part.shift, s, x) for part, s in scaled if part.shift is not None]
        if shifts:
            x = ops.add(x, reduce(add, shifts))
        turns = [_scaled(part.turn, s, x) for part, s in scaled if part.turn is not None]
        return ops.add_preserving_norm(x, reduce(add, turns)) if turns else x


def _product(mask: mx.array | None, weight: mx.array | None) -> mx.array | None:
    if mask is None or weight is None:
        return weight if mask is None else mask
    return mask * weight


def _fit(array: mx.array, x: mx.array) -> mx.array:
    """`array` with an axis for the streams of `x`, where `x` has them and it has not."""
    return array[:, :, None] if x.ndim > array.ndim else array


def _scaled(array: mx.array, scale: mx.array | None, x: mx.array) -> mx.array:
    array = _fit(array, x)
    if scale is None:
        return array
    return array * (scale[..., None] if array.ndim > scale.ndim else scale)


class Stacker:
    """Builds the edits of forward passes and keeps the latest: decoding repeats the same rows."""

    def __init__(self) -> None:
        self._kept: OrderedDict[RowKey, dict[Place, StackedEdit]] = OrderedDict()

    def edits(
        self, plans: Sequence[Plan | None], phases: np.ndarray, weights: Weights | None = None
    ) -> Edits:
        """Edits for rows with `plans`, at positions of `phases` [B, T] (0 = padding).

        weights: per row, `Plan.weights` [T, timings] at these positions, or None where the row's
        plan has no timings.
        """
        if not any(plans):
            return {}
        if weights is None and any(plan and plan.timings for plan in plans):
            raise ValueError("a plan has timings; say their weights (RowCache.weights)")
        codes = _codes(phases, weights or [])
        shares = _shares(weights or [], phases.shape)
        per_row = [_only_code(row) for row in codes]
        if any(code is None for code in per_row):
            return self._masked(plans, codes, shares)
        stack = self._stack(plans, [code or PADDING for code in per_row])
        if not shares:
            return dict(stack)
        return {place: partial(edit, weights=shares) for place, edit in stack.items()}

    def _masked(
        self, plans: Sequence[Plan | None], codes: np.ndarray, shares: Mapping[int, mx.array]
    ) -> Edits:
        steps: dict[Place, list[Callable[[mx.array], mx.array]]] = {}
        for code in sorted(set(np.unique(codes).tolist()) - {PADDING}):
            mask = mx.array((codes == code)[..., None], mx.float32)
            for place, edit in self._stack(plans, [code] * len(plans)).items():
                steps.setdefault(place, []).append(partial(edit, mask=mask, weights=shares))

        def chain(edits: list[Callable[[mx.array], mx.array]]) -> Callable[[mx.array], mx.array]:
            return lambda x: reduce(lambda state, edit: edit(state), edits, x)

        return {place: chain(edits) for place, edits in steps.items()}

    def _stack(
        self, plans: Sequence[Plan | None], codes: Sequence[int]
    ) -> dict[Place, StackedEdit]:
        key = tuple(
            (plan.key if plan else "", code) for plan, code in zip(plans, codes, strict=True)
        )
        if key not in self._kept:
            self._kept[key] = _stacked(plans, codes)
            while len(self._kept) > MAX_CACHED_STACKS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _codes(phases: np.ndarray, weights: Weights) -> np.ndarray:
    """int64 [B, T]: what acts at each position. A phase, and in base 3 how each timing does."""
    codes = phases.astype(np.int64)
    for index, row in enumerate(weights):
        if row is not None:
            how = np.where(row == 1, FULL, np.where(row > 0, SHARE, 0))
            codes[index] += PHASE_CODES * (how @ 3 ** np.arange(row.shape[1]))
    return np.where(phases == PADDING, PADDING, codes)


def _only_code(row: np.ndarray) -> int | None:
    """The code of all the row's tokens, or None when they differ."""
    present = set(row.tolist()) - {PADDING}
    return next(iter(present), PADDING) if len(present) <= 1 else None


def _slots(code: int, how: int) -> tuple[int, ...]:
    """The slots that act so at a position of `code`."""
    digits, slot, found = code // PHASE_CODES, 0, []
    while digits:
        digits, digit = divmod(digits, 3)
        found += [slot] if digit == how else []
        slot += 1
    return tuple(found)


def _shares(weights: Weights, shape: tuple[int, ...]) -> dict[int, mx.array]:
    """{slot: [B, T, 1]} for the slots that act at a share of their strength anywhere."""
    found: dict[int, np.ndarray] = {}
    for index, row in enumerate(weights):
        if row is None:
            continue
        for slot in np.flatnonzero(((row > 0) & (row < 1)).any(axis=0)).tolist():
            found.setdefault(slot, np.zeros((*shape, 1), np.float32))[index, :, 0] = row[:, slot]
    return {slot: mx.array(share) for slot, share in found.items()}


def _stacked(plans: Sequence[Plan | None], codes: Sequence[int]) -> dict[Place, StackedEdit]:
    """The rows' edits, slots at full strength with the steady terms, each other by itself."""
    stacked: dict[Place, StackedEdit] = {}
    for slot in (STEADY, *sorted({slot for code in codes for slot in _slots(code, SHARE)})):
        rows = [_row(plan, code, slot) for plan, code in zip(plans, codes, strict=True)]
        for place in {place for row in rows for place in row}:
            part = _part([row.get(place) for row in rows])
            stacked.setdefault(place, StackedEdit({})).parts[slot] = part
    return stacked


def _row(plan: Plan | None, code: int, slot: int) -> Mapping[Place, SiteEdit]:
    if not plan or code == PADDING:
        return {}
    phase = code % PHASE_CODES
    if slot == STEADY:
        return plan.edit(phase, (STEADY, *_slots(code, FULL)))
    return plan.edit(phase, (slot,)) if slot in _slots(code, SHARE) else {}


def _part(edits: Sequence[SiteEdit | None]) -> StackedPart:
    rows = [edit or SiteEdit() for edit in edits]
    stacked = StackedPart(
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
    for slot in range(max(len(row.features) for row in rows)):
        stacked.features.append(
            _features([row.features[slot] if slot < len(row.features) else None for row in rows])
        )
    return stacked


def _features(at: Sequence[tuple[np.ndarray, float, Encoder] | None]) -> StackedFeature:
    """One feature of each row; a row without one reads 0 and sets nothing."""
    directions = _rows([item[0] if item else None for item in at])
    encoders = _rows([item[2].row if item else None for item in at])
    assert directions is not None
    assert encoders is not None

    def column(values: list[float]) -> mx.array:
        return _column(values, directions.ndim)

    return (
        directions,
        column([item[1] if item else 0.0 for item in at]),
        column([1.0 if item else 0.0 for item in at]),
        (
            encoders,
            column([item[2].bias if item else 0.0 for item in at]),
            column([item[2].threshold if item else 0.0 for item in at]),
        ),
    )


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
