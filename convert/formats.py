"""How a matrix is stored: MLX's quantised formats, and the formats that sources come in.

Sources are told apart by the dtype and shape of their tensors, never by config keys: early
downloads of the official checkpoint lack them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.headers import TensorEntry, tensor_bytes
from mlxsteer.convert.layout import Matrix

Shape = tuple[int, ...]

_MX_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (32, 64, 128)
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Format:
    """An MLX quantisation: `bits` a weight, one scale (affine: and one bias) a group of columns."""

    mode: str
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.mode == "affine":
            good = self.bits in _AFFINE_BITS and self.group_size in _AFFINE_GROUPS
        else:
            good = _MX_MODES.get(self.mode) == (self.bits, self.group_size)
        if not good:
            raise ConvertError(
                f"MLX has no format {self}. Choose affine with bits {_AFFINE_BITS} and group_size"
                f" {_AFFINE_GROUPS}, or mxfp4 (4, 32), mxfp8 (8, 32), nvfp4 (4, 16)."
            )

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}-bit g{self.group_size}"

    @property
    def bits_per_weight(self) -> float:
        """Storage of a weight with its share of the scales."""
        scale = 32 if self.mode == "affine" else 8
        return self.bits + scale / self.group_size

    def as_config(self) -> dict[str, object]:
        """The entry of config.json's `quantization`."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


MXFP4 = Format("mxfp4", 4, 32)
MXFP8 = Format("mxfp8", 8, 32)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the result."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


def output_tensors(path: str, shape: Shape, target: Format | str) -> Iterator[OutputTensor]:
    """The tensors of a module whose weight has `shape`; `target` is a Format or a float dtype."""
    if isinstance(target, str):
        yield OutputTensor(f"{path}.weight", target, shape)
        return
    *lead, cols = shape
    groups = (*lead, cols // target.group_size)
    yield OutputTensor(f"{path}.weight", "U32", (*lead, cols * target.bits // 32))
    yield OutputTensor(f"{path}.scales", "BF16" if target.mode == "affine" else "U8", groups)
    if target.mode == "affine":
        yield OutputTensor(f"{path}.biases", "BF16", groups)


@dataclass(frozen=True)
class Stored:
    """A source's format. `layout` is fp4, fp8, fp8_f32, dense or mlx.

    `block` is the scale's block `(rows, cols)` of the fp layouts; `format` the MLX format of an
    already converted matrix; `dtype` the float type of a dense one.
    """

    layout: str
    block: tuple[int, int] = (1, 1)
    format: Format | None = None
    dtype: str = ""

    def __str__(self) -> str:
        names = {"fp4": "FP4", "fp8": "FP8", "fp8_f32": "FP8, float32 scales"}
        return names.get(self.layout) or str(self.format or self.dtype)

    @property
    def exact_target(self) -> Format | str | None:
        """The MLX storage that holds the very same values, or None where there is none."""
        if self.layout == "fp4":
            return MXFP4
        if self.layout == "fp8":
            return MXFP8 if self.block[1] % 32 == 0 else None
        return self.format if self.layout == "mlx" else self.dtype or None


@dataclass(frozen=True)
class Piece:
    """One `[rows, cols]` matrix of the source: its weight and whatever decodes it."""

    weight: TensorEntry
    scales: TensorEntry | None = None
    biases: TensorEntry | None = None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(e for e in (self.weight, self.scales, self.biases) if e is not None)

    def rows(self, first: int, last: int, block: tuple[int, int]) -> Piece:
        """Rows `first..last-1`; `first` must fall on a scale block."""
        height = block[0]
        scales = self.scales and self.scales.rows(first // height, -(-last // height))
        biases = self.biases and self.biases.rows(first, last)
        return Piece(self.weight.rows(first, last), scales, biases)

    def item(self, index: int) -> Piece:
        """Element `index` of a stack."""
        scales = self.scales and self.scales.item(index)
        return Piece(self.weight.item(index), scales, self.biases and self.biases.item(index))


_SCALE_SUFFIXES = (".scale", ".weight_scale_inv", ".weight_scale")


def find_pieces(
    matrix: Matrix, tensors: Mapping[str, TensorEntry]
) -> tuple[tuple[Piece, ...], Stored]:
    """The pieces of a matrix in a source, and the one format they share.

    Raises ConvertError for a missing tensor, a wrong shape, or pieces of different formats.
    """
    if f"{matrix.path}.weight" in tensors and matrix.path not in matrix.sources:
        return _converted_pieces(matrix, tensors)
    pieces, formats = [], set()
    for source in matrix.sources:
        piece = _official_piece(source, tensors)
        pieces.append(piece)
        formats.add(_official_format(matrix, piece))
    if len(formats) > 1:
        raise ConvertError(
            f"The experts of {matrix.path} are stored in different formats"
            f" ({', '.join(sorted(map(str, formats)))}). The source mixes two checkpoints."
        )
    stored = formats.pop()
    if matrix.stack > len(pieces):  # wo_a: one official matrix, stacked by groups of rows
        return _split(pieces[0], matrix.stack, stored), stored
    return tuple(pieces), stored


def _split(piece: Piece, parts: int, stored: Stored) -> tuple[Piece, ...]:
    """`parts` pieces of equally many rows."""
    rows = piece.weight.shape[0] // parts
    if rows % stored.block[0]:
        raise ConvertError(
            f"{piece.weight.name}: groups of {rows} rows do not fall on scale blocks of"
            f" {stored.block[0]} rows, so it cannot be stacked by groups."
        )
    return tuple(piece.rows(i * rows, (i + 1) * rows, stored.block) for i in range(parts))


def _official_piece(source: str, tensors: Mapping[str, TensorEntry]) -> Piece:
    weight = tensors.get(f"{source}.weight")
    if weight is None:
        raise _missing(f"{source}.weight")
    names = (source + suffix for suffix in _SCALE_SUFFIXES)
    scales = next((tensors[name] for name in names if name in tensors), None)
    if scales is None and weight.dtype not in _FLOATS:
        raise _missing(f"{source}.scale")
    return Piece(weight, scales)


def _official_format(matrix: Matrix, piece: Piece) -> Stored:
    weight, scales = piece.weight, piece.scales
    rows, cols = matrix.rows, matrix.cols
    if weight.dtype in _FLOATS:
        _expect(weight, (rows, cols))
        return Stored("dense", dtype=weight.dtype)
    assert scales is not None
    if weight.dtype in ("I8", "U8") and scales.dtype == "F8_E8M0":
        _expect(weight, (rows, cols // 2))
        _expect(scales, (rows, cols // 32))
        return Stored("fp4", block=(1, 32))
    if weight.dtype == "F8_E4M3" and scales.dtype in ("F8_E8M0", "F32"):
        _expect(weight, (rows, cols))
        layout = "fp8" if scales.dtype == "F8_E8M0" else "fp8_f32"
        return Stored(layout, block=_scale_block(matrix, scales))
    raise ConvertError(
        f"{weight.name} is {weight.dtype} with {scales.dtype} scales, a format this converter does"
        " not know. It reads FP4 and FP8 with E8M0 scales, FP8 with float32 scales, and floats."
    )


def _scale_block(matrix: Matrix, scales: TensorEntry) -> tuple[int, int]:
    """Block size of an FP8 scale: 128x128 officially, smaller in some repacks."""
    for block in ((128, 128), (32, 32), (1, 128), (1, 32)):
        if scales.shape == (-(-matrix.rows // block[0]), -(-matrix.cols // block[1])):
            return block
    raise ConvertError(
        f"{scales.name} has shape {list(scales.shape)}, which fits no block size of a"
        f" [{matrix.rows}, {matrix.cols}] matrix. Download its shard again."
    )


def _converted_pieces(
    matrix: Matrix, tensors: Mapping[str, TensorEntry]
) -> tuple[tuple[Piece, ...], Stored]:
    """A matrix that MLX already stores: one tensor with a leading axis, taken apart by it."""
    whole = Piece(
        tensors[f"{matrix.path}.weight"],
        tensors.get(f"{matrix.path}.scales"),
        tensors.get(f"{matrix.path}.biases"),
    )
    stored = _converted_format(matrix, whole)
    target = stored.exact_target
    assert target is not None
    expected = {t.name: t for t in output_tensors(matrix.path, matrix.shape, target)}
    for entry in whole.entries:
        _expect(entry, expected[entry.name].shape)
    if not matrix.stack:
        return (whole,), stored
    return tuple(whole.item(i) for i in range(matrix.stack)), stored


def _converted_format(matrix: Matrix, whole: Piece) -> Stored:
    weight, scales, biases = whole.weight, whole.scales, whole.biases
    if weight.dtype in _FLOATS:
        return Stored("dense", dtype=weight.dtype)
    if weight.dtype != "U32" or scales is None or not scales.shape[-1]:
        raise ConvertError(f"{weight.name} is {weight.dtype} without scales: not an MLX format.")
    bits = weight.shape[-1] * 32 // matrix.cols
    group = matrix.cols // scales.shape[-1]
    if biases is not None:
        mode = "affine"
    else:
        mode = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}.get((bits, group), "unknown")
    return Stored("mlx", format=Format(mode, bits, group), dtype=scales.dtype)


def _expect(entry: TensorEntry, shape: Shape) -> None:
    if entry.shape != shape:
        raise ConvertError(
            f"{entry.name} has shape {list(entry.shape)} where config.json makes it"
            f" {list(shape)}. The config and the weights are of different models, or the file is"
            " damaged; download both again."
        )


def _missing(name: str) -> ConvertError:
    return ConvertError(
        f"The source lacks {name}. Its download is incomplete, or its config.json is of another"
        " model; run the download again, then the same command."
    )
