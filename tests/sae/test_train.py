"""Training recovers known directions, and an interrupted run is the run that was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer.errors import SaeError, UsageError
from mlxsteer.sae import objective
from mlxsteer.sae.activations import Activations
from mlxsteer.sae.dictionary import Dictionary
from mlxsteer.sae.train import Recipe, train
from tests.sae import synthetic

RECIPE = Recipe(features=64, k=3, epochs=4, batch=256, rate=0.01, dead_after=5000)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Activations:
    return synthetic.buffer(tmp_path_factory.mktemp("states") / "states.bf16")


def explained(dictionary: Dictionary, x: mx.array) -> float:
    residual = x - dictionary.reconstruct(x)
    centred = x - x.mean(axis=0)
    return 1 - float((residual * residual).sum() / (centred * centred).sum())


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu"])
def test_known_directions_are_recovered(data: Activations, architecture: str) -> None:
    dictionary, log = train(data, replace(RECIPE, architecture=architecture))
    x = data.rows(data.held_out())
    assert synthetic.recovered(np.array(dictionary.W_dec)) > 0.95  # 0.36 where training begins
    assert explained(dictionary, x) > 0.95
    assert float((dictionary.encode(x) > 0).sum(axis=-1).mean()) == pytest.approx(3, abs=0.3)
    assert log[-1]["explained_variance"] == pytest.approx(explained(dictionary, x), abs=0.05)


def test_decoder_rows_keep_length_1_and_activations_are_lengths(data: Activations) -> None:
    dictionary, _ = train(data, replace(RECIPE, epochs=0.5))
    np.testing.assert_allclose(mx.linalg.norm(dictionary.W_dec, axis=-1), 1, atol=1e-5)
    x = data.rows(data.held_out())
    again = dictionary.encode(x) @ dictionary.W_dec + dictionary.b_dec
    np.testing.assert_allclose(again, dictionary.reconstruct(x), atol=1e-4)


def flat(dictionary: Dictionary) -> dict[str, np.ndarray]:
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    arrays = {name: getattr(dictionary, name) for name in names}
    return {name: np.array(array) for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    data: Activations, tmp_path: Path, architecture: str
) -> None:
    recipe = replace(RECIPE, architecture=architecture, epochs=1.5, dead_after=600)
    whole, log = train(data, recipe)
    store = tmp_path / "checkpoint.safetensors"
    train(data, recipe, store, stop_after=33)
    train(data, recipe, store, stop_after=51)  # into the second epoch
    parts, parts_log = train(data, recipe, store)
    assert parts_log == log
    for name, array in flat(whole).items():
        assert np.array_equal(array, flat(parts)[name]), name


def test_a_run_that_dies_loses_only_what_came_after_its_checkpoint(
    data: Activations, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, epochs=1)
    store = tmp_path / "checkpoint.safetensors"

    def die(step: int, figures: dict[str, float]) -> None:
        if step == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, recipe, store, save_every=20, on_step=die)
    seen: list[int] = []
    train(data, recipe, store, save_every=20, on_step=lambda step, _: seen.append(step))
    assert seen[0] == 50


def test_a_checkpoint_of_other_settings_is_refused(data: Activations, tmp_path: Path) -> None:
    store = tmp_path / "checkpoint.safetensors"
    train(data, RECIPE, store, stop_after=1)
    with pytest.raises(SaeError, match="--restart"):
        train(data, replace(RECIPE, k=4), store)
    store.write_bytes(store.read_bytes()[:100])
    with pytest.raises(SaeError, match=r"damaged.*--restart"):
        train(data, RECIPE, store)


# --- the parts of the loss --------------------------------------------------------------------


@pytest.fixture
def small() -> tuple[objective.Params, mx.array]:
    x = mx.random.normal((64, 8), key=mx.random.key(1))
    return objective.initial(20, x, 4, "jumprelu", mx.random.key(0)), x


Activate = Callable[[str], mx.array]


@pytest.fixture
def activate(small: tuple[objective.Params, mx.array]) -> Activate:
    params, x = small
    pre = objective.pre_activations(params, x)
    return lambda architecture: objective.activate(params, pre, architecture, 4)


def test_topk_keeps_k_of_every_state_and_batchtopk_k_on_average(activate: Activate) -> None:
    per_state = (activate("topk") > 0).sum(axis=-1)
    assert per_state.max() <= 4
    in_batch = (activate("batchtopk") > 0).sum(axis=-1)
    assert int(in_batch.sum()) == 4 * 64
    assert len(set(in_batch.tolist())) > 1


def test_gradients_do_not_lengthen_decoder_rows(
    small: tuple[objective.Params, mx.array],
) -> None:
    params, _ = small
    grads = {name: mx.ones_like(array) for name, array in params.items()}
    along = (objective.without_growth(grads, params)["W_dec"] * params["W_dec"]).sum(axis=-1)
    np.testing.assert_allclose(along, 0, atol=1e-6)


def test_threshold_gradients_are_the_papers(small: tuple[objective.Params, mx.array]) -> None:
    """Equations 11 and 12 of Rajamanoharan et al. 2024, written out in numpy."""
    params, x = small
    pre = objective.pre_activations(params, x)
    weights = mx.random.normal(pre.shape, key=mx.random.key(2))

    def weighted(log_threshold: mx.array) -> mx.array:
        acts = objective.activate({"log_threshold": log_threshold}, pre, "jumprelu", 4)
        return (acts * weights).sum()

    found = mx.grad(weighted)(params["log_threshold"])
    theta = np.exp(np.array(params["log_threshold"]))
    width = objective.BANDWIDTH * theta
    kernel = (np.abs(np.array(pre) - theta) < width / 2) / width
    slope = -(theta * kernel * np.array(weights)).sum(axis=0)
    np.testing.assert_allclose(found, slope * theta, rtol=1e-4, atol=1e-5)
    assert np.abs(slope).max() > 0.1


def test_the_auxiliary_loss_teaches_dead_features_and_no_others(
    small: tuple[objective.Params, mx.array],
) -> None:
    params, x = small
    params = {**params, "b_enc": mx.where(mx.arange(20) < 5, -1.5, params["b_enc"])}

    def gradient(dead: mx.array | None) -> np.ndarray:
        def total(weights: mx.array) -> mx.array:
            changed = {**params, "W_dec": weights}
            return objective.loss(changed, x, dead, "batchtopk", 4, 8.0).loss

        return np.array(mx.grad(total)(params["W_dec"]))

    alone, helped = gradient(None), gradient(mx.arange(5))
    assert np.abs(helped[:5] - alone[:5]).max() > 1e-4
    np.testing.assert_allclose(helped[5:], alone[5:], atol=1e-6)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": "gated"}, "cannot be trained"),
        ({"k": 64}, "1 to 63"),
        ({"rate": 0}, "rate"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_refuses_a_recipe_that_cannot_work(changes: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        replace(RECIPE, **changes)  # type: ignore[arg-type]


def test_refuses_fewer_states_than_a_batch(data: Activations) -> None:
    with pytest.raises(SaeError, match="--tokens"):
        train(data, replace(RECIPE, batch=50_000))


def test_says_that_a_run_has_diverged(data: Activations) -> None:
    with pytest.raises(SaeError, match="--rate"):
        train(data, replace(RECIPE, rate=1e30))
