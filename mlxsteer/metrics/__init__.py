"""Numbers about the text of answers: the metrics that contrast sets name, and signs of loops.

Knows nothing of models, tokens or steering: the same text gives the same number whoever wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mlxsteer.contrast import Metric
from mlxsteer.errors import UsageError
from mlxsteer.metrics.answers import (
    emoji,
    exclamations,
    list_items,
    questions,
    regex_rate,
    regex_share,
    sentence_length,
    uppercase_share,
    word_count,
    word_length,
)
from mlxsteer.metrics.languages import language
from mlxsteer.metrics.logodds import WordOdds, log_odds, topic
from mlxsteer.metrics.registers import (
    contractions,
    formality,
    hedging,
    learned_words,
    sentiment,
)
from mlxsteer.metrics.repetition import distinct, longest_repeat, looping
from mlxsteer.metrics.text import sentences, words

__all__ = [
    "PATTERN_METRICS",
    "TEXT_METRICS",
    "WordOdds",
    "contractions",
    "distinct",
    "emoji",
    "exclamations",
    "formality",
    "hedging",
    "language",
    "learned_words",
    "list_items",
    "log_odds",
    "longest_repeat",
    "looping",
    "measure",
    "questions",
    "regex_rate",
    "regex_share",
    "sentence_length",
    "sentences",
    "sentiment",
    "topic",
    "uppercase_share",
    "word_count",
    "word_length",
    "words",
]

TEXT_METRICS: dict[str, Callable[[str], float]] = {
    "words": word_count,
    "uppercase_share": uppercase_share,
    "sentiment": sentiment,
    "contractions": contractions,
    "exclamations": exclamations,
    "questions": questions,
    "sentence_length": sentence_length,
    "word_length": word_length,
    "list_items": list_items,
    "formality": formality,
    "learned_words": learned_words,
    "hedging": hedging,
    "emoji": emoji,
}
PATTERN_METRICS: dict[str, Callable[[str, re.Pattern[str]], float]] = {
    "regex_share": regex_share,
    "regex_rate": regex_rate,
}


def measure(
    metric: Metric, texts: Sequence[str], ended: Sequence[bool] | None = None
) -> list[float]:
    """The metric of each answer, in the unit that the metric's function documents.

    ended: for the metric `ended`, whether each answer stopped by itself; the mean is the share.
    An answer without words is 0.0, except that `sentence_length` and `word_length` are nan:
    they are means over nothing. (Average them with `numpy.nanmean`.)
    Raises ContrastError when a language has no word list, UsageError without `ended`.
    """
    if metric.name == "ended":
        if ended is None:
            raise UsageError("Whether an answer ended is not in its text: give measure `ended`.")
        return [float(by_itself) for by_itself in ended]
    if metric.name == "topic":
        return [topic(text, *metric.examples) for text in texts]
    if metric.name == "language":
        return [language(text, metric.pattern or "") for text in texts]
    if metric.name in PATTERN_METRICS:
        pattern = metric.regex()
        return [PATTERN_METRICS[metric.name](text, pattern) for text in texts]
    return [TEXT_METRICS[metric.name](text) for text in texts]
