"""ds4's directional steering: a headerless `.f32` of unit rows, one per layer, and a JSON file.

There y ← y − s·d(d·y) at the sidecar's component, so a positive scale s removes. Here positive
strength means more of the name, so strength 1 is scale −1 (`effect` amplify).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlxsteer.errors import VectorError
from mlxsteer.files import atomic_path
from mlxsteer.formats import Warn
from mlxsteer.vector import UNIT_TOLERANCE, Array, SteeringVector

FORMAT = "ds4-directional-steering-v1"
COMPONENTS = ("ffn_out", "attn_out")
V4_FLASH_SHAPE = (43, 4096)
SCALE_KEY = "mlxsteer_scale_of_strength_1"  # so that a vector that removes comes back as one
_KEPT = ("thinking", "pair_normalize", "orthogonalize_control_mean", "method", "note")


def read(path: Path, *, site: str | None, warn: Warn) -> SteeringVector:
    """The projection in a ds4 file; rows of zeros are layers that it leaves alone."""
    sidecar = _read_sidecar(path, warn)
    component = sidecar.get("component", site)
    if component not in COMPONENTS:
        raise VectorError(
            f"{path}: the component is {component!r}; it must be ffn_out or attn_out. Where no"
            " sidecar says it, add --site ffn_out or --site attn_out."
        )
    rows = _read_rows(path, _shape(path, sidecar))
    lengths = np.linalg.norm(rows, axis=1)
    acting = [int(layer) for layer in np.flatnonzero(lengths)]
    if not acting:
        raise VectorError(f"{path} holds only zeros; there is nothing to steer with.")
    worst = acting[int(np.abs(lengths[acting] - 1).argmax())]
    if abs(lengths[worst] - 1) > UNIT_TOLERANCE:
        raise VectorError(
            f"{path}: row {worst} has length {lengths[worst]:.4g}, not 1; a projection's strength"
            " grows with its square. Scale the rows to length 1, or zero for layers left alone."
        )
    scale = float(sidecar.get(SCALE_KEY, -1.0))
    positive, negative = (_label(sidecar.get(key)) for key in ("good_file", "bad_file"))
    return SteeringVector.from_arrays(
        {layer: rows[layer] for layer in acting},
        op="project",
        site=component,
        name=positive or path.stem,
        n_layers=len(rows),
        effect="amplify" if scale < 0 else "remove",
        gain=abs(scale),
        positions="all",  # ds4 edits every token
        about={
            "source_format": "ds4",
            "source_model": sidecar.get("model"),
            "positive_label": positive,
            "negative_label": negative,
            **{key: sidecar[key] for key in _KEPT if key in sidecar},
        },
    )


def write(vector: SteeringVector, path: Path, strength: float | None, warn: Warn) -> list[Path]:
    """Write the `.f32` and its sidecar, both or neither; the scale is typed when ds4 starts."""
    if vector.op != "project" or vector.site not in COMPONENTS:
        raise VectorError(
            f"{vector.name!r} is `{vector.op}` at {vector.site}; ds4 only projects, at ffn_out or"
            " attn_out. Export it as .gguf or keep it as .safetensors."
        )
    if not vector.about.get("n_layers_known", True):
        raise VectorError(
            f"{vector.name!r} does not know its model's depth, and ds4 wants a row for every"
            " layer. Import it again with --n-layers."
        )
    rows = np.zeros((vector.n_layers, vector.d_model), "<f4")
    for layer, direction in vector.directions.items():
        if direction.size != vector.d_model:
            raise VectorError(
                f"{vector.name!r} has {len(direction)} directions at layer {layer}; ds4 holds one."
                " Export it with --format glp."
            )
        rows[layer] = direction.reshape(-1)
    scale = vector.share_removed(1.0)
    typed = vector.share_removed(1.0 if strength is None else strength)
    flag = {"ffn_out": "ffn", "attn_out": "attn"}[vector.site]
    warn(f"In ds4, strength {strength or 1:g} is --dir-steering-{flag} {typed:g}.")
    sidecar = _sidecar(vector, rows.shape, scale)
    beside = path.with_suffix(".json")
    with atomic_path(beside) as temporary_json, atomic_path(path) as temporary:
        temporary.write_bytes(rows.tobytes())
        temporary_json.write_bytes((json.dumps(sidecar, indent=1) + "\n").encode())
    return [path, beside]


def _sidecar(vector: SteeringVector, shape: tuple[int, ...], scale: float) -> dict[str, Any]:
    about = vector.about
    labels = {"good_file": about.get("positive_label") or vector.name}
    if about.get("negative_label"):
        labels["bad_file"] = about["negative_label"]
    note = "runtime positive scale suppresses this direction; negative scale amplifies it"
    kept = {key: about[key] for key in _KEPT if about.get(key) is not None}
    model = about.get("source_model") or vector.model.get("base_model")
    return {
        "format": FORMAT,
        "shape": list(shape),
        "component": vector.site,
        **labels,
        **kept,
        **({"model": model} if model else {}),
        SCALE_KEY: scale,
        "note": note,
    }


def _read_sidecar(path: Path, warn: Warn) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        warn(f"{path} has no sidecar {beside.name}: its shape is taken to be V4-Flash's.")
        return {}
    try:
        facts = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VectorError(
            f"{beside} is damaged ({str(error).splitlines()[0]}). Get the pair of files again."
        ) from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        said = facts.get("format") if isinstance(facts, dict) else None
        raise VectorError(f"{beside} is of format {said!r}; {FORMAT!r} is what can be read.")
    return facts


def _shape(path: Path, sidecar: dict[str, Any]) -> tuple[int, int]:
    shape = sidecar.get("shape", V4_FLASH_SHAPE)
    sound = isinstance(shape, list | tuple) and len(shape) == 2
    if not sound or not all(isinstance(n, int) and n > 0 for n in shape):
        raise VectorError(f"{path}: the sidecar's shape {shape!r} is not [layers, width].")
    return shape[0], shape[1]


def _read_rows(path: Path, shape: tuple[int, int]) -> Array:
    held, wanted = path.stat().st_size, 4 * shape[0] * shape[1]
    if held != wanted:
        raise VectorError(
            f"{path} has {held} bytes; {shape[0]} layers of width {shape[1]} take {wanted}. It is"
            " cut short, or belongs to another model. Get it again, with its .json beside it."
        )
    rows = np.fromfile(path, "<f4").reshape(shape).astype(np.float32)
    if not np.isfinite(rows).all():
        raise VectorError(f"{path} holds NaN or infinity. Get or make it again.")
    return rows


def _label(file: Any) -> str | None:
    """`succinct` of `…/succinct.txt`."""
    return Path(str(file)).stem.strip().replace('"', "") or None if file else None
