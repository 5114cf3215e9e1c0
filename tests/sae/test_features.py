"""Features as vectors: names, `add`, `clamp` against arithmetic by hand, files, bad names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer import library, ops
from mlxsteer.edits import Stacker
from mlxsteer.errors import SaeError, VectorError
from mlxsteer.model import Model
from mlxsteer.plan import PROMPT
from mlxsteer.sae import features, folder, labels, shelf
from mlxsteer.sae.dictionary import Dictionary, Gate
from mlxsteer.sae.labels import Label
from mlxsteer.vector import Calibration, Encoder, SteeringVector

pytestmark = pytest.mark.usefixtures("own_folders")
D, F, LAYER = 32, 12, 2
RNG = np.random.default_rng(3)
KINDS = ["standard", "jumprelu", "batchtopk", "gated"]


def dictionary(kind: str = "jumprelu", scale: float = 1.7, **fields: object) -> Dictionary:
    """A random one whose decoder rows are not of length 1."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32))

    rows = np.array(array(F, D))
    rows = scale * rows / np.linalg.norm(rows, axis=1, keepdims=True)
    gate = Gate(array(F), 0.3 * array(F), array(F)) if kind == "gated" else None
    parts = {
        "W_enc": array(D, F),
        "W_dec": mx.array(rows),
        "b_dec": array(D),
        "b_enc": None if gate else array(F),
        "threshold": mx.abs(array(F)) if kind in ("jumprelu", "batchtopk") else None,
        "k": 4 if kind == "topk" else None,
        "gate": gate,
        "about": {"layer": LAYER, "site": "residual"},
    }
    return Dictionary(kind, **{**parts, **fields})  # type: ignore[arg-type]


@pytest.fixture
def kept(tiny: Model) -> Dictionary:
    made = dictionary()
    folder.write(made, shelf.place_for("small", tiny.key))
    return made


STATES = (3 * RNG.normal(size=(1, 6, D))).astype(np.float32)


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [True, False])
def test_the_encoder_of_a_feature_reads_what_the_dictionary_reads(kind: str, centred: bool) -> None:
    made = dictionary(kind, apply_b_dec_to_input=centred)
    acts = np.array(made.encode(mx.array(STATES)))
    assert 0 < (acts > 0).mean() < 1
    for index in range(F):
        reading = features.encoder_of(made, index).read(STATES)
        length = np.linalg.norm(made.feature(index))
        np.testing.assert_allclose(reading, acts[..., index] * length, rtol=1e-3, atol=1e-3)


def test_a_topk_feature_reads_without_its_rivals() -> None:
    made = dictionary("topk", scale=1.0)
    acts = np.array(made.encode(mx.array(STATES)))
    reading = np.stack([features.encoder_of(made, i).read(STATES) for i in range(F)], axis=-1)
    assert ((acts > 0) <= (reading > 0)).all()
    np.testing.assert_allclose(reading[acts > 0], acts[acts > 0], rtol=1e-4)


@pytest.mark.parametrize("way", features.STATEWISE)
def test_a_reading_that_is_not_affine_is_refused(way: str) -> None:
    with pytest.raises(SaeError, match="added but not clamped"):
        features.encoder_of(dictionary(normalize_activations=way), 0)


# --- clamping -----------------------------------------------------------------------------------


def test_clamping_sets_the_reading_and_keeps_the_rest(tiny: Model, kept: Dictionary) -> None:
    """h + (c - f(h))·W_dec: the activation's share changes, the reconstruction error stays."""
    edits = Stacker().edits([tiny.plan("sae/3/clamp:2.5r@all")], np.full((1, 6), PROMPT))
    moved = np.array(edits[LAYER, "residual"](mx.array(STATES)))
    acts = np.array(kept.encode(mx.array(STATES)))
    by_hand = STATES + (2.5 - acts[..., 3:4]) * kept.feature(3)
    np.testing.assert_allclose(moved, by_hand, atol=1e-4)


def test_features_are_read_before_any_is_set(tiny: Model, kept: Dictionary) -> None:
    acts = np.array(kept.encode(mx.array(STATES)))
    by_hand = STATES + (2 - acts[..., 3:4]) * kept.feature(3)
    by_hand = by_hand + (-1 - acts[..., 7:8]) * kept.feature(7) + 0.5 * kept.feature(1)
    for text in ("sae/3/clamp:2r@all, sae/7/clamp:-1r@all, sae/1:0.5r@all",
                 "sae/1:0.5r@all, sae/7/clamp:-1r@all, sae/3/clamp:2r@all"):  # fmt: skip
        edits = Stacker().edits([tiny.plan(text)], np.full((1, 6), PROMPT))
        moved = np.array(edits[LAYER, "residual"](mx.array(STATES)))
        np.testing.assert_allclose(moved, by_hand, atol=1e-4)


def test_a_row_never_feels_another_rows_feature(tiny: Model, kept: Dictionary) -> None:
    plans = [tiny.plan("sae/3/clamp:2r@all"), None, tiny.plan("sae/7/clamp:1r@all, sae/1:1r@all")]
    x = mx.array(np.repeat(STATES, 3, axis=0))
    edits = Stacker().edits(plans, np.full((3, 6), PROMPT))
    together = np.array(edits[LAYER, "residual"](x))
    assert np.array_equal(together[1], STATES[0])
    for row in (0, 2):
        alone = Stacker().edits([plans[row]], np.full((1, 6), PROMPT))[LAYER, "residual"]
        np.testing.assert_array_equal(together[row], np.array(alone(x[:1]))[0])


def test_of_streams_the_mean_is_read_and_each_gets_the_change() -> None:
    h = mx.array(RNG.normal(size=(2, 5, 4, D)).astype(np.float32))
    direction, row = (mx.array(RNG.normal(size=D).astype(np.float32)) for _ in range(2))
    one = mx.ones((1, 1, 1, 1))
    moved = ops.clamp_feature(h, h, direction, 3 * one, one, (row, 0.2 * one, 0.5 * one))
    reading = Encoder(np.array(row), 0.2, 0.5).read(np.array(h).mean(axis=2))
    by_hand = np.array(h) + ((3 - reading)[..., None] * np.array(direction))[:, :, None]
    np.testing.assert_allclose(np.array(moved), by_hand, atol=1e-4)


def test_strength_zero_is_bit_identical_and_others_are_not(tiny: Model, kept: Dictionary) -> None:
    tokens = [3, 9, 20, 31, 8]
    plain = np.array(tiny.logits(tokens))
    for off in ("sae/3:0@all", "sae/3/clamp:0@all, sae/4:0"):
        assert np.array_equal(plain, np.array(tiny.logits(tokens, steer=off)))
    steered = {text: np.array(tiny.logits(tokens, steer=text))
               for text in ("sae/3:5@all", "sae/3/clamp:5@all")}  # fmt: skip
    assert not any(np.allclose(plain, logits, atol=1e-3) for logits in steered.values())


def test_a_strength_is_a_dose_as_of_any_vector(tiny: Model, kept: Dictionary) -> None:
    plan = tiny.plan("sae/3:5")
    (planned,) = plan.terms
    assert planned.lengths[LAYER] == pytest.approx(0.3 * tiny.residual_norm[LAYER], rel=1e-5)
    assert "mlxsteer calibrate sae/small/3" in plan.warnings[0]
    clamped = tiny.plan("sae/3/clamp:5")
    assert clamped.terms[0].lengths[LAYER] == planned.lengths[LAYER]
    assert "set the feature at residual" in clamped.explain()
    assert "uncalibrated" in clamped.warnings[0]


# --- names --------------------------------------------------------------------------------------


def test_names_with_one_dictionary_and_with_two(tiny: Model, kept: Dictionary) -> None:
    assert library.find("sae/3", tiny.key).name == "sae/small/3"
    assert library.find("sae/small/3/clamp", tiny.key).name == "sae/small/3/clamp"
    folder.write(dictionary("standard"), shelf.place_for("other", tiny.key))
    with pytest.raises(SaeError, match="sae/other/3 or sae/small/3"):
        library.find("sae/3", tiny.key)
    assert library.find("sae/other/3", tiny.key).about["dictionary"] == "other"


def test_a_feature_goes_by_its_label(tiny: Model, kept: Dictionary) -> None:
    place = shelf.find("small", tiny.key)
    labels.keep(place, {5: Label("golden gate", 0.6, 12, 0.0, "demo")})
    labels.keep(place, {7: Label("Golden Gate", 0.9, 12, 0.0, "demo")})
    plan = tiny.plan("sae/golden gate:2r")
    assert plan.terms[0].vector.about["feature"] == 7  # the one that was detected better
    assert tiny.plan('"sae/small/golden gate":2r').terms[0].vector.about["feature"] == 7
    with pytest.raises(SaeError, match="Did you mean 'golden gate'"):
        tiny.plan("sae/goldn gate:2")
    folder.write(dictionary("standard"), shelf.place_for("other", tiny.key))
    assert tiny.plan("sae/golden gate:2r").terms[0].vector.about["dictionary"] == "small"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sae/12", "0 to 11"),
        ("sae/nothing", "mlxsteer sae find"),
        ("sae/other/3", "no dictionary 'other'.*sae/small/3"),
        ("sae/3/project", "no op of a feature.*sae/3/clamp"),
    ],
)
def test_a_name_that_means_nothing_says_what_to_type(
    tiny: Model, kept: Dictionary, name: str, message: str
) -> None:
    with pytest.raises(SaeError, match=message):
        tiny.plan(f"{name}:1")


def test_without_a_dictionary_the_message_says_how_to_train_one(tiny: Model) -> None:
    with pytest.raises(SaeError, match="mlxsteer sae train"):
        tiny.plan("sae/3:1")


def test_a_dictionary_without_a_place_is_refused(tiny: Model) -> None:
    folder.write(dictionary(about={}), shelf.place_for("lost", tiny.key))
    with pytest.raises(SaeError, match="sae import"):
        tiny.plan("sae/3:1")


# --- files --------------------------------------------------------------------------------------


def test_a_calibrated_feature_is_found_with_its_limits(
    tiny: Model, kept: Dictionary, tmp_path: Path
) -> None:
    found = library.find("sae/3/clamp", tiny.key)
    limits = Calibration(0.7, 0.4)
    path = replace(found, calibration=limits).save(library.own_path("sae/3/clamp", tiny.key))
    assert path.stem in library.available(tiny.key)
    again = library.find("sae/3/clamp", tiny.key)
    assert again.calibration is not None
    assert again.delta(1) == 0.7
    assert library.find("sae/3", tiny.key).calibration is None
    folder.write(dictionary("standard", b_dec=mx.zeros(D), W_dec=mx.ones((F, D))),
                 shelf.find("small", tiny.key))  # fmt: skip
    assert library.find("sae/3/clamp", tiny.key).calibration is None  # another dictionary now


def test_a_clamp_survives_its_file(tiny: Model, kept: Dictionary, tmp_path: Path) -> None:
    vector = library.find("sae/3/clamp", tiny.key)
    read = SteeringVector.load(vector.save(tmp_path / "clamp.safetensors"))
    assert vector.encoder is not None
    assert read.encoder is not None
    np.testing.assert_array_equal(read.encoder.row, vector.encoder.row)
    assert read.encoder.threshold == pytest.approx(vector.encoder.threshold, rel=1e-6)
    assert read.encoder.bias == pytest.approx(vector.encoder.bias, rel=1e-6)


def test_a_clamp_has_no_opposite_and_no_second_layer(tiny: Model, kept: Dictionary) -> None:
    vector = library.find("sae/3/clamp", tiny.key)
    with pytest.raises(VectorError, match="negative"):
        _ = -vector
    with pytest.raises(VectorError, match="one layer"):
        replace(vector, directions={1: vector.directions[LAYER], 2: vector.directions[LAYER]})
    with pytest.raises(VectorError, match="row is"):
        replace(vector, encoder=Encoder(np.ones(3, np.float32), 0.0))
