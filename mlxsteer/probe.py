"""Reading a direction: how far along it the states of a forward pass lie, as a plain number.

A probe is data made from a vector; what is done with its readings is others' business.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.errors import UsageError, VectorError
from mlxsteer.fitting import ModelShape, fitted
from mlxsteer.vector import Array, SteeringVector

SMALLEST_UNIT = 1e-4  # of the residual norm: poles nearer than this do not scale a reading
# Token by token, readings spread by 0.11 to 0.39 of the poles' distance (standard deviation;
# terse, formal, french and cheerful in four answers of the demo model), french by 0.04 norms.
MARGIN = 0.1
NORM_MARGIN = 0.03


@dataclass(frozen=True, eq=False)
class Probe:
    """One direction at one place, and the scale it is read on.

    direction: float32 unit [d]. origin, unit: the component along it that reads 0, and how much
    more reads 1. margin: a difference of readings that is noise rather than change. poles:
    whether 0 and 1 are where the poles lay.

    A vector that we extracted knows where its poles lay at the positions it was extracted from:
    there 0 is the average reading of the negative pole and 1 that of the positive one. For any
    other vector 0 is no component at all and 1 is the model's median residual norm at the layer,
    so that readings are small (a few hundredths, mostly).
    """

    name: str
    layer: int
    site: str
    direction: Array
    origin: float
    unit: float
    margin: float = MARGIN
    poles: bool = True

    @cached_property
    def key(self) -> str:
        """Equal for probes that read alike."""
        digest = hashlib.sha256(np.ascontiguousarray(self.direction).tobytes())
        digest.update(repr((self.layer, self.site, self.origin, self.unit, self.margin)).encode())
        return digest.hexdigest()

    def read(self, states: mx.array) -> mx.array:
        """[..., d] → float32 [...]: (states·direction − origin) / unit."""
        component = states.astype(mx.float32) @ mx.array(self.direction)
        return (component - self.origin) / self.unit


def probe_of(vector: SteeringVector, shape: ModelShape, layer: int | None = None) -> Probe:
    """The probe that reads `vector`'s direction at `layer`, by default its middle one.

    Raises VectorError for a vector of another width or depth or with more than one direction at
    the layer, UsageError for a layer that it does not have.
    """
    vector = fitted(vector, shape)
    if layer is None:
        layer = vector.layers[len(vector.layers) // 2]
    elif layer not in vector.directions:
        raise UsageError(
            f"{vector.name!r} has no direction at layer {layer}, so it cannot be read there; it"
            f" has one at {', '.join(map(str, vector.layers))}."
        )
    direction = np.atleast_2d(vector.directions[layer])
    if len(direction) != 1:
        raise VectorError(
            f"{vector.name!r} has {len(direction)} directions at layer {layer}, so it gives no"
            " single reading. Read a vector that has one, e.g. one made by mlxsteer extract."
        )
    norm = vector.residual_norm if vector.residual_norm is not None else shape.residual_norm()
    scale = _scale(vector, layer, float(norm[layer]))
    return Probe(vector.name, layer, vector.site, direction[0], *scale)


def _scale(vector: SteeringVector, layer: int, norm: float) -> tuple[float, float, float, bool]:
    """(origin, unit, margin, poles): from the poles' readings where `extract` stored them."""
    report = next((r for r in _reports(vector) if r.get("layer") == layer), {})
    low, high = report.get("negative_reading"), report.get("positive_reading")
    if low is None or high is None or high - low <= SMALLEST_UNIT * norm:
        return 0.0, norm, NORM_MARGIN, False
    return float(low), float(high - low), MARGIN, True


def _reports(vector: SteeringVector) -> list[dict[str, Any]]:
    return vector.about.get("layer_reports") or []
