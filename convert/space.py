"""Is there room? Asked before the first byte, and answered with the arithmetic."""

from __future__ import annotations

import shutil
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.plan import Plan

MARGIN = 1 << 28  # headers, tokenizer, index, and what the file system takes for itself


@dataclass(frozen=True)
class DiskNeed:
    """Bytes still to be written (`result`), and the most of our own download held at one time."""

    result: int
    download: int

    @property
    def total(self) -> int:
        return self.result + self.download + MARGIN


def disk_need(plan: Plan, done: Set[str], downloads: bool, keep_source: bool) -> DiskNeed:
    """What the rest of a conversion needs on disk."""
    result = sum(s.nbytes for s in plan.shards if s.filename not in done)
    if not downloads:
        return DiskNeed(result, 0)
    if keep_source:
        return DiskNeed(result, sum(plan.checkpoint.shards[s].nbytes for s in plan.last_use))
    return DiskNeed(result, _most_held(plan, done))


def _most_held(plan: Plan, done: Set[str]) -> int:
    """The largest sum of source shards that are on disk together: fetched, and not yet released."""
    held: set[str] = set()
    most = 0
    for index, shard in enumerate(plan.shards):
        if shard.filename in done:
            continue
        held |= set(shard.source_shards)
        most = max(most, sum(plan.checkpoint.shards[name].nbytes for name in held))
        held -= {name for name in held if plan.last_use[name] <= index}
    return most


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that will hold `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_space(out: Path, need: DiskNeed) -> None:
    """Raise ConvertError when the disk cannot hold what is to come."""
    free = free_bytes(out)
    if need.total <= free:
        return
    raise ConvertError(
        f"The disk of {out} is too small: {arithmetic(need)}, but {gigabytes(free)} are free."
        f" Free {gigabytes(need.total - free)}, choose another --out, or a smaller recipe"
        " (`mlxsteer convert --list`)."
    )


def arithmetic(need: DiskNeed) -> str:
    """`156.19 GB for the result + 3.60 GB for one source shard + ... = ...`."""
    parts = [f"{gigabytes(need.result)} for the result"]
    if need.download:
        parts.append(f"{gigabytes(need.download)} for source shards held meanwhile")
    parts.append(f"{gigabytes(MARGIN)} to spare")
    return f"{' + '.join(parts)} = {gigabytes(need.total)}"


def gigabytes(nbytes: int) -> str:
    """Decimal gigabytes, as disks are sold."""
    return f"{nbytes / 1e9:.2f} GB"
