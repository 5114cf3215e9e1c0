"""Tiny model folders with random weights, for tests of loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, models, pre_tokenizers

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
}


def make_folder(
    path: Path, *, dtype: mx.Dtype = mx.float32, quantize: dict[str, Any] | None = None
) -> Path:
    """Write a 2-layer llama of width 64 as an mlx-lm folder; `quantize` as for `nn.quantize`."""
    mx.random.seed(0)
    config = dict(CONFIG)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    if quantize:
        nn.quantize(model, **quantize)
        config["quantization"] = quantize
    save_model(path, model)
    save_config(config, path / "config.json")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of None deletes the key."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
