"""GLP: a GGUF control vector that says what it does (`glp.mode`), where, and how strongly.

`project`: h ← h − α Σⱼ dⱼ(dⱼ·h) on unit directions; `add`: h ← h + α·v. A key or value that we
do not implement is fatal, because a vector misapplied raises no error. Format: weightless,
spec/GLP.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxsteer.errors import VectorError
from mlxsteer.formats import Warn
from mlxsteer.formats.gguf_vectors import ControlFile, describe, numbers, shifts, write_container
from mlxsteer.vector import ROUNDING, UNIT_TOLERANCE, Array, SteeringVector

SITE_OF = {
    "residual_stream_post_layer": "residual",
    "ffn_out_pre_residual": "ffn_out",
    "attn_out_pre_residual": "attn_out",
}
HOOK_OF = {site: hook for hook, site in SITE_OF.items()}
VERSIONS = (1, 2)
# α of our strength 1, so that a vector that amplifies comes back as one; other readers skip it.
STRENGTH_KEY = "mlxsteer.alpha_of_strength_1"


def read(file: ControlFile, site: str | None, n_layers: int | None, warn: Warn) -> SteeringVector:
    """The vector of a GLP file; its strength (op add: raw multiple) is the format's α."""
    keys = file.keys
    mode = keys.get("glp.mode")
    if mode not in ("project", "add"):
        said = "no glp.mode" if mode is None else f"glp.mode {mode!r}"
        raise _refusal(file, f"has {said}; this reader knows project and add, and will not guess")
    _check_version(file)
    _check_contents(file)
    hook = keys.get("glp.hook_point", HOOK_OF.get(site or ""))
    if hook not in SITE_OF:
        known = ", ".join(SITE_OF)
        raise _refusal(file, f"names hook point {hook!r}; known are {known} (or say --site)")
    if (derived := keys.get("glp.derived_at")) not in (None, hook):
        warn(f"{file.path}: the direction was measured at {derived} and acts at {hook}.")
    alpha = _number(file, "glp.alpha_default")
    unit = _number(file, STRENGTH_KEY) if mode == "project" else 1.0
    if unit == 0:
        raise _refusal(file, f"says {STRENGTH_KEY} 0")
    typed = f"{alpha / unit:g}{'r' if mode == 'add' else ''}"
    warn(f"{file.path} suggests α = {alpha:g}; that is the strength NAME:{typed}.")
    arrays = _bases(file) if mode == "project" else _rank_one(file)
    return SteeringVector.from_arrays(
        arrays,
        op=mode,
        site=SITE_OF[hook],
        name=file.path.stem,
        n_layers=file.depth(n_layers),
        positions="all",
        effect="amplify" if unit < 0 else "remove",
        gain=abs(unit),
        model=_base_model(keys),
        about=_about(keys) | {"alpha_default": alpha, "suggested_strength": alpha / unit},
    )


def write(
    vector: SteeringVector, path: Any, strength: float | None, drop_layer_0: bool, warn: Warn
) -> None:
    """Write `vector` as GLP. For a projection `strength` sets `glp.alpha_default`, not the data."""
    if vector.op not in ("project", "add") or vector.norm_preserving:
        what = "keeps the norm" if vector.norm_preserving else f"`{vector.op}`s"
        raise VectorError(
            f"{vector.name!r} {what}, which GLP has no mode for. Keep it as .safetensors."
        )
    if vector.site not in HOOK_OF:
        raise VectorError(
            f"{vector.name!r} acts at {vector.site!r}, which GLP has no hook point for. Keep it"
            " as .safetensors."
        )
    suggested = float(vector.about.get("suggested_strength") or 1.0)
    if vector.op == "project":
        alpha = vector.share_removed(suggested if strength is None else strength)
        by_layer = {layer: _unit_rows(rows) for layer, rows in vector.directions.items()}
        extra = {STRENGTH_KEY: vector.share_removed(1.0)}
    else:
        alpha = suggested if strength is None else 1.0
        by_layer = {k: row[None] for k, row in shifts(vector, strength or 1.0).items()}
        extra = {}
    if vector.positions != "all":
        warn(f"GLP readers act at every position; here it acts on `{vector.positions}` ones.")
    kept = numbers(by_layer, drop_layer_0)
    tensors = {(n, j): row for n, rows in kept.items() for j, row in enumerate(rows)}
    keys = describe(vector, len(kept)) | _keys(vector, kept, alpha) | extra
    write_container(path, keys, tensors)


def content_sha256(tensors: Mapping[tuple[int, int], Array]) -> str:
    """SHA-256 over the raw F32 bytes in ascending order of layer, then of rank."""
    digest = hashlib.sha256()
    for place in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[place], "<f4").tobytes())
    return digest.hexdigest()


def _keys(vector: SteeringVector, kept: Mapping[int, Array], alpha: float) -> dict[str, Any]:
    rank = max(len(rows) for rows in kept.values())
    if any(len(rows) != rank for rows in kept.values()):
        raise VectorError(f"{vector.name!r} has layers of several ranks; GLP holds one rank.")
    tensors = {(n, j): row for n, rows in kept.items() for j, row in enumerate(rows)}
    hook = HOOK_OF[vector.site]
    keys: dict[str, Any] = {
        "glp.mode": vector.op,
        "glp.spec_version": 1 if rank == 1 else 2,
        "glp.hook_point": hook,
        "glp.derived_at": str(vector.about.get("derived_at") or hook),
        "glp.alpha_default": float(alpha),
        "glp.rank": rank,
        "glp.orthonormal": vector.op == "project",
        "glp.layer_ids_zero_based": ",".join(map(str, kept)),
        "glp.content_sha256": content_sha256(tensors),
        "glp.method": str(vector.about.get("method") or "unknown"),
    }
    labels = vector.about.get("positive_label"), vector.about.get("negative_label")
    if all(labels):
        keys["glp.contrast"] = f"{labels[0]}_vs_{labels[1]}"
    if base := vector.model.get("base_model"):
        organization, slash, name = str(base).rpartition("/")
        keys |= {"general.base_model.count": 1, "general.base_model.0.name": name}
        if slash:
            keys["general.base_model.0.organization"] = organization
        if revision := vector.model.get("base_revision"):
            keys["general.base_model.0.version"] = str(revision)
    return keys


def _unit_rows(rows: Array) -> Array:
    """[k, d], each row of length 1 within rounding: the format's strength is quadratic in it."""
    rows = np.atleast_2d(rows)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    return np.where(np.abs(lengths - 1) < ROUNDING, rows, rows / lengths).astype(np.float32)


def _check_version(file: ControlFile) -> None:
    keys = file.keys
    version, rank = _number(file, "glp.spec_version"), _number(file, "glp.rank")
    if version not in VERSIONS:
        raise _refusal(file, f"is of GLP version {version:g}; this reader knows 1 and 2")
    scales = [key for key in ("glp.dir_scales", "glp.layer_scales") if key in keys]
    if version == 1 and (rank != 1 or scales):
        raise _refusal(file, "says GLP version 1 but uses keys of version 2")
    for key in scales:
        factors = [item.rpartition(":")[2].strip() for item in str(keys[key]).split(",")]
        if any(factor.rstrip("0") not in ("1", "1.") for factor in factors):
            raise _refusal(file, f"gives directions unequal strengths ({key}), not held here")


def _number(file: ControlFile, key: str) -> float:
    """A number of the metadata, 1 where it is absent."""
    try:
        value = float(file.keys.get(key, 1.0))
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise _refusal(file, f"says {key} {file.keys[key]!r}, which is no number")
    return value


def _check_contents(file: ControlFile) -> None:
    said = file.keys.get("glp.content_sha256")
    if said and said != content_sha256(file.tensors):
        raise _refusal(file, "holds tensors that do not match its glp.content_sha256: altered")
    listed = file.keys.get("glp.layer_ids_zero_based")
    numbers_held = sorted({number for number, _ in file.tensors})
    if not isinstance(listed, str) or not listed:
        return
    if [item.strip() for item in listed.split(",")] != [str(n) for n in numbers_held]:
        raise _refusal(file, f"lists layers {listed} but holds {numbers_held}")


def _rank_one(file: ControlFile) -> dict[int, Array]:
    if any(rank for _, rank in file.tensors):
        raise _refusal(file, "adds several directions at one layer; add has one")
    return {number: array for (number, _), array in file.tensors.items()}


def _bases(file: ControlFile) -> dict[int, Array]:
    """{layer: [d] or [k, d]}, checked to be unit (rank k: orthonormal)."""
    rank = int(_number(file, "glp.rank"))
    if rank > 1 and str(file.keys.get("glp.orthonormal")).lower() != "true":
        raise _refusal(file, "has rank > 1 without glp.orthonormal, so its sum has no one meaning")
    bases: dict[int, Array] = {}
    for number in sorted({number for number, _ in file.tensors}):
        held = sorted(j for n, j in file.tensors if n == number)
        if held != list(range(rank)):
            raise _refusal(file, f"has {len(held)} directions at layer {number}, not {rank}")
        rows = np.stack([file.tensors[number, j] for j in held])
        gram = rows @ rows.T
        if np.abs(np.diag(gram) - 1).max() > 2 * UNIT_TOLERANCE:
            length = float(np.sqrt(np.diag(gram)).max())
            raise _refusal(file, f"has a direction of length {length:.4g}, not 1, at {number}")
        if np.abs(gram - np.diag(np.diag(gram))).max() > UNIT_TOLERANCE:
            raise _refusal(file, f"has directions at layer {number} that are not orthogonal")
        bases[number] = rows[0] if rank == 1 else rows
    return bases


def _base_model(keys: Mapping[str, Any]) -> dict[str, Any]:
    if not (name := str(keys.get("general.base_model.0.name") or "")):
        return {}
    organization = keys.get("general.base_model.0.organization")
    full = f"{organization}/{name}" if organization and "/" not in name else name
    return {"base_model": full, "base_revision": keys.get("general.base_model.0.version")}


def _about(keys: Mapping[str, Any]) -> dict[str, Any]:
    positive, _, negative = str(keys.get("glp.contrast") or "").partition("_vs_")
    return {
        "source_format": "glp",
        "method": keys.get("glp.method"),
        "derived_at": keys.get("glp.derived_at"),
        "model_hint": keys.get("controlvector.model_hint"),
        "description": keys.get("general.description"),
        "positive_label": positive or None,
        "negative_label": negative or None,
    }


def _refusal(file: ControlFile, why: str) -> VectorError:
    return VectorError(f"{file.path} {why}. Refused; ask its maker for another export.")
