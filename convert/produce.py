"""The data of an output shard, chunk by chunk in the order in which its file holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import lcm

import numpy as np

from mlxsteer.convert.decode import decode, expand_scales
from mlxsteer.convert.formats import Format, Piece
from mlxsteer.convert.importance import Importance
from mlxsteer.convert.plan import OutputShard, PlannedMatrix
from mlxsteer.convert.quantise import Quantised, quantise
from mlxsteer.convert.reader import Reader

# 4M weights: 16 MB as float32, about 200 MB with the search's temporaries.
BLOCK_WEIGHTS = 1 << 22


@dataclass
class ErrorSums:
    """Sums of weighted squares per kind of matrix: `[error, mx.quantize's error, power]`."""

    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, q: Quantised) -> None:
        row = self.sums.setdefault(kind, [0.0, 0.0, 0.0])
        for i, value in enumerate((q.error, q.mlx_error, q.power)):
            row[i] += value


def shard_chunks(
    shard: OutputShard, reader: Reader, importance: Importance, errors: ErrorSums
) -> Iterator[np.ndarray]:
    """All data of a shard. Adds to `errors` what quantising cost.

    A chunk is valid until RING more are asked for.
    """
    for plain in shard.plains:
        for values in reader.stream(plain.entry):
            yield values.astype("<i4") if plain.entry.dtype == "I64" else values
    for planned in shard.matrices:
        if planned.exact:
            yield from _exact(planned, reader)
        else:
            yield from _requantised(planned, reader, importance, errors)


def _exact(planned: PlannedMatrix, reader: Reader) -> Iterator[np.ndarray]:
    """Weights are the source's bytes as they are; only FP8's block scales are spread out."""
    for piece in planned.pieces:
        yield from reader.stream(piece.weight)
    for piece in planned.pieces:
        if piece.scales is None:
            continue
        if planned.stored.layout == "fp8":
            rows, cols = piece.weight.shape
            yield expand_scales(reader.read(piece.scales), planned.stored.block, rows, cols)
        else:
            yield from reader.stream(piece.scales)
    for piece in planned.pieces:
        if piece.biases is not None:
            yield from reader.stream(piece.biases)


def _requantised(
    planned: PlannedMatrix, reader: Reader, importance: Importance, errors: ErrorSums
) -> Iterator[np.ndarray]:
    """Packed weights as they are made; scales and biases wait until all weights are written."""
    assert isinstance(planned.target, Format)
    scales, biases = [], []
    for index, piece in enumerate(planned.pieces):
        weights = importance.of(planned.matrix.path, index)
        for block in decode_blocks(piece, planned):
            q = quantise(decode(block, planned.stored, reader), planned.target, weights)
            errors.add(planned.matrix.kind, q)
            yield np.array(q.weight)
            scales.append(_raw(q.scales))
            if q.biases is not None:
                biases.append(_raw(q.biases))
    yield from scales
    yield from biases


def decode_blocks(piece: Piece, planned: PlannedMatrix, align: int = 1) -> Iterator[Piece]:
    """`piece` cut into blocks of rows that start on a scale block, and on multiples of `align`."""
    rows, cols = piece.weight.shape[0], planned.matrix.cols
    height = lcm(planned.stored.block[0], align)
    step = max(1, BLOCK_WEIGHTS // cols // height) * height
    for first in range(0, rows, step):
        yield piece.rows(first, min(rows, first + step), planned.stored.block)


def _raw(array: object) -> np.ndarray:
    """An MLX array as numpy; bf16, which numpy lacks, as its bits."""
    import mlx.core as mx

    assert isinstance(array, mx.array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
