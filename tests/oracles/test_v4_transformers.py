"""Random DeepSeek-V4 models, every mode of running them, against transformers in float32."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from tests.v4 import random_models
from tests.v4.tiny import EXACT, FakeTaps, largest, loaded, pieces, run

T = 300

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=list(random_models.SHAPES))
def pair(request, tmp_path_factory):
    """(our model, transformers' model, ids [1, T], its logits [T, V])"""
    folder = tmp_path_factory.mktemp(request.param)
    random_models.write(folder, request.param, seed=len(request.param))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    values = json.loads((folder / "config.json").read_text())
    ours = loaded(values, mx.load(str(folder / "model.safetensors")))
    ids = np.random.default_rng(5).integers(2, values["vocab_size"], (1, T))
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits[0].numpy()
    return ours, theirs, mx.array(ids), logits


def test_full_forward_equals_transformers(pair):
    ours, _, ids, want = pair
    assert largest(ours(ids)[0], want) < EXACT


@pytest.mark.parametrize("size", [3, 10, 64, 129, 256])
def test_prefill_in_pieces_equals_transformers(pair, size):
    ours, _, ids, want = pair
    assert largest(run(ours, ids, pieces(T, size)), want) < EXACT


@pytest.mark.parametrize("split", [1, 5, 7, 8, 9, 127, 128, 130, 200])
def test_decode_from_any_split_equals_transformers(pair, split):
    ours, _, ids, want = pair
    steps = min(T - split, 100)
    logits = run(ours, ids, [split] + [1] * steps)
    assert largest(logits, want[: split + steps]) < EXACT


def test_adding_to_all_streams_equals_a_transformers_forward_hook(pair):
    ours, theirs, ids, want = pair
    v = np.random.default_rng(9).standard_normal(ours.args.hidden_size).astype(np.float32)
    handle = theirs.model.layers[1].register_forward_hook(
        lambda module, args, out: out + torch.tensor(v)
    )
    try:
        with torch.no_grad():
            steered = theirs(torch.tensor(np.array(ids))).logits[0].numpy()
    finally:
        handle.remove()
    ours.layers[1].taps = FakeTaps(residual=lambda X: X + mx.array(v))
    try:
        assert largest(run(ours, ids, [130] + [1] * 20 + [150]), steered) < EXACT
    finally:
        ours.layers[1].taps = None
    assert largest(steered, want) > 1e-2
