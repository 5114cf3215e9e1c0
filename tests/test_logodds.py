"""Words that tell groups apart, by the published formula, and topics that are learned so."""

from __future__ import annotations

import math

import pytest

from mlxsteer.contrast import ContrastSet, Metric
from mlxsteer.errors import UsageError
from mlxsteer.metrics import log_odds, measure
from tests.test_metrics import BOTH_POLES


def test_log_odds_are_those_of_the_formula() -> None:
    """Monroe, Colaresi & Quinn (2008), formulas 16, 20 to 22, worked out by hand.

    Prior: 4 words spread as in both groups together, x 1/2, y 1/4, z 1/4.
    """
    x, y, z = log_odds(["x x x y"], ["x z", "Z y"], prior_words=4)
    assert [x.word, y.word, z.word] == ["x", "y", "z"]
    counts = {"x": (3 + 2, 1 + 2), "y": (1 + 1, 1 + 1), "z": (0 + 1, 2 + 1)}
    for found in (x, y, z):
        a, b = counts[found.word]
        expected = math.log(a / (8 - a)) - math.log(b / (8 - b))
        assert found.log_odds == pytest.approx(expected)
        assert found.z == pytest.approx(expected / math.sqrt(1 / a + 1 / b))


def test_log_odds_rank_words_and_turn_with_the_groups() -> None:
    sea, road = BOTH_POLES
    ranked = log_odds(sea, road)
    assert ranked[0].word == "sea"
    assert ranked[-1].word == "road"
    assert [-one.z for one in log_odds(road, sea)] == [one.z for one in reversed(ranked)]


def test_a_prior_of_other_texts_shrinks_words_that_are_common_there() -> None:
    groups = ["the the sea"], ["sea sea a"]
    z = {
        prior: next(one.z for one in log_odds(*groups, [prior]) if one.word == "the")
        for prior in ("the the the of", "of and to in")
    }
    assert 0 < z["the the the of"] < z["of and to in"]


def test_log_odds_need_words_on_both_sides() -> None:
    with pytest.raises(UsageError, match="holds no words"):
        log_odds(["sea"], ["..."])
    with pytest.raises(UsageError, match="above 0"):
        log_odds(["sea"], ["road"], prior_words=0)


@pytest.mark.parametrize("name", ["golden-gate", "cooking", "space"])
def test_a_topic_learned_from_half_the_pairs_is_told_on_the_other_half(name: str) -> None:
    group = ContrastSet.load(name)
    metric = Metric("topic", examples=(group.positive[::2], group.negative[::2]))
    about, other = (measure(metric, pole[1::2]) for pole in (group.positive, group.negative))
    above = sum(one > two for one in about for two in other) / (len(about) * len(other))
    assert above > 0.7  # 0.99, 0.80, 0.80 over both halves
