"""The file of a vector: one `.safetensors` with its tensors, and its facts as JSON in the header.

Reads what it wrote and refuses everything else by name: pickles, damaged files, unknown ops,
contents that do not match their hash. Foreign formats are `formats`' business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

import mlxsteer
from mlxsteer.errors import VectorError
from mlxsteer.files import atomic_path
from mlxsteer.vector import Array, Calibration, Encoder, SteeringVector

FORMAT_VERSION = 1
HEADER_KEY = "mlxsteer"
PROFILES = ("residual_norm", "layer_share", "magnitude")
ENCODER_ROW, ENCODER_NUMBERS = "encoder.row", "encoder.bias_threshold"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
# Facts of the model and of the making lie flat in the JSON, under these names.
MODEL_KEYS = (
    "base_model",
    "base_revision",
    "architecture",
    "config_sha256",
    "weights_fingerprint",
    "quantization",
    "chat_template_sha256",
)
SEARCH_KEYS = ("name", "op", "site", "base_model", "format_version")


def write(vector: SteeringVector, path: Path) -> Path:
    """Write `vector` to `path` (suffix .safetensors), whole or not at all."""
    if path.suffix != ".safetensors":
        raise VectorError(f"A vector file ends in .safetensors; type {path}.safetensors.")
    tensors = _tensors(vector)
    facts = _facts(vector) | {"content_sha256": content_sha256(tensors)}
    metadata = {key: str(facts[key]) for key in SEARCH_KEYS if facts.get(key) is not None}
    metadata[HEADER_KEY] = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    data = to_safetensors(tensors, metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def read(path: Path) -> SteeringVector:
    """The vector in `path`. VectorError says what is wrong with any other file."""
    refuse_pickle(path)
    if path.suffix != ".safetensors":
        raise VectorError(
            f"{path} is not a vector file (.safetensors). Foreign formats come in with:"
            f" mlxsteer vectors import {path}"
        )
    metadata = read_metadata(path)
    if HEADER_KEY not in metadata:
        raise VectorError(
            f"{path} holds tensors but not our description of them (op, site, layers). Say them:"
            f" mlxsteer vectors import {path} --op add --site residual --layers 10-19"
        )
    tensors = read_safetensors(path)
    try:
        facts = json.loads(metadata[HEADER_KEY])
        return _assemble(facts, tensors, path)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise VectorError(f"{path}: the header is damaged ({error}). Get the file again.") from None


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of any safetensors file; VectorError when it is damaged."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The header metadata of any safetensors file; VectorError when it is damaged."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise VectorError(f"There is no file {path}.")
    try:
        with safe_open(str(path), framework="numpy") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise VectorError(
            f"{path} is damaged or not a safetensors file ({error}). Get or make it again."
        ) from None


def refuse_pickle(path: Path) -> None:
    """VectorError for a pickle, by its suffix or its first bytes: it can run code when read."""
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
    # A safetensors file may begin with 0x80 too: the length of its header, which opens with {.
    looks = start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and start[8:] != b"{"
    looks |= start[:4] == b"PK\x03\x04" and path.suffix != ".npz"
    if path.suffix.lower() in PICKLE_SUFFIXES or looks:
        raise VectorError(
            f"{path} is a Python pickle, which can run code when it is read, so it is refused."
            " Where you trust it, convert it there: load it with torch, save the arrays with"
            " safetensors (layer.0, layer.1, …), then: mlxsteer vectors import FILE.safetensors"
            " --op add --site residual --layers 0-29"
        )


def content_sha256(tensors: Mapping[str, Array]) -> str:
    """SHA-256 over names, shapes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _tensors(vector: SteeringVector) -> dict[str, Array]:
    tensors = {f"direction.{layer}": array for layer, array in vector.directions.items()}
    tensors |= {f"control_mean.{layer}": array for layer, array in vector.control_mean.items()}
    for name in PROFILES:
        if (array := getattr(vector, name)) is not None:
            tensors[name] = array
    if (encoder := vector.encoder) is not None:
        tensors[ENCODER_ROW] = encoder.row
        tensors[ENCODER_NUMBERS] = np.array([encoder.bias, encoder.threshold])
    return {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}


def _facts(vector: SteeringVector) -> dict[str, Any]:
    calibration = vector.calibration
    return {
        **vector.about,
        **{key: vector.model.get(key) for key in MODEL_KEYS},
        "format_version": FORMAT_VERSION,
        "name": vector.name,
        "op": vector.op,
        "site": vector.site,
        "layers": list(vector.layers),
        "d_model": vector.d_model,
        "n_layers": vector.n_layers,
        "gain": vector.gain,
        "norm_preserving": vector.norm_preserving,
        "effect": vector.effect,
        "positions_default": vector.positions,
        "calibration": None
        if calibration is None
        else {
            "delta_plus": calibration.delta_plus,
            "delta_minus": calibration.delta_minus,
            "guard": dict(calibration.guard),
            "context_len": calibration.context_len,
            "curve": [dict(row) for row in calibration.curve],
        },
        "created_with": f"mlxsteer {mlxsteer.__version__}",
    }


_OWN_KEYS = {
    *MODEL_KEYS,
    *("format_version", "name", "op", "site", "layers", "d_model", "n_layers", "gain"),
    *("norm_preserving", "effect", "positions_default", "calibration", "content_sha256"),
}


def _assemble(facts: dict[str, Any], tensors: dict[str, Array], path: Path) -> SteeringVector:
    if int(facts["format_version"]) > FORMAT_VERSION:
        raise VectorError(
            f"{path} is of format {facts['format_version']}; this mlxsteer reads up to"
            f" {FORMAT_VERSION}. Upgrade mlxsteer."
        )
    if facts.get("content_sha256") != content_sha256(tensors):
        raise VectorError(
            f"{path}: the tensors do not match their recorded hash; the file was altered or"
            " damaged. Get or make it again."
        )
    directions = _by_layer(tensors, "direction.")
    if sorted(directions) != sorted(facts["layers"]):
        raise VectorError(f"{path}: the header and the tensors name different layers.")
    vector = SteeringVector(
        name=facts["name"],
        directions=directions,
        n_layers=int(facts["n_layers"]),
        op=facts["op"],
        site=facts["site"],
        control_mean=_by_layer(tensors, "control_mean."),
        encoder=_encoder(tensors),
        gain=float(facts.get("gain", 1.0)),
        norm_preserving=bool(facts.get("norm_preserving", False)),
        effect=facts.get("effect", "remove"),
        positions=facts.get("positions_default") or "answer",
        calibration=_calibration(facts.get("calibration")),
        model={key: facts.get(key) for key in MODEL_KEYS},
        about={key: value for key, value in facts.items() if key not in _OWN_KEYS},
        **{name: tensors.get(name) for name in PROFILES},
    )
    if vector.d_model != facts["d_model"]:
        raise VectorError(f"{path}: says width {facts['d_model']}, holds {vector.d_model}.")
    return vector


def _calibration(facts: dict[str, Any] | None) -> Calibration | None:
    if not facts:
        return None
    return Calibration(
        delta_plus=float(facts["delta_plus"]),
        delta_minus=float(facts["delta_minus"]),
        guard=facts.get("guard") or {},
        context_len=facts.get("context_len"),
        curve=tuple(facts.get("curve") or ()),
    )


def _encoder(tensors: dict[str, Array]) -> Encoder | None:
    if ENCODER_ROW not in tensors:
        return None
    bias, threshold = tensors[ENCODER_NUMBERS]
    return Encoder(tensors[ENCODER_ROW], float(bias), float(threshold))


def _by_layer(tensors: dict[str, Array], prefix: str) -> dict[int, Array]:
    found = {}
    for name, array in tensors.items():
        if name.startswith(prefix):
            found[int(name.removeprefix(prefix))] = array
    return found
