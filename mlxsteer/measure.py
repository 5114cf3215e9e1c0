"""Readings of a model that is not steered: residual norms, and how likely it finds an answer.

Norms are measured once per model and kept in the cache folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxsteer.files import cache_dir, write_text
from mlxsteer.models.hooks import RESIDUAL, Run

if TYPE_CHECKING:
    from mlxsteer.model import Model

# Ordinary chats of several kinds; the median over their positions moves little with the choice.
NORM_PROMPTS = (
    "What is the capital of Australia, and why is it not Sydney?",
    "Explain how a refrigerator keeps food cold.",
    "Write a short message to a colleague who is ill.",
    "Give me a recipe for a simple tomato soup.",
    "def mean(values):\n    return sum(values) / len(values)\n\nWhat does this function do?",
    "My neighbour plays loud music at night. What should I do?",
    "Summarise the causes of the First World War.",
    "Which is healthier, running or swimming?",
)
MAX_SCORED_ELEMENTS = 1 << 28  # float32 logits held at a time: 1 GiB


def residual_norm(model: Model) -> np.ndarray:
    """float32 [n_layers]: median ‖residual‖ over `NORM_PROMPTS`, first position left out.

    The first position is left out because it is a sink: on the demo model its norm is 25,000
    where the median is 45 to 660.
    """
    path = cache_dir() / "norms" / f"{model.stamp['weights_fingerprint'][:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = np.array(json.loads(path.read_text())["residual_norm"], np.float32)
        if kept.shape == (model.n_layers,):
            return kept
    norms = _measure(model)
    with suppress(Exception):  # a cache that cannot be written costs time, nothing else
        write_text(path, json.dumps({"residual_norm": norms.tolist()}))
    return norms


def _measure(model: Model) -> np.ndarray:
    places = [(layer, RESIDUAL) for layer in range(model.n_layers)]
    readings: list[np.ndarray] = []
    for prompt in NORM_PROMPTS:
        run = Run(capture=frozenset(places))
        with model.hooks.forward(run):
            model.network(mx.array([_tokens(model, prompt)]))
        norms = mx.stack([mx.linalg.norm(run.captured[place][0, 1:], axis=-1) for place in places])
        readings.append(np.array(norms))
    return np.median(np.concatenate(readings, axis=1), axis=1).astype(np.float32)


def _tokens(model: Model, prompt: str) -> list[int]:
    if getattr(model.tokenizer, "has_chat_template", False):
        return model.render(prompt)
    return list(model.tokenizer.encode(prompt))


def log_likelihoods(
    model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Per answer, float32 [len(answer)]: log p(token) under the unsteered model.

    Rows are padded on the right, which a causal model never sees at the positions read.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    found: dict[int, np.ndarray] = {}
    batch: list[int] = []
    for index in order:
        if not answers[index]:
            found[index] = np.zeros(0, np.float32)
            continue
        longest = len(prompts[index]) + len(answers[index])
        if batch and (len(batch) + 1) * longest * model.vocabulary > MAX_SCORED_ELEMENTS:
            found |= _score(model, batch, prompts, answers)
            batch = []
        batch.append(index)
    if batch:
        found |= _score(model, batch, prompts, answers)
    return [found[index] for index in range(len(prompts))]


def perplexity(log_probabilities: np.ndarray) -> float:
    """exp of the mean negative log-likelihood; NaN for an empty answer."""
    return float(np.exp(-log_probabilities.mean())) if len(log_probabilities) else float("nan")


def _score(
    model: Model,
    batch: Sequence[int],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> dict[int, np.ndarray]:
    sequences = [[*prompts[i], *answers[i]] for i in batch]
    longest = max(map(len, sequences))
    padded = mx.array([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    start = min(len(prompts[index]) for index in batch) - 1  # no earlier row is asked for
    logits = model.network(padded[:, :-1])[:, start:].astype(mx.float32)
    chosen = mx.take_along_axis(logits, padded[:, start + 1 :, None], axis=-1)[..., 0]
    scores = np.array(chosen - mx.logsumexp(logits, axis=-1))
    return {
        index: scores[row, len(prompts[index]) - 1 - start : len(sequences[row]) - 1 - start]
        for row, index in enumerate(batch)
    }
