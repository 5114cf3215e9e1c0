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
    if not any(answer for _, answer in batch):
        return [np.zeros(0, np.float32) for _ in batch]
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    padded = mx.array([p + a + [0] * (longest - len(p) - len(a)) for p, a in batch])[:, :-1]
    start = min(len(prompt) for prompt, _ in batch) - 1
    rows = RowCache([model.row(plan, len(p), first_phase(model, p)) for p, _ in batch])
    steered = _steered(model, rows, padded, start)
    plain = _log_probabilities(model, padded, start)
    distance = np.array((mx.exp(steered) * (steered - plain)).sum(axis=-1))
    return [
        np.maximum(distance[i, len(p) - 1 - start : len(p) + len(a) - 1 - start], 0)
        for i, (p, a) in enumerate(batch)
    ]


def kl_from_context(
    model: Model,
    context_prompt: Sequence[int],
    prompt: Sequence[int],
    answer: Sequence[int],
    plans: Sequence[Plan],
) -> np.ndarray:
    """float32 [plans, len(answer)]: KL(p ‖ q) in nats where each token of `answer` is chosen.

    p: after `context_prompt`, unsteered. q: after `prompt`, under each plan. Raises UsageError
    for a plan with conditions.
    """
    if any(plan.gates for plan in plans):
        raise UsageError("A term with @when is steered token by token; its KL is not measured.")
    whole = mx.array([[*context_prompt, *answer]])[:, :-1]
    context = _log_probabilities(model, whole, len(context_prompt) - 1)
    tokens = mx.array([[*prompt, *answer]])[:, :-1]
    at_a_time = max(1, MAX_ELEMENTS // (tokens.shape[1] * model.vocabulary))
    found = []
    for start in range(0, len(plans), at_a_time):
        part = plans[start : start + at_a_time]
        phase = first_phase(model, prompt)
        rows = RowCache([model.row(plan, len(prompt), phase) for plan in part])
        steered = _steered(model, rows, mx.repeat(tokens, len(part), axis=0), len(prompt) - 1)
        found.append(np.array((mx.exp(context) * (context - steered)).sum(axis=-1)))
    return np.maximum(np.concatenate(found), 0)


def _steered(model: Model, rows: RowCache, tokens: mx.array, start: int) -> mx.array:
    weights = rows.weights(tokens.shape[1], rows.plans)
    edits = model.steered.stacker.edits(rows.plans, rows.take(tokens), weights)
    with model.hooks.forward(Run(edits=edits)):
        return _log_probabilities(model, tokens, start)


def _log_probabilities(model: Model, tokens: mx.array, start: int) -> mx.array:
    logits = model.network(tokens)[:, start:].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
