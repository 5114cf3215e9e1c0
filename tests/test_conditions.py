"""Conditions and schedules in a model: the same however its tokens and rows are put together.

The reference decodes one token at a time and adds a weighted shift by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxsteer.grammar import parse
from mlxsteer.models import adapters
from mlxsteer.models.hooks import RESIDUAL, Run
from mlxsteer.plan import Plan, build
from mlxsteer.rows import Control, Row, RowCache
from mlxsteer.steered import SteeredModel
from mlxsteer.vector import SteeringVector
from tests.test_hooks import primitives
from tests.tiny_models import random_vector, tiny_model, tiny_shape, tiny_tokens

HOOKS = adapters.install(tiny_model("llama"))
STEERED = SteeredModel(HOOKS)
PROMPT, LENGTH, PROBED = 5, 24, 2
UNIT = 20.0  # between the poles of `code`: its margin, a tenth, is about how far readings jump
POLES = [{"layer": PROBED, "negative_reading": 0.0, "positive_reading": UNIT}]
PUSH, CODE = random_vector(1), random_vector(2, about={"layer_reports": POLES})
TOKENS = tiny_tokens(1, LENGTH)[0]

Weight = Callable[[int, Sequence[float]], float]


def plan(text: str) -> Plan:
    vectors = {"push": PUSH, "code": CODE}
    pairs = [(term, vectors[term.name]) for term in parse(text)]
    return build(pairs, tiny_shape(HOOKS), find=vectors.__getitem__)


@cache
def reference(weight: Weight) -> tuple[mx.array, list[float]]:
    """(logits [T, V], readings of `code` [T]) with `push` times weight(count, readings before)."""
    kept, logits, readings = make_prompt_cache(HOOKS.model), [], []
    for at, token in enumerate(TOKENS.tolist()):
        count = at - (PROMPT - 1)
        share = weight(count, readings) if count >= 0 else 0.0
        edits = {
            (layer, RESIDUAL): partial(
                lambda x, shift: x + shift, shift=share * _array(PUSH, layer)
            )
            for layer in PUSH.layers
        }
        run = Run(edits, frozenset({(PROBED, RESIDUAL)}))
        with HOOKS.forward(run):
            logits.append(HOOKS.model(mx.array([[token]]), cache=kept)[0, 0])
        state = run.captured[PROBED, RESIDUAL][0, 0]
        readings.append(float(np.array(state) @ CODE.directions[PROBED]) / UNIT)
    return mx.stack(logits), readings


def _array(vector: SteeringVector, layer: int) -> mx.array:
    return mx.array(vector.magnitude[layer] * vector.directions[layer])


def gate(value: float, count: int, readings: Sequence[float]) -> float:
    """1 while open above `value`, by the readings from the last prompt position on."""
    state = False
    for reading in readings[PROMPT - 1 : PROMPT - 1 + count]:
        state = reading > (value - 0.1 if state else value)
    return float(state)


VALUE = round(float(np.median(reference(lambda *_: 0.0)[1][PROMPT - 1 :])), 3)
WHEN = f"when(code@{PROBED}>{VALUE})"
CASES: dict[str, Weight] = {
    "push:1r@first(6)": lambda count, _: float(count < 6),
    "push:1r@after(6)": lambda count, _: float(count >= 6),
    "push:1r@first(9)@after(3)": lambda count, _: float(3 <= count < 9),
    "push:1r@decay(5)": lambda count, _: 0.5 ** (count / 5),
    "push:1r@after(3)@decay(5)": lambda count, _: 0.5 ** ((count - 3) / 5) if count >= 3 else 0.0,
    f"push:1r@{WHEN}": partial(gate, VALUE),
    f"push:1r@{WHEN}@first(15)@decay(9)": lambda count, readings: (
        gate(VALUE, count, readings) * 0.5 ** (count / 9) if count < 15 else 0.0
    ),
    "push:0.5r, push:0.25r@first(6), push:0.25r@decay(5)": lambda count, _: (
        0.5 + 0.25 * (count < 6) + 0.25 * 0.5 ** (count / 5)
    ),
}
CUTS = {"whole": [], "chunks": [3, 8, 15], "prompt": [PROMPT], "tokens": list(range(1, LENGTH))}


def run(text: str, cuts: Sequence[int] = (), tokens: mx.array = TOKENS) -> mx.array:
    """The logits [T, V] of the steered model, its tokens cut so."""
    cache = STEERED.new_cache(Row(Control(plan(text)), PROMPT))
    edges = [0, *cuts, len(tokens)]
    return mx.concatenate([STEERED(tokens[None, a:b], cache)[0] for a, b in pairwise(edges)])


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("text", CASES)
def test_the_logits_are_those_of_a_shift_weighted_by_hand(text: str, cuts: str) -> None:
    expected, _ = reference(CASES[text])
    assert mx.allclose(run(text, CUTS[cuts]), expected, atol=1e-5)


def test_the_condition_of_these_tests_opens_and_closes() -> None:
    _, readings = reference(CASES[f"push:1r@{WHEN}"])
    states = [gate(VALUE, count, readings) for count in range(LENGTH - PROMPT + 1)]
    assert states[0] == 0
    assert sum(a != b for a, b in pairwise(states)) >= 3
    crossings = [float(reading > VALUE) for reading in readings[PROMPT - 1 :]]
    assert states[1:] != crossings[:-1]  # hysteresis held it at least once


def test_rows_of_a_padded_batch_are_steered_as_alone() -> None:
    texts = [*CASES, "push:0"]
    lengths = [LENGTH - 2 * index for index in range(len(texts))]
    rows = tiny_tokens(len(texts), LENGTH)
    caches = [STEERED.new_cache(Row(Control(plan(text)), PROMPT)) for text in texts]
    cache = [type(entries[0]).merge(entries) for entries in zip(*caches, strict=True)]
    for entry in cache:
        padding = [LENGTH - length for length in lengths]
        entry.prepare(lengths=lengths, right_padding=padding)
    logits = STEERED(rows, cache)
    for index, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        alone = run(text, tokens=rows[index][:length])
        assert mx.allclose(logits[index, :length], alone, atol=1e-5)


def test_a_row_beside_conditions_has_the_bits_it_has_beside_unsteered_rows() -> None:
    tokens = mx.stack([TOKENS] * 3)

    def beside(text: str) -> mx.array:
        rows = RowCache([Row(Control(plan(t)), PROMPT) for t in (text, "push:0", text)])
        cache = [*make_prompt_cache(HOOKS.model), rows]
        return mx.stack([STEERED(tokens[:, at : at + 1], cache)[1] for at in range(LENGTH)])

    plain = beside("push:0")
    for text in CASES:
        assert mx.array_equal(beside(text), plain)


def decode_primitives(text: str, seen: int) -> int:
    """Operations in the graph of one decoded token, `seen` tokens on."""
    cache = STEERED.new_cache(Row(Control(plan(text)), PROMPT))
    for at in range(seen):
        mx.eval(STEERED(TOKENS[None, at : at + 1], cache), [e.state for e in cache])
    token = mx.array([[1]])
    mx.eval(token)
    return primitives(STEERED(token, cache))


def test_a_term_that_does_not_act_adds_nothing_to_the_graph() -> None:
    plain, steady = (decode_primitives(text, 10) for text in ("push:0", "push:1r"))
    assert steady == plain + len(PUSH.layers)
    assert decode_primitives("push:1r@first(3)", 10) == plain
    assert decode_primitives("push:1r@after(9)", 10) == plain
    assert decode_primitives("push:1r@first(30)", 10) == steady
    assert decode_primitives("push:1r@when(code>1000)", 10) == plain
    assert decode_primitives("push:1r@when(code>-1000)", 10) == steady


def test_decay_costs_one_multiplication_a_place() -> None:
    """And the view that broadcasts the share."""
    steady, fading = (decode_primitives(f"push:1r{at}", 10) for at in ("", "@decay(5)"))
    assert fading - steady == 2 * len(PUSH.layers)


def test_a_plan_that_comes_late_counts_from_the_start_of_the_answer() -> None:
    row = Row(Control(None), PROMPT)
    entries, found = STEERED.new_cache(row), []
    for at in range(LENGTH):
        row.control.plan = plan("push:1r@first(9)") if at >= PROMPT + 3 else None
        found.append(STEERED(TOKENS[None, at : at + 1], entries)[0, 0])
    expected, _ = reference(lambda count, _: float(4 <= count < 9))
    assert mx.allclose(mx.stack(found), expected, atol=1e-5)


def test_a_gate_stays_open_when_only_the_strength_moves() -> None:
    """And is shut for a plan that has it anew."""
    row = Row(Control(plan(f"push:1r@{WHEN}")), PROMPT)
    cache = STEERED.new_cache(row)
    STEERED(TOKENS[None, :PROMPT], cache)
    row.open_gates, row.readings = {row.gates[0].key: True}, None
    for text, opened in ((f"push:2r@{WHEN}", 1), ("push:1r", None), (f"push:2r@{WHEN}", 0)):
        weights = row.weights(1, plan(text))
        assert weights is None if opened is None else weights.tolist() == [[opened]]


def test_a_new_turn_shuts_the_gates() -> None:
    row = Row(Control(plan("push:1r@when(code>-1000)")), PROMPT)
    cache = STEERED.new_cache(row)
    STEERED(TOKENS[None, :10], cache)
    assert row.weights(1, row.control.plan).tolist() == [[1]]
    row.prompt_length = 14
    STEERED(TOKENS[None, 10:14], cache)
    row.readings = None
    assert row.weights(1, row.control.plan).tolist() == [[0]]


def test_gates_go_with_a_row_through_filtering_and_copying() -> None:
    rows = [Row(Control(plan(f"push:1r@when(code>{value})")), PROMPT) for value in (1000, -1000)]
    caches = [STEERED.new_cache(row) for row in rows]
    cache = [type(entries[0]).merge(entries) for entries in zip(*caches, strict=True)]
    for at in range(PROMPT):
        STEERED(mx.array([[TOKENS[at].item()]] * 2), cache)
    copied = copy.deepcopy(cache[-1])
    cache[-1].filter([1])
    for kept in (cache[-1], copied.extract(1)):
        assert [w.tolist() for w in kept.weights(1, kept.plans)] == [[[1]]]
    assert [w.tolist() for w in copied.weights(1, copied.plans)] == [[[0]], [[1]]]


def test_a_projection_and_a_turn_take_the_share_too() -> None:
    removed, turned = random_vector(3, op="project"), random_vector(4, norm_preserving=True)
    shape = tiny_shape(HOOKS)
    shares = [0.5 ** (count / 4) for count in range(8)]
    for vector, unit in ((removed, ""), (turned, "r")):
        decaying = build([(parse(f"v:1{unit}@decay(4)")[0], vector)], shape)
        cache = STEERED.new_cache(Row(Control(decaying), 1))
        live = STEERED.new_cache(row := Row(Control(None), 1))
        for at, share in enumerate(shares):
            row.control.plan = build([(parse(f"v:{share!r}{unit}")[0], vector)], shape)
            token = TOKENS[None, at : at + 1]
            assert mx.allclose(STEERED(token, cache), STEERED(token, live), atol=1e-5)


def test_a_shift_that_fades_is_not_removed_by_a_steady_projection() -> None:
    removed = random_vector(1, op="project")
    shape, text = tiny_shape(HOOKS), "v:1"
    both = build([(parse(text)[0], removed), (parse("v:1r@decay(2)")[0], PUSH)], shape)
    cache, place = STEERED.new_cache(Row(Control(both), 1)), (1, RESIDUAL)
    for count in range(4):
        token = TOKENS[None, count : count + 1]
        _, states = STEERED.read(token, cache, frozenset({place}))
        component = np.array(states[place][0, 0]) @ PUSH.directions[1]
        assert component == pytest.approx(PUSH.magnitude[1] * 0.5 ** (count / 2), abs=1e-3)


def test_states_read_of_a_cut_pass_are_those_of_the_whole() -> None:
    places = frozenset({(0, RESIDUAL), (3, RESIDUAL)})
    cache = STEERED.new_cache(Row(Control(plan(f"push:1r@{WHEN}")), PROMPT))
    logits, states = STEERED.read(TOKENS[None], cache, places)
    assert set(states) == places
    assert {state.shape[:2] for state in states.values()} == {logits.shape[:2]} == {(1, LENGTH)}
