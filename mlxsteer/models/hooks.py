"""Sites of a model: where a forward pass can be read or edited.

Hooks are installed once, on models that we load, and do nothing until a forward pass is given
a `Run`. A run is data of one pass (per thread), never state of the model: two passes with
different runs cannot feel each other. This module knows nothing of vectors or plans.

A model may bring its own sites (an attribute `taps` on each layer, as our DeepSeek-V4 does).
For every other mlx-lm model the layer objects get a subclass of their own class whose
`__call__` passes the result through the tap, so parameter names, saving and quantising see no
change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxsteer.errors import ModelError

Edit = Callable[[mx.array], mx.array]
Place = tuple[int, str]  # (0-based layer, site)

RESIDUAL = "residual"
STREAM = "stream"
ATTN_OUT = "attn_out"
FFN_OUT = "ffn_out"
SITES = (RESIDUAL, STREAM, ATTN_OUT, FFN_OUT)


@dataclass
class Run:
    """What one forward pass does at the sites: edits to apply, places to read.

    `captured` is filled during the pass with float32 arrays `[B, T, D]`, read after the edit.
    """

    edits: Mapping[Place, Edit] = field(default_factory=dict)
    capture: frozenset[Place] = frozenset()
    captured: dict[Place, mx.array] = field(default_factory=dict)


class Board:
    """The switchboard of one model: which run the current thread's forward pass carries."""

    def __init__(self, reading: Callable[[mx.array], mx.array]):
        self._local = threading.local()
        self._reading = reading

    @contextmanager
    def forward(self, run: Run | None) -> Iterator[None]:
        """Forward passes inside the block, in this thread, carry `run`."""
        before = getattr(self._local, "run", None)
        self._local.run = run
        try:
            yield
        finally:
            self._local.run = before

    def apply(self, layer: int, site: str, x: mx.array) -> mx.array:
        """`x` itself when the current run has nothing to do here, else the edited array."""
        run: Run | None = getattr(self._local, "run", None)
        if run is None:
            return x
        place = (layer, site)
        edit = run.edits.get(place)
        if edit is not None:
            x = edit(x)
        if place in run.capture:
            run.captured[place] = self._reading(x)
        return x


class Taps:
    """One layer's end of the board."""

    def __init__(self, board: Board, layer: int, site: str | None = None):
        self.board = board
        self.layer = layer
        self.site = site

    def apply(self, site: str, x: mx.array) -> mx.array:
        return self.board.apply(self.layer, site, x)

    def apply_to_output(self, out: Any) -> Any:
        """Pass a module's result through; of a tuple, its first element."""
        assert self.site is not None
        if isinstance(out, tuple):
            return (self.apply(self.site, out[0]), *out[1:])
        return self.apply(self.site, out)


@cache
def _tapped_class(original: type) -> type:
    """A subclass of `original`, of the same name, that passes its result through its tap."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.mlxsteer_tap.apply_to_output(original.__call__(self, *args, **kwargs))

    body = {
        "__call__": __call__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), body)


def tap_module(module: nn.Module, taps: Taps) -> None:
    """Make `module` pass its result through `taps`. Parameters and their names stay."""
    if not hasattr(module, "mlxsteer_tap"):
        module.__class__ = _tapped_class(type(module))
    module.mlxsteer_tap = taps


@dataclass(frozen=True)
class Writers:
    """The children of a block whose outputs it adds to the stream (names, or None)."""

    attn: str | None
    ffn: str | None


class Hooks:
    """The sites of one loaded model.

    `sites` are those that can be edited; writers' sites of a plain mlx-lm model are found when
    first asked for (see `adapters`), because finding them runs a few layers.
    """

    def __init__(self, model: nn.Module, find_writers: Callable[[Hooks], list[Writers]]):
        self.model = model
        self.layers: list[nn.Module] = decoder_layers(model)
        self.own_sites: tuple[str, ...] | None = getattr(model, "steering_sites", None)
        self.board = Board(getattr(model, "residual_reading", None) or _float32)
        self._find_writers = find_writers
        self._writers: list[Writers] | None = None
        self._lock = threading.Lock()
        for index, layer in enumerate(self.layers):
            if self.own_sites is not None:
                layer.taps = Taps(self.board, index)
            else:
                tap_module(layer, Taps(self.board, index, RESIDUAL))

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def architecture(self) -> str:
        return str(getattr(self.model, "model_type", type(self.model).__name__))

    def forward(self, run: Run | None) -> Any:
        """Context manager: forward passes in this thread carry `run`."""
        untapped = self._writers is None and self.own_sites is None
        if run and untapped and any(site != RESIDUAL for _, site in (*run.edits, *run.capture)):
            self.writers()  # their taps must be in before the pass, or nothing would happen
        return self.board.forward(run)

    def require(self, places: Iterable[Place]) -> None:
        """Make sure that every place can be edited; ModelError names the first that cannot."""
        for layer, site in sorted(set(places)):
            if not 0 <= layer < self.n_layers:
                raise ModelError(
                    f"Layer {layer} is out of range: {self.architecture} has layers 0 to"
                    f" {self.n_layers - 1}. Choose a vector made for this model."
                )
            if site not in self.sites_of(layer):
                raise ModelError(self._no_site(layer, site))

    def sites_of(self, layer: int) -> tuple[str, ...]:
        """The sites that layer `layer` offers."""
        if self.own_sites is not None:
            return self.own_sites
        writers = self.writers()[layer]
        found = [RESIDUAL]
        found += [ATTN_OUT] if writers.attn else []
        found += [FFN_OUT] if writers.ffn else []
        return tuple(found)

    def writers(self) -> list[Writers]:
        """Per layer, the children that write to the stream; found and tapped on first use."""
        with self._lock:
            if self._writers is None:
                self._writers = self._find_writers(self)
                for index, names in enumerate(self._writers):
                    for site, name in ((ATTN_OUT, names.attn), (FFN_OUT, names.ffn)):
                        if name:
                            child = getattr(self.layers[index], name)
                            tap_module(child, Taps(self.board, index, site))
            return self._writers

    def _no_site(self, layer: int, site: str) -> str:
        if site not in SITES:
            return f"Unknown site {site!r}. Sites are {', '.join(SITES)}."
        offered = ", ".join(self.sites_of(layer))
        return (
            f"Layer {layer} of {self.architecture} offers no site {site!r} (it offers {offered})."
            f" Use a vector made for one of those, or run `mlxsteer doctor` to see all layers."
        )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder blocks, in order. ModelError, by name, where there are none."""
    name = getattr(model, "model_type", type(model).__name__)
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers:
        raise ModelError(
            f"Cannot steer {name}: it exposes no list of decoder layers. Models of mlx-lm with"
            " a `layers` list work; `mlxsteer doctor --model NAME` says what was found."
        )
    if len({id(layer) for layer in layers}) != len(layers):
        raise ModelError(
            f"Cannot steer {name}: it uses one layer object at several depths, so an edit could"
            " not be told apart by layer. Choose another model."
        )
    return layers


def _float32(x: mx.array) -> mx.array:
    return x if x.dtype == mx.float32 else x.astype(mx.float32)
