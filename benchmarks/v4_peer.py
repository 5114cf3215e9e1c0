"""mlx-vlm's DeepSeek-V4 language model, imported from a folder of its unpacked wheel.

pip download --no-deps mlx-vlm==0.7.10 && unzip mlx_vlm*.whl -d mlx-vlm
"""

from __future__ import annotations

import importlib
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from mlxsteer.models.deepseek_v4 import launches

FOLDER = "models.deepseek_v4"


def packages(folder: Path) -> None:
    """Make its DeepSeek-V4 modules importable, without the package's other parts."""
    sys.path.insert(0, str(folder))
    for name in ("mlx_vlm", "mlx_vlm.models", f"mlx_vlm.{FOLDER}"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package


def language_model(folder: Path, config: dict[str, Any]) -> Any:
    """Its model with random weights. Exact top-k."""
    packages(folder)
    settings = importlib.import_module(f"mlx_vlm.{FOLDER}.config")
    language = importlib.import_module(f"mlx_vlm.{FOLDER}.language")
    model = language.LanguageModel(settings.ModelConfig.from_dict(config | {"index_block": 0}))
    model.eval()
    return model


def decode_launches(folder: Path) -> dict[str, Counter[str]]:
    """What `launches.decode_launches` counts, of its graph: same layout, widths and packing.

    Its hyper-connection kernel, which only a GPU has, counts as one.
    """
    model = language_model(folder, launches.LAYOUT)
    nn.quantize(model, class_predicate=launches.packing)
    launches.narrow(model)
    return {label: _decode_step(model, at) for label, at in launches.STEPS.items()}


def _decode_step(model: Any, position: int) -> Counter[str]:
    cache = model.make_cache()
    mx.eval(model(mx.zeros((1, position), dtype=mx.int32), cache=cache).logits)
    hyper = importlib.import_module(f"mlx_vlm.{FOLDER}.hyper_connection")
    with launches.stand_ins(), patch.object(hyper, "_hc_ops", _hyper_kernel):
        return launches.graph(model(mx.zeros((1, 1), dtype=mx.int32), cache=cache).logits)


def _hyper_kernel(x: mx.array, y: mx.array, mixes: mx.array, *_: Any) -> tuple[mx.array, ...]:
    """One primitive that depends on all, and views of it."""
    B, L, H, D = x.shape
    one = mx.depends(mx.argsort(x.flatten()), [y, mixes])
    floats = one.view(mx.float32)
    return (
        mx.as_strided(one.view(x.dtype), (B, L, D), [0] * 3),
        mx.as_strided(floats, (B, L, H), [0] * 3),
        mx.as_strided(floats, (B, L, H, H), [0] * 4),
    )
