"""Running one model on several machines with MLX's distributed engine.

`shard` splits heads and experts: every process holds a part of each layer and all see the same
streams, so steering and cache are the same everywhere. `Pipeline` splits by layers: streams
travel from the process with the first layers (the last rank, as in mlx-lm) to rank 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace

from mlxsteer.errors import ModelError

if TYPE_CHECKING:
    from mlxsteer.models.deepseek_v4.attention import Attention
    from mlxsteer.models.deepseek_v4.cache import DeepseekV4Cache
    from mlxsteer.models.deepseek_v4.experts import MoE
    from mlxsteer.models.deepseek_v4.model import Model

IN, OUT = "sharded-to-all", "all-to-sharded"  # split along the input, along the output


def summed(x: mx.array, group: Any) -> mx.array:
    """The sum of every process's part; `x` itself where there is one process."""
    return x if group is None else mx.distributed.all_sum(x, group=group)


def shard(model: Model, group: Any) -> None:
    """Keep this process's heads and its part of every expert. ModelError if they do not divide."""
    n = group.size()
    args = model.args
    for name, size in (
        ("output groups", args.o_groups),
        ("expert width", args.moe_intermediate_size),
    ):
        if size % n:
            raise ModelError(
                f"{size} {name} cannot be divided among {n} processes. Use a number of processes"
                f" that divides {size}, or split by layers."
            )
    if n == 1:
        return
    for layer in model.layers:
        _shard_attention(layer.attn, group)
        _shard_experts(layer.ffn, group)


def _shard_attention(attn: Attention, group: Any) -> None:
    n, r = group.size(), group.rank()
    shard_inplace(attn.wq_b, OUT, group=group)
    shard_inplace(attn.wo_a, lambda path, weight: 0, group=group)
    shard_inplace(attn.wo_b, IN, group=group)
    attn.attn_sink = mx.contiguous(mx.split(attn.attn_sink, n)[r])
    attn.keep_part(n, group)


def _shard_experts(ffn: MoE, group: Any) -> None:
    for mlp in (ffn.switch_mlp, ffn.shared_experts):
        shard_inplace(mlp.gate_proj, OUT, group=group)
        shard_inplace(mlp.up_proj, OUT, group=group)
        shard_inplace(mlp.down_proj, IN, group=group)
    ffn.group = group


class RemoteLayer(nn.Module):
    """Stands where a layer runs in another process. Taps on it see nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.taps: Any = None


class Pipeline:
    """This process's range of layers, and how streams reach and leave it."""

    def __init__(self, group: Any, n_layers: int):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        if n_layers < self.size:
            raise ModelError(f"{n_layers} layers cannot be divided among {self.size} processes.")
        base, extra = divmod(n_layers, self.size)
        counts = [base + (r < extra) for r in range(self.size)]
        self.start = sum(counts[self.rank + 1 :])
        self.end = self.start + counts[self.rank]

    def arriving(self, X: mx.array) -> mx.array:
        """The streams from the process with the layers before; `X` itself at the first."""
        if self.rank == self.size - 1:
            return X
        return mx.distributed.recv_like(X, self.rank + 1, group=self.group)

    def leaving(self, X: mx.array, last: DeepseekV4Cache) -> mx.array:
        """Send the streams on. The cache depends on it, so that a prefill that evaluates only
        the cache sends too."""
        if self.rank == 0:
            return X
        X = mx.distributed.send(X, self.rank - 1, group=self.group)
        assert last.kv is not None
        last.kv = mx.depends(last.kv, X)
        return X

    def everywhere(self, h: mx.array) -> mx.array:
        """Rank 0's final hidden state, in every process."""
        return mx.distributed.all_gather(h, group=self.group)[: h.shape[0]]
