"""Fewer launches for the same arithmetic: compiled elementwise groups, joined projections.

Each group is a plain function that defines it. Compiling is for GPUs, where a launch costs
more than the work of one token; a CPU runs the plain function (`host` has what else it does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

F = TypeVar("F", bound=Callable[..., Any])


class Switch:
    """What is on. Tests and the launch counter change it without a GPU."""

    compiling = mx.metal.is_available()
    kernels = mx.metal.is_available()
    on_host = not mx.metal.is_available()


def fused(function: F) -> F:
    """`function` as one launch where that pays. Only for elementwise operations on arrays.

    Arguments that are no arrays are constants of the launch.
    """

    @lru_cache(maxsize=64)
    def compiled(constants: tuple[Any, ...]) -> Callable[..., Any]:
        def fill(*arrays: mx.array) -> Any:
            left = iter(arrays)
            return function(*(next(left) if c is _ARRAY else c for c in constants))

        return mx.compile(fill)

    @wraps(function)
    def run(*args: Any) -> Any:
        if not Switch.compiling:
            return function(*args)
        constants = tuple(_ARRAY if isinstance(a, mx.array) else a for a in args)
        return compiled(constants)(*(a for a in args if isinstance(a, mx.array)))

    return run  # type: ignore[return-value]


_ARRAY = object()


@lru_cache(maxsize=64)
def counting(n: int) -> mx.array:
    """0, 1, ..., n-1 as uint32, made once."""
    numbers = mx.arange(n, dtype=mx.uint32)
    mx.eval(numbers)
    return numbers


class Joined:
    """Several linear layers that read one input, as one product.

    The layers keep their names: their weights become views of the joined rows. Layers that
    cannot be joined (other packing, adapters) run one after the other.
    """

    def __init__(self, parent: nn.Module, *paths: str):
        self._parent, self._paths = parent, [path.split(".") for path in paths]
        self._parts: list[mx.array] = []
        self._whole: dict[str, mx.array] | None = None

    @property
    def linears(self) -> list[Any]:
        """The single layers."""
        return [self._find(path) for path in self._paths]

    @property
    def widths(self) -> list[int]:
        """Of the single layers' outputs."""
        return [linear.weight.shape[0] for linear in self.linears]

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., D] -> the outputs side by side [..., sum of widths], in float32 if packed so."""
        linears = self.linears
        weights = [linear.weight for linear in linears]
        if len(weights) != len(self._parts) or any(
            a is not b for a, b in zip(weights, self._parts, strict=True)
        ):
            self._join(linears)
        if self._whole is None:
            return mx.concatenate([linear(x) for linear in linears], axis=-1)
        w = self._whole
        if "scales" not in w:
            return x.astype(w["weight"].dtype) @ w["weight"].T
        first = linears[0]
        return mx.quantized_matmul(
            x,
            w["weight"],
            w["scales"],
            w.get("biases"),
            transpose=True,
            group_size=first.group_size,
            bits=first.bits,
            mode=first.mode,
        )

    def _find(self, path: Sequence[str]) -> Any:
        found: Any = self._parent
        for name in path:
            found = found[name]
        return found

    def _join(self, linears: Sequence[Any]) -> None:
        self._whole = None
        if _same_packing(linears):
            names = [k for k in ("weight", "scales", "biases") if linears[0].get(k) is not None]
            self._whole = {k: mx.concatenate([linear[k] for linear in linears]) for k in names}
            mx.eval(self._whole)
            for name, whole in self._whole.items():
                for linear, part in zip(linears, _rows(whole, self.widths), strict=True):
                    linear[name] = part
        self._parts = [linear.weight for linear in linears]

    def split(self, y: mx.array) -> list[mx.array]:
        """The outputs of the single layers: views of the joined one."""
        return list(mx.split(y, _edges(self.widths), axis=-1))


def _edges(widths: Sequence[int]) -> list[int]:
    return [sum(widths[: i + 1]) for i in range(len(widths) - 1)]


def _rows(whole: mx.array, widths: Sequence[int]) -> list[mx.array]:
    return list(mx.split(whole, _edges(widths), axis=0))


def _same_packing(linears: Sequence[Any]) -> bool:
    """Whether all are dense of one type, or quantised alike, and nothing else."""
    first = linears[0]
    plain = all(type(linear) in (nn.Linear, nn.QuantizedLinear) for linear in linears)
    if not plain or any("bias" in linear for linear in linears):
        return False

    def kind(linear: Any) -> tuple[Any, ...]:
        packing = [getattr(linear, k, None) for k in ("group_size", "bits", "mode")]
        return (type(linear), linear.weight.dtype, *packing)

    return all(kind(linear) == kind(first) for linear in linears)
