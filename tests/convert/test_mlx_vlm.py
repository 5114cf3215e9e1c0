"""Exchange with mlx-vlm, where it is installed: its folders in ours, ours in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.convert import reference
from tests.convert.conftest import FIXTURES, TINY, run

pytest.importorskip("mlx_vlm")
GOLDEN = np.load(FIXTURES / "tiny_fp8fp4.npz")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint by the functions of mlx-vlm's converter."""
    from mlx_vlm.models.deepseek_v4 import convert as vlm
    from mlx_vlm.models.deepseek_v4.config import ModelConfig

    folder = tmp_path_factory.mktemp("vlm")
    config = json.loads((TINY / "config.json").read_text())
    source: Any = mx.load(str(TINY / "model.safetensors"))
    weights = vlm._sanitize_group(dict(source), ModelConfig.from_dict(config))
    modules = {name[: -len(".scales")] for name in weights if name.endswith(".scales")}
    config["quantization"] = config["quantization_config"] = vlm._quantization_config(modules)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_our_lossless_folder_gives_the_golden_logits_in_mlx_vlm(
    converted: Callable[[str], Path],
) -> None:
    """Prefill with a cache, the one path of theirs that is exact."""
    from mlx_vlm.models.deepseek_v4.config import ModelConfig
    from mlx_vlm.models.deepseek_v4.language import LanguageModel

    folder = converted("lossless")
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
    assert np.abs(np.array(out.logits[0]) - GOLDEN["logits"]).max() < 1e-4


def test_their_folder_gives_the_golden_logits_in_our_module(theirs: Path) -> None:
    from mlx_lm.utils import load_model

    from mlxsteer.models.deepseek_v4 import Model, ModelArgs

    model, _ = load_model(
        theirs,
        get_model_classes=lambda config: (Model, ModelArgs),
        model_config={"activation_rounding": False},
    )
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array(GOLDEN["ids"][None]))[0])
    assert np.abs(logits - GOLDEN["logits"]).max() < 1e-4


def test_their_folder_converts_to_the_bytes_of_the_official_one(
    theirs: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    run(theirs, tmp_path / "out")
    expected = reference.load_folder(converted("lossless"))
    for name, tensor in reference.load_folder(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, expected[name])
