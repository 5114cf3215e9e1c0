"""mlx-vlm's converter and DeepSeek-V4, on the tiny checkpoint. Needs mlx-vlm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tests.convert.conftest import TINY
from tests.convert.golden import GOLDEN


def convert_tiny(folder: Path) -> Path:
    """The tiny checkpoint by the functions of mlx-vlm's converter."""
    from mlx_vlm.models.deepseek_v4 import convert as vlm
    from mlx_vlm.models.deepseek_v4.config import ModelConfig

    config = json.loads((TINY / "config.json").read_text())
    source: Any = mx.load(str(TINY / "model.safetensors"))
    weights = vlm._sanitize_group(dict(source), ModelConfig.from_dict(config))
    modules = {name[: -len(".scales")] for name in weights if name.endswith(".scales")}
    config["quantization"] = config["quantization_config"] = vlm._quantization_config(modules)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def their_errors(folder: Path) -> np.ndarray:
    """As `our_errors`, in mlx-vlm: prefill with a cache, the one path of theirs that is exact."""
    from mlx_vlm.models.deepseek_v4.config import ModelConfig
    from mlx_vlm.models.deepseek_v4.language import LanguageModel

    config = json.loads((folder / "config.json").read_text())
    model = LanguageModel(ModelConfig.from_dict(config))
    weights: dict[str, mx.array] = {}
    for path in folder.glob("model*.safetensors"):
        weights.update(mx.load(str(path)))  # type: ignore[arg-type]
    formats = config["quantization"]
    nn.quantize(model, class_predicate=lambda path, module: formats.get(path, False))
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    model.set_dtype(mx.float32)
    out = model(mx.array(GOLDEN["ids"][None]), cache=model.make_cache())
    return np.abs(np.array(out.logits[0]) - GOLDEN["logits"])
