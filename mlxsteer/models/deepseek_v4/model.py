"""DeepSeek-V4: the decoder block, the whole model, and what mlx-lm expects of one (spec C.0)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxsteer.models.deepseek_v4 import host_step
from mlxsteer.models.deepseek_v4 import weights as checkpoint
from mlxsteer.models.deepseek_v4.attention import Attention
from mlxsteer.models.deepseek_v4.cache import DeepseekV4Cache, layer_shape
from mlxsteer.models.deepseek_v4.config import ModelArgs
from mlxsteer.models.deepseek_v4.experts import MoE
from mlxsteer.models.deepseek_v4.hyper_connections import HyperConnection, HyperHead, expand
from mlxsteer.models.deepseek_v4.positions import Span
from mlxsteer.models.deepseek_v4.sharding import Pipeline, RemoteLayer, shard


class DecoderLayer(nn.Module):
    """Attention and experts, each between a hyper-connection front and an expansion.

    `taps`, when installed, sees what each sublayer writes and the streams after the block
    (float32, before they are cast), and returns them as they are or edited.
    """

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.taps: Any = None
        self.attn_hc = HyperConnection(args)
        self.attn_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.attn = Attention(args, layer)
        self.ffn_hc = HyperConnection(args)
        self.ffn_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.ffn = MoE(args, layer)

    def __call__(self, X: mx.array, ids: mx.array, cache: DeepseekV4Cache, span: Span) -> mx.array:
        """Streams X [B, T, 4, D] -> the streams after the block.

        A step of a packed model works in float32 between the streams: no casts, and the same
        bytes of weights.
        """
        if host_step.serves(self, X, span):
            return host_step.run(self, X, ids, cache, span)
        wide = mx.float32 if span.is_step and "scales" in self.attn.wq_a else X.dtype
        x, post, C = self.attn_hc(X, wide)
        a = self.attn(self.attn_norm(x), cache, span)
        if self.taps is not None:
            a = self.taps.apply("attn_out", a)
        X = expand(a, X, post, C, X.dtype)
        x, post, C = self.ffn_hc(X, wide)
        f = self.ffn(self.ffn_norm(x), ids)
        if self.taps is not None:
            f = self.taps.apply("ffn_out", f)
        if self.taps is not None:
            Y = expand(f, X, post, C)
            edited = self.taps.apply("stream", self.taps.apply("residual", Y))
            if edited is not Y:
                return edited.astype(X.dtype)
        return expand(f, X, post, C, X.dtype)  # idle taps leave no trace in the graph


class Decoder(nn.Module):
    """Embedding, blocks, collapse and final norm."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self._n = args.hc_mult
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers: list[Any] = [DecoderLayer(args, i) for i in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.hc_head = HyperHead(args)
        self._stage: Pipeline | None = None
        self.start_idx, self.end_idx = 0, args.num_hidden_layers

    def pipeline(self, group: Any) -> None:
        """Keep this process's range of layers; mlx-lm's loader calls it."""
        self._stage = Pipeline(group, len(self.layers))
        self.start_idx, self.end_idx = self._stage.start, self._stage.end
        here = range(self.start_idx, self.end_idx)
        self.layers = [x if i in here else RemoteLayer() for i, x in enumerate(self.layers)]

    def __call__(self, ids: mx.array, cache: list[DeepseekV4Cache]) -> mx.array:
        """ids [B, T] -> [B, T, D], normed."""
        here = slice(self.start_idx, self.end_idx)
        dtype = self.norm.weight.dtype
        B, T = ids.shape
        span = cache[here][0].span(B, T, dtype)
        x = self.embed_tokens(ids).astype(dtype)
        X = mx.broadcast_to(x[:, :, None], (B, T, self._n, x.shape[-1]))
        X = self._stage.arriving(X) if self._stage else X
        for layer, c in zip(self.layers[here], cache[here], strict=True):
            X = layer(X, ids, c, span)
        X = self._stage.leaving(X, cache[here][-1]) if self._stage else X
        h = self.norm(self.hc_head(X))
        return self._stage.everywhere(h) if self._stage else h


class Model(nn.Module):
    """DeepSeek-V4 as mlx-lm runs it: `model(inputs, cache) -> logits`."""

    steering_sites = ("residual", "stream", "ffn_out", "attn_out")

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: list[DeepseekV4Cache] | None = None) -> mx.array:
        """Token ids [B, T] -> logits [B, T, V]. Without a cache: the whole input, causally."""
        live = self.make_cache() if cache is None else cache
        h = self.model(inputs, live)
        # A packed head multiplies in the type of its input; a dense one would be cast whole.
        logits = self.lm_head(h.astype(mx.float32) if "scales" in self.lm_head else h)
        if cache is None:
            return logits
        # State that the next step does not read must be computed too, or graphs pile up.
        return mx.depends(logits, [a for c in cache for a in c.arrays])

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers

    def shard(self, group: Any = None) -> None:
        """Split heads and experts among the processes of `group`; mlx-lm's loader calls it."""
        shard(self, group or mx.distributed.init())

    def make_cache(self) -> list[DeepseekV4Cache]:
        """An empty cache per layer."""
        n = self.args.num_hidden_layers
        return [DeepseekV4Cache(layer_shape(self.args, i)) for i in range(n)]

    def residual_reading(self, x: mx.array) -> mx.array:
        """What capture reads: streams [B, T, 4, D] as their mean, float32 [B, T, D]."""
        x = x.astype(mx.float32)
        return x.mean(axis=2) if x.ndim == 4 else x

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """A checkpoint's tensors under this module's names.

        Modules whose tensors came as official FP8 or FP4 are made quantised modules here.
        """
        named, packed = checkpoint.sanitize(self.args, weights)
        if packed:
            nn.quantize(self, class_predicate=lambda path, _: _official_mode(path, packed))
        return named

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Which parameters may be cast to a narrower type (mlx-lm's conversion asks)."""
        return lambda path: not any(part in path for part in _FLOAT32)


_FLOAT32 = ("_hc.", "hc_head.", ".ape", "attn_sink", "ffn.gate.", "compressor.w", "weights_proj")


def _official_mode(path: str, packed: set[str]) -> bool | dict[str, Any]:
    if path not in packed:
        return False
    bits = 4 if ".switch_mlp." in path else 8
    return {"group_size": 32, "bits": bits, "mode": f"mxfp{bits}"}
