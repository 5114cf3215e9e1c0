"""Stacked edits of a batch against one row at a time in numpy."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsteer.edits import MAX_CACHED_STACKS, PADDING, Stacker
from mlxsteer.fitting import ModelShape
from mlxsteer.grammar import parse
from mlxsteer.plan import ANSWER, PROMPT, THINK, TOOL, Plan, build
from mlxsteer.vector import SteeringVector

D, LAYERS = 8, 3
AT = (1, "residual")
SHAPE = ModelShape("test model", LAYERS, D, lambda: np.full(LAYERS, 2.0, np.float32), {})
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5, D)).astype(np.float32)


def vector(seed: int, layers=(1,), rank: int | None = None, **fields) -> SteeringVector:
    rng = np.random.default_rng(seed)
    if rank:
        arrays = {at: np.linalg.qr(rng.normal(size=(D, rank)))[0].T for at in layers}
        return SteeringVector.from_arrays(arrays, op="project", n_layers=LAYERS, **fields)
    arrays = {at: rng.normal(size=D) for at in layers}
    return SteeringVector.from_arrays(arrays, n_layers=LAYERS, **fields)


def plan(*terms: tuple[str, SteeringVector]) -> Plan:
    return build([(parse(f"v:{amount}")[0], v) for amount, v in terms], SHAPE)


def apply(plans, phases, x=X, place=AT) -> np.ndarray:
    edits = Stacker().edits(plans, np.asarray(phases))
    return np.array(edits[place](mx.array(x)) if place in edits else x)


def by_hand(plan_: Plan | None, phase: int, h: np.ndarray) -> np.ndarray:
    """One position `[D]`: projections, clamps, shift, turn, in float64."""
    if not plan_ or not phase or AT not in plan_.edit(phase):
        return h
    edit, h = plan_.edit(phase)[AT], h.astype(np.float64)
    for d, share in edit.projections:
        h = h - share * (h @ d) * d
    for d, value in edit.clamps:
        h = h + (value - h @ d) * d
    if edit.shift is not None:
        h = h + edit.shift
    if edit.turn is not None:
        h = (h + edit.turn) * np.linalg.norm(h) / np.linalg.norm(h + edit.turn)
    return h


def test_nothing_steered_gives_no_edits():
    assert Stacker().edits([None, plan()], np.full((2, 5), PROMPT)) == {}
    unsteered_phase = Stacker().edits([plan(("1r", vector(1)))], np.full((1, 5), PROMPT))
    assert unsteered_phase == {}


def test_added_vectors_sum_to_one_shift():
    a, b = vector(1), vector(2)
    both = plan(("2r@all", a), ("-0.5r@all", b))
    moved = apply([both], [[PROMPT] * 5], X[:1])
    shift = 2 * a.magnitude[1] * a.directions[1] - 0.5 * b.magnitude[1] * b.directions[1]
    assert np.allclose(moved, X[:1] + shift, atol=1e-5)


def test_projections_come_first_so_no_term_removes_anothers_shift():
    added, d = vector(1), vector(1).directions[1]
    removed = vector(1, op="project")
    for terms in ([("1r@all", added), ("1@all", removed)], [("1@all", removed), ("1r@all", added)]):
        moved = apply([plan(*terms)], [[PROMPT] * 5], X[:1])
        assert np.allclose(moved @ d, added.magnitude[1], atol=1e-5)


def test_a_turn_comes_last_and_keeps_the_norm_of_what_it_finds():
    turned = vector(2, norm_preserving=True)
    combined = plan(("1r@all", turned), ("1r@all", vector(1)))
    moved = apply([combined], [[PROMPT] * 5], X[:1])
    shifted = X[:1] + vector(1).magnitude[1] * vector(1).directions[1]
    assert np.allclose(np.linalg.norm(moved, axis=-1), np.linalg.norm(shifted, axis=-1), rtol=1e-5)
    assert not np.allclose(moved, shifted, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_rank_k_projection_removes_the_subspace(rank):
    v = vector(3, rank=rank)
    moved = apply([plan(("1@all", v))], [[PROMPT] * 5], X[:1])
    rows = v.directions[1]
    assert np.abs(moved @ rows.T).max() < 1e-5
    assert np.allclose(moved, X[:1] - X[:1] @ rows.T @ rows, atol=1e-5)


def test_rows_hold_different_ops_and_an_unsteered_row_is_untouched():
    plans = [
        plan(("1r@all", vector(1)), ("2r@all", vector(2, norm_preserving=True))),
        None,
        plan(("0.7@all", vector(3, rank=2)), ("2@all", vector(4, op="clamp"))),
        plan(("-1@all", vector(5, op="project")), ("3d@all", vector(6))),
    ]
    moved = apply(plans, np.full((4, 5), PROMPT))
    assert np.array_equal(moved[1], X[1])
    for row, plan_ in enumerate(plans):
        expected = [by_hand(plan_, PROMPT, h) for h in X[row]]
        assert np.allclose(moved[row], expected, atol=1e-4)


POSITIONS = st.sampled_from(["answer", "think", "generated", "prompt", "all"])
PHASES = st.sampled_from([PADDING, PROMPT, THINK, ANSWER, TOOL, PROMPT | ANSWER, PROMPT | THINK])


@settings(deadline=None)
@given(
    where=st.lists(POSITIONS, min_size=4, max_size=4),
    phases=st.lists(PHASES, min_size=20, max_size=20),
)
def test_every_position_gets_its_rows_edit_of_its_phase_and_no_other(where, phases):
    kinds = [("1r", vector(1)), ("1", vector(2, op="project")), ("1r", vector(3))]
    rows = [plan((f"{amount}@{at}", v)) for at, (amount, v) in zip(where, kinds, strict=False)]
    plans, phases = [*rows, None], np.array(phases).reshape(4, 5)
    moved = apply(plans, phases)
    for row, plan_ in enumerate(plans):
        for t in range(5):
            phase = int(phases[row, t])
            acts = by_hand(plan_, phase, X[row, t])
            assert np.allclose(moved[row, t], acts, atol=1e-5)
            if acts is X[row, t]:
                assert np.array_equal(moved[row, t], X[row, t])


def test_phases_of_one_prefill_combine():
    """`all` acts once everywhere, `answer` besides on the last prompt position only."""
    everywhere, answer = vector(1), vector(2)
    phases = [[PROMPT] * 4 + [PROMPT | ANSWER]]
    moved = apply([plan(("1r@all", everywhere), ("1r", answer))], phases, X[:1]) - X[:1]
    first, second = (v.magnitude[1] * v.directions[1] for v in (everywhere, answer))
    assert np.allclose(moved[0, :4], first, atol=1e-5)
    assert np.allclose(moved[0, 4], first + second, atol=1e-5)


def test_a_vector_for_the_residual_acts_on_all_four_streams():
    streams = RNG.normal(size=(1, 5, 4, D)).astype(np.float32)
    v = vector(1)
    phases = [[PROMPT] * 4 + [PROMPT | ANSWER]]
    moved = apply([plan(("1r", v))], phases, streams) - streams
    assert np.array_equal(moved[:, :4], np.zeros_like(moved[:, :4]))
    assert np.allclose(moved[0, 4], v.magnitude[1] * v.directions[1], atol=1e-5)


def test_a_stream_vector_moves_each_stream_by_its_own_part():
    streams = RNG.normal(size=(2, 5, 4, D)).astype(np.float32)
    array = RNG.normal(size=(4, D)).astype(np.float32)
    v = SteeringVector.from_arrays({1: array}, site="stream", n_layers=LAYERS)
    phases = np.full((2, 5), PROMPT)
    moved = apply([plan(("1r@all", v)), None], phases, streams, (1, "stream"))
    assert np.allclose(moved[0] - streams[0], array, atol=1e-5)
    assert np.array_equal(moved[1], streams[1])


def test_only_the_latest_stacks_are_kept():
    stacker = Stacker()
    for seed in range(3 * MAX_CACHED_STACKS):
        stacker.edits([plan(("1r@all", vector(seed)))], np.full((1, 1), PROMPT))
    assert len(stacker._kept) == MAX_CACHED_STACKS
