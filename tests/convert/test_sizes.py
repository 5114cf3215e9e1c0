"""Arithmetic for the published model, against its inventory and the sizes others measured."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from mlxsteer.convert.formats import Format
from mlxsteer.convert.headers import tensor_bytes
from mlxsteer.convert.plan import make_plan
from mlxsteer.convert.real_model import real_checkpoint
from mlxsteer.convert.recipes import EXPERTS, RECIPES, Recipe, Rule
from mlxsteer.convert.sizes import GIB, Sizes, mac_for, sizes
from tests.fixtures.convert.inventory import inv

CHECKPOINT = real_checkpoint()


@cache
def facts_of(recipe: str) -> Sizes:
    return sizes(make_plan(CHECKPOINT, RECIPES[recipe]))


def test_inventory_is_the_published_one_name_by_name() -> None:
    ours = {name: (entry.dtype, entry.shape) for name, entry in CHECKPOINT.tensors.items()}
    assert ours == dict(inv())


def test_totals_are_those_of_the_published_index() -> None:
    assert len(CHECKPOINT.tensors) == 69_187
    assert CHECKPOINT.nbytes == 159_609_485_896
    assert len(CHECKPOINT.shards) == 46
    by_dtype: Counter[str] = Counter()
    for entry in CHECKPOINT.tensors.values():
        by_dtype[entry.dtype] += tensor_bytes(entry.dtype, entry.shape)
    assert by_dtype["I8"] == 141_733_920_768
    assert by_dtype["F8_E8M0"] == 8_858_737_664


def test_draft_block_is_left_out() -> None:
    plan = make_plan(CHECKPOINT, RECIPES["lossless"])
    assert len(plan.dropped) == 1_575
    assert sum(entry.nbytes for entry in plan.dropped) == 3_593_787_756


def test_lossless_bytes_follow_from_the_inventory_by_hand() -> None:
    """Source without drafts, int64 to int32, and FP8 scales spread from 128x128 to 1x32."""
    size = without_drafts = 156_015_698_140
    for name, (dtype, shape) in inv().items():
        if name.startswith("mtp."):
            continue
        if dtype == "I64":
            size -= tensor_bytes("I32", shape)
        elif dtype == "F8_E4M3":
            blocks = -(-shape[0] // 128) * -(-shape[1] // 128)
            size += shape[0] * shape[1] // 32 - blocks
    assert facts_of("lossless").bytes_out == size
    assert size != without_drafts


# GB as the reference gives them: experts, total with FP8 as mxfp8 and the rest as published.
@pytest.mark.parametrize(
    ("experts", "experts_gb", "total_gb"),
    [
        (None, 147.17, 156.19),
        (Format("affine", 4, 64), 155.83, 164.85),
        (Format("affine", 3, 64), 121.20, 130.2),
        (Format("affine", 2, 32), 103.88, 112.9),
        (Format("affine", 2, 64), 86.57, 95.6),
        (Format("affine", 2, 128), 77.91, 86.9),
    ],
)
def test_expert_formats_have_the_known_sizes(
    experts: Format | None, experts_gb: float, total_gb: float
) -> None:
    rules = (Rule(EXPERTS, experts),) if experts else ()
    facts = sizes(make_plan(CHECKPOINT, Recipe("test", "", rules)))
    assert facts.by_kind["experts"] / 1e9 == pytest.approx(experts_gb, abs=0.005)
    assert facts.bytes_out / 1e9 == pytest.approx(total_gb, abs=0.05)


def test_lossless_decode_reads_the_known_bytes_per_token() -> None:
    facts = facts_of("lossless")
    assert facts.read_of_experts / 1e9 == pytest.approx(3.45, abs=0.005)
    dense = facts.read_per_token - facts.read_of_experts
    assert dense / 1e9 == pytest.approx(7.96, abs=0.01)


# Exact, so that a change of a recipe is seen.
@pytest.mark.parametrize(
    ("recipe", "nbytes", "per_token", "mac"),
    [
        ("lossless", 156_189_074_524, 11_400_264_868, 192),
        ("q4-fast", 153_914_909_788, 9_622_531_492, 192),
        ("q3", 129_225_073_756, 10_295_127_460, 192),
        ("q2", 96_207_512_668, 9_521_278_372, 128),
        ("q2-fast", 93_711_705_180, 7_025_470_884, 128),
    ],
)
def test_every_recipe_has_exact_sizes(recipe: str, nbytes: int, per_token: int, mac: int) -> None:
    facts = facts_of(recipe)
    assert (facts.bytes_out, facts.read_per_token, facts.mac_gib) == (nbytes, per_token, mac)


def test_fast_recipes_read_less_than_their_plain_sisters() -> None:
    read = {name: facts_of(name).read_per_token for name in RECIPES}
    assert read["q2-fast"] < 0.8 * read["q2"]
    assert read["q4-fast"] < 0.9 * read["lossless"]


def test_a_mac_is_chosen_by_what_its_gpu_may_hold() -> None:
    assert mac_for(int(20 * GIB)) == (32, False)
    assert mac_for(int(23 * GIB)) == (32, True)
    assert mac_for(int(600 * GIB)) == (None, False)
