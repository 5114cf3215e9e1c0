"""Reads a model's states over many sequences: batched, shared prefixes once, in resumable pieces.

Knows tokens and spans, not what they mean; `extract` asks and interprets.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxsteer.files import atomic_path
from mlxsteer.models.hooks import Run
from mlxsteer.progress import progress

if TYPE_CHECKING:
    from mlxsteer.model import Model

MAX_BATCH_TOKENS = 4096
PASS_OVERHEAD = 16  # tokens that a further forward pass is worth, when groups are chosen

Span = tuple[int, int]


@dataclass(frozen=True)
class Passage:
    """Tokens, and the named spans [start, end) over which the states are averaged."""

    tokens: tuple[int, ...]
    spans: Mapping[str, Span]

    @property
    def free_prefix(self) -> int:
        """How many leading tokens no span reads; at least one token stays out of any prefix."""
        return min([len(self.tokens) - 1, *(start for start, _ in self.spans.values())])


@dataclass(frozen=True)
class Group:
    """Passages (by index) whose first `prefix` tokens are the same and are run once."""

    members: tuple[int, ...]
    prefix: int


@dataclass(frozen=True)
class Readings:
    """means: {span name: float32 [N, layers, D]}; tokens_run: tokens that went through the model
    in this call or the ones it resumed, padding left out; tokens_given: the sum of all passages'
    lengths."""

    means: dict[str, np.ndarray]
    tokens_run: int
    tokens_given: int


def read(
    model: Model,
    passages: Sequence[Passage],
    layers: Sequence[int],
    site: str,
    *,
    label: str,
    store: Path | None = None,
    show_progress: bool = True,
) -> Readings:
    """Span means of the states at `site` of `layers`, for every passage.

    Layers above the highest of `layers` are never computed (MLX evaluates what is read).
    store: a folder for finished groups; an interrupted call with the same store goes on there.
    """
    model.hooks.require((layer, site) for layer in layers)
    groups = group_by_prefix(passages, shareable=_can_share(model))
    names = sorted({name for passage in passages for name in passage.spans})
    shape = (len(passages), len(layers), model.d_model)
    means = {name: np.zeros(shape, np.float32) for name in names}
    with progress(label, len(passages), enabled=show_progress) as advance:
        for group in groups:
            path = _file(store, group)
            found = _kept(path, names, (len(group.members), *shape[1:]))
            if found is None:
                found = _run_group(model, passages, group, layers, site)
                _keep(path, found)
            for name in names:
                means[name][list(group.members)] = found[name]
            advance(len(group.members))
    if store is not None:
        shutil.rmtree(store, ignore_errors=True)
    return Readings(
        means,
        tokens_run=sum(_cost(passages, group) for group in groups),
        tokens_given=sum(len(passage.tokens) for passage in passages),
    )


def group_by_prefix(passages: Sequence[Passage], *, shareable: bool = True) -> list[Group]:
    """Groups of passages that cost the least in all, each group one batch.

    Cost: positions run, padding included, and `PASS_OVERHEAD` for every forward pass.
    Sorted passages with a common prefix are neighbours, so the best partition of the sorted
    list into runs is found by dynamic programming.
    """
    order = sorted(range(len(passages)), key=lambda i: (passages[i].tokens, i))
    best: list[tuple[int, int]] = [(0, 0)]  # (cost, where the last run begins) up to here
    for end in range(1, len(order) + 1):
        options = []
        prefix = longest = 0
        for start in range(end - 1, -1, -1):
            passage = passages[order[start]]
            if start == end - 1:
                prefix = passage.free_prefix
            else:
                nearer = passages[order[start + 1]].tokens
                prefix = min(prefix, passage.free_prefix, _common(passage.tokens, nearer))
            longest = max(longest, len(passage.tokens))
            rows = end - start
            shared = prefix if shareable else 0
            if rows > 1 and rows * (longest - shared) > MAX_BATCH_TOKENS:
                break
            positions = shared + rows * (longest - shared)
            cost = positions + PASS_OVERHEAD * (2 if shared and rows > 1 else 1)
            options.append((best[start][0] + cost, start))
        best.append(min(options))
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(_group(passages, order[start:end], shareable))
        end = start
    return groups[::-1]


def _group(passages: Sequence[Passage], members: Sequence[int], shareable: bool) -> Group:
    first = passages[members[0]]
    shared = first.free_prefix
    for member in members[1:]:
        shared = min(
            shared, passages[member].free_prefix, _common(first.tokens, passages[member].tokens)
        )
    return Group(tuple(members), shared if shareable and len(members) > 1 else 0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _cost(passages: Sequence[Passage], group: Group) -> int:
    rest = sum(len(passages[member].tokens) - group.prefix for member in group.members)
    return group.prefix + rest


def _can_share(model: Model) -> bool:
    return all(type(entry) is KVCache for entry in make_prompt_cache(model.network))


def _run_group(
    model: Model, passages: Sequence[Passage], group: Group, layers: Sequence[int], site: str
) -> dict[str, np.ndarray]:
    """{span name: [rows, layers, D]} of one group."""
    tokens = [passages[member].tokens for member in group.members]
    rest = [row[group.prefix :] for row in tokens]
    longest = max(map(len, rest))
    padded = mx.array([[*row, *[0] * (longest - len(row))] for row in rest])
    cache = _prefix_cache(model, tokens[0][: group.prefix], len(tokens)) if group.prefix else None
    run = Run(capture=frozenset((layer, site) for layer in layers))
    with model.hooks.forward(run):
        model.network(padded, cache=cache)
    states = mx.stack([run.captured[layer, site] for layer in layers], axis=1)  # [B, L, S, D]
    found = {}
    for name in passages[group.members[0]].spans:
        spans = [passages[member].spans[name] for member in group.members]
        weights = mx.array(_span_weights(spans, group.prefix, longest))
        found[name] = np.array((weights[:, None, None, :] @ states)[:, :, 0])
    mx.clear_cache()
    return found


def _span_weights(spans: Sequence[Span], prefix: int, length: int) -> np.ndarray:
    """float32 [B, length]: 1/n over each row's span of n positions, 0 elsewhere."""
    weights = np.zeros((len(spans), length), np.float32)
    for row, (start, end) in enumerate(spans):
        weights[row, start - prefix : end - prefix] = 1.0 / (end - start)
    return weights


def _prefix_cache(model: Model, prefix: Sequence[int], rows: int) -> list[Any]:
    """Caches of `rows` rows that all hold `prefix`, which runs once."""
    cache = make_prompt_cache(model.network)
    model.network(mx.array([list(prefix)]), cache=cache)
    copies = []
    for entry in cache:
        keys, values = entry.keys_and_values()
        copy = KVCache()
        copy.keys, copy.values = mx.repeat(keys, rows, axis=0), mx.repeat(values, rows, axis=0)
        copy.offset = len(prefix)
        copies.append(copy)
    return copies


def _file(store: Path | None, group: Group) -> Path | None:
    """Named by what it holds: a version that groups otherwise finds nothing to mistake."""
    digest = hashlib.sha256(repr((group.members, group.prefix)).encode()).hexdigest()
    return store / f"{digest[:32]}.npz" if store else None


def _kept(
    path: Path | None, names: Sequence[str], shape: tuple[int, ...]
) -> dict[str, np.ndarray] | None:
    """What an earlier call left at `path`; None when there is nothing whole of that shape."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    whole = sorted(found) == list(names) and all(a.shape == shape for a in found.values())
    return found if whole else None


def _keep(path: Path | None, found: Mapping[str, np.ndarray]) -> None:
    if path is None:
        return
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **found)  # type: ignore[arg-type]
