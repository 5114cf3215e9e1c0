"""The index that chooses which compressed rows a query attends to (spec C.6). Exact top-k.

Scores are made block by block, so that memory does not grow with heads times context.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxsteer.models.deepseek_v4 import kernels, selection_kernels
from mlxsteer.models.deepseek_v4.compressor import Compressor
from mlxsteer.models.deepseek_v4.config import SPARSE, ModelArgs
from mlxsteer.models.deepseek_v4.fusing import counting
from mlxsteer.models.deepseek_v4.rope import rope_of
from mlxsteer.models.deepseek_v4.rounding import round_index

SCORE_BLOCK = 2048  # index rows scored at once


def index_scores(q: mx.array, weights: mx.array, keys: mx.array) -> mx.array:
    """`sum_h w_h relu(q_h . K)`. q [B, h, t, c], weights [B, t, h], keys [B, R, c] -> [B, t, R]."""
    B, h, t, c = q.shape
    dots = (q.reshape(B, h * t, c) @ keys.swapaxes(-1, -2)).reshape(B, h, t, -1)
    if t == 1:
        return combined(dots.squeeze(2), weights.squeeze(1))[:, None]
    dots = mx.maximum(dots, 0).swapaxes(1, 2)
    return (weights[:, :, None, :].astype(dots.dtype) @ dots).squeeze(2)


def _sample() -> tuple[Any, ...]:
    dots = mx.random.normal((2, 8, 40), key=mx.random.key(5))
    return dots, mx.random.normal((2, 8), key=mx.random.key(6))


@kernels.twin(selection_kernels.combine, _sample)
def combined(dots: mx.array, weights: mx.array) -> mx.array:
    """`sum_h w_h relu(dots_h)` for one query per row: dots [B, h, R], weights [B, h] -> [B, R]."""
    positive = mx.maximum(dots, 0)
    return (weights[:, None].astype(dots.dtype) @ positive).squeeze(1).astype(mx.float32)


def top_rows(scores: mx.array, k: int) -> mx.array:
    """Indices of the k largest of the last axis, in no particular order."""
    R = scores.shape[-1]
    return mx.argpartition(scores, kth=R - k, axis=-1)[..., R - k :]


class Indexer(nn.Module):
    """Scores compressed rows for each query and picks the `index_topk` best visible ones."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        h, c = args.index_n_heads, args.index_head_dim
        self._heads, self._k = h, args.index_topk
        self._round = args.activation_rounding
        self.rope = rope_of(args, SPARSE, c)
        self.wq_b = nn.Linear(args.q_lora_rank, h * c, bias=False)
        self.weights_proj = nn.Linear(args.hidden_size, h, bias=False)
        self.compressor = Compressor(args, SPARSE, c)

    def rounded(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        """Queries or keys as they are compared."""
        return round_index(x, dtype) if self._round else x.astype(dtype)

    def select(
        self,
        y: mx.array,
        weights: mx.array,
        keys: mx.array,
        offset: int | mx.array,
        seen: mx.array | None,
    ) -> mx.array:
        """Indices [B, t, k] of the best rows for t queries.

        y [B, t, h*c] from `wq_b`; weights [B, t, h] from `weights_proj`, whose constant scale does
        not change the order; keys [B, R, c]; `seen` [B or 1, t] counts the rows that each query
        may see (None: all). With fewer than k visible, the rest are invisible rows, for the
        caller to mask.
        """
        q = mx.unflatten(y, -1, (self._heads, -1)).swapaxes(1, 2)
        q = self.rounded(self.rope(q, offset), keys.dtype)
        R = keys.shape[1]
        if R <= SCORE_BLOCK:
            scores = index_scores(q, weights, keys)
        else:
            parts = [keys[:, i : i + SCORE_BLOCK] for i in range(0, R, SCORE_BLOCK)]
            scores = mx.concatenate([index_scores(q, weights, part) for part in parts], axis=-1)
        if seen is not None:
            scores = mx.where(counting(R) < seen[..., None], scores, -mx.inf)
        return top_rows(scores, self._k)
