"""The demo model against an independent reading of the same GGUF.

transformers unpacks the file with its own code and runs it in torch, in float32.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlxsteer.models.loading import load_model_and_tokenizer

TOLERANCE = 1e-3  # logits are up to 40 in size; 2e-4 was measured
TEXT = (
    "<|im_start|>user\nWhy do databases use indexes? Naïve café, 漢字, 2024 🙂<|im_end|>\n"
    "<|im_start|>assistant\nBecause an index is a sorted structure: look-ups read a few pages"
    " instead of the whole table, at the cost of slower writes and some space.<|im_end|>\n"
)


@pytest.fixture(scope="module")
def loaded(demo_path: Path):
    return load_model_and_tokenizer(demo_path)


@pytest.fixture(scope="module")
def token_ids(loaded) -> list[int]:
    return loaded.tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def reference(demo_gguf: Path, token_ids: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32
    )
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()


def test_logits_as_loaded_agree_with_transformers(loaded, token_ids, reference):
    logits = np.array(loaded.model(mx.array([token_ids]))[0])
    assert len(token_ids) > 60
    np.testing.assert_allclose(logits, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_logits_of_the_packed_folder_agree_with_transformers(demo_path, token_ids, reference):
    packed, _ = load_model(demo_path)
    logits = np.array(packed(mx.array([token_ids]))[0])
    np.testing.assert_allclose(logits, reference, rtol=0, atol=TOLERANCE)
