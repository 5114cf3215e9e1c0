"""A prompt on its way into a cache, a slice at a time, from what the prefix cache knows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxsteer.plan import PROMPT
from mlxsteer.rows import RowCache
from mlxsteer.server.answering import Answering, run
from mlxsteer.server.prefix import detached

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.server.prefix import PrefixCache


class Prefill:
    """One row's prompt. When it is done, `cache` holds all of it but the last token."""

    def __init__(self, model: Model, row: Answering, prefixes: PrefixCache | None):
        self.model = model
        self.row = row
        self.prefixes = prefixes
        self.cache: list[Any] = model.steered.new_cache(row.row)
        self.parting = 0
        if prefixes is not None:
            self._reuse(prefixes)

    @property
    def left(self) -> int:
        """Tokens still to run."""
        return len(self.row.tokens) - 1 - len(self.row.cached)

    def advance(self, limit: int) -> int:
        """Run at most `limit` more tokens; returns how many."""
        row = self.row
        row.govern(row.generation.plan)
        start = len(row.cached)
        count = min(limit, self.left)
        if start < self.parting:
            count = min(count, self.parting - start)
        run(self.model, self.cache, row.tokens[start : start + count])
        row.note_prompt(count)
        at_mark = len(row.cached) == self.parting or not self.left
        if self.prefixes is not None and count and at_mark:
            self.prefixes.keep(row.cached, detached(self.cache[:-1]))
        return count

    def _reuse(self, prefixes: PrefixCache) -> None:
        row = self.row
        stamp = row.generation.plan.stamp(PROMPT)
        wanted = [(token, stamp) for token in row.tokens[:-1]]
        found = prefixes.longest(wanted)
        length = 0 if found is None else found.length
        if found is not None:
            self.cache = [*found.cache, RowCache([row.row])]
            row.row.seen = length
            row.cached = wanted[:length]
            row.generation.cached_tokens = row.generation.prefilled = length
        parting = prefixes.parting(wanted)
        self.parting = parting if parting > length else 0
