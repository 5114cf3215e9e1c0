"""Mixture of experts: hash or learned routing, clamped SwiGLU experts, one shared (spec C.7)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from mlxsteer.models.deepseek_v4 import kernels, selection_kernels
from mlxsteer.models.deepseek_v4.config import ModelArgs
from mlxsteer.models.deepseek_v4.fusing import Joined, counting, fused
from mlxsteer.models.deepseek_v4.host import in_halves, library, on_host, sigmoid
from mlxsteer.models.deepseek_v4.sharding import summed

SORT_FROM = 64  # chosen experts in a pass, from which sorting tokens by expert pays


@fused
def clamped_swiglu(gate: mx.array, up: mx.array, limit: float, dtype: mx.Dtype) -> mx.array:
    """`silu(min(gate, limit)) * clip(up, -limit, limit)`, in float32, cast at the end."""
    return swiglu(gate.astype(mx.float32), up.astype(mx.float32), limit).astype(dtype)


@on_host(np.float32, least=2**14)
def swiglu(gate: Any, up: Any, limit: float) -> Any:
    lib = library(gate)
    g = lib.minimum(gate, limit)
    return g * sigmoid(g) * lib.clip(up, -limit, limit)


@fused
def log_affinities(logits: mx.array) -> mx.array:
    """The log of `sqrt(softplus(logits))`: a softmax of these normalises the affinities."""
    return 0.5 * mx.log(mx.logaddexp(logits, 0))


@fused
def biased_affinities(logits: mx.array, bias: mx.array) -> mx.array:
    """The affinities plus the bias that only selection uses."""
    return mx.sqrt(mx.logaddexp(logits, 0)) + bias


def weights_of(logits: mx.array, experts: mx.array) -> mx.array:
    """Weights [N, k] of the chosen experts: their affinities, normalised to sum to 1."""
    return mx.softmax(log_affinities(mx.take_along_axis(logits, experts, axis=-1)), axis=-1)


def _sample() -> tuple[Any, ...]:
    logits = 3 * mx.random.normal((3, 16), key=mx.random.key(10))
    return mx.sort(logits, axis=-1), mx.sort(logits, axis=-1), 1


@kernels.twin(selection_kernels.top_experts, _sample)
def top_experts(biased: mx.array, logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k experts of largest biased affinity, in any order: [N, k], and their weights."""
    E = biased.shape[-1]
    experts = mx.argpartition(biased, kth=E - k, axis=-1)[..., E - k :]
    return experts, weights_of(logits, experts)


class Gate(nn.Module):
    """Chooses k experts per token: by token id in hash layers, else by biased affinity."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        E, k = args.n_routed_experts, args.num_experts_per_tok
        self.k = k
        self.weight = mx.zeros((E, args.hidden_size))
        if layer < args.num_hash_layers:
            self.tid2eid = mx.zeros((args.vocab_size, k), dtype=mx.int32)
            self.freeze(keys=["tid2eid"])
        else:
            self.e_score_correction_bias = mx.zeros((E,))

    def __call__(self, x: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
        """x [N, D], ids [N] -> experts [N, k], weights [N, k] float32 that sum to 1."""
        logits = x.astype(mx.float32) @ self.weight.astype(mx.float32).T
        if "tid2eid" in self:
            experts = mx.take(self.tid2eid, ids, axis=0)
            return experts, weights_of(logits, experts)
        biased = biased_affinities(logits, self.e_score_correction_bias)
        return top_experts(biased, logits, self.k)


class SwitchMLP(nn.Module):
    """All routed experts, stacked."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, I, E = args.hidden_size, args.moe_intermediate_size, args.n_routed_experts
        self.limit = args.swiglu_limit
        self.gate_proj = SwitchLinear(D, I, E, bias=False)
        self.up_proj = SwitchLinear(D, I, E, bias=False)
        self.down_proj = SwitchLinear(I, D, E, bias=False)

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [N, D], experts [N, k] -> every chosen expert's output [N, k, D].

        Many tokens are sorted by expert, so that each expert's matrix is read once.
        """
        N, k = experts.shape
        if N * k < SORT_FROM:
            return in_halves(lambda part: self._one_by_one(x, part), experts)
        order = mx.argsort(experts.flatten())
        if not mx.metal.is_available() and "scales" not in self.gate_proj:
            return self._by_expert(x[order // k], experts)[mx.argsort(order)].reshape(N, k, -1)
        of = experts.flatten()[order]
        h = self._activated(x[order // k][:, None], None, of, True)
        y = multiply(self.down_proj, h, None, of, True)[:, 0]
        return y[mx.argsort(order)].reshape(N, k, -1)

    def _one_by_one(self, x: mx.array, experts: mx.array) -> mx.array:
        """A product per token and chosen expert: [N, k, D]."""
        N, k = experts.shape
        token = (counting(N * k) // k).reshape(N, k) if N > 1 else _first_token(k)
        h = self._activated(x[:, None], token, experts, False)
        y = multiply(self.down_proj, h, counting(N * k).reshape(N, k), experts, False)
        return y[..., 0, :]

    def _by_expert(self, x: mx.array, experts: mx.array) -> mx.array:
        """One product per expert, for CPUs, where a gathered product goes row by row.

        x [N*k, D] in the order of experts. The counts are read back, which a CPU does not mind.
        """
        counts = np.bincount(np.array(experts).ravel(), minlength=len(self.gate_proj.weight))
        ends = np.cumsum(counts)
        parts = [(e, slice(ends[e] - counts[e], ends[e])) for e in np.flatnonzero(counts).tolist()]
        gate, up = (
            mx.concatenate([x[part] @ linear.weight[e].T for e, part in parts])
            for linear in (self.gate_proj, self.up_proj)
        )
        h = clamped_swiglu(gate, up, self.limit, x.dtype)
        return mx.concatenate([h[part] @ self.down_proj.weight[e].T for e, part in parts])

    def _activated(
        self, x: mx.array, token: mx.array | None, experts: mx.array, in_order: bool
    ) -> mx.array:
        gate = multiply(self.gate_proj, x, token, experts, in_order)
        up = multiply(self.up_proj, x, token, experts, in_order)
        h = clamped_swiglu(gate, up, self.limit, x.dtype)
        return h if in_order else mx.flatten(h, 0, 1)


@lru_cache(maxsize=8)
def _first_token(k: int) -> mx.array:
    zeros = mx.zeros((1, k), dtype=mx.uint32)
    mx.eval(zeros)
    return zeros


def multiply(
    linear: Any, x: mx.array, rows: mx.array | None, experts: mx.array, in_order: bool
) -> mx.array:
    """x [M, 1, in] row `rows[...]` by expert `experts[...]` -> [..., 1, out]."""
    given: dict[str, Any] = {
        "lhs_indices": rows,
        "rhs_indices": experts,
        "sorted_indices": in_order,
    }
    if "scales" not in linear:
        return mx.gather_mm(x, linear.weight.swapaxes(-1, -2), **given)
    return mx.gather_qmm(
        x,
        linear.weight,
        linear.scales,
        linear.get("biases"),
        transpose=True,
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
        global_scale=linear.global_scale,
        **given,
    )


class SharedExpert(nn.Module):
    """The expert that every token passes through."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        D, I = args.hidden_size, args.moe_intermediate_size * args.n_shared_experts
        self.limit = args.swiglu_limit
        self.gate_proj = nn.Linear(D, I, bias=False)
        self.up_proj = nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)
        self._inner = Joined(self, "gate_proj", "up_proj")

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self._inner.split(self._inner(x))
        return self.down_proj(clamped_swiglu(gate, up, self.limit, x.dtype))


class MoE(nn.Module):
    """The FFN of a layer: routed experts plus the shared one, summed in float32."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.scale = args.routed_scaling_factor
        self.gate = Gate(args, layer)
        self.switch_mlp = SwitchMLP(args)
        self.shared_experts = SharedExpert(args)
        self.group: Any = None  # of processes, where each expert is split among several

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """x [B, T, D], normed; ids [B, T] -> [B, T, D] in x's dtype."""
        tokens = mx.flatten(x, 0, 1)
        experts, weights = self.gate(tokens, ids.flatten())
        y = self.switch_mlp(tokens, experts).astype(mx.float32)
        shared = self.shared_experts(tokens)[:, None].astype(mx.float32)
        out = mx.addmm(shared, weights[:, None], y, alpha=self.scale)
        return summed(out.reshape(x.shape), self.group).astype(x.dtype)
