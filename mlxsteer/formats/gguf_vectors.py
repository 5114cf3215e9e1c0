"""Control vectors in GGUF: the container, and llama.cpp's and repeng's meaning of it.

`direction.N` (F32 `[d]`, N ≥ 1) is added at the output of 0-based block N, times a scale. Files
with `glp.*` keys say more and go to `glp`. The `gguf` package reads and writes the container.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mlxsteer.errors import VectorError
from mlxsteer.files import atomic_path
from mlxsteer.formats import Warn
from mlxsteer.vector import Array, SteeringVector

ARCHITECTURE = "controlvector"
DEPTH_KEY = "mlxsteer.n_layers"  # the format itself has no place for the model's depth
_TENSOR = re.compile(r"direction\.(\d+)(?:\.(\d+))?\Z")
# What the reader raises on damaged bytes: lengths and counts that lead outside the file.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError)


@dataclass(frozen=True)
class ControlFile:
    """A control vector file as it stands: metadata, and `{(N, j): float32 [d]}`.

    j counts the directions of one layer: `direction.N` is j = 0, `direction.N.1` is j = 1.
    """

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[tuple[int, int], Array]

    @property
    def is_glp(self) -> bool:
        return any(key.startswith("glp.") for key in self.keys)

    def depth(self, n_layers: int | None) -> int | None:
        """The model's number of layers: what the file says, else what the caller says."""
        said = self.keys.get(DEPTH_KEY)
        return n_layers if said is None else int(said)


def read(
    path: Path, *, base: str, site: str | None, n_layers: int | None, warn: Warn
) -> SteeringVector:
    """The vector in a GGUF control vector or GLP file."""
    file = read_container(path, warn)
    if file.is_glp:
        from mlxsteer.formats import glp

        if base != "exact":
            raise VectorError(
                f"{path} is a GLP file, where direction.N acts at layer N by definition. Leave"
                " --gguf-base out."
            )
        return glp.read(file, site, n_layers, warn)
    return _read_plain(file, base, n_layers, warn)


def _read_plain(file: ControlFile, base: str, n_layers: int | None, warn: Warn) -> SteeringVector:
    offset = 1 if base == "generator" else 0
    arrays = {}
    for (number, rank), array in sorted(file.tensors.items()):
        if rank:
            raise VectorError(
                f"{file.path} has several directions at layer {number}, which a plain control"
                " vector cannot, and no glp.mode that says what to do with them. Get a GLP file."
            )
        if not array.any():
            warn(f"direction.{number} is all zeros; layer {number - offset} is left alone.")
            continue
        arrays[number - offset] = array
    if not arrays:
        raise VectorError(f"{file.path} holds only zeros; there is nothing to steer with.")
    return SteeringVector.from_arrays(
        arrays,
        name=file.path.stem,
        n_layers=file.depth(n_layers),
        positions="all",  # llama.cpp adds it to every token
        about={
            "source_format": "gguf",
            "gguf_base": base,
            "model_hint": file.keys.get("controlvector.model_hint"),
            "description": file.keys.get("general.description"),
        },
    )


def write(
    vector: SteeringVector,
    path: Path,
    base: str,
    strength: float | None,
    drop_layer_0: bool,
    warn: Warn,
) -> None:
    """Write a plain control vector whose scale 1 is `strength` (default 1) of `vector`."""
    _refuse_what_llama_cpp_would_misread(vector)
    offset = 1 if base == "generator" else 0
    if offset:
        warn("Numbered as llama.cpp's generator does: llama.cpp itself applies it one layer late.")
    shift = shifts(vector, 1.0 if strength is None else strength)
    numbered = numbers({layer + offset: array for layer, array in shift.items()}, drop_layer_0)
    if vector.positions != "all":
        warn(f"llama.cpp adds it at every position; here it acts on `{vector.positions}` ones.")
    write_container(path, describe(vector, len(numbered)), {(n, 0): a for n, a in numbered.items()})


def _refuse_what_llama_cpp_would_misread(vector: SteeringVector) -> None:
    if vector.op != "add":
        reason = f"is of op `{vector.op}`, and llama.cpp would add it without a word"
        hint = "Use --format glp, which says what to do."
        hint = hint if vector.op == "project" else "Keep it as .safetensors."
    elif vector.site != "residual":
        reason = f"acts at {vector.site}, and llama.cpp adds to the residual stream"
        hint = "Use --format glp, which says where."
    elif vector.norm_preserving:
        reason = "keeps the norm, and llama.cpp would add it plainly"
        hint = "Keep it as .safetensors."
    else:
        return
    raise VectorError(f"{vector.name!r} {reason}; nothing was written. {hint}")


def shifts(vector: SteeringVector, strength: float) -> dict[int, Array]:
    """{layer: [d]}, the shift at `strength`; a raw vector's strength is its raw multiple."""
    if vector.residual_norm is None and vector.magnitude is None:
        raise VectorError(
            f"{vector.name!r} knows neither residual norms nor raw lengths, so its shift has no"
            " length outside a model. Extract it again, then export."
        )
    unit = "" if vector.residual_norm is not None else "r"
    lengths = vector.lengths(strength, unit, None)
    found = {
        layer: (lengths[layer] * vector.directions[layer]).astype(np.float32)
        for layer in vector.layers
        if lengths[layer] != 0
    }
    if not found:
        raise VectorError(f"{vector.name!r} has length 0 everywhere; there is nothing to write.")
    return found


def numbers(by_layer: Mapping[int, Array], drop_layer_0: bool) -> dict[int, Array]:
    """{N: array} without N = 0, which no control vector file can express."""
    if 0 in by_layer and not drop_layer_0:
        raise VectorError(
            "Layer 0 cannot be expressed in a GGUF control vector: direction.N acts at block N,"
            " and N begins at 1. Add --drop-layer-0 to leave that layer out."
        )
    kept = {number: array for number, array in sorted(by_layer.items()) if number > 0}
    if not kept:
        raise VectorError("Without layer 0 nothing is left to write. Export as .safetensors.")
    return kept


def describe(vector: SteeringVector, count: int) -> dict[str, Any]:
    """The metadata that every control vector file of ours carries."""
    hint = vector.about.get("model_hint") or vector.model.get("architecture") or "unknown"
    keys: dict[str, Any] = {
        "general.type": ARCHITECTURE,
        "general.name": vector.name,
        f"{ARCHITECTURE}.model_hint": str(hint),
        f"{ARCHITECTURE}.layer_count": count,
    }
    if vector.about.get("description"):
        keys["general.description"] = str(vector.about["description"])
    if vector.about.get("n_layers_known", True):
        keys[DEPTH_KEY] = vector.n_layers
    return keys


# --- the container --------------------------------------------------------------------------


class _StrictReader(gguf.GGUFReader):
    """The package's reader, except that a read past the end is an error, not a shorter array."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < int(count):
            raise ValueError("it ends before its contents do")
        return found


def read_container(path: Path, warn: Warn) -> ControlFile:
    """The keys and direction tensors of a GGUF file; VectorError when it is something else."""
    try:
        reader = _StrictReader(path)
        keys = {key: field.contents() for key, field in reader.fields.items()}
        tensors = [
            (t.name, t.tensor_type, tuple(t.shape), np.array(t.data)) for t in reader.tensors
        ]
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VectorError(
            f"{path} is damaged, cut short or not GGUF ({reason}). Get the file again."
        ) from None
    architecture = keys.get("general.architecture")
    if architecture != ARCHITECTURE and "glp.mode" not in keys:
        raise VectorError(
            f"{path} is a GGUF file of architecture {architecture!r}, not a control vector."
            " Choose the file with the direction.N tensors."
        )
    found = {}
    for name, kind, shape, data in tensors:
        if not (match := _TENSOR.match(name)):
            warn(f"{path}: tensor {name} is no direction; it is left out.")
            continue
        _check_tensor(path, name, kind, shape, data)
        place = int(match[1]), int(match[2] or 0)
        if place in found:
            raise VectorError(f"{path}: {name} is there twice. Get the file again.")
        found[place] = data.astype(np.float32)
    if not found:
        raise VectorError(f"{path} holds no direction.N tensor; it is not a control vector.")
    return ControlFile(path, keys, found)


def _check_tensor(path: Path, name: str, kind: Any, shape: tuple[int, ...], data: Array) -> None:
    if kind != gguf.GGMLQuantizationType.F32 or len(shape) != 1:
        raise VectorError(
            f"{path}: {name} is {kind.name} of shape {[int(n) for n in shape]}; a direction is"
            " F32 and one-dimensional. Export the vector again."
        )
    if name.split(".")[1].lstrip("0") == "":
        raise VectorError(
            f"{path}: {name} cannot be: direction.N acts at block N and N begins at 1. Export the"
            " vector again without layer 0."
        )
    if not np.isfinite(data).all():
        raise VectorError(f"{path}: {name} holds NaN or infinity. Make the vector again.")


def write_container(
    path: Path, keys: Mapping[str, Any], tensors: Mapping[tuple[int, int], Array]
) -> None:
    """Write a GGUF file (v3, 32-byte alignment), whole or not at all."""
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            for key, value in keys.items():
                _add_key(writer, key, value)
            for (number, rank), array in sorted(tensors.items()):
                name = f"direction.{number}.{rank}" if rank else f"direction.{number}"
                writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))
