"""Finds a vector's limits δ±: the largest dose whose answers stay coherent, for each sign.

Coherent is judged on questions that were not trained on, against the unsteered answers to the
same questions. Costs a short answer a question for every dose up to the limit of
each sign, a few doses a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mlxsteer import trials
from mlxsteer.answers import model_store
from mlxsteer.contrast import ContrastSet, Metric, available
from mlxsteer.errors import UsageError, VectorError
from mlxsteer.grammar import Term
from mlxsteer.library import plain_name
from mlxsteer.plan import Plan, build
from mlxsteer.trials import Arm
from mlxsteer.vector import Calibration, SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import Model

DOSES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.3)
DOSES_AT_A_TIME = 4
QUESTIONS = 8
MAX_TOKENS = 64
FALLBACK_SET = "terse"  # its held-out questions serve vectors that came without a set


@dataclass(frozen=True)
class Guard:
    """What coherent means. Ratios are to the unsteered answers to the same questions.

    perplexity_ratio: at most; distinct2_ratio, words: at least (mean words an answer).
    """

    perplexity_ratio: float = 5.0
    distinct2_ratio: float = 0.5
    words: float = 2.0

    def holds(self, arm: Arm, unsteered: Arm) -> bool:
        return (
            arm.perplexity <= self.perplexity_ratio * unsteered.perplexity
            and arm.distinct2 >= self.distinct2_ratio * unsteered.distinct2
            and arm.words >= self.words
        )


def calibrate(
    model: Model,
    vector: SteeringVector,
    *,
    questions: Sequence[str] | None = None,
    doses: Sequence[float] = DOSES,
    n_questions: int = QUESTIONS,
    max_tokens: int = MAX_TOKENS,
    guard: Guard | None = None,
    force: bool = False,
    show_progress: bool = True,
) -> SteeringVector:
    """`vector` with δ+ and δ− found on `model`, so that strength 5 is the edge.

    questions: asked in place of the first `n_questions` held-out ones. force: also for a vector
    of another architecture. A multiple of a vector is calibrated as the vector itself (gain 1).
    Raises VectorError when not even the smallest dose is coherent.
    """
    if vector.op == "project":
        raise UsageError(
            f"{vector.name!r} is a projection; its strength is the share removed, which needs no"
            " calibration."
        )
    if not doses or min(doses) <= 0:
        raise UsageError("Doses to try must be above 0, such as 0.1, 0.2, 0.4.")
    guard = guard or Guard()
    metric, held_out = held_out_of(vector)
    asked = list(questions) if questions else list(held_out[:n_questions])
    bare = replace(vector, gain=1.0, calibration=None)
    run = partial(
        trials.run,
        model,
        asked,
        metric=metric,
        max_tokens=max_tokens,
        label=f"Calibrating {vector.name}",
        show_progress=show_progress,
        store=model_store(model),
    )
    arms = _climb(run, lambda dose: _at_dose(model, bare, dose, force), doses, guard)
    return replace(bare, calibration=_limits(vector.name, arms, guard, max_tokens))


def _climb(
    run: Callable[..., list[Arm]],
    at_dose: Callable[[float], Plan],
    doses: Sequence[float],
    guard: Guard,
) -> list[Arm]:
    """The unsteered arm, and those of rising doses of each sign, until one is not coherent.

    Several doses share a batch, so a few beyond the limit are measured as well.
    """
    rising = sorted(set(doses))
    arms: list[Arm] = []
    open_signs = {1, -1}
    for start in range(0, len(rising), DOSES_AT_A_TIME):
        part = rising[start : start + DOSES_AT_A_TIME]
        steerings = [
            (sign * dose, at_dose(sign * dose)) for sign in sorted(open_signs) for dose in part
        ]
        if not arms:
            steerings.insert(0, (0.0, Plan([])))
        arms += run(steerings)
        failed = {np.sign(a.amount) for a in arms[1:] if not guard.holds(a, arms[0])}
        open_signs -= failed
        if not open_signs:
            break
    return arms


def held_out_of(vector: SteeringVector) -> tuple[Metric, tuple[str, ...]]:
    """(metric, held-out questions) of the set that the vector came from, else of `terse`."""
    name = vector.about.get("contrast_set")
    contrast = ContrastSet.load(name if name in available() else FALLBACK_SET)
    return contrast.metric, contrast.held_out


def _at_dose(model: Model, vector: SteeringVector, dose: float, force: bool) -> Plan:
    term = Term(plain_name(vector.name), dose, "d")
    plan = build([(term, vector)], model.shape, force=force)
    model.hooks.require(plan.places)
    return plan


def _limits(name: str, arms: Sequence[Arm], guard: Guard, max_tokens: int) -> Calibration:
    unsteered = arms[0]
    found = {}
    for sign in (1, -1):
        side = sorted(
            (arm for arm in arms[1:] if arm.amount * sign > 0), key=lambda a: abs(a.amount)
        )
        limit = 0.0
        for arm in side:
            if not guard.holds(arm, unsteered):
                break
            limit = abs(arm.amount)
        if limit == 0:
            raise VectorError(
                f"{name!r} breaks the output at its smallest dose ({side[0].amount:+g}:"
                f" perplexity {side[0].perplexity:.1f}, distinct-2 {side[0].distinct2:.2f};"
                f" unsteered {unsteered.perplexity:.1f} and {unsteered.distinct2:.2f})."
                " Try smaller doses, other layers, or another set."
            )
        found[sign] = limit
    return Calibration(
        delta_plus=found[1],
        delta_minus=found[-1],
        guard=asdict(guard),
        context_len=max_tokens,
        curve=tuple(arm.row() for arm in sorted(arms, key=lambda arm: arm.amount)),
    )
