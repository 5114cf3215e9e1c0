"""How good a dictionary is: what it explains, how sparsely, what is dead, what a splice costs.

Measured with the dictionary as it will be used, on states and text that training did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxsteer.models.hooks import Run

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.sae.activations import Activations
    from mlxsteer.sae.corpus import Window
    from mlxsteer.sae.dictionary import Dictionary

PART = 2048  # states at a time
DENSITY_ROWS = 100_000  # states over which a feature that never fires counts as dead
SPLICE_WINDOWS = 64

Edit = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Fit:
    """explained_variance: 1 - Σ‖x - x̂‖² / Σ‖x - mean‖². l0: features per state.
    dead: share of the features that fired on none of `density_rows` training states.
    massive_rows: states left out of training and of these figures (see `Activations`)."""

    explained_variance: float
    l0: float
    dead: float
    held_out_rows: int
    density_rows: int
    massive_rows: int = 0

    def row(self) -> dict[str, Any]:
        """The figures for a table or a file."""
        return asdict(self)


@dataclass(frozen=True)
class Splice:
    """Cross-entropy in nats a token: of the model as it is, with the dictionary's
    reconstruction in place of its states, with zeros, and with the mean state.
    recovered: share of what zeros cost that the reconstruction does not."""

    clean: float
    spliced: float
    zero: float
    mean: float
    tokens: int

    @property
    def recovered(self) -> float:
        return (self.zero - self.spliced) / (self.zero - self.clean)

    @property
    def recovered_from_mean(self) -> float:
        """The same share of what the mean state costs: the stricter measure."""
        return (self.mean - self.spliced) / (self.mean - self.clean)

    def row(self) -> dict[str, Any]:
        return asdict(self) | {
            "recovered": self.recovered,
            "recovered_from_mean": self.recovered_from_mean,
        }


def fit(dictionary: Dictionary, data: Activations) -> tuple[Fit, np.ndarray]:
    """(figures on the held-out states, [F] share of training states on which each fires)."""
    held = data.held_out()
    mean = data.rows(held).mean(axis=0)
    error = spread = active = 0.0
    for at in range(0, len(held), PART):
        x = data.rows(held[at : at + PART])
        acts = dictionary.encode(x)
        residual, centred = x - dictionary.decode(acts, like=x), x - mean
        error += float((residual * residual).sum())
        spread += float((centred * centred).sum())
        active += float((acts > 0).sum())
    density, rows = _density(dictionary, data)
    figures = Fit(
        explained_variance=1 - error / spread,
        l0=active / len(held),
        dead=float((density == 0).mean()),
        held_out_rows=len(held),
        density_rows=rows,
        massive_rows=len(data.massive),
    )
    return figures, density


def _density(dictionary: Dictionary, data: Activations) -> tuple[np.ndarray, int]:
    rows = np.sort(data.train_order(0, 0)[:DENSITY_ROWS])
    fired = mx.zeros((dictionary.n_features,))
    for at in range(0, len(rows), PART):
        fired = fired + (dictionary.encode(data.rows(rows[at : at + PART])) > 0).sum(axis=0)
        mx.eval(fired)
    return np.array(fired) / len(rows), len(rows)


def splice(
    model: Model,
    dictionary: Dictionary,
    found: Sequence[Window],
    layer: int,
    site: str,
    mean: mx.array,
) -> Splice:
    """What the model's next-token loss becomes when states are replaced at `site` of `layer`.

    mean: [D] the mean state. Positions before a window's start keep their states: the first is
    a sink whose norm no dictionary learns. Four forward passes over at most 64 windows.
    """
    model.hooks.require([(layer, site)])
    chosen = list(found)[:SPLICE_WINDOWS]
    ways: dict[str, Callable[[mx.array], mx.array] | None] = {
        "clean": None,
        "spliced": dictionary.reconstruct,
        "zero": mx.zeros_like,
        "mean": lambda x: mx.broadcast_to(mean, x.shape),
    }
    losses = dict.fromkeys(ways, 0.0)
    tokens = 0
    for window in chosen:
        for name, replacement in ways.items():
            edits = {}
            if replacement is not None:
                edits[layer, site] = _replacing(replacement, window.start)
            losses[name] += _loss(model, window, Run(edits=edits))
        tokens += window.kept - 1
    return Splice(**{name: total / tokens for name, total in losses.items()}, tokens=tokens)


def _replacing(replacement: Edit, start: int) -> Edit:
    """An edit that replaces the reading of a stream's states from position `start` on.

    Of hyper-connections [B, T, 4, D] the reading is the mean of the streams, so what the mean
    changes by is added to each of them.
    """

    def edit(h: mx.array) -> mx.array:
        x = h.astype(mx.float32)
        reading = x.mean(axis=-2) if h.ndim == 4 else x
        change = replacement(reading) - reading
        change = mx.where(mx.arange(h.shape[1])[:, None] < start, 0, change)
        return (x + (change[:, :, None] if h.ndim == 4 else change)).astype(h.dtype)

    return edit


def _loss(model: Model, window: Window, run: Run) -> float:
    """Summed cross-entropy of the tokens after the window's first kept one."""
    tokens = mx.array([window.tokens])
    with model.hooks.forward(run):
        logits = model.network(tokens[:, :-1])[0, window.start :].astype(mx.float32)
    targets = tokens[0, window.start + 1 :, None]
    chosen = mx.take_along_axis(logits, targets, axis=-1)[:, 0]
    total = float((mx.logsumexp(logits, axis=-1) - chosen).sum())
    mx.clear_cache()
    return total
