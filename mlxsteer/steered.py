"""A model that mlx-lm's own generators can call, each row of its batch under its own steering.

Looks like an mlx-lm model (`layers`, `make_cache`, `__call__`); the last entry of its cache list
says who the rows are. Holds no weights and changes none.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxsteer.edits import Stacker
from mlxsteer.models.hooks import Hooks, Place, Run
from mlxsteer.rows import Readings, Row, RowCache


class SteeredModel:
    """Calls `hooks.model` with the edits that the rows of the cache ask for."""

    def __init__(self, hooks: Hooks):
        self.hooks = hooks
        self.stacker = Stacker()

    @property
    def layers(self) -> list[nn.Module]:
        return self.hooks.layers

    def new_cache(self, row: Row) -> list[Any]:
        """An empty cache for one sequence."""
        return [*make_prompt_cache(self.hooks.model), RowCache([row])]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits [B, T, V] of `tokens` [B, T]; the last entry of `cache` is the RowCache."""
        return self.read(tokens, cache, frozenset())[0]

    def read(
        self, tokens: mx.array, cache: list[Any], places: frozenset[Place]
    ) -> tuple[mx.array, dict[Place, mx.array]]:
        """(logits [B, T, V], {place: float32 states [B, T, D], after its edits}).

        Rows with conditions run their generated tokens one by one, since each decides how the
        next is steered.
        """
        pieces = cache[-1].pieces(tokens.shape[1])
        if len(pieces) == 1:
            return self._pass(tokens, cache, places)
        starts = [0, *accumulate(pieces)]
        passes = [self._pass(tokens[:, a:b], cache, places) for a, b in pairwise(starts)]
        logits = mx.concatenate([logits for logits, _ in passes], axis=1)
        states = {
            place: mx.concatenate([captured[place] for _, captured in passes], axis=1)
            for place in places
        }
        return logits, states

    def _pass(
        self, tokens: mx.array, cache: list[Any], places: frozenset[Place]
    ) -> tuple[mx.array, dict[Place, mx.array]]:
        *layer_caches, rows = cache
        plans = rows.plans  # once: a slider may move meanwhile
        weights = rows.weights(tokens.shape[1], plans)
        phases = rows.take(tokens)
        probes = rows.probes(phases)
        read = frozenset((probe.layer, probe.site) for probe in probes.values())
        run = Run(self.stacker.edits(plans, phases, weights), places | read)
        with self.hooks.forward(run if run.edits or run.capture else None):
            logits = self.hooks.model(tokens, cache=layer_caches)
        if probes:
            states = {place: run.captured[place][:, -1] for place in read}
            readings = [probe.read(states[probe.layer, probe.site]) for probe in probes.values()]
            rows.note(phases, Readings(list(probes), mx.stack(readings)))
        return logits, run.captured
