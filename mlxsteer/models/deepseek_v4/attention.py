"""Attention over a window of recent tokens and compressed rows of the past (spec C.4).

K and V are one row for all heads. Prefill goes tile by tile, queries included, so that memory
does not grow with tokens times context; a decode step reads the cache's buffer where it lies.
Scores, softmax and sums run in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.mla import MultiLinear

from mlxsteer.models.deepseek_v4 import kernels, row_kernels, selection_kernels
from mlxsteer.models.deepseek_v4.cache import DeepseekV4Cache
from mlxsteer.models.deepseek_v4.compressor import Compressor
from mlxsteer.models.deepseek_v4.config import HEAVY, SPARSE, WINDOW_ONLY, ModelArgs
from mlxsteer.models.deepseek_v4.fusing import Joined, Switch, counting
from mlxsteer.models.deepseek_v4.host import on_host
from mlxsteer.models.deepseek_v4.indexer import Indexer
from mlxsteer.models.deepseek_v4.positions import Span, band, pick
from mlxsteer.models.deepseek_v4.rope import Rope, rope_of
from mlxsteer.models.deepseek_v4.rounding import round_kv
from mlxsteer.models.deepseek_v4.sharding import summed

TILES = (128, 64, 32, 16, 8)  # queries at once: the first whose arrays fit the budget
CPU_TILE = 32  # the most where masked scores cost as much as others
TILE_BUDGET = 64 * 2**20  # bytes of float32 scores, or of rows that were picked per query


class Rows(NamedTuple):
    """Rows to attend to: [B, K, d] shared by all queries, or [B, t, K, d] one set per query.

    mask [B or 1, t, K]: True where a query may look; None: everywhere.
    """

    rows: mx.array
    mask: mx.array | None = None


class Projected(NamedTuple):
    """What a layer made of its new tokens.

    qr [B, T, q_lora_rank] normed; kv [B, T, d]; rows [B, T, *]: what compressors and indexer
    read, side by side, where the layer has them. Once the tokens are stored, kv are the rows
    of the ring, and weights [B, T, h] those of the index heads. Where it is made already,
    index_q [B, T, h*c] is the indexer's `wq_b` of qr.
    """

    qr: mx.array
    kv: mx.array
    rows: mx.array | None = None
    weights: mx.array | None = None
    index_q: mx.array | None = None


def _dots(q: mx.array, rows: mx.array) -> mx.array:
    """q [B, H, t, d] with Rows.rows -> [B, H, t, K]."""
    B, H, t, d = q.shape
    if rows.ndim == 3:
        return (q.reshape(B, H * t, d) @ rows.swapaxes(-1, -2)).reshape(B, H, t, -1)
    return (q.swapaxes(1, 2) @ rows.swapaxes(-1, -2)).swapaxes(1, 2)


def _mix(p: mx.array, rows: mx.array) -> mx.array:
    """Weights p [B, H, t, K] with Rows.rows -> [B, H, t, d]."""
    B, H, t, K = p.shape
    if rows.ndim == 3:
        return (p.reshape(B, H * t, K) @ rows).reshape(B, H, t, -1)
    return (p.swapaxes(1, 2) @ rows).swapaxes(1, 2)


@on_host(np.float32, least=2**14)
def softmax_with_sink(scores: Any, sink: Any) -> Any:
    """Softmax of scores [B, H, t, K] with a sink [H] in its denominator."""
    sinks = sink[:, None, None]
    if isinstance(scores, mx.array):
        sinks = mx.broadcast_to(sinks, (*scores.shape[:3], 1))
        return mx.softmax(mx.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
    top = np.maximum(scores.max(axis=-1, keepdims=True), sinks)
    scores -= top
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True) + np.exp(sinks - top)
    return scores


def attend(q: mx.array, parts: list[Rows], sink: mx.array) -> mx.array:
    """Softmax attention over all parts together, with a sink that takes weight and gives nothing.

    q [B, H, t, d] float32, scaled; sink [H] -> [B, H, t, d] float32.
    """
    rows = [part.rows.astype(mx.float32) for part in parts]
    scores = []
    for part, r in zip(parts, rows, strict=True):
        s = _dots(q, r)
        scores.append(s if part.mask is None else mx.where(part.mask[:, None], s, -mx.inf))
    p = softmax_with_sink(scores[0] if len(scores) == 1 else mx.concatenate(scores, axis=-1), sink)
    out, at = None, 0
    for r in rows:
        mixed = _mix(p[..., at : at + r.shape[-2]], r)
        out, at = mixed if out is None else out + mixed, at + r.shape[-2]
    assert out is not None
    return out


def tile_size(args: ModelArgs, B: int, R: int, sparse: bool) -> int:
    """Queries at once for B batch rows that see R compressed rows, or each its chosen k."""
    H, d, W, k = args.num_attention_heads, args.head_dim, args.sliding_window, args.index_topk

    def elements(t: int) -> int:
        scores = H * t * (W + t - 1 + (k if sparse else R))
        return B * max(scores, t * k * d if sparse else 0)

    return next((t for t in TILES if elements(t) * 4 <= TILE_BUDGET), TILES[-1])


# What a layer projects its input to for compressed rows, by ratio.
_ROW_PROJECTIONS: dict[int, tuple[str, ...]] = {
    WINDOW_ONLY: (),
    HEAVY: ("compressor.wkv", "compressor.wgate"),
    SPARSE: (
        "compressor.wkv",
        "compressor.wgate",
        "indexer.compressor.wkv",
        "indexer.compressor.wgate",
        "indexer.weights_proj",
    ),
}


class Attention(nn.Module):
    """One layer's attention; its kind follows from the layer's compress ratio."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        D, H, d = args.hidden_size, args.num_attention_heads, args.head_dim
        self.args, self.ratio = args, args.compress_ratios[layer]
        self.eps, self._scale = args.rms_norm_eps, d**-0.5
        self.rope = rope_of(args, self.ratio, d)
        self.heads, self._groups = H, args.o_groups
        self.group: Any = None  # of processes, where heads are split among several
        self.wq_a = nn.Linear(D, args.q_lora_rank, bias=False)
        self.q_norm = nn.RMSNorm(args.q_lora_rank, eps=args.rms_norm_eps)
        self.wq_b = nn.Linear(args.q_lora_rank, H * d, bias=False)
        self.wkv = nn.Linear(D, d, bias=False)
        self.kv_norm = nn.RMSNorm(d, eps=args.rms_norm_eps)
        self.wo_a = MultiLinear(H * d // args.o_groups, args.o_lora_rank, args.o_groups)
        self.wo_b = nn.Linear(args.o_groups * args.o_lora_rank, D, bias=False)
        self.attn_sink = mx.zeros((H,))
        if self.ratio:
            self.compressor = Compressor(args, self.ratio, d)
        if self.ratio == SPARSE:
            self.indexer = Indexer(args)
        self._query_scale = mx.full((d,), self._scale)
        self.inner = Joined(self, "wq_a", "wkv")
        self.rows_inner = Joined(self, *_ROW_PROJECTIONS[self.ratio])

    def keep_part(self, n: int, group: Any) -> None:
        """From now on run one n-th of the heads; the others run in other processes."""
        self.heads, self._groups, self.group = self.heads // n, self._groups // n, group

    def __call__(self, x: mx.array, cache: DeepseekV4Cache, span: Span) -> mx.array:
        """x [B, T, D], normed -> [B, T, D]. Stores the tokens in `cache`."""
        qr, kv = self.inner.split(self.inner(x))
        rows = self.rows_inner(x.astype(mx.float32)) if self.ratio else None
        new = Projected(self.q_norm(qr), kv, rows)
        if span.is_step:
            out = self.output(self.step(new, cache, span), x.dtype)
        else:
            out = self._prefill(self._take_in(new, cache, span), cache, span)
            cache.advance(span)
        return summed(out.astype(x.dtype), self.group)

    def step(self, new: Projected, cache: DeepseekV4Cache, span: Span) -> mx.array:
        """One token per row, stored in `cache` -> heads [B, H, 1, d] for `output`."""
        best = self.store(new, cache, span)
        q = self._queries(self.wq_b(new.qr), span.offset)
        o = attend(q, [self._step_rows(best, cache, span)], self.attn_sink)
        return self.rope(o, span.offset, inverse=True)

    def store(self, new: Projected, cache: DeepseekV4Cache, span: Span) -> mx.array | None:
        """Put one token per row in `cache`.

        Returns the indices [B, 1, k] of the compressed rows to attend to; None: all.
        """
        new = self._take_in(new, cache, span)
        cache.write_ring(span, new.kv)
        cache.advance(span)
        if not self.chooses(span):
            return None
        assert cache.keys is not None
        assert new.weights is not None
        seen = None if span.aligned else span.visible_counts(SPARSE, 0, 1)
        y = self.indexer.wq_b(new.qr) if new.index_q is None else new.index_q
        keys = cache.keys[:, : span.visible(SPARSE, 0)]
        return self.indexer.select(y, new.weights, keys, span.offset, seen)

    def output(self, o: mx.array, dtype: mx.Dtype) -> mx.array:
        """Heads o [B, H, t, d], turned back, projected in groups -> [B, t, D]."""
        B, H, t, d = o.shape
        o = o.astype(dtype).reshape(B, self._groups, H // self._groups, t, d).swapaxes(2, 3)
        o = self.wo_a(o.reshape(B, self._groups, t, -1))
        return self.wo_b(o.swapaxes(1, 2).reshape(B, t, -1))

    def chooses(self, span: Span) -> bool:
        """Whether a step's queries see more rows than they may attend to."""
        return self.ratio == SPARSE and span.visible(SPARSE, 0) > self.args.index_topk

    def _take_in(self, new: Projected, cache: DeepseekV4Cache, span: Span) -> Projected:
        """The tokens with finished kv and the indexer's weights; stores the rows they close."""
        cache.begin(span)
        new = new._replace(kv=self._row(new.kv, self.kv_norm, span))
        if new.rows is None:
            return new
        return new._replace(weights=self._compress(new.rows, cache, span))

    def _row(self, y: mx.array, norm: nn.RMSNorm, span: Span, m: int = 0) -> mx.array:
        """Raw rows [B, N, d] normed, given their positions (every m), and rounded, for storing."""
        nope, rounded = self.args.nope_head_dim, self.args.activation_rounding
        if span.is_step:
            at, constants = span.position(m), (nope, rounded, self.eps)
            return finished_row(y, norm.weight, self.rope, at, span.dtype, constants)
        rows = self.rope(norm(y.astype(span.dtype)), span.window_offset(m), step=m or 1)
        return round_kv(rows, nope, span.dtype) if rounded else rows

    def _key(self, y: mx.array, norm: nn.RMSNorm, span: Span) -> mx.array:
        """The same for index keys [B, N, c]."""
        rope, c = self.indexer.rope, y.shape[-1]
        if span.is_step:
            constants = (c - self.args.qk_rope_head_dim, False, self.eps)
            at = span.position(SPARSE)
            keys = finished_row(y, norm.weight, rope, at, mx.float32, constants)
        else:
            keys = rope(norm(y.astype(span.dtype)), span.window_offset(SPARSE), step=SPARSE)
        return self.indexer.rounded(keys, span.dtype)

    def _compress(self, parts: mx.array, cache: DeepseekV4Cache, span: Span) -> mx.array | None:
        """Store the rows and index keys of the windows that these tokens fill.

        parts [B, T, *]: the products of `_ROW_PROJECTIONS`. Returns the indexer's head weights
        [B, T, h] where the layer has an indexer.
        """
        m, inner = self.ratio, self.rows_inner
        C = sum(inner.widths[:2])
        rows = self.compressor(parts[..., :C], cache.open, span)
        keys = weights = None
        if m == SPARSE:
            K = C + sum(inner.widths[2:4])
            keys = self.indexer.compressor(parts[..., C:K], cache.open_keys, span)
            weights = parts[..., K:]
        if rows is not None:
            self._store(rows, keys, cache, span)
        return weights

    def _store(
        self, rows: mx.array, keys: mx.array | None, cache: DeepseekV4Cache, span: Span
    ) -> None:
        """Finish closed rows [B, N, d] and their index keys, and put them in the cache."""
        m = self.ratio
        first = [s // m for s in span.starts]
        rows = self._row(rows, self.compressor.norm, span, m)
        if keys is not None:
            keys = self._key(keys, self.indexer.compressor.norm, span)
        full = [b for b, end in enumerate(span.ends) if end // m > first[b]]
        if span.is_step and len(full) < span.B:
            cache.append_some(full, first, rows, keys)
        else:
            cache.append(first, rows, keys)

    def _queries(self, y: mx.array, offset: int | mx.array) -> mx.array:
        """y [B, t, H*d] from `wq_b` -> [B, H, t, d] float32, normed per head, turned, scaled."""
        q = mx.unflatten(y, -1, (self.heads, -1)).astype(mx.float32)
        q = mx.fast.rms_norm(q, self._query_scale, self.eps).swapaxes(1, 2)
        return self.rope(q, offset)

    def _step_rows(self, best: mx.array | None, cache: DeepseekV4Cache, span: Span) -> Rows:
        """The ring and the compressed rows, all or the chosen, of one buffer."""
        assert cache.kv is not None
        W, m = self.args.sliding_window, self.ratio
        if best is None:
            R = span.visible(m, 0) if m else 0
            return Rows(cache.kv[:, : W + R], self._step_mask(span, counting(W + R)[None, None]))
        mask = None
        if not span.aligned or span.ends[0] < W:
            ring = mx.broadcast_to(counting(W), (span.B, 1, W))
            mask = self._step_mask(span, mx.concatenate([ring, best + W], axis=-1))
        return Rows(chosen_rows(cache.kv, best.squeeze(1), W), mask)

    def _step_mask(self, span: Span, index: mx.array) -> mx.array | None:
        """[B or 1, 1, K] which of the buffer slots `index` hold something for each row."""
        W, m = self.args.sliding_window, self.ratio
        if span.aligned and span.ends[0] >= W:
            return None
        ends = mx.array(span.ends[:1] if span.aligned else span.ends)[:, None, None]
        return mx.where(index < W, index < ends, index - W < (ends // m if m else 0))

    # -- many tokens ------------------------------------------------------------------------

    def _prefill(self, new: Projected, cache: DeepseekV4Cache, span: Span) -> mx.array:
        near = mx.concatenate([cache.ring_in_order(span), new.kv], axis=1)
        tiles: list[mx.array] = []
        i0 = 0
        while i0 < span.T:
            i1 = self._tile_end(span, i0)
            if tiles:  # one tile in memory at a time
                new = new._replace(qr=mx.depends(new.qr, tiles[-1]))
            tiles.append(self._tile(new, near, cache, span, i0, i1))
            i0 = i1
        cache.set_ring(pick(near, span.ring_sources(self.args.sliding_window)))
        return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=1)

    def _tile_end(self, span: Span, i0: int) -> int:
        """Where the tile from i0 ends: its queries all see everything, or all choose."""
        sparse, m = self._is_sparse(span, i0), self.ratio
        R = span.visible(m, span.T - 1) if m else 0
        most = CPU_TILE if Switch.on_host else TILES[0]
        i1 = min(i0 + min(most, tile_size(self.args, span.B, R, sparse)), span.T)
        if not sparse and self._is_sparse(span, i1 - 1):
            i1 = next(i for i in range(i0 + 1, i1 + 1) if self._is_sparse(span, i))
        return i1

    def _is_sparse(self, span: Span, i: int) -> bool:
        """Whether any query at token `i` sees more rows than it may attend to."""
        return self.ratio == SPARSE and span.visible(SPARSE, i) > self.args.index_topk

    def _tile(
        self,
        new: Projected,
        near: mx.array,
        cache: DeepseekV4Cache,
        span: Span,
        i0: int,
        i1: int,
    ) -> mx.array:
        """Attention output of tokens i0..i1, [B, i1-i0, D]."""
        W, t = self.args.sliding_window, i1 - i0
        mask = band(t, W)
        unwritten = span.unwritten(W, i0 + 1, t + W - 1)
        if unwritten is not None:
            mask = mask & unwritten
        parts = [Rows(near[:, i0 + 1 : i1 + W], mask)]
        if self.ratio and span.visible(self.ratio, i1 - 1):
            parts.append(self._far(new, cache, span, i0, i1))
        offset = span.shifted(i0)
        q = self._queries(self.wq_b(new.qr[:, i0:i1]), offset)
        o = self.rope(attend(q, parts, self.attn_sink), offset, inverse=True)
        return self.output(o, new.qr.dtype)

    def _far(self, new: Projected, cache: DeepseekV4Cache, span: Span, i0: int, i1: int) -> Rows:
        """The compressed rows for tokens i0..i1: all that are visible, or each token's best."""
        assert cache.kv is not None
        W, R = self.args.sliding_window, span.visible(self.ratio, i1 - 1)
        rows = cache.kv[:, W : W + R]
        seen = span.visible_counts(self.ratio, i0, i1)
        if not self._is_sparse(span, i1 - 1):
            return Rows(rows, counting(R) < seen[..., None])
        assert cache.keys is not None
        assert new.weights is not None
        y, weights = self.indexer.wq_b(new.qr[:, i0:i1]), new.weights[:, i0:i1]
        best = self.indexer.select(y, weights, cache.keys[:, :R], span.shifted(i0), seen)
        chosen = pick_rows(rows, mx.flatten(best, 1, 2))
        return Rows(mx.unflatten(chosen, 1, best.shape[1:]), best < seen[..., None])


def pick_rows(rows: mx.array, index: mx.array) -> mx.array:
    """rows [B, R, d] at index [B, n] -> [B, n, d]."""
    if rows.shape[0] == 1:
        return mx.take(rows, index[0], axis=1)
    return mx.take_along_axis(rows, index[..., None], axis=1)


def _sample_rows() -> tuple[Any, ...]:
    kv = mx.random.normal((2, 30, 16), key=mx.random.key(7))
    return kv, mx.array([[3, 0, 7], [1, 2, 9]], dtype=mx.uint32), 8


@kernels.twin(selection_kernels.chosen_rows, _sample_rows)
def chosen_rows(kv: mx.array, best: mx.array, W: int) -> mx.array:
    """The ring and the rows `best` [B, k] of a buffer kv [B, W + R, d] -> [B, W + k, d] float32."""
    ring = mx.broadcast_to(counting(W), (kv.shape[0], W))
    chosen = mx.concatenate([ring, best + W], axis=-1)
    return pick_rows(kv, chosen).astype(mx.float32)


def _sample_row() -> tuple[Any, ...]:
    y = mx.random.normal((2, 1, 128), key=mx.random.key(8))
    still, turning = np.full(32, np.inf), 10.0 ** (np.arange(32) / 8)
    rope = Rope(np.concatenate([still, turning]).astype(np.float32))
    weight = 1 + 0.1 * mx.random.normal((128,), key=mx.random.key(9))
    return y, weight, rope, mx.array([5, 900]), mx.float32, (64, True, 1e-6)


@kernels.twin(row_kernels.kv_row, _sample_row)
def finished_row(
    y: mx.array,
    weight: mx.array,
    rope: Rope,
    position: mx.array,
    dtype: mx.Dtype,
    constants: tuple[int, bool, float],
) -> mx.array:
    """One row per batch row: normed, turned to its position, rounded.

    y [B, 1, d], position [B]; `constants`: dims without position, whether they
    are rounded, norm eps.
    """
    nope, rounded, eps = constants
    rows = mx.fast.rms_norm(y.astype(mx.float32), weight.astype(mx.float32), eps)
    rows = rope(rows, position)
    return round_kv(rows, nope, dtype) if rounded else rows.astype(dtype)
