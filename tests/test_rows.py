"""Rows: which phase each position has, and who is who while mlx-lm moves the batch about."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsteer.edits import PADDING
from mlxsteer.models import adapters
from mlxsteer.models.hooks import RESIDUAL, Run
from mlxsteer.plan import ANSWER, PROMPT, THINK, TOOL
from mlxsteer.rows import LAG, Control, Markers, Row, RowCache
from mlxsteer.steered import SteeredModel
from tests.tiny_models import random_vector, tiny_model, tiny_plan, tiny_tokens

OPEN, CLOSE, TOOL_OPEN, TOOL_CLOSE = 50, 51, 52, 53
MARKERS = Markers((OPEN,), (CLOSE,), (TOOL_OPEN,), (TOOL_CLOSE,))
HOOKS = adapters.install(tiny_model("llama"))
STEERED = SteeredModel(HOOKS)


def plan(text: str):
    return tiny_plan(HOOKS, (text, random_vector(1)))


def phases(row: Row, tokens: list[int]) -> list[int]:
    """The phases of `tokens`, as one chunk of a batch of one."""
    return RowCache([row]).take(mx.array([tokens]))[0].tolist()


def thinking_row(text: str = "1", prompt_length: int = 3, first: int = THINK) -> Row:
    return Row(Control(plan(text)), prompt_length, first, MARKERS)


# --- phases -------------------------------------------------------------------------------------


def test_the_last_prompt_position_belongs_to_the_first_generated_token():
    row = Row(Control(plan("1")), 4)
    assert phases(row, [1, 2, 3, 4, 5, 6]) == [PROMPT] * 3 + [PROMPT | ANSWER, ANSWER, ANSWER]


def test_the_end_of_a_thought_begins_the_answer():
    tokens = [1, 2, OPEN, 5, 6, CLOSE, 7, 8]
    expected = [PROMPT, PROMPT, PROMPT | THINK, THINK, THINK, ANSWER, ANSWER, ANSWER]
    assert phases(thinking_row(), tokens) == expected


def test_a_model_that_opens_its_own_thought_is_followed():
    tokens = [1, 2, 3, OPEN, 6, CLOSE, 7]
    expected = [PROMPT, PROMPT, PROMPT | ANSWER, THINK, THINK, ANSWER, ANSWER]
    assert phases(thinking_row(first=ANSWER), tokens) == expected


def test_tool_calls_are_a_phase_of_their_own_and_markers_inside_are_text():
    tokens = [1, 2, 3, 4, TOOL_OPEN, OPEN, CLOSE, TOOL_CLOSE, 5]
    expected = [PROMPT, PROMPT, PROMPT | ANSWER, ANSWER, TOOL, TOOL, TOOL, ANSWER, ANSWER]
    assert phases(thinking_row(first=ANSWER), tokens) == expected


def test_markers_in_the_prompt_change_nothing():
    tokens = [OPEN, TOOL_OPEN, 3, 4]
    assert phases(thinking_row(first=ANSWER), tokens) == [PROMPT, PROMPT, PROMPT | ANSWER, ANSWER]


def test_markers_of_several_tokens_switch_at_their_last():
    markers = Markers((9, 9, 1), (9, 9, 2), (7, 7), (8, 8))
    row = Row(Control(plan("1")), 1, THINK, markers)
    tokens = [0, 9, 9, 9, 2, 7, 7, 8, 8, 8]
    expected = [PROMPT | THINK, *[THINK] * 3, ANSWER, ANSWER, TOOL, TOOL, ANSWER, ANSWER]
    assert phases(row, tokens) == expected


texts = st.lists(st.sampled_from([1, 2, OPEN, CLOSE, TOOL_OPEN, TOOL_CLOSE]), min_size=4)


@settings(deadline=None)
@given(texts, st.integers(1, 4), st.lists(st.integers(1, 3), min_size=40, max_size=40))
def test_phases_do_not_depend_on_how_the_tokens_are_cut(tokens, prompt_length, sizes):
    row, found, start = thinking_row(prompt_length=prompt_length), [], 0
    for size in sizes:
        if start < len(tokens):
            found += phases(row, tokens[start : start + size])
            start += size
    whole = phases(thinking_row(prompt_length=prompt_length), tokens[: len(found)])
    assert found == whole


@pytest.mark.parametrize(
    ("text", "needed"),
    [("1", True), ("1@think", True), ("1@generated", True), ("1@prompt", False), ("1@all", False)],
)
def test_tokens_are_read_only_where_the_phase_depends_on_them(text, needed):
    assert thinking_row(text).needs_tokens == needed
    assert not Row(Control(plan(text)), 3).needs_tokens
    assert not Row(Control(None), 3, ANSWER, MARKERS).needs_tokens


@pytest.mark.parametrize("length", [3, LAG + 10])
def test_a_plan_that_comes_late_finds_the_phase_that_was_reached(length):
    """A slider moved for the first time after the thought, or inside a tool call."""
    row = Row(Control(None), 2, THINK, MARKERS)
    cache = RowCache([row])
    for token in [1, 2, 5, CLOSE, *[6] * length]:
        cache.take(mx.array([[token]]))
    assert len(row.unread) <= LAG
    row.control.plan = plan("1")
    assert cache.take(mx.array([[7]])).tolist() == [[ANSWER]]
    row.control.plan = None
    cache.take(mx.array([[TOOL_OPEN]]))
    row.control.plan = plan("1")
    assert cache.take(mx.array([[7]])).tolist() == [[TOOL]]


def test_a_new_turn_forgets_the_last_answers_markers():
    row = Row(Control(None), 1, ANSWER, MARKERS)
    phases(row, [1, OPEN])
    row.prompt_length, row.control.plan = 4, plan("1")
    assert phases(row, [2, 3, 4]) == [PROMPT, PROMPT | ANSWER, ANSWER]


# --- the batch ----------------------------------------------------------------------------------


def test_right_padding_has_no_phase_and_does_not_move_a_row_on():
    cache = RowCache([Row(Control(plan("1")), 5), Row(Control(None), 3), Row(Control(None), 2)])
    cache.prepare(lengths=[4, 2, 1], right_padding=[0, 2, 3])
    assert cache.take(mx.zeros((3, 3), mx.int32)).tolist() == [
        [PROMPT, PROMPT, PROMPT],
        [PROMPT, PROMPT, PADDING],
        [PROMPT, PADDING, PADDING],
    ]
    assert cache.take(mx.zeros((3, 1), mx.int32)).tolist() == [[PROMPT], [PADDING], [PADDING]]
    cache.finalize()
    last = PROMPT | ANSWER
    assert cache.take(mx.zeros((3, 1), mx.int32)).tolist() == [[last], [last], [last]]


def test_rows_stay_who_they_are_through_merging_filtering_and_splitting():
    rows = [Row(Control(None), length) for length in (3, 4, 5, 6)]
    cache = RowCache.merge([RowCache([row]) for row in rows[:2]])
    cache.extend(RowCache(rows[2:]))
    cache.filter([0, 2, 3])
    assert [row.prompt_length for row in cache.rows] == [3, 5, 6]
    cache.filter(mx.array([2, 1]))
    assert cache.extract(0).rows[0].prompt_length == 6
    assert cache.plans == [None, None]


def test_copies_count_alone_and_share_the_slider():
    cache = RowCache([Row(Control(None), 2)])
    copied = copy.deepcopy(cache)
    copied.take(mx.zeros((1, 2), mx.int32))
    assert (cache.offset, copied.offset) == (0, 2)
    cache.rows[0].control.plan = plan("1")
    assert copied.plans == cache.plans


def test_markers_are_the_tokenizers_own():
    class Tokenizer:
        think_start_tokens, think_end_tokens = [1], [2, 3]
        tool_call_start_tokens = tool_call_end_tokens = None

    assert Markers.of(Tokenizer()) == Markers((1,), (2, 3))
    assert Markers.of(Tokenizer()).longest == 2
    assert not Markers.of(object())


# --- in a model ---------------------------------------------------------------------------------


def moved_positions(row: Row, tokens: list[int], cuts: list[int]) -> np.ndarray:
    """Whether layer 0's residual moves at each position, by steering that acts there alone."""
    cache, seen = STEERED.new_cache(row), []
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        chunk = mx.array([tokens[start:end]])
        edits = STEERED.stacker.edits(cache[-1].plans, cache[-1].take(chunk))
        run = Run(edits=edits, capture=frozenset({(0, RESIDUAL)}))
        with HOOKS.forward(run):
            HOOKS.model(chunk, cache=cache[:-1])
        seen.append(run.captured[0, RESIDUAL])
    plain = Run(capture=frozenset({(0, RESIDUAL)}))
    with HOOKS.forward(plain):
        HOOKS.model(mx.array([tokens]))
    change = mx.abs(mx.concatenate(seen, axis=1) - plain.captured[0, RESIDUAL]).max(axis=-1)
    return np.array(change[0] > 1e-3)


@pytest.mark.parametrize("cuts", [[], [2], [3, 4, 5, 6, 7, 8]])
@pytest.mark.parametrize(
    ("positions", "steered"),
    [
        ("answer", "000001101"),
        ("think", "001110000"),
        ("generated", "001111101"),
        ("prompt", "111000000"),
        ("all", "111111111"),
    ],
)
def test_steering_acts_on_its_positions_alone(positions, steered, cuts):
    """Layer 0 of a fresh model feels only the edit at its own position."""
    vector = random_vector(1)
    only_first = type(vector).from_arrays({0: vector.directions[0]}, n_layers=4)
    row = thinking_row()
    row.control.plan = tiny_plan(HOOKS, (f"1r@{positions}", only_first))
    tokens = [1, 2, 3, 4, 5, CLOSE, 6, TOOL_OPEN, TOOL_CLOSE]
    assert moved_positions(row, tokens, cuts).tolist() == [flag == "1" for flag in steered]


def test_a_plan_changed_between_tokens_acts_on_the_next():
    row = Row(Control(None), 3)
    cache, tokens = STEERED.new_cache(row), tiny_tokens(1, 3)
    STEERED(tokens, cache=cache)
    kept = copy.deepcopy(cache)
    kept[-1].rows[0].control = Control(None)
    row.control.plan = plan("1r")
    after, plain = (STEERED(tiny_tokens(1, 1), cache=c) for c in (cache, kept))
    assert not mx.allclose(after, plain, atol=1e-2)


def test_rows_hold_no_arrays_and_are_not_trimmed():
    cache = RowCache([Row(Control(None), 1)])
    cache.state = []
    with pytest.raises(ValueError, match="rows hold no arrays"):
        cache.state = [mx.ones(1)]
    assert not cache.is_trimmable()
    assert cache.empty()
