"""Bare arrays: a `.safetensors` without our header, or an `.npz`.

Such a file says nothing of what it is, so op, site and layers come from the caller, all three.
Never unpickles.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mlxsteer.errors import UsageError, VectorError
from mlxsteer.formats import Warn
from mlxsteer.vector import UNIT_TOLERANCE, Array, SteeringVector

_NUMBERED = re.compile(r"(?:.*[._])?(\d+)\Z")


def read(
    path: Path,
    op: str | None,
    site: str | None,
    layers: Sequence[int] | None,
    n_layers: int | None,
    warn: Warn,
) -> SteeringVector:
    """The vector of arrays named `…N` per layer, or of one array with a row per layer."""
    if not (op and site and layers):
        raise UsageError(
            f"{path} holds bare arrays, which do not say what they do. Say all three, for example:"
            f" mlxsteer vectors import {path} --op add --site residual --layers 10-19"
        )
    held = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    arrays = _by_layer(path, held, layers, n_layers)
    lengths = {layer: float(np.linalg.norm(array)) for layer, array in arrays.items()}
    stretched = [layer for layer, length in lengths.items() if abs(length - 1) > UNIT_TOLERANCE]
    if op == "project" and stretched and all(a.ndim == 1 for a in arrays.values()):
        layer = stretched[0]
        warn(f"{path}: rows are scaled to length 1 (layer {layer} had {lengths[layer]:.4g}).")
    return SteeringVector.from_arrays(
        arrays,
        op=op,
        site=site,
        name=path.stem,
        n_layers=n_layers,
        about={"source_format": path.suffix.removeprefix(".")},
    )


def _by_layer(
    path: Path, held: Mapping[str, Array], layers: Sequence[int], n_layers: int | None
) -> dict[int, Array]:
    if len(held) == 1:
        ((key, array),) = held.items()
        if array.ndim == 2 and not _NUMBERED.match(key):
            return _rows(path, array, layers, n_layers)
    numbered: dict[int, Array] = {}
    for key, array in held.items():
        if match := _NUMBERED.match(key):
            if int(match[1]) in numbered:
                raise VectorError(
                    f"{path} has two arrays for layer {match[1]} ({key} is one). Keep one vector"
                    " in a file."
                )
            numbered[int(match[1])] = array
    if absent := [layer for layer in layers if layer not in numbered]:
        names = ", ".join(sorted(held)[:4])
        raise VectorError(
            f"{path} has no array for layer {absent[0]} (it has {names}). Name arrays layer.0,"
            " layer.1, …, or store one array [layers, width]."
        )
    return {layer: numbered[layer] for layer in layers}


def _rows(
    path: Path, array: Array, layers: Sequence[int], n_layers: int | None
) -> dict[int, Array]:
    if len(array) == len(layers):
        return dict(zip(layers, array, strict=True))
    if len(array) == n_layers and max(layers) < n_layers:
        return {layer: array[layer] for layer in layers}
    raise VectorError(
        f"{path} has {len(array)} rows for the {len(layers)} layers named. Give one row per named"
        " layer, or --n-layers if it has a row for every layer (a first row of the embeddings"
        " must go: row N is the output of block N)."
    )


def _read_safetensors(path: Path) -> dict[str, Array]:
    """Float32 arrays; through mlx, because numpy has no bfloat16."""
    import mlx.core as mx

    try:
        held = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise VectorError(f"{path} is damaged ({str(error).splitlines()[0]}).") from None
    assert isinstance(held, dict)
    for key, array in held.items():
        if not mx.issubdtype(array.dtype, mx.floating):
            raise VectorError(
                f"{path}: {key} holds {array.dtype}, not floats. Save float32 arrays."
            )
    return {key: np.array(array.astype(mx.float32)) for key, array in held.items()}


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: np.asarray(file[key], np.float32) for key in file.files}
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VectorError(
            f"{path} is damaged, or holds pickled objects, which are never read ({reason}). Save"
            " plain float32 arrays with numpy.savez."
        ) from None
