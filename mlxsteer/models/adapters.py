"""Finds, by a block's own arithmetic, which of its children write to the residual stream.

mlx-lm's families name and order their sublayers and norms differently (`post_attention_layernorm`
is a writer in one family and a reader in the next). So no list of names: one forward pass of a
few tokens records every block and its children, and the writers are those that satisfy
`block(x) = x + m·a + m·f`. Blocks of another form offer the residual site alone; models whose
blocks do not carry one stream `[B, T, D]` from block to block are refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsteer.errors import ModelError
from mlxsteer.models.hooks import Hooks, Writers

PROBE_TOKENS = (3, 5, 7, 11, 13)
TOLERANCE = 1e-3  # of the written norm, at the worst position; float32 leaves below 1e-5
MAX_TOLERANCE = 0.2  # where rounding is a larger part than this, the block proves nothing
ROUNDING = {mx.bfloat16: 2**-8, mx.float16: 2**-10}
FEED_FORWARD_WORDS = ("mlp", "ffn", "feed_forward", "feedforward", "moe")

Kind = tuple[Any, ...]


@dataclass
class BlockTrace:
    """What one block did in the probe: its calls, last input and result, children's outputs.

    children: {name: output [1, T, D]}, in order of calling.
    """

    calls: int = 0
    x: Any = None
    result: Any = None
    children: dict[str, mx.array] = field(default_factory=dict)

    @property
    def out(self) -> Any:
        return self.result[0] if isinstance(self.result, tuple) else self.result


def install(model: nn.Module) -> Hooks:
    """The hooks of `model`, made once. ModelError, by name, when it has no list of blocks."""
    made = getattr(model, "mlxsteer_hooks", None)
    hooks = made() if made is not None else None
    if hooks is None:
        hooks = Hooks(model, find_writers)
        model.mlxsteer_hooks = weakref.ref(hooks)  # weak: a cycle would keep the weights alive
    return hooks


def find_writers(hooks: Hooks) -> list[Writers]:
    """The writing children of every layer, from one probe of the model.

    Raises ModelError, by name, for a model whose blocks cannot be steered at all.
    """
    traces = _probe(hooks)
    for trace in traces:
        _check_contract(hooks.architecture, trace)
    shared = _shared_children(hooks.layers)
    kinds = [_kind(layer) for layer in hooks.layers]
    best: dict[Kind, tuple[float, Writers]] = {}
    for kind, layer, trace in zip(kinds, hooks.layers, traces, strict=True):
        found = _solve(trace, layer)
        if kind not in best or found[0] < best[kind][0]:
            best[kind] = found
    return [
        _without_shared(layer, best[kind][1], shared)
        for kind, layer in zip(kinds, hooks.layers, strict=True)
    ]


def _kind(layer: nn.Module) -> Kind:
    names = ((name, type(child).__name__) for name, child in sorted(_children(layer).items()))
    return (type(layer).__name__, *names)


def _children(layer: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in layer.items() if isinstance(child, nn.Module)}


def _shared_children(layers: list[nn.Module]) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for layer in layers:
        for child in _children(layer).values():
            (shared if id(child) in seen else seen).add(id(child))
    return shared


def _without_shared(layer: nn.Module, found: Writers, shared: set[int]) -> Writers:
    """A child that several layers use cannot be tapped: an edit would act on all of them."""

    def own(name: str | None) -> str | None:
        return None if name is None or id(getattr(layer, name)) in shared else name

    return Writers(own(found.attn), own(found.ffn))


# --- the probe ------------------------------------------------------------------------------


def _probe(hooks: Hooks) -> list[BlockTrace]:
    traces = [BlockTrace() for _ in hooks.layers]
    with _recording(hooks.layers, traces), hooks.forward(None):
        try:
            hooks.model(mx.array([PROBE_TOKENS]))
            mx.eval([[trace.x, trace.result, trace.children] for trace in traces])
        except Exception as error:
            raise ModelError(
                f"Cannot steer {hooks.architecture}: a forward pass of five tokens failed"
                f" ({type(error).__name__}: {error}). Check that the model generates text with"
                " `mlx_lm.generate`, or choose another."
            ) from error
    return traces


@contextmanager
def _recording(layers: list[nn.Module], traces: list[BlockTrace]) -> Iterator[None]:
    """Inside the block, `layers` and their children write what they see to `traces`."""
    changed: list[tuple[nn.Module, type]] = []

    def swap(module: nn.Module, call: Any) -> None:
        original = type(module)
        body = {"__call__": lambda self, *args, **kwargs: call(original, self, args, kwargs)}
        module.__class__ = type(original.__name__, (original,), body)
        changed.append((module, original))

    for layer, trace in zip(layers, traces, strict=True):
        swap(layer, _block_recorder(trace))
        for name, child in _children(layer).items():
            swap(child, _child_recorder(trace, name))
    try:
        yield
    finally:
        for module, original in reversed(changed):
            module.__class__ = original


def _block_recorder(trace: BlockTrace) -> Any:
    def call(original: Any, self: Any, args: Any, kwargs: Any) -> Any:
        trace.calls += 1
        arrays = (value for value in (*args, *kwargs.values()) if isinstance(value, mx.array))
        trace.x = next(arrays, None)  # some families name it in the call, before any mask
        trace.result = original.__call__(self, *args, **kwargs)
        return trace.result

    return call


def _child_recorder(trace: BlockTrace, name: str) -> Any:
    def call(original: Any, self: Any, args: Any, kwargs: Any) -> Any:
        result = original.__call__(self, *args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        if isinstance(out, mx.array):
            trace.children.pop(name, None)
            trace.children[name] = out
        return result

    return call


def _check_contract(architecture: str, trace: BlockTrace) -> None:
    """ModelError, by name, unless the block took one stream [1, T, D] and returned it, once."""
    reason = None
    if trace.calls != 1:
        times = "never calls its blocks" if not trace.calls else "runs its blocks more than once"
        reason = f"it {times} in a forward pass, so an edit would miss or act twice"
    elif not isinstance(trace.x, mx.array) or not isinstance(trace.out, mx.array):
        reason = "its blocks do not pass one array on to the next"
    elif trace.out.ndim != 3 or trace.out.shape != trace.x.shape:
        shape = list(trace.out.shape)
        reason = f"its blocks return {shape} for {len(PROBE_TOKENS)} tokens, not one stream"
    elif isinstance(trace.result, tuple) and any(
        isinstance(other, mx.array) and other.shape == trace.x.shape for other in trace.result[1:]
    ):
        reason = "its blocks also pass a second stream on, which an edit would not reach"
    if reason:
        raise ModelError(
            f"Cannot steer {architecture}: {reason}. Choose a model of another architecture;"
            " `mlxsteer chat --model demo --steer terse:3` works anywhere."
        )


# --- the arithmetic -------------------------------------------------------------------------


def _solve(trace: BlockTrace, layer: nn.Module) -> tuple[float, Writers]:
    """(misfit, writers): the children whose sum, times one factor, is what the block added."""
    written = _numpy(trace.out) - _numpy(trace.x)
    sizes = np.linalg.norm(written, axis=-1, keepdims=True)
    none = (np.inf, Writers(None, None))
    if not np.isfinite(sizes).all() or sizes.min() == 0:
        return none
    rounding = ROUNDING.get(trace.out.dtype, 0.0)
    allowed = TOLERANCE + rounding * float((_norms(trace.out) / sizes[..., 0]).max())
    outputs = {
        name: _numpy(out) / sizes
        for name, out in trace.children.items()
        if out.shape == trace.x.shape
    }
    # Positions weigh the same, whatever they wrote: on many models the first is a sink of a
    # thousand times the norm, and would let any pair with its writer pass.
    fits = [
        (_misfit(written / sizes, sum(outputs[name] for name in names)), names)
        for count in (1, 2)
        for names in combinations(outputs, count)
    ]
    passing = [fit for fit in fits if fit[0] <= allowed]
    if allowed > MAX_TOLERANCE or len(passing) != 1:
        return none  # more than one: a child that writes far more than the rest hides them
    misfit, names = passing[0]
    return misfit, _writers_named(names, layer)


def _writers_named(names: tuple[str, ...], layer: nn.Module) -> Writers:
    """A pair is (attention, feed-forward) in order of calling; a single one is told by name."""
    if len(names) == 2:
        return Writers(*names)
    words = f"{names[0]} {type(getattr(layer, names[0])).__name__}".lower()
    feed_forward = any(word in words for word in FEED_FORWARD_WORDS)
    return Writers(None, names[0]) if feed_forward else Writers(names[0], None)


def _misfit(written: np.ndarray, candidate: Any) -> float:
    """The largest relative distance, over positions, of `written` from a multiple of it."""
    energy = float((candidate * candidate).sum())
    if energy == 0 or not np.isfinite(energy):
        return np.inf
    factor = float((written * candidate).sum()) / energy
    return float(np.linalg.norm(written - factor * candidate, axis=-1).max())


def _norms(x: mx.array) -> np.ndarray:
    return np.linalg.norm(_numpy(x), axis=-1)


def _numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))
