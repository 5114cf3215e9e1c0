"""Contrast sets: what a trait is, as pairs of prompts or texts that differ in it alone.

Owns the data, its YAML file (`prompts/NAME.yaml`), the checks that turn a typo into an error
with its line, and the order in which pairs are dealt. Knows nothing of models, chat templates
or how a metric is computed.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from mlxsteer.errors import ContrastError, near_matches
from mlxsteer.files import home_dir

# How a wording meets a question, and where the result is read. An instruction shows at the
# last prompt token; language, capitals and topics show only over texts or answers.
COMBINES = {
    "append": "last_prompt",  # user: question, then the instruction
    "prepend": "last_prompt",  # user: the instruction, then the question
    "system": "last_prompt",  # system: the instruction; user: the question
    "persona": "last_prompt",  # system: "You are " + the wording + "."; user: the question
    "texts": "text_mean",  # two plain texts, no question
    "answers": "answer_mean",  # user: the question; assistant: the answer
}

# The metrics that show a trait, and what `pattern` holds for those that take one.
METRICS: dict[str, str | None] = {
    "words": None,
    "uppercase_share": None,
    "language": "a language code, such as fr",
    "regex_share": "a regular expression; the metric is the share of answers that match",
    "regex_rate": "a regular expression; the metric is matches per 100 words",
    "sentiment": None,
    "contractions": None,
    "exclamations": None,
    "questions": None,
    "sentence_length": None,
    "word_length": None,
    "list_items": None,
}

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
    "license",
)

Messages = tuple[dict[str, str], ...]
YamlPath = tuple[str | int, ...]


class _Fault(ContrastError):
    """A fault at a path inside the set; the file reader turns the path into a line."""

    def __init__(self, path: YamlPath, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Pair:
    """One contrast pair: chat messages for the caller's template, or plain texts."""

    positive: Messages | str
    negative: Messages | str
    index: int


@dataclass(frozen=True)
class Metric:
    """The number that shows a trait, and which way more of the name moves it."""

    name: str
    direction: str = "up"
    label: str = ""
    pattern: str | None = None

    def __post_init__(self) -> None:
        _one_of(self.name, METRICS, ("metric", "name"), "metric")
        _one_of(self.direction, ("up", "down"), ("metric", "direction"), "direction")
        wanted = METRICS[self.name]
        if wanted and not self.pattern:
            raise _Fault(("metric", "name"), f"metric {self.name!r} needs a 'pattern': {wanted}.")
        if self.pattern and not wanted:
            raise _Fault(
                ("metric", "pattern"), f"metric {self.name!r} takes no 'pattern'. Remove it."
            )
        if self.name.startswith("regex"):
            self.regex()
        if self.name == "language" and not re.fullmatch("[a-z]{2}", self.pattern or ""):
            raise _Fault(
                ("metric", "pattern"),
                f"{self.pattern!r} is not a language code of two letters, such as fr.",
            )

    def regex(self) -> re.Pattern[str]:
        """The pattern as every part of the package matches it: any case, ^ and $ at lines."""
        try:
            return re.compile(self.pattern or "", re.IGNORECASE | re.MULTILINE)
        except re.error as error:
            raise _Fault(
                ("metric", "pattern"), f"{self.pattern!r} is not a regular expression: {error}."
            ) from error


@dataclass(frozen=True)
class ExtractDefaults:
    """Where a trait is read and written unless the caller says otherwise.

    `band` is a pair of fractions of depth; None leaves the choice to the extractor.
    """

    position: str = "last_prompt"
    band: tuple[float, float] | None = None
    norm_preserving: bool = False

    def __post_init__(self) -> None:
        _one_of(self.position, set(COMBINES.values()), ("extract", "position"), "reading position")
        if self.band is not None and not 0 <= self.band[0] < self.band[1] <= 1:
            raise _Fault(
                ("extract", "band"),
                f"band {list(self.band)} must be two fractions of depth, low then high,"
                " such as [0.35, 0.70].",
            )


@dataclass(frozen=True)
class ContrastSet:
    """A trait: two matched poles, what they are asked, and how to see the difference.

    `positive[i]` is matched to `negative[i]`: wordings of an instruction, or, when `combine`
    is "texts" or "answers", whole texts or answers (`questions[i]` goes with answer i).
    Raises ContrastError when the parts do not fit.
    """

    name: str
    description: str
    positive_label: str
    negative_label: str
    combine: str
    questions: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    held_out: tuple[str, ...]
    metric: Metric
    extract: ExtractDefaults = field(default_factory=ExtractDefaults)
    license: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise _Fault(
                ("name",),
                f"{self.name!r} cannot be a name: use letters, digits, '-' and '_'."
                " A set in a file has the file's name.",
            )
        _one_of(self.combine, COMBINES, ("combine",), "combine")
        _check_poles(self)
        _check_questions(self)
        if self.extract.position != COMBINES[self.combine]:
            raise _Fault(
                ("extract", "position"),
                f"combine {self.combine!r} is read at {COMBINES[self.combine]!r}, not at"
                f" {self.extract.position!r}.",
            )

    @classmethod
    def load(cls, path_or_name: str | Path) -> ContrastSet:
        """A set by name (the user's, then the bundled ones) or by the path of a .yaml file.

        A server takes a name from a request only if it is in `available()`.
        """
        path = Path(path_or_name)
        if isinstance(path_or_name, Path) or path.suffix in (".yaml", ".yml"):
            return cls.from_yaml(_read(path, str(path)), str(path))
        for folder, shown in _folders():
            if path_or_name in _names(folder):
                source = f"{shown}/{path_or_name}.yaml"
                return cls.from_yaml(_read(folder / f"{path_or_name}.yaml", source), source)
        known = available()
        raise ContrastError(
            f"No contrast set is named {path_or_name!r}.{near_matches(path_or_name, known)}"
            f" Known: {', '.join(known)}. Or give the path of a .yaml file."
        )

    @classmethod
    def from_yaml(cls, text: str, source: str) -> ContrastSet:
        """The set written in `text`; errors begin with `source:line`. Its name is the file's."""
        lines: dict[YamlPath, int] = {}
        try:
            data = _plain_yaml(text, lines)
            _check_keys(data, _KEYS, ())
            return cls.from_dict({"name": Path(source).stem, **data})
        except _Fault as fault:
            path = fault.path
            while path and path not in lines:
                path = path[:-1]
            raise ContrastError(f"{source}:{lines.get(path, 1)}: {fault}") from fault

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ContrastSet:
        """The set held in the same keys as its YAML file, and `name`."""
        _check_keys(data, ("name", *_KEYS), ())
        combine = _text(data, "combine")
        _one_of(combine, COMBINES, ("combine",), "combine")
        paired = combine in ("texts", "answers")
        questions, positive, negative = (_pairs if paired else _instructions)(data, combine)
        labels = _mapping(data, "labels", ("positive", "negative"))
        return cls(
            name=_text(data, "name"),
            description=_text(data, "description"),
            positive_label=_text(labels, "positive", ("labels",)),
            negative_label=_text(labels, "negative", ("labels",)),
            combine=combine,
            questions=questions,
            positive=positive,
            negative=negative,
            held_out=_question_list(data, "held_out"),
            metric=_metric(data),
            extract=_extract(data, combine),
            license=_text(data, "license") if "license" in data else "",
        )

    @property
    def max_pairs(self) -> int:
        """How many different pairs the set can deal."""
        if self.combine in ("texts", "answers"):
            return len(self.positive)
        return len(self.questions) * len(self.positive)

    def pairs(self, n: int | None = None, seed: int = 0) -> list[Pair]:
        """The first `n` pairs (all when None) in the order that `seed` decides.

        However many are dealt, the uses of two questions, or of two wordings, differ by at
        most one, so 8 pairs already vary the wording. More pairs begin with the fewer.
        Raises ContrastError when `n` is not in 1..max_pairs.
        """
        if n is None:
            n = self.max_pairs
        if not 1 <= n <= self.max_pairs:
            raise ContrastError(
                f"{self.name} can deal 1 to {self.max_pairs} pairs, not {n}. Ask for fewer, or"
                " add questions or wordings to the set."
            )
        shuffle = random.Random(seed)
        wordings = shuffle.sample(range(len(self.positive)), len(self.positive))
        if self.combine in ("texts", "answers"):
            return [self._pair(index, i, i) for index, i in enumerate(wordings[:n])]
        questions = shuffle.sample(range(len(self.questions)), len(self.questions))
        # Walking both lists at once meets lcm(Q, W) different combinations; then the wordings
        # move on by one, and the walk meets the next lcm.
        round_trip = math.lcm(len(questions), len(wordings))
        return [
            self._pair(
                k,
                questions[k % len(questions)],
                wordings[(k + k // round_trip) % len(wordings)],
            )
            for k in range(n)
        ]

    def _pair(self, index: int, question: int, wording: int) -> Pair:
        if self.combine == "texts":
            return Pair(self.positive[wording], self.negative[wording], index)
        asked = self.questions[question]
        return Pair(
            _messages(self.combine, asked, self.positive[wording]),
            _messages(self.combine, asked, self.negative[wording]),
            index,
        )

    def digest(self) -> str:
        """sha256 of what decides the pairs: editing a description or a metric keeps it."""
        content = [
            self.combine,
            self.extract.position,
            self.questions,
            self.positive,
            self.negative,
        ]
        canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def available() -> list[str]:
    """The names that `ContrastSet.load` knows: bundled ones and the user's."""
    return sorted({name for folder, _ in _folders() for name in _names(folder)})


def _messages(combine: str, question: str, wording: str) -> Messages:
    user = {"role": "user", "content": question}
    if combine == "append":
        return ({"role": "user", "content": f"{question} {wording}"},)
    if combine == "prepend":
        return ({"role": "user", "content": f"{wording} {question}"},)
    if combine == "answers":
        return (user, {"role": "assistant", "content": wording})
    content = f"You are {wording}." if combine == "persona" else wording
    return ({"role": "system", "content": content}, user)


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


def _read(path: Traversable, source: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ContrastError(f"{source} is not UTF-8 text: save it as UTF-8.") from error
    except OSError as error:
        raise ContrastError(f"Cannot read {source}: {error.strerror or error}.") from error


@cache
def _common(key: str) -> tuple[str, ...]:
    """The questions that most bundled sets share."""
    source = "prompts/_questions.yaml"
    data = _plain_yaml(_read(_bundled() / "_questions.yaml", source), {})
    return tuple(data[key])


def _plain_yaml(text: str, lines: dict[YamlPath, int]) -> Any:
    """Plain data, and in `lines` the line of every key and item."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return _plain(node, (), lines, set()) if node else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        lines[("yaml",)] = mark.line + 1 if mark else 1
        raise _Fault(
            ("yaml",),
            f"not valid YAML: {error.problem or error}."
            " A text that holds ': ' or ' #', or begins with a sign, goes in quotes.",
        ) from error
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise _Fault((), f"not valid YAML: {error}.") from error


def _plain(node: yaml.Node, path: YamlPath, lines: dict[YamlPath, int], seen: set[int]) -> Any:
    """Walk the node graph ourselves: yaml's own constructors drop lines and repeated keys."""
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:  # also what would make a file of ten lines fill the memory
        raise _Fault(path, "aliases (*name) are not read in contrast sets. Write it out.")
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
            raise _Fault((*path, key), f"key {key!r} is given twice (first on line {first}).")
        data[key] = _plain(value_node, (*path, key), lines, seen)
    return data


# ---- reading keys ---------------------------------------------------------------------------


def _one_of(value: str, known: Iterable[str], path: YamlPath, what: str) -> None:
    names = sorted(known)
    if value not in names:
        raise _Fault(
            path,
            f"unknown {what} {value!r}.{near_matches(str(value), names)}"
            f" Known: {', '.join(names)}.",
        )


def _check_keys(data: Any, keys: tuple[str, ...], path: YamlPath) -> None:
    if not isinstance(data, Mapping):
        raise _Fault(path, f"expected keys ({', '.join(keys)}), found {_shown(data)}.")
    for key in data:
        if key not in keys:
            raise _Fault(
                (*path, key),
                f"unknown key {key!r}.{near_matches(str(key), keys)} Keys: {', '.join(keys)}.",
            )


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "keys"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return "nothing" if value is None else repr(value)


def _need(data: Mapping[str, Any], key: str, path: YamlPath) -> Any:
    if key not in data:
        raise _Fault(path, f"key {'.'.join(map(str, (*path, key)))!r} is missing. Add it.")
    return data[key]


def _text(data: Mapping[str, Any], key: str, path: YamlPath = ()) -> str:
    return _as_text(_need(data, key, path), (*path, key))


def _as_text(value: Any, path: YamlPath) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Fault(
            path,
            f"{'.'.join(map(str, path))} must be text, found {_shown(value)}."
            " Put it in quotes if it is meant literally.",
        )
    return value.strip()


def _texts(data: Mapping[str, Any], key: str, path: YamlPath = ()) -> tuple[str, ...]:
    value = _need(data, key, path)
    if not isinstance(value, list | tuple) or not value:
        raise _Fault((*path, key), f"{key!r} must be a list of texts, found {_shown(value)}.")
    return tuple(_as_text(item, (*path, key, i)) for i, item in enumerate(value))


def _mapping(data: Mapping[str, Any], key: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    value = _need(data, key, ())
    _check_keys(value, keys, (key,))
    return value


def _question_list(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return _common(key) if data.get(key) == "common" else _texts(data, key)


Poles = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def _instructions(data: Mapping[str, Any], combine: str) -> Poles:
    """questions, positive, negative of a set of instructions."""
    for key in ("pairs", "positive_from"):
        if key in data:
            raise _Fault(
                (key,),
                f"{key!r} belongs to combine 'texts' or 'answers'; combine {combine!r} takes"
                " 'questions', 'positive' and 'negative'.",
            )
    return _question_list(data, "questions"), _texts(data, "positive"), _texts(data, "negative")


def _pairs(data: Mapping[str, Any], combine: str) -> Poles:
    """questions, positive, negative of a set of texts or answers, written pair by pair."""
    for key in ("questions", "positive", "negative"):
        if key in data:
            raise _Fault(
                (key,), f"combine {combine!r} takes 'pairs' (of positive, negative), not {key!r}."
            )
    derive = data.get("positive_from")
    if derive is not None:
        _one_of(derive, ("uppercase",), ("positive_from",), "positive_from")
    asked = ("question",) if combine == "answers" else ()
    keys = (*asked, "negative") if derive else (*asked, "positive", "negative")
    rows = _need(data, "pairs", ())
    if not isinstance(rows, list | tuple) or not rows:
        raise _Fault(("pairs",), f"'pairs' must be a list, found {_shown(rows)}.")
    for i, row in enumerate(rows):
        _check_keys(row, keys, ("pairs", i))
    column = {
        key: tuple(_text(row, key, ("pairs", i)) for i, row in enumerate(rows)) for key in keys
    }
    negative = column["negative"]
    positive = tuple(text.upper() for text in negative) if derive else column["positive"]
    return column.get("question", ()), positive, negative


def _metric(data: Mapping[str, Any]) -> Metric:
    keys = ("name", "pattern", "direction", "label")
    value = _mapping(data, "metric", keys)
    texts = {key: _text(value, key, ("metric",)) for key in keys if key in value}
    _need(value, "name", ("metric",))
    texts.setdefault("label", texts["name"])
    return Metric(**texts)


def _extract(data: Mapping[str, Any], combine: str) -> ExtractDefaults:
    if "extract" not in data:
        return ExtractDefaults(position=COMBINES[combine])
    value = _mapping(data, "extract", ("position", "band", "norm_preserving"))
    position = _text(value, "position", ("extract",)) if "position" in value else COMBINES[combine]
    band = value.get("band")
    if band is not None and not (
        isinstance(band, list | tuple)
        and len(band) == 2
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in band)
    ):
        raise _Fault(
            ("extract", "band"), f"band must be two fractions of depth, found {_shown(band)}."
        )
    norm_preserving = value.get("norm_preserving", False)
    if not isinstance(norm_preserving, bool):
        raise _Fault(
            ("extract", "norm_preserving"),
            f"norm_preserving must be true or false, found {_shown(norm_preserving)}.",
        )
    return ExtractDefaults(position, (band[0], band[1]) if band else None, norm_preserving)


# ---- checks of the whole --------------------------------------------------------------------


def _same(text: str) -> str:
    """What two questions share when only case, spacing or punctuation tells them apart."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _check_poles(group: ContrastSet) -> None:
    paired = group.combine in ("texts", "answers")
    if len(group.positive) != len(group.negative):
        raise _Fault(
            ("negative",),
            f"{len(group.positive)} positive wordings but {len(group.negative)} negative ones:"
            " wording i of one pole is matched to wording i of the other.",
        )
    for i, (positive, negative) in enumerate(zip(group.positive, group.negative, strict=True)):
        if positive == negative:
            raise _Fault(
                ("pairs", i) if paired else ("negative", i),
                f"pair {i + 1} says the same in both poles: {positive[:40]!r}.",
            )
    if not paired:
        _no_repeats(group.positive, ("positive",))
        _no_repeats(group.negative, ("negative",))


def _check_questions(group: ContrastSet) -> None:
    answers = group.combine == "answers"
    if answers and len(group.questions) != len(group.positive):
        raise _Fault(
            ("pairs",), f"{len(group.questions)} questions for {len(group.positive)} answers."
        )
    _no_repeats(group.questions, ("pairs",) if answers else ("questions",))
    _no_repeats(group.held_out, ("held_out",))
    trained = {_same(question) for question in group.questions}
    for i, question in enumerate(group.held_out):
        if _same(question) in trained:
            raise _Fault(
                ("held_out", i),
                f"{question!r} is also a training question: a held-out one must be new.",
            )


def _no_repeats(texts: tuple[str, ...], path: YamlPath) -> None:
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if first.setdefault(_same(text), i) != i:
            raise _Fault(
                (*path, i), f"{text!r} is given twice: items {first[_same(text)] + 1} and {i + 1}."
            )
