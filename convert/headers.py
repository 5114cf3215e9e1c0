"""Safetensors headers: what a file says it holds, checked before a byte of it is used.

Knows the container, not the model. Data are read by `reader`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from mlxsteer.convert.errors import ConvertError

DTYPE_BYTES = {
    "BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I8": 1, "U8": 1, "U32": 4,
}  # fmt: skip

MAX_HEADER = 100_000_000  # the limit of the safetensors format itself


@dataclass(frozen=True)
class TensorEntry:
    """One tensor, or a run of rows of one, in a shard; `start` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    def rows(self, first: int, last: int) -> TensorEntry:
        """Rows `first..last-1` along the first axis; rows lie one after another in the file."""
        row = self.nbytes // self.shape[0]
        shape = (last - first, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + first * row)

    def blocks(self, nbytes: int) -> Iterator[TensorEntry]:
        """The entry cut along its first axis into runs of at most `nbytes`, or of one row."""
        rows = self.shape[0]
        step = max(1, rows * nbytes // max(self.nbytes, 1))
        for first in range(0, rows, step):
            yield self.rows(first, min(rows, first + step))

    def item(self, index: int) -> TensorEntry:
        """Element `index` of the first axis, without that axis."""
        part = self.rows(index, index + 1)
        return replace(part, shape=self.shape[1:])


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor's data."""
    return DTYPE_BYTES[dtype] * prod(shape)


def read_header(path: Path, shard: str) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file. Raises ConvertError on anything out of order."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 2 <= length <= min(MAX_HEADER, size - 8) else b""
    except OSError as error:
        raise ConvertError(f"Cannot read {path}: {error.strerror}. Check the source.") from error
    if not text:
        raise _damaged(path, "its header is cut off or is not a safetensors header")
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    entries = parse_header(header, shard, 8 + length, path)
    _check_extent(entries.values(), 8 + length, size, path)
    return entries


def parse_header(
    header: Mapping[str, Any], shard: str, data_start: int, path: Path | str
) -> dict[str, TensorEntry]:
    """Entries of a decoded header whose data begin at byte `data_start` of the file."""
    entries = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
            begin, end = map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"the entry of {name} is malformed") from error
        if dtype not in DTYPE_BYTES:
            raise ConvertError(
                f"{path}: tensor {name} has dtype {dtype}, which this converter does not know."
                " Check that the source is a DeepSeek-V4 checkpoint."
            )
        if min(shape, default=0) < 0 or end - begin != tensor_bytes(dtype, shape):
            raise _damaged(path, f"the size of {name} does not fit its shape {list(shape)}")
        entries[name] = TensorEntry(name, dtype, shape, shard, data_start + begin)
    return entries


def _check_extent(entries: Iterable[TensorEntry], start: int, size: int, path: Path) -> None:
    """The tensors must fill the file exactly, without overlap: the format's own rule."""
    position = start
    for entry in sorted(entries, key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            raise _damaged(path, f"{entry.name} overlaps its neighbour or leaves a gap")
        position += entry.nbytes
    if position != size:
        raise _damaged(path, f"it has {size:,} bytes where its header says {position:,}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name appears twice")
    return names


def _damaged(path: Path | str, what: str) -> ConvertError:
    return ConvertError(
        f"{path} is damaged: {what}. Download this file again, then run the same command."
    )
