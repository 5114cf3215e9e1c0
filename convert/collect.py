"""Measuring importance: texts through a converted model, one layer in memory at a time.

`lossless` can be measured on a Mac that could not chat with it: every layer is read when its turn
comes, and let go afterwards. What a matrix is given is taken at the entrance of the attention and
expert blocks and worked out from there by the reference's formulas (spec C.4, C.7), so that it
does not depend on how the model fuses its own steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.importance import smooth
from mlxsteer.convert.progress import SILENT, Progress

Moments = dict[str, mx.array]

WIDTH = 256  # tokens of context that a text is cut into
PASS_TOKENS = 4096  # tokens of one pass; every pass reads the whole model once


class Tally:
    """Sums of squares of a matrix's inputs, float32 `[cols]` or `[stack, cols]`."""

    def __init__(self) -> None:
        self.sums: mx.array | None = None
        self.counts = mx.array(0.0)
        self._experts = False

    def add(self, x: mx.array) -> None:
        """Inputs `[..., cols]`."""
        flat = x.astype(mx.float32).reshape(-1, x.shape[-1])
        self._add(mx.square(flat).sum(0), mx.array(float(flat.shape[0])))

    def add_groups(self, x: mx.array) -> None:
        """Inputs `[B, groups, T, cols]` of a matrix that is stacked by groups."""
        sums = mx.square(x.astype(mx.float32)).sum((0, 2))
        self._add(sums, mx.full((x.shape[1],), float(x.shape[0] * x.shape[2])))

    def add_experts(self, x: mx.array, chosen: mx.array, experts: int) -> None:
        """Inputs `[N, k, cols]` of the `chosen` `[N, k]` of `experts` experts."""
        self._experts = True
        flat = x.astype(mx.float32).reshape(-1, x.shape[-1])
        who = chosen.reshape(-1)
        sums = mx.zeros((experts, flat.shape[-1])).at[who].add(mx.square(flat))
        self._add(sums, mx.zeros((experts,)).at[who].add(1.0))

    def _add(self, sums: mx.array, counts: mx.array) -> None:
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = self.counts + counts

    def moments(self) -> mx.array:
        """Second moments in bf16 (a weight of the search needs no more bits)."""
        assert self.sums is not None
        counts = mx.maximum(self.counts, 1)
        means = self.sums / (counts[:, None] if self.sums.ndim == 2 else counts)
        if self._experts:
            means = smooth(means, self.counts)
        return means.astype(mx.bfloat16)


def collect(
    folder: Path, texts: Sequence[Sequence[int]], progress: Progress = SILENT
) -> tuple[Moments, int]:
    """Second moments of every quantisable matrix's input over `texts` (token ids), and tokens.

    Costs one forward pass over all tokens, and one read of all weights per PASS_TOKENS.
    """
    passes = list(_passes(texts))
    if not passes:
        raise ConvertError("There is no text to measure on. Give --prompts a file with some.")
    tallies: dict[str, Tally] = {}
    for number, ids in enumerate(passes, start=1):
        _one_pass(_load(folder), ids, tallies, progress, f"pass {number} of {len(passes)}")
    silent = [path for path, tally in tallies.items() if tally.sums is None]
    if silent:
        raise ConvertError(f"{silent[0]} saw no input, so nothing was measured. Report this.")
    return {p: t.moments() for p, t in tallies.items()}, sum(ids.size for ids in passes)


def _passes(texts: Sequence[Sequence[int]]) -> Iterator[mx.array]:
    """The texts one after another, cut into rows of WIDTH; `[B, WIDTH]` a pass."""
    stream = [token for text in texts for token in text]
    width = min(WIDTH, len(stream))
    rows = [stream[i : i + width] for i in range(0, len(stream) - width + 1, width or 1)]
    step = max(1, PASS_TOKENS // max(width, 1))
    for first in range(0, len(rows) if width else 0, step):
        yield mx.array(rows[first : first + step])


def _one_pass(
    model: Any, ids: mx.array, tallies: dict[str, Tally], progress: Progress, name: str
) -> None:
    """Run `ids` `[B, T]`; the logits are never computed."""
    decoder = model.model

    def once(index: int, layer: Any) -> OneUse:
        announce = partial(progress.status, f"{name}, layer {index}")
        return OneUse(layer, index, model.args, tallies, announce)

    decoder.layers = [once(index, layer) for index, layer in enumerate(decoder.layers)]
    tally = tallies.setdefault("lm_head", Tally())
    watch(model.lm_head, lambda x, *rest: tally.add(x))
    model(ids)
    assert tally.sums is not None
    mx.eval(tally.sums)


class OneUse:
    """A layer that tallies what its matrices are given, computes at once, and is then let go."""

    def __init__(
        self,
        layer: Any,
        index: int,
        args: Any,
        tallies: dict[str, Tally],
        announce: Callable[[], None],
    ):
        self._layer, self._path, self._announce = layer, f"model.layers.{index}", announce
        self._args, self._tallies = args, tallies

    def __call__(self, X: mx.array, *rest: Any) -> mx.array:
        self._announce()
        layer, self._layer = self._layer, None
        tally = self._tally
        watch(layer.attn, partial(_see_attention, layer.attn, tally))
        watch(layer.attn.wo_a, lambda x, *rest: tally("attn.wo_a").add_groups(x))
        watch(layer.attn.wo_b, lambda x, *rest: tally("attn.wo_b").add(x))
        watch(layer.ffn, partial(_see_experts, layer.ffn, self._args, tally))
        X = layer(X, *rest)
        own = [t for p, t in self._tallies.items() if p.startswith(f"{self._path}.")]
        mx.eval(X, [[t.sums, t.counts] for t in own if t.sums is not None])
        del layer
        mx.clear_cache()
        return X

    def _tally(self, name: str) -> Tally:
        return self._tallies.setdefault(f"{self._path}.{name}", Tally())


def _see_attention(attn: Any, tally: Callable[[str], Tally], x: mx.array, *rest: Any) -> None:
    """The normed input `[B, T, D]` feeds wq_a and wkv; its normed query rank feeds wq_b."""
    for name in ("attn.wq_a", "attn.wkv"):
        tally(name).add(x)
    tally("attn.wq_b").add(attn.q_norm(attn.wq_a(x)))
    for name in ("attn.wo_a", "attn.wo_b"):  # seen when they are called; silence is an error
        tally(name)


def _see_experts(
    ffn: Any, args: Any, tally: Callable[[str], Tally], x: mx.array, ids: mx.array
) -> None:
    """The normed input `[B, T, D]` of the routed experts and of the shared one."""
    tokens = x.reshape(-1, x.shape[-1])
    chosen = route(ffn.gate, tokens, ids.reshape(-1), args.num_experts_per_tok)
    E, wide = args.n_routed_experts, tokens[:, None]
    given = mx.broadcast_to(wide, (*chosen.shape, tokens.shape[-1]))
    tally("ffn.switch_mlp.gate_proj").add_experts(given, chosen, E)
    switch, row = ffn.switch_mlp, wide[:, None]
    gate, up = (part(row, chosen)[..., 0, :] for part in (switch.gate_proj, switch.up_proj))
    tally("ffn.switch_mlp.down_proj").add_experts(_swiglu(gate, up, args), chosen, E)
    shared = ffn.shared_experts
    tally("ffn.shared_experts.gate_proj").add(tokens)
    hidden = _swiglu(shared.gate_proj(tokens), shared.up_proj(tokens), args)
    tally("ffn.shared_experts.down_proj").add(hidden)


def route(gate: Any, x: mx.array, ids: mx.array, k: int) -> mx.array:
    """The k experts `[N, k]` of each token (spec C.7)."""
    if "tid2eid" in gate:
        return gate.tid2eid[ids]
    logits = x.astype(mx.float32) @ gate.weight.astype(mx.float32).T
    scores = mx.sqrt(mx.logaddexp(logits, 0)) + gate.e_score_correction_bias
    return mx.argpartition(-scores, kth=k - 1, axis=-1)[:, :k]


def _swiglu(gate: mx.array, up: mx.array, args: Any) -> mx.array:
    """silu of the gate, clamped from above, times the up part, clamped on both sides (C.7)."""
    limit = args.swiglu_limit
    g = mx.minimum(gate.astype(mx.float32), limit)
    return g * mx.sigmoid(g) * mx.clip(up.astype(mx.float32), -limit, limit)


def watch(module: Any, see: Callable[..., None]) -> None:
    """Show every call's arguments to `see` first. A subclass: parameters keep their names."""
    kind: Any = type(module)
    module.__class__ = _watching(kind)
    object.__setattr__(module, "_see", see)


@cache
def _watching(kind: Any) -> Any:
    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        see = self._see
        module_class, self.__class__ = self.__class__, kind  # so that `see` may call the module
        see(x, *args)
        result = self(x, *args, **kwargs)
        self.__class__ = module_class
        return result

    return type(f"Watching{kind.__name__}", (kind,), {"__call__": call})


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
