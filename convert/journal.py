"""The memory of an unfinished conversion: which shards are done, and proof that they still are.

It lives in `OUT/.convert/` beside the lock, is rewritten whole after every shard, and goes away
when the conversion is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.plan import Plan
from mlxsteer.convert.shard_file import file_sha256
from mlxsteer.files import write_text

WORK_DIR = ".convert"
JOURNAL = "journal.json"


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard. `mtime_ns` tells cheaply that nobody touched it since."""

    nbytes: int
    sha256: str
    mtime_ns: int
    errors: dict[str, list[float]] = field(default_factory=dict)


@contextmanager
def locked(out: Path) -> Iterator[Path]:
    """Hold the lock of a target folder; the folder is made. Yields its work folder.

    A lock of the operating system: it goes with the process, so a crash leaves none behind.
    """
    work, made = out / WORK_DIR, not out.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConvertError(
            f"Cannot write into {out}: {error.strerror}. Choose another --out."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), (work / "lock").stat()):
            raise BlockingIOError  # a run that was refused has just taken this one away
    except OSError as error:
        os.close(handle)
        raise ConvertError(
            f"Another conversion is writing to {out}. Wait for it, or choose another --out."
        ) from error
    try:
        yield work
    finally:
        if [path.name for path in work.glob("*")] == ["lock"]:  # refused: as things were
            shutil.rmtree(work)
            if made:
                with suppress(OSError):
                    out.rmdir()
        os.close(handle)


class Journal:
    """The finished shards of one target, for one plan."""

    def __init__(self, out: Path, plan: Plan, importance: str = ""):
        self._out = out
        self._path = out / WORK_DIR / JOURNAL
        self._plan = plan
        self._importance = importance
        self.done: dict[str, ShardRecord] = {}

    def load(self) -> None:
        """Read what an earlier run left. Refuses a folder that holds something else."""
        if not self._path.exists():
            self._refuse_foreign_files()
            return
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            records = {name: ShardRecord(**record) for name, record in data["shards"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConvertError(
                f"{self._path} is damaged. Remove {self._out} and convert again."
            ) from error
        same = data.get("fingerprint") == self._plan.fingerprint
        if not same or data.get("importance") != self._importance:
            raise ConvertError(
                f"{self._out} holds an unfinished conversion of {data.get('source')} with recipe"
                f" {data.get('recipe')}. Finish that one with the same command, or choose another"
                " --out."
            )
        self.done = {n: r for n, r in records.items() if self._still_there(n, r)}

    def add(self, name: str, record: ShardRecord) -> None:
        """Record a shard that was verified and moved into place."""
        self.done[name] = record
        self.save()

    def save(self) -> None:
        """Write the journal whole."""
        data = {
            "fingerprint": self._plan.fingerprint,
            "source": self._plan.checkpoint.name,
            "recipe": self._plan.recipe.name,
            "importance": self._importance,
            "shards": {name: asdict(record) for name, record in self.done.items()},
        }
        write_text(self._path, json.dumps(data, indent=1))

    def _still_there(self, name: str, record: ShardRecord) -> bool:
        """Untouched since it was verified, or at least still of the same content."""
        try:
            stat = (self._out / name).stat()
        except OSError:
            return False
        if stat.st_size != record.nbytes:
            return False
        same_time = stat.st_mtime_ns == record.mtime_ns
        return same_time or file_sha256(self._out / name) == record.sha256

    def _refuse_foreign_files(self) -> None:
        """An empty folder is ours to fill; one with files of the user's is not."""
        found = sorted(p.name for p in self._out.iterdir() if p.name not in (WORK_DIR, ".DS_Store"))
        if found:
            raise ConvertError(
                f"{self._out} already holds {found[0]}"
                f"{' and more' if len(found) > 1 else ''}. Choose an empty or new folder for --out."
            )
