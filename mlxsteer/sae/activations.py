"""A model's states on disk: captured once in bfloat16, read many times in any order.

Owns the buffer (one file of rows, written in the order of the windows and read shuffled) and
its resuming. Knows windows of tokens, not where they come from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxsteer.errors import SaeError
from mlxsteer.files import write_text
from mlxsteer.models.hooks import Run
from mlxsteer.progress import progress

if TYPE_CHECKING:
    from mlxsteer.model import Model
    from mlxsteer.sae.corpus import Window

BATCH_TOKENS = 2048  # positions of one forward pass
SORTED_TOGETHER = 64  # batches whose windows are sorted by length, to save padding
HELD_OUT = 0.03  # share of the windows
MASSIVE = 10.0  # times the median norm
ROWS_AT_A_TIME = 8192
BYTES = 2
STATES, PROGRESS = "states.bf16", "progress.json"


@dataclass(frozen=True)
class Activations:
    """Rows of states on disk: [n_rows, D] in bfloat16, held out from row `held_from` on.

    massive: rows that neither training nor scores look at. A few tokens in ten thousand have
    norms a hundred times the others' (Sun et al. 2024, "Massive activations in large language
    models") and would be most of the variance.
    """

    path: Path
    d_model: int
    held_from: int
    n_rows: int
    massive: tuple[int, ...] = ()

    @property
    def n_train(self) -> int:
        """Rows to train on."""
        return len(self._ordinary(0, self.held_from))

    def rows(self, indices: np.ndarray) -> mx.array:
        """float32 [n, D] of the rows at `indices` [n]."""
        bits = self._map()[indices]
        return mx.array(bits).view(mx.bfloat16).astype(mx.float32)

    def train_order(self, seed: int, epoch: int) -> np.ndarray:
        """[n_train] the training rows in the order of an epoch."""
        return np.random.default_rng([seed, epoch]).permutation(self._ordinary(0, self.held_from))

    def held_out(self) -> np.ndarray:
        """Indices of the held-out rows."""
        return self._ordinary(self.held_from, self.n_rows)

    def sample(self, count: int, seed: int = 0) -> mx.array:
        """float32 [≤ count, D]: training rows at random."""
        return self.rows(np.sort(self.train_order(seed, 0)[:count]))

    def without_massive(self) -> Activations:
        """The same rows, those of more than `MASSIVE` times the median norm marked as massive."""
        norms = np.concatenate(
            [
                np.array(
                    mx.linalg.norm(
                        self.rows(np.arange(at, min(at + ROWS_AT_A_TIME, self.n_rows))), axis=-1
                    )
                )
                for at in range(0, self.n_rows, ROWS_AT_A_TIME)
            ]
        )
        return replace(self, massive=tuple(np.flatnonzero(massive(norms)).tolist()))

    def _ordinary(self, start: int, end: int) -> np.ndarray:
        return np.setdiff1d(np.arange(start, end), np.array(self.massive, np.int64))

    def _map(self) -> np.memmap:
        return np.memmap(self.path, np.uint16, "r", shape=(self.n_rows, self.d_model))


def massive(norms: np.ndarray) -> np.ndarray:
    """bool [n]: which of states of these norms [n] are massive among them."""
    return norms > MASSIVE * np.median(norms)


def split(found: Sequence[Window]) -> tuple[list[Window], list[Window]]:
    """(training windows, held-out windows): the last few, at least one."""
    if len(found) < 2:
        raise SaeError("The corpus is too small: at least two windows of text are needed.")
    held = max(1, round(HELD_OUT * len(found)))
    return list(found[:-held]), list(found[-held:])


def capture(
    model: Model,
    found: Sequence[Window],
    layer: int,
    site: str,
    folder: Path,
    *,
    show_progress: bool = True,
) -> Activations:
    """The states of `site` after `layer` at every kept position of the windows.

    Goes on where an interrupted call with the same folder stopped. Layers above are never
    computed (MLX evaluates what is read). On DeepSeek-V4 the residual's state is the mean of its
    streams. Raises ModelError for a place that the model lacks, SaeError when the disk is short.
    """
    model.hooks.require([(layer, site)])
    train, _ = split(found)
    batches = in_order(found)
    counts = [sum(window.kept for window in batch) for batch in batches]
    held_from = sum(window.kept for window in train)
    result = Activations(folder / STATES, model.d_model, held_from, sum(counts))
    folder.mkdir(parents=True, exist_ok=True)
    done = _begin(result, folder)
    with progress("Reading states", result.n_rows, enabled=show_progress) as advance:
        advance(sum(counts[:done]))
        with result.path.open("r+b") as file:
            file.seek(sum(counts[:done]) * model.d_model * BYTES)
            for index in range(done, len(batches)):
                states = read_batch(model, batches[index], layer, site)
                file.write(np.array(states.astype(mx.bfloat16).view(mx.uint16)).tobytes())
                file.flush()
                write_text(folder / PROGRESS, json.dumps({"batches": index + 1}))
                advance(counts[index])
    return result.without_massive()


def read_batch(model: Model, batch: Sequence[Window], layer: int, site: str) -> mx.array:
    """float32 [kept positions, D] of one batch, window after window."""
    longest = max(len(window.tokens) for window in batch)
    padded = [[*window.tokens, *[0] * (longest - len(window.tokens))] for window in batch]
    run = Run(capture=frozenset([(layer, site)]))
    with model.hooks.forward(run):
        model.network(mx.array(padded))
    states = run.captured[layer, site]
    kept = [states[row, w.start : len(w.tokens)] for row, w in enumerate(batch)]
    joined = mx.concatenate(kept)
    mx.eval(joined)
    mx.clear_cache()
    return joined


def in_order(found: Sequence[Window]) -> list[list[Window]]:
    """The windows' batches in the order in which their states are captured."""
    train, held = split(found)
    return [*batched(train), *batched(held)]


def batched(found: Sequence[Window]) -> list[list[Window]]:
    """Batches of about `BATCH_TOKENS` positions, near neighbours in length together."""
    batches: list[list[Window]] = []
    longest = max((len(window.tokens) for window in found), default=1)
    rows = max(1, BATCH_TOKENS // longest)
    for at in range(0, len(found), rows * SORTED_TOGETHER):
        part = sorted(found[at : at + rows * SORTED_TOGETHER], key=lambda w: len(w.tokens))
        batches += [part[i : i + rows] for i in range(0, len(part), rows)]
    return batches


def bytes_needed(rows: int, d_model: int) -> int:
    """Bytes on disk of a buffer of that many states."""
    return rows * d_model * BYTES


def _begin(result: Activations, folder: Path) -> int:
    """Batches that are there already; makes the file at its full size when there are none."""
    size = bytes_needed(result.n_rows, result.d_model)
    try:
        done = int(json.loads((folder / PROGRESS).read_text())["batches"])
    except (OSError, ValueError, KeyError, TypeError):
        done = 0
    if done and result.path.is_file() and result.path.stat().st_size == size:
        return done
    free = shutil.disk_usage(folder).free
    if size > free:
        raise SaeError(
            f"The states need {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free."
            " Ask for fewer --tokens, or set MLXSTEER_CACHE to a larger disk."
        )
    with result.path.open("wb") as file:
        file.truncate(size)
    return 0
