"""What a conversion will write, decided from headers alone: no weight is read here.

A plan is data. It is refused as a whole (missing, extra or misshapen tensors, a recipe that does
not fit) before anything is downloaded or written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from mlxsteer.convert.checkpoint import Checkpoint
from mlxsteer.convert.errors import ConvertError, some
from mlxsteer.convert.formats import (
    Format,
    OutputTensor,
    Piece,
    Stored,
    find_pieces,
    output_tensors,
)
from mlxsteer.convert.headers import DTYPE_BYTES, TensorEntry
from mlxsteer.convert.layout import Matrix, Plain, Unit, model_layout
from mlxsteer.convert.recipes import KEEP, Recipe, check_recipe

FORMAT_VERSION = 1  # of what is written; a resumed conversion must agree


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix, where its pieces lie, and how it will be stored.

    `target` is an MLX format or a float dtype; `exact` says that values are kept bit for bit.
    """

    matrix: Matrix
    pieces: tuple[Piece, ...]
    stored: Stored
    target: Format | str
    exact: bool

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        return tuple(output_tensors(self.matrix.path, self.matrix.shape, self.target))


@dataclass(frozen=True)
class PlannedPlain:
    """A tensor that is copied; only int64 becomes int32, which MLX indexes with."""

    plain: Plain
    entry: TensorEntry

    @property
    def tensor(self) -> OutputTensor:
        dtype = "I32" if self.entry.dtype == "I64" else self.entry.dtype
        return OutputTensor(self.plain.name, dtype, self.plain.shape)


@dataclass(frozen=True)
class OutputShard:
    """One file of the result, made of one unit of the model."""

    filename: str
    unit: str
    plains: tuple[PlannedPlain, ...]
    matrices: tuple[PlannedMatrix, ...]

    @cached_property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """In the order in which they are written."""
        return (
            *(plain.tensor for plain in self.plains),
            *(tensor for matrix in self.matrices for tensor in matrix.tensors),
        )

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Everything this shard reads."""
        return (
            *(plain.entry for plain in self.plains),
            *(e for m in self.matrices for piece in m.pieces for e in piece.entries),
        )

    @cached_property
    def source_shards(self) -> tuple[str, ...]:
        return tuple(sorted({entry.shard for entry in self.entries}))


@dataclass(frozen=True)
class Plan:
    """A whole conversion."""

    checkpoint: Checkpoint
    recipe: Recipe
    shards: tuple[OutputShard, ...]
    dropped: tuple[TensorEntry, ...]  # draft blocks (mtp.*), which are not converted

    @cached_property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def tensor_count(self) -> int:
        return sum(len(shard.tensors) for shard in self.shards)

    def matrices(self) -> Iterator[PlannedMatrix]:
        for shard in self.shards:
            yield from shard.matrices

    @cached_property
    def last_use(self) -> Mapping[str, int]:
        """For every source shard, the index of the last output shard that reads it."""
        return {name: i for i, shard in enumerate(self.shards) for name in shard.source_shards}

    @cached_property
    def fingerprint(self) -> str:
        """Identifies source, recipe and layout: two plans with one fingerprint write one result."""
        facts = {
            "version": FORMAT_VERSION,
            "source": [self.checkpoint.name, self.checkpoint.revision],
            "recipe": repr((self.recipe.name, self.recipe.rules, self.recipe.fallback)),
            "tensors": [[t.name, t.dtype, t.shape] for s in self.shards for t in s.tensors],
            "reads": [[e.name, e.shard, e.start] for s in self.shards for e in s.entries],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """The plan of a conversion. Raises ConvertError when source and recipe do not fit."""
    units = model_layout(checkpoint.config)
    check_recipe(recipe, units)
    count = sum(unit.layer is not None for unit in units)
    shards = tuple(
        _plan_shard(unit, checkpoint, recipe, count, f"{number:05d}-of-{len(units):05d}")
        for number, unit in enumerate(units, start=1)
    )
    used = {entry.name for shard in shards for entry in shard.entries}
    rest = [e for name, e in checkpoint.tensors.items() if name not in used]
    dropped = tuple(e for e in rest if e.name.startswith("mtp."))
    if extra := sorted({e.name for e in rest} - {e.name for e in dropped}):
        raise ConvertError(
            f"The source has {len(extra):,} tensors that a DeepSeek-V4 of this config does not:"
            f" {some(extra)}. It is another model; `mlxsteer convert` would lose them."
        )
    return Plan(checkpoint, recipe, shards, dropped)


def _plan_shard(
    unit: Unit, checkpoint: Checkpoint, recipe: Recipe, count: int, number: str
) -> OutputShard:
    plains = [_plan_plain(plain, checkpoint.tensors) for plain in unit.plains]
    plains.sort(key=lambda p: -DTYPE_BYTES[p.tensor.dtype])  # wide types first: all stay aligned
    return OutputShard(
        f"model-{number}.safetensors",
        unit.name,
        tuple(plains),
        tuple(
            _plan_matrix(m, recipe, recipe.format_for(m.path, unit.layer, count), checkpoint)
            for m in unit.matrices
        ),
    )


def _plan_plain(plain: Plain, tensors: Mapping[str, TensorEntry]) -> PlannedPlain:
    entry = tensors.get(plain.source) or tensors.get(plain.name)
    if entry is None:
        raise ConvertError(
            f"The source lacks {plain.source}. Its download is incomplete, or its config.json is"
            " of another model; run the download again, then the same command."
        )
    kinds = ("I64", "I32") if plain.dtype == "I64" else ("BF16", "F16", "F32")
    if entry.shape != plain.shape or entry.dtype not in kinds:
        raise ConvertError(
            f"{entry.name} is {entry.dtype} {list(entry.shape)} where this model has"
            f" {plain.dtype} {list(plain.shape)}. Config and weights are of different models."
        )
    return PlannedPlain(plain, entry)


def _plan_matrix(
    matrix: Matrix, recipe: Recipe, wanted: Format | str, checkpoint: Checkpoint
) -> PlannedMatrix:
    pieces, stored = find_pieces(matrix, checkpoint.tensors)
    exact = stored.exact_target
    if wanted == KEEP:
        if exact is not None:
            return PlannedMatrix(matrix, pieces, stored, exact, exact=True)
        if recipe.fallback is None:
            raise ConvertError(
                f"{matrix.path} is {stored}, which MLX cannot hold bit for bit, and recipe"
                f" {recipe.name} changes no weight. Choose q4-fast, q3, q2 or q2-fast."
            )
        wanted = recipe.fallback
    return PlannedMatrix(matrix, pieces, stored, wanted, exact=wanted == exact)
