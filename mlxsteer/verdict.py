"""What the figures of an evaluation mean: one line per criterion, and a plain sentence.

Every threshold of the verdict is in `CRITERIA`; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isnan
from typing import Any

from mlxsteer.statistics import Interval

WORKS = "works"
NOT_BETTER = "works, but not better than asking"
FAILS = "does not work"


@dataclass(frozen=True)
class Criteria:
    """What an evaluation must show. Ratios are to the unsteered answers, higher is stricter or
    looser as said.

    wrong_way: largest share of questions moved against the name. spearman: least rank
    correlation of strength and effect. perplexity_ratio: largest, of the answers under the
    unsteered model. distinct2_ratio: least. longest_repeat: most words, mean, that an answer
    repeats in one stretch beyond the unsteered ones. kl95: largest 95th percentile of the KL per
    token, nats. percentile: least share of random directions outdone. damage: largest rise of
    the loss on neutral text, nats per token. cloze_drop: largest fall of the share of facts.
    """

    wrong_way: float = 0.25
    spearman: float = 0.6  # of seven strengths, an effect at the highest alone gives 0.61
    perplexity_ratio: float = 3.0
    distinct2_ratio: float = 0.6
    longest_repeat: float = 10.0
    kl95: float = 6.0
    percentile: float = 0.95
    damage: float = 0.5
    cloze_drop: float = 0.1


CRITERIA = Criteria()


@dataclass(frozen=True)
class Measured:
    """The figures of an evaluation at one strength. Effects are in the metric's unit, turned so
    that more of the name is positive; None where something was not measured.

    effect, reverse, asking, both: paired differences from the unsteered answers, of the vector,
    of its negative, of the instruction in the prompt, and of instruction and vector together.
    over_asking: vector less instruction. both_over_asking: both less instruction. judge: a
    judge's preference for the steered answer over the unsteered, −1 to 1; judge_bias: its
    preference for whichever answer it was shown first.
    """

    strength: float
    effect: Interval
    wrong_way: float
    slope: float
    spearman: float
    perplexity_ratio: float
    distinct2_ratio: float
    longest_repeat: float
    kl95: float
    percentile: float | None = None
    n_random: int = 0
    reverse: Interval | None = None
    asking: Interval | None = None
    both: Interval | None = None
    over_asking: Interval | None = None
    both_over_asking: Interval | None = None
    damage: float | None = None
    cloze_drop: float | None = None
    judge: Interval | None = None
    judge_bias: float | None = None


@dataclass(frozen=True)
class Check:
    """One criterion: what was found, what is needed, whether it holds (None: not judged).

    essential: a vector that fails it does not work.
    """

    name: str
    found: str
    needed: str
    passed: bool | None
    essential: bool = True


def checks(measured: Measured, criteria: Criteria = CRITERIA) -> list[Check]:
    """Every criterion, in the order in which a reader asks."""
    return list(
        chain(
            _effects(measured, criteria),
            _coherence(measured, criteria),
            _specificity(measured, criteria),
            _costs(measured, criteria),
            _judge(measured),
            _against_asking(measured),
        )
    )


def verdict(found: Sequence[Check]) -> str:
    """WORKS, NOT_BETTER or FAILS."""
    if any(check.essential and check.passed is False for check in found):
        return FAILS
    rival = next((check for check in found if check.name == "more than asking"), None)
    return NOT_BETTER if rival is not None and rival.passed is False else WORKS


def sentence(found: Sequence[Check]) -> str:
    """The verdict and its reason, in words."""
    outcome = verdict(found)
    failed = [check.name for check in found if check.passed is False and check.essential]
    costs = [
        check.name
        for check in found
        if check.passed is False and not check.essential and check.name != "more than asking"
    ]
    if outcome == FAILS:
        return f"{FAILS}: fails {', '.join(failed)}"
    return outcome + (f"; mind: {', '.join(costs)}" if costs else "")


def _effects(m: Measured, c: Criteria) -> list[Check]:
    return [
        Check("effect", str(m.effect), "interval above 0", m.effect.low > 0),
        _at_most("moved the wrong way", m.wrong_way, c.wrong_way, percent=True),
        _at_least("dose and effect (Spearman)", m.spearman, c.spearman),
    ]


def _coherence(m: Measured, c: Criteria) -> list[Check]:
    return [
        _at_most("perplexity ratio", m.perplexity_ratio, c.perplexity_ratio),
        _at_least("distinct-2 ratio", m.distinct2_ratio, c.distinct2_ratio),
        _at_most("longest repeat (words more)", m.longest_repeat, c.longest_repeat),
        _at_most("KL per token, 95th percentile (nats)", m.kl95, c.kl95),
    ]


def _specificity(m: Measured, c: Criteria) -> list[Check]:
    if m.percentile is None:
        return []
    name = f"outdoes random directions ({m.n_random})"
    return [_at_least(name, m.percentile, c.percentile, percent=True)]


def _costs(m: Measured, c: Criteria) -> list[Check]:
    found = []
    if m.reverse is not None:
        # Where the unsteered answers show nothing of the trait, there is nothing to take away:
        # then the reverse must only not bring it.
        passed = m.reverse.low <= 0
        found.append(Check("reversed", str(m.reverse), "not above 0", passed, essential=False))
    if m.damage is not None:
        found.append(
            _at_most("loss on neutral text (nats more)", m.damage, c.damage, essential=False)
        )
    if m.cloze_drop is not None:
        found.append(
            _at_most("facts lost", m.cloze_drop, c.cloze_drop, percent=True, essential=False)
        )
    return found


def _judge(m: Measured) -> list[Check]:
    if m.judge is None:
        return []
    name = f"judge sees more of it (bias to the first {m.judge_bias:+.2f})"
    return [Check(name, str(m.judge), "interval above 0", m.judge.low > 0, essential=False)]


def _against_asking(m: Measured) -> list[Check]:
    found = []
    if m.over_asking is not None:
        passed = m.over_asking.low > 0
        found.append(
            Check("more than asking", str(m.over_asking), "interval above 0", passed, False)
        )
    if m.both_over_asking is not None:
        passed = m.both_over_asking.low > 0
        found.append(
            Check("adds to asking", str(m.both_over_asking), "interval above 0", passed, False)
        )
    return found


def _at_most(
    name: str, value: float, limit: float, *, percent: bool = False, essential: bool = True
) -> Check:
    passed = None if isnan(value) else value <= limit
    return Check(name, _shown(value, percent), f"≤ {_shown(limit, percent)}", passed, essential)


def _at_least(
    name: str, value: float, limit: float, *, percent: bool = False, essential: bool = True
) -> Check:
    passed = None if isnan(value) else value >= limit
    return Check(name, _shown(value, percent), f"≥ {_shown(limit, percent)}", passed, essential)


def _shown(value: float, percent: bool) -> str:
    return f"{100 * value:.0f}%" if percent else f"{value:.3g}"


def from_dict(data: Mapping[str, Any]) -> list[Check]:
    """The checks that a vector's `eval` holds."""
    return [Check(**check) for check in data.get("checks", ())]
