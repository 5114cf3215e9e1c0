"""From any stored format to float32 values, block of rows by block of rows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxsteer.convert.formats import MXFP4, MXFP8, Format, Piece, Stored
from mlxsteer.convert.reader import Reader


def expand_scales(scales: np.ndarray, block: tuple[int, int], rows: int, cols: int) -> np.ndarray:
    """Block scales `[rows/b0, cols/b1]` as MLX wants them, one per row and 32 columns."""
    wide = np.repeat(scales, block[1] // 32, axis=1)[:, : cols // 32]
    return np.repeat(wide, block[0], axis=0)[:rows]


def decode(piece: Piece, stored: Stored, reader: Reader) -> mx.array:
    """The values of a piece, float32 `[rows, cols]`; exact for every format."""
    weight = reader.read(piece.weight)
    scales = reader.read(piece.scales) if piece.scales else None
    biases = reader.read(piece.biases) if piece.biases else None
    if stored.layout == "dense":
        return _floats(weight, stored.dtype)
    assert scales is not None
    if stored.layout == "fp4":
        return _dequantise(weight.view("<u4"), mx.array(scales), MXFP4)
    if stored.layout == "mlx":
        assert stored.format is not None
        scale, bias = _floats(scales, stored.dtype), None
        if biases is not None:
            bias = _floats(biases, stored.dtype)
        return _dequantise(weight, scale, stored.format, bias)
    rows, cols = weight.shape
    if stored.layout == "fp8" and stored.block[1] % 32 == 0:
        wide = expand_scales(scales, stored.block, rows, cols)
        return _dequantise(weight.view("<u4"), mx.array(wide), MXFP8)
    return _dequantise_f32(weight, scales, stored.block)


def _floats(values: np.ndarray, dtype: str) -> mx.array:
    """Raw values as float32; E8M0 and e4m3 scales (uint8) stay as they are."""
    if dtype == "U8":
        return mx.array(values)
    array = mx.array(values)
    return (array.view(mx.bfloat16) if dtype == "BF16" else array).astype(mx.float32)


def _dequantise(
    weight: np.ndarray, scales: mx.array, target: Format, biases: mx.array | None = None
) -> mx.array:
    return mx.dequantize(
        mx.array(weight),
        scales,
        biases,
        group_size=target.group_size,
        bits=target.bits,
        mode=target.mode,
        dtype=mx.float32,
    )


def _dequantise_f32(weight: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> mx.array:
    """FP8 with float32 scales (the Base model)."""
    rows, cols = weight.shape
    wide = np.repeat(np.repeat(scales, block[1], axis=1)[:, :cols], block[0], axis=0)[:rows]
    return mx.from_fp8(mx.array(weight), dtype=mx.float32) * mx.array(wide)
