"""From a model and a corpus to a dictionary on the shelf: the whole run, resumable.

Binds the parts together: windows of text and chats, states on disk, training, scores, the saved
folder with its provenance. Prints nothing; `cli.sae` does.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxsteer.errors import SaeError
from mlxsteer.files import atomic_path, cache_dir
from mlxsteer.sae import activations, chats, corpus, folder, index, indexing, score
from mlxsteer.sae.activations import Activations
from mlxsteer.sae.corpus import Window
from mlxsteer.sae.dictionary import Dictionary
from mlxsteer.sae.train import Recipe, train

if TYPE_CHECKING:
    from mlxsteer.model import Model

MEASURED_STEPS = 2
CORPUS, DENSITY = "corpus.safetensors", "density.safetensors"


@dataclass(frozen=True)
class Order:
    """What to build: from which text, on which states, by which recipe.

    sources: see `corpus.documents`. self_chats: chats that the model writes for it.
    tokens: states to read, at most what the corpus has; the sources share them evenly.
    """

    layer: int
    site: str = "residual"
    sources: tuple[str, ...] = corpus.AT_HAND
    self_chats: int = 0
    tokens: int = 200_000
    context: int = corpus.CONTEXT
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class Cost:
    """What an order takes: states read, states seen in training, seconds of each part (of this
    machine, now), bytes on disk while it runs, bytes of the dictionary."""

    tokens: int
    seen: int
    reading_seconds: float
    training_seconds: float
    buffer_bytes: int
    dictionary_bytes: int


def work_folder(model: Model, order: Order) -> Path:
    """Where the unfinished part of exactly this order lies."""
    files = [(source, _stamp(source)) for source in order.sources]
    facts = (model.stamp["weights_fingerprint"], model.dtype, order, files)
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    return cache_dir() / "sae" / model.key / name


def gather(model: Model, order: Order, *, show_progress: bool = True) -> list[Window]:
    """The windows of an order; writes its chats first, where it asks for any."""
    if order.layer >= model.n_layers:
        raise SaeError(
            f"Layer {order.layer} is out of range: {model.label} has layers 0 to"
            f" {model.n_layers - 1}."
        )
    if model.context_length and order.context > model.context_length:
        raise SaeError(
            f"A window of {order.context} tokens is too long: {model.label} was made for"
            f" {model.context_length}. Give a smaller --context."
        )
    model.hooks.require([(order.layer, order.site)])
    sources = [
        list(corpus.windows(model, corpus.documents(source), order.context))
        for source in order.sources
    ]
    rest, own = order.tokens, list[Window]()
    if order.self_chats:
        store = work_folder(model, order) / "chats"
        seed = order.recipe.seed
        written = chats.write(
            model, order.self_chats, store, seed=seed, show_progress=show_progress
        )
        # All of them are kept, however few tokens are asked for: they were the costly part.
        own = list(corpus.windows(model, written, order.context))
        rest -= sum(window.kept for window in own)
    found = own + corpus.shared_out(sources, rest, order.recipe.seed)
    found = corpus.chosen(found, order.tokens, order.recipe.seed)
    if not found:
        raise SaeError("The corpus holds no text. Give --corpus files, or --self-chats.")
    return found


def estimate(model: Model, order: Order, found: Sequence[Window]) -> Cost:
    """The cost of an order, from one batch read and two steps of training, timed here."""
    train_windows, _ = activations.split(found)
    batch = max(
        activations.batched(train_windows), key=lambda part: sum(window.kept for window in part)
    )
    activations.read_batch(model, batch[:1], order.layer, order.site)  # weights into memory
    reading, states = _timed(lambda: activations.read_batch(model, batch, order.layer, order.site))
    tokens = sum(window.kept for window in found)
    n_train = sum(window.kept for window in train_windows)
    recipe, steps = order.recipe, order.recipe.steps(n_train)
    per_step = _step_seconds(recipe, states)
    return Cost(
        tokens=tokens,
        seen=steps * recipe.batch,
        reading_seconds=reading * tokens / sum(window.kept for window in batch),
        training_seconds=per_step * steps,
        buffer_bytes=activations.bytes_needed(tokens, model.d_model)
        + 6 * 4 * model.d_model * recipe.features,
        dictionary_bytes=2 * 4 * model.d_model * recipe.features,
    )


def build(
    model: Model,
    order: Order,
    found: Sequence[Window],
    out: Path,
    *,
    show_progress: bool = True,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Dictionary:
    """Train the dictionary of `order` on the windows `found` and save it in `out`.

    Interrupted, the same call goes on where it stopped. The buffer of states is removed at the
    end; what stays in `out`: the SAELens folder, our facts, `corpus.safetensors` (the windows),
    `density.safetensors` ([F], share of states on which each feature fires) and the index.
    """
    work = work_folder(model, order)
    started = time.time()
    data = activations.capture(
        model, found, order.layer, order.site, work, show_progress=show_progress
    )
    dictionary, log = train(data, order.recipe, work / "checkpoint.safetensors", on_step=on_step)
    fitted, density = score.fit(dictionary, data)
    _, held = activations.split(found)
    mean = data.sample(8192).mean(axis=0)
    spliced = score.splice(model, dictionary, held, order.layer, order.site, mean)
    about = {
        **_provenance(model, order, found),
        "fit": fitted.row(),
        "splice": spliced.row(),
        "log": log,
        "seconds_of_last_run": round(time.time() - started, 1),
    }
    dictionary = replace(dictionary, about=about)
    folder.write(dictionary, out)
    _save_extras(out, found, density)
    found_index = indexing.of_activations(
        model, dictionary, found, data, show_progress=show_progress
    )
    index.write(found_index, out)
    shutil.rmtree(work, ignore_errors=True)
    return dictionary


def kept_windows(path: Path) -> list[Window]:
    """The windows that a dictionary was trained on, held-out ones last; [] when not kept."""
    if not (path / CORPUS).is_file():
        return []
    arrays: Any = mx.load(str(path / CORPUS))
    tokens, ends, starts = (np.array(arrays[name]) for name in ("tokens", "ends", "starts"))
    rows = np.split(tokens, ends[:-1])
    return [Window(tuple(row.tolist()), int(s)) for row, s in zip(rows, starts, strict=True)]


def kept_density(path: Path) -> np.ndarray | None:
    """float32 [F] share of training states on which each feature fires; None when not kept."""
    if not (path / DENSITY).is_file():
        return None
    arrays: Any = mx.load(str(path / DENSITY))
    return np.array(arrays["density"])


def _save_extras(out: Path, found: Sequence[Window], density: np.ndarray) -> None:
    lengths = [len(window.tokens) for window in found]
    arrays = {
        "tokens": np.concatenate([np.array(window.tokens, np.int32) for window in found]),
        "ends": np.cumsum(lengths).astype(np.int64),
        "starts": np.array([window.start for window in found], np.int32),
    }
    for name, held in ((CORPUS, arrays), (DENSITY, {"density": density.astype(np.float32)})):
        with atomic_path(out / name) as temporary:
            mx.save_safetensors(str(temporary), {k: mx.array(v) for k, v in held.items()})


def _provenance(model: Model, order: Order, found: Sequence[Window]) -> dict[str, Any]:
    facts = {key: value for key, value in model.stamp.items() if value is not None}
    return {
        "model": model.label,
        "model_stamp": facts,
        "layer": order.layer,
        "site": order.site,
        "context_size": order.context,
        "sources": list(order.sources),
        "self_chats": order.self_chats,
        "tokens": sum(window.kept for window in found),
        "corpus_sha256": corpus.digest(found),
        "recipe": asdict(order.recipe),
        "training_architecture": order.recipe.architecture,
    }


def _step_seconds(recipe: Recipe, states: mx.array) -> float:
    """Seconds of one training step on this machine, by taking two."""
    rows = np.array(states.astype(mx.bfloat16).view(mx.uint16))
    repeated = np.resize(rows, (recipe.batch, rows.shape[1]))
    work = cache_dir() / "sae" / f".measure-{time.time_ns()}.bf16"
    with atomic_path(work) as temporary:
        temporary.write_bytes(repeated.tobytes())
    try:
        few = Activations(work, rows.shape[1], recipe.batch, recipe.batch)
        recipe = replace(recipe, epochs=1000.0)
        first, _ = _timed(lambda: train(few, recipe, stop_after=1))
        more, _ = _timed(lambda: train(few, recipe, stop_after=1 + MEASURED_STEPS))
    finally:
        work.unlink(missing_ok=True)
    return max(0.0, more - first) / MEASURED_STEPS


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _stamp(source: str) -> tuple[int, int] | None:
    """What tells that a corpus file was changed."""
    path = Path(source).expanduser()
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
