"""A user's own recipe: a YAML file, checked word for word so that a typo cannot pass.

name: mine
summary: experts 2 bits, the middle layers' down projections 3
fallback: {bits: 8, group_size: 64}          # optional, for sources with float32 scales
rules:                                       # the first that matches decides
  - match: "*.switch_mlp.down_proj"
    layers: [0-3, 20, -1]                    # optional; negative counts from the end
    bits: 3
    group_size: 64
  - match: "*.switch_mlp.*"
    bits: 2
    group_size: 64                           # mode is affine unless given
  - {match: "*.attn.*", keep: true}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.formats import Format
from mlxsteer.convert.recipes import KEEP, Recipe, Rule, named_recipe

_FORMAT_KEYS = {"bits", "group_size", "mode"}
_MX_SIZES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def load_recipe(text: str) -> Recipe:
    """The recipe that `--recipe` names: a built-in one, or a YAML file."""
    if text.endswith((".yaml", ".yml")):
        return read_recipe(Path(text).expanduser())
    return named_recipe(text)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises ConvertError that names the file and the rule at fault."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvertError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_recipe(data, path.stem)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error


def parse_recipe(data: Any, default_name: str) -> Recipe:
    """A recipe from decoded YAML."""
    if not isinstance(data, dict) or not isinstance(data.get("rules"), list):
        raise ConvertError("a recipe is a mapping with a list of rules: {match, bits, group_size}.")
    _only(data, {"name", "summary", "rules", "fallback"}, "the recipe")
    rules = tuple(_rule(rule, number) for number, rule in enumerate(data["rules"], start=1))
    fallback = data.get("fallback")
    if fallback is not None and not isinstance(fallback, dict):
        raise ConvertError("fallback is a mapping: {bits, group_size, mode}.")
    return Recipe(
        str(data.get("name", default_name)),
        str(data.get("summary", "")),
        rules,
        _format(fallback, "fallback") if fallback else None,
    )


def _rule(data: Any, number: int) -> Rule:
    where = f"rule {number}"
    if not isinstance(data, dict) or not isinstance(data.get("match"), str):
        raise ConvertError(f'{where} needs `match`, a glob of module paths like "*.switch_mlp.*".')
    _only(data, {"match", "layers", "keep"} | _FORMAT_KEYS, where)
    layers = _layers(data.get("layers", []), where)
    settings = {key: data[key] for key in _FORMAT_KEYS & data.keys()}
    if "keep" not in data:
        return Rule(data["match"], _format(settings, where), layers)
    if data["keep"] is not True or settings:
        raise ConvertError(f"{where}: write either `keep: true` or bits and group_size.")
    return Rule(data["match"], KEEP, layers)


def _format(data: Mapping[str, Any], where: str) -> Format:
    _only(data, _FORMAT_KEYS, where)
    mode = str(data.get("mode", "affine"))
    bits, group = _MX_SIZES.get(mode, (None, None))
    bits, group = data.get("bits", bits), data.get("group_size", group)
    if not isinstance(bits, int) or not isinstance(group, int):
        raise ConvertError(f"{where} needs whole numbers for bits and group_size, or keep: true.")
    return Format(mode, bits, group)


def _layers(data: Any, where: str) -> tuple[int, ...]:
    """`[0-3, 20, -1]` or `5` as a tuple of layers."""
    found: list[int] = []
    for item in data if isinstance(data, list) else [data]:
        if span := re.fullmatch(r"(\d+)-(\d+)", str(item)):
            first, last = map(int, span.groups())
            if last < first:
                raise ConvertError(f"{where}: layers {item} runs backwards.")
            found.extend(range(first, last + 1))
        elif re.fullmatch(r"-?\d+", str(item)):
            found.append(int(item))
        else:
            raise ConvertError(f"{where}: layers are numbers or spans like 0-3, not {item!r}.")
    return tuple(found)


def _only(data: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(map(str, data.keys() - known)):
        raise ConvertError(
            f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}."
        )
