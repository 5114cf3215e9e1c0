"""A vector's answers over a grid: doses of both signs, and layers, sites, ops or methods.

Held-out questions, all doses of a question in one batch. Shows what happens; `evaluate` judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsteer import trials
from mlxsteer.answers import AnswerStore, Kept
from mlxsteer.calibrate import Guard
from mlxsteer.contrast import ContrastSet
from mlxsteer.controls import random_like
from mlxsteer.errors import UsageError
from mlxsteer.evaluate import questions_of, set_of
from mlxsteer.generation import Sampling
from mlxsteer.plan import Plan
from mlxsteer.statistics import Interval, mean_interval
from mlxsteer.trials import Answering, Arm, Request
from mlxsteer.variants import Variant, variants
from mlxsteer.vector import SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import Model


@dataclass(frozen=True)
class Options:
    """What is tried. amounts: in the variants' unit, in place of the usual ones. width: layers
    of a band. random: directions that mean nothing, each on the first `random_questions`.
    """

    over: str = "strength"
    amounts: tuple[float, ...] = ()
    questions: int = 12
    max_tokens: int = 80
    temp: float = 0.0
    seed: int | None = None
    width: int | None = None
    random: int = 4
    random_questions: int = 6

    def __post_init__(self) -> None:
        if self.questions < 1 or self.max_tokens < 1 or self.random < 0:
            raise UsageError("A sweep needs at least 1 question and 1 token an answer.")
        if not np.isfinite(self.amounts).all():
            raise UsageError("Amounts must be finite numbers, e.g. -3,1,3.")
        if self.amounts and not any(self.amounts):
            raise UsageError("Amount 0 is the unsteered model. Give others, e.g. -3,1,3.")
        if self.width is not None and self.over != "layers":
            raise UsageError("A width is one of bands of layers: add --over layers, or leave it.")


@dataclass(frozen=True)
class Cell:
    """One variant at one amount. effect: of the metric on the name's side, paired by question."""

    variant: str
    amount: float
    unit: str
    arm: Arm
    mean: Interval
    effect: Interval
    coherent: bool


@dataclass(frozen=True)
class Sweep:
    """All that was found. `band`: (amount, least, mean, largest) of the random directions'
    metric; `plain` and `asking`: the unsteered answers, and those to the instruction in words.
    """

    name: str
    over: str
    metric: str
    direction: str
    questions: tuple[str, ...]
    cells: tuple[Cell, ...]
    plain: Arm
    asking: Arm | None
    band: tuple[tuple[float, float, float, float], ...]
    vectors: dict[str, SteeringVector]
    guard: Guard

    @property
    def best(self) -> Cell | None:
        """The coherent cell of positive amount with the largest effect that is not chance."""
        found = [c for c in self.cells if c.coherent and c.amount > 0 and c.effect.low > 0]
        return max(found, key=lambda cell: cell.effect.mean, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: everything but answers and vectors."""
        return {
            "name": self.name,
            "over": self.over,
            "metric": self.metric,
            "direction": self.direction,
            "n_questions": len(self.questions),
            "unsteered": self.plain.row(),
            "asking": self.asking.row() if self.asking else None,
            "random": [list(point) for point in self.band],
            "cells": [
                {
                    "variant": cell.variant,
                    **cell.arm.row(),
                    "unit": cell.unit,
                    "interval": [cell.mean.low, cell.mean.high],
                    "effect": asdict(cell.effect),
                    "coherent": cell.coherent,
                }
                for cell in self.cells
            ],
        }


def sweep(
    model: Model,
    vector: SteeringVector,
    *,
    contrast: ContrastSet | None = None,
    store: AnswerStore | None = None,
    guard: Guard | None = None,
    show_progress: bool = True,
    force: bool = False,
    **options: Any,
) -> Sweep:
    """The grid of `vector`; `options` are the fields of `Options`.

    contrast: whose metric, questions and instruction are used (default: the vector's own set).
    store: where answers are kept, so that an interrupted sweep goes on. force: also a vector of
    another architecture.
    """
    chosen = Options(**options)
    contrast = contrast or set_of(vector)
    found = variants(
        model,
        vector,
        contrast,
        chosen.over,
        width=chosen.width,
        show_progress=show_progress,
    )
    if chosen.amounts:
        found = [replace(variant, amounts=chosen.amounts) for variant in found]
    sampling = Sampling(max_tokens=chosen.max_tokens, temp=chosen.temp, seed=chosen.seed)
    answers = Answering(model, sampling, f"Sweeping {vector.name}", store, show_progress)
    return _Run(model, contrast, chosen, guard or Guard(), answers, force).sweep(vector, found)


@dataclass(frozen=True)
class _Run:
    """One sweep under way."""

    model: Model
    contrast: ContrastSet
    options: Options
    guard: Guard
    answers: Answering
    force: bool = False

    def sweep(self, vector: SteeringVector, found: Sequence[Variant]) -> Sweep:
        questions = questions_of(self.contrast, self.options.questions)
        prompts = [self.model.render(question) for question in questions]
        grid = self._grid(found)
        requests = [
            Request(prompt, plan, {"variant": name, "amount": amount, "question": question})
            for name, amount, _, plan in [("unsteered", 0.0, "", Plan([])), *grid]
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        answers = self.answers(requests, "doses")
        plain, *steered = _groups(answers, len(prompts))
        return Sweep(
            name=vector.name,
            over=self.options.over,
            metric=self.contrast.metric.label or self.contrast.metric.name,
            direction=self.contrast.metric.direction,
            questions=questions,
            cells=tuple(
                self._cell(name, amount, unit, group, plain)
                for (name, amount, unit, _), group in zip(grid, steered, strict=True)
            ),
            plain=self._arm(0.0, plain),
            asking=self._asking(questions),
            band=tuple(self._band(found, prompts)) if self.options.over == "strength" else (),
            vectors={variant.name: variant.vector for variant in found},
            guard=self.guard,
        )

    def _grid(self, found: Sequence[Variant]) -> list[tuple[str, float, str, Plan]]:
        """(variant, amount, unit, plan), every plan checked before the first answer."""
        return [
            (one.name, amount, one.unit, self._plan(one.vector, f"{amount:g}{one.unit}"))
            for one in found
            for amount in one.amounts
            if amount
        ]

    def _plan(self, vector: SteeringVector, amount: float | str) -> Plan:
        return self.model.plan((vector, amount), force=self.force)

    def _arm(self, amount: float, answers: Sequence[Kept]) -> Arm:
        return trials.arm_of(amount, answers, self.contrast.metric)

    def _cell(
        self, name: str, amount: float, unit: str, group: Sequence[Kept], plain: Sequence[Kept]
    ) -> Cell:
        arm, unsteered = self._arm(amount, group), self._arm(0.0, plain)
        sign = 1.0 if self.contrast.metric.direction == "up" else -1.0
        effects = sign * (np.array(arm.per_answer) - np.array(unsteered.per_answer))
        return Cell(
            variant=name,
            amount=amount,
            unit=unit,
            arm=arm,
            mean=mean_interval(arm.per_answer),
            effect=mean_interval(effects),
            coherent=self.guard.holds(arm, unsteered),
        )

    def _asking(self, questions: Sequence[str]) -> Arm | None:
        asked = [self.contrast.asking(question, i) for i, question in enumerate(questions)]
        requests = [
            Request(self.model.render(messages), Plan([]), {"variant": "asking", "question": q})
            for q, messages in zip(questions, asked, strict=True)
            if messages is not None
        ]
        return self._arm(0.0, self.answers(requests, "asking")) if requests else None

    def _band(
        self, found: Sequence[Variant], prompts: Sequence[list[int]]
    ) -> list[tuple[float, float, float, float]]:
        """Metric of random directions at every amount."""
        if not self.options.random:
            return []
        [variant] = found
        few = prompts[: self.options.random_questions]
        amounts = [amount for amount in variant.amounts if amount]
        requests = []
        for amount in amounts:
            for seed in range(self.options.random):
                plan = self._plan(random_like(variant.vector, seed), amount)
                notes = {"variant": f"random-{seed}", "amount": amount}
                requests += [Request(prompt, plan, notes) for prompt in few]
        answers = self.answers(requests, "random directions", scored=False)
        means = [self._arm(0, group).metric for group in _groups(answers, len(few))]
        points = []
        for amount, group in zip(amounts, _groups(means, self.options.random), strict=True):
            if known := [mean for mean in group if np.isfinite(mean)]:
                points.append((amount, min(known), float(np.mean(known)), max(known)))
        return points


def _groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
