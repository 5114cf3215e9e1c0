"""How Metal kernels are run: each is the twin of a plain definition. Not yet run on Metal.

A body touches no shared memory and needs no barrier, so it also compiles as C++, and tests run
it so against its definition. On Metal a kernel is compared with its definition when first
used; if it fails or differs, a warning is given once and the definition runs instead. The
kernels are in `hyper_kernels`, `row_kernels` and `selection_kernels`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import mlx.core as mx

from mlxsteer.models.deepseek_v4.fusing import Switch

CLOSE = 1e-3

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Body:
    """The body of one kernel, in the common ground of Metal and C++."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str


def launch(
    body: Body,
    inputs: Sequence[mx.array],
    constants: dict[str, Any],
    grid: tuple[int, int, int],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    reals: tuple[tuple[str, float], ...] = (),
) -> list[mx.array]:
    """Run a body once per grid point. `constants` are types and integers, `reals` macros."""
    return _built(body, reals)(
        inputs=list(inputs),
        template=list(constants.items()),
        grid=grid,
        threadgroup=(min(grid[0], 256), 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )


@lru_cache(maxsize=32)
def _built(body: Body, reals: tuple[tuple[str, float], ...]) -> Any:
    return mx.fast.metal_kernel(
        name=body.name,
        input_names=list(body.inputs),
        output_names=list(body.outputs),
        header="".join(f"#define {name} {value!r}f\n" for name, value in reals),
        source=body.source,
    )


def twin(kernel: Callable[..., Any], sample: Callable[[], tuple[Any, ...]]) -> Callable[[F], F]:
    """The decorated definition, run as `kernel` where kernels are on and the two agree.

    `sample` makes arguments to compare them on.
    """

    def choose(plain: F) -> F:
        @lru_cache(maxsize=1)
        def agrees() -> bool:
            return _agree(plain.__name__, plain, kernel, sample())

        @wraps(plain)
        def run(*args: Any) -> Any:
            return (kernel if Switch.kernels and agrees() else plain)(*args)

        run.pair = (plain, kernel, sample)  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return choose


def _agree(name: str, plain: Any, kernel: Any, args: tuple[Any, ...]) -> bool:
    try:
        worst = largest_difference(kernel(*args), plain(*args))
        if not worst < CLOSE:
            raise ValueError(f"it is off by {worst:.2g}")
    except (RuntimeError, ValueError) as error:
        warnings.warn(
            f"The kernel for {name} is not used: {error}. Answers are the same, slower.",
            stacklevel=3,
        )
        return False
    return True


def largest_difference(a: Any, b: Any) -> float:
    """Over one array or a tuple of arrays."""
    if isinstance(a, mx.array):
        a, b = (a,), (b,)
    return max(
        float(mx.abs(x.astype(mx.float32) - y.astype(mx.float32)).max())
        for x, y in zip(a, b, strict=True)
    )
