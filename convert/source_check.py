"""Compares source shards with their published hashes, beside the conversion that reads them.

A result gets its name only after the shards it was made of have been found whole, so nothing is
lost by reading them for both at once, and the second reader finds them in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.shard_file import file_sha256
from mlxsteer.convert.sources import Source
from mlxsteer.errors import MlxsteerError


class _Stopped(Exception):
    """Ends a hash that nobody waits for any more."""


class SourceCheck:
    """Hashes each shard of a source once, where a hash was published with it."""

    def __init__(self, source: Source):
        self._source = source
        self._good: set[str] = set()
        self._stopping = False

    @contextmanager
    def beside(self, shards: Sequence[str]) -> Iterator[None]:
        """Run the block while `shards` are hashed; leave it when both are done.

        Raises ConvertError for a damaged shard, whatever the block says of it: then our own
        download of it is gone, so that the next run gets it anew.
        """
        with ThreadPoolExecutor(1) as helper:
            checks = {name: helper.submit(self._sha256, name) for name in self._unchecked(shards)}
            try:
                yield
            except MlxsteerError:
                self._settle(checks)
                raise
            except BaseException:
                self._stopping = True
                raise
            self._settle(checks)

    def _unchecked(self, shards: Sequence[str]) -> list[str]:
        known = self._source.checkpoint.shards
        return [name for name in shards if known[name].sha256 and name not in self._good]

    def _sha256(self, name: str) -> str:
        return file_sha256(self._source.locate(name), self._go_on)

    def _go_on(self, nbytes: int) -> None:
        if self._stopping:
            raise _Stopped

    def _settle(self, checks: dict[str, Future[str]]) -> None:
        for name, found in checks.items():
            expected = self._source.checkpoint.shards[name].sha256
            if found.result() != expected:
                path = self._source.locate(name)
                self._source.release(name)
                raise ConvertError(
                    f"{path} does not have the sha256 that was published with it"
                    f" ({str(expected)[:12]}...): it is damaged. Download it again, then run the"
                    " same command."
                )
            self._good.add(name)
