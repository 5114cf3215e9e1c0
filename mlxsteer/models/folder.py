"""A model folder on disk: its config and the headers of its weights, read and checked.

Everything a broken, partial or unsafe folder can be refused for before any weight is read is
here. It does not import mlx and does not know where folders come from.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxsteer.errors import ModelError
from mlxsteer.models.deepseek_v4.config import refuse_architecture

WEIGHTS = "model*.safetensors"  # what mlx-lm reads
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OWN_ARCHITECTURES = {"deepseek_v4": "mlxsteer.models.deepseek_v4"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "*.tiktoken", "vocab.*")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

FLOAT_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header: its dtype as written there, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def bytes_as(self, float_size: int | None) -> int:
        """Its size in memory when floats are cast to `float_size` bytes (None: as stored)."""
        if float_size is None or self.dtype not in FLOAT_SIZES:
            return self.nbytes
        return math.prod(self.shape) * float_size


@dataclass(frozen=True)
class Folder:
    """A folder that passed the checks."""

    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]

    def weight_bytes(self, float_size: int | None = None) -> int:
        return sum(tensor.bytes_as(float_size) for tensor in self.tensors.values())


def check_folder(path: Path) -> Folder:
    """Read and check the folder at `path`. ModelError says what is wrong with it."""
    config = check_config(path)
    if not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ModelError(
            f"{path} has no tokenizer (no tokenizer.json or tokenizer.model), so text cannot be"
            " turned into tokens. Copy the tokenizer files of the original model into it."
        )
    files = weight_files(path)
    tensors = {name: t for file in files for name, t in read_header(file)[1].items()}
    return Folder(path=path, config=config, files=files, tensors=tensors)


def check_config(path: Path) -> dict[str, Any]:
    """The folder's config. ModelError for a model that is refused, or that would run code."""
    config = read_config(path)
    refuse_architecture(config)
    refuse_code(path, config)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json. ModelError when it is missing, broken or names no model type."""
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{path} has no config.json, so it is not a model folder. Give the folder that holds"
            " config.json and the .safetensors files."
        )
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{file} does not name a `model_type`, so the architecture is unknown. Is this the"
            " config of a language model?"
        )
    return config


def read_json(file: Path) -> Any:
    """Parse a JSON file; ModelError with the line when it is broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{file} is not valid JSON ({error}). Fetch or convert the model again."
        ) from error
    except OSError as error:
        raise ModelError(f"Cannot read {file}: {error.strerror or error}.") from error


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config: `text_config` of a multimodal one, else itself."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def refuse_code(path: Path, config: dict[str, Any]) -> None:
    """ModelError when the folder's configs ask for Python code of their own to be run."""
    # Where the module is ours, a file that makes the folder load elsewhere is never looked at.
    keys = () if config["model_type"] in OWN_ARCHITECTURES else ("auto_map", "model_file")
    asked = [f"{key} in config.json" for key in keys if config.get(key)]
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (file := path / name).is_file():
            other = read_json(file)
            if isinstance(other, dict) and other.get("auto_map"):
                asked.append(f"auto_map in {name}")
    if asked:
        raise ModelError(
            f"{path} wants Python code from the checkpoint to be run ({', '.join(asked)}), and"
            " mlxsteer never runs code from a checkpoint. If mlx-lm knows the architecture"
            f" ({config['model_type']}) by itself, delete that key and the model loads."
        )


def weight_files(path: Path) -> tuple[Path, ...]:
    """The folder's weight files, in order. ModelError when there are none, or shards miss."""
    files = tuple(sorted(path.glob(WEIGHTS)))
    if not files:
        raise ModelError(_no_weights(path))
    if (index := path / INDEX).is_file():
        listed = read_json(index)
        shards = set(listed.get("weight_map", {}).values()) if isinstance(listed, dict) else set()
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise ModelError(
                f"{path} is incomplete: {len(missing)} of {len(shards)} weight files are missing"
                f" ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Fetch or"
                " convert the model again; what is there is kept."
            )
    return files


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        return (
            f"{path} holds its weights as pickles only ({', '.join(pickles[:3])}). A pickle can"
            " run code, so only safetensors are read. Look for a safetensors copy of the model,"
            " or convert it on a machine that you do not mind."
        )
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others:
        return (
            f"{path} has no {WEIGHTS} file, only {', '.join(others[:3])}. An adapter alone is not"
            " a model: fuse it into its base model with `mlx_lm.fuse` first."
        )
    if any(path.glob("*.gguf")):
        return f"{path} holds a GGUF file; models are read from safetensors only. Convert it first."
    return f"{path} has no weights (no {WEIGHTS}). Fetch or convert the model again."


def read_header(file: Path) -> tuple[bytes, dict[str, Tensor]]:
    """A safetensors file's header: its bytes as stored, and its tensors.

    ModelError when the file is cut short or is not safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise ModelError(_truncated(file, size, None))
        raw = stream.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        spans = {name: entry["data_offsets"] for name, entry in entries.items()}
        tensors = {
            name: Tensor(entry["dtype"], tuple(entry["shape"]), spans[name][1] - spans[name][0])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file} is not a safetensors file (its header cannot be read). Fetch it again."
        ) from error
    expected = 8 + length + max((end for _, end in spans.values()), default=0)
    if size < expected:
        raise ModelError(_truncated(file, size, expected))
    return raw, tensors


def _truncated(file: Path, size: int, expected: int | None) -> str:
    wanted = f" of {expected:,}" if expected else ""
    return (
        f"{file} is cut short or damaged: it has {size:,}{wanted} bytes. Delete it and fetch or"
        " convert the model again."
    )
