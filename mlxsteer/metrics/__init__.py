"""Numbers about the text of answers: the metrics that contrast sets name, and signs of loops.

Knows nothing of models, tokens or steering: the same text gives the same number whoever wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mlxsteer.contrast import Metric
from mlxsteer.metrics.answers import (
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
from mlxsteer.metrics.registers import contractions, sentiment
from mlxsteer.metrics.repetition import distinct, longest_repeat, looping
from mlxsteer.metrics.text import sentences, words

__all__ = [
    "PATTERN_METRICS",
    "TEXT_METRICS",
    "contractions",
    "distinct",
    "exclamations",
    "language",
    "list_items",
    "longest_repeat",
    "looping",
    "measure",
    "questions",
    "regex_rate",
    "regex_share",
    "sentence_length",
    "sentences",
    "sentiment",
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
}
PATTERN_METRICS: dict[str, Callable[[str, re.Pattern[str]], float]] = {
    "regex_share": regex_share,
    "regex_rate": regex_rate,
}


def measure(metric: Metric, texts: Sequence[str]) -> list[float]:
    """The metric of each answer, in the unit that the metric's function documents.

    An answer without words is 0.0, except that `sentence_length` and `word_length` are nan:
    they are means over nothing. (Average them with `numpy.nanmean`.)
    Raises ContrastError when a language has no word list.
    """
    if metric.name == "language":
        return [language(text, metric.pattern or "") for text in texts]
    if metric.name in PATTERN_METRICS:
        pattern = metric.regex()
        return [PATTERN_METRICS[metric.name](text, pattern) for text in texts]
    return [TEXT_METRICS[metric.name](text) for text in texts]
