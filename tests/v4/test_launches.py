"""The budget of launches per decoded token, and what the hooks add to it: nothing."""

from __future__ import annotations

from functools import cache

from mlxsteer.models.deepseek_v4 import launches
from tests.v4.tiny import FakeTaps


@cache
def counts():
    return launches.decode_launches()


def test_a_decoded_token_stays_within_2000_launches():
    assert launches.launches(counts()["no window closes"]) <= 2000
    assert launches.mean_launches(counts()) <= 2000


def test_the_graph_of_a_step_does_not_grow_with_the_context():
    """Nothing is rebuilt, joined or cast per closed window."""
    model = launches.quantised_model(True)
    short, long = (launches.launches(launches.decode_step(model, p)) for p in (129, 129 + 128))
    assert long == short


def test_taps_that_do_nothing_add_no_primitive():
    model = launches.quantised_model(True)
    plain = launches.decode_step(model, 21)
    for layer in model.layers:
        layer.taps = FakeTaps()
    tapped = launches.decode_step(model, 21)
    assert tapped == plain
