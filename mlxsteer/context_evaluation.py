"""Measures how much of a document's effect its vector recovers: runs the arms.

Effect means the next-token distributions over the answers given with the document, and which
questions get their right answer. Judging is `context_verdict`'s. Answers are kept, as `evaluate`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsteer import context_verdict, statistics
from mlxsteer.answers import AnswerStore, Kept, model_store
from mlxsteer.context_extract import KIND, context_tokens, prompt_pairs
from mlxsteer.context_verdict import Recovered
from mlxsteer.contextset import ContextSet
from mlxsteer.controls import random_like
from mlxsteer.divergence import kl_from_context
from mlxsteer.errors import UsageError
from mlxsteer.generation import Sampling
from mlxsteer.plan import Plan
from mlxsteer.progress import progress
from mlxsteer.statistics import Interval
from mlxsteer.trials import Answering, Request
from mlxsteer.vector import SteeringVector
from mlxsteer.verdict import Check

if TYPE_CHECKING:
    from mlxsteer.model import Model

STRENGTHS = (1.0, 2.0, 3.0, 4.0, 5.0)


@dataclass(frozen=True)
class Options:
    """strengths: measured. strength: judged at; None = the one with the least KL on the questions
    that were extracted from. random: directions that mean nothing, at the judged strength.
    """

    strengths: tuple[float, ...] = STRENGTHS
    strength: float | None = None
    random: int = 20
    max_tokens: int = 48

    def __post_init__(self) -> None:
        if not self.strengths or not all(np.isfinite(self.strengths)):
            raise UsageError("An evaluation needs at least one strength, such as 1, 3, 5.")
        if self.random < 0 or self.max_tokens < 1:
            raise UsageError("Random directions: 0 (none) or more; answers: at least 1 token.")


@dataclass(frozen=True)
class ContextEvaluation:
    """What was found. rows: document, plain and every strength, on held-out questions.

    training: the share recovered on the questions that were extracted from. random_shares: of
    each random direction. vector_bytes: of its directions; document_bytes: of its text.
    """

    name: str
    strength: float
    recovered: Recovered
    training: Interval
    rows: tuple[dict[str, Any], ...]
    random_shares: tuple[float, ...]
    n_questions: int
    n_answerable: int
    context_tokens: int
    document_bytes: int
    vector_bytes: int
    options: Options

    @property
    def checks(self) -> list[Check]:
        return context_verdict.checks(self.recovered)

    @property
    def sentence(self) -> str:
        return context_verdict.sentence(self.recovered)

    @property
    def cost(self) -> str:
        """What the document costs a request, and what the vector holds in its place."""
        return (
            f"The document takes {self.context_tokens:,} tokens of every request"
            f" ({self.document_bytes:,} bytes of text); the vector takes none, and"
            f" {self.vector_bytes:,} bytes once."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as stored under `eval` in a vector's file."""
        return {
            **asdict(self),
            "kind": KIND,
            "verdict": context_verdict.verdict(self.checks),
            "sentence": self.sentence,
            "cost": self.cost,
            "checks": [asdict(check) for check in self.checks],
            "rows": list(self.rows),
            "random_shares": [round(share, 4) for share in self.random_shares],
        }


def evaluate_context(
    model: Model,
    vector: SteeringVector,
    context: ContextSet,
    *,
    show_progress: bool = True,
    store: AnswerStore | None = None,
    force: bool = False,
    **options: Any,
) -> ContextEvaluation:
    """How much of the effect of `context`'s document `vector` recovers on `model`.

    Costs an answer a question with the document, held-out ones also without it and at every
    strength. force: also a vector of another architecture. Raises UsageError when the vector is
    not of this document and these questions.
    """
    _check_same(vector, context)
    kept = store if store is not None else model_store(model)
    chosen = Options(**options)
    sampling = Sampling(max_tokens=chosen.max_tokens)
    answers = Answering(model, sampling, vector.name, kept, show_progress)
    return _Run(model, vector, context, chosen, answers, force).evaluation()


def with_evaluation(vector: SteeringVector, found: ContextEvaluation) -> SteeringVector:
    """`vector` with the evaluation in its file."""
    return replace(vector, about={**vector.about, "eval": found.to_dict()})


def recovered_share(steered: np.ndarray, plain: np.ndarray) -> Interval:
    """1 − mean(steered) / mean(plain) of KLs [questions], with its interval, paired by question.

    Where the document changes nothing, nothing can be recovered: UsageError.
    """
    if not plain.any():
        raise UsageError("The document changes no answer, so there is no effect to recover.")
    left = statistics.ratio_interval(steered, plain)
    return Interval(1 - left.mean, 1 - left.high, 1 - left.low)


def _check_same(vector: SteeringVector, context: ContextSet) -> None:
    about = vector.about
    if about.get("kind") != KIND:
        raise UsageError(
            f"{vector.name!r} was not made from a document. Type: mlxsteer evaluate {vector.name}"
        )
    for key, what in (("document_sha256", "document"), ("questions_sha256", "list of questions")):
        if about.get(key) != getattr(context, key):
            raise UsageError(
                f"This is not the {what} that {vector.name!r} was made from. Give that one, or"
                " extract again with this one."
            )


@dataclass(frozen=True)
class _Run:
    """One evaluation under way."""

    model: Model
    vector: SteeringVector
    context: ContextSet
    options: Options
    answers: Answering
    force: bool = False

    def evaluation(self) -> ContextEvaluation:
        doses = [self._plan(s) for s in self.strengths]
        seen = self._distances(self.context.training, [Plan([]), *doses], "seen questions")
        at = self._judged(seen[:, 1:])
        randoms = [
            self._plan(self.strengths[at], random_like(self.vector, seed))
            for seed in range(self.options.random)
        ]
        plans = [Plan([]), *doses, *randoms]
        kls = self._distances(self.held_out, plans, "held-out questions")
        right = self._right(doses)
        chance = [recovered_share(kl, kls[:, 0]).mean for kl in kls[:, 1 + len(doses) :].T]
        return ContextEvaluation(
            name=self.vector.name,
            strength=self.strengths[at],
            recovered=self._recovered(kls, at, chance, right),
            training=recovered_share(seen[:, 1 + at], seen[:, 0]),
            rows=tuple(self._rows(kls, right)),
            random_shares=tuple(chance),
            n_questions=len(self.held_out),
            n_answerable=self._n_answerable,
            context_tokens=context_tokens(self.prompts),
            document_bytes=len(self.context.document.encode()),
            vector_bytes=sum(array.nbytes for array in self.vector.directions.values()),
            options=self.options,
        )

    # --- arms ----------------------------------------------------------------------------

    @property
    def held_out(self) -> tuple[int, ...]:
        return self.context.held_out

    @cached_property
    def strengths(self) -> list[float]:
        own = self.options.strength
        return sorted({*self.options.strengths, *(() if own is None else (own,))})

    @cached_property
    def prompts(self) -> list[tuple[list[int], list[int]]]:
        """(with the document, without it), of every question."""
        return prompt_pairs(self.model, self.context, range(len(self.context.questions)))

    @cached_property
    def given(self) -> list[Kept]:
        """The answer to every question with the document in the prompt."""
        requests = [Request(full, Plan([])) for full, _ in self.prompts]
        return self.answers(requests, "document", scored=False)

    def _plan(self, strength: float, vector: SteeringVector | None = None) -> Plan:
        return self.model.plan((vector or self.vector, strength), force=self.force)

    def _distances(self, indices: Sequence[int], plans: Sequence[Plan], label: str) -> np.ndarray:
        """[questions, plans]: mean KL per token of the answer given with the document, nats."""
        distinct = list({plan.key: plan for plan in plans}.values())
        column = {plan.key: index for index, plan in enumerate(distinct)}
        end = sorted(self.model.tokenizer.eos_token_ids)[0]
        given = self.given
        found = []
        shown, title = self.answers.show_progress, f"{self.vector.name}: {label}"
        with progress(title, len(indices), enabled=shown) as advance:
            for index in indices:
                answer = given[index].tokens or (end,)
                kls = kl_from_context(self.model, *self.prompts[index], answer, distinct)
                found.append(kls.mean(axis=1))
                advance(1)
        return np.array(found)[:, [column[plan.key] for plan in plans]].astype(np.float64)

    def _judged(self, seen: np.ndarray) -> int:
        """Which strength is judged: chosen on questions that the judgement leaves out."""
        if self.options.strength is not None:
            return self.strengths.index(self.options.strength)
        return int(seen.mean(axis=0).argmin())

    # --- figures -------------------------------------------------------------------------

    @property
    def _n_answerable(self) -> int:
        return sum(self.context.questions[index].answerable for index in self.held_out)

    def _right(self, doses: Sequence[Plan]) -> np.ndarray | None:
        """bool [with, without, strengths…; answerable held-out questions]: answered right."""
        asked = [i for i in self.held_out if self.context.questions[i].answerable]
        if not asked:
            return None
        requests = [Request(self.prompts[i][1], plan) for plan in (Plan([]), *doses) for i in asked]
        texts = [self.given[i].text for i in asked]
        texts += [kept.text for kept in self.answers(requests, "answers", scored=False)]
        rows = [texts[start : start + len(asked)] for start in range(0, len(texts), len(asked))]
        return np.array(
            [
                [self.context.questions[i].answered_by(t) for i, t in zip(asked, row, strict=True)]
                for row in rows
            ]
        )

    def _recovered(
        self, kls: np.ndarray, at: int, chance: Sequence[float], right: np.ndarray | None
    ) -> Recovered:
        share = recovered_share(kls[:, 1 + at], kls[:, 0])
        only = right[0] & ~right[1] if right is not None else None
        return Recovered(
            share=share,
            percentile=statistics.share_below(share.mean, chance) if chance else None,
            n_random=len(chance),
            gained=int(only.sum()) if only is not None else None,
            regained=int((right[2 + at] & only).sum())
            if right is not None and only is not None
            else None,
        )

    def _rows(self, kls: np.ndarray, right: np.ndarray | None) -> list[dict[str, Any]]:
        names = ["document", "0", *(f"{strength:+g}" for strength in self.strengths)]
        columns = [np.zeros(len(kls)), *kls.T[: len(names) - 1]]
        rows = []
        for index, (name, kl) in enumerate(zip(names, columns, strict=True)):
            share = recovered_share(kl, kls[:, 0])
            rows.append(
                {
                    "amount": name,
                    "kl": round(float(kl.mean()), 4),
                    "share": [round(x, 4) for x in (share.mean, share.low, share.high)],
                    "right": int(right[index].sum()) if right is not None else None,
                }
            )
        return rows
