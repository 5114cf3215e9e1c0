"""What a sweep tries: one trait, written at other layers or sites, read in other ways.

Each axis turns a contrast set into named vectors that differ in one thing alone; their doses are
comparable because a dose is counted in residual norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsteer.contrast import ContrastSet
from mlxsteer.directions import METHODS
from mlxsteer.errors import ModelError, UsageError, near_matches
from mlxsteer.extract import Options, extract, layers_for
from mlxsteer.vector import SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import Model

STRENGTHS = (-5.0, -3.0, -1.0, 1.0, 3.0, 5.0)
DOSES = (-0.3, 0.15, 0.3, 0.45, 0.6)
SHARES = (-1.0, -0.5, 0.5, 1.0)
AXES = ("strength", "layers", "sites", "ops", "methods", "positions")


@dataclass(frozen=True)
class Variant:
    """A vector to try, and the unit of its amounts: "" strength or share, `d` dose."""

    name: str
    vector: SteeringVector
    unit: str
    amounts: tuple[float, ...]


def variants(
    model: Model,
    vector: SteeringVector,
    contrast: ContrastSet,
    over: str,
    *,
    width: int | None = None,
    show_progress: bool = True,
) -> list[Variant]:
    """The variants of `vector` along the axis `over`.

    width: layers of a band, for `layers`; by default as many as the vector has. Axes other than
    `strength` extract anew from `contrast`. Raises UsageError for an unknown axis.
    """
    if over not in AXES:
        raise UsageError(
            f"Unknown axis {over!r}.{near_matches(over, AXES)} Choose from {', '.join(AXES)}."
        )
    if over == "strength":
        amounts = SHARES if vector.op == "project" else STRENGTHS
        return [Variant(vector.name, vector, "", amounts)]
    if over == "layers":
        return _bands(model, vector, contrast, width, show_progress)
    made = []
    for name, options in _settings(model, contrast, over).items():
        one = extract(model, contrast, show_progress=show_progress, **options)
        project = one.op == "project"
        made.append(Variant(name, one, "" if project else "d", SHARES if project else DOSES))
    return made


def _bands(
    model: Model,
    vector: SteeringVector,
    contrast: ContrastSet,
    width: int | None,
    show_progress: bool,
) -> list[Variant]:
    """Bands of `width` layers over the whole depth, half overlapping, from one extraction."""
    width = min(width or len(vector.layers), model.n_layers)
    if width < 1:
        raise UsageError("A band has at least 1 layer. Type e.g. --width 6.")
    whole = extract(
        model, contrast, show_progress=show_progress, layers=tuple(range(model.n_layers))
    )
    step = max(1, width // 2)
    firsts = sorted({*range(0, model.n_layers - width + 1, step), model.n_layers - width})
    bands = []
    for first in firsts:
        last = first + width - 1
        name = f"{first}-{last}" if width > 1 else str(first)
        bands.append(Variant(name, restricted(whole, range(first, last + 1)), "d", DOSES))
    return bands


def restricted(vector: SteeringVector, layers: range) -> SteeringVector:
    """`vector` on `layers` alone, the dose spread evenly over them."""
    share = np.zeros(vector.n_layers, np.float32)
    share[list(layers)] = 1.0 / len(layers)
    directions = {layer: vector.directions[layer] for layer in layers}
    control = {
        layer: vector.control_mean[layer] for layer in layers if layer in vector.control_mean
    }
    magnitude = vector.magnitude
    if magnitude is not None:
        magnitude = np.where(share > 0, magnitude, 0).astype(np.float32)
    return replace(
        vector,
        directions=directions,
        layer_share=share,
        control_mean=control,
        magnitude=magnitude,
        calibration=None,
    )


def _settings(model: Model, contrast: ContrastSet, over: str) -> Mapping[str, dict[str, Any]]:
    if over == "methods":
        return {method: {"method": method} for method in METHODS}
    if over == "sites":
        layers = layers_for(model.n_layers, contrast, Options())
        offered = [
            site
            for site in ("residual", "ffn_out", "attn_out")
            if all(site in model.hooks.sites_of(layer) for layer in layers)
        ]
        return {site: {"site": site} for site in offered}
    if over == "ops":
        return {
            "add": {"op": "add", "norm_preserving": False},
            "add, norm kept": {"op": "add", "norm_preserving": True},
            "project": {"op": "project"},
        }
    if contrast.combine in ("texts", "answers"):
        raise ModelError(
            f"{contrast.name} holds {contrast.combine}, which are read in one way; positions can"
            " be compared for sets of instructions."
        )
    return {position: {"position": position} for position in ("last_prompt", "answer_mean")}
