"""Foreign vector files for tests, written with the `gguf` package or numpy alone.

They look as their own programs write them; `llama_cpp_adds` is llama.cpp's reading rule.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np

D, LAYERS = 16, 6
ROWS = np.eye(D, dtype=np.float32)  # row L belongs to layer L: a shifted map has cosine 0


def unit(seed: int, *shape: int) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=shape or (D,)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def quiet(_message: str) -> None:
    """Takes remarks that the test does not look at."""


def write_gguf(path: Path, tensors: dict[str, np.ndarray], **keys) -> Path:
    """A control vector file by the gguf package alone; keys are typed by their Python type."""
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "controlvector"))
    for key, value in keys.items():
        add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        add.get(type(value), writer.add_uint32)(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directions(numbers, rows=ROWS) -> dict[str, np.ndarray]:
    return {f"direction.{n}": rows[n].copy() for n in numbers}


def llama_cpp_adds(path: Path) -> dict[int, np.ndarray]:
    """{0-based block: what llama.cpp adds at its output}, by its loader's and graph's own rule."""
    flat: dict[int, np.ndarray] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        number = int(tensor.name.split(".")[1])
        assert number >= 1
        flat[(number - 1) * D] = np.array(tensor.data)
    return {block: flat[(block - 1) * D] for block in range(1, 99) if (block - 1) * D in flat}


def glp_keys(tensors: dict[str, np.ndarray], **changes) -> dict:
    """The metadata that GLP's own exporters write for `tensors` (names in ascending order)."""
    digest = hashlib.sha256(b"".join(array.tobytes() for array in tensors.values()))
    numbers = dict.fromkeys(name.split(".")[1] for name in tensors)
    keys = {
        "glp.mode": "project",
        "glp.spec_version": 1,
        "glp.hook_point": "residual_stream_post_layer",
        "glp.alpha_default": 2.0,
        "glp.rank": 1,
        "glp.orthonormal": True,
        "glp.layer_ids_zero_based": ",".join(numbers),
        "glp.content_sha256": digest.hexdigest(),
        "general.base_model.0.name": "DeepSeek-V4-Flash",
        "general.base_model.0.organization": "deepseek-ai",
        "general.base_model.0.version": "a" * 40,
    }
    return {key: value for key, value in (keys | changes).items() if value is not None}


def write_glp(path: Path, tensors: dict[str, np.ndarray] | None = None, **changes) -> Path:
    tensors = tensors or directions([1, 2, 4])
    return write_gguf(path, tensors, **glp_keys(tensors, **changes))


def write_ds4(path: Path, rows: np.ndarray, **changes) -> Path:
    sidecar = {
        "format": "ds4-directional-steering-v1",
        "shape": list(rows.shape),
        "component": "ffn_out",
        "good_file": "examples/succinct.txt",
        "bad_file": "examples/verbose.txt",
    }
    rows.astype("<f4").tofile(path)
    path.with_suffix(".json").write_text(json.dumps(sidecar | changes))
    return path
