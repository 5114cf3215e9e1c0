"""Names from shared words: what is found, and that the test of it can be failed."""

from __future__ import annotations

from mlxsteer.sae import label
from mlxsteer.sae.index import Background, Feature, Index, Snippet
from mlxsteer.sae.wordnames import WordNamer, word_at

PLACES = ("Paris", "London", "Cairo", "Oslo", "Lima", "Quito", "Rome", "Kyiv")


def index_of(snippets: list[Snippet], *stretches: str) -> Index:
    feature = Feature(7, 0.01, 1.0, 0.01, (), tuple(snippets))
    texts = stretches or ("the cat sat", "the dog ran", "the rain fell", "the sun rose")
    return Index({7: feature}, tuple(Background(text, frozenset()) for text in texts), {})


def bridges() -> list[Snippet]:
    return [
        Snippet(f"From {place} to the Golden ", "Gate", " Bridge and back", 1.0, i)
        for i, place in enumerate(PLACES)
    ]


def test_the_name_is_what_snippets_share_and_other_text_lacks() -> None:
    index = index_of(bridges())
    found = label.label(index, [7], WordNamer(index), "words")[7]
    assert found.text.split()[0] == "gate"
    assert "the" not in found.text.split()
    assert (found.accuracy, found.bias, found.by) == (1.0, 0.0, "words")


def test_words_that_held_out_snippets_lack_are_not_detected() -> None:
    snippets = bridges()
    snippets[1::2] = [Snippet("nothing of ", "it", " here", 1.0, i) for i in range(4)]
    index = index_of(snippets)
    assert label.label(index, [7], WordNamer(index), "words")[7].accuracy == 0.5


def test_the_firing_word_is_whole_though_its_token_is_a_part() -> None:
    assert word_at(Snippet("the super", "class", "es of it", 1.0, 0)) == "superclasses"
    assert word_at(Snippet("see", " class", " A", 1.0, 0)) == "class"
    assert word_at(Snippet("end", " );", " then", 1.0, 0)) == ");"
