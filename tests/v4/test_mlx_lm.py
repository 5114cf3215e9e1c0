"""The module inside mlx-lm's own machinery: loader, generator, batches, quantisation."""

from __future__ import annotations

import json
import shutil
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model, save_model

from mlxsteer.models import deepseek_v4
from tests.v4.tiny import EXACT, FIXTURES, golden, largest, loaded, model, run, token_ids


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FIXTURES / "tiny_fp32", tmp_path / "tiny")
    return tmp_path / "tiny"


def greedy(built, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(built(mx.array([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def prompt(n: int) -> list[int]:
    return token_ids()[0, :n].tolist()


def test_mlx_lm_loads_a_folder_of_official_names_with_our_module(folder):
    deepseek_v4.register()
    built, _ = load_model(folder)
    assert type(built) is deepseek_v4.Model
    assert largest(built(token_ids())[0], golden("tiny_fp32")["logits"]) < EXACT


def test_ours_wins_over_a_module_that_mlx_lm_brings(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.models.deepseek_v4", object())
    deepseek_v4.register()
    assert type(load_model(folder)[0]) is deepseek_v4.Model


def test_a_saved_model_has_community_names_and_loads_unchanged(folder, tmp_path):
    deepseek_v4.register()
    built, config = load_model(folder)
    saved = tmp_path / "saved"
    saved.mkdir()
    save_model(saved, built)
    (saved / "config.json").write_text(json.dumps(config))
    names = set(mx.load(str(saved / "model.safetensors")))
    assert {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.hc_head.fn",
        "model.layers.2.attn_hc.base",
        "model.layers.2.attn.indexer.compressor.ape",
        "model.layers.2.attn.wo_a.weight",
        "model.layers.3.ffn.gate.e_score_correction_bias",
        "model.layers.0.ffn.gate.tid2eid",
        "model.layers.0.ffn.switch_mlp.gate_proj.weight",
        "model.layers.0.ffn.shared_experts.down_proj.weight",
        "model.layers.0.attn.attn_sink",
    } <= names
    again, _ = load_model(saved)
    assert largest(again(token_ids())[0], golden("tiny_fp32")["logits"]) < EXACT


def test_prefixed_names_of_vision_style_conversions_load():
    built = model()
    weights = {f"language_model.{k}": v for k, v in tree_flatten(built.parameters())}
    named = built.sanitize(weights)
    assert set(named) == {k for k, _ in tree_flatten(built.parameters())}


def test_draft_blocks_are_left_out_and_a_missing_expert_is_reported():
    weights = dict(mx.load(str(FIXTURES / "tiny_fp32" / "model.safetensors")))
    weights |= {"mtp.0.norm.weight": mx.zeros((32,)), "layers.5.attn_norm.weight": mx.zeros((32,))}
    named = model().sanitize(weights)
    assert not any("mtp" in k or "layers.5." in k for k in named)
    del weights["layers.4.ffn.experts.3.w2.weight"]
    with pytest.raises(ValueError, match=r"layers\.4\.ffn\.switch_mlp\.down_proj"):
        loaded(json.loads((FIXTURES / "tiny_fp32" / "config.json").read_text()), weights)


def test_official_packed_tensors_keep_their_codes():
    """What the modules hold dequantises to what the official bytes say, bit for bit."""
    weights = mx.load(str(FIXTURES / "tiny_fp8fp4" / "model.safetensors"))
    built = model("tiny_fp8fp4")
    codes, scale = (np.array(weights[f"layers.3.attn.wq_b.{k}"]) for k in ("weight", "scale"))
    values = np.array(mx.from_fp8(mx.array(codes), dtype=mx.float32))
    want = values * np.exp2(scale.astype(np.float64) - 127).repeat(128, 0).repeat(128, 1)
    m = built.layers[3].attn.wq_b
    got = mx.dequantize(m.weight, m.scales, None, 32, 8, "mxfp8", dtype=mx.float32)
    assert np.array_equal(np.array(got), want)
    assert isinstance(built.layers[0].ffn.switch_mlp.up_proj, nn.Module)
    assert built.layers[0].ffn.switch_mlp.up_proj.mode == "mxfp4"


def test_generate_step_equals_greedy_full_forwards():
    built = model()
    tokens = [int(t) for t, _ in generate_step(mx.array(prompt(30)), built, max_tokens=8)]
    assert tokens[:8] == greedy(built, prompt(30), 8)


@pytest.mark.parametrize("prefill_step", [16, 2048])
def test_batch_generator_gives_every_request_its_single_run(prefill_step):
    """Requests of different lengths, more than there are slots, joining and leaving."""
    built = model()
    lengths, n = [3, 33, 1, 130, 17], [9, 4, 12, 6, 7]
    prompts = [[(t + i) % 64 for t in prompt(k)] for i, k in enumerate(lengths)]
    batches = BatchGenerator(
        built, completion_batch_size=3, prefill_batch_size=2, prefill_step_size=prefill_step
    )
    uids = batches.insert(prompts, max_tokens=n)
    got: dict[int, list[int]] = {u: [] for u in uids}
    while responses := batches.next_generated():
        for r in responses:
            got[r.uid].append(r.token)
    batches.close()
    for uid, asked, k in zip(uids, prompts, n, strict=True):
        assert got[uid] == greedy(built, asked, k)


def test_a_quantised_model_runs_the_same_in_pieces_and_in_full():
    values = json.loads((FIXTURES / "tiny_fp8fp4" / "config.json").read_text())
    weights = mx.load(str(FIXTURES / "tiny_fp8fp4" / "model.safetensors"))
    built = loaded(values, weights)
    affine = lambda p, m: hasattr(m, "to_quantized") and "scales" not in m  # noqa: E731
    nn.quantize(built, group_size=64, bits=4, class_predicate=affine)
    assert "scales" in built.lm_head
    built.set_dtype(mx.float32)
    ids = token_ids("tiny_fp8fp4")[:, :40]
    assert largest(run(built, ids, [17] + [1] * 23), built(ids)[0]) < EXACT
