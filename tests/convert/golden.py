"""The tiny checkpoint's golden logits, and how far a converted folder is from them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from mlxsteer.models.deepseek_v4 import Model, ModelArgs
from tests.convert.conftest import FIXTURES

GOLDEN = np.load(FIXTURES / "tiny_fp8fp4.npz")


def our_errors(folder: Path, tokens: int = 200) -> np.ndarray:
    """Absolute differences `[tokens, vocabulary]` of our module's logits."""
    model, _ = load_model(
        folder,
        get_model_classes=lambda config: (Model, ModelArgs),
        model_config={"activation_rounding": False},
    )
    model.set_dtype(mx.float32)  # bf16 accumulates in bf16 on the CPU backend
    logits = np.array(model(mx.array(GOLDEN["ids"][None, :tokens]))[0])
    return np.abs(logits - GOLDEN["logits"][:tokens])
