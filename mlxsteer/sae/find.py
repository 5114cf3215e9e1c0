"""Which features go with a text or a contrast set: what fires on it, and what makes it likelier.

The first is read from states, the second by pushing a little along the best of them. Explains a
vector as features in the same terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxsteer.errors import SaeError
from mlxsteer.fitting import fitted
from mlxsteer.models.hooks import Run
from mlxsteer.sae import activations, corpus
from mlxsteer.sae.corpus import Window
from mlxsteer.sae.index import Feature, Index
from mlxsteer.sae.indexing import placed

if TYPE_CHECKING:
    from mlxsteer.contrast import ContrastSet
    from mlxsteer.model import Model
    from mlxsteer.sae.dictionary import Dictionary
    from mlxsteer.vector import SteeringVector

# A phrase is read behind these, because alone its first token is the sink of the sequence.
CARRIERS = ("We were talking about", "This is a text about", "I keep thinking of")
PAIRS = 16  # of a contrast set
CANDIDATES = 16  # whose effect is measured
EFFECT_TEXTS = 2
EFFECT_DOSE = 0.15


@dataclass(frozen=True)
class Found:
    """A feature and how it goes with what was asked.

    contrast: mean length of its share of the states there, less the same elsewhere (over the
    negative pole, or the index's text), in units of the median residual norm. effect: what a dose
    of 0.15 of it everywhere adds to the text's log-probability, nats a token (for a set, less
    what it adds to the negative pole); None when not measured.
    """

    feature: Feature
    contrast: float
    effect: float | None = None

    def row(self) -> dict[str, Any]:
        """The finding for a file or a client."""
        return {**self.feature.row(), "contrast": self.contrast, "effect": self.effect}


@dataclass(frozen=True)
class Part:
    """A feature's part in a vector: cosine of the directions, contrast as in `Found`."""

    feature: Feature
    cosine: float
    contrast: float | None

    def row(self) -> dict[str, Any]:
        """The part for a file or a client."""
        return {**self.feature.row(), "cosine": self.cosine, "contrast": self.contrast}


def by_text(
    model: Model, dictionary: Dictionary, index: Index, text: str, count: int = CANDIDATES
) -> list[Found]:
    """Features by how much more they fire on a phrase than in the index's text; with effects."""
    if not text.strip():
        raise SaeError('There is nothing to look for. Type e.g. "golden gate bridge".')
    windows = [_behind(model, carrier, text.strip()) for carrier in CARRIERS]
    elsewhere = np.zeros(dictionary.n_features, np.float32)
    for number, feature in index.features.items():
        elsewhere[number] = feature.mean
    contrast = _lengths(model, dictionary, reading(model, dictionary, windows) - elsewhere)
    return _ranked(model, dictionary, index, contrast, (windows, []), count)


def by_set(
    model: Model, dictionary: Dictionary, index: Index, contrast_set: ContrastSet,
    count: int = CANDIDATES,
) -> list[Found]:  # fmt: skip
    """Features by how much more they fire on a set's positive pole; with effects."""
    poles = poles_of(model, contrast_set)
    contrast = _contrast(model, dictionary, poles)
    return _ranked(model, dictionary, index, contrast, poles, count)


def explain(
    model: Model,
    dictionary: Dictionary,
    index: Index,
    vector: SteeringVector,
    contrast_set: ContrastSet | None,
) -> list[Part]:
    """Every indexed feature's part in `vector`, the largest cosine first.

    contrast_set: the one that the vector came from, for the contrast of activation. Raises
    SaeError for a vector that does not act where the dictionary reads.
    """
    layer, site = placed(dictionary)
    vector = fitted(vector, model.shape)
    if vector.site != site or layer not in vector.directions:
        layers = ", ".join(map(str, vector.layers))
        raise SaeError(
            f"The dictionary reads {site} after layer {layer}, and {vector.name!r} acts at"
            f" {vector.site} of {layers}. Take a dictionary of one of these layers."
        )
    direction = np.atleast_2d(vector.directions[layer])
    if len(direction) > 1:
        raise SaeError(f"{vector.name!r} has several directions at layer {layer}: none to explain.")
    rows = np.array(dictionary.W_dec)
    cosines = rows @ direction[0] / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
    contrast = None
    if contrast_set is not None:
        contrast = _contrast(model, dictionary, poles_of(model, contrast_set))
    parts = [
        Part(feature, float(cosines[i]), None if contrast is None else float(contrast[i]))
        for i, feature in index.features.items()
    ]
    return sorted(parts, key=lambda part: -part.cosine)


def poles_of(model: Model, contrast_set: ContrastSet) -> tuple[list[Window], list[Window]]:
    """The windows of a set's poles, read where its vector is read."""
    pairs = contrast_set.pairs()[:PAIRS]
    sides = ([pair.positive for pair in pairs], [pair.negative for pair in pairs])
    last = contrast_set.extract.position == "last_prompt"

    def windows(side: Sequence[Any]) -> list[Window]:
        texts = [text if isinstance(text, str) else list(text) for text in side]
        made = corpus.windows(model, texts, context=10**6)
        return [Window(w.tokens, len(w.tokens) - 1) if last else w for w in made]

    return windows(sides[0]), windows(sides[1])


def reading(model: Model, dictionary: Dictionary, windows: Sequence[Window]) -> np.ndarray:
    """float32 [F]: each feature's activation, the mean of the windows' means."""
    layer, site = placed(dictionary)
    total = np.zeros(dictionary.n_features, np.float32)
    for batch in activations.batched(windows):
        states, row = activations.read_batch(model, batch, layer, site), 0
        for window in batch:
            acts = dictionary.encode(states[row : row + window.kept])
            total += np.array(acts.mean(axis=0))
            row += window.kept
    return total / len(windows)


def effects(
    model: Model, dictionary: Dictionary, features: Sequence[int], windows: Sequence[Window]
) -> np.ndarray:
    """[n]: what a dose of each feature adds to the windows' log-probability, nats a token.

    Layers before the dictionary's are computed once for every row; few texts serve.
    """
    layer, site = placed(dictionary)
    rows = np.stack([dictionary.feature(index) for index in features])
    rows *= EFFECT_DOSE * model.residual_norm[layer] / np.linalg.norm(rows, axis=1, keepdims=True)
    shifts = mx.array(np.concatenate([np.zeros((1, rows.shape[1])), rows]).astype(np.float32))

    def pushed(x: mx.array) -> mx.array:
        return (x + shifts.reshape(len(shifts), *[1] * (x.ndim - 2), -1)).astype(x.dtype)

    gains = np.zeros(len(features))
    for window in windows[:EFFECT_TEXTS]:
        tokens = mx.repeat(mx.array([window.tokens]), len(shifts), axis=0)
        with model.hooks.forward(Run(edits={(layer, site): pushed})):
            logits = model.network(tokens[:, :-1])[:, window.start - 1 :].astype(mx.float32)
        targets = tokens[:, window.start :, None]
        found = mx.take_along_axis(logits, targets, axis=-1)[..., 0]
        likely = np.array((found - mx.logsumexp(logits, axis=-1)).mean(axis=-1))
        gains += likely[1:] - likely[0]
        mx.clear_cache()
    return gains / len(windows[:EFFECT_TEXTS])


def _behind(model: Model, carrier: str, text: str) -> Window:
    """A window whose kept positions are those of `text`."""
    encode = model.tokenizer.encode
    opening = [*encode(""), *encode(carrier, add_special_tokens=False)]
    return Window((*opening, *encode(f" {text}", add_special_tokens=False)), len(opening))


def _contrast(
    model: Model, dictionary: Dictionary, poles: tuple[list[Window], list[Window]]
) -> np.ndarray:
    positive, negative = (reading(model, dictionary, pole) for pole in poles)
    return _lengths(model, dictionary, positive - negative)


def _lengths(model: Model, dictionary: Dictionary, acts: np.ndarray) -> np.ndarray:
    """Activations [F] as lengths of their share of a state, in median residual norms."""
    layer, _ = placed(dictionary)
    norms = np.linalg.norm(np.array(dictionary.W_dec), axis=1)
    return np.asarray(acts * norms / model.residual_norm[layer])


def _ranked(
    model: Model,
    dictionary: Dictionary,
    index: Index,
    contrast: np.ndarray,
    poles: tuple[Sequence[Window], Sequence[Window]],
    count: int,
) -> list[Found]:
    best = [int(i) for i in np.argsort(-contrast, kind="stable")[:count] if contrast[i] > 0]
    best = [i for i in best if i in index.features]
    if not best:
        raise SaeError("No feature fires more on this than elsewhere. Try other words.")
    gain = effects(model, dictionary, best, poles[0])
    if poles[1]:
        gain = gain - effects(model, dictionary, best, poles[1])
    return [
        Found(index.features[i], float(contrast[i]), float(g))
        for i, g in zip(best, gain, strict=True)
    ]
