"""Where files live, and how they are written: whole or not at all.

`cache_dir` holds what can be fetched or made again; `home_dir` holds what is the user's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxsteer.errors import MlxsteerError


def cache_dir() -> Path:
    """`$MLXSTEER_CACHE`, else `$XDG_CACHE_HOME/mlxsteer`, else `~/.cache/mlxsteer`."""
    if chosen := os.environ.get("MLXSTEER_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlxsteer"


def home_dir() -> Path:
    """`$MLXSTEER_HOME`, else `~/.mlxsteer`: the user's vectors, configuration and history."""
    if chosen := os.environ.get("MLXSTEER_HOME"):
        return Path(chosen).expanduser()
    return Path.home() / ".mlxsteer"


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; moved onto it when the block ends without an error.

    The old file, if any, stays as it was when the block fails. Raises MlxsteerError when the
    disk refuses (full, read-only).
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=f".partial{target.suffix}", dir=target.parent
        )
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o644)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MlxsteerError(
            f"Cannot write {target}: {reason}. Nothing was changed; free some space or choose"
            " another place, then run the command again."
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
