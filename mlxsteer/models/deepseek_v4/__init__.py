"""Our DeepSeek-V4 module. mlx-lm's convention: `Model` and `ModelArgs`.

`register` makes stock mlx-lm tools find it, and win over one that mlx-lm may bring later.
Names are imported when first used: the chat format alone needs no model library.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxsteer.models.deepseek_v4.cache import DeepseekV4Cache
    from mlxsteer.models.deepseek_v4.config import ModelArgs
    from mlxsteer.models.deepseek_v4.footprint import cache_bytes
    from mlxsteer.models.deepseek_v4.model import Model
    from mlxsteer.models.deepseek_v4.snapshots import restore, snapshot

_HOMES = {
    "DeepseekV4Cache": "cache",
    "Model": "model",
    "ModelArgs": "config",
    "cache_bytes": "footprint",
    "restore": "snapshots",
    "snapshot": "snapshots",
}

__all__ = [
    "DeepseekV4Cache",
    "Model",
    "ModelArgs",
    "cache_bytes",
    "register",
    "restore",
    "snapshot",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Let mlx-lm find this module as `deepseek_v4`, and its cache class when loading files."""
    models = import_module("mlx_lm.models")
    caches = import_module("mlx_lm.models.cache")
    ours = sys.modules[__name__]
    cache_class = import_module(f"{__name__}.cache").DeepseekV4Cache
    sys.modules["mlx_lm.models.deepseek_v4"] = ours
    setattr(models, "deepseek_v4", ours)  # noqa: B010  (a name mypy cannot know)
    setattr(caches, cache_class.__name__, cache_class)
