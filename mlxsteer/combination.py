"""Sums of vectors: the shift of a combination is the sum of its parts' shifts.

Works on the data alone; a combination is uncalibrated until `calibrate` finds its own limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from mlxsteer.errors import VectorError
from mlxsteer.vector import DEFAULT_DELTA, EDGE, Array, SteeringVector


def combine(vectors: Iterable[SteeringVector], name: str | None = None) -> SteeringVector:
    """The vector whose shift at strength 1 is the sum of the vectors' shifts at strength 1.

    Vectors without residual norms add their raw arrays instead. The result is uncalibrated.
    Raises VectorError when they do not belong together or cancel.
    """
    parts = list(vectors)
    if not parts:
        raise VectorError("There is nothing to combine: give at least one vector.")
    first = parts[0]
    for other in parts[1:]:
        _check_summable(first, other)
    raw = [part.residual_norm is None for part in parts]
    if any(raw) and not all(raw):
        lacking = parts[raw.index(True)]
        raise VectorError(
            f"{lacking.name!r} has no residual norms, so its length beside the others is unknown."
            " Extract it on the model, or call `.with_norms(model.residual_norm)` first."
        )
    unit = "r" if raw[0] else ""
    sums: dict[int, Array] = {}
    for part in parts:
        lengths = part.lengths(1.0, unit, None)
        for layer, direction in part.directions.items():
            sums[layer] = sums.get(layer, 0) + lengths[layer] * direction
    return _from_sum(sums, parts, name or _sum_name(parts), raw[0])


def _sum_name(parts: Iterable[SteeringVector]) -> str:
    """`2*terse - formal`."""
    text = ""
    for part in parts:
        size = "" if part.gain == 1 else f"{part.gain:g}*"
        sign = "-" if part.name.startswith("-") else "+"
        text += f" {sign} {size}{part.name.removeprefix('-')}"
    return text.removeprefix(" + ").removeprefix(" ")


def _from_sum(
    sums: Mapping[int, Array], parts: list[SteeringVector], name: str, raw: bool
) -> SteeringVector:
    first = parts[0]
    directions, magnitude = {}, np.zeros(first.n_layers, np.float32)
    for layer, array in sums.items():
        length = float(np.linalg.norm(array))
        if length > 1e-8:
            directions[layer] = (array / length).astype(np.float32)
            magnitude[layer] = length
    if not directions:
        raise VectorError(f"{name}: the vectors cancel; nothing is left to steer with.")
    share, gain = None, 1.0
    depth = {key: value for key, value in first.about.items() if key == "n_layers_known"}
    if not raw and first.residual_norm is not None:
        norms = np.where(magnitude > 0, first.residual_norm, 1)  # idle layers may have norm 0
        doses = magnitude / norms
        share = (doses / doses.sum()).astype(np.float32)
        gain = float(doses.sum()) * EDGE / DEFAULT_DELTA
    # `r` multiplies by the gain too; the stored lengths are those of raw multiple 1.
    return replace(
        first,
        name=name,
        directions=directions,
        layer_share=share,
        magnitude=magnitude / np.float32(gain),
        control_mean={},
        gain=gain,
        calibration=None,
        about={"parents": [part.name for part in parts], "method": "combination", **depth},
    )


def _check_summable(first: SteeringVector, other: SteeringVector) -> None:
    for what in ("op", "site", "d_model", "n_layers", "norm_preserving"):
        mine, theirs = getattr(first, what), getattr(other, what)
        if mine != theirs:
            raise VectorError(
                f"Cannot add {first.name!r} and {other.name!r}: {what} is {mine} and {theirs}."
                f" Give both as terms instead: --steer '{first.name}:1, {other.name}:1'."
            )
    if first.op != "add":
        raise VectorError(
            f"Only op `add` vectors sum; {first.name!r} is `{first.op}`."
            f" Give both as terms: --steer '{first.name}:1, {other.name}:1'."
        )
