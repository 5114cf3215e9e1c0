"""Training a dictionary on states that lie on disk: BatchTopK, TopK or JumpReLU, by Adam.

Float32 throughout; the decoder's rows keep length 1. Interrupted, the same call goes on from its
last checkpoint with the same result. Knows states, not models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlxsteer.errors import SaeError, UsageError
from mlxsteer.sae import checkpoint, objective
from mlxsteer.sae.activations import Activations
from mlxsteer.sae.checkpoint import State
from mlxsteer.sae.dictionary import Dictionary

SAMPLE = 8192  # states from which mean, scale and the first threshold are taken
THRESHOLD_BATCHES = 16
WARMUP, DECAY = 0.05, 0.3  # shares of the steps: linear up, linear down to 0
LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class Recipe:
    """How to train.

    features: F. k: features per state: exactly (topk), on average (batchtopk), or aimed at
    (jumprelu). epochs: passes over the training states. batch: states per step. rate: Adam's
    peak learning rate. dead_after: a feature silent for so many states is dead.
    """

    architecture: str = "batchtopk"
    features: int = 4096
    k: int = 32
    epochs: float = 4.0
    batch: int = 1024
    rate: float = 1e-3
    dead_after: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in objective.TRAINABLE:
            raise UsageError(
                f"{self.architecture!r} cannot be trained: {', '.join(objective.TRAINABLE)} can."
            )
        checks = (
            ("features", self.features >= 2),
            ("k", 1 <= self.k < self.features),
            ("epochs", 0 < self.epochs < math.inf),
            ("batch", self.batch >= 2),
            ("rate", 0 < self.rate < math.inf),
        )
        for what, holds in checks:
            if not holds:
                raise UsageError(
                    f"{getattr(self, what)} is no {what}"
                    + (f": 1 to {self.features - 1}." if what == "k" else " to train with.")
                )

    def steps(self, n_train: int) -> int:
        """How many steps the epochs over that many states make."""
        return max(1, int(self.epochs * n_train) // self.batch)


@dataclass(frozen=True)
class Scaling:
    """scale: what multiplies states so that their mean norm is √D; variance: of the scaled
    states around their mean, summed over D."""

    scale: float
    variance: float


def train(
    data: Activations,
    recipe: Recipe,
    store: Path | None = None,
    *,
    save_every: int = 100,
    stop_after: int | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Dictionary, list[dict[str, float]]]:
    """(the dictionary for states as they are, the log of the run).

    store: a checkpoint file; a call that finds one goes on there. stop_after: end after so many
    steps of this call, as an interruption would. on_step(step, figures): called at every logged
    step with loss, explained_variance, l0, dead. Raises SaeError.
    """
    if data.n_train < recipe.batch:
        raise SaeError(
            f"{data.n_train} training states are fewer than one batch of {recipe.batch}. Read"
            " more --tokens."
        )
    sample = data.sample(SAMPLE, recipe.seed)
    scaling = _scaling(sample)
    run = repr((asdict(recipe), data.n_train, data.d_model))
    state = checkpoint.load(store, run) if store else None
    if state is None:
        state = _start(recipe, sample * scaling.scale)
    total, done = recipe.steps(data.n_train), 0
    trainer = _Trainer(data, recipe, scaling, state, total)
    while state.step < total and (stop_after is None or done < stop_after):
        figures = trainer.step()
        done += 1
        if figures is not None and on_step:
            on_step(state.step, figures)
        if store and (state.step % save_every == 0 or state.step == total):
            checkpoint.save(state, store, run)
    if store:
        checkpoint.save(state, store, run)
    return _finished(data, recipe, scaling, state), state.log


class _Trainer:
    """Takes steps on a state that it owns."""

    def __init__(
        self, data: Activations, recipe: Recipe, scaling: Scaling, state: State, total: int
    ):
        self.data, self.recipe, self.scaling = data, recipe, scaling
        self.state, self.total = state, total
        self.adam = optim.Adam(learning_rate=recipe.rate, bias_correction=True)
        self.adam.state = state.optimizer or self.adam.state
        if not state.optimizer:
            self.adam.init(state.params)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def step(self) -> dict[str, float] | None:
        """One step; figures when it is one that is logged."""
        state, recipe = self.state, self.recipe
        x = self._batch(state.step) * self.scaling.scale
        dead = self._dead()

        def loss(params: objective.Params) -> Any:
            return objective.loss(
                params, x, dead, recipe.architecture, recipe.k, self.scaling.variance
            )

        result, grads = mx.value_and_grad(loss)(state.params)
        found = objective.Step(*result)
        self.adam.learning_rate = self._rate(state.step)
        grads = objective.without_growth(grads, state.params)
        state.params = self.adam.apply_gradients(grads, state.params)
        state.params["W_dec"] = objective.unit_rows(state.params["W_dec"])
        state.silent = mx.where(found.fired, 0, state.silent + recipe.batch)
        state.optimizer = self.adam.state
        state.step += 1
        mx.eval(state.params, state.optimizer, state.silent, found)
        return self._logged(found)

    def _batch(self, step: int) -> mx.array:
        """float32 [batch, D]: what step `step` sees, whatever ran before."""
        size, per_epoch = self.recipe.batch, self.data.n_train // self.recipe.batch
        epoch, at = divmod(step, per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.data.train_order(self.recipe.seed, epoch)
        return self.data.rows(self._order[at * size : (at + 1) * size])

    def _dead(self) -> mx.array | None:
        indices = np.flatnonzero(np.array(self.state.silent) >= self.recipe.dead_after)
        return mx.array(indices) if len(indices) else None

    def _rate(self, step: int) -> mx.array:
        up = (step + 1) / max(1, math.ceil(WARMUP * self.total))
        down = (self.total - step) / max(1, math.ceil(DECAY * self.total))
        return mx.array(self.recipe.rate * min(1.0, up, down))

    def _logged(self, found: objective.Step) -> dict[str, float] | None:
        state = self.state
        if state.step % LOG_EVERY and state.step != self.total:
            return None
        dead = float((state.silent >= self.recipe.dead_after).mean())
        figures = {
            "step": float(state.step),
            "loss": float(found.loss),
            "explained_variance": 1 - float(found.error) / self.scaling.variance,
            "l0": float(found.l0),
            "dead": dead,
        }
        if not math.isfinite(figures["loss"]):
            raise SaeError(
                f"The loss is no longer a number at step {state.step}. Try a lower --rate."
            )
        state.log.append(figures)
        return figures


def _scaling(sample: mx.array) -> Scaling:
    norm = float(mx.linalg.norm(sample, axis=-1).mean())
    if not math.isfinite(norm) or norm == 0:
        raise SaeError("The states are zeros or not numbers: there is nothing to learn from.")
    scale = sample.shape[1] ** 0.5 / norm
    centred = (sample - sample.mean(axis=0)) * scale
    return Scaling(scale, float((centred * centred).sum(axis=-1).mean()))


def _start(recipe: Recipe, sample: mx.array) -> State:
    key = mx.random.key(recipe.seed)
    params = objective.initial(recipe.features, sample, recipe.k, recipe.architecture, key)
    return State(0, params, {}, mx.zeros((recipe.features,), mx.int32), [])


def _finished(data: Activations, recipe: Recipe, scaling: Scaling, state: State) -> Dictionary:
    threshold = None
    if recipe.architecture == "batchtopk":
        order = data.train_order(recipe.seed, 0)
        starts = range(0, min(len(order), THRESHOLD_BATCHES * recipe.batch), recipe.batch)
        batches = [data.rows(order[at : at + recipe.batch]) * scaling.scale for at in starts]
        threshold = objective.inference_threshold(state.params, batches, recipe.k)
    weights: Any = objective.folded(state.params, scaling.scale, threshold)
    return Dictionary(
        architecture=recipe.architecture,
        k=recipe.k if recipe.architecture == "topk" else None,
        **weights,
    )
