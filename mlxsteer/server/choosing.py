"""From a batch's logits to each row's next token, by each row's own rules and randomness.

Rows that decode greedily share one argmax; log-probabilities of the vocabulary are computed only
for rows that need them.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlxsteer.generation import PENALTY_WINDOW, Sampling
from mlxsteer.server.jobs import Job

SEED_MASK = 2**64 - 1


class Choice:
    """How one row picks its tokens.

    Randomness is a chain of keys from the row's seed, the one that `mx.random.seed` starts, so an
    answer is the one that `generation.stream` gives with that seed, whoever decodes beside it.
    """

    def __init__(self, job: Job):
        sampling = job.sampling
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self.sampling = sampling
        self.key = mx.random.key(seed & SEED_MASK)
        self._processors = sampling.processors()
        self._bias = dict(job.logit_bias)
        self._presence, self._frequency = job.presence_penalty, job.frequency_penalty
        self._counts: Counter[int] = Counter()

    @property
    def greedy(self) -> bool:
        return self.sampling.temp == 0

    def note(self, token: int) -> None:
        """The answer now holds `token`."""
        if self._presence or self._frequency:
            self._counts[token] += 1

    @property
    def adjusts(self) -> bool:
        """Whether `adjusted` changes anything."""
        return bool(self._processors or self._bias or self._counts)

    def adjusted(self, logits: mx.array, tokens: Sequence[int]) -> mx.array:
        """[1, V] logits after bias and penalties; `tokens` is the row so far."""
        if self._bias:
            logits = _added(logits, self._bias)
        for process in self._processors:
            logits = process(mx.array(list(tokens[-PENALTY_WINDOW:])), logits)
        if self._counts:
            penalties = {
                token: -(self._presence + self._frequency * count)
                for token, count in self._counts.items()
            }
            logits = _added(logits, penalties)
        return logits


@dataclass
class Chosen:
    """tokens [B], not evaluated yet; the rows' keys after them; rows whose rules failed."""

    tokens: mx.array
    keys: list[mx.array]
    failed: dict[int, Exception] = field(default_factory=dict)


def choose(
    logits: mx.array, choices: Sequence[Choice], contexts: Sequence[Sequence[int]]
) -> Chosen:
    """The next token of every row. logits: float32 [B, V]; contexts: the rows' tokens so far."""
    chosen = Chosen(mx.argmax(logits, axis=-1), [choice.key for choice in choices])
    if all(choice.greedy and not choice.adjusts for choice in choices):
        return chosen
    changed: dict[int, mx.array] = {}
    for index, choice in enumerate(choices):
        try:
            if choice.adjusts:
                one = choice.adjusted(logits[index : index + 1], contexts[index])
                changed[index] = one
        except Exception as error:  # a rule of one request must not end its neighbours
            chosen.failed[index] = error
    if changed:
        rows = [changed.get(index, logits[index : index + 1]) for index in range(len(choices))]
        logits = mx.concatenate(rows)
        chosen.tokens = mx.argmax(logits, axis=-1)
    _draw(logits, choices, chosen)
    return chosen


def _draw(logits: mx.array, choices: Sequence[Choice], chosen: Chosen) -> None:
    """Put samples in the place of the greedy tokens of rows that sample."""
    rows = [i for i, c in enumerate(choices) if not c.greedy and i not in chosen.failed]
    if not rows:
        return
    samplings = [choices[index].sampling for index in rows]
    kept = logits if len(rows) == len(choices) else logits[mx.array(rows)]
    scores = kept - mx.logsumexp(kept, axis=-1, keepdims=True)
    scores = mx.where(scores < _floors(scores, samplings), -mx.inf, scores)
    weights = scores * mx.array([[1 / sampling.temp] for sampling in samplings])
    drawn: dict[int, mx.array] = {}
    for at, index in enumerate(rows):
        chosen.keys[index], key = mx.random.split(choices[index].key)
        drawn[index] = mx.random.categorical(weights[at : at + 1], key=key)
    greedy = chosen.tokens
    chosen.tokens = mx.concatenate(
        [drawn.get(index, greedy[index : index + 1]) for index in range(len(choices))]
    )


def _floors(scores: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    """[B, 1] the lowest log-probability that each row may still pick. scores: [B, V].

    top_p, top_k and min_p each leave the likeliest tokens, so their strictest decides. All rows
    share one sort, each with its own settings.
    """
    lowest = [[math.log(s.min_p) if s.min_p > 0 else -math.inf] for s in samplings]
    floors = scores.max(axis=-1, keepdims=True) + mx.array(lowest)
    ranked = [i for i, s in enumerate(samplings) if s.top_p < 1 or s.top_k > 0]
    if not ranked:
        return floors
    at = mx.array(ranked)
    best_first = -mx.sort(-scores[at], axis=-1)
    before = mx.cumsum(mx.exp(best_first), axis=-1, inclusive=False)
    size = scores.shape[-1]
    shares = mx.array([[samplings[i].top_p if samplings[i].top_p < 1 else 2.0] for i in ranked])
    most = mx.array([[samplings[i].top_k or size] for i in ranked])
    count = mx.minimum((before < shares).sum(axis=-1, keepdims=True), mx.minimum(most, size))
    floors[at] = mx.maximum(floors[at], mx.take_along_axis(best_first, count - 1, axis=-1))
    return floors


def _added(logits: mx.array, amounts: dict[int, float]) -> mx.array:
    """[1, V] with `amounts` added at the tokens they name."""
    return logits.at[:, mx.array(list(amounts))].add(mx.array(list(amounts.values())))


def log_probabilities(logits: mx.array, token: mx.array, count: int) -> tuple[mx.array, ...]:
    """Of one row: (log p(token) [1], the `count` likeliest tokens, their log p), unevaluated.

    logits: float32 [V]; token [1].
    """
    scores = logits - mx.logsumexp(logits)
    likeliest = mx.argsort(-scores)[:count]
    return scores[token], likeliest, scores[likeliest]
