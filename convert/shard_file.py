"""Writing one safetensors file as a stream, and reading it back before it counts as written.

Shapes are known beforehand, so the header goes first and tensors follow piece by piece: memory
holds a few pieces, never a layer.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.formats import OutputTensor
from mlxsteer.convert.reader import RING

Advance = Callable[[int], None]

READ_BLOCK = 1 << 20


@dataclass(frozen=True)
class Digest:
    """What a file holds: its length, its sha256, and the sums that the read-back compares.

    `sums` are `(length, block_sum)` of the writes, one after another. A sum finds what disks do
    (lost, zeroed, flipped bytes) at ten times the speed of a checksum.
    """

    nbytes: int
    sha256: str
    sums: tuple[tuple[int, int], ...]


def header_bytes(tensors: Sequence[OutputTensor]) -> bytes:
    """The safetensors header of `tensors`, in their order, padded so that data start aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    path: Path, tensors: Sequence[OutputTensor], chunks: Iterable[np.ndarray], advance: Advance
) -> Digest:
    """Write `chunks`, the data of `tensors` one after another. The caller moves the file.

    Hashing, which takes longest, runs beside reading and writing; a chunk must stay as it is
    until RING more are asked for.
    """
    header = header_bytes(tensors)
    expected = len(header) + sum(tensor.nbytes for tensor in tensors)
    found, sums = hashlib.sha256(header), [(len(header), block_sum(header))]
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as helper:
        file.write(header)
        hashing: deque[Future[None]] = deque()
        for chunk in chunks:
            data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
            hashing.append(helper.submit(found.update, data))
            sums.append((len(data), block_sum(data)))
            _write_all(file.write, data)
            if len(hashing) == RING:  # the next chunk may overwrite the oldest
                hashing.popleft().result()
            advance(len(data))
    written = sum(length for length, _ in sums)
    if written != expected:
        raise ConvertError(f"{path}: wrote {written:,} bytes of {expected:,}; please report this.")
    return Digest(written, found.hexdigest(), tuple(sums))


def _write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    while data:
        data = data[write(data) or 0 :]


def block_sum(data: bytes | memoryview) -> int:
    """The sum of a block's 64-bit words, wrapping, and of the bytes after the last whole one."""
    values = np.frombuffer(data, np.uint8)
    whole = len(values) // 8 * 8
    words = values[:whole].view("<u8").sum(dtype=np.uint64)
    return int(words) + int(values[whole:].sum())


def check_written(path: Path, digest: Digest) -> None:
    """Read a file back and compare. Raises ConvertError when the disk did not keep the bytes."""
    view = memoryview(bytearray(max(length for length, _ in digest.sums)))
    with path.open("rb", buffering=0) as file:
        good = all(
            file.readinto(view[:length]) == length and block_sum(view[:length]) == expected
            for length, expected in digest.sums
        )
        good = good and not file.read(1)
    if not good:
        raise ConvertError(
            f"{path.name} read back differs from what was written: the disk is failing or full."
            " Nothing was moved into place; run the same command again, or choose another --out."
        )


def file_sha256(path: Path, advance: Advance | None = None) -> str:
    """The sha256 of a whole file, 1 MiB in memory at a time."""
    found = hashlib.sha256()
    buffer = bytearray(READ_BLOCK)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                found.update(view[:count])
                if advance:
                    advance(count)
    except OSError as error:
        raise ConvertError(f"Cannot read {path}: {error.strerror}.") from error
    return found.hexdigest()
