"""From a batch's logits to each row's next token, by each row's own rules and randomness.

Rows that decode greedily share one argmax; log-probabilities of the vocabulary are computed only
for rows that need them.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

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
    groups: dict[Sampling, list[int]] = {}
    for index, choice in enumerate(choices):
        if not choice.greedy and index not in chosen.failed:
            groups.setdefault(_alike(choice.sampling), []).append(index)
    drawn: dict[int, mx.array] = {}
    for sampling, indices in groups.items():
        kept = logits if len(indices) == len(choices) else logits[mx.array(indices)]
        weights = _filtered(kept, sampling) * (1 / sampling.temp)
        for at, index in enumerate(indices):
            chosen.keys[index], key = mx.random.split(choices[index].key)
            drawn[index] = mx.random.categorical(weights[at : at + 1], key=key)
    if drawn:
        greedy = chosen.tokens
        chosen.tokens = mx.concatenate(
            [drawn.get(index, greedy[index : index + 1]) for index in range(len(choices))]
        )


def _alike(sampling: Sampling) -> Sampling:
    """The same for all rows whose logits are filtered the same way."""
    return Sampling(
        temp=sampling.temp, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p
    )


def _filtered(logits: mx.array, sampling: Sampling) -> mx.array:
    """Log-probabilities [B, V], -inf at tokens that the sampling leaves out."""
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if sampling.top_p < 1:
        scores = apply_top_p(scores, sampling.top_p)
    if sampling.min_p > 0:
        scores = apply_min_p(scores, sampling.min_p)
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = apply_top_k(scores, sampling.top_k)
    return scores


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
