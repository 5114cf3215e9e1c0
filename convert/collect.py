"""Measuring importance: one pass of texts through a converted model, layer by layer.

Only one layer's weights are in memory at a time, so `lossless` can be measured on a Mac that
could not chat with it; between layers only the residual streams of the texts are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.importance import smooth
from mlxsteer.convert.progress import SILENT, Progress

Moments = dict[str, mx.array]

_EXPERTS, _GROUPED = ".switch_mlp.", ".attn.wo_a"


class Tally:
    """Sums of squares of a module's inputs, per column; per expert or group where it has them."""

    def __init__(self, path: str, stack: int, cols: int):
        self._experts, self._grouped = _EXPERTS in path, path.endswith(_GROUPED)
        self.sums = mx.zeros((stack, cols) if stack else (cols,))
        self.counts = mx.zeros((stack,) if stack else ())

    def add(self, x: mx.array, indices: mx.array | None = None) -> None:
        """Inputs `[..., cols]`; for experts `[..., 1, cols]` with the chosen experts' `indices`."""
        x = x.astype(mx.float32)
        if self._experts:
            assert indices is not None
            wide = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
            chosen = indices.reshape(-1)
            self.sums = self.sums.at[chosen].add(mx.square(wide))
            self.counts = self.counts.at[chosen].add(1.0)
        elif self._grouped:  # [B, groups, T, cols]
            self.sums = self.sums + mx.square(x).sum((0, 2))
            self.counts = self.counts + x.shape[0] * x.shape[2]
        else:
            flat = x.reshape(-1, x.shape[-1])
            self.sums = self.sums + mx.square(flat).sum(0)
            self.counts = self.counts + flat.shape[0]

    def moments(self) -> mx.array:
        """Second moments; experts that saw few tokens lean on the mean of all."""
        counts = mx.maximum(self.counts, 1)
        means = self.sums / (counts[:, None] if self.sums.ndim == 2 else counts)
        return smooth(means, self.counts) if self._experts else means


def collect(
    folder: Path, texts: Sequence[Sequence[int]], progress: Progress = SILENT
) -> tuple[Moments, int]:
    """Second moments of every quantisable module's input over `texts` (token ids), and tokens.

    Costs one forward pass over all tokens and one read of all weights.
    """
    if not any(texts):
        raise ConvertError("There is no text to measure on. Give --prompts a file with some.")
    model = _load(folder)
    decoder = model.model
    ids = [mx.array([list(text)]) for text in texts if text]
    streams = [_embed(decoder, row) for row in ids]
    layers, decoder.layers = list(decoder.layers), []
    moments: Moments = {}
    progress.start(len(layers), 0)
    for index in range(len(layers)):
        progress.status(f"measuring layer {index}")
        layer, layers[index] = layers[index], None
        tallies = _install(layer, f"model.layers.{index}")
        for number, (row, X) in enumerate(zip(ids, streams, strict=True)):
            state = model.make_cache()
            streams[number] = layer(X, row, state[index], state[0].span(*row.shape))
            mx.eval(streams[number], [t.sums for t in tallies.values()])
        moments |= _finished(tallies)
        del layer
        mx.clear_cache()
        progress.advance(1)
    moments["lm_head"] = _head_moments(decoder, streams)
    return moments, sum(row.size for row in ids)


def _embed(decoder: Any, ids: mx.array) -> mx.array:
    """The four identical streams a text starts with, `[1, T, 4, D]`."""
    x = decoder.embed_tokens(ids).astype(decoder.norm.weight.dtype)
    return mx.broadcast_to(x[:, :, None], (*ids.shape, decoder._n, x.shape[-1]))


def _head_moments(decoder: Any, streams: Sequence[mx.array]) -> mx.array:
    inputs = [decoder.norm(decoder.hc_head(X)).astype(mx.float32) for X in streams]
    flat = mx.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs])
    return mx.square(flat).mean(0).astype(mx.bfloat16)


def _finished(tallies: dict[str, Tally]) -> Moments:
    """Moments in bf16: a weight of the search needs no more. Silent modules are an error."""
    moments = {}
    for path, tally in tallies.items():
        if not bool(mx.any(tally.counts > 0).item()):
            raise ConvertError(f"{path} saw no input: the model does not call it. Report this.")
        moments[path] = tally.moments().astype(mx.bfloat16)
    mx.eval(moments)
    return moments


def _install(layer: nn.Module, path: str) -> dict[str, Tally]:
    """Let every quantisable module of a layer tally what it is given."""
    tallies = {}
    for name, module in _modules(layer):
        weight = module.weight
        stack = weight.shape[0] if weight.ndim == 3 else 0
        tally = Tally(f"{path}.{name}", stack, _columns(module))
        kind: Any = type(module)
        module.__class__ = _tallying(kind)
        object.__setattr__(module, "_tally", tally.add)
        tallies[f"{path}.{name}"] = tally
    return tallies


def _modules(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that a recipe may re-encode; `up_proj` shares its input with `gate_proj`."""
    wanted = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b")
    for name, module in layer.named_modules():
        projection = name.endswith(("gate_proj", "down_proj"))
        if name in wanted or (projection and name.startswith("ffn.")):
            yield name, module


def _columns(module: Any) -> int:
    packed = int(module.weight.shape[-1])
    return packed * 32 // module.bits if hasattr(module, "bits") else packed


@cache
def _tallying(kind: Any) -> type:
    """`kind` with its inputs shown to `_tally` first. A subclass: parameters keep their names."""

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._tally(x, *args[:1])
        result: mx.array = kind.__call__(self, x, *args, **kwargs)
        return result

    return type(f"Tallying{kind.__name__}", (kind,), {"__call__": call})


def _load(folder: Path) -> Any:
    """Our module with its weights not read yet."""
    from mlx_lm.utils import load_model

    from mlxsteer.models.deepseek_v4 import Model, ModelArgs

    model, _ = load_model(folder, lazy=True, get_model_classes=lambda config: (Model, ModelArgs))
    if mx.default_device() == mx.Device(mx.cpu):  # where bf16 products also add up in bf16
        model.set_dtype(mx.float32)
    return model


def read_texts(path: Path | None) -> list[str]:
    """Texts of a file, one per paragraph; without a file, those of the bundled contrast sets."""
    if path is None:
        return _bundled_texts()
    try:
        parts = path.read_text(encoding="utf-8").split("\n\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"Cannot read the texts in {path}: {error}") from error
    return [part.strip() for part in parts if part.strip()]


def _bundled_texts() -> list[str]:
    from importlib import resources

    import yaml

    found: dict[str, None] = {}
    for file in sorted(resources.files("mlxsteer.prompts").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            found |= dict.fromkeys(_strings(yaml.safe_load(file.read_text(encoding="utf-8"))))
    return list(found)


def _strings(data: Any) -> Iterator[str]:
    """Every sentence in nested YAML; single words are keys and names."""
    if isinstance(data, str) and " " in data:
        yield data
    elif isinstance(data, dict | list):
        for item in data.values() if isinstance(data, dict) else data:
            yield from _strings(item)


def tokenise(folder: Path, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Token ids of `texts`, at most `limit` tokens in all."""
    encode: Callable[[str], list[int]]
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        encode = tokenizer.encode
    except (OSError, ValueError) as error:
        raise ConvertError(f"{folder} has no usable tokenizer: {error}") from error
    ids, left = [], limit
    for text in texts:
        if left <= 0:
            break
        ids.append(encode(text)[:left])
        left -= len(ids[-1])
    return ids
