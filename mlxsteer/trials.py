"""The same questions under many steerings, side by side: answers, their metric, their coherence.

One batch holds every question under every steering, because a batch of a hundred rows costs
little more than one. Judges nothing: `calibrate`, `sweep` and `verdict` do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsteer import metrics
from mlxsteer.answers import AnswerStore, Kept, key_of
from mlxsteer.contrast import Metric
from mlxsteer.generation import MAX_BATCH_ROWS, Sampling, generate_batch
from mlxsteer.measure import log_likelihoods
from mlxsteer.plan import Plan
from mlxsteer.progress import progress
from mlxsteer.statistics import mean_known

if TYPE_CHECKING:
    from mlxsteer.model import Model

CONTEXT = 120  # tokens of an answer, unless said otherwise


@dataclass(frozen=True)
class Arm:
    """One steering over all questions.

    amount: what was asked (a dose or a strength). metric: mean over answers. words: mean.
    ended: share that ended by themselves. distinct2: mean distinct bigram share. perplexity:
    geometric mean over answers, under the unsteered model. per_answer: the metric of each.
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


@dataclass(frozen=True)
class Request:
    """A prompt under a plan; `notes` go into the store's line."""

    prompt: Sequence[int]
    plan: Plan
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answering:
    """How the answers of one measurement are got: all alike, and kept in one store.

    name: of what is measured, for the lines of progress.
    """

    model: Model
    sampling: Sampling
    name: str
    store: AnswerStore | None
    show_progress: bool

    def __call__(
        self, requests: Sequence[Request], label: str, *, scored: bool = True
    ) -> list[Kept]:
        """As `answer`."""
        return answer(
            self.model,
            requests,
            self.sampling,
            label=f"{self.name}: {label}",
            show_progress=self.show_progress,
            store=self.store,
            scored=scored,
        )


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
    store: AnswerStore | None = None,
) -> list[Arm]:
    """One Arm per (amount, plan), over all questions; greedy unless `sampling` says otherwise.

    store: answers that it holds are not written again, new ones go into it.
    """
    prompts = [model.render(question) for question in questions]
    requests = [
        Request(prompt, plan, {"question": question, "amount": amount, "steer": str(plan)})
        for amount, plan in steerings
        for question, prompt in zip(questions, prompts, strict=True)
    ]
    sampling = sampling or Sampling(max_tokens=max_tokens)
    found = answer(model, requests, sampling, label=label, show_progress=show_progress, store=store)
    return [
        arm_of(amount, found[index * len(prompts) : (index + 1) * len(prompts)], metric)
        for index, (amount, _) in enumerate(steerings)
    ]


def answer(
    model: Model,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    label: str = "Answering",
    show_progress: bool = True,
    store: AnswerStore | None = None,
    scored: bool = True,
) -> list[Kept]:
    """The answer to each request, from the store or newly written, in batches.

    scored: with their loss under the unsteered model, which costs another pass over each.
    """
    keys = [key_of(model, request.prompt, request.plan, sampling) for request in requests]
    found: dict[str, Kept] = {}
    for key in keys:
        kept = store.get(key) if store is not None else None
        if kept is not None and (kept.loss is not None or not scored):
            found[key] = kept
    wanted = dict(zip(keys, requests, strict=True))
    missing = [key for key in wanted if key not in found]
    with progress(label, len(missing), enabled=show_progress) as advance:
        for start in range(0, len(missing), MAX_BATCH_ROWS):
            part = missing[start : start + MAX_BATCH_ROWS]
            asked = [wanted[key] for key in part]
            new = _written(model, part, asked, sampling, scored, advance)
            if store is not None:
                store.add(new)
            for kept in new:
                found[kept.key] = kept
    return [found[key] for key in keys]


def _written(
    model: Model,
    keys: Sequence[str],
    requests: Sequence[Request],
    sampling: Sampling,
    scored: bool,
    advance: Callable[[int], None],
) -> list[Kept]:
    """New answers. With a seed, each batch draws its own numbers, decided by what it holds."""
    if sampling.seed is not None:
        batch_seed = (sampling.seed + zlib.crc32("".join(keys).encode())) % 2**32
        sampling = replace(sampling, seed=batch_seed)
    prompts = [request.prompt for request in requests]
    plans = [request.plan for request in requests]
    answers = generate_batch(model, prompts, plans, sampling, on_tokens=advance)
    losses: list[float | None] = [None] * len(answers)
    if scored:
        scores = log_likelihoods(model, prompts, [one.tokens for one in answers])
        losses = [-float(score.mean()) if len(score) else float("nan") for score in scores]
    return [
        Kept(key, one.text, tuple(one.tokens), one.ended, loss, request.notes)
        for key, request, one, loss in zip(keys, requests, answers, losses, strict=True)
    ]


def arm_of(amount: float, answers: Sequence[Kept], metric: Metric) -> Arm:
    """The figures of one steering's answers."""
    texts = [answer.text for answer in answers]
    values = metrics.measure(metric, texts, [answer.ended for answer in answers])
    losses = [a.loss for a in answers if a.loss is not None and np.isfinite(a.loss)]
    return Arm(
        amount=amount,
        metric=mean_known(values),
        words=float(np.mean([len(metrics.words(text)) for text in texts])),
        ended=float(np.mean([answer.ended for answer in answers])),
        distinct2=metrics.distinct(texts, 2),
        perplexity=float(np.exp(np.mean(losses))) if losses else float("inf"),
        answers=tuple(texts),
        per_answer=tuple(float(value) for value in values),
    )
