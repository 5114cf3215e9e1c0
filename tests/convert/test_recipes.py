"""Recipes: rules, a user's YAML, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.formats import Format
from mlxsteer.convert.layout import model_layout
from mlxsteer.convert.plan import make_plan
from mlxsteer.convert.real_model import CONFIG, official_checkpoint
from mlxsteer.convert.recipe_file import load_recipe, parse_recipe
from mlxsteer.convert.recipes import KEEP, RECIPES, Recipe, Rule, check_recipe
from mlxsteer.errors import UsageError
from tests.convert import synthetic

UNITS = model_layout(CONFIG)
MINE = """
name: mine
rules:
  - {match: "*.switch_mlp.down_proj", layers: [0-3, 20, -1], bits: 3, group_size: 64}
  - {match: "*.switch_mlp.*", bits: 2, group_size: 128}
  - {match: "*.shared_experts.*", mode: mxfp4}
  - {match: "*.attn.wq_a", keep: true}
  - {match: "*.attn.*", bits: 5, group_size: 32}
"""


def test_the_first_rule_that_matches_decides(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    check_recipe(recipe, UNITS)

    def chosen(layer: int, path: str) -> Format | str:
        return recipe.format_for(f"model.layers.{layer}.{path}", layer, 43)

    assert chosen(2, "ffn.switch_mlp.down_proj") == Format("affine", 3, 64)
    assert chosen(4, "ffn.switch_mlp.down_proj") == Format("affine", 2, 128)
    assert chosen(42, "ffn.switch_mlp.down_proj") == Format("affine", 3, 64)
    assert chosen(2, "ffn.switch_mlp.up_proj") == Format("affine", 2, 128)
    assert chosen(9, "ffn.shared_experts.up_proj") == Format("mxfp4", 4, 32)
    assert chosen(9, "attn.wq_a") == KEEP
    assert chosen(9, "attn.indexer.wq_b") == Format("affine", 5, 32)
    assert recipe.format_for("lm_head", None, 43) == KEEP


@pytest.mark.parametrize("name", RECIPES)
def test_built_in_recipes_fit_the_published_model(name: str) -> None:
    check_recipe(RECIPES[name], UNITS)


def test_no_recipe_touches_router_norms_mixers_or_compressors() -> None:
    checkpoint = official_checkpoint(synthetic.small_config(), "test")
    everything = Recipe("all", "", (Rule("*", Format("affine", 4, 64)),))
    for shard in make_plan(checkpoint, everything).shards:
        for plain in shard.plains:
            before = checkpoint.tensors[plain.plain.source].dtype
            assert plain.tensor.dtype == before.replace("I64", "I32")


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("{match: '*.switch_mlpp.*', bits: 2, group_size: 64}", "matches nothing"),
        ("{match: '*.ffn.gate.*', bits: 8, group_size: 64}", "always stay as they are"),
        ("{match: '*.attn.*', bits: 7, group_size: 64}", "MLX has no format"),
        ("{match: '*.attn.*', bits: 4}", "whole numbers"),
        ("{match: '*.attn.*', bits: 4, group_size: 64, layer: 3}", "unknown key 'layer'"),
        ("{match: '*.attn.*', bits: 4, group_size: 64, layers: [43]}", "layers 0 to 42"),
        ("{match: '*.attn.*', bits: 4, group_size: 64, layers: [5-2]}", "backwards"),
        ("{match: '*.attn.*', keep: true, bits: 4}", "either `keep: true`"),
        ("{bits: 4, group_size: 64}", "needs `match`"),
    ],
)
def test_a_typo_in_a_recipe_is_named(tmp_path: Path, rule: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"rules:\n  - {rule}\n")
    with pytest.raises(ConvertError, match=says):
        check_recipe(load_recipe(str(path)), UNITS)


def test_groups_must_divide_the_columns() -> None:
    narrow = model_layout(synthetic.small_config(moe_intermediate_size=160))
    recipe = Recipe("test", "", (Rule("*.down_proj", Format("affine", 4, 64)),))
    with pytest.raises(ConvertError, match=r"groups of 64, but .*down_proj has 160 columns"):
        check_recipe(recipe, narrow)


@pytest.mark.parametrize("data", [None, [], "x", {"rules": "x"}, {"rules": [], "rule": 1}])
def test_what_is_not_a_recipe_is_refused(data: object) -> None:
    with pytest.raises(ConvertError):
        parse_recipe(data, "x")


def test_an_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(UsageError, match=r"no recipe 'q2fast'\. Did you mean 'q2-fast'"):
        load_recipe("q2fast")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="Cannot read the recipe"):
        load_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("rules: [")
    with pytest.raises(ConvertError, match="is not YAML"):
        load_recipe(str(tmp_path / "bad.yaml"))
