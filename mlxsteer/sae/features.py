"""A feature becomes a vector: `sae/1234`, `sae/NAME/1234`, `sae/a label`, and with `/clamp`.

Owns how features are named and what a dictionary's row means as a `SteeringVector`. A feature
that was calibrated lies among the user's vectors; everything else of it comes from the dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from mlxsteer import library
from mlxsteer.errors import SaeError, near_matches
from mlxsteer.sae import shelf
from mlxsteer.sae.dictionary import Dictionary
from mlxsteer.sae.folder import CONFIG, WEIGHTS, read
from mlxsteer.sae.labels import labels_of
from mlxsteer.vector import Encoder, SteeringVector
from mlxsteer.vectorfile import MODEL_KEYS

PREFIX = library.FEATURES
CLAMP = "/clamp"  # at a name's end: set the feature in place of adding to it
MAX_READ = 2  # dictionaries kept in memory
STATEWISE = ("constant_norm_rescale", "layer_norm")


@dataclass(frozen=True)
class FeatureName:
    """Which feature of which of a model's dictionaries is meant, and what is done with it."""

    dictionary: str
    index: int
    clamp: bool

    def __str__(self) -> str:
        return f"{PREFIX}{self.dictionary}/{self.index}{CLAMP if self.clamp else ''}"

    @property
    def file_name(self) -> str:
        """What the user's calibrated vector of it is called."""
        return str(self).replace("/", "-")


def find(name: str, key: str) -> SteeringVector:
    """The vector of the feature called `name` for the model with `key`.

    Calibrated, if that was done and the dictionary is still the same. Raises SaeError.
    """
    feature = resolve(name, key)
    made = vector_of(opened(shelf.available(key)[feature.dictionary]), feature)
    path = kept_path(feature, key)
    if not path.is_file():
        return made
    kept = SteeringVector.load(path)
    (layer, direction), *_ = made.directions.items()
    same = layer in kept.directions and np.allclose(kept.directions[layer], direction, atol=1e-5)
    return replace(made, calibration=kept.calibration) if same else made


def kept_path(feature: FeatureName, key: str) -> Path:
    """Where a feature's calibrated vector goes."""
    return library.user_dir(key) / f"{feature.file_name}{library.SUFFIX}"


def resolve(name: str, key: str) -> FeatureName:
    """What a name such as `sae/1234` means for a model. SaeError when nothing, or too much."""
    rest = name.removeprefix(PREFIX)
    clamp = rest.endswith(CLAMP)
    rest = rest.removesuffix(CLAMP)
    known = shelf.available(key)
    head, slash, tail = rest.partition("/")
    if slash and head in known:
        return FeatureName(head, _index(tail, head, known[head]), clamp)
    if len(known) == 1:
        ((dictionary, path),) = known.items()
        return FeatureName(dictionary, _index(rest, dictionary, path), clamp)
    labelled = {dictionary: _by_label(rest, path) for dictionary, path in known.items()}
    found = [(dictionary, index) for dictionary, index in labelled.items() if index is not None]
    if len(found) == 1:
        return FeatureName(*found[0], clamp)
    raise SaeError(_unclear(name, rest, key, [dictionary for dictionary, _ in found] or known))


def vector_of(dictionary: Dictionary, feature: FeatureName) -> SteeringVector:
    """A feature's decoder row as a vector at its layer; with its encoder for a clamp.

    `NAME:2r` adds, or sets, activation 2. Raises SaeError for a dictionary whose place is not
    known, or whose reading is not one affine function of the state.
    """
    layer, site = dictionary.layer, dictionary.site
    if layer is None or site is None:
        raise SaeError(
            f"Nothing says after which layer {feature.dictionary!r} reads. Take it in again:"
            " mlxsteer sae import FOLDER --layer 15 --site residual --force"
        )
    row = dictionary.feature(feature.index)
    if not row.any():
        raise SaeError(f"Feature {feature.index} of {feature.dictionary!r} is dead: all zeros.")
    facts = dictionary.about.get("model_stamp") or {}
    return SteeringVector.from_arrays(
        {layer: row},
        op="clamp" if feature.clamp else "add",
        site=site,
        name=str(feature),
        encoder=encoder_of(dictionary, feature.index) if feature.clamp else None,
        model={name: facts[name] for name in MODEL_KEYS if name in facts},
        about={
            "method": "sparse autoencoder",
            "dictionary": feature.dictionary,
            "feature": feature.index,
            "group": "features",
        },
    )


def encoder_of(dictionary: Dictionary, index: int) -> Encoder:
    """The affine reading of a feature, in lengths along its unit decoder direction.

    Of a topk dictionary, in which features compete for k places, f is what the feature would
    read if it had one of them. Raises SaeError where states are normalised one by one.
    """
    d = dictionary
    if d.normalize_activations in STATEWISE:
        raise SaeError(
            f"A dictionary with {d.normalize_activations} reads each state on its own scale, so"
            " its features can be added but not clamped. Leave out /clamp."
        )
    row, threshold = np.array(d.W_enc[:, index], np.float64), 0.0
    if d.gate is not None:
        r, b_gate, bias = (
            float(array[index]) for array in (d.gate.r_mag, d.gate.b_gate, d.gate.b_mag)
        )
        # The gate is open where pre + b_gate > 0; read on the magnitude, pre·e^r + b_mag.
        row, threshold = row * np.exp(r), bias - b_gate * np.exp(r)
    else:
        assert d.b_enc is not None
        bias = float(d.b_enc[index])
        threshold = float(d.threshold[index]) if d.threshold is not None else 0.0
    if d.apply_b_dec_to_input:
        bias -= float(row @ np.array(d.b_dec, np.float64))
    length = float(np.linalg.norm(d.feature(index)))
    return Encoder((row * length).astype(np.float32), bias * length, max(0.0, threshold) * length)


def opened(path: Path) -> Dictionary:
    """The dictionary of a folder or file, read once until it changes."""
    marks = [path / WEIGHTS, path / CONFIG] if path.is_dir() else [path]
    return _read(path, tuple(mark.stat().st_mtime_ns for mark in marks if mark.is_file()))


@lru_cache(maxsize=MAX_READ)
def _read(path: Path, changed: tuple[int, ...]) -> Dictionary:
    return read(path)


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\d+", text))


def _index(text: str, dictionary: str, path: Path) -> int:
    """The feature that a number or a label means."""
    if _is_number(text):
        return int(text)
    found = _by_label(text, path)
    if found is None:
        head, _, tail = text.partition("/")
        if _is_number(head):
            raise SaeError(
                f"{tail!r} is no op of a feature. Type {PREFIX}{head}, to add, or"
                f" {PREFIX}{head}{CLAMP}."
            )
        if _is_number(tail):
            raise SaeError(
                f"There is no dictionary {head!r}; `mlxsteer sae list` shows them."
                f" Of {dictionary!r}, type {PREFIX}{dictionary}/{tail}"
            )
        labels = [label.text for label in labels_of(path).values()]
        raise SaeError(
            f"No feature of {dictionary!r} is labelled {text!r}.{near_matches(text, labels)}"
            f" Features are found with: mlxsteer sae find {text!r}"
        )
    return found


def _by_label(text: str, path: Path) -> int | None:
    """The feature with that label; of several, the one whose label was detected best."""
    wanted = text.casefold()
    found = [(label.accuracy, i) for i, label in labels_of(path).items()
             if label.text.casefold() == wanted]  # fmt: skip
    return max(found)[1] if found else None


def _unclear(name: str, rest: str, key: str, choices: Iterable[str]) -> str:
    typed = [f"{PREFIX}{dictionary}/{rest}" for dictionary in choices]
    if not typed:
        return (
            f"There is no dictionary for {key}, so {name!r} means nothing yet. Train one:"
            " mlxsteer sae train --layer 15 --dry-run"
        )
    return (
        f"{name!r} does not say which dictionary of {key} it means. Type {' or '.join(typed)};"
        f" features are found with: mlxsteer sae find {rest!r}"
    )
