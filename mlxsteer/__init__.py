"""Activation steering in MLX: `load`, `SteeringVector`, `ContrastSet`.

Names are imported when first used, so that `mlxsteer --help` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxsteer import _blas

__version__ = "0.1.0"

_blas.preload()

if TYPE_CHECKING:
    from mlxsteer.contrast import ContrastSet
    from mlxsteer.errors import MlxsteerError
    from mlxsteer.model import Model, load
    from mlxsteer.vector import SteeringVector

_HOMES = {
    "load": "mlxsteer.model",
    "Model": "mlxsteer.model",
    "SteeringVector": "mlxsteer.vector",
    "ContrastSet": "mlxsteer.contrast",
    "MlxsteerError": "mlxsteer.errors",
}

__all__ = ["ContrastSet", "MlxsteerError", "Model", "SteeringVector", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mlxsteer' has no attribute {name!r}")
