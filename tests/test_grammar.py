"""Claims about the steering text: it comes back as it went, and errors point at the character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsteer.errors import MlxsteerError, UsageError
from mlxsteer.grammar import POSITIONS, UNITS, Term, format, parse

# Names that people type, and any others: letters of all scripts, paths, commas, colons, numbers.
WORDS = st.from_regex(r"[A-Za-z0-9_./:@, \-+]{1,20}", fullmatch=True)
ANYTHING = st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]), min_size=1)
NAMES = (WORDS | ANYTHING).filter(lambda name: name == name.strip() and name.strip())
TERMS = st.builds(
    Term,
    name=NAMES,
    amount=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-20, 20).map(float),
    unit=st.sampled_from(UNITS),
    positions=st.none() | st.sampled_from(POSITIONS),
)


@given(st.lists(TERMS, max_size=4))
def test_parse_inverts_format(terms: list[Term]) -> None:
    assert parse(format(terms)) == terms


@given(st.text(max_size=40))
def test_any_text_parses_or_gives_a_usage_error(text: str) -> None:
    try:
        terms = parse(text)
    except UsageError:
        return
    assert parse(format(terms)) == terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("terse", [Term("terse")]),
        ("terse:3", [Term("terse", 3)]),
        (" terse : -1.5 ", [Term("terse", -1.5)]),
        ("terse:+.5e1", [Term("terse", 5)]),
        ("terse:0.2d", [Term("terse", 0.2, "d")]),
        ("terse:0.5r@all", [Term("terse", 0.5, "r", "all")]),
        ("terse@think", [Term("terse", 1, "", "think")]),
        ("terse:3, formal:-1@think", [Term("terse", 3), Term("formal", -1, "", "think")]),
        ("owner/repo:terse", [Term("owner/repo:terse")]),
        ("owner/repo:terse:3", [Term("owner/repo:terse", 3)]),
        ("./vectors/mix.safetensors:2", [Term("./vectors/mix.safetensors", 2)]),
        ("golden-gate:5", [Term("golden-gate", 5)]),
        ('"a, b: c@d":2', [Term("a, b: c@d", 2)]),
        ("", []),
        ("  ", []),
    ],
)
def test_the_words_of_the_grammar(text: str, terms: list[Term]) -> None:
    assert parse(text) == terms


@pytest.mark.parametrize(
    ("text", "marked", "says"),
    [
        ("terse:three", "three", "'three' is not a strength"),
        ("terse:  three", "three", "'three' is not a strength"),
        ("terse:3@ anser", "anser", "unknown positions 'anser'"),
        ("terse:3x", "3x", "is not a strength"),
        ("terse:", "", "is not a strength"),
        ("terse:inf", "inf", "is not a strength"),
        ("terse:1e999", "1e999", "is not a strength"),
        ("ok:1, terse:three", "three", "'three' is not a strength"),
        ("terse:3@anser", "anser", "unknown positions 'anser'. Did you mean 'answer'?"),
        ("terse:3,,formal", ",formal", "a term is missing"),
        ("terse:3,", "", "a term is missing"),
        (":3", ":3", "the name is missing"),
        ('ok, "terse:3', '"terse:3', "never closed"),
        ('"terse"3', "3", "after a quoted name comes : or @"),
        ('"":3', '"":3', "the name is empty"),
    ],
)
def test_an_error_points_at_the_character(text: str, marked: str, says: str) -> None:
    """`marked` is the rest of the text from the offending character on."""
    with pytest.raises(UsageError) as caught:
        parse(text)
    message = str(caught.value)
    assert says in message
    position = text.rindex(marked) if marked else len(text)
    assert f"character {position + 1}:" in message
    assert f"{text[:position]}⟨here⟩{text[position:]}" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["", " ", 'a"b', " a"])
def test_a_term_refuses_a_name_that_no_text_can_hold(name: str) -> None:
    with pytest.raises(UsageError):
        Term(name)


def test_a_wrong_term_is_an_error_of_the_user() -> None:
    for make in (
        lambda: Term("a", float("nan")),
        lambda: Term("a", 1, "x"),
        lambda: Term("a", 1, "", "later"),
    ):
        with pytest.raises(MlxsteerError):
            make()
