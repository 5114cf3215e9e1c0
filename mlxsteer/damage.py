"""What steering costs off target: how likely plain text stays, and which facts the model keeps.

Reads `prompts/_neutral.yaml` and `prompts/_cloze.yaml`. Texts run bare, without a chat template,
so a base model can be measured too. Judges nothing: `verdict` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxsteer.contrastfile import bundled
from mlxsteer.models.hooks import Run
from mlxsteer.plan import Plan
from mlxsteer.rows import RowCache

if TYPE_CHECKING:
    from mlxsteer.model import Model

MAX_ELEMENTS = 1 << 27  # float32 logits held at a time: 512 MiB

Fact = Sequence[str]  # what is said first, the right ending, wrong endings
Passage = tuple[list[int], int]  # tokens, and the first of them that is scored


def neutral_texts() -> tuple[str, ...]:
    """Short paragraphs of several domains, in no particular style."""
    return tuple(bundled("_neutral")["texts"])


def cloze_facts() -> tuple[Fact, ...]:
    """Well-known facts: (stem, right ending, three wrong endings), chance is 1/4."""
    return tuple(tuple(fact) for fact in bundled("_cloze")["facts"])


def neutral_log_likelihood(
    model: Model, plan: Plan, *, texts: Sequence[str] | None = None, positions: str | None = "all"
) -> float:
    """Mean log p of the tokens of `texts` (default: ours) under `plan`, in nats per token.

    positions: steered in place of the plan's own, because a text without a question has no
    answer; None keeps the plan's, the text being an answer to its own first token. Conditions
    and schedules count as always on.
    """
    passages = [(list(model.tokenizer.encode(text)), 1) for text in texts or neutral_texts()]
    scores = _scores(model, _moved(plan, positions), passages)
    return float(np.concatenate(scores).mean())


def cloze_accuracy(
    model: Model, plan: Plan, *, facts: Sequence[Fact] | None = None, positions: str | None = "all"
) -> float:
    """Share of `facts` (default: ours) whose right ending is likelier than all wrong ones, 0..1.

    An ending's likelihood is the sum over its tokens. positions: as above.
    """
    facts = facts or cloze_facts()
    passages = [_ending(model, stem, ending) for stem, *endings in facts for ending in endings]
    sums = iter([float(score.sum()) for score in _scores(model, _moved(plan, positions), passages)])
    found = [[next(sums) for _ in fact[1:]] for fact in facts]
    return float(np.mean([right > max(wrong) for right, *wrong in found]))


def _moved(plan: Plan, positions: str | None) -> Plan:
    """`plan` on other positions, with no condition or schedule: what it does when it acts."""
    return Plan(
        [replace(term, positions=positions or term.positions, timing=None) for term in plan.terms]
    )


def _ending(model: Model, stem: str, ending: str) -> Passage:
    """Both as one text, so that no tokenizer adds a space where they meet."""
    alone, whole = (list(model.tokenizer.encode(text)) for text in (stem, stem + ending))
    shared = next(
        (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone)
    )
    return whole, shared


def _scores(model: Model, plan: Plan, passages: Sequence[Passage]) -> list[np.ndarray]:
    """Per passage, float32 [scored tokens]: log p of each under `plan`."""
    scores: list[np.ndarray] = []
    batch: list[Passage] = []
    for passage in passages:
        longest = max(len(tokens) for tokens, _ in [*batch, passage])
        if batch and (len(batch) + 1) * longest * model.vocabulary > MAX_ELEMENTS:
            scores += _score(model, plan, batch)
            batch = []
        batch.append(passage)
    return scores + _score(model, plan, batch)


def _score(model: Model, plan: Plan, batch: Sequence[Passage]) -> list[np.ndarray]:
    """One forward pass; endings of one token share their stem's row.

    Rows are padded on the right, which no scored token sees.
    """
    inputs = list(dict.fromkeys(tuple(tokens[:-1]) for tokens, _ in batch))
    longest = max(map(len, inputs))
    padded = mx.array([[*row, *[0] * (longest - len(row))] for row in inputs])
    rows = RowCache([model.row(plan, 1) for _ in inputs])
    edits = model.steered.stacker.edits(rows.plans, rows.take(padded))
    with model.hooks.forward(Run(edits=edits) if edits else None):
        logits = model.network(padded)  # [B, T, V]
    row_of = {row: index for index, row in enumerate(inputs)}
    scores = []
    for tokens, start in batch:
        found = logits[row_of[tuple(tokens[:-1])], start - 1 : len(tokens) - 1].astype(mx.float32)
        chosen = mx.take_along_axis(found, mx.array(tokens[start:])[:, None], axis=-1)[:, 0]
        scores.append(chosen - mx.logsumexp(found, axis=-1))
    mx.eval(scores)
    return [np.array(score) for score in scores]
