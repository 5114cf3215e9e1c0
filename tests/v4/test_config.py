"""What configs are accepted, and what is refused by name."""

from __future__ import annotations

import pytest

from mlxsteer.errors import ModelError
from mlxsteer.models.deepseek_v4 import ModelArgs
from mlxsteer.models.deepseek_v4.config import is_0731_config
from tests.v4.tiny import config

FLASH = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
PRO = FLASH | {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4] + [0],
}


def test_v4_flash_is_read_with_rounding_on_and_the_draft_entry_dropped():
    args = ModelArgs.from_dict(FLASH)
    assert len(args.compress_ratios) == 43
    assert args.activation_rounding
    assert (args.nope_head_dim, args.index_topk, args.sliding_window) == (448, 512, 128)


def test_the_0731_release_is_read_and_told_apart():
    newer = FLASH | {"compress_ratios": FLASH["compress_ratios"] + [0, 0], "dspark_block_size": 5}
    assert ModelArgs.from_dict(newer) == ModelArgs.from_dict(FLASH)
    assert is_0731_config(newer)
    assert not is_0731_config(FLASH)


def test_v4_pro_is_read_by_the_same_code():
    args = ModelArgs.from_dict(PRO)
    assert args.compress_ratios[:4] == (128, 128, 4, 128)
    assert args.index_topk == 1024


def test_rounding_is_off_by_itself_only_where_dimensions_do_not_allow_it():
    assert not ModelArgs.from_dict(config("tiny_fp32")).activation_rounding
    assert ModelArgs.from_dict(config("tiny_fp8fp4")).activation_rounding
    assert not ModelArgs.from_dict(FLASH | {"activation_rounding": False}).activation_rounding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v41"}, r"V4\.1"),
        ({"model_type": "llama"}, "'llama'"),
        ({"vision_n_layers": 24}, "vision"),
        ({"compress_ratios": None}, "lacks compress_ratios"),
        ({"o_groups": None}, "lacks o_groups"),
        ({"compress_ratios": [0, 4, 128]}, "at least 43 entries"),
        ({"compress_ratios": [0, 4, 64] * 20}, "contains 64"),
        ({"rope_scaling": None}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "'linear'"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"hc_mult": 2}, "hc_mult"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"o_groups": 7}, "o_groups 7 must divide"),
        ({"head_dim": 500, "activation_rounding": True}, "set it to false"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused_by_name(change, message):
    with pytest.raises(ModelError, match=message):
        ModelArgs.from_dict(FLASH | change)
