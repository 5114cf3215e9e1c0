"""Claims about the steering text: it comes back as it went, and errors point at the character."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsteer.errors import MlxsteerError, UsageError
from mlxsteer.grammar import POSITIONS, UNITS, Term, When, format, parse

# Names that people type, and any others: letters of all scripts, paths, commas, colons, numbers.
WORDS = st.from_regex(r"[A-Za-z0-9_./:@, \-+]{1,20}", fullmatch=True)
ANYTHING = st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]), min_size=1)
NAMES = (WORDS | ANYTHING).filter(lambda name: name == name.strip() and name.strip())
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-20, 20).map(float)
COUNTS = st.none() | st.integers(1, 10**9 - 1)
WHENS = st.builds(
    When,
    name=NAMES | st.sampled_from(["a>b", "f(x)", "owner/repo:terse", "a@3", "3>4", "x:y"]),
    sign=st.sampled_from("<>"),
    value=NUMBERS,
    layer=st.none() | st.integers(0, 100),
)
PLAIN_TERMS: dict[str, st.SearchStrategy] = {
    "name": NAMES,
    "amount": NUMBERS,
    "unit": st.sampled_from(UNITS),
}
TERMS = st.builds(
    Term, **PLAIN_TERMS, positions=st.none() | st.sampled_from(POSITIONS)
) | st.builds(
    lambda bounds, **fields: Term(**fields, after=bounds[0], first=bounds[1]),
    **PLAIN_TERMS,
    positions=st.none() | st.sampled_from(["answer", "think", "generated"]),
    when=st.none() | WHENS,
    bounds=st.tuples(COUNTS, COUNTS).filter(lambda b: None in b or b[0] < b[1]),
    decay=COUNTS,
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
        ("terse:3@first(40)", [Term("terse", 3, first=40)]),
        ("terse @ after( 10 ) @decay (100)", [Term("terse", after=10, decay=100)]),
        ("terse:3@first(40)@think", [Term("terse", 3, positions="think", first=40)]),
        ("terse:3@when(code>0.5)", [Term("terse", 3, when=When("code", ">", 0.5))]),
        ("terse@when( code @ 12 < -1 )", [Term("terse", when=When("code", "<", -1, 12))]),
        ('a@when("x, y@(>">.5), b', [Term("a", when=When("x, y@(>", ">", 0.5)), Term("b")]),
        (
            "a@when(owner/repo:b>1)@first(2)",
            [Term("a", when=When("owner/repo:b", ">", 1), first=2)],
        ),
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
        ("a@frist(40)", "frist(40)", "unknown condition 'frist(40)'. Did you mean 'first'?"),
        ("a@decy", "decy", "unknown positions 'decy'. Did you mean 'decay'?"),
        ("a@first", "", "first needs a parenthesis, as in first(40)"),
        ("a@first(", "(", "this parenthesis is never closed"),
        ("a@first(4,5)", "(4,5)", "this parenthesis is never closed"),
        ("a@first( 0)", "0)", "'0' is not a number of tokens"),
        ("a@after(1.5)", "1.5)", "'1.5' is not a number of tokens"),
        ("a@decay()", ")", "'' is not a number of tokens"),
        ("a@first(4)x", "first(4)x", "unknown condition 'first(4)x'"),
        ("a@first(4)@first(5)", "first(5)", "first is given twice"),
        ("a@think@ answer", "answer", "positions are given twice"),
        ("a@all@first(4)", "all@first(4)", "first goes by generated tokens, and 'all' includes"),
        ("a@when(b>1)@prompt", "prompt", "when goes by generated tokens, and 'prompt' includes"),
        ("a@after(9)@first(9)", "first(9)", "first(9) ends before after(9) begins"),
        ("b, a@when()", ")", "the name of what is read is missing"),
        ("a@when(>1)", ">1)", "the name of what is read is missing"),
        ("a@when(b)", ")", "a comparison is missing here"),
        ("a@when(b@3)", ")", "a comparison is missing here"),
        ("a@when(b=1)", ")", "a comparison is missing here"),
        ("a@when(b>)", ")", "'' is not a number to compare with"),
        ("a@when(b>=1)", "=1)", "'=1' is not a number to compare with"),
        ("a@when(b> high)", "high)", "'high' is not a number to compare with"),
        ("a@when(b@mid>1)", "mid>1)", "'mid' is not a layer"),
        ("a@when(b:3>1)", ":3>1)", "a reading has no strength"),
        ("a@when((b)>1)", "(b)>1)", "this is not a condition"),
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


def test_suffixes_are_printed_in_one_order() -> None:
    text = "a@decay(4)@first(3)@after(2)@when(b@1>0)@think"
    assert format(parse(text)) == "a:1@think@when(b@1>0)@first(3)@after(2)@decay(4)"


@pytest.mark.parametrize("name", ["", " ", 'a"b', " a"])
def test_a_term_refuses_a_name_that_no_text_can_hold(name: str) -> None:
    with pytest.raises(UsageError):
        Term(name)


def test_a_wrong_term_is_an_error_of_the_user() -> None:
    for make in (
        lambda: Term("a", float("nan")),
        lambda: Term("a", 1, "x"),
        lambda: Term("a", 1, "", "later"),
        lambda: Term("a", first=0),
        lambda: Term("a", positions="all", decay=3),
        lambda: When("a", "=", 1),
        lambda: When("a", ">", float("inf")),
        lambda: When(" ", ">", 1),
        lambda: When("a", ">", 1, layer=-1),
    ):
        with pytest.raises(MlxsteerError):
            make()


def page() -> list[tuple[str, bool]]:
    """(steering text, whether the page says that it works) of each table in docs/grammar.md."""
    text = (Path(__file__).parent.parent / "docs" / "grammar.md").read_text(encoding="utf-8")
    works, _, fails = text.partition("## What does not go together")
    found = []
    for part, good in ((works, True), (fails, False)):
        for row in re.findall(r"^\| (`.*?`) \| ", part, re.MULTILINE):
            found += [(example, good) for example in re.findall("`(.+?)`", row)]
    return found


@pytest.mark.parametrize(("text", "works"), page())
def test_the_page_of_the_grammar_is_true(text: str, works: bool) -> None:
    if works:
        assert parse(format(parse(text))) == parse(text)
    elif not text.startswith("mine"):  # that one depends on the vector
        with pytest.raises(UsageError, match="⟨here⟩"):
            parse(text)
