"""An independent decoder: numpy tables built from the number formats' definitions.

Shares no code with the converter. Values are float64, in which every format here is exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def e2m1_table() -> np.ndarray:
    """Sign, two exponent bits (bias 1), one mantissa bit."""
    values = []
    for code in range(16):
        sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
        size = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        values.append(-size if sign else size)
    return np.array(values)


def e4m3_table() -> np.ndarray:
    """Sign, four exponent bits (bias 7), three mantissa bits; all ones is NaN; no infinity."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            values.append(np.nan)
            continue
        if exponent == 0:
            size = mantissa * 2.0**-9
        else:
            size = 2.0 ** (exponent - 7) * (1 + mantissa / 8)
        values.append(-size if sign else size)
    return np.array(values)


def e8m0(codes: np.ndarray) -> np.ndarray:
    return np.exp2(codes.astype(np.float64) - 127)


def fp4_matrix(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`[out, in/2]` bytes, low nibble first, and one scale per 32 columns."""
    rows, half = packed.shape
    codes = np.empty((rows, half * 2), np.uint8)
    codes[:, 0::2] = packed.view(np.uint8) & 15
    codes[:, 1::2] = packed.view(np.uint8) >> 4
    return e2m1_table()[codes] * np.repeat(e8m0(scales), 32, axis=1)


def fp8_matrix(codes: np.ndarray, scales: np.ndarray, block: int = 128) -> np.ndarray:
    """`[out, in]` bytes and one scale per block of 128x128, E8M0 bytes or float32."""
    rows, cols = codes.shape
    factor = e8m0(scales) if scales.dtype == np.uint8 else scales.astype(np.float64)
    wide = np.repeat(np.repeat(factor, block, axis=0)[:rows], block, axis=1)[:, :cols]
    return e4m3_table()[codes] * wide


def bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


_NUMPY = {"BF16": "<u2", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U32": "<u4"}


def load(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; one-byte types as uint8, bf16 as uint16."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(data, np.uint8, end - begin, 8 + length + begin)
        tensors[name] = raw.view(_NUMPY.get(entry["dtype"], "u1")).reshape(entry["shape"])
    return tensors


def load_folder(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors.update(load(path))
    return tensors


def source_matrix(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The values of an official matrix, by what its tensors look like."""
    weight = tensors[f"{name}.weight"]
    if weight.dtype == np.uint16:
        return bf16(weight).astype(np.float64)
    scale = tensors[f"{name}.scale"]
    if scale.shape[0] == weight.shape[0]:
        return fp4_matrix(weight, scale)
    return fp8_matrix(weight, scale)


def mx_matrix(weight: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """An MLX mxfp4 or mxfp8 tensor `[..., in]`, decoded from its words by hand."""
    lanes = 32 // bits
    shifts = np.arange(lanes, dtype=np.uint32) * bits
    codes = (weight[..., None] >> shifts) & (2**bits - 1)
    table = e2m1_table() if bits == 4 else e4m3_table()
    values = table[codes.reshape(*weight.shape[:-1], -1)]
    return values * np.repeat(e8m0(scales), 32, axis=-1)


def affine_matrix(
    weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group: int
) -> np.ndarray:
    """An MLX affine tensor `[..., in]`: a little-endian stream of `bits` per weight."""
    stream = np.unpackbits(weight.view(np.uint8), axis=-1, bitorder="little")
    digits = stream.reshape(*weight.shape[:-1], -1, bits).astype(np.float64)
    codes = digits @ np.exp2(np.arange(bits))
    wide = [np.repeat(bf16(a).astype(np.float64), group, axis=-1) for a in (scales, biases)]
    return codes * wide[0] + wide[1]
