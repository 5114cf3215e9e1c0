"""The file of a contrast set (`prompts/NAME.yaml`): where it is found, and how it is read.

A typo becomes an error that names the file and the line. What the parts mean, and whether they
fit, is `contrast`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from mlxsteer.contrast import (
    COMBINES,
    ContrastSet,
    DataPath,
    ExtractDefaults,
    Fault,
    Metric,
    one_of,
)
from mlxsteer.errors import ContrastError, near_matches
from mlxsteer.files import home_dir

_KEYS = (
    "description",
    "labels",
    "combine",
    "questions",
    "positive",
    "negative",
    "pairs",
    "positive_from",
    "held_out",
    "metric",
    "extract",
    "instruction",
    "license",
)


def load(path_or_name: str | Path) -> ContrastSet:
    """A set by name (the user's, then the bundled ones) or by the path of a .yaml file."""
    path = Path(path_or_name)
    if isinstance(path_or_name, Path) or path.suffix in (".yaml", ".yml"):
        return from_yaml(read_text(path, str(path)), str(path))
    for folder, shown in _folders():
        if path_or_name in _names(folder):
            source = f"{shown}/{path_or_name}.yaml"
            return from_yaml(read_text(folder / f"{path_or_name}.yaml", source), source)
    known = available()
    raise ContrastError(
        f"No contrast set is named {path_or_name!r}.{near_matches(path_or_name, known)}"
        f" Known: {', '.join(known)}. Or give the path of a .yaml file."
    )


def from_yaml(text: str, source: str) -> ContrastSet:
    """The set written in `text`; errors begin with `source:line`."""
    lines: dict[DataPath, int] = {}
    with located(source, lines):
        data = plain_yaml(text, lines)
        check_keys(data, _KEYS, ())
        return from_dict({"name": Path(source).stem, **data})


def from_dict(data: Mapping[str, Any]) -> ContrastSet:
    """The set held in the same keys as its YAML file, and `name`."""
    check_keys(data, ("name", *_KEYS), ())
    combine = _text(data, "combine")
    one_of(combine, COMBINES, ("combine",), "combine")
    paired = combine in ("texts", "answers")
    questions, positive, negative = (_pairs if paired else _instructions)(data, combine)
    labels = _mapping(data, "labels", ("positive", "negative"))
    return ContrastSet(
        name=_text(data, "name"),
        description=_text(data, "description"),
        positive_label=_text(labels, "positive", ("labels",)),
        negative_label=_text(labels, "negative", ("labels",)),
        combine=combine,
        questions=questions,
        positive=positive,
        negative=negative,
        held_out=_question_list(data, "held_out"),
        metric=_metric(data, (positive, negative) if paired else ((), ())),
        extract=_extract(data, combine),
        license=_text(data, "license") if "license" in data else "",
        instruction=_instruction(data, paired),
    )


def available() -> list[str]:
    """The names that `ContrastSet.load` knows: bundled ones and the user's."""
    return sorted({name for folder, _ in _folders() for name in _names(folder)})


# ---- files ----------------------------------------------------------------------------------


def _bundled() -> Traversable:
    try:
        return resources.files("mlxsteer.prompts")
    except ModuleNotFoundError:  # run from a checkout that is not installed
        return Path(__file__).parent.parent / "prompts"


def _folders() -> list[tuple[Traversable, str]]:
    """Where sets are found, first match wins, each with the name that errors show."""
    own = home_dir() / "prompts"
    return [(own, str(own)), (_bundled(), "prompts")]


def _names(folder: Traversable) -> list[str]:
    if not folder.is_dir():
        return []
    files = (entry.name for entry in folder.iterdir())
    return [n.removesuffix(".yaml") for n in files if n.endswith(".yaml") and n[0] not in "_."]


def read_text(path: Traversable, source: str) -> str:
    """The text of a UTF-8 file; ContrastError, which names it `source`, when it cannot be had."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ContrastError(f"{source} is not UTF-8 text: save it as UTF-8.") from error
    except OSError as error:
        raise ContrastError(f"Cannot read {source}: {error.strerror or error}.") from error


@cache
def bundled(name: str) -> Any:
    """The data of a bundled file that is no contrast set: `_questions`, `_neutral`, `_cloze`."""
    return plain_yaml(read_text(_bundled() / f"{name}.yaml", f"prompts/{name}.yaml"), {})


def plain_yaml(text: str, lines: dict[DataPath, int]) -> Any:
    """The plain data of `text`, and in `lines` the line of every key and item."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return _plain(node, (), lines, set()) if node else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        lines[("yaml",)] = mark.line + 1 if mark else 1
        raise Fault(
            ("yaml",),
            f"not valid YAML: {error.problem or error}."
            " A text that holds ': ' or ' #', or begins with a sign, goes in quotes.",
        ) from error
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise Fault((), f"not valid YAML: {error}.") from error


def _plain(node: yaml.Node, path: DataPath, lines: dict[DataPath, int], seen: set[int]) -> Any:
    """Walk the node graph ourselves: yaml's own constructors drop lines and repeated keys."""
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:  # also what would make a file of ten lines fill the memory
        raise Fault(path, "aliases (*name) are not read. Write it out.")
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), lines, seen) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return yaml.constructor.SafeConstructor().construct_object(node)
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        first = lines.get((*path, key))
        lines[(*path, key)] = key_node.start_mark.line + 1
        if first is not None:
            raise Fault((*path, key), f"key {key!r} is given twice (first on line {first}).")
        data[key] = _plain(value_node, (*path, key), lines, seen)
    return data


@contextmanager
def located(source: str, lines: Mapping[DataPath, int]) -> Iterator[None]:
    """A Fault inside the block becomes a ContrastError that begins with `source:line`."""
    try:
        yield
    except Fault as fault:
        path = fault.path
        while path and path not in lines:
            path = path[:-1]
        raise ContrastError(f"{source}:{lines.get(path, 1)}: {fault}") from fault


# ---- reading keys ---------------------------------------------------------------------------


def check_keys(data: Any, keys: tuple[str, ...], path: DataPath) -> None:
    if not isinstance(data, Mapping):
        raise Fault(path, f"expected keys ({', '.join(keys)}), found {shown(data)}.")
    for key in data:
        if key not in keys:
            raise Fault(
                (*path, key),
                f"unknown key {key!r}.{near_matches(str(key), keys)} Keys: {', '.join(keys)}.",
            )


def shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "keys"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return "nothing" if value is None else repr(value)


def _need(data: Mapping[str, Any], key: str, path: DataPath) -> Any:
    if key not in data:
        raise Fault(path, f"key {'.'.join(map(str, (*path, key)))!r} is missing. Add it.")
    return data[key]


def _text(data: Mapping[str, Any], key: str, path: DataPath = ()) -> str:
    return as_text(_need(data, key, path), (*path, key))


def as_text(value: Any, path: DataPath) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Fault(
            path,
            f"{'.'.join(map(str, path))} must be text, found {shown(value)}."
            " Put it in quotes if it is meant literally.",
        )
    return value.strip()


def _texts(data: Mapping[str, Any], key: str, path: DataPath = ()) -> tuple[str, ...]:
    value = _need(data, key, path)
    if not isinstance(value, list | tuple) or not value:
        raise Fault((*path, key), f"{key!r} must be a list of texts, found {shown(value)}.")
    return tuple(as_text(item, (*path, key, i)) for i, item in enumerate(value))


def _mapping(data: Mapping[str, Any], key: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    value = _need(data, key, ())
    check_keys(value, keys, (key,))
    return value


def _question_list(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    if data.get(key) == "common":
        return tuple(bundled("_questions")[key])
    return _texts(data, key)


Poles = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
Examples = tuple[tuple[str, ...], tuple[str, ...]]


def _instructions(data: Mapping[str, Any], combine: str) -> Poles:
    """questions, positive, negative of a set of instructions."""
    for key in ("pairs", "positive_from"):
        if key in data:
            raise Fault(
                (key,),
                f"{key!r} belongs to combine 'texts' or 'answers'; combine {combine!r} takes"
                " 'questions', 'positive' and 'negative'.",
            )
    return _question_list(data, "questions"), _texts(data, "positive"), _texts(data, "negative")


def _pairs(data: Mapping[str, Any], combine: str) -> Poles:
    """questions, positive, negative of a set of texts or answers, written pair by pair."""
    for key in ("questions", "positive", "negative"):
        if key in data:
            raise Fault(
                (key,), f"combine {combine!r} takes 'pairs' (of positive, negative), not {key!r}."
            )
    derive = data.get("positive_from")
    if derive is not None:
        one_of(derive, ("uppercase",), ("positive_from",), "positive_from")
    asked = ("question",) if combine == "answers" else ()
    keys = (*asked, "negative") if derive else (*asked, "positive", "negative")
    rows = _need(data, "pairs", ())
    if not isinstance(rows, list | tuple) or not rows:
        raise Fault(("pairs",), f"'pairs' must be a list, found {shown(rows)}.")
    for i, row in enumerate(rows):
        check_keys(row, keys, ("pairs", i))
    column = {
        key: tuple(_text(row, key, ("pairs", i)) for i, row in enumerate(rows)) for key in keys
    }
    negative = column["negative"]
    positive = tuple(text.upper() for text in negative) if derive else column["positive"]
    return column.get("question", ()), positive, negative


def _instruction(data: Mapping[str, Any], paired: bool) -> str:
    if "instruction" not in data:
        return ""
    if not paired:
        raise Fault(
            ("instruction",),
            "'instruction' belongs to combine 'texts' or 'answers'; here the positive wordings"
            " are the instruction.",
        )
    return _text(data, "instruction")


def _metric(data: Mapping[str, Any], texts_of_poles: Examples) -> Metric:
    keys = ("name", "pattern", "direction", "label")
    value = _mapping(data, "metric", keys)
    texts = {key: _text(value, key, ("metric",)) for key in keys if key in value}
    _need(value, "name", ("metric",))
    texts.setdefault("label", texts["name"])
    return Metric(**texts, examples=texts_of_poles if texts["name"] == "topic" else ((), ()))


def _extract(data: Mapping[str, Any], combine: str) -> ExtractDefaults:
    if "extract" not in data:
        return ExtractDefaults(position=COMBINES[combine])
    value = _mapping(data, "extract", ("position", "band", "norm_preserving", "acts_on"))
    position = _text(value, "position", ("extract",)) if "position" in value else COMBINES[combine]
    band = value.get("band")
    if band is not None and not (
        isinstance(band, list | tuple)
        and len(band) == 2
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in band)
    ):
        raise Fault(
            ("extract", "band"), f"band must be two fractions of depth, found {shown(band)}."
        )
    norm_preserving = value.get("norm_preserving", False)
    if not isinstance(norm_preserving, bool):
        raise Fault(
            ("extract", "norm_preserving"),
            f"norm_preserving must be true or false, found {shown(norm_preserving)}.",
        )
    acts_on = _text(value, "acts_on", ("extract",)) if "acts_on" in value else "answer"
    span = (band[0], band[1]) if band else None
    return ExtractDefaults(position, span, norm_preserving, acts_on)
