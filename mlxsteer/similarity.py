"""How alike vectors are: cosines per layer, one figure per pair, and terms that nearly coincide.

Works on the vectors' arrays alone, without a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from mlxsteer.errors import VectorError
from mlxsteer.grammar import format as format_terms
from mlxsteer.vector import Array, SteeringVector

if TYPE_CHECKING:
    from mlxsteer.plan import PlannedTerm

COINCIDING = 0.9  # cosine: by then a term repeats 0.9² = 81% of what the other does
STREAMS = 4


@dataclass(frozen=True)
class Similarity:
    """Two vectors side by side.

    cosines: {0-based layer: cosine} over the layers that both act on. mean: those cosines
    weighted by layer share (the mean of the two vectors' shares); None where no layer is common.
    """

    a: SteeringVector
    b: SteeringVector
    cosines: dict[int, float]
    mean: float | None


def compare(vectors: Iterable[SteeringVector]) -> list[Similarity]:
    """Every pair of `vectors`, in order. VectorError for vectors of different widths."""
    return [similarity(a, b) for a, b in combinations(vectors, 2)]


def similarity(a: SteeringVector, b: SteeringVector) -> Similarity:
    """How alike two vectors are. VectorError when their widths differ."""
    if a.d_model != b.d_model:
        raise VectorError(
            f"{a.name!r} has width {a.d_model}, {b.name!r} {b.d_model}: they are of different"
            " models, so no angle lies between them. Compare vectors of one model."
        )
    common = sorted(set(a.layers) & set(b.layers))
    cosines = {layer: _cosine(_rows(a, b, layer), _rows(b, a, layer)) for layer in common}
    if not cosines:
        return Similarity(a, b, {}, None)
    weights = (layer_shares(a)[common] + layer_shares(b)[common]) / 2
    if not weights.sum():
        weights = np.ones(len(common))
    return Similarity(a, b, cosines, float(np.average(list(cosines.values()), weights=weights)))


def layer_shares(vector: SteeringVector) -> Array:
    """float32 [n_layers] shares of the dose; a raw vector without norms goes by its lengths."""
    norm = vector.residual_norm
    return vector.shares(np.ones(vector.n_layers, np.float32) if norm is None else norm)


def _rows(vector: SteeringVector, other: SteeringVector, layer: int) -> Array:
    """The direction as orthonormal rows; what moves all streams alike, as a pattern of them."""
    direction = vector.directions[layer]
    if vector.site == "stream":
        return direction.reshape(1, -1)
    rows = np.atleast_2d(direction)
    if other.site == "stream":
        return np.tile(rows, STREAMS) / np.sqrt(STREAMS)
    return rows


def _cosine(a: Array, b: Array) -> float:
    """The cosine of two unit rows; of planes the largest one in them (it has no sign).

    The largest singular value of A·Bᵀ is the cosine of the smallest principal angle (Björck and
    Golub 1973).
    """
    products = a @ b.T
    if products.size == 1:
        return float(products[0, 0])
    return float(np.linalg.svd(products, compute_uv=False)[0])


# --- terms of one steering ------------------------------------------------------------------------


def coincidences(terms: Sequence[PlannedTerm]) -> list[str]:
    """A warning for each pair of shifts at one site that nearly repeat or cancel each other."""
    warnings = []
    for one, other in combinations(terms, 2):
        cosine = similarity(one.vector, other.vector).mean if _meet(one, other) else None
        if cosine is not None and abs(cosine) > COINCIDING:
            warnings.append(_warning(one, other, cosine))
    return warnings


def _meet(one: PlannedTerm, other: PlannedTerm) -> bool:
    """Whether both shift the same states at the same positions."""
    a, b = one.vector, other.vector
    shifts = a.op == b.op == "add" and a.site == b.site
    return shifts and bool(one.phases & other.phases) and not _ended(one, other)


def _ended(one: PlannedTerm, other: PlannedTerm) -> bool:
    """Whether one's schedule ends before the other's begins."""
    return any(
        before.term.first is not None and before.term.first <= (after.term.after or 0)
        for before, after in ((one, other), (other, one))
    )


def _warning(one: PlannedTerm, other: PlannedTerm, cosine: float) -> str:
    way = "nearly the same way" if cosine > 0 else "nearly opposite ways"
    if cosine * one.term.amount * other.term.amount > 0:
        effect = "they add up"
    else:
        effect = "they work against each other"
    names = " and ".join(format_terms([planned.term]) for planned in (one, other))
    return f"{names} point {way} (cosine {cosine:.2f}) and {effect}; one of them may be enough."
