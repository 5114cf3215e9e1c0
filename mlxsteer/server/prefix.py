"""Prompts whose state is kept, so that what they share is not computed again.

A prompt cache belongs to the steering that filled it: an entry is known by its tokens, each with
the stamp of what was done at its position (`Plan.stamp`). Default steering leaves prompts alone,
so they are shared by all strengths; an answer's tokens are shared only where its steering agrees.

The longest common prefix is found by comparing all entries, as arrays: a byte limit keeps them
few (hundreds), and comparing 100 entries of 10,000 tokens takes about a millisecond.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlxsteer.session import Stamped

if TYPE_CHECKING:
    from mlxsteer.server.disk import DiskTier

DEFAULT_BYTES = 2 << 30
MIN_PARTING = 32  # tokens; a shared beginning shorter than that is not worth an entry
TOKEN_BITS = 20  # of a code; the other 44 tell stamps apart

Codes = np.ndarray  # uint64 [T]: token and stamp of each position


def codes_of(rows: Sequence[Stamped]) -> Codes:
    """One number per position; equal numbers mean the same token under the same steering."""
    return np.array([_stamp_code(stamp) + token for token, stamp in rows], np.uint64)


@lru_cache(maxsize=1024)
def _stamp_code(stamp: str) -> int:
    if not stamp:
        return 0
    digest = hashlib.sha256(stamp.encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> TOKEN_BITS) << TOKEN_BITS


def common_length(a: Codes, b: Codes) -> int:
    """How many leading positions agree."""
    shorter = min(len(a), len(b))
    differing = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differing[0]) if len(differing) else shorter


def detached(cache: Sequence[Any]) -> list[Any]:
    """A copy of one sequence's caches, without room to grow where they can be packed."""
    return [
        layer.merge([layer]).extract(0) if hasattr(layer, "merge") else copy.deepcopy(layer)
        for layer in cache
    ]


@dataclass(eq=False)
class Entry:
    """A kept state: codes of its positions, the layers' caches, bytes."""

    codes: Codes
    cache: list[Any]
    trimmable: bool
    nbytes: int

    def usable(self, wanted: Codes) -> int:
        """How many leading positions are as wanted, and can be had without those that follow."""
        common = common_length(self.codes, wanted)
        return common if self.trimmable or common == len(self.codes) else 0


@dataclass(frozen=True)
class Found:
    """A state to go on from, for its finder alone, and how many tokens it holds."""

    cache: list[Any]
    length: int


class PrefixCache:
    """Kept states of one model, the least recently used dropped beyond `max_bytes`.

    disk: where long prompts are kept as well (see `disk`). Used by the engine's thread only;
    the counts may be read from any.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES, disk: DiskTier | None = None):
        self.max_bytes = max_bytes
        self.disk = disk
        self.nbytes = 0
        self._entries: list[Entry] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, wanted: Sequence[Stamped]) -> Found | None:
        """The state that saves most of `wanted`, cut to it; None when none saves anything."""
        codes = codes_of(wanted)
        best, length = self._best(codes)
        if self.disk is not None:
            loaded = self.disk.longest(codes, beyond=length)
            if loaded is not None:
                self._add(loaded)
                best, length = loaded, loaded.usable(codes)
        if best is None:
            return None
        if best in self._entries:
            self._entries.append(self._entries.pop(self._entries.index(best)))
        cache = copy.deepcopy(best.cache)  # shares arrays until one of the two writes
        if length < len(best.codes):
            trim_prompt_cache(cache, len(best.codes) - length)
        return Found(cache, length)

    def parting(self, wanted: Sequence[Stamped]) -> int:
        """Where `wanted` leaves the longest way that it shares with any entry; 0 when short.

        A cache that cannot be trimmed serves only those who want all of it. So a second prompt
        leaves a state where it parts from the first, and the third can go on from there.
        """
        codes = codes_of(wanted)
        shared = max((common_length(entry.codes, codes) for entry in self._entries), default=0)
        return shared if shared >= MIN_PARTING else 0

    def keep(self, rows: Sequence[Stamped], cache: list[Any]) -> None:
        """Keep the state `cache` (of the layers) after `rows`. Nobody may write to it any more."""
        if not rows:
            return
        mx.eval([layer.state for layer in cache])
        nbytes = sum(layer.nbytes for layer in cache)
        entry = Entry(codes_of(rows), cache, can_trim_prompt_cache(cache), nbytes)
        self._add(entry)
        if self.disk is not None:
            self.disk.keep(entry)

    def _best(self, codes: Codes) -> tuple[Entry | None, int]:
        best, length = None, 0
        for entry in self._entries:
            if (usable := entry.usable(codes)) > length:
                best, length = entry, usable
        return best, length

    def _add(self, entry: Entry) -> None:
        if entry.nbytes > self.max_bytes:
            return
        self._entries = [kept for kept in self._entries if not _covers(entry, kept)]
        self._entries.append(entry)
        self.nbytes = sum(kept.nbytes for kept in self._entries)
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._entries.pop(0).nbytes


def _covers(new: Entry, old: Entry) -> bool:
    """Whether everything that `old` can serve, `new` can."""
    common = common_length(new.codes, old.codes)
    return common == len(old.codes) and (new.trimmable or len(new.codes) == common)
