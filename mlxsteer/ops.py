"""Pure array functions on hidden states: add, project, clamp. No model, no input or output.

Shapes: `h [B, T, D]` (V4 streams: `[B, T, 4, D]`), directions that broadcast against it.
Arithmetic is float32 with one cast at the end, because a bfloat16 stream drops increments
below 2⁻⁹ of an element.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx


@partial(mx.compile, shapeless=True)
def _add_in_float32(h: mx.array, shift: mx.array) -> mx.array:
    return (h.astype(mx.float32) + shift).astype(h.dtype)


def add(h: mx.array, shift: mx.array) -> mx.array:
    """`h + shift`; `shift` float32, broadcastable. One graph primitive where shapes agree."""
    return h + shift if h.dtype == mx.float32 else _add_in_float32(h, shift)


def add_preserving_norm(h: mx.array, shift: mx.array) -> mx.array:
    """`(h + shift)·‖h‖/‖h + shift‖`: turns h towards the shift and keeps its length."""
    x = h.astype(mx.float32)
    moved = x + shift
    before = mx.linalg.norm(x, axis=-1, keepdims=True)
    after = mx.linalg.norm(moved, axis=-1, keepdims=True)
    changed = (shift != 0).any(axis=-1, keepdims=True)
    return mx.where(changed, moved * (before / mx.maximum(after, 1e-12)), x).astype(h.dtype)


def project(h: mx.array, direction: mx.array, share: mx.array) -> mx.array:
    """`h − share·d·(d·h)` for a unit direction: share 1 removes the component along d."""
    x = h.astype(mx.float32)
    component = _component(x, direction)
    return (x - (share * component) * direction).astype(h.dtype)


def clamp(h: mx.array, direction: mx.array, value: mx.array, on: mx.array) -> mx.array:
    """`h + (value − d·h)·d` where `on` is 1: sets the component along unit d to `value`."""
    x = h.astype(mx.float32)
    component = _component(x, direction)
    return (x + (on * (value - component)) * direction).astype(h.dtype)


def clamp_feature(
    h: mx.array,
    x: mx.array,
    direction: mx.array,
    value: mx.array,
    on: mx.array,
    encoder: tuple[mx.array, mx.array, mx.array],
) -> mx.array:
    """`h + (value − f(x))·d` where `on` is 1: sets a feature, keeps what no feature explains.

    encoder: (row, bias, threshold) of f(x) = m where m = row·x + bias is above the threshold,
    else 0. x: the states that are read, so that several features are read from the same ones;
    of streams `[B, T, 4, D]` the mean is read, and each gets the change.
    """
    row, bias, threshold = encoder
    states = x.astype(mx.float32)
    states = states.mean(axis=-2, keepdims=True) if x.ndim == 4 else states
    reading = (states * row).sum(axis=-1, keepdims=True) + bias
    reading = mx.where(reading > threshold, reading, 0)
    return (h.astype(mx.float32) + (on * (value - reading)) * direction).astype(h.dtype)


def _component(x: mx.array, direction: mx.array) -> mx.array:
    """`d·x` for a unit direction; one of `[…, 4, D]` is a unit over all four streams."""
    streams = direction.ndim == 4 and direction.shape[-2] > 1
    return (x * direction).sum(axis=(-2, -1) if streams else -1, keepdims=True)
