"""The verdict follows from the figures, criterion by criterion."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxsteer.statistics import Interval
from mlxsteer.verdict import CRITERIA, FAILS, NOT_BETTER, WORKS, Measured, checks, sentence, verdict

ABOVE, ACROSS, BELOW = Interval(2, 1, 3), Interval(0.5, -1, 2), Interval(-2, -3, -1)
GOOD = Measured(
    strength=3,
    effect=ABOVE,
    wrong_way=0.05,
    slope=0.5,
    spearman=1.0,
    perplexity_ratio=1.5,
    distinct2_ratio=0.9,
    longest_repeat=1.0,
    kl95=2.0,
    percentile=1.0,
    n_random=20,
    reverse=BELOW,
    asking=ACROSS,
    both=ABOVE,
    over_asking=ABOVE,
    both_over_asking=ABOVE,
    damage=0.1,
    cloze_drop=0.0,
)
# A figure just past each limit, and the criterion that must fail.
PAST = {
    "effect": (ACROSS, "effect"),
    "wrong_way": (CRITERIA.wrong_way + 0.01, "moved the wrong way"),
    "spearman": (CRITERIA.spearman - 0.01, "dose and effect (Spearman)"),
    "perplexity_ratio": (CRITERIA.perplexity_ratio + 0.01, "perplexity ratio"),
    "distinct2_ratio": (CRITERIA.distinct2_ratio - 0.01, "distinct-2 ratio"),
    "longest_repeat": (CRITERIA.longest_repeat + 0.1, "longest repeat (words more)"),
    "kl95": (CRITERIA.kl95 + 0.1, "KL per token, 95th percentile (nats)"),
    "percentile": (CRITERIA.percentile - 0.01, "outdoes random directions (20)"),
}
COSTS = {
    "reverse": (ABOVE, "reversed"),
    "damage": (CRITERIA.damage + 0.01, "loss on neutral text (nats more)"),
    "cloze_drop": (CRITERIA.cloze_drop + 0.01, "facts lost"),
}


def failed(measured: Measured) -> list[str]:
    return [check.name for check in checks(measured) if check.passed is False]


def test_a_vector_that_passes_all_works():
    assert failed(GOOD) == []
    assert verdict(checks(GOOD)) == WORKS
    assert sentence(checks(GOOD)) == "works"


@pytest.mark.parametrize("field", PAST)
def test_one_essential_criterion_is_enough_to_fail(field):
    value, name = PAST[field]
    measured = replace(GOOD, **{field: value})
    assert failed(measured) == [name]
    assert verdict(checks(measured)) == FAILS
    assert sentence(checks(measured)) == f"does not work: fails {name}"


@pytest.mark.parametrize("field", COSTS)
def test_a_cost_is_said_and_does_not_fail_it(field):
    value, name = COSTS[field]
    measured = replace(GOOD, **{field: value})
    assert failed(measured) == [name]
    assert verdict(checks(measured)) == WORKS
    assert sentence(checks(measured)) == f"works; mind: {name}"


@pytest.mark.parametrize("over", [ACROSS, BELOW])
def test_what_asking_does_as_well_is_said(over):
    found = checks(replace(GOOD, over_asking=over))
    assert verdict(found) == NOT_BETTER
    assert sentence(found) == "works, but not better than asking"


def test_limits_themselves_pass():
    limits = {
        "wrong_way": CRITERIA.wrong_way,
        "spearman": CRITERIA.spearman,
        "perplexity_ratio": CRITERIA.perplexity_ratio,
        "distinct2_ratio": CRITERIA.distinct2_ratio,
        "percentile": CRITERIA.percentile,
    }
    assert failed(replace(GOOD, **limits)) == []


def test_what_was_not_measured_is_not_judged():
    bare = replace(GOOD, percentile=None, over_asking=None, both_over_asking=None, damage=None)
    names = [check.name for check in checks(bare)]
    assert not any("random" in name or "asking" in name or "neutral" in name for name in names)
    assert verdict(checks(bare)) == WORKS
    unknown = checks(replace(GOOD, perplexity_ratio=float("nan")))
    assert [check.passed for check in unknown if check.name == "perplexity ratio"] == [None]


def test_a_vector_that_turns_up_nothing_of_the_trait_fails_even_when_coherent():
    wrong = replace(GOOD, effect=BELOW, wrong_way=0.9, spearman=-1.0, percentile=0.0)
    assert verdict(checks(wrong)) == FAILS
    assert set(failed(wrong)) >= {"effect", "moved the wrong way", "outdoes random directions (20)"}
