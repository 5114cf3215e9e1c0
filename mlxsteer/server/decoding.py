"""Rows that are decoded together: one forward pass gives each its next token.

Rows join and leave between steps, through the merging of mlx-lm's caches. Nothing is computed
ahead of its time, so that a change of steering acts on the very next token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from mlxsteer.batch import can_batch
from mlxsteer.server.answering import Answering, Measured
from mlxsteer.server.choosing import Chosen, choose, log_probabilities

if TYPE_CHECKING:
    from mlxsteer.model import Model


@dataclass
class _Step:
    """What a forward pass gave, not evaluated yet. scores: {row: see `log_probabilities`}."""

    chosen: Chosen
    scores: dict[int, tuple[mx.array, ...]]
    readings: dict[int, mx.array]


class Batch:
    """Rows and their joint cache, which holds all their tokens but the last of each."""

    def __init__(self, model: Model):
        self.model = model
        self.rows: list[Answering] = []
        self.cache: list[Any] = []

    def join(self, row: Answering, cache: list[Any]) -> None:
        """Take a row in, with its own cache."""
        if can_batch(self.model.steered, row.row):
            cache = [type(entry).merge([entry]) for entry in cache]
        if self.rows:
            for entry, new in zip(self.cache, cache, strict=True):
                entry.extend(new)
        else:
            self.cache = cache
        self.rows = [*self.rows, row]

    def own_cache(self, row: Answering) -> list[Any]:
        """The layers' caches of one row, apart from the others'."""
        index = self.rows.index(row)
        if len(self.rows) == 1 and not hasattr(self.cache[0], "extract"):
            return self.cache[:-1]
        return [entry.extract(index) for entry in self.cache[:-1]]

    def drop_done(self) -> None:
        """Let the rows go whose answers are complete."""
        keep = [index for index, row in enumerate(self.rows) if not row.done]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in keep]
        if not keep:
            self.cache = []
            return
        for entry in self.cache:
            entry.filter(mx.array(keep))

    def step(self) -> int:
        """One more token for every row; returns how many. Raises what the forward pass raises.

        A row whose own rules fail ends with an error; the others do not notice.
        """
        for row in self.rows:
            row.begin()
        step = self._forward()
        arrays = [step.chosen.tokens, step.chosen.keys, step.scores, step.readings]
        mx.eval(arrays, [entry.state for entry in self.cache])
        tokens = _list(step.chosen.tokens)
        for index, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            row.note_last()
            row.choice.key = step.chosen.keys[index]
            try:
                if index in step.chosen.failed:
                    raise step.chosen.failed[index]
                row.take(token, _measured(step, index))
            except Exception as error:
                row.fail(f"The next token could not be chosen: {error}")
        return len(tokens)

    def _forward(self) -> _Step:
        jobs = [row.generation.job for row in self.rows]
        places = frozenset((probe.layer, probe.site) for job in jobs for probe in job.probes)
        last = mx.array([[row.tokens[-1]] for row in self.rows])
        logits, states = self.model.steered.read(last, self.cache, places)
        logits = logits[:, -1].astype(mx.float32)
        choices = [row.choice for row in self.rows]
        chosen = choose(logits, choices, [row.tokens for row in self.rows])
        step = _Step(chosen, {}, {})
        for index, job in enumerate(jobs):
            if job.logprobs is not None:
                token = chosen.tokens[index : index + 1]
                step.scores[index] = log_probabilities(logits[index], token, job.logprobs)
            if job.probes:
                read = [p.read(states[p.layer, p.site][index, -1]) for p in job.probes]
                step.readings[index] = mx.stack(read)
        return step


def _measured(step: _Step, index: int) -> Measured:
    readings = tuple(_list(step.readings[index])) if index in step.readings else ()
    if index not in step.scores:
        return Measured(readings=readings)
    logprob, likeliest, scores = step.scores[index]
    top = tuple(zip(_list(likeliest), _list(scores), strict=True))
    return Measured(_list(logprob)[0], top, readings)


def _list(x: mx.array) -> list[Any]:
    return cast(list[Any], x.tolist())
