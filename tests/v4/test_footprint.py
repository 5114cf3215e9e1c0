"""Memory of prefill is bounded by tiles: shape arithmetic, checked against what really runs."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxsteer.models.deepseek_v4 import ModelArgs, attention, indexer
from mlxsteer.models.deepseek_v4.footprint import intermediates, largest_intermediate
from tests.v4.test_config import FLASH
from tests.v4.tiny import model, pieces, run, token_ids

MIB = 2**20
K = 1024


def test_no_array_exceeds_200_mib_at_2048_tokens_of_a_64k_context():
    args = ModelArgs.from_dict(FLASH)
    name, size = largest_intermediate(args, 2 * K, 64 * K)
    assert (name, size) == ("expert outputs", 2048 * 6 * 4096 * 4)
    assert size < 200 * MIB


def test_what_attention_needs_hardly_grows_with_the_context():
    args = ModelArgs.from_dict(FLASH)
    short, long = (intermediates(args, 2 * K, T) for T in (64 * K, K * K))
    assert max(v for k, v in short.items() if "tile" in k or "block" in k) < 65 * MIB
    assert max(v for k, v in long.items() if "tile" in k or "block" in k) < 65 * MIB
    assert 64 * 2 * K * 64 * K // 4 * 4 == 8 * K * MIB  # the same untiled, at 64k


def test_a_smaller_chunk_needs_less():
    args = ModelArgs.from_dict(FLASH)
    assert largest_intermediate(args, 128, 64 * K)[1] < 65 * MIB


@pytest.mark.parametrize("L", [300, 50])
def test_what_runs_is_no_larger_than_the_arithmetic(L, monkeypatch):
    seen = {"scores": 0, "rows": 0, "index": 0}
    dots, scores = attention._dots, indexer.index_scores

    def watched_dots(q: mx.array, rows: mx.array) -> mx.array:
        out = dots(q, rows)
        seen["scores"] = max(seen["scores"], out.size * 4)
        seen["rows"] = max(seen["rows"], rows.size * 4 if rows.ndim == 4 else 0)
        return out

    def watched_scores(q: mx.array, weights: mx.array, keys: mx.array) -> mx.array:
        seen["index"] = max(seen["index"], q.shape[1] * q.shape[2] * keys.shape[1] * 4)
        return scores(q, weights, keys)

    monkeypatch.setattr(attention, "_dots", watched_dots)
    monkeypatch.setattr(indexer, "index_scores", watched_scores)
    run(model(), token_ids(), pieces(300, L))
    sizes = intermediates(model().args, L, 300)
    assert seen["scores"] <= max(v for k, v in sizes.items() if "scores of a tile" in k)
    assert seen["rows"] <= sizes["chosen rows of a tile"]
    assert seen["index"] <= sizes["index scores of a block"]
