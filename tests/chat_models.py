"""Tiny random models that can chat: a folder with weights, a tokenizer of 64 words, a template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, models, pre_tokenizers

from mlxsteer.vector import SteeringVector
from tests.tiny_models import HIDDEN, config_of, tiny_model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> "
    "{% if m['reasoning_content'] %}<think> {{ m['reasoning_content'] }} </think> {% endif %}"
    "{{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if enable_thinking %}<think> {% endif %}"
    "{% endif %}"
)
SPECIAL = ["<end>", "<system>", "<user>", "<assistant>", "<think>", "</think>"]
WORDS = [*SPECIAL, *(f"w{index}" for index in range(64 - len(SPECIAL)))]
END = 0


def chat_folder(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny random model of `family` that can chat: 64 words, a template, thoughts."""
    save_model(path, tiny_model(family, **changes))
    config = config_of(family, **{"eos_token_id": END, **changes})
    save_config(config, path / "config.json")
    write_tokenizer(path, WORDS)
    return path


def write_tokenizer(path: Path, words: list[str]) -> None:
    """A tokenizer of whole words, of which the first ends an answer."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": words[END],
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def random_directions(
    seed: int = 0, name: str = "push", width: int = HIDDEN, n_layers: int = 4
) -> SteeringVector:
    """A vector of norm 3 on two layers: strong enough to change what a tiny model says."""
    rng = np.random.default_rng(seed)
    arrays = {layer: 3 * _unit(rng.normal(size=width)) for layer in (1, 2)}
    return SteeringVector.from_arrays(arrays, n_layers=n_layers, name=name)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)
