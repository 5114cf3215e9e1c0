"""The forward pass against golden logits of independent implementations (spec, part H)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer.models.deepseek_v4.fusing import Switch
from tests.v4.tiny import (
    EXACT,
    FakeTaps,
    config,
    golden,
    largest,
    loaded,
    model,
    pieces,
    run,
    token_ids,
    weights,
)


@pytest.fixture
def tapped():
    """The golden model, with taps to install; they are removed afterwards."""
    built = model()
    yield built
    for layer in built.layers:
        layer.taps = None


@pytest.fixture(params=["in NumPy", "in MLX"])
def step_in(request, monkeypatch):
    """Decode steps as a CPU runs them, and as a GPU does without its kernels."""
    monkeypatch.setattr(Switch, "on_host", request.param == "in NumPy")


def test_full_forward_equals_golden_logits():
    assert largest(model()(token_ids())[0], golden("tiny_fp32")["logits"]) < EXACT


def test_prefill_with_a_cache_equals_golden_logits():
    assert largest(run(model(), token_ids(), [300]), golden("tiny_fp32")["logits"]) < EXACT


@pytest.mark.parametrize("size", [3, 10, 64, 129, 256])
def test_prefill_in_pieces_equals_golden_logits(size):
    T = 150 if size == 3 else 300
    logits = run(model(), token_ids()[:, :T], pieces(T, size))
    assert largest(logits, golden("tiny_fp32")["logits"][:T]) < EXACT


@pytest.mark.usefixtures("step_in")
@pytest.mark.parametrize("split", [1, 5, 7, 8, 9, 127, 128, 130, 200])
def test_decode_from_any_split_equals_full_prefill(split):
    steps = 12
    logits = run(model(), token_ids(), [split] + [1] * steps)
    assert largest(logits, golden("tiny_fp32")["logits"][: split + steps]) < EXACT


@pytest.mark.usefixtures("step_in")
def test_decode_from_the_first_token_equals_golden():
    logits = run(model(), token_ids(), [1] * 30)
    assert largest(logits, golden("tiny_fp32")["logits"][:30]) < EXACT


@pytest.mark.usefixtures("step_in")
@pytest.mark.slow
def test_decode_of_every_token_equals_golden():
    logits = run(model(), token_ids(), [1] * 300)
    assert largest(logits, golden("tiny_fp32")["logits"]) < EXACT


def test_a_forward_without_cache_is_causal():
    ids = token_ids()[:, :90]
    changed = mx.concatenate([ids[:, :60], (ids[:, 60:] + 1) % 64], axis=1)
    a, b = model()(ids)[0], model()(changed)[0]
    assert largest(a[:60], b[:60]) < 1e-5
    assert largest(a[60:], b[60:]) > 1e-2


def assert_close(logits, want, rounding: bool) -> None:
    """With rounding, a value on the edge of two codes may take the other one."""
    assert largest(logits, want) < (1e-2 if rounding else EXACT)
    assert np.square(np.array(logits) - want).mean() ** 0.5 < EXACT


@pytest.mark.parametrize(("rounding", "name"), [(False, "logits"), (True, "logits_qat")])
def test_official_fp8_and_fp4_tensors_give_golden_logits(rounding, name):
    z = golden("tiny_fp8fp4")
    logits = model("tiny_fp8fp4", rounding)(token_ids("tiny_fp8fp4"))[0]
    assert_close(logits, z[name], rounding)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_activation_rounding_is_the_same_in_pieces(size):
    z = golden("tiny_fp8fp4")
    built = model("tiny_fp8fp4", True)
    T = 40 if size == 1 else 100
    logits = run(built, token_ids("tiny_fp8fp4")[:, :T], pieces(T, size))
    assert_close(logits, z["logits_qat"][:T], rounding=True)


@pytest.mark.parametrize("name", ["tiny_fp32", "tiny_fp8fp4"])
def test_streams_after_every_block_equal_golden(name):
    z, built = golden(name), model(name, False)
    T, L = z["streams"].shape[:2]
    taps = [FakeTaps() for _ in range(L)]
    for layer, tap in zip(built.layers, taps, strict=True):
        layer.taps = tap
    built(token_ids(name)[:, :T])
    for layer in built.layers:
        layer.taps = None
    for i, tap in enumerate(taps):
        # streams reach 100: float32 itself is good to 1e-5 there
        assert np.allclose(tap.seen["residual"][0], z["streams"][:, i], rtol=5e-6, atol=EXACT)


def test_adding_to_all_streams_equals_golden_steered_logits(tapped):
    z = golden("tiny_fp32")
    v = mx.array(z["steer_vec"])
    tapped.layers[int(z["steer_layer"])].taps = FakeTaps(residual=lambda X: X + v)
    assert largest(tapped(token_ids())[0], z["logits_steered"]) < EXACT
    assert largest(run(tapped, token_ids(), pieces(300, 64)), z["logits_steered"]) < EXACT


@pytest.mark.usefixtures("step_in")
def test_steered_decode_equals_golden_steered_logits(tapped):
    z = golden("tiny_fp32")
    v = mx.array(z["steer_vec"])
    tapped.layers[int(z["steer_layer"])].taps = FakeTaps(residual=lambda X: X + v)
    logits = run(tapped, token_ids(), [120] + [1] * 20)
    assert largest(logits, z["logits_steered"][:140]) < EXACT


def test_stream_site_with_four_equal_rows_is_the_residual_site(tapped):
    v = mx.random.normal((32,), key=mx.random.key(1))
    tapped.layers[2].taps = FakeTaps(residual=lambda X: X + v)
    a = tapped(token_ids()[:, :40])
    tapped.layers[2].taps = FakeTaps(stream=lambda X: X + mx.broadcast_to(v, (4, 32)))
    assert largest(a, tapped(token_ids()[:, :40])) < 1e-6


def test_the_streams_see_what_a_writer_site_was_edited_to(tapped):
    """An edit of ffn_out reaches stream k with the weight post_k, and nothing else changes."""
    ids, layer = token_ids()[:, :20], tapped.layers[2]
    layer.taps = plain = FakeTaps()
    tapped(ids)
    layer.taps = edited = FakeTaps(ffn_out=lambda f: f + 1.0)
    tapped(ids)
    assert largest(plain.seen["attn_out"], edited.seen["attn_out"]) == 0
    post = np.array(edited.seen["residual"] - plain.seen["residual"])
    assert np.ptp(post, axis=-1).max() < 1e-4
    assert post.min() > 0
    assert post.max() < 2


def test_an_edit_sees_float32_streams_though_the_model_is_bfloat16():
    built = loaded(config("tiny_fp32"), weights())
    built.apply(lambda p: p.astype(mx.bfloat16) if p.dtype == mx.float32 else p)
    built.layers[1].taps = tap = FakeTaps()
    X = mx.random.normal((1, 3, 4, 32)).astype(mx.bfloat16)
    layer, cache = built.layers[1], built.make_cache()
    # gather_mm of bfloat16 does not exist on the CPU: the experts are stood in for.
    layer.ffn.switch_mlp = lambda x, e: mx.zeros((*e.shape, x.shape[-1]))
    out = layer(X, token_ids()[:, :3], cache[1], cache[1].span(1, 3, mx.bfloat16))
    assert tap.seen["residual"].dtype == mx.float32
    assert out.dtype == mx.bfloat16


def test_residual_reading_is_the_float32_mean_of_the_streams():
    X = mx.random.normal((1, 3, 4, 32)).astype(mx.bfloat16)
    reading = model().residual_reading(X)
    assert reading.dtype == mx.float32
    assert largest(reading, np.array(X.astype(mx.float32)).mean(axis=2)) < 1e-6
