"""A probe's readings: 0 at the negative pole, 1 at the positive one, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer.contrast import ContrastSet
from mlxsteer.errors import UsageError, VectorError
from mlxsteer.model import Model
from mlxsteer.probe import probe_of
from mlxsteer.vector import SteeringVector

POSITIVE, NEGATIVE = ["w7 w8", "w9 w8 w7"], ["w1 w2 w3", "w4 w1"]
TEXTS = ContrastSet.from_dict(
    {
        "name": "texts",
        "description": "Some words against others.",
        "labels": {"positive": "some", "negative": "others"},
        "combine": "texts",
        "pairs": [
            {"positive": up, "negative": down} for up, down in zip(POSITIVE, NEGATIVE, strict=True)
        ],
        "held_out": ["w50 w51", "w52 w53"],
        "metric": {"name": "words", "direction": "down"},
    }
)


@pytest.fixture(scope="module")
def extracted(tiny: Model) -> SteeringVector:
    return tiny.extract(TEXTS, show_progress=False, layers=(1, 2, 3))


def pole_means(model: Model, texts: list[str], layer: int) -> mx.array:
    """[D]: the average over texts of the average state from the second token on."""
    means = []
    for text in texts:
        tokens = model.tokenizer.encode(text)
        means.append(model.capture(tokens)["residual"][layer, 1:].mean(axis=0))
    return mx.stack(means).mean(axis=0)


@pytest.mark.parametrize("method", ["mean", "pca", "logistic", "whitened"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_poles_read_0_and_1(tiny: Model, method: str, sign: int) -> None:
    vector = tiny.extract(TEXTS, show_progress=False, layers=(1, 2), method=method)
    probe = probe_of(sign * vector, tiny.shape, layer=2)
    poles = [pole_means(tiny, texts, 2) for texts in (NEGATIVE, POSITIVE)]
    readings = [float(probe.read(pole)) for pole in poles[::sign]]  # -v exchanges the poles
    assert readings == pytest.approx([0, 1], abs=1e-3)


def test_the_scale_survives_a_file(extracted: SteeringVector, tiny: Model, tmp_path: Path) -> None:
    read_back = SteeringVector.load(extracted.save(tmp_path / "texts.safetensors"))
    first, second = (probe_of(vector, tiny.shape) for vector in (extracted, read_back))
    assert (first.origin, first.unit) == (second.origin, second.unit)


def test_a_strength_does_not_change_what_is_read(extracted: SteeringVector, tiny: Model) -> None:
    once, thrice = (probe_of(vector, tiny.shape) for vector in (extracted, 3 * extracted))
    assert (once.origin, once.unit) == (thrice.origin, thrice.unit)


def test_a_vector_without_poles_reads_in_residual_norms(tiny: Model) -> None:
    axis = np.eye(tiny.d_model, dtype=np.float32)[3]
    probe = probe_of(SteeringVector.from_arrays({1: 7 * axis, 2: axis, 3: axis}), tiny.shape)
    states = mx.random.normal((2, 5, tiny.d_model))
    expected = np.array(states)[..., 3] / tiny.residual_norm[2]
    assert probe.layer == 2  # the middle one
    np.testing.assert_allclose(probe.read(states), expected, rtol=1e-5)


def test_readings_are_float32_of_any_states(extracted: SteeringVector, tiny: Model) -> None:
    states = mx.ones((3, tiny.d_model), mx.bfloat16)
    assert probe_of(extracted, tiny.shape).read(states).dtype == mx.float32


def test_a_layer_without_a_direction_is_refused(extracted: SteeringVector, tiny: Model) -> None:
    with pytest.raises(UsageError, match=r"no direction at layer 0.*it has one at 1, 2, 3"):
        probe_of(extracted, tiny.shape, layer=0)


def test_a_vector_of_another_model_is_refused(tiny: Model) -> None:
    with pytest.raises(VectorError, match="has width 5"):
        probe_of(SteeringVector.from_arrays({0: np.ones(5)}), tiny.shape)


def test_several_directions_are_no_single_reading(tiny: Model) -> None:
    plane = np.eye(tiny.d_model, dtype=np.float32)[:2]
    vector = SteeringVector.from_arrays({1: plane}, op="project", n_layers=tiny.n_layers)
    with pytest.raises(VectorError, match="has 2 directions at layer 1"):
        probe_of(vector, tiny.shape)
