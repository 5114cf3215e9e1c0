"""A decode step of one row on a CPU: a layer in NumPy, but for what its cache keeps.

A product with one row does little but read its matrix. Measured on x86 with NumPy 2.4: `einsum`
reads 21 GB/s, OpenBLAS's product with a vector 11 to 14, and as MLX calls it (two matrices) 9.
OpenBLAS's threads also spin for a while after each product, on cores that others need.
The layers' modules are the definition, and all that a GPU runs; tests hold this file to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mlxsteer.models.deepseek_v4.attention import Attention, Projected, softmax_with_sink
from mlxsteer.models.deepseek_v4.cache import DeepseekV4Cache
from mlxsteer.models.deepseek_v4.experts import Gate, MoE, swiglu
from mlxsteer.models.deepseek_v4.fusing import Switch
from mlxsteer.models.deepseek_v4.hyper_connections import HyperConnection, gates
from mlxsteer.models.deepseek_v4.positions import Span


def serves(layer: Any, X: mx.array, span: Span) -> bool:
    """Whether this is a step of one row, in float32, through plain layers in one process."""
    if not Switch.on_host or not span.is_step or span.B > 1 or X.dtype != mx.float32:
        return False
    attn, moe = layer.attn, layer.ffn
    if type(attn) is not Attention or type(moe) is not MoE or attn.group or moe.group:
        return False
    return all(map(_plain, _linears(attn, moe)))


def run(layer: Any, X: mx.array, ids: mx.array, cache: DeepseekV4Cache, span: Span) -> mx.array:
    """The decoder `layer` on streams X [1, 1, n, D] -> the streams after it."""
    streams = _array(X)[0, 0]
    with np.errstate(over="ignore"):  # 1 / (1 + exp(-x)) is 0 where exp is infinite
        x, post, C = _front(layer.attn_hc, streams)
        a = _attention(layer.attn, _normed(x, layer.attn_norm), cache, span)
        streams = _expanded(_tapped(layer.taps, "attn_out", a), streams, post, C)
        x, post, C = _front(layer.ffn_hc, streams)
        f = _experts(layer.ffn, _normed(x, layer.ffn_norm), ids)
        streams = _expanded(_tapped(layer.taps, "ffn_out", f), streams, post, C)
    Y = _given(streams)
    if layer.taps is None:
        return Y
    return layer.taps.apply("stream", layer.taps.apply("residual", Y)).astype(mx.float32)


def _linears(attn: Attention, moe: MoE) -> list[Any]:
    found = [attn.wq_b, attn.wo_a, attn.wo_b, *attn.inner.linears, *attn.rows_inner.linears]
    if "indexer" in attn:
        found.append(attn.indexer.wq_b)
    for mlp in (moe.switch_mlp, moe.shared_experts):
        found += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return found


def _plain(linear: Any) -> bool:
    """Whether it is a product with a float32 matrix and no more."""
    known = type(linear) in (nn.Linear, SwitchLinear, MultiLinear)
    return known and "bias" not in linear and linear.weight.dtype == mx.float32


def _array(x: mx.array) -> np.ndarray:
    """A view."""
    return np.asarray(x)


def _given(x: np.ndarray) -> mx.array:
    """A copy, as the one token of a batch of one row."""
    return mx.array(x)[None, None]


def _times(linear: Any, x: np.ndarray) -> np.ndarray:
    """A layer of one matrix [out, in] with x [in] -> [out]."""
    return _product(_array(linear.weight), x)


def _product(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.einsum("oi,i->o", matrix, x)


def _normed(x: np.ndarray, norm: nn.RMSNorm) -> np.ndarray:
    scale = np.float32(1) / np.sqrt(x.dot(x) / x.size + np.float32(norm.eps))
    return x * scale * _array(norm.weight)


def _tapped(taps: Any, site: str, x: np.ndarray) -> np.ndarray:
    """What the taps make of a sublayer's output x [D]."""
    if taps is None:
        return x
    return _array(taps.apply(site, _given(x)).astype(mx.float32))[0, 0]


def _front(hc: HyperConnection, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hc_pre: streams [n, D] -> the sublayer's input [D], post [n], C [n, n]."""
    z = streams.ravel()
    u = _product(_array(hc.fn), z).astype(np.float64)
    squares = np.array([z.dot(z) / z.size], np.float64)
    found = gates(u, squares, _array(hc.scale), _array(hc.base), len(streams), hc.constants)
    pre, post, C = (a.astype(np.float32) for a in found)
    return pre.dot(streams), post, C


def _expanded(out: np.ndarray, streams: np.ndarray, post: np.ndarray, C: np.ndarray) -> np.ndarray:
    """hc_post: a sublayer's output [D] written to streams [n, D] mixed by C [n, n]."""
    return post[:, None] * out + C.T.dot(streams)


def _attention(attn: Attention, x: np.ndarray, cache: DeepseekV4Cache, span: Span) -> np.ndarray:
    """x [D], normed -> [D]. Stores the token in `cache`."""
    qr, kv = (_times(linear, x) for linear in attn.inner.linears)
    qr = _normed(qr, attn.q_norm)
    rows = [_times(linear, x) for linear in attn.rows_inner.linears]
    new = Projected(
        _given(qr),
        _given(kv),
        _given(np.concatenate(rows)) if rows else None,
        index_q=_given(_times(attn.indexer.wq_b, qr)) if attn.chooses(span) else None,
    )
    best = attn.store(new, cache, span)
    mx.eval(cache.arrays, [] if best is None else best)
    o = _attended(attn, _times(attn.wq_b, qr), _seen(attn, cache, best, span), span.starts[0])
    wo_a = _array(attn.wo_a.weight)
    return _times(attn.wo_b, np.einsum("goi,gi->go", wo_a, o.reshape(len(wo_a), -1)).ravel())


def _seen(attn: Attention, cache: DeepseekV4Cache, best: mx.array | None, span: Span) -> np.ndarray:
    """The rows [K, d] that the token attends to: of the ring, and compressed ones."""
    assert cache.kv is not None
    kv, end, W = _array(cache.kv)[0], span.ends[0], cache.shape.window
    if best is not None:
        far = kv[W + _array(best).ravel()]
    else:
        far = kv[W : W + (span.visible(attn.ratio, 0) if attn.ratio else 0)]
    return np.concatenate([kv[: min(end, W)], far])


def _attended(attn: Attention, y: np.ndarray, rows: np.ndarray, position: int) -> np.ndarray:
    """y [H*d] from `wq_b`, rows [K, d] -> what the heads read, [H, d], for `wo_a`."""
    d = rows.shape[-1]
    q = y.reshape(-1, d)
    squares = np.einsum("hd,hd->h", q, q)[:, None] / d
    q = attn.rope.turned(q / np.sqrt(d * (squares + np.float32(attn.eps))), position)
    scores = np.einsum("hd,kd->hk", q, rows)[None, :, None]
    p = softmax_with_sink(scores, _array(attn.attn_sink))[0, :, 0]
    return attn.rope.turned(np.einsum("hk,kd->hd", p, rows), position, inverse=True)


def _experts(moe: MoE, x: np.ndarray, ids: mx.array) -> np.ndarray:
    """x [D], normed -> [D]."""
    routed, shared = moe.switch_mlp, moe.shared_experts
    out = _mlp(_matrices(shared), x, shared.limit)
    matrices = _matrices(routed)
    experts, weights = _route(moe.gate, x, ids)
    for e, weight in zip(experts.tolist(), weights * moe.scale, strict=True):
        out += weight * _mlp([m[e] for m in matrices], x, routed.limit)
    return out


def _matrices(mlp: Any) -> list[np.ndarray]:
    return [_array(linear.weight) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def _mlp(matrices: Sequence[np.ndarray], x: np.ndarray, limit: float) -> np.ndarray:
    gate, up, down = matrices
    return _product(down, swiglu(_product(gate, x), _product(up, x), limit))


def _route(gate: Gate, x: np.ndarray, ids: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """The chosen experts [k] of one token, and their weights [k], which sum to 1."""
    affinities = np.sqrt(np.logaddexp(_product(_array(gate.weight), x), np.float32(0)))
    if "tid2eid" in gate:
        experts = _array(gate.tid2eid)[_array(ids)[0, 0]]
    else:
        biased = affinities + _array(gate.e_score_correction_bias)
        experts = np.argpartition(biased, len(biased) - gate.k)[-gate.k :]
    weights = affinities[experts]
    return experts, weights / weights.sum()
