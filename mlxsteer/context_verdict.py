"""What the figures of a document's vector mean: a line per criterion, and a plain sentence.

Every threshold is in `CONTEXT_CRITERIA`; nothing here runs a model. See `context_evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxsteer.statistics import Interval
from mlxsteer.verdict import FAILS, Check

STANDS_IN = "stands in for the document"
A_PART = "recovers a part"


@dataclass(frozen=True)
class ContextCriteria:
    """percentile: least share of random directions outdone. share: least share of the document's
    effect with which a vector stands in for it. answers: the same, of the questions that only
    the document answers.
    """

    percentile: float = 0.95
    share: float = 0.5
    answers: float = 0.5


CONTEXT_CRITERIA = ContextCriteria()


@dataclass(frozen=True)
class Recovered:
    """What a vector recovered of its document's effect, on held-out questions.

    share: 1 − KL(with ‖ steered) / KL(with ‖ plain), per token of the answers given with the
    document. percentile: share of random directions that it exceeds; None where none were
    tried. gained: questions answered right with the document and not without; regained: of
    these, steered. Both None where no question says what is right.
    """

    share: Interval
    percentile: float | None
    n_random: int
    gained: int | None
    regained: int | None


def checks(found: Recovered, criteria: ContextCriteria = CONTEXT_CRITERIA) -> list[Check]:
    """Every criterion; the first two must hold for anything to have been recovered."""
    lines = [Check("effect recovered", percent(found.share), "interval above 0", _above(found, 0))]
    if found.percentile is not None:
        lines.append(
            Check(
                f"outdoes random directions ({found.n_random})",
                f"{found.percentile:z.0%}",
                f"≥ {criteria.percentile:z.0%}",
                found.percentile >= criteria.percentile,
            )
        )
    enough = found.share.mean >= criteria.share
    need = f"≥ {criteria.share:z.0%}"
    lines.append(Check("most of the effect", f"{found.share.mean:z.0%}", need, enough, False))
    if found.gained is not None and found.regained is not None:
        told = f"{found.regained} of {found.gained}"
        known = found.regained >= criteria.answers * found.gained if found.gained else None
        lines.append(Check("its answers", told, f"≥ {criteria.answers:z.0%}", known, False))
    return lines


def verdict(found: Sequence[Check]) -> str:
    """FAILS, A_PART or STANDS_IN."""
    if any(check.essential and not check.passed for check in found):
        return FAILS
    return STANDS_IN if all(check.passed for check in found) else A_PART


def sentence(found: Recovered) -> str:
    """The verdict and what it rests on, in words."""
    words = (
        f"{verdict(checks(found))}: {found.share.mean:z.0%} of the document's effect on the next"
        " token"
    )
    if found.gained is None:
        return words
    if not found.gained:
        return f"{words}; the document itself answered no held-out question"
    return f"{words}; {found.regained} of the {found.gained} questions that only it answered"


def percent(share: Interval) -> str:
    """`12% [5%, 19%]`."""
    return f"{share.mean:z.0%} [{share.low:z.0%}, {share.high:z.0%}]"


def _above(found: Recovered, limit: float) -> bool:
    return found.share.low > limit
