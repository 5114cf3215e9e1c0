"""Reading weights: exactly the bytes that an entry names, checked where a value can be a NaN.

Plain reads, not memory maps: mapped pages would count as memory of the process, and a file that
shrinks under a map kills it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.headers import TensorEntry

# A few blocks for all that is copied: they stay in the processor's cache from read to write and
# hash, and their pages are mapped once (fresh memory for every block took a third of the time).
STREAM_BYTES = 1 << 20
RING = 4

_NUMPY = {
    "BF16": "<u2", "F16": "<f2", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U32": "<u4",
    "I8": "u1", "U8": "u1", "F8_E4M3": "u1", "F8_E8M0": "u1",
}  # fmt: skip


class Reader:
    """Open files of the shards in use. `locate` gives the path of a shard."""

    def __init__(self, locate: Callable[[str], Path]):
        self._locate = locate
        self._handles: dict[str, int] = {}
        self._ring = [np.empty(STREAM_BYTES, np.uint8) for _ in range(RING)]

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def read(self, entry: TensorEntry) -> np.ndarray:
        """The values of an entry; bf16 and the fp8 types as raw unsigned integers."""
        return self._fill(np.empty(entry.nbytes, np.uint8), entry)

    def stream(self, entry: TensorEntry) -> Iterator[np.ndarray]:
        """The values of an entry, some rows at a time; valid until RING more blocks are asked for.

        That lets the hash of a block lag behind its writing.
        """
        for part in entry.blocks(STREAM_BYTES):
            block = self._ring.pop(0)
            if part.nbytes > len(block):
                block = np.empty(part.nbytes, np.uint8)
            self._ring.append(block)
            yield self._fill(block[: part.nbytes], part)

    def _fill(self, data: np.ndarray, entry: TensorEntry) -> np.ndarray:
        """Read an entry into `data`; its values, checked."""
        view = data.data
        position = 0
        while position < len(view):
            count = os.preadv(self._handle(entry), [view[position:]], entry.start + position)
            if count == 0:
                raise ConvertError(
                    f"{self._locate(entry.shard)} ends inside {entry.name}. Download it again,"
                    " then run the same command."
                )
            position += count
        values = data.view(_NUMPY[entry.dtype]).reshape(entry.shape)
        if _holds_nan(values, entry.dtype):
            raise ConvertError(
                f"{entry.name} in {entry.shard} holds values that are not numbers. The file is"
                " damaged; download it again, then run the same command."
            )
        return values

    def _handle(self, entry: TensorEntry) -> int:
        if entry.shard not in self._handles:
            self._handles[entry.shard] = os.open(self._locate(entry.shard), os.O_RDONLY)
        return self._handles[entry.shard]


def _holds_nan(values: np.ndarray, dtype: str) -> bool:
    """No published weight is NaN or infinite: finding one means a damaged file.

    MLX would decode E8M0's NaN (255) as infinity and spoil every answer without a word.
    """
    if dtype == "F8_E8M0":
        return bool(values.max(initial=0) == 255)
    if dtype == "F8_E4M3":  # all ones but for the sign
        return bool((values << 1).max(initial=0) == 254)
    if dtype == "BF16":
        return bool((values & 0x7F80).max(initial=0) == 0x7F80)
    return dtype in ("F16", "F32") and not bool(np.isfinite(values).all())
