"""Is a converted folder whole, and does it say what its source says?

Always: names, shapes, formats against config.json, file sizes, hashes (a sample of the files
unless all are asked for). With the source: lossless matrices bit for bit, the others by their
error (again a sample of each matrix unless all).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.convert.decode import decode
from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.formats import Format, Piece
from mlxsteer.convert.plan import Plan, PlannedMatrix, make_plan
from mlxsteer.convert.produce import decode_blocks
from mlxsteer.convert.progress import SILENT, Progress
from mlxsteer.convert.reader import Reader
from mlxsteer.convert.recipes import Recipe
from mlxsteer.convert.shard_file import file_sha256
from mlxsteer.convert.sources import RECORD_NAME, LocalSource, Source, read_json

SAMPLE = 4  # files whose hash is computed, and pieces of a matrix compared, unless all are

# Keeps every matrix as it is: the plan of a folder onto itself, and with Format("affine", 8, 64)
# as a stand-in, of a source that MLX cannot hold exactly.
_AS_IS = Recipe("as-is", "", fallback=Format("affine", 8, 64))


@dataclass
class Report:
    """What was checked and what is wrong. `errors` are relative RMS errors per kind."""

    folder: str
    tensors: int = 0
    files: int = 0
    hashed: int = 0
    exact: int = 0
    compared: int = 0
    problems: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    folder: Path,
    source: Source | None = None,
    *,
    everything: bool = False,
    progress: Progress = SILENT,
) -> Report:
    """Check `folder`, against `source` when it is given. Faults are in the report's `problems`."""
    report = Report(str(folder))
    try:
        result = LocalSource(folder)
        plan = make_plan(result.checkpoint, _AS_IS)
    except ConvertError as error:
        report.problems.append(str(error))
        return report
    report.tensors, report.files = len(result.checkpoint.tensors), len(result.checkpoint.shards)
    report.problems += _config_problems(plan)
    _check_hashes(folder, result, report, everything, progress)
    if source is not None and report.ok:
        _compare(result, plan, source, report, everything, progress)
    return report


def _config_problems(plan: Plan) -> Iterator[str]:
    """config.json must tell a loader what the tensors are."""
    known: Mapping[str, Any] = plan.checkpoint.config.get("quantization") or {}
    for planned in plan.matrices():
        path, stored = planned.matrix.path, planned.stored.format
        if stored is None:
            continue
        if path not in known:
            yield f"config.json does not say how {path} is quantised."
        elif dict(known[path]) != stored.as_config():
            yield f"config.json says {dict(known[path])} of {path}, which is stored as {stored}."


def _check_hashes(
    folder: Path, result: LocalSource, report: Report, everything: bool, progress: Progress
) -> None:
    if not (folder / RECORD_NAME).is_file():
        report.problems.append(f"{folder} has no {RECORD_NAME}, so its hashes are not known.")
        return
    recorded = read_json(folder / RECORD_NAME).get("shards", {})
    names = sorted(result.checkpoint.shards)
    for name in sorted(set(recorded) ^ set(names)):
        report.problems.append(f"{name} is in only one of {RECORD_NAME} and the index.")
    for name in names if everything else _sample(names):
        if name not in recorded:
            continue
        progress.status(f"hashing {name}")
        report.hashed += 1
        if file_sha256(folder / name) != recorded[name]["sha256"]:
            report.problems.append(f"{name} has changed since it was converted (sha256 differs).")


def _sample(items: list[str]) -> list[str]:
    """At most SAMPLE of `items`, evenly spread, the first and the last among them."""
    if len(items) <= SAMPLE:
        return items
    return [items[round(i * (len(items) - 1) / (SAMPLE - 1))] for i in range(SAMPLE)]


def _compare(
    result: LocalSource,
    plan: Plan,
    source: Source,
    report: Report,
    everything: bool,
    progress: Progress,
) -> None:
    """Every tensor of the result beside the one it was made of."""
    original = make_plan(source.checkpoint, _AS_IS)
    sums: dict[str, tuple[float, float]] = {}
    for ours, theirs in zip(plan.shards, original.shards, strict=True):
        progress.status(f"comparing {ours.unit}")
        for name in theirs.source_shards:
            source.fetch(name, progress)
        with Reader(result.locate) as here, Reader(source.locate) as there:
            for a, b in zip(ours.plains, theirs.plains, strict=True):
                if not np.array_equal(here.read(a.entry), there.read(b.entry)):
                    report.problems.append(f"{a.tensor.name} differs from the source.")
                report.compared += 1
            for m, n in zip(ours.matrices, theirs.matrices, strict=True):
                _compare_matrix(m, n, here, there, report, sums, everything)
    report.errors = {k: sqrt(e / p) if p else 0.0 for k, (e, p) in sums.items()}


def _compare_matrix(
    ours: PlannedMatrix,
    theirs: PlannedMatrix,
    here: Reader,
    there: Reader,
    report: Report,
    sums: dict[str, tuple[float, float]],
    everything: bool,
) -> None:
    """Bit for bit where both formats hold the same values, by squared error elsewhere."""
    lossless = ours.stored.exact_target == theirs.stored.exact_target
    error, power = sums.get(ours.matrix.kind, (0.0, 0.0))
    for a, b in _pieces(ours, theirs, everything):
        x, y = decode(a, ours.stored, here), decode(b, theirs.stored, there)
        report.compared += 1
        if not lossless:
            error += float(np.array(mx.square(x - y).sum()))
            power += float(np.array(mx.square(y).sum()))
        elif bool(np.array(mx.array_equal(x.view(mx.uint32), y.view(mx.uint32)))):
            report.exact += 1
        else:
            report.problems.append(f"{ours.matrix.path} differs from the source.")
            return
    if not lossless:
        sums[ours.matrix.kind] = (error, power)


def _pieces(
    ours: PlannedMatrix, theirs: PlannedMatrix, everything: bool
) -> Iterator[tuple[Piece, Piece]]:
    """Corresponding blocks of rows: all, or the first blocks of a spread of the pieces."""
    pairs = list(zip(ours.pieces, theirs.pieces, strict=True))
    chosen = [str(i) for i in range(len(pairs))]
    for index in map(int, chosen if everything else _sample(chosen)):
        blocks = zip(
            decode_blocks(pairs[index][0], ours, theirs.stored.block[0]),
            decode_blocks(pairs[index][1], theirs, ours.stored.block[0]),
            strict=True,
        )
        for number, block in enumerate(blocks):
            if everything or number == 0:
                yield block
