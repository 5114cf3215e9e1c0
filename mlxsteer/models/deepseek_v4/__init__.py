"""Our DeepSeek-V4 module. mlx-lm's convention: `Model` and `ModelArgs`.

`register` makes stock mlx-lm tools find it, and win over one that mlx-lm may bring later.
"""

from __future__ import annotations

import sys
from importlib import import_module

from mlxsteer.models.deepseek_v4.cache import (
    DeepseekV4Cache,
    cache_bytes,
    restore,
    snapshot,
)
from mlxsteer.models.deepseek_v4.config import ModelArgs
from mlxsteer.models.deepseek_v4.model import Model

__all__ = [
    "DeepseekV4Cache",
    "Model",
    "ModelArgs",
    "cache_bytes",
    "register",
    "restore",
    "snapshot",
]


def register() -> None:
    """Let mlx-lm find this module as `deepseek_v4`, and its cache class when loading files."""
    models = import_module("mlx_lm.models")
    caches = import_module("mlx_lm.models.cache")
    ours = sys.modules[__name__]
    sys.modules["mlx_lm.models.deepseek_v4"] = ours
    setattr(models, "deepseek_v4", ours)  # noqa: B010  (a name mypy cannot know)
    setattr(caches, DeepseekV4Cache.__name__, DeepseekV4Cache)
