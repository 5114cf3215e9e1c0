"""Steering text becomes lengths per layer: the dose arithmetic of DESIGN part 3 by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsteer.errors import UsageError, VectorError
from mlxsteer.plan import ANSWER, PHASES_OF, PROMPT, THINK, TOOL
from mlxsteer.vector import SteeringVector
from tests.plans import AXIS, LAYERS, NORMS, SHAPE, SHARE, lengths, no_norms, plan, terse

# --- strength, dose, length ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "dose"),
    [
        ("terse:5", 0.4),
        ("terse:3", 0.24),
        ("terse:-5", -0.2),
        ("terse:-2", -0.08),
        ("terse:0.1d", 0.1),
        ("terse:-0.1d", -0.1),
        ("terse", 0.08),
    ],
)
def test_length_is_dose_times_share_times_the_median_norm(text, dose):
    made = plan((text, terse()), shape=replace(SHAPE, residual_norm=no_norms))
    assert made.terms[0].dose == pytest.approx(dose)
    assert made.terms[0].lengths == pytest.approx(dose * SHARE * NORMS, rel=1e-5)
    assert made.warnings == ()


def test_an_uncalibrated_vector_takes_0_3_for_both_signs_and_says_so():
    for text, dose in (("terse:5", 0.3), ("terse:-5", -0.3)):
        made = plan((text, terse(calibration=None)))
        assert made.terms[0].dose == pytest.approx(dose)
        assert made.warnings == (
            "terse is uncalibrated: strength 5 is taken as dose 0.3. To find its limit:"
            " mlxsteer calibrate terse",
        )
    assert plan(("terse:0.2d", terse(calibration=None))).warnings == ()


def test_a_sum_that_no_file_keeps_is_calibrated_in_python():
    [warning] = plan(("sum", replace(terse(calibration=None), name="2*terse - formal"))).warnings
    assert warning.endswith("To find its limit: model.calibrate(vector)")


def test_a_raw_multiple_adds_the_stored_arrays_and_asks_for_no_norms():
    arrays = {2: 3 * AXIS[0], 4: 5 * AXIS[1]}
    vector = SteeringVector.from_arrays(arrays, n_layers=LAYERS)
    shape = replace(SHAPE, residual_norm=no_norms)
    made = plan(("custom:-2r", vector), shape=shape)
    assert np.array_equal(made.terms[0].lengths, [0, 0, -6, 0, -10, 0])
    assert made.terms[0].dose is None
    edits = made.edit(ANSWER)
    assert np.array_equal(edits[2, "residual"].shift, -2 * arrays[2])
    assert np.array_equal(edits[4, "residual"].shift, -2 * arrays[4])
    assert np.array_equal(plan(("custom:1r", 3 * vector)).terms[0].lengths, [0, 0, 9, 0, 15, 0])


def test_without_shares_the_dose_follows_the_arrays_and_the_models_norms():
    vector = SteeringVector.from_arrays({2: 3 * AXIS[0], 4: 5 * AXIS[1]}, n_layers=LAYERS)
    share = np.array([0, 0, 3 / 30, 0, 5 / 50, 0]) / (3 / 30 + 5 / 50)
    assert lengths("v:0.2d", vector) == pytest.approx(0.2 * share * NORMS, rel=1e-5)
    even = replace(vector, magnitude=None)
    assert lengths("v:0.2d", even) == pytest.approx([0, 0, 3, 0, 5, 0], rel=1e-5)


def test_doses_of_all_layers_add_up_to_the_dose():
    made = lengths("terse:4", terse())
    assert (made / NORMS).sum() == pytest.approx(4 / 5 * 0.4)


strengths = st.floats(-6, 6).filter(lambda s: abs(s) > 1e-3)


@settings(deadline=None)
@given(strengths, st.floats(0.1, 3))
def test_a_scaled_vector_is_the_vector_at_the_scaled_strength(strength, factor):
    scaled = lengths(f"terse:{strength!r}", factor * terse())
    assert scaled == pytest.approx(lengths(f"terse:{strength * factor!r}", terse()), rel=1e-4)


@settings(deadline=None)
@given(strengths)
def test_two_v_at_one_is_v_at_two(strength):
    twice, vector = 2 * (strength * terse()), strength * terse()
    one, two = plan(("terse:1", twice)), plan(("terse:2", vector))
    for place, edit in one.edit(ANSWER).items():
        assert edit.shift == pytest.approx(two.edit(ANSWER)[place].shift, rel=1e-5)
    assert one.places == two.places


@settings(deadline=None)
@given(strengths)
def test_minus_v_is_v_at_the_opposite_strength(strength):
    one = plan((f"terse:{strength!r}", -terse())).edit(ANSWER)
    two = plan((f"terse:{-strength!r}", terse())).edit(ANSWER)
    for place, edit in one.items():
        assert edit.shift == pytest.approx(two[place].shift, rel=1e-5)


@settings(deadline=None)
@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_doses_of_two_terms_add(first, second):
    both = plan((f"terse:{first!r}d", terse()), (f"terse:{second!r}d", terse())).edit(ANSWER)
    one = plan((f"terse:{first + second!r}d", terse())).edit(ANSWER)
    for place, edit in both.items():
        assert edit.shift == pytest.approx(one[place].shift, rel=1e-4)


# --- project and clamp --------------------------------------------------------------------------


def test_a_projections_strength_is_the_share_removed():
    vector = terse(op="project", calibration=None)
    made = plan(("terse:0.5", vector))
    assert made.warnings == ()
    assert np.array_equal(made.terms[0].lengths, [0, 0, 0.5, 0.5, 0.5, 0])
    ((direction, share),) = made.edit(ANSWER)[3, "residual"].projections
    assert share == 0.5
    assert np.array_equal(direction, AXIS[0])
    assert lengths("terse:1", -vector)[3] == -1


def test_a_projection_takes_no_dose():
    with pytest.raises(UsageError, match=r"is a projection: .* not a dose\. Type terse:1"):
        plan(("terse:0.2d", terse(op="project")))


def test_a_projection_of_rank_k_removes_every_row():
    vector = SteeringVector.from_arrays({1: AXIS[:3]}, op="project", n_layers=LAYERS)
    removed = plan(("v:1", vector)).edit(ANSWER)[1, "residual"].projections
    assert [share for _, share in removed] == [1, 1, 1]
    assert np.array_equal([row for row, _ in removed], AXIS[:3])


def test_a_clamp_sets_the_component_to_the_length():
    made = plan(("terse:-5", terse(op="clamp")))
    ((direction, value),) = made.edit(ANSWER)[3, "residual"].clamps
    assert value == pytest.approx(-0.2 * 0.5 * 40)
    assert np.array_equal(direction, AXIS[0])


def test_a_norm_preserving_vector_turns():
    edit = plan(("terse:0.1d", terse(norm_preserving=True))).edit(ANSWER)[3, "residual"]
    assert edit.shift is None
    assert edit.turn == pytest.approx(0.1 * 0.5 * 40 * AXIS[0])


# --- positions ----------------------------------------------------------------------------------

LAST_BEFORE_ANSWER, LAST_BEFORE_THOUGHT = PROMPT | ANSWER, PROMPT | THINK


@pytest.mark.parametrize(
    ("positions", "acting"),
    [
        ("answer", {ANSWER, LAST_BEFORE_ANSWER}),
        ("think", {THINK, LAST_BEFORE_THOUGHT}),
        ("generated", {ANSWER, THINK, LAST_BEFORE_ANSWER, LAST_BEFORE_THOUGHT}),
        ("prompt", {PROMPT, LAST_BEFORE_ANSWER, LAST_BEFORE_THOUGHT}),
        ("all", {PROMPT, ANSWER, THINK, TOOL, LAST_BEFORE_ANSWER, LAST_BEFORE_THOUGHT}),
    ],
)
def test_positions_name_the_phases_they_act_in(positions, acting):
    phases = {PROMPT, ANSWER, THINK, TOOL, LAST_BEFORE_ANSWER, LAST_BEFORE_THOUGHT}
    made = plan((f"terse:1@{positions}", terse()))
    assert {phase for phase in phases if made.edit(phase)} == acting
    assert {phase for phase in phases if made.stamp(phase)} == acting


def test_a_term_without_positions_takes_the_vectors_own():
    assert plan(("terse:1", terse(positions="think"))).terms[0].positions == "think"
    assert plan(("terse:1@prompt", terse(positions="think"))).terms[0].positions == "prompt"
    assert plan(("terse:1", terse())).terms[0].positions == "answer"
    assert set(PHASES_OF) == {"answer", "think", "generated", "prompt", "all"}


# --- keys ---------------------------------------------------------------------------------------


def test_keys_are_equal_where_plans_do_the_same_and_differ_where_they_do_not():
    base = plan(("terse:2", terse())).key
    assert plan(("other:2", replace(terse(), name="other"))).key == base
    assert plan(("terse:0.16d", terse())).terms[0].dose == pytest.approx(0.16)
    for text, vector in (
        ("terse:3", terse()),
        ("terse:2@all", terse()),
        ("terse:2", terse(site="ffn_out")),
        ("terse:2", terse(norm_preserving=True)),
        ("terse:2", terse(op="clamp")),
    ):
        assert plan((text, vector)).key != base
    assert plan().key == ""


def test_strength_zero_leaves_no_trace():
    made = plan(("terse:0", terse(calibration=None)))
    assert not made
    assert made.places == set()
    assert made.key == made.stamp(ANSWER) == ""
    assert made.warnings == ()
    assert made.explain() == "nothing is steered"


# --- explain ------------------------------------------------------------------------------------


def test_explain_says_what_is_added_where_at_what_dose_on_which_positions():
    removed = replace(terse(op="project", site="ffn_out", calibration=None), name="refusal")
    turned = replace(terse(norm_preserving=True, calibration=None), name="formal")
    made = plan(("terse:-5", terse()), ("refusal:1@all", removed), ("formal:6@think", turned))
    assert made.explain() == (
        "terse:-5: add at residual, layers 2-4, on answer positions; dose -0.200 over 3 layers,"
        " length -4 to -1.5 per layer\n"
        "refusal:1@all: remove at ffn_out, layers 2-4, on all positions; share +1.00 of the"
        " component\n"
        "formal:6@think: add at residual, layers 2-4, on think positions; dose +0.360 over 3"
        " layers, length 2.7 to 7.2 per layer, norm kept\n"
        "formal:6 is above 5, the edge of coherent output; obeying.\n"
        "formal is uncalibrated: strength 5 is taken as dose 0.3. To find its limit:"
        " mlxsteer calibrate formal"
    )
    assert str(made) == "terse:-5, refusal:1@all, formal:6@think"


def test_explain_of_raw_arrays_on_scattered_layers():
    arrays = {0: AXIS[0], 2: AXIS[1], 3: 2 * AXIS[1], 5: AXIS[2]}
    vector = SteeringVector.from_arrays(arrays, n_layers=LAYERS)
    assert plan(("custom:2r", vector)).explain() == (
        "custom:2r: add at residual, layers 0, 2-3, 5, on answer positions; length 2 to 4 per layer"
    )


# --- warnings and errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "factor", "warns"),
    [
        ("terse:5", 1, False),
        ("terse:5.1", 1, True),
        ("terse:-6", 1, True),
        ("terse:2", 3, True),
        ("terse:0.9d", 1, False),
    ],
)
def test_strengths_above_the_edge_are_obeyed_with_a_warning(text, factor, warns):
    made = plan((text, factor * terse()))
    assert any("above 5, the edge of coherent output" in line for line in made.warnings) == warns
    assert made


@pytest.mark.parametrize(("share", "warns"), [("1", False), ("1.5", True)])
def test_a_share_of_more_than_all_is_obeyed_with_a_warning(share, warns):
    vector = SteeringVector.from_arrays({1: AXIS[0]}, op="project", name="off")
    made = plan((f"off:{share}", vector))
    assert any("more than the whole component" in line for line in made.warnings) == warns
    assert made


def test_a_vector_of_another_width_is_refused():
    with pytest.raises(VectorError, match=r"'terse' has width 4, tiny has 8: .* extract terse"):
        plan(("terse:1", terse()), shape=replace(SHAPE, d_model=8))


def test_a_vector_of_another_depth_is_refused_even_at_strength_zero():
    for layers in (5, 7):
        with pytest.raises(VectorError, match=r"is for a model of 6 layers .*layers 2 to 4"):
            plan(("terse:0", terse()), shape=replace(SHAPE, n_layers=layers))


def test_raw_arrays_of_an_unsaid_depth_fit_any_deeper_model():
    vector = SteeringVector.from_arrays({1: AXIS[0], 3: 2 * AXIS[0]})
    assert np.array_equal(lengths("v:1r", vector), [0, 1, 0, 2, 0, 0])
    with pytest.raises(VectorError, match=r"tiny has layers 0 to 2"):
        plan(("v:1r", vector), shape=replace(SHAPE, n_layers=3))


def test_a_vector_of_another_architecture_is_refused_unless_forced():
    vector = terse(model={"architecture": "qwen3"})
    with pytest.raises(VectorError, match=r"made on a qwen3 model; tiny is llama.*--force"):
        plan(("terse:1", vector))
    assert plan(("terse:1", vector), force=True)


@pytest.mark.parametrize(
    ("facts", "warning"),
    [
        ({"base_model": "c/d"}, "terse was made on c/d, not a/b."),
        ({"base_revision": "1"}, "terse was made on revision 1; this is 2."),
        ({"quantization": "q4"}, "terse was made on quantisation q4; this is q8."),
        ({"architecture": "llama", "base_model": "a/b"}, None),
    ],
)
def test_another_revision_or_quantisation_is_a_warning(facts, warning):
    stamp = {**SHAPE.stamp, "base_revision": "2", "quantization": "q8"}
    made = plan(("terse:1", terse(model=facts)), shape=replace(SHAPE, stamp=stamp))
    assert made.warnings == ((warning,) if warning else ())


def test_a_strength_without_known_norms_or_arrays_says_what_to_type():
    bare = terse(residual_norm=None, magnitude=None)
    with pytest.raises(VectorError, match=r"stores no raw lengths.*terse:3\).*terse:0.2d"):
        plan(("terse:1r", bare))
    assert lengths("terse:5", bare) == pytest.approx(0.4 * SHARE * NORMS)
