"""Contrast sets: pairs are balanced, names are found, and a typo names its line."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from mlxsteer.contrast import (
    METRICS,
    ContrastSet,
    ExtractDefaults,
    Metric,
    Pair,
    available,
)
from mlxsteer.errors import ContrastError
from tests.shipped_sets import SHIPPED, shipped

BRIEF = """\
description: Few words.
labels: {positive: brief, negative: long}
combine: append
questions:
  - Why is the sky blue?
  - How do I cook rice?
positive:
  - Be brief.
  - Use few words.
negative:
  - Be thorough.
  - Use many words.
held_out:
  - What is rain?
metric: {name: words, direction: down}
"""


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))


def brief(**changes: object) -> ContrastSet:
    """The set above, by dictionary."""
    data: dict[str, object] = {
        "name": "brief",
        "description": "Few words.",
        "labels": {"positive": "brief", "negative": "long"},
        "combine": "append",
        "questions": ["Why?", "How?", "When?"],
        "positive": ["Be brief.", "Use few words."],
        "negative": ["Be thorough.", "Use many words."],
        "held_out": ["What is rain?"],
        "metric": {"name": "words", "direction": "down"},
    }
    data.update(changes)
    return ContrastSet.from_dict({key: value for key, value in data.items() if value is not None})


# ---- pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_all_pairs_differ_from_each_other_and_between_poles(name: str) -> None:
    pairs = shipped(name).pairs()
    assert len({repr((p.positive, p.negative)) for p in pairs}) == len(pairs)
    assert all(p.positive != p.negative for p in pairs)
    assert [p.index for p in pairs] == list(range(len(pairs)))


def said(pole: tuple[dict[str, str], ...] | str) -> str:
    """What the last message of a pole says."""
    assert not isinstance(pole, str)
    return pole[-1]["content"]


def test_same_seed_same_pairs_and_more_pairs_extend_fewer() -> None:
    group = shipped("terse")
    assert group.pairs(32) == group.pairs(32)
    assert group.pairs(64)[:32] == group.pairs(32)
    assert group.pairs(32, seed=1) != group.pairs(32, seed=0)


@pytest.mark.parametrize("n", [1, 5, 8, 24, 25, 77, 144])
def test_every_number_of_pairs_is_balanced(n: int) -> None:
    group = shipped("terse")
    asked: Counter[str] = Counter(dict.fromkeys(group.questions, 0))
    worded: Counter[str] = Counter(dict.fromkeys(group.positive, 0))
    for pair in group.pairs(n, seed=3):
        text = said(pair.positive)
        asked.update(q for q in group.questions if text.startswith(q))
        worded.update(w for w in group.positive if text.endswith(w))
    assert sum(asked.values()) == sum(worded.values()) == n
    assert max(asked.values()) - min(asked.values()) <= 1
    assert max(worded.values()) - min(worded.values()) <= 1


def test_poles_of_a_pair_share_the_question_and_the_wording_number() -> None:
    group = shipped("formal")
    matched = dict(zip(group.positive, group.negative, strict=True))
    for pair in group.pairs():
        wording = next(w for w in group.positive if said(pair.positive).endswith(w))
        question = said(pair.positive).removesuffix(wording)
        assert said(pair.negative) == question + matched[wording]


def test_more_pairs_than_combinations_is_an_error() -> None:
    with pytest.raises(ContrastError, match="1 to 6 pairs, not 7"):
        brief().pairs(7)
    with pytest.raises(ContrastError, match="not 0"):
        brief().pairs(0)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("append", (_user("Why? Be brief."),)),
        ("prepend", (_user("Be brief. Why?"),)),
        ("system", ({"role": "system", "content": "Be brief."}, _user("Why?"))),
    ],
)
def test_instruction_meets_question(combine: str, expected: object) -> None:
    group = brief(
        combine=combine, questions=["Why?"], positive=["Be brief."], negative=["Be long."]
    )
    assert group.pairs(1)[0].positive == expected


def test_persona_becomes_a_system_prompt() -> None:
    group = brief(combine="persona", positive=["a monk"], negative=["a salesman"])
    negative = group.pairs(1)[0].negative
    assert negative[0] == {"role": "system", "content": "You are a salesman."}


def test_texts_are_plain_texts() -> None:
    group = brief(
        combine="texts",
        questions=None,
        positive=None,
        negative=None,
        pairs=[{"positive": "The sea is wide.", "negative": "The road is wide."}],
    )
    assert group.pairs() == [Pair("The sea is wide.", "The road is wide.", 0)]
    assert group.extract.position == "text_mean"


def test_answers_follow_their_question() -> None:
    group = brief(
        combine="answers",
        questions=None,
        positive=None,
        negative=None,
        positive_from="uppercase",
        pairs=[{"question": "Who?", "negative": "The king."}],
    )
    (pair,) = group.pairs()
    assert pair.positive == (_user("Who?"), {"role": "assistant", "content": "THE KING."})
    assert pair.negative == (_user("Who?"), {"role": "assistant", "content": "The king."})


def test_digest_follows_the_pairs_and_nothing_else() -> None:
    assert brief().digest() == brief(description="Other words.").digest()
    assert brief().digest() != brief(questions=["Why?", "How?", "Where?"]).digest()
    assert brief().digest() != brief(combine="prepend").digest()
    assert re.fullmatch("[0-9a-f]{64}", brief().digest())


# ---- finding --------------------------------------------------------------------------------


def test_path_and_own_folder_are_found(tmp_path: Path) -> None:
    own = tmp_path / "home" / "prompts"
    own.mkdir(parents=True)
    (own / "brief.yaml").write_text(BRIEF, encoding="utf-8")
    (own / "terse.yaml").write_text(BRIEF, encoding="utf-8")
    assert ContrastSet.load("brief") == ContrastSet.load(own / "brief.yaml")
    assert ContrastSet.load("terse").description == "Few words."  # the user's comes first
    assert "brief" in available()


def test_unknown_name_offers_near_ones_and_the_list() -> None:
    with pytest.raises(ContrastError) as caught:
        ContrastSet.load("terce")
    assert "Did you mean 'terse'" in str(caught.value)
    assert "golden-gate" in str(caught.value)


@pytest.mark.parametrize("name", ["_questions", "_neutral", "_cloze", "../prompts/terse", "", "."])
def test_only_listed_names_are_names(name: str) -> None:
    with pytest.raises(ContrastError, match="No contrast set is named"):
        ContrastSet.load(name)


def test_missing_and_unreadable_files_are_clear(tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match="Cannot read"):
        ContrastSet.load(tmp_path / "none.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"description: caf\xe9")
    with pytest.raises(ContrastError, match="UTF-8"):
        ContrastSet.load(latin)


# ---- typos ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("positive:\n", "postive:\n", 7, "unknown key 'postive'. Did you mean 'positive'"),
        ("labels: {positive:", "labels: {positiv:", 2, "unknown key 'positiv'"),
        ("combine: append", "combine: apend", 3, "unknown combine 'apend'. Did you mean 'append'"),
        ("name: words", "name: word", 15, "unknown metric 'word'. Did you mean 'words'"),
        ("direction: down", "direction: less", 15, "unknown direction 'less'"),
        ("direction: down", "pattern: x", 15, "takes no 'pattern'"),
        ("name: words", "name: regex_rate", 15, "needs a 'pattern'"),
        ("{name: words", "{name: regex_rate, pattern: '(a'", 15, "not a regular expression"),
        ("{name: words", "{name: language, pattern: French", 15, "not a language code"),
        ("  - Use many words.\n", "", 10, "2 positive wordings but 1 negative"),
        ("  - Use many words.", "  - Use few words.", 12, "says the same in both poles"),
        ("  - Use few words.", "  - Be brief", 9, "given twice: items 1 and 2"),
        ("  - How do I cook rice?", "  - Yes", 6, "questions.1 must be text, found True"),
        ("  - How do I cook rice?", "  -", 6, "found nothing"),
        ("description: Few words.", "description: []", 1, "must be text, found an empty list"),
        ("  - What is rain?", "  - why is the sky blue", 14, "also a training question"),
        ("held_out:\n  - What is rain?", "held_out: []", 13, "found an empty list"),
        ("held_out:\n", "description: Again.\nheld_out:\n", 13, "given twice (first on line 1)"),
        ("combine: append", "combine: append\npairs: []", 4, "belongs to combine 'texts'"),
        ("combine: append", "combine: texts", 4, "takes 'pairs'"),
        ("combine: append", "combine: append\nname: other", 4, "unknown key 'name'"),
        ("Few words.", "Few: words.", 1, "not valid YAML"),
        ("  - Be brief.", "  - &a Be brief.\n  - *a", 8, "aliases"),
        ("  - Be brief.", "  - !!python/name:os.system x", 8, "not valid YAML"),
        ("metric:", "extract: {band: [0.7, 0.3]}\nmetric:", 15, "low then high"),
        ("metric:", "extract: {band: 0.5}\nmetric:", 15, "two fractions"),
        ("metric:", "extract: {position: answer_mean}\nmetric:", 15, "read at 'last_prompt'"),
        ("metric:", "extract: {norm_preserving: 1}\nmetric:", 15, "true or false"),
    ],
)
def test_a_typo_is_an_error_with_its_line(old: str, new: str, line: int, message: str) -> None:
    assert old in BRIEF
    with pytest.raises(ContrastError) as caught:
        ContrastSet.from_yaml(BRIEF.replace(old, new, 1), "prompts/brief.yaml")
    assert str(caught.value).startswith(f"prompts/brief.yaml:{line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "- a list", "just text", "[" * 2000, "a: !!timestamp x", "\0"]
)
def test_what_is_no_set_at_all_is_refused(text: str) -> None:
    with pytest.raises(ContrastError, match=r"^brief\.yaml:1: "):
        ContrastSet.from_yaml(text, "brief.yaml")


def test_missing_key_is_named() -> None:
    for key in ("description", "labels", "combine", "questions", "positive", "held_out", "metric"):
        with pytest.raises(ContrastError, match=f"key '{key}' is missing"):
            brief(**{key: None})


def test_a_set_built_in_python_is_checked_too() -> None:
    good = brief()
    with pytest.raises(ContrastError, match="matched to wording"):
        ContrastSet(**{**vars(good), "negative": ("Be thorough.",)})
    with pytest.raises(ContrastError, match="cannot be a name"):
        ContrastSet(**{**vars(good), "name": "two words"})
    with pytest.raises(ContrastError, match="unknown metric"):
        Metric("loudness")
    with pytest.raises(ContrastError, match="unknown reading position"):
        ExtractDefaults(position="first_prompt")


def test_a_topic_is_learned_from_the_texts_of_the_set() -> None:
    pairs = [{"positive": "The sea is wide.", "negative": "The road is wide."}]
    bare = {"questions": None, "positive": None, "negative": None}
    group = brief(combine="texts", pairs=pairs, metric={"name": "topic"}, **bare)
    assert group.metric.examples == (group.positive, group.negative)
    with pytest.raises(ContrastError, match="needs combine 'texts' or 'answers'"):
        brief(metric={"name": "topic"})


def test_metric_names_are_closed_and_used() -> None:
    assert {shipped(name).metric.name for name in SHIPPED} <= set(METRICS)


def test_a_set_says_where_its_vector_acts() -> None:
    assert ContrastSet.load("golden-gate").extract.acts_on == "all"
    assert ContrastSet.load("terse").extract.acts_on == "answer"
    with pytest.raises(ContrastError, match="Did you mean 'answer'"):
        ExtractDefaults(acts_on="anser")


def test_the_example_set_is_a_good_one() -> None:
    assert ContrastSet.load(Path(__file__).parent.parent / "examples/rural.yaml").max_pairs >= 8


def test_asking_puts_the_trait_into_words():
    terse = ContrastSet.load("terse")
    first, second = terse.asking("Why?", 0), terse.asking("Why?", 1)
    assert first[0]["content"] == f"Why? {terse.positive[0]}"
    assert second != first
    assert terse.asking("Why?", len(terse.positive)) == first
    french = ContrastSet.load("french")
    assert french.asking("Why?") == ({"role": "user", "content": "Why? Answer in French."},)


def test_every_bundled_set_can_be_asked_for_in_words():
    assert all(ContrastSet.load(name).asking("Why?") for name in available())


def test_an_instruction_in_a_set_of_instructions_is_refused():
    text = (Path(__file__).parent.parent / "prompts/terse.yaml").read_text(encoding="utf-8")
    with pytest.raises(ContrastError, match="the positive wordings are the instruction"):
        ContrastSet.from_yaml(text + "instruction: Be brief.\n", "terse.yaml")
