"""Who is being served now: prompts in prefill, rows in decoding, and the turn they take.

In a turn prompts advance by a slice that takes about a quarter of a second, then every decoding
row gets a token, so a long prompt slows its neighbours and never stalls them. Prompts that end
within the slice run in one batch.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxsteer.batch import can_batch
from mlxsteer.generation import PREFILL_STEP
from mlxsteer.plan import Plan
from mlxsteer.server.answering import Answering
from mlxsteer.server.decoding import Batch
from mlxsteer.server.jobs import Generation
from mlxsteer.server.prefilling import Prefill, advance_together

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.server.prefix import PrefixCache

SLICE_SECONDS = 0.25
ALIKE = 2  # prompts run in one batch if none is so many times as long as another, or all are short
FIRST_RATE = 1000.0  # prompt tokens per second, before any were measured
MIN_SLICE = 32
SHORT = 1024  # tokens; rows up to here decode in one batch,
SPREAD = 4  # and longer ones with those at most this many times as long
CLEAR_TURNS = 256

log = logging.getLogger("mlxsteer.server")


class Floor:
    """The rows in hand. Used by the engine's thread; `len` and the counts by any.

    Rows of very different length decode in different batches: in one batch each row's cache
    takes the memory of the longest.
    """

    def __init__(self, model: Model, prefixes: PrefixCache | None):
        self.model = model
        self.prefixes = prefixes
        self.batches_rows = can_batch(model.steered, model.row(Plan([]), 0))
        self.tokens = 0
        self._rows: list[Answering] = []
        self._prefills: deque[Prefill] = deque()
        self._batches: dict[int, Batch] = {}  # below 0: rows that were in a failed step, apart
        self._rate = FIRST_RATE
        self._turns = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def prefilling(self) -> int:
        return len(self._prefills)

    @property
    def running(self) -> int:
        return len(self._rows) - len(self._prefills)

    # --- in and out ------------------------------------------------------------------------

    def enter(self, generation: Generation) -> None:
        """Begin an answer."""
        generation.state = "prefill"
        prefill = Prefill(self.model, Answering(self.model, generation), self.prefixes)
        self._rows.append(prefill.row)
        self._prefills.append(prefill)

    def leave(self) -> list[Generation]:
        """Let the rows go that are done; their generations."""
        done = [row for row in self._rows if row.done]
        if not done:
            return []
        for key, batch in list(self._batches.items()):
            self._keep_states(batch)
            batch.drop_done()
            if not batch.rows:
                del self._batches[key]
        self._prefills = deque(prefill for prefill in self._prefills if not prefill.row.done)
        self._rows = [row for row in self._rows if not row.done]
        return [row.generation for row in done]

    def cancel_all(self) -> None:
        for row in self._rows:
            row.close("cancelled")

    def fail_all(self, error: str) -> None:
        for row in self._rows:
            row.fail(error)
        self.clear()

    def clear(self) -> None:
        """Let every state go."""
        self._prefills.clear()
        self._batches.clear()
        mx.clear_cache()

    def _keep_states(self, batch: Batch) -> None:
        """What answers that are done leave to the next turn of their chats."""
        if self.prefixes is None:
            return
        for row in batch.rows:
            if row.done and not row.failed:
                self.prefixes.keep(row.cached, batch.own_cache(row))

    # --- a turn ------------------------------------------------------------------------------

    def turn(self) -> None:
        """A slice of prompts, then a token for every row that decodes."""
        for row in self._rows:
            if row.generation.cancelled and not row.done:
                row.close("cancelled")
        self._prefill_slice()
        for batch in list(self._batches.values()):
            batch.drop_done()
            self._step(batch)
        self._turns += 1
        if self._turns % CLEAR_TURNS == 0:
            mx.clear_cache()

    def _prefill_slice(self) -> None:
        spent = 0
        while self._prefills and (left := self._slice() - spent) > 0:
            group = self._fitting(left) or [self._prefills[0]]
            self._prefills = deque(prefill for prefill in self._prefills if prefill not in group)
            going = [prefill for prefill in group if not prefill.row.done]
            if going:
                spent += max(1, self._advance(going, left))

    def _slice(self) -> int:
        """Prompt tokens of a turn: as many as run well at once, when nobody waits beside them."""
        if not self._batches:
            return PREFILL_STEP
        return max(MIN_SLICE, min(PREFILL_STEP, int(self._rate * SLICE_SECONDS)))

    def _fitting(self, limit: int) -> list[Prefill]:
        """The first prompt and others like it that end together within `limit` tokens."""
        found: list[Prefill] = []
        for prefill in self._prefills if self.batches_rows else ():
            lengths = [one.left for one in (*found, prefill)]
            alike = max(lengths) <= max(MIN_SLICE, ALIKE * min(lengths))
            if prefill.joinable and alike and max(lengths) * len(lengths) <= limit:
                found.append(prefill)
            elif not found:
                break
        return found

    def _advance(self, group: list[Prefill], limit: int) -> int:
        """Run one prompt's slice, or several whole prompts at once; returns how many tokens."""
        started = time.monotonic()
        try:
            count = group[0].advance(limit) if len(group) == 1 else advance_together(group)
        except Exception as error:
            return self._failed(group, error)
        if count >= MIN_SLICE:
            rate = count / max(1e-6, time.monotonic() - started)
            self._rate += 0.3 * (rate - self._rate)
        for prefill in group:
            if prefill.left:
                self._prefills.append(prefill)
            else:
                self._join(prefill)
        return count

    def _failed(self, group: list[Prefill], error: Exception) -> int:
        """A prompt that fails alone ends its answer; of several, each is tried alone."""
        if len(group) > 1:
            log.warning("%d prompts failed together (%s); trying each alone", len(group), error)
            return sum(self._advance([prefill.anew()], PREFILL_STEP) for prefill in group)
        row = group[0].row
        log.error("request %s failed in prefill", row.generation.id, exc_info=error)
        row.fail(f"The prompt could not be processed: {error}")
        return 0

    def _join(self, prefill: Prefill) -> None:
        row, key, reach = prefill.row, 0, SHORT
        while len(row.tokens) > reach:
            key, reach = key + 1, reach * SPREAD
        self._batches.setdefault(key, Batch(self.model)).join(row, prefill.cache)
        row.generation.state = "running"

    def _step(self, batch: Batch) -> None:
        if not batch.rows:
            return
        try:
            self.tokens += batch.step()
        except Exception as error:
            log.warning("a step of %d rows failed (%s); trying each alone", len(batch.rows), error)
            self._step_singly(batch)

    def _step_singly(self, batch: Batch) -> None:
        """After a failed step the joint cache is in pieces: rows go on from their tokens, apart."""
        rows, batch.rows, batch.cache = batch.rows, [], []
        for row in rows:
            alone = Batch(self.model)
            try:
                alone.join(row, row.rebuilt_cache())
                self.tokens += alone.step()
            except Exception as error:
                log.exception("request %s failed", row.generation.id)
                row.fail(f"The next token could not be computed: {error}")
            else:
                self._batches[min(0, *self._batches) - 1] = alone
