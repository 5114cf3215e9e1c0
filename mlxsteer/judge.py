"""A model's opinion of answers: which of two shows more of a trait.

Blind: a judge sees a question, a trait and texts, never which arm wrote them or what the vector
is called. The order of two answers is drawn by a seed, or both orders are asked; how often the
one shown first won is reported beside the result. `judgebackends` asks the models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlxsteer.errors import MlxsteerError, UsageError
from mlxsteer.statistics import mean_known


@dataclass(frozen=True)
class Comparison:
    """Two answers to a question, in the order shown."""

    question: str
    first: str
    second: str
    trait: str

    @property
    def prompt(self) -> str:
        return (
            f"Two answers to the same question are given below.\n\nQuestion: {self.question}\n\n"
            f"Answer A:\n{self.first}\n\nAnswer B:\n{self.second}\n\nTrait: {self.trait}\n\n"
            "Which answer shows more of the trait, be it the better answer or not?"
        )


class Judge(Protocol):
    """Who is asked. A reply that cannot be read is nan."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        """Per comparison -1..1: 1 when the first shows more of the trait, 0 for a tie."""


@dataclass(frozen=True)
class WinRate:
    """What a judge found over questions.

    preferences: per question -1..1, above 0 where A shows more; nan where no reply could be
    read. win_rate: share of the readable questions that A wins, a tie being half. position_bias:
    mean preference for the answer shown first, -1..1; near 0 is fair. unread: replies lost.
    """

    preferences: tuple[float, ...]
    win_rate: float
    position_bias: float
    unread: int


def win_rate(
    judge: Judge,
    questions: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    trait: str,
    seed: int = 0,
    *,
    both_orders: bool = True,
) -> WinRate:
    """How often A shows more of `trait` than B, question by question.

    both_orders: ask each twice, A first and B first, and take the mean; else once, in an order
    that `seed` draws. Two equal answers are a tie, and nobody is asked.
    Raises UsageError for lists of different lengths, MlxsteerError when nothing could be read.
    """
    if not len(questions) == len(answers_a) == len(answers_b) or not questions:
        raise UsageError(
            f"A judge needs one pair of answers for every question: {len(questions)} questions,"
            f" {len(answers_a)} and {len(answers_b)} answers."
        )
    asked = _asked(answers_a, answers_b, random.Random(seed), both_orders)
    shown = [(answers_b, answers_a) if flipped else (answers_a, answers_b) for _, flipped in asked]
    comparisons = [
        Comparison(questions[i], first[i], second[i], trait)
        for (i, _), (first, second) in zip(asked, shown, strict=True)
    ]
    replies = judge.compare(comparisons) if comparisons else []
    if replies and not np.isfinite(replies).any():
        raise MlxsteerError("The judge's replies name neither answer. Try another judge model.")
    found: list[list[float]] = [[] for _ in questions]
    for (i, flipped), reply in zip(asked, replies, strict=True):
        found[i].append(-reply if flipped else reply)
    same = [a == b for a, b in zip(answers_a, answers_b, strict=True)]
    preferences = [0.0 if tie else mean_known(found[i]) for i, tie in enumerate(same)]
    wins = [(np.sign(one) + 1) / 2 for one in preferences if np.isfinite(one)]
    return WinRate(
        preferences=tuple(preferences),
        win_rate=float(np.mean(wins)),
        position_bias=mean_known(replies) if replies else 0.0,
        unread=sum(not np.isfinite(reply) for reply in replies),
    )


def _asked(
    answers_a: Sequence[str], answers_b: Sequence[str], draw: random.Random, both_orders: bool
) -> list[tuple[int, bool]]:
    """(question, whether B is shown first) of everything that is asked, in a mixed order."""
    asked = []
    for i, (a, b) in enumerate(zip(answers_a, answers_b, strict=True)):
        if a != b:
            asked += [(i, flipped) for flipped in _orders(draw, both_orders)]
    draw.shuffle(asked)
    return asked


def _orders(draw: random.Random, both: bool) -> tuple[bool, ...]:
    return (False, True) if both else (draw.random() < 0.5,)
