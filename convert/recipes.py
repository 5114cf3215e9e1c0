"""Recipes: which matrix is stored how. The table below is what `mlxsteer convert --list` shows.

A rule is a glob over module paths; the first rule that matches decides, and a matrix without a
rule is kept exactly as the source has it. Router, norms, hyper-connections and compressors are
not matrices here: no rule can touch them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mlxsteer.convert.errors import ConvertError, some
from mlxsteer.convert.formats import MXFP4, Format
from mlxsteer.convert.layout import Matrix, Unit
from mlxsteer.errors import UsageError, near_matches

KEEP = "keep"


@dataclass(frozen=True)
class Rule:
    """Matrices whose path matches `glob` (and whose layer is in `layers`) get `format`.

    `layers` holds 0-based layers, negative ones counted from the end; empty means all.
    """

    glob: str
    format: Format | str  # KEEP, or an MLX format
    layers: tuple[int, ...] = ()

    def matches(self, path: str, layer: int | None, count: int) -> bool:
        if not fnmatchcase(path, self.glob):
            return False
        return not self.layers or layer in {n % count for n in self.layers if -count <= n < count}


@dataclass(frozen=True)
class Recipe:
    """A named choice of formats.

    `fallback` stands in for KEEP where MLX has no exact twin of the source's format (FP8 with
    float32 scales, as the Base model has); without it such a source is refused.
    """

    name: str
    summary: str
    rules: tuple[Rule, ...] = ()
    fallback: Format | None = None

    def format_for(self, path: str, layer: int | None, count: int) -> Format | str:
        """KEEP or the format of the first rule that matches."""
        for rule in self.rules:
            if rule.matches(path, layer, count):
                return rule.format
        return KEEP


Q8 = Format("affine", 8, 64)
Q6 = Format("affine", 6, 64)
Q4 = Format("affine", 4, 64)
Q3 = Format("affine", 3, 64)
Q2 = Format("affine", 2, 64)

EXPERTS = "*.switch_mlp.*"
ENDS = (0, -1)  # the first and the last layer suffer most from few bits

_TABLES_8 = (Rule("model.embed_tokens", Q8), Rule("lm_head", Q8))
_FAST_6 = (
    Rule("*.attn.*", Q6),
    Rule("*.shared_experts.*", Q6),
    Rule("model.embed_tokens", Q8),
    Rule("lm_head", Q8),
)
_FAST_4 = (
    # wq_a and wkv feed everything after them and are small; the wide ones carry the traffic.
    Rule("*.attn.wq_a", Q6),
    Rule("*.attn.wkv", Q6),
    Rule("*.attn.indexer.*", Q6),
    Rule("*.attn.*", Q4),
    Rule("*.shared_experts.*", Q6),
    Rule("model.embed_tokens", Q8),
    Rule("lm_head", Q6),
)
_EXPERTS_2 = (Rule(EXPERTS, Q3, layers=ENDS), Rule(EXPERTS, Q2))

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("lossless", "every weight bit for bit: FP4 as mxfp4, FP8 as mxfp8, the rest as is"),
        Recipe(
            "q4-fast",
            "experts as published (mxfp4), attention and shared experts 6 bits",
            (Rule(EXPERTS, MXFP4), *_FAST_6),
            fallback=Q8,
        ),
        Recipe(
            "q3",
            "experts 3 bits, embedding and head 8, the rest bit for bit",
            (Rule(EXPERTS, Q3), *_TABLES_8),
            fallback=Q8,
        ),
        Recipe(
            "q2",
            "experts 2 bits (first and last layer 3), embedding and head 8, the rest bit for bit",
            (*_EXPERTS_2, *_TABLES_8),
            fallback=Q8,
        ),
        Recipe(
            "q2-fast",
            "q2's experts, attention 4 to 6 bits, shared experts 6: least to read per token",
            (*_EXPERTS_2, *_FAST_4),
            fallback=Q8,
        ),
    )
}


def named_recipe(name: str) -> Recipe:
    """A built-in recipe. Raises UsageError with near names."""
    if name not in RECIPES:
        raise UsageError(
            f"There is no recipe {name!r}.{near_matches(name, RECIPES)} Run `mlxsteer convert"
            " --list` to see them, or give a .yaml file of your own."
        )
    return RECIPES[name]


def check_recipe(recipe: Recipe, units: Sequence[Unit]) -> None:
    """Every rule must match a matrix that it fits. Raises ConvertError before anything is read."""
    count = sum(unit.layer is not None for unit in units)
    matrices = [(m, unit.layer) for unit in units for m in unit.matrices]
    for rule in recipe.rules:
        if beyond := [n for n in rule.layers if not -count <= n < count]:
            raise ConvertError(
                f"Recipe {recipe.name}: rule {rule.glob!r} names layer {beyond[0]}, but the model"
                f" has layers 0 to {count - 1}."
            )
        matched = [m for m, layer in matrices if rule.matches(m.path, layer, count)]
        if not matched:
            raise _matches_nothing(recipe, rule, units)
        if isinstance(rule.format, Format):
            _check_groups(recipe, rule, rule.format, matched)


def _check_groups(recipe: Recipe, rule: Rule, target: Format, matched: Sequence[Matrix]) -> None:
    group = target.group_size
    if odd := [m for m in matched if m.cols % group or m.cols * target.bits % 32]:
        raise ConvertError(
            f"Recipe {recipe.name}: rule {rule.glob!r} asks for groups of {group}, but"
            f" {odd[0].path} has {odd[0].cols} columns. Choose a group size that divides them."
        )


def _matches_nothing(recipe: Recipe, rule: Rule, units: Sequence[Unit]) -> ConvertError:
    plains = [p.name for u in units for p in u.plains if fnmatchcase(p.name, f"{rule.glob}*")]
    if plains:
        return ConvertError(
            f"Recipe {recipe.name}: rule {rule.glob!r} matches only {some(plains, 1)}: router,"
            " norms, hyper-connections and compressors always stay as they are. Drop the rule."
        )
    paths = [m.path for unit in units for m in unit.matrices]
    return ConvertError(
        f"Recipe {recipe.name}: rule {rule.glob!r} matches nothing.{near_matches(rule.glob, paths)}"
        f" Paths look like {paths[1]} or {paths[-2]}."
    )
