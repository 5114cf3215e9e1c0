"""Metal kernels, run as C++, equal their plain definitions; alone and in the whole model."""

from __future__ import annotations

import shutil
import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer.models.deepseek_v4 import (
    attention,
    compressor,
    experts,
    hyper_connections,
    indexer,
    kernels,
    selection_kernels,
)
from mlxsteer.models.deepseek_v4 import rounding as rounding_module
from mlxsteer.models.deepseek_v4.fusing import Switch, fused
from mlxsteer.models.deepseek_v4.launches import VIEWS, graph
from tests.v4 import emulate
from tests.v4.tiny import EXACT, golden, largest, model, run, token_ids

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

TWINS = {
    "front": hyper_connections.front,
    "finished_row": attention.finished_row,
    "chosen_rows": attention.chosen_rows,
    "combined": indexer.combined,
    "round_e2m1": rounding_module.round_e2m1,
    "pool": compressor.pool,
    "top_experts": experts.top_experts,
}


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(kernels, "launch", emulate.launch)
    monkeypatch.setattr(Switch, "kernels", True)


@needs_compiler
@pytest.mark.parametrize("name", TWINS)
def test_a_kernel_equals_its_definition(name, emulated):
    plain, kernel, sample = TWINS[name].pair
    assert kernels.largest_difference(kernel(*sample()), plain(*sample())) < 1e-5


@needs_compiler
@pytest.mark.parametrize("T", [1, 5, 9])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_front_kernel_equals_its_definition_for_any_tokens_and_type(T, dtype, emulated):
    plain, kernel, sample = TWINS["front"].pair
    _, *rest = sample()
    rest[-2] = dtype
    X = mx.random.normal((2, T, 4, 64)).astype(dtype)
    for a, b in zip(kernel(X, *rest), plain(X, *rest), strict=True):
        assert a.dtype == b.dtype
        ulp = 2.0**-7 if a.dtype == mx.bfloat16 else 1e-5
        assert np.allclose(a.astype(mx.float32), b.astype(mx.float32), rtol=ulp, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_expert_kernel_takes_the_top_k_and_their_weights(k, emulated):
    plain, kernel, _ = TWINS["top_experts"].pair
    rng = np.random.default_rng(1)
    logits = mx.array(rng.normal(0, 6, (7, 20)).astype(np.float32))
    biased = experts.biased_affinities(logits, mx.array(rng.normal(0, 1, 20).astype(np.float32)))
    for got, want in zip(_by_expert(*kernel(biased, logits, k)), _by_expert(*plain(biased, logits, k)), strict=True):  # fmt: skip  # noqa: E501
        assert largest(got, want) < 1e-5


def _by_expert(chosen, weights):
    order = np.argsort(np.array(chosen), axis=-1)
    return (np.take_along_axis(np.array(a), order, -1) for a in (chosen, weights))


@needs_compiler
def test_equal_affinities_choose_different_experts(emulated):
    chosen, weights = selection_kernels.top_experts(mx.zeros((1, 8)), mx.zeros((1, 8)), 4)
    assert chosen.tolist() == [[0, 1, 2, 3]]
    assert largest(weights, 0.25) < 1e-6


@needs_compiler
def test_a_model_on_kernels_decodes_to_the_golden_logits(emulated):
    logits = run(model(), token_ids(), [126, 1, 1, 1, 1, 1])
    assert largest(logits, golden("tiny_fp32")["logits"][:131]) < EXACT


@needs_compiler
def test_a_rounding_model_on_kernels_decodes_to_the_golden_logits(emulated):
    logits = run(model("tiny_fp8fp4", True), token_ids("tiny_fp8fp4"), [61, 1, 1, 1, 1])
    assert largest(logits, golden("tiny_fp8fp4")["logits_qat"][:65]) < 1e-2


def test_a_kernel_that_differs_is_not_used_and_says_so_once(monkeypatch):
    monkeypatch.setattr(Switch, "kernels", True)

    @kernels.twin(lambda x: x + 1, lambda: (mx.zeros((2,)),))
    def double(x):
        return 2 * x

    with pytest.warns(UserWarning, match="double is not used: it is off by 1"):
        assert double(mx.array([3.0])).item() == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(mx.array([4.0])).item() == 8


def test_a_group_is_one_primitive_where_groups_are_compiled(monkeypatch):
    @fused
    def group(x, by, dtype):
        return (x * by + 1).astype(dtype)

    x = mx.array([1.0, 2.0])
    assert sum(n for name, n in graph(group(x, 3, mx.bfloat16)).items() if name not in VIEWS) == 3
    monkeypatch.setattr(Switch, "compiling", True)
    assert graph(group(x, 3, mx.bfloat16))["compiled group"] == 1
    assert group(x, 3, mx.bfloat16).tolist() == [4, 7]
