"""Stop texts over any cutting into tokens, and samplers against mlx-lm's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlxsteer.generation import Sampling
from mlxsteer.plan import Plan
from mlxsteer.server.choosing import Choice, choose
from mlxsteer.server.jobs import Event, Job
from mlxsteer.server.stops import Held

TEXTS = st.text("ab\n", max_size=4)


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(TEXTS, max_size=8), stops=st.lists(TEXTS, max_size=3))
def test_text_goes_on_to_the_first_stop_text_and_is_never_taken_back(
    pieces: list[str], stops: list[str]
) -> None:
    held, shown, found = Held(stops), [], None
    for number, piece in enumerate(pieces):
        events, found = held.add(Event(piece, number))
        shown += events
        if found is not None:
            break
    else:
        shown += held.rest()
    whole, real = "".join(pieces), [stop for stop in stops if stop]
    ends = [whole.index(stop) + len(stop) for stop in real if stop in whole]
    text = "".join(event.text for event in shown)
    assert (found is not None) == bool(ends)
    assert [event.token for event in shown] == list(range(len(shown)))
    if found is None:
        assert text == whole
    else:
        assert whole.startswith(text + found)
        assert not any(stop in text for stop in real)


def test_each_row_is_filtered_as_by_mlx_lm_whatever_its_neighbours_settings() -> None:
    rows = [
        Sampling(temp=0.7, top_p=0.6, seed=1),
        Sampling(temp=1.0, top_k=5, seed=2),
        Sampling(temp=1.3, min_p=0.2, seed=3),
        Sampling(temp=0.9, top_p=0.8, top_k=7, min_p=0.05, seed=4),
        Sampling(temp=1.0, seed=5),
        Sampling(temp=1.0, top_k=10_000, seed=6),
        Sampling(),
    ]
    logits = mx.array(np.random.default_rng(0).normal(size=(len(rows), 200)) * 2, mx.float32)
    choices = [Choice(Job((1,), Plan([]), sampling)) for sampling in rows]
    for _ in range(20):
        keys = [choice.key for choice in choices]
        chosen = choose(logits, choices, [[1]] * len(rows))
        for index, (sampling, key) in enumerate(zip(rows, keys, strict=True)):
            wanted = _by_mlx_lm(logits[index : index + 1], sampling, key)
            assert chosen.tokens[index].item() == wanted
            choices[index].key = chosen.keys[index]


def _by_mlx_lm(logits: mx.array, sampling: Sampling, key: mx.array) -> int:
    if sampling.temp == 0:
        return int(mx.argmax(logits).item())
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if sampling.top_p < 1:
        scores = apply_top_p(scores, sampling.top_p)
    if sampling.min_p > 0:
        scores = apply_min_p(scores, sampling.min_p)
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = apply_top_k(scores, sampling.top_k)
    return int(mx.random.categorical(scores / sampling.temp, key=mx.random.split(key)[1]).item())
