"""A direction in words: the tokens that it promotes and suppresses through the model's own head.

The head is found by running it: a forward pass whose last block is made to return the direction.
So the final norm, tied embeddings, logit scales and caps are the model's own, in every
architecture that can be steered; and MLX computes only what the logits depend on, so the blocks
before cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxsteer.errors import UsageError, VectorError
from mlxsteer.fitting import fitted
from mlxsteer.models.hooks import RESIDUAL, Hooks, Run
from mlxsteer.similarity import layer_shares
from mlxsteer.vector import Array, SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import Model

DIRECTIONS_PER_PASS = 16  # two rows of vocabulary-wide logits each: 32 MB at 260,000 tokens
RMS = 100.0  # of what the head is shown: its norm's epsilon vanishes, float16 does not overflow
WORD_START = "▁"  # how SentencePiece writes a blank
UNREADABLE = "\ufffd"
# Byte-level vocabularies (GPT-2's) write a byte as its Latin-1 letter, or from U+0100 on in order.
_SHOWN = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
BYTE_OF = {chr(b): b for b in _SHOWN} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}


@dataclass(frozen=True)
class TokenScore:
    """A token and its score. text: what it writes; bytes that are no text as `<0xE2>`."""

    token: int
    text: str
    score: float


@dataclass(frozen=True)
class LensReading:
    """What one direction promotes and suppresses, strongest first. layer: None = the middle."""

    layer: int | None
    promoted: tuple[TokenScore, ...]
    suppressed: tuple[TokenScore, ...]


def lens(
    model: Model, vector: SteeringVector, layers: Sequence[int] | None = None, top: int = 10
) -> list[LensReading]:
    """The `top` tokens at both ends, for each of `layers`, by default for the vector's middle.

    The middle is the mean of the unit directions, weighted by layer share. Raises UsageError for
    a layer without a direction, VectorError for a vector of another model or with several
    directions at a layer.
    """
    vector = fitted(vector, model.shape)
    directions: dict[int | None, Array] = {layer: _row(vector, layer) for layer in layers or ()}
    if layers is None:
        directions[None] = _middle(vector)
    scores = token_scores(model.hooks, np.stack(list(directions.values())))
    return [
        _reading(model.tokenizer, layer, row, top)
        for layer, row in zip(directions, scores, strict=True)
    ]


def token_scores(hooks: Hooks, directions: Array) -> Array:
    """float32 [N, V] scores of every token for `directions` [N, D].

    score = (f(d) − f(−d)) / 2 less its mean over the vocabulary, where f is the final norm and
    head, and d is so long that the norm's epsilon does not count. With an RMS norm of weight w
    and a head W that is √D · W(w∘d) for a unit d: the logits of a state that is nothing but the
    direction, and, to first order, what one dose of it at the last layer adds to the logits. The
    logit lens (nostalgebraist 2020) on directions as in Dar et al. 2022 (arXiv 2209.02535),
    part 3; what later layers make of the direction is left out. The difference takes out the
    biases of norm and head.
    """
    rms = np.sqrt((directions**2).mean(-1, keepdims=True))
    states = mx.array(RMS * directions / rms, mx.float32)
    parts = []
    for start in range(0, len(directions), DIRECTIONS_PER_PASS):
        part = states[start : start + DIRECTIONS_PER_PASS]
        logits = _head(hooks, mx.concatenate([part, -part]))
        score = (logits[: len(part)] - logits[len(part) :]) / 2
        parts.append(np.array(score - score.mean(axis=-1, keepdims=True)))
    return np.concatenate(parts)


def _head(hooks: Hooks, states: mx.array) -> mx.array:
    """float32 [N, V]: logits when the last block returns `states` [N, D] (V4: in all streams)."""

    def replaced(x: mx.array) -> mx.array:
        shape = (1, len(states), *[1] * (x.ndim - 3), states.shape[-1])
        return mx.broadcast_to(states.reshape(shape), x.shape)

    run = Run(edits={(hooks.n_layers - 1, RESIDUAL): replaced})
    with hooks.forward(run):
        logits = hooks.model(mx.zeros((1, len(states)), mx.int32))
    return logits[0].astype(mx.float32)


def _row(vector: SteeringVector, layer: int) -> Array:
    """The direction [D] at `layer`; of a pattern of streams their mean, which the head reads."""
    if layer not in vector.directions:
        raise UsageError(
            f"{vector.name!r} has no direction at layer {layer}; it has one at"
            f" {', '.join(map(str, vector.layers))}."
        )
    direction = vector.directions[layer]
    if vector.site == "stream":
        direction = direction.mean(axis=0)
    elif direction.ndim == 2:
        if len(direction) > 1:
            raise VectorError(
                f"{vector.name!r} removes {len(direction)} directions at layer {layer}, which have"
                " no common sign. Look at a vector of one direction."
            )
        direction = direction[0]
    if not np.linalg.norm(direction) > 1e-6:
        raise VectorError(
            f"{vector.name!r} moves the streams of layer {layer} apart and not their mean, so the"
            " head reads nothing of it."
        )
    return direction


def _middle(vector: SteeringVector) -> Array:
    """[D]: the mean of the directions, weighted by layer share."""
    shares = layer_shares(vector)
    middle = np.sum([shares[layer] * _row(vector, layer) for layer in vector.layers], axis=0)
    if not np.linalg.norm(middle) > 1e-6:
        raise VectorError(
            f"The directions of {vector.name!r} cancel over its layers. Look at one: --layer"
            f" {vector.layers[0]}"
        )
    return np.asarray(middle, np.float32)


# --- tokens ---------------------------------------------------------------------------------------


def _reading(tokenizer: Any, layer: int | None, scores: Array, top: int) -> LensReading:
    order = np.argsort(-scores, kind="stable")
    return LensReading(
        layer, _first(tokenizer, order, scores, top), _first(tokenizer, order[::-1], scores, top)
    )


def _first(
    tokenizer: Any, order: Iterable[int], scores: Array, count: int
) -> tuple[TokenScore, ...]:
    """The first `count` tokens that the tokenizer has; heads are often padded beyond it."""
    found: list[TokenScore] = []
    for token in order:
        text = token_text(tokenizer, int(token))
        if text is not None:
            found.append(TokenScore(int(token), text, float(scores[token])))
        if len(found) == count:
            break
    return tuple(found)


def token_text(tokenizer: Any, token: int) -> str | None:
    """What `token` writes; None for an id that the tokenizer does not have.

    A part of a character, which is no text alone, is shown by its bytes: `<0xE2><0x80>`.
    """
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return None
    text = str(tokenizer.decode([token]))
    if piece.startswith(WORD_START):  # decoded alone, it loses its blank
        return piece.replace(WORD_START, " ")
    if UNREADABLE in text and all(letter in BYTE_OF for letter in piece) and piece[:3] != "<0x":
        return "".join(f"<0x{BYTE_OF[letter]:02X}>" for letter in piece)
    return piece if UNREADABLE in text else text or piece
