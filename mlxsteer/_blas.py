"""A fast BLAS for mlx on Linux.

The Linux mlx wheel carries the reference BLAS. A library of the same interface that is in
the process first answers in its place: 40 times faster float32 products, same results to
rounding. Nothing here imports mlx.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

CANDIDATES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so")

_loaded: str | None = None


def preload() -> str | None:
    """Load the first BLAS found into the process; return its name, or None.

    `MLXSTEER_BLAS` names a library file to use instead, or `none` to keep mlx's own.
    Does nothing off Linux; warns when mlx is already imported (its symbols are bound by then).
    """
    global _loaded
    if sys.platform != "linux" or _loaded:
        return _loaded
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx was imported before mlxsteer, so it keeps its own slow BLAS on this machine."
            " Import mlxsteer first.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    chosen = os.environ.get("MLXSTEER_BLAS")
    if chosen and chosen.lower() == "none":
        return None
    os.environ.setdefault("MKL_THREADING_LAYER", "SEQUENTIAL")
    for name in (chosen,) if chosen else CANDIDATES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded = name
        break
    return _loaded


def loaded() -> str | None:
    """The library that `preload` put in place, or None."""
    return _loaded
