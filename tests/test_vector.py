"""Claims about a vector's arithmetic: what a strength means, and what sums and signs keep."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsteer.combination import combine
from mlxsteer.errors import VectorError
from mlxsteer.vector import DEFAULT_DELTA, EDGE, Calibration, SteeringVector

D, LAYERS = 8, 6
NORMS = np.linspace(10, 60, LAYERS).astype(np.float32)


def direction(seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=D).astype(np.float32)
    return raw / np.linalg.norm(raw)


def vector(seed: int = 0, name: str = "terse", layers=(2, 3, 4), **fields) -> SteeringVector:
    rows = {layer: direction(100 * seed + layer) for layer in layers}
    return SteeringVector(name, rows, LAYERS, residual_norm=NORMS, **fields)


def shift(v: SteeringVector, amount: float = 1.0, unit: str = "") -> np.ndarray:
    """[LAYERS, D]: what is added, from the definition in DESIGN, part 3."""
    lengths = v.lengths(amount, unit, None)
    out = np.zeros((LAYERS, D))
    for layer, row in v.directions.items():
        out[layer] = lengths[layer] * row
    return out


def test_strength_5_is_the_calibrated_limit_of_its_sign() -> None:
    v = vector(calibration=Calibration(0.4, 0.2))
    assert v.dose(EDGE) == pytest.approx(0.4)
    assert v.dose(-EDGE) == pytest.approx(-0.2)
    assert vector().dose(EDGE) == pytest.approx(DEFAULT_DELTA)


def test_the_doses_of_the_layers_sum_to_the_dose() -> None:
    v = vector(layer_share=np.array([0, 0, 0.5, 0.3, 0.2, 0], np.float32))
    doses = np.linalg.norm(shift(v, 0.25, "d"), axis=1) / NORMS
    np.testing.assert_allclose(doses, [0, 0, 0.125, 0.075, 0.05, 0], rtol=1e-5)


def test_a_multiple_is_the_same_as_a_higher_strength() -> None:
    v = vector(calibration=Calibration(0.4, 0.2))
    np.testing.assert_allclose(shift(3 * v), shift(v, 3), rtol=1e-6)
    np.testing.assert_allclose(shift(v / 2), shift(v, 0.5), rtol=1e-6)
    np.testing.assert_allclose(shift(-3 * v), shift(v, -3), rtol=1e-6)


def test_minus_undoes_and_swaps_limits_and_labels() -> None:
    v = vector(
        calibration=Calibration(0.4, 0.2), about={"positive_label": "a", "negative_label": "b"}
    )
    np.testing.assert_allclose(shift(-v, 2), shift(v, -2), rtol=1e-6)
    assert (-v).calibration == Calibration(0.2, 0.4)
    assert (-v).about["positive_label"] == "b"
    negative = -v
    twice = -negative
    np.testing.assert_array_equal(shift(twice), shift(v))


def test_a_sum_adds_the_shifts_at_strength_1() -> None:
    a = vector(1, calibration=Calibration(0.4, 0.1))
    b = vector(2, "formal", layers=(3, 4, 5), calibration=Calibration(0.2, 0.3))
    np.testing.assert_allclose(shift(2 * a - b), 2 * shift(a) + shift(b, -1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(shift(3 * (a + b)), shift(a, 3) + shift(b, 3), rtol=1e-4, atol=1e-6)
    assert (a + b).calibration is None
    assert (a + b).about["parents"] == ["terse", "formal"]


def test_a_sum_keeps_raw_arrays_for_raw_vectors() -> None:
    a = SteeringVector.from_arrays({1: np.full(D, 2.0)}, n_layers=LAYERS)
    b = SteeringVector.from_arrays({1: np.arange(D), 2: np.ones(D)}, n_layers=LAYERS)
    total = shift(a + b, 1, "r")
    np.testing.assert_allclose(total[1], 2 + np.arange(D), rtol=1e-5)
    np.testing.assert_allclose(total[2], np.ones(D), rtol=1e-5)


def test_a_sum_survives_a_norm_of_zero_on_an_idle_layer() -> None:
    norms = NORMS.copy()
    norms[0] = 0
    a, b = (SteeringVector(n, {2: direction(2)}, LAYERS, residual_norm=norms) for n in "ab")
    np.testing.assert_allclose(shift(a + b), 2 * shift(a), rtol=1e-5)


def test_a_sum_of_vectors_of_open_depth_stays_open() -> None:
    a = SteeringVector.from_arrays({1: np.ones(D)})
    assert (a + a).about["n_layers_known"] is False


def test_at_is_the_mean_cosine_over_common_layers() -> None:
    a, b = vector(1), vector(2, layers=(3, 4, 5))
    expected = [float(a.directions[layer] @ b.directions[layer]) for layer in (3, 4)]
    assert a @ b == pytest.approx(np.mean(expected), abs=1e-6)
    assert a @ a == pytest.approx(1)
    assert a @ -a == pytest.approx(-1)


def test_raw_multiples_give_back_the_arrays() -> None:
    arrays = {1: np.arange(D, dtype=np.float32), 4: -3 * np.ones(D, np.float32)}
    v = SteeringVector.from_arrays(arrays, n_layers=LAYERS)
    for layer, array in arrays.items():
        np.testing.assert_allclose(shift(v, 0.5, "r")[layer], 0.5 * array, rtol=1e-6)


def test_the_sign_of_a_projection_is_its_effect_and_not_its_direction() -> None:
    v = SteeringVector.from_arrays({1: np.ones(D)}, op="project", n_layers=LAYERS)
    assert v.share_removed(0.5) == 0.5
    assert (-v).share_removed(0.5) == -0.5
    assert (2 * v).share_removed(0.5) == 1.0
    np.testing.assert_array_equal((-v).directions[1], v.directions[1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SteeringVector.from_arrays({}), "at least one layer"),
        (lambda: SteeringVector.from_arrays({3: np.zeros(D)}), "layer 3.*all zeros"),
        (lambda: SteeringVector.from_arrays({3: np.full(D, np.nan)}), "NaN"),
        (lambda: SteeringVector.from_arrays({9: np.ones(D)}, n_layers=6), "9 is out of range"),
        (lambda: SteeringVector.from_arrays({1: np.ones(D), 2: np.ones(D + 1)}), "mixes widths"),
        (lambda: SteeringVector.from_arrays({1: np.ones((2, D))}), "op `add` is \\[d\\]"),
        (lambda: SteeringVector.from_arrays({1: np.ones(D)}, op="rotate"), "Unknown op 'rotate'"),
        (lambda: SteeringVector.from_arrays({1: np.ones(D)}, site="mlp"), "Unknown site 'mlp'"),
        (
            lambda: SteeringVector.from_arrays({1: np.ones((2, D))}, op="project"),
            "must be orthonormal",
        ),
        (lambda: SteeringVector("x", {1: np.full(D, 2.0)}, 3), "not 1"),
        (lambda: vector(layer_share=np.ones(LAYERS, np.float32)), "sums to 6"),
        (lambda: vector() * 0, "no direction"),
        (lambda: vector() - vector(), "cancel"),
        (lambda: combine([]), "nothing to combine"),
        (lambda: vector() @ vector(layers=(5,)), "share no layer"),
        (lambda: vector().lengths(1, "r", None), "stores no raw lengths"),
        (lambda: SteeringVector.from_arrays({1: np.ones(D)}).lengths(1, "", None), "residual norm"),
        (
            lambda: vector() + SteeringVector.from_arrays({1: np.ones(D)}, n_layers=LAYERS),
            "has no residual norms",
        ),
        (
            lambda: (
                vector() + SteeringVector.from_arrays({1: np.ones(D)}, op="project", n_layers=6)
            ),
            "op is add and project.*as terms",
        ),
    ],
)
def test_what_is_no_vector_is_refused_with_the_reason(make, says: str) -> None:
    with pytest.raises(VectorError, match=says):
        make()


def test_the_name_of_a_combination_says_what_it_is_made_of() -> None:
    terse = SteeringVector.from_arrays({0: [1.0, 0.0]}, name="terse")
    formal = SteeringVector.from_arrays({0: [0.0, 1.0]}, name="formal")
    assert (2 * terse - formal).name == "2*terse - formal"
    assert (formal + terse).name == "formal + terse"
    twice = -terse
    assert (-twice).name == "terse"
