"""How far steering moves the model's next-token distribution, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxsteer.errors import UsageError
from mlxsteer.models.hooks import Run
from mlxsteer.plan import Plan
from mlxsteer.prompting import first_phase
from mlxsteer.rows import RowCache

if TYPE_CHECKING:
    from mlxsteer.model import Model

MAX_ELEMENTS = 1 << 27  # float32 logits of one of the two passes held at a time: 512 MiB


def steered_kl(
    model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], plan: Plan
) -> list[np.ndarray]:
    """Per answer, float32 [len(answer)]: KL(steered ‖ unsteered) in nats where each token was
    chosen, given the same tokens before it. Raises UsageError for a plan with conditions.
    """
    if plan.gates:
        raise UsageError("A term with @when is steered token by token; its KL is not measured.")
    found: list[np.ndarray] = []
    batch: list[tuple[list[int], list[int]]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        row = (list(prompt), list(answer))
        longest = max(len(one) + len(two) for one, two in [*batch, row])
        if batch and (len(batch) + 1) * longest * model.vocabulary > MAX_ELEMENTS:
            found += _compared(model, batch, plan)
            batch = []
        batch.append(row)
    return found + (_compared(model, batch, plan) if batch else [])


def _compared(
    model: Model, batch: Sequence[tuple[list[int], list[int]]], plan: Plan
) -> list[np.ndarray]:
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    padded = mx.array([p + a + [0] * (longest - len(p) - len(a)) for p, a in batch])[:, :-1]
    start = min(len(prompt) for prompt, _ in batch) - 1
    rows = RowCache([model.row(plan, len(p), first_phase(model, p)) for p, _ in batch])
    weights = rows.weights(padded.shape[1], rows.plans)
    edits = model.steered.stacker.edits(rows.plans, rows.take(padded), weights)
    with model.hooks.forward(Run(edits=edits)):
        steered = _log_probabilities(model, padded, start)
    plain = _log_probabilities(model, padded, start)
    distance = np.array((mx.exp(steered) * (steered - plain)).sum(axis=-1))
    return [
        np.maximum(distance[i, len(p) - 1 - start : len(p) + len(a) - 1 - start], 0)
        for i, (p, a) in enumerate(batch)
    ]


def _log_probabilities(model: Model, tokens: mx.array, start: int) -> mx.array:
    logits = model.network(tokens)[:, start:].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
