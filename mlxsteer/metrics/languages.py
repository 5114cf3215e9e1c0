"""In which language a text is, by its function words."""

from __future__ import annotations

from mlxsteer.errors import ContrastError
from mlxsteer.metrics.lexicon import FUNCTION_WORDS
from mlxsteer.metrics.text import folded


def language(text: str, code: str) -> float:
    """How surely the text is in the language `code`, 0..1, by its function words.

    With o words that only this language has and r that only a rival has, o / (o + r), for the
    rival that makes it least: against English alone, Spanish would pass for French. 0.5 when
    all that is found is shared; 0 when no function word is found. A text half in English and
    half in the language is near 0.5. Crude below about ten words.
    Raises ContrastError for a language without a list.
    """
    if code not in FUNCTION_WORDS:
        raise ContrastError(
            f"No word list for language {code!r}. Known: {', '.join(sorted(FUNCTION_WORDS))}."
            " For another, use metric regex_rate with a pattern of its commonest words."
        )
    found = [part for word in folded(text) for part in _elided(word)]
    own = FUNCTION_WORDS[code]
    if not any(part in own for part in found):
        return 0.0
    rivals = (other for name, other in FUNCTION_WORDS.items() if name != code)
    return min(_preference(found, own - rival, rival - own) for rival in rivals)


def _elided(word: str) -> list[str]:
    """l'eau is l' and eau; it's stays whole."""
    if word in FUNCTION_WORDS["en"]:
        return [word]
    return word.replace("'", "' ").split()


def _preference(found: list[str], own: frozenset[str], rival: frozenset[str]) -> float:
    ours = sum(word in own for word in found)
    theirs = sum(word in rival for word in found)
    return ours / (ours + theirs) if ours or theirs else 0.5
