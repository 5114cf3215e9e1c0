"""Steering text and vectors become arrays: what is added where, on which positions, how much.

A `Plan` is one row's steering for one model shape, checked and immutable. It knows the model's
shape and norms, never the model; `edits` stacks the plans of a batch into a forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mlxsteer.errors import UsageError
from mlxsteer.fitting import ModelShape, check_model, fitted
from mlxsteer.grammar import Term
from mlxsteer.grammar import format as format_terms
from mlxsteer.probe import probe_of
from mlxsteer.similarity import coincidences
from mlxsteer.suffixes import WITH_PROMPT
from mlxsteer.timing import Gate, Timing
from mlxsteer.vector import EDGE, Array, Encoder, SteeringVector

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

MAX_TIMINGS = 32  # how each acts is a digit in base 3 of one 64-bit integer (`edits`)

Place = tuple[int, str]
Slots = tuple[int, ...]
STEADY = -1  # the slot of terms without condition or schedule


@dataclass(frozen=True)
class SiteEdit:
    """What happens at one place of one row: project, clamp, set features, shift, turn.

    What sets comes first so that no term removes another's shift; features are all read before
    the first of them is set. `turn` is a shift that keeps the state's norm. Arrays are float32
    `[d]` (site `stream`: `[4, d]`).
    """

    projections: tuple[tuple[Array, float], ...] = ()
    clamps: tuple[tuple[Array, float], ...] = ()
    features: tuple[tuple[Array, float, Encoder], ...] = ()
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
    timing: Timing | None = None

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
        timings = {p.timing.key: p.timing for p in self.terms if p.timing is not None}
        self.timings = tuple(timings.values())
        self._slots = {key: slot for slot, key in enumerate(timings)}
        self._edits: dict[tuple[int, Slots], dict[Place, SiteEdit]] = {}
        self._stamps: dict[int, str] = {}

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __str__(self) -> str:
        return format_terms(planned.term for planned in self.terms)

    @property
    def places(self) -> set[Place]:
        """Every (layer, site) that the plan edits or reads."""
        edited = {(layer, p.vector.site) for p in self.terms for layer in p.layers}
        return edited | {(gate.probe.layer, gate.probe.site) for gate in self.gates}

    @cached_property
    def gates(self) -> tuple[Gate, ...]:
        """The distinct gates of its terms."""
        gates = [timing.gate for timing in self.timings if timing.gate is not None]
        return tuple({gate.key: gate for gate in gates}.values())

    def weights(self, counts: Sequence[int], open_gates: Mapping[str, bool]) -> Array:
        """float32 [T, timings]: the share of its strength with which each timing's terms act.

        counts: per position, the tokens generated before the one it gives (see `timing`).
        """
        weights = [[t.weight(count, open_gates) for t in self.timings] for count in counts]
        return np.array(weights, np.float32).reshape(len(counts), len(self.timings))

    @cached_property
    def key(self) -> str:
        """A hash of everything that the plan does; equal keys give equal outputs."""
        digest = hashlib.sha256()
        for planned in self.terms:
            vector = planned.vector
            words = (vector.op, vector.site, planned.positions, vector.norm_preserving)
            digest.update(repr(words).encode())
            if planned.timing is not None:
                digest.update(planned.timing.key.encode())
            for layer in planned.layers:
                digest.update(np.int32(layer).tobytes() + planned.lengths[layer].tobytes())
                digest.update(np.ascontiguousarray(vector.directions[layer]).tobytes())
            if (encoder := vector.encoder) is not None:
                digest.update(repr((encoder.bias, encoder.threshold)).encode())
                digest.update(np.ascontiguousarray(encoder.row).tobytes())
        return digest.hexdigest() if self.terms else ""

    def stamp(self, phase: int) -> str:
        """The key of what is done at positions of `phase`; empty when nothing is."""
        if phase not in self._stamps:  # asked for every token, and hashes every direction
            self._stamps[phase] = Plan(self._acting(phase)).key
        return self._stamps[phase]

    def edit(self, phase: int, slots: Slots = (STEADY,)) -> dict[Place, SiteEdit]:
        """{place: edit} at positions of `phase`, by the terms of `slots`.

        A slot is an index of `timings`, or STEADY for the terms that have none.
        """
        if (phase, slots) not in self._edits:
            edits: dict[Place, SiteEdit] = {}
            for planned in self._acting(phase):
                if self._slot(planned) not in slots:
                    continue
                for layer in planned.layers:
                    place = (layer, planned.vector.site)
                    edits[place] = _with_term(edits.get(place, SiteEdit()), planned, layer)
            self._edits[phase, slots] = edits
        return self._edits[phase, slots]

    def _acting(self, phase: int) -> list[PlannedTerm]:
        return [planned for planned in self.terms if PHASES_OF[planned.positions] & phase]

    def _slot(self, planned: PlannedTerm) -> int:
        return STEADY if planned.timing is None else self._slots[planned.timing.key]

    def explain(self) -> str:
        """A table: what is added where, at what dose, on which positions."""
        if not self:
            return "nothing is steered"
        return "\n".join([*(_explain(planned) for planned in self.terms), *self.warnings])


def build(
    terms: Iterable[tuple[Term, SteeringVector]],
    shape: ModelShape,
    *,
    force: bool = False,
    find: Callable[[str], SteeringVector] | None = None,
) -> Plan:
    """The plan of (term, vector) pairs on a model of `shape`.

    find: the vector of a name in a condition that no term has. Terms of strength 0 leave no
    trace. Raises VectorError for a vector of another shape or (not `force`) architecture,
    UsageError for a strength that the op cannot have or a condition that cannot be met.
    """
    terms = list(terms)
    named = {term.name: vector for term, vector in terms}
    planned, warnings = [], []
    for term, vector in terms:
        vector = fitted(vector, shape)
        warnings += check_model(vector, shape, force=force)
        read = _read(term, named, find)
        warnings += check_model(read, shape, force=force) if read else []
        timing = _timing(term, vector, read, shape)
        if term.amount == 0:
            continue
        planned.append(replace(_plan_term(term, vector, shape), timing=timing))
        warnings += _strength_warnings(term, vector)
    plan = Plan(planned, warnings + coincidences(planned))
    if len(plan.timings) > MAX_TIMINGS:
        raise UsageError(
            f"{len(plan.timings)} different conditions and schedules are too many for one text;"
            f" {MAX_TIMINGS} go. Give terms that act together the same ones."
        )
    return plan


def _strength_warnings(term: Term, vector: SteeringVector) -> Iterator[str]:
    if vector.op != "project" and not term.unit and abs(term.amount * vector.gain) > EDGE:
        yield f"{vector.name}:{term.amount:g} is above 5, the edge of coherent output; obeying."
    if vector.op == "project" and term.amount * vector.gain > 1:
        yield (
            f"{vector.name}:{term.amount:g} removes more than the whole component (1), so what is"
            " left points the other way; obeying."
        )
    limited = vector.op == "add" or vector.encoder is not None
    if limited and not term.unit and vector.calibration is None:
        typed = f"mlxsteer calibrate {vector.name}"
        unkept = " " in vector.name  # a sum in Python, of which no file is kept
        yield (
            f"{vector.name} is uncalibrated: strength 5 is taken as dose"
            f" {vector.delta(1):g}. To find its limit:"
            f" {'model.calibrate(vector)' if unkept else typed}"
        )


def _read(
    term: Term,
    named: Mapping[str, SteeringVector],
    find: Callable[[str], SteeringVector] | None,
) -> SteeringVector | None:
    """The vector that the term's condition reads."""
    if term.when is None:
        return None
    name = term.when.name
    if name in named:
        return named[name]
    if find is None:
        raise UsageError(
            f"There is no vector to read {name!r} with. Steer with it as well, if only by"
            f" strength 0: {name}:0"
        )
    return find(name)


def _timing(
    term: Term, vector: SteeringVector, read: SteeringVector | None, shape: ModelShape
) -> Timing | None:
    if not term.timed:
        return None
    if (term.positions or vector.positions) in WITH_PROMPT:
        raise UsageError(
            f"Conditions and schedules go by generated tokens, and {vector.name!r} acts on"
            f" {vector.positions} positions unless told. Tell it:"
            f" {format_terms([replace(term, positions='generated')])}"
        )
    gate = None
    if term.when is not None and read is not None:
        probe = probe_of(read, shape, term.when.layer)
        gate = Gate(probe, term.when.sign == ">", term.when.value)
    return Timing(gate, term.first, term.after, term.decay)


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
    if vector.encoder is not None:
        return replace(edit, features=(*edit.features, (direction, length, vector.encoder)))
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
    verb = {"add": "add", "clamp": "set the component", "project": "remove"}[vector.op]
    verb = verb if vector.encoder is None else "set the feature"
    how = f"{verb} at {vector.site}, layers {_spans(layers)}, on {planned.positions} positions"
    if vector.op == "project":
        amount = f"share {planned.lengths[layers[0]]:+.2f} of the component"
    else:
        per_layer = planned.lengths[list(layers)]
        amount = f"length {per_layer.min():.3g} to {per_layer.max():.3g} per layer"
        if planned.dose is not None:
            amount = f"dose {planned.dose:+.3f} over {len(layers)} layers, {amount}"
    keeping = ", norm kept" if vector.norm_preserving else ""
    timing = f"; {planned.timing}" if planned.timing is not None else ""
    return f"{format_terms([planned.term])}: {how}; {amount}{keeping}{timing}"


def _spans(layers: Sequence[int]) -> str:
    """`9-20` or `3, 9-20`."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
