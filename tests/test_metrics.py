"""Metrics of answers: every number here was counted by hand."""

from __future__ import annotations

import math
import re

import pytest

from mlxsteer.contrast import METRICS, ContrastSet, Metric
from mlxsteer.errors import ContrastError, UsageError
from mlxsteer.metrics import (
    PATTERN_METRICS,
    TEXT_METRICS,
    contractions,
    distinct,
    exclamations,
    formality,
    hedging,
    language,
    list_items,
    longest_repeat,
    looping,
    measure,
    questions,
    sentence_length,
    sentences,
    sentiment,
    uppercase_share,
    word_length,
    words,
)
from mlxsteer.metrics.lexicon import (
    FIRST_AND_SECOND_PERSON,
    FORMAL,
    FUNCTION_WORDS,
    INFORMAL,
    LEARNED_ENDINGS,
    NEGATIVE,
    POSITIVE,
)
from mlxsteer.metrics.text import emojis

PATTERNS = {"language": "fr", "regex_share": r"\bbridge", "regex_rate": r"\bbridge"}
SPANISH = "El perro de la casa está en el jardín con los niños, pero no quiere jugar."
FRENCH = "Le chien est dans le jardin avec les enfants, mais il ne veut pas jouer."
ENGLISH = "The dog is in the garden with the children, but it does not want to play."


BOTH_POLES = (("the sea is wide", "a wave of the sea"), ("the road is wide", "a bend of the road"))


def value(name: str, text: str) -> float:
    """The metric of one answer, by the way that callers take."""
    examples = BOTH_POLES if name == "topic" else ((), ())
    metric = Metric(name, pattern=PATTERNS.get(name), examples=examples)
    [number] = measure(metric, [text], ended=[False])
    return number


# ---- the table ------------------------------------------------------------------------------


def test_every_metric_of_contrast_sets_has_one_function() -> None:
    others = ["ended", "language", "topic"]
    assert sorted([*TEXT_METRICS, *PATTERN_METRICS, *others]) == sorted(METRICS)


def test_metrics_with_a_pattern_are_those_that_contrast_sets_give_one() -> None:
    assert {*PATTERN_METRICS, "language"} == {name for name, wants in METRICS.items() if wants}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("text", ["", " \n", "...", "!?", "- \n- "])
def test_answer_without_words_is_zero_or_nan_where_documented(name: str, text: str) -> None:
    number = value(name, text)
    assert math.isnan(number) if name in ("sentence_length", "word_length") else number == 0


def test_one_number_per_answer_in_order() -> None:
    assert measure(Metric("words"), ["one two", "", "three"]) == [2.0, 0.0, 1.0]
    assert measure(Metric("words"), []) == []


def test_natural_ends_are_told_to_measure_and_not_guessed() -> None:
    assert measure(Metric("ended"), ["Done.", "Not"], ended=[True, False]) == [1.0, 0.0]
    with pytest.raises(UsageError, match="not in its text"):
        measure(Metric("ended"), ["Done."])


# Each metric on two texts whose order is beyond doubt: more of it, then less.
ORDER = {
    "words": ("The sky looks blue because air scatters light.", "Air scatters light."),
    "uppercase_share": ("STOP right THERE.", "Stop right there."),
    "language": ("Il pleut sur la ville et dans les rues.", "It rains in the town."),
    "regex_share": ("We crossed the bridge.", "We crossed the road."),
    "regex_rate": ("A bridge, a bridge!", "A bridge over the wide, wide river."),
    "sentiment": ("What a lovely, happy day.", "What a sad, miserable day."),
    "contractions": ("I don't know, it's odd.", "I do not know, it is odd."),
    "exclamations": ("Come in! Sit down!", "Come in. Sit down!"),
    "questions": ("Why? Who says so?", "Because. They say so."),
    "sentence_length": ("One two three four five six.", "One two. Three four. Five six."),
    "word_length": ("Extraordinary considerations.", "A big cat sat."),
    "list_items": ("- salt\n- oil\n- rice", "salt, oil and rice"),
    "formality": (
        "Applicants are required to submit the documentation prior to registration.",
        "Hey guys, you gotta bring your stuff before we get going, okay?",
    ),
    "learned_words": (
        "The evaporation of humidity requires considerable energy.",
        "Wet air dries.",
    ),
    "hedging": ("It might rain, perhaps; I think it depends on the wind.", "It will rain at noon."),
    "emoji": ("Well done 🎉🎉 see you 😊", "Well done, see you."),
    "topic": ("The sea rises, a wave.", "The road rises, a bend."),
}


@pytest.mark.parametrize("name", ORDER)
def test_more_of_it_is_more(name: str) -> None:
    more, less = ORDER[name]
    assert value(name, more) > value(name, less)


def test_every_metric_of_texts_has_such_a_pair() -> None:
    assert {*ORDER, "ended"} == set(METRICS)


# ---- words and sentences --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop, it’s 'fine'.", ["Don't", "stop", "it's", "fine"]),
        ("a well-known dogs' home", ["a", "well", "known", "dogs", "home"]),
        ("1,000.5 of 3.", ["1,000.5", "of", "3"]),
        ("Un été à l'eau", ["Un", "été", "à", "l'eau"]),
        ("cafe\u0301 ole", ["café", "ole"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("我爱 MLX", ["我", "爱", "MLX"]),
        ("**bold** snake_case", ["bold", "snake", "case"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs 3.14 dollars. Fine.", 2),
        ("Dr. Smith, e.g. here, left.", 1),
        ('He said "Wow!" Then he left', 2),
        ("A heading\n\n1. Boil water.\n2. Add salt.", 3),
        ("Great! 😊 Thanks!", 2),
        ("你好。再见。", 2),
    ],
)
def test_sentences(text: str, number: int) -> None:
    assert len(sentences(text)) == number


def test_sentence_length_is_words_per_sentence() -> None:
    assert sentence_length("One two three. Four!") == 2.0


def test_word_length_counts_letters_and_no_apostrophes() -> None:
    assert word_length("I don't") == (1 + 4) / 2


# ---- counts and shares ----------------------------------------------------------------------


def test_uppercase_share_leaves_out_what_has_no_case() -> None:
    assert uppercase_share("ABc d 12 你!") == 0.5


def test_regex_share_is_one_or_zero_per_answer() -> None:
    assert value("regex_share", "A Bridge, a bridge.") == 1.0
    assert value("regex_share", "A cambridge.") == 0.0


def test_regex_rate_is_matches_per_hundred_words() -> None:
    assert value("regex_rate", "A Bridge is a bridge") == 40.0


def test_regex_rate_counts_no_empty_matches() -> None:
    assert PATTERN_METRICS["regex_rate"]("aa b", re.compile("a*")) == 50.0


def test_contractions_are_per_hundred_words_and_a_possessive_is_none() -> None:
    assert contractions("It’s the dog's bone, and we don't mind at all.") == 20.0
    assert contractions("It is the bone of the dog.") == 0.0


def test_exclamations_are_a_share_of_sentences() -> None:
    assert exclamations("Wow!!! Yes. He said “go!” Then what?!") == 3 / 4
    assert exclamations('He said "wow!", and left.') == 0.0


def test_questions_are_a_share_of_sentences() -> None:
    assert questions("Why? I know. Do you? (Or not?)") == 3 / 4


def test_list_items_are_lines_with_a_mark() -> None:
    text = "Items:\n- one\n  * two\n3. three\n**4.** four\nb) five\n• six"
    assert list_items(text) == 6.0


@pytest.mark.parametrize(
    "text", ["---", "* * *", "1914. A war began.", "Well - no.", "-5 degrees", "**Bold** text"]
)
def test_rules_years_and_dashes_are_no_list_items(text: str) -> None:
    assert list_items(text) == 0.0


# ---- language -------------------------------------------------------------------------------


def test_language_of_plain_sentences_is_certain() -> None:
    assert language(FRENCH, "fr") == 1.0
    assert language(ENGLISH, "fr") == 0.0
    assert language(ENGLISH, "en") == 1.0


def test_spanish_does_not_pass_for_its_neighbours() -> None:
    assert language(SPANISH, "es") > 0.8
    assert max(language(SPANISH, code) for code in ("fr", "it", "pt", "en", "de")) < 0.5


def test_half_a_text_is_half_a_language() -> None:
    # avec, sous and dans against with, the and this; every other word is on no list.
    assert language("avec chien sous chat dans, with dog the cat this", "fr") == 0.5


def test_words_that_languages_share_decide_nothing() -> None:
    assert "so" in FUNCTION_WORDS["de"] & FUNCTION_WORDS["en"]
    assert language("So so", "de") == 0.5


def test_elisions_are_french_and_english_contractions_are_not() -> None:
    assert language("L’amour d'hier", "fr") == 0.5  # Italian elides l' and d' too
    assert language("Qu'aimer j'aimais", "fr") == 1.0
    assert language("It's what I don't know", "fr") == 0.0


def test_language_without_a_list_says_which_there_are() -> None:
    with pytest.raises(ContrastError, match=r"'nl'.*de, en, es, fr, it, pt.*regex_rate"):
        measure(Metric("language", pattern="nl"), ["Hallo"])


@pytest.mark.parametrize("name", ["french", "german"])
def test_shipped_answers_are_told_from_english(name: str) -> None:
    group = ContrastSet.load(name)
    told = measure(group.metric, group.positive)
    assert sum(told) / len(told) > 0.9
    assert max(measure(group.metric, group.negative)) == 0.0


@pytest.mark.parametrize("code", FUNCTION_WORDS)
def test_word_lists_are_words_as_they_are_looked_up(code: str) -> None:
    assert len(FUNCTION_WORDS[code]) >= 60
    for word in FUNCTION_WORDS[code]:
        assert words(word.removesuffix("'").casefold()) == [word.removesuffix("'")]


# ---- sentiment ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The table is brown.", 0.0),
        ("A wonderful day.", 1 / 2),
        ("A terrible day.", -1 / 2),
        ("Wonderful, great, and sad.", 1 / 4),
        ("It was not a very good day.", -1 / 2),
        ("It isn't bad.", 1 / 2),
        ("No, it is good.", 1 / 2),
        ("Not one of the people there was happy.", 1 / 2),  # crude: out of the negation's reach
    ],
)
def test_sentiment(text: str, expected: float) -> None:
    assert sentiment(text) == expected


def test_no_word_is_both_cheerful_and_gloomy() -> None:
    assert not POSITIVE & NEGATIVE
    assert min(len(POSITIVE), len(NEGATIVE)) >= 150


@pytest.mark.parametrize(
    "text",
    [
        "I adore this little cafe.",
        "She was overjoyed to see her brother again.",
        "The show was hilarious.",
        "Congratulations, you did very well!",
    ],
)
def test_sentiment_of_plain_praise_is_above_that_of_plain_blame(text: str) -> None:
    assert sentiment(text) > 0 > sentiment("We are ashamed of what happened.")


# ---- register -------------------------------------------------------------------------------


def test_hedges_are_counted_per_hundred_words_and_a_phrase_once() -> None:
    assert hedging("Perhaps it depends on the soil, I think so") == pytest.approx(100 * 3 / 9)
    assert hedging("It depends. The mightiest seemly maybes") == pytest.approx(100 / 6)


def test_formality_is_formal_less_informal_words_per_hundred() -> None:
    assert formality("Yeah, the registration is therefore free") == pytest.approx(100 / 6)
    assert formality("You don't say") == pytest.approx(-100 * 2 / 3)
    assert formality("A nation of cats") == 0  # nation is short, and no learned word


def test_no_word_is_both_formal_and_informal() -> None:
    assert not FORMAL & (INFORMAL | FIRST_AND_SECOND_PERSON)
    assert not any(word.endswith(LEARNED_ENDINGS) and len(word) >= 8 for word in INFORMAL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("😀 😀", 2),
        ("👍🏽", 1),  # with a skin tone
        ("👩‍👩‍👧", 1),  # three people joined
        ("🇫🇷🇩🇪", 2),
        ("1️⃣ and ❤️ and ☕", 3),
        ("© 2020 – 100 % → yes ✓ “quoted” 3 * 4 #5", 0),
    ],
)
def test_emoji_are_counted_as_they_are_seen(text: str, expected: int) -> None:
    assert len(emojis(text)) == expected


def test_emoji_share_counts_an_emoji_as_a_word() -> None:
    assert value("emoji", "Nice work 🎉 🎉") == 50.0


# ---- repetition -----------------------------------------------------------------------------


def test_distinct_is_the_mean_over_answers() -> None:
    # a-b b-a a-b: 2 of 3 differ. The second answer: 2 of 2.
    assert distinct(["a b A b", "one two three"]) == pytest.approx((2 / 3 + 1) / 2)
    assert distinct(["a a a a"], n=1) == 1 / 4


def test_distinct_of_an_answer_shorter_than_n_is_one() -> None:
    assert distinct(["", "word"]) == 1.0


def test_distinct_of_no_answers_is_nan_and_of_no_words_an_error() -> None:
    assert math.isnan(distinct([]))
    with pytest.raises(UsageError, match="n is 0"):
        distinct(["a"], n=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("all words differ", 0),
        ("the cat saw the dog", 1),
        ("I like it. Yes, i LIKE it!", 3),
        ("a b c x a b c y b c", 3),
        ("go go go go go", 2),  # the second run begins after the first has ended
        ("a b a b a b a b", 4),
    ],
)
def test_longest_repeat(text: str, expected: int) -> None:
    assert longest_repeat(text) == expected


def test_twelve_words_that_follow_themselves_are_a_loop() -> None:
    assert looping("the " * 12)
    assert not looping("the " * 11)
    assert looping("Well, I go to the shop now. I go to the shop now. Then")
    assert looping("a b c d e " * 2 + "a b")


def test_emphasis_refrains_and_short_answers_are_no_loop() -> None:
    assert not looping("")
    assert not looping("very very very good")
    assert not looping("It is what it is. It is what it is.")
    refrain = "row your boat down the stream today "
    assert not looping(refrain + "and sing along " + refrain + "and sing aloud")
