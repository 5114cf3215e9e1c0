"""A CPU's decode steps in NumPy against the layers' modules."""

from __future__ import annotations

import pytest

from tests.v4 import random_models, tiny

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from mlxsteer.models.deepseek_v4 import host_step
from mlxsteer.models.deepseek_v4.fusing import Switch

STEPS = 24


@pytest.fixture
def served(monkeypatch):
    """Counts the steps of layers that ran in NumPy."""
    run, count = host_step.run, [0]

    def counting(*args):
        count[0] += 1
        return run(*args)

    monkeypatch.setattr(host_step, "run", counting)
    return count


@pytest.fixture(params=random_models.SHAPES)
def built(request):
    values = random_models.config(request.param)
    tensors = {k: mx.array(v) for k, v in random_models.tensors(values, seed=3).items()}
    return tiny.loaded(values, tensors)


def decoded(model, monkeypatch, on_host: bool):
    """Logits of a prompt and single tokens that cross windows, and a cache that has seen them."""
    monkeypatch.setattr(Switch, "on_host", on_host)
    ids = mx.random.randint(0, 64, (1, 120 + STEPS), key=mx.random.key(4))
    cache = model.make_cache()
    return tiny.run(model, ids, [120] + [1] * STEPS, cache), cache


def test_steps_in_numpy_equal_the_modules(built, served, monkeypatch):
    mlx, theirs = decoded(built, monkeypatch, on_host=False)
    assert served == [0]
    numpy, ours = decoded(built, monkeypatch, on_host=True)
    assert served == [STEPS * len(built.layers)]
    assert tiny.largest(numpy, mlx) < 2e-5
    for a, b in zip(ours, theirs, strict=True):
        assert a.positions == b.positions
        assert max(map(tiny.largest, a.arrays, b.arrays), default=0) < 2e-5


@pytest.mark.parametrize("site", ["residual", "stream", "attn_out", "ffn_out"])
def test_every_site_is_seen_and_edited_alike(site, served, monkeypatch):
    model = tiny.model()
    taps = tiny.FakeTaps(**{site: lambda x: x * 1.1 + 0.5})
    monkeypatch.setattr(model.layers[2], "taps", taps)
    mlx, _ = decoded(model, monkeypatch, on_host=False)
    want = dict(taps.seen)
    numpy, _ = decoded(model, monkeypatch, on_host=True)
    assert served[0]
    assert tiny.largest(numpy, mlx) < 5e-5
    assert taps.seen.keys() == want.keys()
    for name, x in taps.seen.items():
        assert x.shape == want[name].shape
        assert tiny.largest(x, want[name]) < 5e-5


def serves(model, B: int = 1, T: int = 1, dtype: mx.Dtype = mx.float32, layer: int = 1) -> bool:
    cache = model.make_cache()[layer]
    return host_step.serves(model.layers[layer], mx.zeros((B, T, 4, 32), dtype), cache.span(B, T))


def test_only_single_rows_of_float32_are_served(monkeypatch):
    monkeypatch.setattr(Switch, "on_host", True)
    assert serves(tiny.model())
    assert not serves(tiny.model(), B=2)
    assert not serves(tiny.model(), T=2)
    assert not serves(tiny.model(), dtype=mx.bfloat16)
    assert not serves(tiny.model("tiny_fp8fp4", False))
    monkeypatch.setattr(Switch, "on_host", False)
    assert not serves(tiny.model())


@pytest.mark.parametrize("change", ["adapter", "packed", "narrow", "wrapped"])
def test_a_changed_layer_is_not_served(change, monkeypatch):
    monkeypatch.setattr(Switch, "on_host", True)
    model = tiny.loaded(tiny.config("tiny_fp32"), tiny.weights())
    attn, moe = model.layers[1].attn, model.layers[1].ffn
    assert serves(model)
    if change == "adapter":
        attn.wq_b = LoRALinear.from_base(attn.wq_b)
    elif change == "packed":
        nn.quantize(
            moe, 32, 4, class_predicate=lambda path, _: path.endswith("shared_experts.up_proj")
        )
    elif change == "narrow":
        attn.wkv.weight = attn.wkv.weight.astype(mx.bfloat16)
    else:
        model.layers[1].ffn = nn.Sequential(moe)
    assert not serves(model)
