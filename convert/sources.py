"""Where weights come from. A source gives headers at once and files when they are needed.

`release` is the only thing that ever deletes, and only files that this converter downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from mlxsteer.convert.checkpoint import (
    INDEX_NAME,
    SIDE_FILES,
    Checkpoint,
    ShardFile,
    check_against_index,
    check_weight_map,
)
from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.headers import TensorEntry, read_header
from mlxsteer.convert.layout import refuse_other_models
from mlxsteer.convert.progress import Progress

VLM_PREFIX = "language_model."  # mlx-vlm's conversions put it before every name
RECORD_NAME = "conversion.json"  # written beside every result; holds its hashes


class Source(Protocol):
    """A checkpoint whose shards can be had one at a time."""

    checkpoint: Checkpoint
    downloads: bool

    def fetch(self, shard: str, progress: Progress) -> None:
        """Have `shard` on disk, whole; downloads it if need be."""

    def locate(self, shard: str) -> Path:
        """The path of a fetched shard."""

    def release(self, shard: str) -> None:
        """The shard is not needed again: delete it if it is our own download."""

    def side_file(self, name: str) -> Path:
        """The path of a tokenizer file or the like."""


class LocalSource:
    """A folder of the user's. Read only."""

    downloads = False

    def __init__(self, folder: Path):
        self._folder = folder
        config = read_json(folder / "config.json")
        refuse_other_models(config)
        tensors, shards = _read_headers(folder)
        named = [replace(e, name=n.removeprefix(VLM_PREFIX)) for n, e in tensors.items()]
        tensors = {entry.name: entry for entry in named}
        self.checkpoint = Checkpoint(
            name=str(folder),
            config=config,
            tensors=tensors,
            shards={name: _shard_file(folder, name) for name in shards},
            side_files=tuple(name for name in SIDE_FILES if (folder / name).is_file()),
            revision=_revision(folder),
        )

    def fetch(self, shard: str, progress: Progress) -> None:
        """It is here already."""

    def locate(self, shard: str) -> Path:
        return self._folder / shard

    def release(self, shard: str) -> None:
        """Nothing of the user's is ever deleted."""

    def side_file(self, name: str) -> Path:
        return self._folder / name


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object. Raises ConvertError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConvertError(
            f"{path} is missing: {path.parent} is not a complete checkpoint folder."
        ) from error
    except OSError as error:
        raise ConvertError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConvertError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(data, dict):
        raise ConvertError(f"{path} does not hold a JSON object. Download it again.")
    return data


def _read_headers(folder: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """All tensors of a folder, through its index or from its single weight file."""
    index = folder / INDEX_NAME
    if not index.is_file():
        single = "model.safetensors"
        if not (folder / single).is_file():
            raise ConvertError(f"{folder} holds neither {INDEX_NAME} nor {single}.")
        return read_header(folder / single, single), [single]
    weight_map = check_weight_map(read_json(index), str(index))
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if not (folder / name).is_file()]:
        missing = _needed(missing, weight_map)
    if missing:
        raise ConvertError(
            f"{index} names {missing[0]}, which is not there ({len(missing)} of {len(shards)} files"
            " are missing). Finish the download, then run the same command."
        )
    tensors: dict[str, TensorEntry] = {}
    present = [name for name in shards if (folder / name).is_file()]
    for shard in present:
        tensors.update(read_header(folder / shard, shard))
    kept = {name: shard for name, shard in weight_map.items() if shard in present}
    check_against_index(kept, tensors, str(index))
    return tensors, present


def _needed(missing: Iterable[str], weight_map: Mapping[str, str]) -> list[str]:
    """Files that hold more than a draft block: without `mtp.*` a download is complete for us."""
    used = {shard for name, shard in weight_map.items() if not name.startswith("mtp.")}
    return [name for name in missing if name in used]


def _shard_file(folder: Path, name: str) -> ShardFile:
    return ShardFile(name, (folder / name).stat().st_size, _known_sha256(folder, name))


def _known_sha256(folder: Path, name: str) -> str | None:
    """The hash that came with a file, where one did.

    Our own record; a Hub cache, whose blobs are named by their sha256; the note that a Hub
    download leaves beside a file; or a SHA256SUMS file.
    """
    record = folder / RECORD_NAME
    if record.is_file():
        return read_json(record).get("shards", {}).get(name, {}).get("sha256")
    blob = (folder / name).resolve().name
    if (folder / name).is_symlink() and _is_sha256(blob):
        return blob
    for line in _lines(folder / "SHA256SUMS"):
        digest, _, listed = line.partition(" ")
        if listed.strip(" *") == name and _is_sha256(digest):
            return digest.lower()
    note = _download_note(folder, name)
    return note[1] if len(note) > 1 and _is_sha256(note[1]) else None


def _revision(folder: Path) -> str | None:
    """The commit that a Hub download of this folder was taken from, if it says."""
    if folder.parent.name == "snapshots":
        return folder.name
    note = _download_note(folder, "config.json")
    return note[0] if note and re.fullmatch(r"[0-9a-f]{40}", note[0]) else None


def _download_note(folder: Path, name: str) -> list[str]:
    return _lines(folder / ".cache" / "huggingface" / "download" / f"{name}.metadata")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return []


def _is_sha256(text: str) -> bool:
    return re.fullmatch(r"[0-9a-fA-F]{64}", text) is not None
