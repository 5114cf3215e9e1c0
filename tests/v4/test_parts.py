"""Parts of the model against closed forms and independent arithmetic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxsteer.models.deepseek_v4 import ModelArgs
from mlxsteer.models.deepseek_v4.experts import SwitchMLP, clamped_swiglu
from mlxsteer.models.deepseek_v4.fusing import Switch
from mlxsteer.models.deepseek_v4.hyper_connections import expand, gates
from mlxsteer.models.deepseek_v4.indexer import index_scores, top_rows
from mlxsteer.models.deepseek_v4.rope import inverse_frequencies, rope_of
from mlxsteer.models.deepseek_v4.rounding import power_of_two_above, round_e2m1, round_e4m3
from tests.v4.test_config import FLASH
from tests.v4.tiny import config, largest

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_yarn_frequencies_are_the_published_check_values():
    inv = inverse_frequencies(ModelArgs.from_dict(FLASH), 4)
    want = {0: 1, 1: 0.687656, 2: 0.472871, 3: 0.325172, 15: 0.00363554, 16: 0.00226562}
    assert all(abs(inv[i] / value - 1) < 1e-5 for i, value in want.items())
    assert abs(inv[31] / 5.68053e-7 - 1) < 1e-5


def test_layers_without_rows_turn_by_theta_alone():
    inv = inverse_frequencies(ModelArgs.from_dict(FLASH), 0)
    assert np.allclose(inv, 10000.0 ** (-np.arange(32) / 32))


@pytest.mark.parametrize("position", [0, 5, 1000, 1_000_000])
def test_rotation_turns_pairs_of_the_last_dims_and_back(position):
    args = ModelArgs.from_dict(FLASH)
    rope = rope_of(args, 4, args.head_dim)
    x = mx.random.normal((1, 2, 1, 512))
    y = np.array(rope(x, position))[0, :, 0]
    inv = inverse_frequencies(args, 4).astype(np.float32)
    angle = (np.float32(position) * inv).astype(np.float64)
    a, b = np.array(x)[0, :, 0, 448::2], np.array(x)[0, :, 0, 449::2]
    assert largest(y[:, :448], np.array(x)[0, :, 0, :448]) == 0
    allowed = 1e-5 + position * 1e-7  # a float32 angle has no more digits
    assert largest(y[:, 448::2], a * np.cos(angle) - b * np.sin(angle)) < allowed
    assert largest(y[:, 449::2], a * np.sin(angle) + b * np.cos(angle)) < allowed
    assert largest(rope(mx.array(y)[None, :, None], position, inverse=True), x) < 1e-5


def test_rows_of_a_batch_turn_at_their_own_positions():
    args = ModelArgs.from_dict(FLASH)
    rope = rope_of(args, 4, args.head_dim)
    x = mx.random.normal((2, 3, 512))
    both = rope(x, mx.array([7, 40]), step=4)
    assert largest(both[0], rope(x[:1], 7, step=4)[0]) == 0
    assert largest(both[1], rope(x[1:], 40, step=4)[0]) == 0


def test_scales_are_the_least_power_of_two_above():
    x = np.float32([1, 2, 2.0000002, 0.75, 448 / 448, 1e-30, 3e20])
    want = np.exp2(np.ceil(np.log2(x.astype(np.float64))))
    assert np.array_equal(np.array(power_of_two_above(mx.array(x))), want.astype(np.float32))


def test_e2m1_takes_the_nearest_code_and_the_even_one_at_ties():
    x = np.zeros((1, 32), np.float32)
    ties = (E2M1[:-1] + E2M1[1:]) / 2
    x[0, :8], x[0, 8:15], x[0, 15:22] = E2M1, ties, -ties
    got = np.array(round_e2m1(mx.array(x), mx.float32))[0]
    even = np.array([E2M1[i + i % 2] for i in range(7)])
    assert np.array_equal(got[:8], E2M1)
    assert np.array_equal(got[8:15], even)
    assert np.array_equal(got[15:22], -even)


def test_rounded_values_are_the_nearest_codes_times_a_block_scale():
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    e2m1 = lambda x: round_e2m1(x, mx.float32)  # noqa: E731
    for block, largest_code, rounded in ((64, 448, round_e4m3), (32, 6, e2m1)):
        y = np.array(rounded(mx.array(x))).reshape(-1, block)
        blocks = x.reshape(-1, block)
        amax = np.abs(blocks).max(1, keepdims=True)
        scale = np.exp2(np.ceil(np.log2(amax / largest_code)))
        codes = y / scale
        if block == 32:
            distance = np.abs(np.abs(blocks / scale)[..., None] - E2M1).min(-1)
            assert np.isin(np.abs(codes), E2M1).all()
            assert np.allclose(np.abs(codes - blocks / scale), distance, atol=1e-6)
        else:
            relative = np.abs(codes - blocks / scale) / np.maximum(np.abs(blocks / scale), 2**-6)
            assert relative.max() <= 2**-4


def test_mixing_matrices_carry_a_shift_of_all_streams_unchanged():
    u = 3 * mx.random.normal((2, 5, 24), key=mx.random.key(3))
    _, post, C = gates(u, mx.ones((2, 5, 1)), mx.ones((3,)), mx.zeros((24,)), 4, (20, 1e-6, 1e-6))
    X, out = mx.random.normal((2, 5, 4, 16)), mx.random.normal((2, 5, 16))
    v = mx.random.normal((16,))
    shift = expand(out, X + v, post, C) - expand(out, X, post, C)
    assert largest(shift, np.broadcast_to(np.array(v), shift.shape)) < 1e-5


def test_gates_are_clamped_from_above_only_and_up_on_both_sides():
    gate, up = mx.array([50.0, -50.0, 1.0]), mx.array([20.0, -20.0, 2.0])
    silu = lambda g: g / (1 + np.exp(-g))  # noqa: E731
    want = [silu(10.0) * 10, silu(-50.0) * -10, silu(1.0) * 2]
    assert largest(clamped_swiglu(gate, up, 10.0, mx.float32), want) < 1e-5


def test_selection_is_the_exact_top_k_of_signed_relu_scores():
    rng = np.random.default_rng(2)
    q, w = rng.standard_normal((1, 16, 3, 8)), rng.standard_normal((1, 3, 16))
    keys = rng.standard_normal((1, 40, 8))
    want = np.einsum("bhtr,bth->btr", np.maximum(np.einsum("bhtc,brc->bhtr", q, keys), 0), w)
    scores = index_scores(*(mx.array(a.astype(np.float32)) for a in (q, w, keys)))
    assert largest(scores, want) < 1e-4
    best = np.sort(np.array(top_rows(scores, 7)), -1)
    assert np.array_equal(best, np.sort(np.argsort(want, -1)[..., -7:], -1))


def test_experts_in_halves_equal_the_whole_in_any_thread(monkeypatch):
    mx.random.seed(0)
    args = ModelArgs.from_dict(config("tiny_fp32"))
    switch = SwitchMLP(args)
    switch.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.1, switch.parameters()))
    x, experts = mx.random.normal((3, args.hidden_size)), mx.array([[0, 1, 2]] * 3)

    def run() -> np.ndarray:
        return np.array(switch(x, experts))

    monkeypatch.setattr(Switch, "on_host", True)
    halves = run()
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(run).result()
    monkeypatch.setattr(Switch, "on_host", False)
    whole = run()
    np.testing.assert_allclose(halves, whole, atol=1e-6)
    np.testing.assert_array_equal(elsewhere, halves)
