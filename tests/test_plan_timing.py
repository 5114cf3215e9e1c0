"""Conditions and schedules in a plan: what they read, when they act, what shares a slot."""

import numpy as np
import pytest

from mlxsteer.errors import UsageError, VectorError
from mlxsteer.fitting import ModelShape
from mlxsteer.grammar import parse
from mlxsteer.plan import ANSWER, PROMPT, THINK, Plan, build
from mlxsteer.vector import SteeringVector
from tests.plans import AXIS, LAYERS, NORMS, SHAPE, plan, terse


def code(**fields) -> SteeringVector:
    """Layers 1 to 3 along the second axis; its poles read 2 and 6 at layer 2."""
    reports = [{"layer": 2, "negative_reading": 2.0, "positive_reading": 6.0}]
    made = {"residual_norm": NORMS, "about": {"layer_reports": reports}, **fields}
    return SteeringVector("code", dict.fromkeys((1, 2, 3), AXIS[1]), LAYERS, **made)


def timed(text: str, shape: ModelShape = SHAPE, **vectors: SteeringVector) -> Plan:
    found = {"terse": terse(), "code": code(), **vectors}
    pairs = [(term, found[term.name]) for term in parse(text)]
    return build(pairs, shape, find=found.__getitem__)


def test_explain_says_what_conditions_and_schedules_do():
    dose = "layers 2-4, on answer positions; dose +0.240 over 3 layers, length 1.8 to 4.8 per layer"
    assert timed("terse:3@first(40)").explain() == (
        f"terse:3@first(40): add at residual, {dose}; up to token 40 of an answer"
    )
    assert timed("terse:3@when(code>0.5)@after(10)@decay(100)").explain() == (
        f"terse:3@when(code>0.5)@after(10)@decay(100): add at residual, {dose}; while code reads"
        " above 0.5 at layer 2 (until below 0.4), from token 11 of an answer on, halving every 100"
        " tokens"
    )
    assert "while code reads below 0 at layer 3 (until above 0.03)" in (
        timed("terse@when(code@3<0)").explain()
    )


def test_a_condition_reads_the_named_vector_on_its_own_scale():
    (gate,) = timed("terse@when(code>0.5)").gates
    assert (gate.probe.layer, gate.probe.origin, gate.probe.unit) == (2, 2.0, 4.0)
    (own,) = timed("terse@when(terse@4<0.5)").gates
    assert (own.probe.layer, own.probe.unit) == (4, NORMS[4])


def test_what_a_plan_reads_is_a_place_that_the_model_must_offer():
    probed = code(site="attn_out")
    assert (2, "attn_out") in timed("terse@when(code>0.5)", code=probed).places


def test_keys_tell_conditions_and_schedules_apart():
    texts = ["", "@first(4)", "@first(5)", "@after(4)", "@decay(4)", "@first(5)@after(4)"]
    texts += ["@when(code>0.5)", "@when(code>0.6)", "@when(code<0.5)", "@when(code@1>0.5)"]
    keys = [timed(f"terse:3{text}").key for text in texts]
    assert len(set(keys)) == len(texts)
    other = code(about={"layer_reports": []})
    assert timed("terse:3@when(code>0.5)", code=other).key not in keys


def test_terms_with_conditions_and_schedules_leave_the_prompt_alone():
    """So a prompt's cache is shared by all of them."""
    for text in ("terse:3@first(4)", "terse:3@think@decay(9)", "terse:3@when(code>0.5)"):
        made = timed(text)
        assert made.stamp(PROMPT) == ""
        assert made.stamp(PROMPT | THINK | ANSWER)


def test_terms_of_one_timing_share_a_slot():
    made = timed("terse:3@first(4), code:1@first(4), terse:1@decay(2), terse:1")
    assert [timing.key for timing in made.timings] == [made.terms[i].timing.key for i in (0, 2)]
    assert made.weights([3, 4], {}) == pytest.approx(np.array([[1, 0.5**1.5], [0, 0.25]]))
    steady, first, fading = (made.edit(ANSWER, (slot,)) for slot in (-1, 0, 1))
    assert set(first) == {(layer, "residual") for layer in (1, 2, 3, 4)}
    assert np.array_equal(steady[3, "residual"].shift, fading[3, "residual"].shift)
    both = made.edit(ANSWER, (-1, 0))[3, "residual"].shift
    assert both == pytest.approx(first[3, "residual"].shift + steady[3, "residual"].shift)


def test_a_vector_that_acts_on_prompts_takes_no_schedule_until_told_where():
    everywhere = terse(positions="all")
    with pytest.raises(UsageError, match=r"'terse' acts on all .* terse:3@generated@first\(4\)"):
        timed("terse:3@first(4)", terse=everywhere)
    assert timed("terse:3@generated@first(4)", terse=everywhere)


def test_strength_zero_leaves_no_trace_but_its_condition_is_checked():
    assert timed("terse:0@when(code>0.5)").places == set()
    with pytest.raises(UsageError, match="no direction at layer 0"):
        timed("terse:0@when(code@0>0.5)")
    with pytest.raises(VectorError, match="'code' has width 8"):
        timed("terse:1@when(code>0.5)", code=SteeringVector("code", {1: np.eye(8)[0]}, LAYERS))


def test_a_vector_to_read_that_nothing_leads_to_is_an_error():
    with pytest.raises(UsageError, match=r"no vector to read 'code' with.*code:0"):
        plan(("terse:1@when(code>0.5)", terse()))


def test_more_timings_than_fit_are_refused():
    many = ", ".join(f"terse:1@first({count})" for count in range(1, 34))
    with pytest.raises(UsageError, match="33 different conditions and schedules are too many"):
        timed(many)
