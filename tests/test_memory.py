"""The memory check: its sums, and its refusal on a machine that is too small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsteer.errors import ModelError
from mlxsteer.models import memory
from mlxsteer.models.loading import load_model_and_tokenizer
from tests.tiny import make_folder

LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1000,
}
V4_FLASH = {
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
    "head_dim": 512,
    "index_head_dim": 128,
    "sliding_window": 128,
}


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB of memory and no Metal."""
    monkeypatch.setattr(memory, "physical_memory", lambda: 16 * memory.GIB)
    monkeypatch.setattr(memory, "metal_working_set", lambda: None)


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        # keys and values, 2 heads of 16, 2 layers
        (LLAMA, 2 * 2 * 16 * 2 * 100),
        ({"text_config": LLAMA}, 2 * 2 * 16 * 2 * 100),
        ({**LLAMA, "head_dim": 32}, 2 * 2 * 32 * 2 * 100),
        ({**LLAMA, "kv_lora_rank": 24, "qk_rope_head_dim": 8}, 2 * 32 * 100),
        # one layer of two sees 10 tokens only
        (
            {**LLAMA, "sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]},
            2 * 2 * 16 * 110,
        ),
        ({"num_hidden_layers": 2, "hidden_size": 64}, 0),
    ],
)
def test_cache_is_counted_from_the_config(config, numbers):
    assert memory.estimate(config, 0, context=100).cache_bytes == 2 * numbers
    assert memory.estimate(config, 0, context=100, element_bytes=4).cache_bytes == 4 * numbers


def test_context_stops_at_what_the_model_can_read():
    assert memory.estimate(LLAMA, 0, context=5000).context == 1000


def test_compressed_cache_of_v4_flash():
    # 43 windows of 128 rows; 21 layers with a row and an index key per 4 tokens, 20 per 128
    numbers = 43 * 128 * 512 + 21 * 2048 * (512 + 128) + 20 * 64 * 512
    assert memory.estimate(V4_FLASH, 0, context=8192).cache_bytes == 2 * numbers


def test_a_model_that_fits_passes(small_machine):
    memory.check(memory.MemoryEstimate(8 * memory.GIB, memory.GIB, 8192), label="m")


def test_refusal_shows_its_arithmetic(small_machine):
    need = memory.MemoryEstimate(150 * memory.GIB, memory.GIB, 8192)
    with pytest.raises(ModelError) as caught:
        memory.check(need, label="DeepSeek-V4-Flash")
    assert (
        "DeepSeek-V4-Flash does not fit in memory: 150.0 GiB weights + 1.0 GiB cache (8,192 tokens)"
        " + 0.5 GiB working room = 151.5 GiB, and physical memory is 16.0 GiB"
    ) in str(caught.value)
    assert "--force" in str(caught.value)
    memory.check(need, label="DeepSeek-V4-Flash", force=True)


def test_metals_working_set_is_the_limit_where_it_is_smaller(small_machine, monkeypatch):
    monkeypatch.setattr(memory, "metal_working_set", lambda: 11 * memory.GIB)
    with pytest.raises(ModelError, match="Metal's recommended working set"):
        memory.check(memory.MemoryEstimate(12 * memory.GIB, 0, 1), label="m")


def test_physical_memory_is_this_machines():
    assert memory.physical_memory() > memory.GIB


def test_loading_checks_before_it_reads_and_obeys_force(tmp_path: Path, monkeypatch):
    folder = make_folder(tmp_path / "tiny")
    monkeypatch.setattr(memory, "physical_memory", lambda: memory.WORKING_BYTES)
    with pytest.raises(ModelError, match="does not fit"):
        load_model_and_tokenizer(folder)
    assert load_model_and_tokenizer(folder, force=True).config["hidden_size"] == 64


def test_sizes_count_the_type_that_is_computed_in(tmp_path: Path):
    import mlx.core as mx

    from mlxsteer.models.folder import check_folder

    folder = check_folder(make_folder(tmp_path / "half", dtype=mx.bfloat16))
    index = json.loads((folder.path / "model.safetensors.index.json").read_text())
    assert folder.weight_bytes() == index["metadata"]["total_size"]
    assert folder.weight_bytes(4) == 2 * folder.weight_bytes()
