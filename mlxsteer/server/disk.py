"""Long prompts on disk, so that a restart goes on where the last server was.

An entry is two files: the arrays (safetensors), then a JSON file that says what they are, with
their size and SHA-256. Both are written whole or not at all, the JSON last, so a server that is
killed leaves nothing that would be believed: what has no JSON is removed at the next start. An
entry of another model, version or damaged content is removed with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

import mlxsteer
from mlxsteer.errors import MlxsteerError
from mlxsteer.files import atomic_path, write_text
from mlxsteer.server.prefix import Codes, Entry, common_length

if TYPE_CHECKING:
    from mlxsteer.model import Model

FORMAT = 1
DEFAULT_BYTES = 20 << 30
MIN_TOKENS = 1024  # below that a prompt is processed about as fast as it is read and checked

log = logging.getLogger("mlxsteer.server")


@dataclass(eq=False)
class Stored:
    """One entry on disk: its two files, the codes of its positions, bytes."""

    arrays: Path
    facts: Path
    codes: Codes
    trimmable: bool
    nbytes: int

    def usable(self, wanted: Codes) -> int:
        """As `Entry.usable`."""
        common = common_length(self.codes, wanted)
        return common if self.trimmable or common == len(self.codes) else 0

    def remove(self) -> None:
        for path in (self.facts, self.arrays):
            with suppress(OSError):
                path.unlink(missing_ok=True)


class DiskTier:
    """The kept prompts of one model in `folder`; beyond `max_bytes` the longest unused go.

    min_tokens: prompts are written when at least that many of their tokens are not there yet.
    Writing and reading happen on the engine's thread, between two steps.
    """

    def __init__(
        self,
        model: Model,
        folder: Path,
        *,
        max_bytes: int = DEFAULT_BYTES,
        min_tokens: int = MIN_TOKENS,
    ) -> None:
        self.model = model
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.min_tokens = min_tokens
        self._maker = _maker_of(model)
        self._stored = self._found()
        self._evict()

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self._stored)

    def longest(self, codes: Codes, beyond: int) -> Entry | None:
        """The entry that saves most of `codes`, if `min_tokens` more than `beyond`."""
        best = max(self._stored, key=lambda stored: stored.usable(codes), default=None)
        if best is None or best.usable(codes) < beyond + self.min_tokens:
            return None
        try:
            entry = self._read(best)
        except (OSError, ValueError, KeyError, RuntimeError, MlxsteerError) as error:
            log.warning("a kept prompt is damaged and was removed: %s", error)
            self._drop(best)
            return None
        self._stored.append(self._stored.pop(self._stored.index(best)))
        with suppress(OSError):
            os.utime(best.facts)
        return entry

    def keep(self, entry: Entry) -> None:
        """Write a long entry. A disk that refuses is a warning, nothing more."""
        known = max((s.usable(entry.codes) for s in self._stored), default=0)
        if len(entry.codes) < known + self.min_tokens or entry.nbytes > self.max_bytes:
            return
        try:
            self._stored.append(self._written(entry))
        except MlxsteerError as error:
            log.warning("a prompt could not be kept on disk: %s", error)
        self._evict()

    # --- files ---------------------------------------------------------------------------

    def _found(self) -> list[Stored]:
        """What earlier servers left, oldest use first; removes what cannot be used."""
        if not self.folder.is_dir():
            return []
        found = []
        for facts in self.folder.glob("*.json"):
            stored = self._opened(facts)
            if stored is not None:
                found.append((facts.stat().st_mtime, stored))
        known = {stored.arrays for _, stored in found}
        for stray in self.folder.glob("*.safetensors"):
            if stray not in known:
                stray.unlink(missing_ok=True)
        return [stored for _, stored in sorted(found, key=lambda item: item[0])]

    def _opened(self, path: Path) -> Stored | None:
        arrays = path.with_suffix(".safetensors")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["format"] != FORMAT or facts["maker"] != self._maker:
                raise ValueError("it was written by another version or for another model")
            codes = np.frombuffer(bytes.fromhex(facts["codes"]), np.uint64)
            nbytes = int(facts["nbytes"])
            if arrays.stat().st_size != nbytes:
                raise ValueError("its size is not the one noted")
            return Stored(arrays, path, codes, bool(facts["trimmable"]), nbytes)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("removed the kept prompt %s: %s", path.name, error)
            for file in (path, arrays):
                with suppress(OSError):
                    file.unlink(missing_ok=True)
            return None

    def _read(self, stored: Stored) -> Entry:
        facts = json.loads(stored.facts.read_text(encoding="utf-8"))
        if _sha256(stored.arrays) != facts["sha256"]:
            raise ValueError(f"{stored.arrays.name} does not have the noted SHA-256")
        leaves = [*_load(stored.arrays).items(), *facts["scalars"].items()]
        states = cast(list[Any], tree_unflatten(leaves))
        fresh = make_prompt_cache(self.model.hooks.model)
        if facts["classes"] != _classes(fresh) or len(states) != len(fresh):
            raise ValueError("its caches are of other kinds than the model's")
        cache = [type(made).from_state(state) for made, state in zip(fresh, states, strict=True)]
        mx.eval([entry.state for entry in cache])  # not when the file may be gone
        nbytes = sum(entry.nbytes for entry in cache)
        return Entry(stored.codes, cache, stored.trimmable, nbytes)

    def _written(self, entry: Entry) -> Stored:
        name = hashlib.sha256(entry.codes.tobytes()).hexdigest()[:32]
        arrays, facts = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        leaves = dict(cast(Any, tree_flatten([layer.state for layer in entry.cache])))
        with atomic_path(arrays) as temporary:
            tensors = {key: leaf for key, leaf in leaves.items() if isinstance(leaf, mx.array)}
            mx.save_safetensors(str(temporary), tensors)
            nbytes, digest = temporary.stat().st_size, _sha256(temporary)
        about = {
            "format": FORMAT,
            "maker": self._maker,
            "codes": entry.codes.tobytes().hex(),
            "trimmable": entry.trimmable,
            "classes": _classes(entry.cache),
            "scalars": {k: leaf for k, leaf in leaves.items() if not isinstance(leaf, mx.array)},
            "nbytes": nbytes,
            "sha256": digest,
        }
        write_text(facts, json.dumps(about))
        return Stored(arrays, facts, entry.codes, entry.trimmable, nbytes)

    def _drop(self, stored: Stored) -> None:
        self._stored.remove(stored)
        stored.remove()

    def _evict(self) -> None:
        while self._stored and self.nbytes > self.max_bytes:
            self._drop(self._stored[0])


def _maker_of(model: Model) -> str:
    """What must agree for a kept state to be the one that would be computed."""
    rounding = getattr(getattr(model.network, "args", None), "activation_rounding", None)
    facts = [
        mlxsteer.__version__,
        mlx_lm.__version__,
        model.stamp["architecture"],
        model.stamp["config_sha256"],
        model.stamp["weights_fingerprint"],
        str(model.dtype),
        rounding,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _classes(cache: Sequence[Any]) -> list[str]:
    return [type(entry).__name__ for entry in cache]


def _load(path: Path) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], mx.load(str(path)))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
