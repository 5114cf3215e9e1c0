"""A series of readings: how far along a direction the text lies, token by token.

For text that exists, and for text that is being written, where readings come from the forward
passes that write it. What a reading is, `probe` says; how one is shown, `meter_output`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsteer import library
from mlxsteer.errors import UsageError
from mlxsteer.lens import token_text
from mlxsteer.plan import Plan
from mlxsteer.probe import Probe, probe_of
from mlxsteer.steered import SteeredModel
from mlxsteer.vector import SteeringVector

if TYPE_CHECKING:
    from mlxsteer.model import Model

Meters = str | SteeringVector | Probe | Iterable[str | SteeringVector | Probe]


@dataclass(frozen=True)
class Series:
    """Readings of T tokens by P probes.

    values: float32 [T, P]; NaN where there is none. `means`: {name: mean over the tokens}, empty
    where there are no readings.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    values: np.ndarray

    @property
    def means(self) -> dict[str, float]:
        read = self.values[~np.isnan(self.values).any(axis=1)]
        return dict(zip(self.names, read.mean(axis=0).tolist(), strict=True)) if len(read) else {}


def probes_of(model: Model, meters: Meters) -> tuple[Probe, ...]:
    """The probes of `terse, formal@12` (a layer behind @), names, vectors or probes.

    Raises UsageError for a text without names or a layer that a vector does not have,
    VectorError for an unknown name or a vector that gives no reading, ModelError for a site that
    the model does not offer.
    """
    if isinstance(meters, str | SteeringVector | Probe):
        meters = [meters]
    probes = tuple(probe for meter in meters for probe in _probes(model, meter))
    if not probes:
        raise UsageError("No meter is named. Type e.g. terse or terse,formal.")
    model.hooks.require((probe.layer, probe.site) for probe in probes)
    return probes


def _probes(model: Model, meter: str | SteeringVector | Probe) -> list[Probe]:
    if isinstance(meter, Probe):
        return [meter]
    if isinstance(meter, SteeringVector):
        return [probe_of(meter, model.shape)]
    found = []
    for word in filter(None, map(str.strip, meter.split(","))):
        name, at, layer = word.rpartition("@")
        if not at or library.is_path(word):
            name, layer = word, ""
        elif not layer.strip().isdigit():
            raise UsageError(f"{layer!r} is not a layer. Type e.g. {name}@12, or {name} alone.")
        vector = library.find_or_extract(name.strip(), model)
        found.append(probe_of(vector, model.shape, int(layer) if layer else None))
    return found


def meter(
    model: Model,
    content: str | Sequence[int],
    meters: Meters,
    plan: Plan,
    prompt_length: int | None = None,
) -> Series:
    """Readings of existing text or token ids, each at its own position, under `plan`.

    The first position has none: it is a sink, whose state says nothing of the text. A token that
    is being written carries the reading of the position before its own, which it was chosen
    from: piece i of an answer has `values[prompt_length - 1 + i]`. prompt_length: how many of
    the tokens are prompt; by default all.
    """
    probes = probes_of(model, meters)
    tokens = model.tokenizer.encode(content) if isinstance(content, str) else list(content)
    if not tokens:
        raise UsageError("There is no text to read. Give at least one token.")
    cache = model.steered.new_cache(model.row(plan, prompt_length or len(tokens)))
    _, states = model.steered.read(mx.array([tokens]), cache, _places(probes))
    read = [probe.read(states[probe.layer, probe.site][0]) for probe in probes]
    values = np.array(mx.stack(read, axis=-1))
    values[0] = np.nan
    texts = tuple(token_text(model.tokenizer, token) or "" for token in tokens)
    return Series(tuple(probe.name for probe in probes), tuple(map(int, tokens)), texts, values)


def series_of(probes: Sequence[Probe], pieces: Iterable[Any]) -> Series:
    """The series of an answer's pieces (`generation.Piece`); thoughts are left out."""
    kept = [piece for piece in pieces if piece.readings and not piece.thinking]
    values = np.array([piece.readings for piece in kept], np.float32)
    return Series(
        tuple(probe.name for probe in probes),
        tuple(piece.token for piece in kept),
        tuple(piece.text for piece in kept),
        values.reshape(len(kept), len(probes)),
    )


class MeteredModel:
    """A steered model of one row that reads probes in the passes that give a token.

    Called as mlx-lm's generators call a model; `take` then has the readings of a position.
    """

    def __init__(self, steered: SteeredModel, probes: Sequence[Probe]) -> None:
        self.steered = steered
        self.probes = tuple(probes)
        self._readings: dict[int, mx.array] = {}

    @property
    def layers(self) -> list[nn.Module]:
        return self.steered.layers

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits [1, T, V] of `tokens` [1, T]."""
        row = cache[-1].rows[0]
        last = row.seen + tokens.shape[1] - 1
        if last < row.prompt_length - 1:
            return self.steered(tokens, cache)
        logits, states = self.steered.read(tokens, cache, _places(self.probes))
        read = [probe.read(states[probe.layer, probe.site][0, -1]) for probe in self.probes]
        self._readings[last] = mx.stack(read)
        # Computed with the logits: read afterwards, it would wait for the step behind them.
        return mx.depends(logits, self._readings[last])

    def take(self, position: int) -> tuple[float, ...]:
        """The probes' readings at `position`, once."""
        return tuple(float(value) for value in np.array(self._readings.pop(position)))


def _places(probes: Iterable[Probe]) -> frozenset[tuple[int, str]]:
    return frozenset((probe.layer, probe.site) for probe in probes)
