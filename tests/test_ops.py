"""Ops against numpy by hand, in float64."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlxsteer import ops

D = 6
unhurried = settings(deadline=None)  # a first call compiles, and cores are shared
elements = st.floats(-50, 50, width=32)
states = hnp.arrays(np.float32, (2, 3, D), elements=elements)
shifts = hnp.arrays(np.float32, (2, 1, D), elements=elements)


def unit(seed: int, shape: tuple[int, ...] = (D,)) -> np.ndarray:
    array = np.random.default_rng(seed).normal(size=shape)
    return (array / np.linalg.norm(array)).astype(np.float32)


def column(value: float) -> mx.array:
    return mx.full((1, 1, 1), value)


@unhurried
@given(states, shifts)
def test_add_is_the_sum(h, shift):
    assert np.array_equal(np.array(ops.add(mx.array(h), mx.array(shift))), h + shift)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@unhurried
@given(h=states, shift=shifts)
def test_add_in_half_precision_rounds_once(dtype, h, shift):
    half = mx.array(h).astype(dtype)
    exact = mx.array(np.array(half.astype(mx.float32)) + shift).astype(dtype)
    added = ops.add(half, mx.array(shift))
    assert added.dtype == dtype
    assert mx.array_equal(added, exact)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@unhurried
@given(h=states)
def test_nothing_to_do_changes_nothing(dtype, h):
    x = mx.array(h).astype(dtype)
    direction, none = mx.array(unit(1)), mx.zeros((1, 1, 1))
    assert mx.array_equal(ops.add(x, mx.zeros((1, 1, D))), x)
    assert mx.array_equal(ops.add_preserving_norm(x, mx.zeros((1, 1, D))), x)
    assert mx.array_equal(ops.project(x, direction, none), x)
    assert mx.array_equal(ops.clamp(x, direction, column(4.0), none), x)


@unhurried
@given(states, shifts)
def test_norm_preserving_add_turns_and_keeps_the_length(h, shift):
    turned = np.array(ops.add_preserving_norm(mx.array(h), mx.array(shift)), np.float64)
    moved = h.astype(np.float64) + shift
    before, after = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (h, moved))
    clear = (after > 1e-3 * (1 + np.abs(h).max() + np.abs(shift).max()))[..., 0]
    expected = moved * before / np.maximum(after, 1e-12)
    assert np.allclose(turned[clear], expected[clear], rtol=1e-3, atol=1e-3)


@unhurried
@given(states, st.floats(-1, 2))
def test_project_removes_that_share_of_the_component(h, share):
    d = unit(2)
    out = np.array(ops.project(mx.array(h), mx.array(d), column(share)), np.float64)
    expected = h - share * (h.astype(np.float64) @ d)[..., None] * d
    assert np.allclose(out, expected, atol=1e-4)


@unhurried
@given(states)
def test_project_of_share_one_leaves_no_component_and_the_rest_untouched(h):
    d, other = unit(2), unit(3)
    other = other - (other @ d) * d
    out = np.array(ops.project(mx.array(h), mx.array(d), column(1.0)))
    assert np.abs(out @ d).max() < 1e-3
    assert np.allclose(out @ other, h @ other, atol=1e-3)


@unhurried
@given(states, st.floats(-20, 20, width=32))
def test_clamp_sets_the_component(h, value):
    d = unit(4)
    out = np.array(ops.clamp(mx.array(h), mx.array(d), column(value), column(1.0)))
    assert np.allclose(out @ d, value, atol=1e-3)
    assert np.allclose(out - (out @ d)[..., None] * d, h - (h @ d)[..., None] * d, atol=1e-3)


def test_a_direction_of_four_streams_is_one_direction_over_all_of_them():
    h = np.random.default_rng(0).normal(size=(2, 3, 4, D)).astype(np.float32)
    d = unit(5, (1, 1, 4, D))
    one, three = mx.ones((1, 1, 1, 1)), mx.full((1, 1, 1, 1), 3.0)
    removed = np.array(ops.project(mx.array(h), mx.array(d), one))
    assert np.abs((removed * d).sum(axis=(-2, -1))).max() < 1e-5
    clamped = np.array(ops.clamp(mx.array(h), mx.array(d), three, one))
    assert np.allclose((clamped * d).sum(axis=(-2, -1)), 3.0, atol=1e-5)


def test_a_direction_for_every_stream_acts_on_each_alone():
    h = np.random.default_rng(0).normal(size=(2, 3, 4, D)).astype(np.float32)
    d = unit(6, (1, 1, 1, D))
    removed = np.array(ops.project(mx.array(h), mx.array(d), mx.ones((1, 1, 1, 1))))
    assert np.abs((removed * d).sum(axis=-1)).max() < 1e-5


def test_small_shifts_survive_in_bfloat16_when_they_add_up():
    """Summed first in float32, two steps of a third of an ulp each move the state."""
    h, third = mx.full((1, 1, 2), 256.0, mx.bfloat16), mx.full((1, 1, 2), 0.66)
    assert (ops.add(ops.add(h, third), third) == 256).all()
    assert (ops.add(h, 2 * third) > 256).all()
