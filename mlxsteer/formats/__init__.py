"""Foreign vector files in and out: llama.cpp and repeng GGUF, GLP, ds4 `.f32`, bare arrays.

Chooses the format by suffix and content and checks what the caller said against what the file
says. Knows nothing of models; what a file leaves open (its depth, say) stays open in the vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlxsteer.errors import UsageError, VectorError
from mlxsteer.vector import SteeringVector

Warn = Callable[[str], None]

FORMATS = ("gguf", "glp", "ds4", "safetensors")
GGUF_BASES = ("exact", "generator")
_SUFFIX_OF = {"gguf": ".gguf", "glp": ".gguf", "ds4": ".f32", "safetensors": ".safetensors"}


def python_warning(message: str) -> None:
    """The default of `warn`: a Python warning."""
    warnings.warn(message, UserWarning, stacklevel=3)


def import_file(
    path: str | Path,
    *,
    name: str | None = None,
    gguf_base: str = "exact",
    op: str | None = None,
    site: str | None = None,
    layers: Sequence[int] | None = None,
    n_layers: int | None = None,
    warn: Warn = python_warning,
) -> SteeringVector:
    """The vector in a foreign file; its strength 1 (`NAME:1r` for op add) is the file's scale 1.

    gguf_base: what `direction.N` counts. `exact`: N is the 0-based layer it acts on (llama.cpp's
    reader, repeng); `generator`: written by llama.cpp's cvector-generator, one late.
    op, site, layers: required for bare arrays; elsewhere `op` and `site` are checked against the
    file and `layers` picks some of its layers. n_layers: the model's depth, where the file does
    not say it. warn: gets every remark as one line.

    Raises VectorError for files that are damaged, unknown or unfit, UsageError for options.
    """
    path = Path(path)
    if gguf_base not in GGUF_BASES:
        raise UsageError(f"--gguf-base is exact or generator, not {gguf_base!r}.")
    kind = _kind(path)
    if gguf_base != "exact" and kind != "gguf":
        raise UsageError(f"--gguf-base is for GGUF files; {path} is not one. Leave it out.")
    if kind == "gguf":
        from mlxsteer.formats import gguf_vectors

        vector = gguf_vectors.read(path, base=gguf_base, site=site, n_layers=n_layers, warn=warn)
    elif kind == "ds4":
        from mlxsteer.formats import ds4

        vector = ds4.read(path, site=site, warn=warn)
    elif kind == "ours":
        vector = SteeringVector.load(path)
    else:
        from mlxsteer.formats import arrays

        vector = arrays.read(path, op, site, layers, n_layers, warn)
    vector = _as_told(vector, path, op, site, layers, n_layers)
    return replace(vector, name=name) if name else vector


def export_file(
    vector: SteeringVector,
    path: str | Path,
    format: str | None = None,
    gguf_base: str = "exact",
    *,
    strength: float | None = None,
    drop_layer_0: bool = False,
    warn: Warn = python_warning,
) -> list[Path]:
    """Write `vector` as `format` (default: by suffix); returns the files written.

    strength: what the file's scale 1 shall be. Default 1: our strength for a vector with norms,
    the stored arrays for a raw one. drop_layer_0: leave block 0 out where the format has no slot
    for it, instead of refusing. Raises VectorError where the format cannot hold the vector.
    """
    path = Path(path)
    format = format or _format_of(path)
    if format not in FORMATS:
        raise UsageError(f"Unknown format {format!r}. Choose from {', '.join(FORMATS)}.")
    if path.suffix != _SUFFIX_OF[format]:
        raise UsageError(f"A {format} file ends in {_SUFFIX_OF[format]}, unlike {path}.")
    if gguf_base not in GGUF_BASES:
        raise UsageError(f"--gguf-base is exact or generator, not {gguf_base!r}.")
    if gguf_base != "exact" and format != "gguf":
        raise UsageError(f"--gguf-base is for plain GGUF, not {format}. Leave it out.")
    if strength is not None and (strength == 0 or not np.isfinite(strength)):
        raise UsageError("--strength must be a number other than 0: it sets the file's scale 1.")
    if format == "gguf":
        from mlxsteer.formats import gguf_vectors

        gguf_vectors.write(vector, path, gguf_base, strength, drop_layer_0, warn)
    elif format == "glp":
        from mlxsteer.formats import glp

        glp.write(vector, path, strength, drop_layer_0, warn)
    elif format == "ds4":
        from mlxsteer.formats import ds4

        return ds4.write(vector, path, strength, warn)
    else:
        (vector if strength is None else strength * vector).save(path)
    return [path]


def _format_of(path: Path) -> str:
    found = {".gguf": "gguf", ".f32": "ds4", ".safetensors": "safetensors"}.get(path.suffix)
    if found is None:
        raise UsageError(
            f"The suffix of {path} names no format. Use .gguf (llama.cpp; GLP with --format glp),"
            " .f32 (ds4) or .safetensors (ours)."
        )
    return found


def _kind(path: Path) -> str:
    """gguf, ds4, ours or arrays. VectorError for anything else, pickles by name."""
    from mlxsteer.vectorfile import HEADER_KEY, read_metadata, refuse_pickle

    if not path.is_file():
        refuse_pickle(path)
        raise VectorError(f"There is no file {path}.")
    if path.suffix == ".f32":  # raw floats: any first byte is legal, and nothing in it can run
        return "ds4"
    refuse_pickle(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF" or path.suffix == ".gguf":
        return "gguf"
    if path.suffix == ".safetensors":
        return "ours" if HEADER_KEY in read_metadata(path) else "arrays"
    if path.suffix == ".npz":
        return "arrays"
    raise VectorError(
        f"{path} is of no known format. Vectors come in from .gguf (llama.cpp, repeng, GLP), .f32"
        " (ds4), .safetensors and .npz."
    )


def _as_told(
    vector: SteeringVector,
    path: Path,
    op: str | None,
    site: str | None,
    layers: Sequence[int] | None,
    n_layers: int | None,
) -> SteeringVector:
    """`vector` on the `layers` asked for; VectorError where the file contradicts the caller."""
    for what, said, holds in (
        ("op", op, vector.op),
        ("site", site, vector.site),
        ("n-layers", n_layers, vector.n_layers),
    ):
        if said is not None and said != holds:
            raise VectorError(
                f"{path} itself says --{what} {holds}, not {said}; as {said} it would do something"
                f" else. Leave --{what} out."
            )
    if layers is None or sorted(layers) == list(vector.layers):
        return vector
    if absent := sorted(set(layers) - set(vector.layers)):
        raise VectorError(f"{path} has no layer {absent[0]}; it has {list(vector.layers)}.")
    return _only(vector, layers)


def _only(vector: SteeringVector, layers: Sequence[int]) -> SteeringVector:
    acting = np.isin(np.arange(vector.n_layers), list(layers))
    share = vector.layer_share
    if share is not None:
        share = np.where(acting, share, 0)
        share = (share / share.sum()).astype(np.float32)
    return replace(
        vector,
        directions={layer: vector.directions[layer] for layer in sorted(set(layers))},
        control_mean={k: v for k, v in vector.control_mean.items() if k in set(layers)},
        magnitude=None if vector.magnitude is None else np.where(acting, vector.magnitude, 0),
        layer_share=share,
    )
