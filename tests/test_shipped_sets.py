"""What ships is matched, balanced and says what it measures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlxsteer.contrast import (
    COMBINES,
    available,
)
from tests.shipped_sets import SHIPPED, shipped

WANTED = {
    *("terse", "careful", "formal", "cheerful", "french", "uppercase", "golden-gate", "technical"),
    *("confident", "creative", "friendly", "poetic", "pirate", "storytelling", "step-by-step"),
    "blunt",
}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))


def test_the_traits_that_the_docs_name_are_there() -> None:
    assert len(SHIPPED) >= 20
    assert set(SHIPPED) >= WANTED
    assert available() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_set_is_large_enough_and_describes_itself(name: str) -> None:
    group = shipped(name)
    assert group.name == name
    assert group.description
    assert group.license == "Apache-2.0"
    assert group.extract.position == COMBINES[group.combine]
    assert len(group.held_out) >= 24
    if group.combine in ("texts", "answers"):
        assert group.max_pairs >= 24
    else:
        assert len(group.questions) >= 20
        assert len(group.positive) >= 5


@pytest.mark.parametrize("name", SHIPPED)
def test_held_out_questions_are_new(name: str) -> None:
    group = shipped(name)
    assert not set(group.held_out) & set(group.questions)


def _mean_words(texts: tuple[str, ...]) -> float:
    return sum(len(text.split()) for text in texts) / len(texts)


@pytest.mark.parametrize("name", SHIPPED)
def test_poles_have_matching_length(name: str) -> None:
    group = shipped(name)
    ratio = _mean_words(group.positive) / _mean_words(group.negative)
    assert 0.7 < ratio < 1.3
    for positive, negative in zip(group.positive, group.negative, strict=True):
        assert 0.5 < len(positive) / len(negative) < 2, (positive, negative)


# What a trait is called in other words, beside the words of its name and label.
CONCEPT = {
    "terse": ["brief", "short", "concise", "few"],
    "careful": ["care", "caution", "check"],
    "technical": ["expert", "special", "engineer"],
    "confident": ["certain", "firm"],
    "cheerful": ["happy", "joy", "glad"],
    "friendly": ["warm", "kind", "friend"],
    "french": ["france", "paris"],
    "golden-gate": ["bridge", "san francisco", "california", "suspension"],
    "poetic": ["poem", "poet", "verse", "metaphor"],
    "pirate": ["ship", "sea", "treasure", "captain"],
    "storytelling": ["story", "tale", "narrat"],
    "step-by-step": ["step", "number", "stage"],
    "blunt": ["frank", "honest", "direct"],
    "bulleted": ["list", "item", "dash"],
    "inquisitive": ["question", "ask", "curious"],
    "enthusiastic": ["excite", "thrill", "!"],
    "childlike": ["child", "simple", "easy"],
    "first-person": ["yourself", "your own", "remember"],
    "space": ["planet", "star ", "rocket", "moon", "orbit", "telescope"],
    "cooking": ["cook", "oven", "stove", "recipe", "sauce", "kitchen"],
    "german": ["germany", "berlin"],
    "formal": ["official", "polite"],
    "creative": ["imagin", "original"],
}


@pytest.mark.parametrize("name", SHIPPED)
def test_negative_pole_does_not_name_the_concept(name: str) -> None:
    group = shipped(name)
    words = re.findall(r"[a-z]{4,}", f"{group.name} {group.positive_label}".lower())
    stems = [word[:6] for word in words] + CONCEPT.get(name, [])
    if name == "uppercase":
        assert not any(text.isupper() for text in group.negative)
    found = {
        (stem, text)
        for stem in stems
        for text in group.negative
        if re.search(rf"(?<!\w){re.escape(stem)}", text.lower())
    }
    assert not found


@pytest.mark.parametrize("name", SHIPPED)
def test_negative_pole_is_not_a_prohibition(name: str) -> None:
    """'Never mention food' teaches food: a negative says what to do instead."""
    group = shipped(name)
    if group.combine in ("texts", "answers"):
        return
    for text in group.negative:
        assert not re.match(r"(never|avoid|don't|without|stop)\b", text.lower()), text


def test_uppercase_is_the_same_answer_in_capitals() -> None:
    group = shipped("uppercase")
    assert all(p == n.upper() for p, n in zip(group.positive, group.negative, strict=True))


@pytest.mark.parametrize(
    ("name", "words"),
    [("french", {"le", "la", "les", "de", "un", "une", "et"}), ("german", {"der", "die", "und"})],
)
def test_translations_are_in_their_language(name: str, words: set[str]) -> None:
    text = " ".join(shipped(name).positive).lower().split()
    assert sum(word in words for word in text) / len(text) > 0.06
    assert "the" not in text


# What each pattern must find, and must not.
EXAMPLES = {
    "golden-gate": ("It looks like the Golden Gate Bridge.", "Cats sleep a lot."),
    "step-by-step": ("1. Boil water.\n2. Add rice.", "Boil water and add rice."),
    "pirate": ("Ahoy, matey!", "Good morning, sir."),
    "first-person": ("I remember my school.", "It is a school."),
    "blunt": ("What a great question!", "That is wrong."),
    "storytelling": ("Once there was a miller.", "A mill grinds grain."),
    "cooking": ("Stir the soup.", "Read the book."),
    "space": ("The planets move.", "The cars move."),
    "careful": ("It depends on the soil.", "Plant it now."),
    "creative": ("Imagine a whispering sea.", "The sea is salty."),
    "friendly": ("I'm glad to help you!", "It is heavy."),
    "poetic": ("Beneath the moon, my heart.", "The cost is ten."),
}


def test_patterns_find_their_trait_and_only_that() -> None:
    patterned = {n for n in SHIPPED if shipped(n).metric.name.startswith("regex")}
    assert patterned == set(EXAMPLES)
    for name, (hit, miss) in EXAMPLES.items():
        pattern = shipped(name).metric.regex()
        assert pattern.search(hit), name
        assert not pattern.search(miss), name
