"""Importance: the moments are those of the inputs, and using them lowers the output error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import convert_importance
from mlxsteer.convert.collect import collect, read_texts, route
from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.importance import Importance, load_importance, save_importance, smooth
from mlxsteer.convert.plan import make_plan
from mlxsteer.convert.recipes import RECIPES
from mlxsteer.convert.sources import LocalSource
from tests.convert import reference
from tests.convert.conftest import FIXTURES, TINY, run

IDS = np.load(FIXTURES / "tiny_fp8fp4.npz")["ids"]


@pytest.fixture(scope="module")
def moments(converted: Callable[[str], Path]) -> dict[str, np.ndarray]:
    found, tokens = collect(converted("lossless"), [IDS.tolist()])
    assert tokens == len(IDS) == 200
    return {name: np.array(m.astype(mx.float32)) for name, m in found.items()}


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def test_moments_of_layer_0_are_those_worked_out_by_hand(moments: dict[str, np.ndarray]) -> None:
    """Embedding, hyper-connection front (spec C.1), norm: what wq_a of layer 0 is given."""
    source = reference.load_folder(TINY)
    streams = np.repeat(reference.bf16(source["embed.weight"])[IDS][:, None], 4, axis=1)
    z = streams.reshape(len(IDS), -1)
    u = z @ source["layers.0.hc_attn_fn"].T / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6)
    scale, base = source["layers.0.hc_attn_scale"], source["layers.0.hc_attn_base"]
    pre = 1 / (1 + np.exp(-(u[:, :4] * scale[0] + base[:4]))) + 1e-6
    x = (pre[..., None] * streams).sum(1)
    x = rms_norm(x, reference.bf16(source["layers.0.attn_norm.weight"]))
    expected = (x**2).mean(0)
    np.testing.assert_allclose(moments["model.layers.0.attn.wq_a"], expected, rtol=5e-3)
    np.testing.assert_allclose(moments["model.layers.0.attn.wkv"], expected, rtol=5e-3)
    qr = rms_norm(x @ reference.source_matrix(source, "layers.0.attn.wq_a").T,
                  reference.bf16(source["layers.0.attn.q_norm.weight"]))  # fmt: skip
    np.testing.assert_allclose(
        moments["model.layers.0.attn.wq_b"], (qr**2).mean(0), rtol=5e-3, atol=1e-4
    )


def test_every_quantisable_matrix_has_moments(moments: dict[str, np.ndarray]) -> None:
    plan = make_plan(LocalSource(TINY).checkpoint, RECIPES["q2-fast"])
    importance = Importance({name: mx.array(m) for name, m in moments.items()})
    for planned in plan.matrices():
        if planned.matrix.kind == "embed":
            continue
        row = importance.of(planned.matrix.path, 0)
        assert row is not None
        assert row.shape == (planned.matrix.cols,)
        assert bool((row > 0).all())


def test_routing_is_the_models_own(converted: Callable[[str], Path]) -> None:
    from mlx_lm.utils import load_model

    from mlxsteer.models.deepseek_v4 import Model, ModelArgs

    model, _ = load_model(
        converted("lossless"), get_model_classes=lambda config: (Model, ModelArgs)
    )
    x = mx.random.normal((20, 256), key=mx.random.key(0))
    for layer in (1, 4):  # by hash, and by affinity
        gate = model.layers[layer].ffn.gate
        ids = mx.array(IDS[:20])
        theirs, _ = gate(x, ids)
        assert mx.array_equal(mx.sort(route(gate, x, ids, 2), -1), mx.sort(theirs, -1))


def test_rarely_seen_experts_lean_on_the_mean() -> None:
    moments = mx.array([[1.0, 3.0], [100.0, 0.0]])
    out = np.array(smooth(moments, mx.array([10_000.0, 0.0])))
    np.testing.assert_allclose(out[0], [1, 3], rtol=1e-2)
    np.testing.assert_allclose(out[1], [1, 3], rtol=1e-6)


def test_an_importance_file_of_another_model_is_refused(
    tmp_path: Path, moments: dict[str, np.ndarray]
) -> None:
    plan = make_plan(LocalSource(TINY).checkpoint, RECIPES["q2"])
    path = tmp_path / "importance.safetensors"
    for bad in ({"model.layers.9.attn.wq_a": mx.ones((256,))}, {"lm_head": mx.ones((64,))}):
        save_importance(path, bad, 10, "other")
        with pytest.raises(ConvertError, match="measured on another model"):
            load_importance(path, plan)
    save_importance(path, {"lm_head": mx.full((256,), float("nan"))}, 10, "other")
    with pytest.raises(ConvertError, match="not second moments"):
        load_importance(path, plan)
    mx.save_safetensors(str(path), {"lm_head": mx.ones((256,))})
    with pytest.raises(ConvertError, match="not an importance file"):
        load_importance(path, plan)


def test_calibrated_q2_errs_less_where_it_counts(
    tmp_path: Path, moments: dict[str, np.ndarray]
) -> None:
    path = tmp_path / "importance.safetensors"
    save_importance(path, {n: mx.array(m) for n, m in moments.items()}, 200, "tiny")
    plan = make_plan(LocalSource(TINY).checkpoint, RECIPES["q2"])
    importance = load_importance(path, plan)
    errors = run(TINY, tmp_path / "out", "q2", importance=importance).errors
    assert errors["experts"]["error"] < 0.85 * errors["experts"]["mlx_error"]
    assert "importance.safetensors" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConvertError, match="already holds"):  # not the same thing: said, not done
        run(TINY, tmp_path / "out", "q2")


@pytest.mark.slow
def test_calibration_lowers_the_output_error_of_q2(tmp_path: Path) -> None:
    plain, calibrated = convert_importance.measure(tmp_path)
    assert calibrated.logits < 0.95 * plain.logits


def test_without_a_file_the_bundled_texts_are_measured_on(tmp_path: Path) -> None:
    assert len(read_texts(None)) > 100
    (tmp_path / "texts.txt").write_text("One.\n\nTwo\nlines.\n\n\n")
    assert read_texts(tmp_path / "texts.txt") == ["One.", "Two\nlines."]


def test_nothing_to_measure_on_is_an_error(converted: Callable[[str], Path]) -> None:
    with pytest.raises(ConvertError, match="no text"):
        collect(converted("lossless"), [[]])
