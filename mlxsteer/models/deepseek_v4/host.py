"""What a CPU does otherwise: the smallest groups in NumPy, a step's experts in two halves."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlxsteer.models.deepseek_v4.fusing import Switch

F = TypeVar("F", bound=Callable[..., Any])


def on_host(dtype: Any, least: int = 0) -> Callable[[F], F]:
    """For a function to float32 arrays, written for MLX and NumPy alike: NumPy without a GPU.

    dtype: NumPy's, to compute in; least: elements of the first array from which it pays.
    Measured on x86 with MLX 0.32.4: an operation on 16 numbers costs 7 us there and 1 us in
    NumPy, an `exp` 15 ns and 1 ns; waiting for the inputs costs 50 us once.
    """

    def choose(function: F) -> F:
        @wraps(function)
        def run(*args: Any) -> Any:
            if not (Switch.on_host and isinstance(args[0], mx.array)) or args[0].size < least:
                return function(*args)
            mx.eval([a for a in args if isinstance(a, mx.array)])
            given = [_numpy(a, dtype) if isinstance(a, mx.array) else a for a in args]
            with np.errstate(over="ignore"):  # 1 / (1 + exp(-x)) is 0 where exp is infinite
                found = function(*given)
            return tuple(map(_float32, found)) if isinstance(found, tuple) else _float32(found)

        return run  # type: ignore[return-value]

    return choose


def _numpy(x: mx.array, dtype: Any) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(dtype, copy=False)


def _float32(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32, copy=False))


def in_halves(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """`function` of x [N, k], where it treats each column alone; a CPU does two halves at once.

    A product of one row keeps one core busy; a stream of its own is a thread of its own.
    """
    half = x.shape[1] // 2
    if not Switch.on_host or not half:
        return function(x)
    with mx.stream(_second_stream()):
        first = function(x[:, :half])
    return mx.concatenate([first, function(x[:, half:])], axis=1)


@lru_cache(maxsize=1)
def _second_stream() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)


def library(x: Any) -> Any:
    """The module whose functions take `x`: mlx.core or numpy."""
    return mx if isinstance(x, mx.array) else np


def sigmoid(x: Any) -> Any:
    return mx.sigmoid(x) if isinstance(x, mx.array) else 1 / (1 + np.exp(-x))


def softmax(x: Any) -> Any:
    """Over the last axis."""
    if isinstance(x, mx.array):
        return mx.softmax(x, axis=-1)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
