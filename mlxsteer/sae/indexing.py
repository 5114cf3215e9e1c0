"""Makes the index of a dictionary's features: reads states, and each direction once.

From a text, by forward passes up to the dictionary's layer; or from the states that training has
captured, for nothing. `index` is what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxsteer import lens
from mlxsteer.errors import SaeError
from mlxsteer.progress import progress
from mlxsteer.sae import activations
from mlxsteer.sae.index import Background, Feature, Index, Snippet

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.sae.activations import Activations
    from mlxsteer.sae.corpus import Window
    from mlxsteer.sae.dictionary import Dictionary

TOKENS = 50_000  # of the text that is read; more finds better snippets of rare features
SNIPPETS = 12  # kept of each feature, no two of one window
BEFORE, AFTER = 16, 6  # tokens of a snippet around the one that fires
BACKGROUND = 96  # stretches at random that are kept to compare with
PROMOTED = 10
LENS_AT_A_TIME = 64  # features


def build(
    model: Model,
    dictionary: Dictionary,
    found: Sequence[Window],
    *,
    tokens: int = TOKENS,
    show_progress: bool = True,
) -> Index:
    """Read up to `tokens` states of the windows and note where each feature fires.

    A forward pass up to the dictionary's layer, and each feature's direction once through the
    model's head. Raises SaeError for a dictionary whose place is not known.
    """
    layer, site = placed(dictionary)
    batches = activations.batched(_first(found, tokens))
    states = (activations.read_batch(model, batch, layer, site) for batch in batches)
    return _indexed(model, dictionary, batches, states, show_progress)


def of_activations(
    model: Model,
    dictionary: Dictionary,
    found: Sequence[Window],
    data: Activations,
    *,
    show_progress: bool = True,
) -> Index:
    """The same from the captured states of the windows `found`, without forward passes."""
    batches = activations.in_order(found)
    return _indexed(model, dictionary, batches, _captured(data, batches), show_progress)


def _captured(data: Activations, batches: Sequence[Sequence[Window]]) -> Iterator[mx.array]:
    row = 0
    for batch in batches:
        count = sum(window.kept for window in batch)
        yield data.rows(np.arange(row, row + count))
        row += count


def _indexed(
    model: Model,
    dictionary: Dictionary,
    batches: Sequence[Sequence[Window]],
    states: Iterable[mx.array],
    show_progress: bool,
) -> Index:
    windows = [window for batch in batches for window in batch]
    kept = sum(window.kept for window in windows)
    tally = _Tally(dictionary.n_features, every=max(1, len(windows) // BACKGROUND))
    with progress("Reading features", kept, enabled=show_progress) as advance:
        for batch, read_states in zip(batches, states, strict=True):
            tally.add(dictionary, read_states, batch)
            advance(sum(window.kept for window in batch))
    return _index(model, dictionary, windows, tally, show_progress)


def _index(
    model: Model,
    dictionary: Dictionary,
    windows: Sequence[Window],
    tally: _Tally,
    show_progress: bool,
) -> Index:
    kept = sum(window.kept for window in windows)
    alive = [int(index) for index in np.flatnonzero(tally.maximum > 0)]
    promoted = _promoted(model, dictionary, alive, show_progress)
    snippets = {
        index: tuple(
            snippet(model, windows[window], position, activation, window)
            for activation, window, position in tally.places(index)
        )
        for index in alive
    }
    features = {
        index: Feature(
            index,
            density=float(tally.fired[index] / kept),
            maximum=float(tally.maximum[index]),
            mean=float(tally.total[index] / kept),
            promoted=promoted[index],
            snippets=snippets[index],
        )
        for index in alive
    }
    background = tuple(
        Background(_stretch(model, windows[number]), fires) for number, fires in tally.fires.items()
    )
    about = {"model": model.label, "tokens": kept, "windows": len(windows)}
    return Index(features, background, about)


def placed(dictionary: Dictionary) -> tuple[int, str]:
    """(layer, site) that a dictionary reads. SaeError when nothing says so."""
    if dictionary.layer is None or dictionary.site is None:
        raise SaeError(
            "Nothing says after which layer this dictionary reads. Take it in again: mlxsteer sae"
            " import FOLDER --layer 15 --site residual --force"
        )
    return dictionary.layer, dictionary.site


def snippet(model: Model, window: Window, at: int, activation: float, number: int) -> Snippet:
    """The text around position `at` of a window."""
    tokens, decode = window.tokens, model.tokenizer.decode
    first = max(0, at - BEFORE)
    before, until = decode(list(tokens[first:at])), decode(list(tokens[first : at + 1]))
    whole = decode(list(tokens[first : at + 1 + AFTER]))
    return Snippet(before, until[len(before) :], whole[len(until) :], activation, number)


def _stretch(model: Model, window: Window) -> str:
    """The beginning of what is kept of a window."""
    tokens = window.tokens[window.start : window.start + BEFORE + AFTER]
    return str(model.tokenizer.decode(list(tokens)))


class _Tally:
    """Counts over states [n, F], and the places of each feature's largest activations."""

    def __init__(self, n_features: int, every: int) -> None:
        self.every, self.fires = every, dict[int, frozenset[int]]()
        self.fired, self.total = np.zeros(n_features), np.zeros(n_features)
        self._top = np.zeros((n_features, SNIPPETS), np.float32)
        self._window = np.zeros((n_features, SNIPPETS), np.int32)
        self._position = np.zeros((n_features, SNIPPETS), np.int32)
        self._windows = 0

    @property
    def maximum(self) -> np.ndarray:
        return self._top.max(axis=1)

    def add(self, dictionary: Dictionary, states: mx.array, batch: Sequence[Window]) -> None:
        """Takes in the states of a batch, window after window; on massive ones nothing fires."""
        row = 0
        massive = activations.massive(np.array(mx.linalg.norm(states, axis=-1)))
        for window in batch:
            acts = np.array(dictionary.encode(states[row : row + window.kept]))
            acts[massive[row : row + window.kept]] = 0
            row += window.kept
            self.fired += (acts > 0).sum(axis=0)
            self.total += acts.sum(axis=0)
            self._keep(acts.max(axis=0), window.start + acts.argmax(axis=0))
            if self._windows % self.every == 0:
                some = (acts[: BEFORE + AFTER] > 0).any(axis=0)
                self.fires[self._windows] = frozenset(np.flatnonzero(some).tolist())
            self._windows += 1

    def _keep(self, peaks: np.ndarray, positions: np.ndarray) -> None:
        slots = self._top.argmin(axis=1)
        better = np.flatnonzero(peaks > self._top[np.arange(len(slots)), slots])
        at = better, slots[better]
        self._top[at], self._position[at] = peaks[better], positions[better]
        self._window[at] = self._windows

    def places(self, index: int) -> list[tuple[float, int, int]]:
        """[(activation, window, position)] of a feature, largest first."""
        order = np.argsort(-self._top[index], kind="stable")
        return [
            (float(self._top[index, i]), int(self._window[index, i]), int(self._position[index, i]))
            for i in order
            if self._top[index, i] > 0
        ]


def _first(found: Sequence[Window], tokens: int) -> list[Window]:
    used: list[Window] = []
    for window in found:
        if tokens <= 0:
            break
        used.append(window)
        tokens -= window.kept
    return used


def _promoted(
    model: Model, dictionary: Dictionary, alive: Sequence[int], show_progress: bool
) -> dict[int, tuple[str, ...]]:
    """{feature: the tokens that its direction promotes through the head}."""
    found: dict[int, tuple[str, ...]] = {}
    with progress("Reading directions", len(alive), enabled=show_progress) as advance:
        for start in range(0, len(alive), LENS_AT_A_TIME):
            part = alive[start : start + LENS_AT_A_TIME]
            rows = np.stack([dictionary.feature(index) for index in part])
            scores = lens.token_scores(model.hooks, rows)
            for index, score in zip(part, scores, strict=True):
                best = np.argsort(-score)[: 2 * PROMOTED]  # heads are padded beyond the tokenizer
                texts = [lens.token_text(model.tokenizer, int(token)) for token in best]
                found[index] = tuple([text for text in texts if text is not None][:PROMOTED])
            advance(len(part))
    return found
