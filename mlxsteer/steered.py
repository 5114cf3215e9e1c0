"""A model that mlx-lm's own generators can call, each row of its batch under its own steering.

Looks like an mlx-lm model (`layers`, `make_cache`, `__call__`); the last entry of its cache list
says who the rows are. Holds no weights and changes none.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxsteer.edits import Stacker
from mlxsteer.models.hooks import Hooks, Place, Run
from mlxsteer.rows import Row, RowCache


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
        """(logits [B, T, V], {place: float32 states [B, T, D], after its edits})."""
        *layer_caches, rows = cache
        plans = rows.plans
        run = Run(edits=self.stacker.edits(plans, rows.take(tokens)), capture=places)
        with self.hooks.forward(run if run.edits or places else None):
            return self.hooks.model(tokens, cache=layer_caches), run.captured
