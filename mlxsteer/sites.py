"""Whether a model's sites respond: a shift put in is found there again, and changes the logits.

Uses the way that every steered answer takes (vector, plan, stacked edits, hooks), several rows
to a pass, each shifted at one place. Knows nothing of what a direction means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxsteer.models.hooks import ATTN_OUT, FFN_OUT, RESIDUAL, Place, Run
from mlxsteer.plan import Plan
from mlxsteer.rows import RowCache
from mlxsteer.vector import SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import Model

CHECKED_SITES = (RESIDUAL, ATTN_OUT, FFN_OUT)
PROBE_TOKENS = (3, 5, 7, 11, 13, 17)
ROWS_PER_PASS = 8  # a row costs a copy of the probe; a small batch keeps a large model's pass small
SHIFT = 0.2  # of the residual norm at the place: above bfloat16's rounding, small in effect
CAPTURE_TOLERANCE = 0.1  # of the shift; bfloat16 rounds a residual by about 0.01 of this shift
LOGIT_CHANGE = 1e-4  # of the logits' norm; the demo model's least is 0.03


@dataclass(frozen=True)
class SiteCheck:
    """What a shift at one place did, relative to its length and to the logits' norm.

    capture_error: ‖read − unshifted − shift‖/‖shift‖ at the steered position. leak: the largest
    change at the positions before it. logit_change: ‖Δlogits‖/‖logits‖ at the last position.
    """

    layer: int
    site: str
    capture_error: float
    leak: float
    logit_change: float

    @property
    def ok(self) -> bool:
        landed = max(self.capture_error, self.leak) <= CAPTURE_TOLERANCE
        return landed and self.logit_change >= LOGIT_CHANGE


@dataclass(frozen=True)
class _Passed:
    """logits [B, T, V] and captured {place: [B, T, D]} of one pass over B rows of the probe."""

    logits: np.ndarray
    captured: dict[Place, np.ndarray]


def check_sites(model: Model, sites: Sequence[str] = CHECKED_SITES) -> list[SiteCheck]:
    """A check of every (layer, site) that the model offers. Costs about (places / 7) short passes.

    Raises ModelError for a model that cannot be steered at all.
    """
    places = [
        (layer, site)
        for site in sites
        for layer in range(model.n_layers)
        if site in model.hooks.sites_of(layer)
    ]
    norms = _residual_norms(model)
    step = ROWS_PER_PASS - 1
    return [
        check
        for start in range(0, len(places), step)
        for check in _check(model, places[start : start + step], norms)
    ]


def strength_zero_is_identical(model: Model) -> bool:
    """Whether strength 0 gives the bits of the bare model, alone and beside a steered row."""
    place = (model.n_layers // 2, RESIDUAL)
    zero = model.plan([(_vector(model, place), 0.0)])
    steered = _plan(model, place, length=1.0)
    for rows, plans in ((1, [zero]), (2, [zero, steered])):
        bare = model.network(mx.array([PROBE_TOKENS] * rows)).astype(mx.float32)
        if not np.array_equal(_pass(model, plans, []).logits[0], np.array(bare[0])):
            return False
    return True


def _check(model: Model, places: Sequence[Place], norms: np.ndarray) -> Iterator[SiteCheck]:
    """The checks of a few places: row 0 unsteered, row i shifted at places[i - 1]."""
    lengths = [SHIFT * norms[layer] for layer, _ in places]
    plans = [_plan(model, place, length) for place, length in zip(places, lengths, strict=True)]
    seen = _pass(model, [Plan([]), *plans], places)
    plain = seen.logits[0, -1]
    for row, (place, length) in enumerate(zip(places, lengths, strict=True), start=1):
        change = seen.captured[place][row] - seen.captured[place][0]
        expected = length * _direction(model.d_model)
        yield SiteCheck(
            layer=place[0],
            site=place[1],
            capture_error=_norm(change[-1] - expected) / length,
            leak=float(np.linalg.norm(change[:-1], axis=-1).max()) / length,
            logit_change=_norm(seen.logits[row, -1] - plain) / _norm(plain),
        )


def _pass(model: Model, plans: Sequence[Plan], places: Sequence[Place]) -> _Passed:
    """One forward pass without a cache, row i under plans[i], reading `places`."""
    tokens = mx.array([PROBE_TOKENS] * len(plans))
    rows = RowCache([model.row(plan, len(PROBE_TOKENS)) for plan in plans])
    run = Run(model.steered.stacker.edits(plans, rows.take(tokens)), frozenset(places))
    with model.hooks.forward(run):
        logits = model.network(tokens).astype(mx.float32)
    mx.eval(logits, run.captured)
    return _Passed(np.array(logits), {at: np.array(x) for at, x in run.captured.items()})


def _residual_norms(model: Model) -> np.ndarray:
    """float32 [n_layers]: ‖residual‖ at the probe's last position."""
    places = [(layer, RESIDUAL) for layer in range(model.n_layers)]
    captured = _pass(model, [Plan([])], places).captured
    return np.array([_norm(captured[place][0, -1]) for place in places], np.float32)


def _plan(model: Model, place: Place, length: float) -> Plan:
    return model.plan([(_vector(model, place, length), "1r")])


def _vector(model: Model, place: Place, length: float = 1.0) -> SteeringVector:
    """A shift of `length` at one place."""
    layer, site = place
    arrays = {layer: length * _direction(model.d_model)}
    return SteeringVector.from_arrays(arrays, site=site, n_layers=model.n_layers, name="probe")


def _direction(width: int) -> np.ndarray:
    """A fixed random unit vector float32 [width]."""
    x = np.random.default_rng(0).normal(size=width).astype(np.float32)
    return np.asarray(x / np.linalg.norm(x), np.float32)


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))
