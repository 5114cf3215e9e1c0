"""Steering text and vectors become arrays: what is added where, on which positions, how much.

A `Plan` is one row's steering for one model shape, checked and immutable. It knows the model's
shape and norms, never the model; `edits` stacks the plans of a batch into a forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mlxsteer.errors import UsageError
from mlxsteer.fitting import ModelShape, check_model, fitted
from mlxsteer.grammar import Term
from mlxsteer.grammar import format as format_terms
from mlxsteer.similarity import coincidences
from mlxsteer.vector import EDGE, Array, SteeringVector

# A position's phase is a set of bits. The last prompt position is PROMPT | (the phase of the
# first generated token), because its logits give that token.
PROMPT, THINK, ANSWER, TOOL = 1, 2, 4, 8
PHASES_OF: Mapping[str, int] = {
    "answer": ANSWER,
    "think": THINK,
    "generated": ANSWER | THINK,
    "prompt": PROMPT,
    "all": PROMPT | THINK | ANSWER | TOOL,
}

Place = tuple[int, str]


@dataclass(frozen=True)
class SiteEdit:
    """What happens at one place of one row, in this order: project, clamp, shift, turn.

    Projections and clamps come first so that no term removes another's shift. `turn` is a shift
    that keeps the state's norm. Arrays are float32 `[d]` (site `stream`: `[4, d]`).
    """

    projections: tuple[tuple[Array, float], ...] = ()
    clamps: tuple[tuple[Array, float], ...] = ()
    shift: Array | None = None
    turn: Array | None = None


@dataclass(frozen=True)
class PlannedTerm:
    """A term with its vector: signed lengths [n_layers] (add, clamp) or share (project)."""

    term: Term
    vector: SteeringVector
    positions: str
    lengths: Array
    dose: float | None

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in self.vector.layers if self.lengths[layer] != 0)

    @property
    def phases(self) -> int:
        return PHASES_OF[self.positions]


class Plan:
    """One row's steering. Falsy when it changes nothing."""

    def __init__(self, terms: Sequence[PlannedTerm], warnings: Sequence[str] = ()):
        self.terms = tuple(terms)
        self.warnings = tuple(warnings)
        self._edits: dict[int, dict[Place, SiteEdit]] = {}
        self._stamps: dict[int, str] = {}

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __str__(self) -> str:
        return format_terms(planned.term for planned in self.terms)

    @property
    def places(self) -> set[Place]:
        """Every (layer, site) that the plan touches."""
        return {(layer, p.vector.site) for p in self.terms for layer in p.layers}

    @cached_property
    def key(self) -> str:
        """A hash of everything that the plan does; equal keys give equal outputs."""
        digest = hashlib.sha256()
        for planned in self.terms:
            vector = planned.vector
            words = (vector.op, vector.site, planned.positions, vector.norm_preserving)
            digest.update(repr(words).encode())
            for layer in planned.layers:
                digest.update(np.int32(layer).tobytes() + planned.lengths[layer].tobytes())
                digest.update(np.ascontiguousarray(vector.directions[layer]).tobytes())
        return digest.hexdigest() if self.terms else ""

    def stamp(self, phase: int) -> str:
        """The key of what is done at positions of `phase`; empty when nothing is."""
        if phase not in self._stamps:  # asked for every token, and hashes every direction
            self._stamps[phase] = Plan(self._acting(phase)).key
        return self._stamps[phase]

    def edit(self, phase: int) -> dict[Place, SiteEdit]:
        """{place: edit} at positions of `phase`."""
        if phase not in self._edits:
            edits: dict[Place, SiteEdit] = {}
            for planned in self._acting(phase):
                for layer in planned.layers:
                    place = (layer, planned.vector.site)
                    edits[place] = _with_term(edits.get(place, SiteEdit()), planned, layer)
            self._edits[phase] = edits
        return self._edits[phase]

    def _acting(self, phase: int) -> list[PlannedTerm]:
        return [planned for planned in self.terms if planned.phases & phase]

    def explain(self) -> str:
        """A table: what is added where, at what dose, on which positions."""
        if not self:
            return "nothing is steered"
        return "\n".join([*(_explain(planned) for planned in self.terms), *self.warnings])


def build(
    terms: Iterable[tuple[Term, SteeringVector]], shape: ModelShape, *, force: bool = False
) -> Plan:
    """The plan of (term, vector) pairs on a model of `shape`.

    Terms of strength 0 leave no trace. Raises VectorError for a vector of another shape or (not
    `force`) architecture, UsageError for a strength that the op cannot have.
    """
    planned, warnings = [], []
    for term, vector in terms:
        vector = fitted(vector, shape)
        warnings += check_model(vector, shape, force=force)
        if term.amount == 0:
            continue
        planned.append(_plan_term(term, vector, shape))
        if vector.op != "project" and not term.unit and abs(term.amount * vector.gain) > EDGE:
            warnings.append(
                f"{vector.name}:{term.amount:g} is above 5, the edge of coherent output; obeying."
            )
        if vector.op == "add" and not term.unit and vector.calibration is None:
            warnings.append(
                f"{vector.name} is uncalibrated: strength 5 is taken as dose"
                f" {vector.delta(1):g}. To find its limit: mlxsteer calibrate {vector.name}"
            )
    return Plan(planned, warnings + coincidences(planned))


def _plan_term(term: Term, vector: SteeringVector, shape: ModelShape) -> PlannedTerm:
    positions = term.positions or vector.positions
    if vector.op == "project":
        if term.unit == "d":
            raise UsageError(
                f"{vector.name!r} is a projection: its strength is the share removed (0 to 1),"
                f" not a dose. Type {vector.name}:1"
            )
        share = np.zeros(vector.n_layers, np.float32)
        share[list(vector.layers)] = vector.share_removed(term.amount)
        return PlannedTerm(term, vector, positions, share, None)
    norm = vector.residual_norm
    if norm is None and term.unit != "r":
        norm = shape.residual_norm()
    lengths = np.asarray(vector.lengths(term.amount, term.unit, norm), np.float32)
    dose = None if term.unit == "r" else vector.dose(term.amount, term.unit)
    return PlannedTerm(term, vector, positions, lengths, dose)


def _with_term(edit: SiteEdit, planned: PlannedTerm, layer: int) -> SiteEdit:
    vector = planned.vector
    direction, length = vector.directions[layer], float(planned.lengths[layer])
    if vector.op == "project":
        rows = direction if direction.ndim == 2 and vector.site != "stream" else direction[None]
        removed = tuple((row, length) for row in rows)
        return replace(edit, projections=edit.projections + removed)
    if vector.op == "clamp":
        return replace(edit, clamps=(*edit.clamps, (direction, length)))
    shift = length * direction
    if vector.norm_preserving:
        return replace(edit, turn=shift if edit.turn is None else edit.turn + shift)
    return replace(edit, shift=shift if edit.shift is None else edit.shift + shift)


def _explain(planned: PlannedTerm) -> str:
    vector, layers = planned.vector, planned.layers
    if not layers:
        return f"{format_terms([planned.term])}: nothing"
    verb = {"add": "add", "clamp": "set the component to", "project": "remove"}[vector.op]
    how = f"{verb} at {vector.site}, layers {_spans(layers)}, on {planned.positions} positions"
    if vector.op == "project":
        amount = f"share {planned.lengths[layers[0]]:+.2f} of the component"
    else:
        per_layer = planned.lengths[list(layers)]
        amount = f"length {per_layer.min():.3g} to {per_layer.max():.3g} per layer"
        if planned.dose is not None:
            amount = f"dose {planned.dose:+.3f} over {len(layers)} layers, {amount}"
    keeping = ", norm kept" if vector.norm_preserving else ""
    return f"{format_terms([planned.term])}: {how}; {amount}{keeping}"


def _spans(layers: Sequence[int]) -> str:
    """`9-20` or `3, 9-20`."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
