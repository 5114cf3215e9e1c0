"""The same questions under many steerings, side by side: answers, their metric, their coherence.

One batch holds every question under every steering, because a batch of a hundred rows costs
little more than one. Judges nothing: `calibrate` and the dose tables do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlxsteer import metrics
from mlxsteer.contrast import Metric
from mlxsteer.generation import Answer, Sampling, generate_batch
from mlxsteer.measure import log_likelihoods
from mlxsteer.plan import Plan
from mlxsteer.progress import progress

if TYPE_CHECKING:
    from mlxsteer.model import Model

CONTEXT = 120  # tokens of an answer, unless said otherwise


@dataclass(frozen=True)
class Arm:
    """One steering over all questions.

    amount: what was asked (a dose or a strength). metric: mean over answers. words: mean.
    ended: share that ended by themselves. distinct2: mean distinct bigram share. perplexity:
    geometric mean over answers, under the unsteered model.
    """

    amount: float
    metric: float
    words: float
    ended: float
    distinct2: float
    perplexity: float
    answers: tuple[str, ...] = ()
    per_answer: tuple[float, ...] = ()

    def row(self) -> dict[str, float | None]:
        """The numbers alone, rounded, for a table or a file; None for what no answer gave."""
        facts = asdict(self)
        del facts["answers"], facts["per_answer"]
        return {
            key: round(float(value), 4) if np.isfinite(value) else None
            for key, value in facts.items()
        }


def run(
    model: Model,
    questions: Sequence[str],
    steerings: Sequence[tuple[float, Plan]],
    metric: Metric,
    *,
    max_tokens: int = CONTEXT,
    label: str = "Answering",
    show_progress: bool = True,
    sampling: Sampling | None = None,
) -> list[Arm]:
    """One Arm per (amount, plan), over all questions; greedy unless `sampling` says otherwise."""
    prompts = [model.render(question) for question in questions]
    rows = [(prompt, plan) for _, plan in steerings for prompt in prompts]
    with progress(label, len(rows), enabled=show_progress) as advance:
        answers = generate_batch(
            model,
            [prompt for prompt, _ in rows],
            [plan for _, plan in rows],
            sampling or Sampling(max_tokens=max_tokens),
            on_tokens=advance,
        )
    scores = log_likelihoods(model, [prompt for prompt, _ in rows], [a.tokens for a in answers])
    arms = []
    for index, (amount, _) in enumerate(steerings):
        part = slice(index * len(prompts), (index + 1) * len(prompts))
        arms.append(_arm(amount, answers[part], scores[part], metric))
    return arms


def _arm(
    amount: float, answers: Sequence[Answer], scores: Sequence[np.ndarray], metric: Metric
) -> Arm:
    texts = [answer.text for answer in answers]
    values = metrics.measure(metric, texts)
    losses = [-float(score.mean()) for score in scores if len(score)]
    return Arm(
        amount=amount,
        metric=float(np.nanmean(values)) if np.isfinite(values).any() else float("nan"),
        words=float(np.mean([len(metrics.words(text)) for text in texts])),
        ended=float(np.mean([answer.ended for answer in answers])),
        distinct2=metrics.distinct(texts, 2),
        perplexity=float(np.exp(np.mean(losses))) if losses else float("inf"),
        answers=tuple(texts),
        per_answer=tuple(float(value) for value in values),
    )
