"""Claims about what imported vectors do: the same logits as their own programs' formulas, by hand.

The hand runs a loop over the blocks of a tiny random model; the other side is the plan's path.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask

from mlxsteer.edits import Stacker
from mlxsteer.fitting import ModelShape
from mlxsteer.formats import import_file
from mlxsteer.grammar import Term
from mlxsteer.models import adapters
from mlxsteer.models.hooks import Run
from mlxsteer.plan import PROMPT, build
from mlxsteer.vector import SteeringVector
from tests.foreign_files import (
    LAYERS,
    ROWS,
    D,
    directions,
    llama_cpp_adds,
    quiet,
    unit,
    write_ds4,
    write_gguf,
    write_glp,
)


@pytest.fixture(scope="module")
def network() -> llama.Model:
    mx.random.seed(0)
    sizes = {"hidden_size": D, "num_hidden_layers": LAYERS, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    args = llama.ModelArgs("llama", rms_norm_eps=1e-5, **sizes, **heads)
    model = llama.Model(args)
    mx.eval(model.parameters())
    return model


TOKENS = mx.array([[3, 7, 1, 30, 22, 9]])


def by_hand(model: llama.Model, edit) -> np.ndarray:
    """Logits of a loop over the blocks; `edit(layer, site, y)` is the formula, in numpy."""

    def edited(layer: int, site: str, y: mx.array) -> mx.array:
        return mx.array(edit(layer, site, np.array(y)).astype(np.float32))

    inner = model.model
    h = inner.embed_tokens(TOKENS)
    mask = create_attention_mask(h, None)
    for layer, block in enumerate(inner.layers):
        attn = block.self_attn(block.input_layernorm(h), mask, None)
        h = h + edited(layer, "attn_out", attn)
        ffn = block.mlp(block.post_attention_layernorm(h))
        h = edited(layer, "residual", h + edited(layer, "ffn_out", ffn))
    h = inner.norm(h)
    logits = inner.embed_tokens.as_linear(h) if model.args.tie_word_embeddings else model.lm_head(h)
    return np.array(logits)


def steered(model: llama.Model, vector: SteeringVector, amount: float, unit: str = ""):
    """Logits through the plan, the batch edits and the hooks."""
    hooks = adapters.install(model)
    shape = ModelShape("tiny", LAYERS, D, lambda: np.ones(LAYERS, np.float32), {})
    plan = build([(Term("v", amount, unit), vector)], shape)
    hooks.require(plan.places)
    edits = Stacker().edits([plan], np.full(TOKENS.shape, PROMPT))
    with hooks.forward(Run(edits=edits)):
        return np.array(model(TOKENS))


def check_equal(network, vector, amount, unit, edit) -> None:
    plain = by_hand(network, lambda _layer, _site, y: y)
    expected = by_hand(network, edit)
    got = steered(network, vector, amount, unit)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(expected - plain).max() > 1e-2, "the edit must change something to prove it"


@pytest.mark.parametrize("scale", [1.0, -1.0, -2.5, 0.3])
@pytest.mark.parametrize("component", ["ffn_out", "attn_out"])
def test_an_imported_ds4_vector_acts_by_its_formula(tmp_path, network, component, scale) -> None:
    rows = unit(4, LAYERS, D)
    vector = import_file(write_ds4(tmp_path / "v.f32", rows, component=component))

    def formula(layer: int, site: str, y: np.ndarray) -> np.ndarray:
        if site != component:
            return y
        d = rows[layer].astype(np.float64)
        return y - scale * (y @ d)[..., None] * d

    check_equal(network, vector, -scale, "", formula)


@pytest.mark.parametrize("alpha", [1.0, 2.0, -0.7])
@pytest.mark.parametrize("rank", [1, 3])
def test_an_imported_glp_projection_acts_by_its_formula(tmp_path, network, alpha, rank) -> None:
    bases = {
        n: np.linalg.qr(np.random.default_rng(n).normal(size=(D, rank)))[0].T.astype(np.float32)
        for n in (1, 2, 4)
    }
    tensors = {
        f"direction.{n}.{j}" if j else f"direction.{n}": row
        for n, rows in bases.items()
        for j, row in enumerate(rows)
    }
    version = {"glp.rank": rank, "glp.spec_version": 1 if rank == 1 else 2}
    path = write_glp(tmp_path / "v.gguf", tensors, **version)
    vector = import_file(path, warn=quiet)

    def formula(layer: int, site: str, h: np.ndarray) -> np.ndarray:
        if site != "residual" or layer not in bases:
            return h
        return h - alpha * sum((h @ d)[..., None] * d for d in bases[layer].astype(np.float64))

    check_equal(network, vector, alpha, "", formula)


@pytest.mark.parametrize("scale", [1.0, -1.5])
def test_an_imported_control_vector_acts_as_in_llama_cpp(tmp_path, network, scale) -> None:
    path = write_gguf(tmp_path / "v.gguf", directions(range(1, LAYERS), 0.5 * ROWS))
    added = llama_cpp_adds(path)

    def formula(layer: int, site: str, h: np.ndarray) -> np.ndarray:
        return h + scale * added[layer] if site == "residual" and layer in added else h

    check_equal(network, import_file(path), scale, "r", formula)
