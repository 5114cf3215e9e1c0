"""A steering vector: unit directions per layer, the shift they mean, and where they come from.

The data and its arithmetic; `vectorfile` reads and writes it, `plan` turns it into arrays for a
forward pass. Knows nothing of models beyond the facts that a vector carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxsteer.errors import VectorError

OPS = ("add", "project", "clamp")
SITES = ("residual", "stream", "ffn_out", "attn_out")
DEFAULT_DELTA = 0.3  # δ* of an uncalibrated vector: about where terse stays coherent on the demo
EDGE = 5.0  # the strength that means δ*
UNIT_TOLERANCE = 1e-3
ROUNDING = 1e-6  # a length that differs from 1 by less is 1 in float32

Array = np.ndarray


@dataclass(frozen=True)
class Calibration:
    """The calibrated limits: largest coherent dose for each sign, and how they were found."""

    delta_plus: float
    delta_minus: float
    guard: Mapping[str, Any] = field(default_factory=dict)
    context_len: int | None = None
    curve: tuple[Mapping[str, Any], ...] = ()

    def swapped(self) -> Calibration:
        """The limits of the opposite direction."""
        return replace(self, delta_plus=self.delta_minus, delta_minus=self.delta_plus)


@dataclass(frozen=True, eq=False)
class Encoder:
    """How a feature reads a state: f(h) = m where m = row·h + bias is above `threshold`, else 0.

    row: float32 [d]. f is the length of the feature's share of the state along its unit
    direction. threshold is at least 0.
    """

    row: Array
    bias: float
    threshold: float = 0.0

    def read(self, states: Array) -> Array:
        """[..., d] → [...]: f of every state."""
        reading = np.asarray(states, np.float32) @ self.row + np.float32(self.bias)
        return np.where(reading > self.threshold, reading, 0)


@dataclass(frozen=True)
class SteeringVector:
    """One named direction.

    directions: {0-based layer: float32 unit [d]}; `[k, d]` orthonormal rows for op `project`;
        `[4, d]` of unit Frobenius norm for site `stream`.
    residual_norm: [n_layers] median ‖residual‖, first position and padding left out.
    layer_share: [n_layers], the share of the dose that each layer gets; sums to 1.
    magnitude: [n_layers], the norms of the arrays that the directions came from; `NAME:1r` adds
        these arrays.
    gain: what the vector was multiplied by: `3 * v` has gain 3.
    encoder: of a feature whose op is `clamp`: what is set is its reading, not the component.
    effect: for `project`, whether positive strength removes the component or amplifies it.
    """

    name: str
    directions: Mapping[int, Array]
    n_layers: int
    op: str = "add"
    site: str = "residual"
    residual_norm: Array | None = None
    layer_share: Array | None = None
    magnitude: Array | None = None
    control_mean: Mapping[int, Array] = field(default_factory=dict)
    encoder: Encoder | None = None
    gain: float = 1.0
    norm_preserving: bool = False
    effect: str = "remove"
    positions: str = "answer"
    calibration: Calibration | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_words(self)
        _check_directions(self)
        _check_profiles(self)
        _check_encoder(self)

    # --- facts ---------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The 0-based layers that it acts on, ascending."""
        return tuple(sorted(self.directions))

    @property
    def d_model(self) -> int:
        return int(next(iter(self.directions.values())).shape[-1])

    def delta(self, sign: float) -> float:
        """δ* for that sign, or the default of an uncalibrated vector."""
        if self.calibration is None:
            return DEFAULT_DELTA
        return self.calibration.delta_plus if sign >= 0 else self.calibration.delta_minus

    def dose(self, amount: float, unit: str = "") -> float:
        """The signed dose that a strength (or, unit `d`, a raw dose) asks for."""
        if unit == "d":
            return amount
        strength = amount * self.gain
        return strength / EDGE * self.delta(strength)

    def shares(self, residual_norm: Array) -> Array:
        """[n_layers] share of the dose per layer; from the magnitudes, or even, if not stored."""
        if self.layer_share is not None:
            return self.layer_share
        share = np.zeros(self.n_layers, np.float64)
        acting = list(self.layers)
        if self.magnitude is not None:
            share[acting] = self.magnitude[acting] / residual_norm[acting]
        else:
            share[acting] = 1.0
        return (share / share.sum()).astype(np.float32)

    def lengths(self, amount: float, unit: str, residual_norm: Array | None) -> Array:
        """[n_layers] signed length of the shift at each layer.

        Unit `r` multiplies the stored arrays; the others need `residual_norm` (the vector's own,
        or the model's): length = dose · share · median residual norm (DESIGN, part 3).
        """
        if unit == "r":
            if self.magnitude is None:
                raise VectorError(
                    f"{self.name!r} stores no raw lengths, so {amount:g}r means nothing for it."
                    f" Type a strength ({self.name}:3) or a dose ({self.name}:0.2d)."
                )
            return amount * self.gain * self.magnitude
        norm = self.residual_norm if self.residual_norm is not None else residual_norm
        if norm is None:
            raise VectorError(
                f"{self.name!r} does not know the model's residual norms, so a strength has no"
                f" length yet. Steer a loaded model with it, or type {self.name}:1r."
            )
        return self.dose(amount, unit) * self.shares(norm) * norm

    def share_removed(self, amount: float) -> float:
        """For `project`: the signed share of the component that the strength removes."""
        return amount * self.gain * (1.0 if self.effect == "remove" else -1.0)

    # --- making --------------------------------------------------------------------------

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[int, Any],
        op: str = "add",
        site: str = "residual",
        name: str = "custom",
        n_layers: int | None = None,
        **fields: Any,
    ) -> SteeringVector:
        """A vector from raw arrays {layer: [d]}: `NAME:1r` adds exactly these arrays.

        n_layers defaults to the last layer given plus one; the plan checks it against the model.
        Raises VectorError for zeros, NaN, wrong shapes, unknown op or site.
        """
        raw = {int(layer): np.asarray(array, np.float32) for layer, array in arrays.items()}
        if not raw:
            raise VectorError("A vector needs at least one layer: {12: array}.")
        count = n_layers if n_layers is not None else max(raw) + 1
        directions, magnitude = {}, np.zeros(max(count, 0), np.float32)
        for layer, array in raw.items():
            if not 0 <= layer < count:
                raise VectorError(f"Layer {layer} is out of range 0 to {count - 1}.")
            directions[layer], magnitude[layer] = _unit(array, name, layer, op, site)
        open_depth = {} if n_layers is not None else {"n_layers_known": False}
        about = {**open_depth, **fields.pop("about", {})}
        return cls(name, directions, count, op, site, magnitude=magnitude, about=about, **fields)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a vector file. VectorError when it is not one, is damaged or is a pickle."""
        from mlxsteer.vectorfile import read

        return read(Path(path))

    def save(self, path: str | Path) -> Path:
        """Write the vector to `path`, whole or not at all."""
        from mlxsteer.vectorfile import write

        return write(self, Path(path))

    def with_norms(self, residual_norm: Array) -> SteeringVector:
        """The vector with a model's residual norms, where it has none of its own."""
        if self.residual_norm is not None:
            return self
        return replace(self, residual_norm=np.asarray(residual_norm, np.float32))

    # --- arithmetic ------------------------------------------------------------------------

    def __mul__(self, factor: float) -> SteeringVector:
        if not isinstance(factor, int | float | np.floating | np.integer):
            return NotImplemented
        if factor == 0 or not np.isfinite(factor):
            raise VectorError(f"{factor} × {self.name!r} is no direction. Use strength 0 for off.")
        vector = self if factor > 0 else -self
        return replace(vector, gain=vector.gain * abs(float(factor)))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringVector:
        return self * (1.0 / divisor)

    def __neg__(self) -> SteeringVector:
        if self.encoder is not None:
            raise VectorError(
                f"{self.name!r} sets a feature, which has no opposite. Steer with a negative"
                f" strength ({self.name}:-3), or add its direction instead."
            )
        about = _swapped(self.about)
        flipped = {layer: -array for layer, array in self.directions.items()}
        effect = {"remove": "amplify", "amplify": "remove"}[self.effect]
        return replace(
            self,
            name=self.name[1:] if self.name.startswith("-") else f"-{self.name}",
            directions=flipped if self.op != "project" else self.directions,
            effect=effect if self.op == "project" else self.effect,
            calibration=self.calibration.swapped() if self.calibration else None,
            about=about,
        )

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        from mlxsteer.combination import combine

        return combine([self, other])

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + (-other)

    def __matmul__(self, other: SteeringVector) -> float:
        """Mean cosine over the layers that both act on."""
        cosines = self.cosines(other)
        if not cosines:
            raise VectorError(f"{self.name!r} and {other.name!r} share no layer.")
        return float(np.mean(list(cosines.values())))

    def cosines(self, other: SteeringVector) -> dict[int, float]:
        """{layer: cosine} over the layers that both act on (rank-1 directions)."""
        if self.d_model != other.d_model:
            raise VectorError(
                f"{self.name!r} has width {self.d_model}, {other.name!r} {other.d_model}:"
                " they are of different models."
            )
        common = sorted(set(self.layers) & set(other.layers))
        return {
            layer: float((self.directions[layer] * other.directions[layer]).sum())
            for layer in common
        }


def _swapped(about: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the opposite direction: the poles change places and read the negative."""
    swapped = dict(about)
    swapped["positive_label"] = about.get("negative_label")
    swapped["negative_label"] = about.get("positive_label")
    if reports := about.get("layer_reports"):
        swapped["layer_reports"] = [_report_swapped(report) for report in reports]
    return swapped


def _report_swapped(report: Mapping[str, Any]) -> dict[str, Any]:
    poles = ("positive_reading", "negative_reading")
    if not all(pole in report for pole in poles):
        return dict(report)
    up, down = (float(report[pole]) for pole in poles)
    return {**report, "positive_reading": -down, "negative_reading": -up}


# --- checks ---------------------------------------------------------------------------------


def _check_words(vector: SteeringVector) -> None:
    if vector.op not in OPS:
        raise VectorError(f"Unknown op {vector.op!r} in {vector.name!r}: {', '.join(OPS)}.")
    if vector.site not in SITES:
        raise VectorError(f"Unknown site {vector.site!r} in {vector.name!r}: {', '.join(SITES)}.")
    if vector.effect not in ("remove", "amplify"):
        raise VectorError(f"Unknown effect {vector.effect!r} in {vector.name!r}.")
    if not (np.isfinite(vector.gain) and vector.gain > 0):
        raise VectorError(f"The gain of {vector.name!r} must be positive, not {vector.gain}.")


def _check_directions(vector: SteeringVector) -> None:
    if not vector.directions:
        raise VectorError(f"{vector.name!r} has no direction.")
    widths = {array.shape[-1] if array.ndim else 0 for array in vector.directions.values()}
    if len(widths) > 1:
        raise VectorError(f"{vector.name!r} mixes widths {sorted(widths)}.")
    for layer, array in vector.directions.items():
        if not 0 <= layer < vector.n_layers:
            raise VectorError(
                f"{vector.name!r} acts on layer {layer}, but its model has layers 0 to"
                f" {vector.n_layers - 1}."
            )
        _check_direction(vector, layer, array)


def _check_direction(vector: SteeringVector, layer: int, array: Array) -> None:
    where = f"{vector.name!r}, layer {layer}"
    if not np.isfinite(array).all():
        raise VectorError(f"{where}: the direction holds NaN or infinity.")
    if not array.any():
        raise VectorError(f"{where}: the direction is all zeros; there is nothing to steer with.")
    if vector.site == "stream":
        if array.ndim != 2:
            raise VectorError(f"{where}: a `stream` direction is [4, d], not {array.shape}.")
        norms = np.linalg.norm(array)
    elif array.ndim == 2 and vector.op == "project":
        gram = array @ array.T
        if np.abs(gram - np.eye(len(array))).max() > UNIT_TOLERANCE:
            raise VectorError(f"{where}: the rows of a projection must be orthonormal.")
        return
    elif array.ndim == 1:
        norms = np.linalg.norm(array)
    else:
        raise VectorError(f"{where}: a direction of op `{vector.op}` is [d], not {array.shape}.")
    if abs(float(norms) - 1) > UNIT_TOLERANCE:
        raise VectorError(f"{where}: the direction has length {float(norms):.4g}, not 1.")


def _check_profiles(vector: SteeringVector) -> None:
    for what in ("residual_norm", "layer_share", "magnitude"):
        array = getattr(vector, what)
        if array is None:
            continue
        if array.shape != (vector.n_layers,) or not np.isfinite(array).all() or (array < 0).any():
            raise VectorError(
                f"{vector.name!r}: {what} must be {vector.n_layers} finite numbers ≥ 0."
            )
    share = vector.layer_share
    if share is not None and abs(float(share.sum()) - 1) > UNIT_TOLERANCE:
        raise VectorError(f"{vector.name!r}: layer_share sums to {float(share.sum()):.4g}, not 1.")


def _check_encoder(vector: SteeringVector) -> None:
    encoder = vector.encoder
    if encoder is None:
        return
    if vector.op != "clamp" or len(vector.directions) != 1 or vector.site == "stream":
        raise VectorError(
            f"{vector.name!r}: an encoder goes with op `clamp` at one layer of residual, ffn_out"
            " or attn_out."
        )
    if encoder.row.shape != (vector.d_model,):
        raise VectorError(
            f"{vector.name!r}: the encoder's row is {list(encoder.row.shape)}, not"
            f" [{vector.d_model}]."
        )
    numbers = (encoder.bias, encoder.threshold)
    if not (np.isfinite(encoder.row).all() and np.isfinite(numbers).all()):
        raise VectorError(f"{vector.name!r}: the encoder holds NaN or infinity.")
    if encoder.threshold < 0:
        raise VectorError(f"{vector.name!r}: an encoder's threshold is at least 0.")


def _unit(array: Array, name: str, layer: int, op: str, site: str) -> tuple[Array, float]:
    """(unit direction, original length); orthonormal matrices of a projection stay as they are."""
    if not np.isfinite(array).all():
        raise VectorError(f"{name!r}, layer {layer}: the array holds NaN or infinity.")
    if op == "project" and array.ndim == 2 and site != "stream":
        return array, 1.0
    length = float(np.linalg.norm(array))
    if length == 0:
        raise VectorError(f"{name!r}, layer {layer}: the direction is all zeros.")
    if op == "project" and abs(length - 1) < ROUNDING:
        return array, 1.0  # as it came, so that a file's hash survives import and export
    return (array / length).astype(np.float32), length
