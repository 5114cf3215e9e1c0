"""Finds, by a block's own arithmetic, which of its children write to the residual stream.

mlx-lm's families name and order their sublayers and norms differently (`post_attention_layernorm`
is a writer in one family and a reader in the next). So no list of names: one block of each kind
runs on a few tokens, the outputs of its children are recorded, and the writers are those that
satisfy `block(x) = x + m·a + m·f`. Blocks of another form offer the residual site alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsteer.errors import ModelError
from mlxsteer.models.hooks import Hooks, Writers

PROBE_TOKENS = (3, 5, 7, 11, 13)
TOLERANCE = 0.02  # of the written norm: bf16 rounding is below it, a wrong pair is near 1


@dataclass
class BlockTrace:
    """One block's input, output and its children's outputs `[1, T, D]`, in order of calling."""

    x: mx.array | None = None
    out: mx.array | None = None
    children: dict[str, mx.array] | None = None


def install(model: nn.Module) -> Hooks:
    """Hooks on `model`. ModelError, by name, when it has no residual stream that we can edit."""
    return Hooks(model, find_writers)


def find_writers(hooks: Hooks) -> list[Writers]:
    """The writing children of every layer, one probe per kind of block."""
    kinds: dict[tuple[Any, ...], Writers] = {}
    shared = _shared_children(hooks.layers)
    result = []
    for index, layer in enumerate(hooks.layers):
        kind = (type(layer).__name__, *sorted(_children(layer)))
        if kind not in kinds:
            kinds[kind] = _solve(_trace(hooks, index))
        found = kinds[kind]
        result.append(
            Writers(
                attn=None if found.attn and _is_shared(layer, found.attn, shared) else found.attn,
                ffn=None if found.ffn and _is_shared(layer, found.ffn, shared) else found.ffn,
            )
        )
    return result


def _children(layer: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in layer.items() if isinstance(child, nn.Module)}


def _shared_children(layers: list[nn.Module]) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for layer in layers:
        for child in _children(layer).values():
            (shared if id(child) in seen else seen).add(id(child))
    return shared


def _is_shared(layer: nn.Module, name: str, shared: set[int]) -> bool:
    return id(getattr(layer, name)) in shared


def _trace(hooks: Hooks, index: int) -> BlockTrace:
    trace = BlockTrace(children={})
    with _recording(hooks.layers[index], trace):
        try:
            hooks.model(mx.array([PROBE_TOKENS]))
        except Exception as error:
            raise ModelError(
                f"Cannot look inside {hooks.architecture}: a forward pass of five tokens failed"
                f" ({type(error).__name__}: {error}). Steer its `residual` site instead."
            ) from error
    return trace


@contextmanager
def _recording(layer: nn.Module, trace: BlockTrace) -> Iterator[None]:
    """For the length of the block, `layer` and its children write what they see to `trace`."""
    changed: list[tuple[nn.Module, type]] = []

    def swap(module: nn.Module, note: Any) -> None:
        original = type(module)

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = original.__call__(self, *args, **kwargs)
            note(args, out[0] if isinstance(out, tuple) else out)
            return out

        module.__class__ = type(original.__name__, (original,), {"__call__": __call__})
        changed.append((module, original))

    def note_block(args: tuple[Any, ...], out: Any) -> None:
        trace.x, trace.out = args[0], out

    def note_child(name: str) -> Any:
        def note(args: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, mx.array) and trace.children is not None:
                trace.children[name] = out

        return note

    swap(layer, note_block)
    for name, child in _children(layer).items():
        swap(child, note_child(name))
    try:
        yield
    finally:
        for module, original in changed:
            module.__class__ = original


def _solve(trace: BlockTrace) -> Writers:
    """The pair (or single) of children whose sum, times one factor, is what the block added."""
    if not isinstance(trace.x, mx.array) or not isinstance(trace.out, mx.array):
        return Writers(None, None)
    if trace.x.shape != trace.out.shape:
        return Writers(None, None)
    written = _numpy(trace.out) - _numpy(trace.x)
    outputs = {
        name: _numpy(out)
        for name, out in (trace.children or {}).items()
        if out.shape == trace.x.shape
    }
    for first, second in reversed(list(combinations(outputs, 2))):
        if _explains(written, outputs[first] + outputs[second]):
            return Writers(attn=first, ffn=second)
    for name in reversed(outputs):
        if _explains(written, outputs[name]):
            feed_forward = any(word in name for word in ("mlp", "ffn", "feed_forward", "moe"))
            return Writers(None, name) if feed_forward else Writers(name, None)
    return Writers(None, None)


def _explains(written: np.ndarray, candidate: np.ndarray) -> bool:
    energy = float((candidate * candidate).sum())
    if energy == 0:
        return False
    factor = float((written * candidate).sum()) / energy
    left = np.linalg.norm(written - factor * candidate)
    return bool(left <= TOLERANCE * np.linalg.norm(written))


def _numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))
