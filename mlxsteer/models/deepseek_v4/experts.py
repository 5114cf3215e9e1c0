"""Mixture of experts: hash or learned routing, clamped SwiGLU experts, one shared (spec C.7)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from mlxsteer.models.deepseek_v4.config import ModelArgs
from mlxsteer.models.deepseek_v4.sharding import summed

SORT_FROM = 64  # chosen experts in a pass, from which sorting tokens by expert pays


def clamped_swiglu(gate: mx.array, up: mx.array, limit: float) -> mx.array:
    """`silu(min(gate, limit)) * clip(up, -limit, limit)` in float32."""
    g = mx.minimum(gate.astype(mx.float32), limit)
    u = mx.clip(up.astype(mx.float32), -limit, limit)
    return g * mx.sigmoid(g) * u


def affinities(logits: mx.array) -> mx.array:
    """`sqrt(softplus(logits))`, float32."""
    return mx.sqrt(mx.logaddexp(logits, 0))


def normalised(chosen: mx.array, scale: float) -> mx.array:
    """Affinities [..., k] of the chosen experts as weights that sum to `scale`."""
    return chosen / chosen.sum(axis=-1, keepdims=True) * scale


class Gate(nn.Module):
    """Chooses k experts per token: by token id in hash layers, else by biased affinity."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        E, k = args.n_routed_experts, args.num_experts_per_tok
        self._k, self._scale = k, args.routed_scaling_factor
        self.weight = mx.zeros((E, args.hidden_size))
        if layer < args.num_hash_layers:
            self.tid2eid = mx.zeros((args.vocab_size, k), dtype=mx.int32)
            self.freeze(keys=["tid2eid"])
        else:
            self.e_score_correction_bias = mx.zeros((E,))

    def __call__(self, x: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
        """x [B, T, D], ids [B, T] -> experts [B, T, k], weights [B, T, k] float32."""
        s = affinities(x.astype(mx.float32) @ self.weight.astype(mx.float32).T)
        if "tid2eid" in self:
            experts = self.tid2eid[ids]
        else:
            biased = s + self.e_score_correction_bias
            E = biased.shape[-1]
            experts = mx.argpartition(biased, kth=E - self._k, axis=-1)[..., E - self._k :]
        weights = mx.take_along_axis(s, experts, axis=-1)
        return experts, normalised(weights, self._scale)


class SwitchMLP(nn.Module):
    """All routed experts, stacked."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, I, E = args.hidden_size, args.moe_intermediate_size, args.n_routed_experts
        self._limit = args.swiglu_limit
        self.gate_proj = SwitchLinear(D, I, E, bias=False)
        self.up_proj = SwitchLinear(D, I, E, bias=False)
        self.down_proj = SwitchLinear(I, D, E, bias=False)

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """x [N, D], experts and weights [N, k] -> the weighted sum [N, D] float32."""
        N, k = experts.shape
        if N * k < SORT_FROM:
            y = self._run(x[:, None, None], experts, False)[..., 0, :]
        else:
            order = mx.argsort(experts.flatten())
            y = self._run(x[order // k][:, None], experts.flatten()[order], True)[:, 0]
            y = y[mx.argsort(order)].reshape(N, k, -1)
        return (weights[:, None, :] @ y.astype(mx.float32)).squeeze(1)

    def _run(self, x: mx.array, experts: mx.array, in_order: bool) -> mx.array:
        gate = self.gate_proj(x, experts, sorted_indices=in_order)
        up = self.up_proj(x, experts, sorted_indices=in_order)
        h = clamped_swiglu(gate, up, self._limit).astype(x.dtype)
        return self.down_proj(h, experts, sorted_indices=in_order)


class SharedExpert(nn.Module):
    """The expert that every token passes through."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, I = args.hidden_size, args.moe_intermediate_size * args.n_shared_experts
        self._limit = args.swiglu_limit
        self.gate_proj = nn.Linear(D, I, bias=False)
        self.up_proj = nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        h = clamped_swiglu(self.gate_proj(x), self.up_proj(x), self._limit)
        return self.down_proj(h.astype(x.dtype))


class MoE(nn.Module):
    """The FFN of a layer: routed experts plus the shared one, summed in float32."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.gate = Gate(args, layer)
        self.switch_mlp = SwitchMLP(args)
        self.shared_experts = SharedExpert(args)
        self.group: Any = None  # of processes, where each expert is split among several

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """x [B, T, D], normed; ids [B, T] -> [B, T, D] in x's dtype."""
        experts, weights = self.gate(x, ids)
        k = experts.shape[-1]
        routed = self.switch_mlp(
            mx.flatten(x, 0, 1), experts.reshape(-1, k), weights.reshape(-1, k)
        )
        out = routed.reshape(x.shape) + self.shared_experts(x)
        return summed(out, self.group).astype(x.dtype)
