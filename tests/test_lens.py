"""The lens against what the models do with a very long shift, and against the formula by hand."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer import ops
from mlxsteer.errors import UsageError, VectorError
from mlxsteer.lens import lens, token_scores, token_text
from mlxsteer.model import Model
from mlxsteer.models import adapters
from mlxsteer.models.hooks import RESIDUAL, Hooks, Run
from mlxsteer.vector import SteeringVector
from tests.chat_models import WORDS, random_directions
from tests.test_architectures import FAMILIES
from tests.tiny_models import HIDDEN, random_vector, tiny_model, tiny_tokens
from tests.v4 import tiny as tiny_v4

FAR = 1e5  # times the unit direction: what the states held before is then below 1e-4 of them


@cache
def hooked(family: str, **changes: Any) -> Hooks:
    return adapters.install(tiny_model(family, **changes))


def directions(count: int, width: int = HIDDEN) -> np.ndarray:
    rows = np.random.default_rng(7).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def far_logits(hooks: Hooks, tokens: mx.array, direction: np.ndarray) -> np.ndarray:
    """[V] logits at the last position with the direction added, very long, at the last layer."""
    shift = partial(ops.add, shift=mx.array(FAR * direction))
    with hooks.forward(Run(edits={(hooks.n_layers - 1, RESIDUAL): shift})):
        return np.array(hooks.model(tokens)[0, -1].astype(mx.float32))


def assert_as_shifted(hooks: Hooks, tokens: mx.array, width: int) -> None:
    for direction in directions(2, width):
        (scores,) = token_scores(hooks, direction[None])
        up, down = (far_logits(hooks, tokens, sign * direction) for sign in (1, -1))
        moved = (up - down) / 2
        moved -= moved.mean()
        assert np.abs(scores - moved).max() < 3e-3 * np.abs(moved).max()
        assert np.array_equal(np.argsort(-scores)[:5], np.argsort(-moved)[:5])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_very_long_shift_at_the_last_layer_raises_tokens_in_the_order_of_the_lens(family):
    assert_as_shifted(hooked(family), tiny_tokens(1, 6), HIDDEN)


def test_deepseek_v4_is_read_through_its_collapsed_streams():
    built = tiny_v4.model()
    hooks = adapters.install(built)
    assert_as_shifted(hooks, tiny_v4.token_ids()[:, :6], built.args.hidden_size)


@pytest.mark.parametrize("tied", [False, True])
def test_the_score_is_the_formula(tied: bool) -> None:
    hooks = hooked("llama", tie_word_embeddings=tied)
    inner = hooks.model.model
    head = inner.embed_tokens.weight if tied else hooks.model.lm_head.weight
    d = directions(20)
    expected = np.sqrt(HIDDEN) * (d * np.array(inner.norm.weight)) @ np.array(head).T
    expected -= expected.mean(-1, keepdims=True)
    np.testing.assert_allclose(token_scores(hooks, d), expected, atol=1e-4)


def test_nothing_is_left_behind_in_the_model() -> None:
    hooks, tokens = hooked("qwen3"), tiny_tokens(1, 5)
    before = np.array(hooks.model(tokens))
    token_scores(hooks, directions(1))
    assert np.array_equal(np.array(hooks.model(tokens)), before)


# --- readings of a vector -------------------------------------------------------------------


def test_readings_rank_the_tokens_of_a_layer_and_of_the_middle(tiny: Model) -> None:
    vector = random_directions()
    middle, one, two = [*lens(tiny, vector, top=3), *lens(tiny, vector, [1, 2], top=3)]
    assert [reading.layer for reading in (middle, one, two)] == [None, 1, 2]
    weights = vector.shares(np.ones(4, np.float32))
    mean = weights[1] * vector.directions[1] + weights[2] * vector.directions[2]
    for reading, direction in ((middle, mean), (one, vector.directions[1])):
        (scores,) = token_scores(tiny.hooks, direction[None])
        order = np.argsort(-scores)
        assert [item.token for item in reading.promoted] == order[:3].tolist()
        assert [item.token for item in reading.suppressed] == order[::-1][:3].tolist()
        assert [item.score for item in reading.promoted] == scores[order[:3]].tolist()
        assert [item.text for item in reading.promoted] == [WORDS[at] for at in order[:3]]


def test_the_negated_vector_swaps_the_ends(tiny: Model) -> None:
    (plus,), (minus,) = lens(tiny, random_directions()), lens(tiny, -random_directions())
    assert [item.token for item in plus.promoted] == [item.token for item in minus.suppressed]


def test_what_has_no_reading_says_why(tiny: Model) -> None:
    with pytest.raises(UsageError, match="no direction at layer 0; it has one at 1, 2"):
        lens(tiny, random_directions(), [0])
    axes = np.eye(HIDDEN, dtype=np.float32)
    plane = SteeringVector("plane", {1: axes[:2]}, 4, op="project")
    with pytest.raises(VectorError, match="removes 2 directions at layer 1"):
        lens(tiny, plane)
    apart = SteeringVector("apart", {1: np.stack([axes[0], -axes[0]] * 2) / 2}, 4, site="stream")
    with pytest.raises(VectorError, match="apart and not their mean"):
        lens(tiny, apart)
    opposite = SteeringVector("opposite", {1: axes[0], 2: -axes[0]}, 4)
    with pytest.raises(VectorError, match="cancel over its layers"):
        lens(tiny, opposite)
    with pytest.raises(VectorError, match="width"):
        lens(tiny, SteeringVector("wide", {1: np.eye(33, dtype=np.float32)[0]}, 4))


# --- tokens ---------------------------------------------------------------------------------


class Vocabulary:
    """A tokenizer of given pieces and what they decode to."""

    def __init__(self, **pieces: str) -> None:
        self.pieces, self.texts = list(pieces), list(pieces.values())

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.pieces[token] if token < len(self.pieces) else None

    def decode(self, tokens: list[int]) -> str:
        return self.texts[tokens[0]]


@pytest.mark.parametrize(
    ("piece", "decoded", "shown"),
    [
        ("Ġterse", " terse", " terse"),
        ("▁terse", "terse", " terse"),
        ("Ċ", "\n", "\n"),
        ("âĢ", "\ufffd", "<0xE2><0x80>"),
        ("<0xE2>", "\ufffd", "<0xE2>"),
        ("<|end|>", "", "<|end|>"),
    ],
)
def test_tokens_are_shown_by_what_they_write(piece: str, decoded: str, shown: str) -> None:
    assert token_text(Vocabulary(**{piece: decoded}), 0) == shown


def test_ids_beyond_the_tokenizer_are_passed_over(tiny: Model, monkeypatch) -> None:
    few = Vocabulary(**{word: word for word in WORDS[:8]})
    monkeypatch.setattr(tiny, "tokenizer", few)
    (reading,) = lens(tiny, random_vector(3), top=50)
    assert sorted(item.token for item in reading.promoted) == list(range(8))
