"""Cosines of vectors against closed forms; when two terms of a steering are said to coincide."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsteer.errors import VectorError
from mlxsteer.fitting import ModelShape
from mlxsteer.grammar import parse
from mlxsteer.plan import build
from mlxsteer.similarity import compare, similarity
from mlxsteer.vector import Calibration, SteeringVector

D, LAYERS = 8, 6
AXIS = np.eye(D, dtype=np.float32)
NORMS = np.ones(LAYERS, np.float32)


def at_angle(cosine: float) -> np.ndarray:
    """A unit row at that cosine from the first axis."""
    return np.float32(cosine) * AXIS[0] + np.float32(np.sqrt(1 - cosine**2)) * AXIS[1]


def vector(name: str, rows: dict[int, np.ndarray], shares=None, **fields) -> SteeringVector:
    share = None if shares is None else np.array(shares, np.float32)
    made = {"residual_norm": NORMS, "calibration": Calibration(0.4, 0.2), **fields}
    return SteeringVector(name, rows, LAYERS, layer_share=share, **made)


# --- cosines --------------------------------------------------------------------------------------


def test_the_mean_weighs_common_layers_by_the_mean_of_both_shares():
    a = vector("a", {1: AXIS[0], 2: AXIS[0], 3: AXIS[0]}, [0, 0.5, 0.25, 0.25, 0, 0])
    b = vector("b", {2: at_angle(0.8), 3: at_angle(-0.2), 4: AXIS[3]}, [0, 0, 0.75, 0.05, 0.2, 0])
    found = similarity(a, b)
    assert found.cosines == pytest.approx({2: 0.8, 3: -0.2})
    assert found.mean == pytest.approx((0.5 * 0.8 - 0.15 * 0.2) / 0.65)


def test_layers_that_get_no_dose_still_count_where_no_other_is_common():
    a = vector("a", {1: AXIS[0], 2: AXIS[0]}, [0, 1, 0, 0, 0, 0])
    b = vector("b", {2: at_angle(0.6), 3: AXIS[0]}, [0, 0, 0, 1, 0, 0])
    assert similarity(a, b).mean == pytest.approx(0.6)


def test_without_a_common_layer_there_is_no_figure():
    found = similarity(vector("a", {1: AXIS[0]}), vector("b", {2: AXIS[0]}))
    assert (found.cosines, found.mean) == ({}, None)


def test_planes_have_the_cosine_of_their_nearest_directions():
    tilted = np.stack([AXIS[5], at_angle(0.6)])
    plane = vector("plane", {1: AXIS[[0, 2]]}, op="project")
    other = vector("other", {1: tilted}, op="project")
    assert similarity(plane, other).cosines[1] == pytest.approx(0.6)
    turned = vector("turned", {1: np.array([[0.6, 0.8], [-0.8, 0.6]], np.float32) @ AXIS[[0, 2]]},
                    op="project")  # fmt: skip
    assert similarity(plane, turned).cosines[1] == pytest.approx(1)


def test_a_shift_of_all_streams_is_compared_with_a_pattern_of_them():
    pattern = np.stack([AXIS[0], AXIS[0], AXIS[1], AXIS[1]]) / 2
    streams = vector("streams", {1: pattern.astype(np.float32)}, site="stream")
    assert similarity(streams, vector("a", {1: AXIS[0]})).cosines[1] == pytest.approx(0.5)
    assert similarity(streams, streams).cosines[1] == pytest.approx(1)


def test_every_pair_is_compared_once_and_widths_must_agree():
    three = [vector(name, {1: AXIS[index]}) for index, name in enumerate("abc")]
    assert [(p.a.name, p.b.name) for p in compare(three)] == [("a", "b"), ("a", "c"), ("b", "c")]
    wide = SteeringVector("wide", {1: np.eye(9, dtype=np.float32)[0]}, LAYERS)
    with pytest.raises(VectorError, match="'a' has width 8, 'wide' 9"):
        compare([three[0], wide])


# --- terms of one steering ------------------------------------------------------------------------


def warned(first: str, second: str, cosine: float = 0.95, **fields) -> list[str]:
    """The plan's warnings of coincidence for terms of two vectors at that cosine."""
    shape = ModelShape("tiny", LAYERS, D, lambda: NORMS, {})
    pairs = [
        (parse(first)[0], vector("terse", {2: AXIS[0], 3: AXIS[0]})),
        (parse(second)[0], vector("brief", {2: at_angle(cosine), 3: at_angle(cosine)}, **fields)),
    ]
    return [line for line in build(pairs, shape).warnings if "cosine" in line]


@pytest.mark.parametrize(
    ("second", "cosine", "said"),
    [
        ("brief:2", 0.95, "nearly the same way (cosine 0.95) and they add up"),
        ("brief:-2", 0.95, "nearly the same way (cosine 0.95) and they work against each other"),
        ("brief:-2", -0.95, "nearly opposite ways (cosine -0.95) and they add up"),
        ("brief:2@first(9)", 0.95, "nearly the same way (cosine 0.95) and they add up"),
        ("brief:2", -0.95, "nearly opposite ways (cosine -0.95) and they work against each other"),
    ],
)
def test_terms_that_nearly_coincide_are_named_with_what_they_do_together(second, cosine, said):
    (line,) = warned("terse:3@generated@after(4)", second, cosine)
    assert (
        line == f"terse:3@generated@after(4) and {second} point {said}; one of them may be enough."
    )


@pytest.mark.parametrize(
    ("first", "second", "cosine", "fields"),
    [
        ("terse:3", "brief:2", 0.89, {}),
        ("terse:3", "brief:2", -0.89, {}),
        ("terse:3@think", "brief:2@answer", 0.95, {}),
        ("terse:3@first(10)", "brief:2@after(10)", 0.95, {}),
        ("terse:3@after(20)", "brief:2@first(10)", 0.95, {}),
        ("terse:3", "brief:0", 0.95, {}),
        ("terse:3", "brief:2", 0.95, {"site": "ffn_out"}),
        ("terse:3", "brief:1", 0.95, {"op": "project"}),
    ],
)
def test_terms_that_do_not_meet_are_not_warned_about(first, second, cosine, fields):
    assert warned(first, second, cosine, **fields) == []
