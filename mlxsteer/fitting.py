"""Whether a vector belongs to a model: its width, its depth, what it was made on.

Knows the model's shape and stamp, never the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlxsteer.errors import VectorError
from mlxsteer.vector import Array, SteeringVector


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know of a model.

    residual_norm: gives the float32 [n_layers] medians; called only when a vector lacks its own.
    stamp: facts that vectors are checked against (architecture, base_model, …).
    """

    label: str
    n_layers: int
    d_model: int
    residual_norm: Callable[[], Array]
    stamp: Mapping[str, Any]


def check_model(vector: SteeringVector, shape: ModelShape, *, force: bool = False) -> list[str]:
    """Warnings for another revision or quantisation; VectorError for another architecture."""
    theirs, ours = vector.model, shape.stamp

    def differs(what: str) -> bool:
        known = theirs.get(what) is not None and ours.get(what) is not None
        return known and theirs[what] != ours[what]

    if differs("architecture") and not force:
        raise VectorError(
            f"{vector.name!r} was made on a {theirs['architecture']} model; {shape.label} is"
            f" {ours['architecture']}. Make one for this model (mlxsteer extract {vector.name}),"
            " or add --force."
        )
    if differs("base_model"):
        return [f"{vector.name} was made on {theirs['base_model']}, not {ours['base_model']}."]
    for what, word in (("base_revision", "revision"), ("quantization", "quantisation")):
        if differs(what):
            return [f"{vector.name} was made on {word} {theirs[what]}; this is {ours[what]}."]
    return []


def fitted(vector: SteeringVector, shape: ModelShape) -> SteeringVector:
    """The vector with the model's depth, where it came from arrays that did not say theirs.

    VectorError for a vector of another width or depth.
    """
    if vector.d_model != shape.d_model:
        raise VectorError(
            f"{vector.name!r} has width {vector.d_model}, {shape.label} has {shape.d_model}: it"
            f" belongs to another model. Make one for this: mlxsteer extract {vector.name}"
        )
    if vector.n_layers == shape.n_layers:
        return vector
    if vector.about.get("n_layers_known", True) or vector.layers[-1] >= shape.n_layers:
        raise VectorError(
            f"{vector.name!r} is for a model of {vector.n_layers} layers (it acts on layers"
            f" {vector.layers[0]} to {vector.layers[-1]}); {shape.label} has layers 0 to"
            f" {shape.n_layers - 1}. Make one for this: mlxsteer extract {vector.name}"
        )
    missing = shape.n_layers - vector.n_layers
    padded: dict[str, Any] = {
        what: None if array is None else np.pad(array, (0, missing))
        for what in ("magnitude", "layer_share", "residual_norm")
        for array in [getattr(vector, what)]
    }
    about = {key: value for key, value in vector.about.items() if key != "n_layers_known"}
    return replace(vector, n_layers=shape.n_layers, about=about, **padded)
