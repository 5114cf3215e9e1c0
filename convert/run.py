"""The conversion itself: shard after shard, each verified before it gets its name.

Killed at any moment, the same command goes on at the first shard that is not in the journal.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxsteer.convert.finish import finish
from mlxsteer.convert.importance import Importance
from mlxsteer.convert.journal import WORK_DIR, Journal, ShardRecord, locked
from mlxsteer.convert.plan import OutputShard, Plan
from mlxsteer.convert.portable import make_portable
from mlxsteer.convert.produce import ErrorSums, shard_chunks
from mlxsteer.convert.progress import SILENT, Progress
from mlxsteer.convert.reader import Reader
from mlxsteer.convert.shard_file import check_written, write_shard
from mlxsteer.convert.source_check import SourceCheck
from mlxsteer.convert.sources import RECORD_NAME, Source, read_json
from mlxsteer.convert.space import check_space, disk_need
from mlxsteer.files import atomic_path


@dataclass(frozen=True)
class Result:
    """A finished conversion. `resumed` shards were there from an earlier run."""

    out: Path
    nbytes: int
    shards: int
    resumed: int
    errors: Mapping[str, Mapping[str, float]]


def convert(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    importance: Importance | None = None,
    keep_source: bool = False,
    portable: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Write `plan` into `out`. Raises ConvertError; what is done so far stays and is resumed."""
    importance = importance or Importance()
    if _is_complete(out, plan, importance):
        record = read_json(out / RECORD_NAME)
        result = Result(out, plan.nbytes, len(plan.shards), len(plan.shards), record["errors"])
    else:
        with locked(out) as work:
            result = _convert_all(source, plan, out, importance, keep_source, progress)
            shutil.rmtree(work)
    if portable:
        make_portable(out)
    return result


def _convert_all(
    source: Source,
    plan: Plan,
    out: Path,
    importance: Importance,
    keep_source: bool,
    progress: Progress,
) -> Result:
    """Every shard that the journal does not have, then the files around them."""
    _sweep(out)
    journal = Journal(out, plan, importance.name)
    journal.load()
    resumed = len(journal.done)
    check_space(out, disk_need(plan, journal.done.keys(), source.downloads, keep_source))
    journal.save()
    progress.start(plan.nbytes, sum(s.nbytes for s in plan.shards if s.filename in journal.done))
    check = SourceCheck(source)
    for index, shard in enumerate(plan.shards):
        if shard.filename not in journal.done:
            record = _convert_shard(source, shard, out, importance, check, progress)
            journal.add(shard.filename, record)
        if not keep_source:
            _release(source, plan, index)
    errors = finish(source, plan, out, journal.done, importance.name)
    return Result(out, plan.nbytes, len(plan.shards), resumed, errors)


def _convert_shard(
    source: Source,
    shard: OutputShard,
    out: Path,
    importance: Importance,
    check: SourceCheck,
    progress: Progress,
) -> ShardRecord:
    """Fetch what a shard reads, write it, read it back, move it into place."""
    for name in shard.source_shards:
        source.fetch(name, progress)
    progress.status(f"writing {shard.unit}")
    errors = ErrorSums()
    target = out / shard.filename
    with atomic_path(target) as temporary, check.beside(shard.source_shards):
        with Reader(source.locate) as reader:
            chunks = shard_chunks(shard, reader, importance, errors)
            digest = write_shard(temporary, shard.tensors, chunks, progress.advance)
        check_written(temporary, digest)
    mtime = target.stat().st_mtime_ns
    return ShardRecord(digest.nbytes, digest.sha256, mtime, errors.sums)


def _release(source: Source, plan: Plan, index: int) -> None:
    """Let go of source shards that no later shard reads."""
    for name in plan.shards[index].source_shards:
        if plan.last_use[name] <= index:
            source.release(name)


def _is_complete(out: Path, plan: Plan, importance: Importance) -> bool:
    """`out` holds this very result already: nothing to do."""
    if not (out / RECORD_NAME).is_file() or (out / WORK_DIR).exists():
        return False
    record = read_json(out / RECORD_NAME)
    made_of = (record.get("fingerprint"), record.get("importance") or "")
    same = made_of == (plan.fingerprint, importance.name)
    sizes = {n: s["nbytes"] for n, s in record.get("shards", {}).items()}
    return same and all(
        (out / n).is_file() and (out / n).stat().st_size == s for n, s in sizes.items()
    )


def _sweep(out: Path) -> None:
    """Remove half-written temporaries of a killed run; only ours have such names."""
    for stale in out.glob(".*.partial*"):
        stale.unlink()
