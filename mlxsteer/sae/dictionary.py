"""A sparse autoencoder: states become activations of features, and features become states.

Pure arithmetic in float32 for the five architectures that SAELens folders hold. Knows where it
belongs (`about`), but neither files nor models.

Shapes: states `[…, D]`, activations `[…, F]`; D the width of the model, F the number of features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.errors import SaeError

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu", "gated")
NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
LAYER_NORM_EPS = 1e-5  # added to the deviation, as SAELens does
_HOOK = re.compile(r"blocks\.(\d+)\.hook_(resid_post|resid_pre|mlp_out|attn_out)\Z")
_SITES = {"resid_post": "residual", "resid_pre": "residual", "mlp_out": "ffn_out"}


@dataclass(frozen=True)
class Gate:
    """The gate of a gated autoencoder (Rajamanoharan et al. 2024, "Improving Dictionary
    Learning with Gated Sparse Autoencoders", section 3.2): b_gate, r_mag, b_mag, each [F]."""

    b_gate: mx.array
    r_mag: mx.array
    b_mag: mx.array


@dataclass(frozen=True)
class Dictionary:
    """F features over states of width D.

    W_enc: [D, F]. b_enc: [F] (None: gated). W_dec: [F, D]. b_dec: [D].
    threshold: [F], of jumprelu and batchtopk: a pre-activation must exceed it.
    k: features per state, of topk. gate: of gated.
    normalize_activations: what is done to states on the way in, and undone on the way out;
        `expected_average_only_in` is one factor, which `with_input_scale` folds into the weights.
    about: where it comes from and belongs: `model`, `layer`, `site`, `hook_name`, and anything
        that a folder's configuration or our trainer says.
    """

    architecture: str
    W_enc: mx.array
    W_dec: mx.array
    b_dec: mx.array
    b_enc: mx.array | None = None
    threshold: mx.array | None = None
    k: int | None = None
    gate: Gate | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_words(self)
        _check_shapes(self)

    # --- facts ---------------------------------------------------------------------------

    @property
    def d_model(self) -> int:
        return int(self.W_dec.shape[1])

    @property
    def n_features(self) -> int:
        return int(self.W_dec.shape[0])

    @property
    def layer(self) -> int | None:
        """The 0-based layer whose states it reads; None when nothing says so."""
        layer = self.about.get("layer")
        return _place(self.about.get("hook_name"))[0] if layer is None else int(layer)

    @property
    def site(self) -> str | None:
        """The site that it reads (`residual`, `ffn_out`, `attn_out`); None when unknown."""
        return self.about.get("site") or _place(self.about.get("hook_name"))[1]

    def feature(self, index: int) -> np.ndarray:
        """float32 [D]: the decoder's direction of a feature, at the length that it is stored.

        Adding `c` times it to a state is what activation `c` of the feature means. SaeError
        when there is no such feature.
        """
        return np.array(self.W_dec[self._checked(index)])

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.n_features:
            raise SaeError(
                f"There is no feature {index}: this dictionary has 0 to {self.n_features - 1}."
            )
        return int(index)

    # --- arithmetic ----------------------------------------------------------------------

    def encode(self, x: mx.array, features: Sequence[int] | None = None) -> mx.array:
        """Activations [..., F] ≥ 0 of states x [..., D]; of `features` [n] alone: [..., n].

        Reading a few features costs only their columns, except for topk, where every feature
        takes part in the choice.
        """
        x, _ = self._normalised(x.astype(mx.float32))
        if self.apply_b_dec_to_input:
            x = x - self.b_dec
        if self.architecture == "topk":
            assert self.b_enc is not None
            assert self.k is not None
            acts = _largest(x @ self.W_enc + self.b_enc, self.k)
            return acts if features is None else acts[..., self._columns(features)]
        chosen = None if features is None else self._columns(features)
        return self._activate(x, chosen)

    def decode(self, acts: mx.array, like: mx.array | None = None) -> mx.array:
        """States [..., D] of activations [..., F].

        like: the states [..., D] that were encoded; needed where normalisation took away their
        norm (constant_norm_rescale) or mean and deviation (layer_norm), which come back here.
        """
        out = acts @ self.W_dec + self.b_dec
        if self.normalize_activations not in ("constant_norm_rescale", "layer_norm"):
            return out
        if like is None:
            raise SaeError(
                f"A dictionary with {self.normalize_activations} needs the encoded states to"
                " decode: decode(acts, like=states)."
            )
        _, (scale, shift) = self._normalised(like.astype(mx.float32))
        return out * scale + shift

    def reconstruct(self, x: mx.array) -> mx.array:
        """float32 [..., D]: the states as the features tell them."""
        return self.decode(self.encode(x), like=x)

    def with_input_scale(self, factor: float) -> Dictionary:
        """The dictionary for plain states, of one trained on states multiplied by `factor`.

        For `expected_average_only_in` the factor is √D / mean ‖x‖ over the model's states
        (Anthropic, April 2024 update). Activations are unchanged.
        """
        if not np.isfinite(factor) or factor <= 0:
            raise SaeError(f"An input scale is a positive number, not {factor}.")
        return replace(
            self,
            W_enc=self.W_enc * factor,
            W_dec=self.W_dec / factor,
            b_dec=self.b_dec / factor,
            normalize_activations="none",
        )

    def _columns(self, features: Sequence[int]) -> mx.array:
        return mx.array([self._checked(index) for index in features])

    def _activate(self, x: mx.array, chosen: mx.array | None) -> mx.array:
        def of(array: mx.array) -> mx.array:
            return array if chosen is None else array[..., chosen]

        pre = x @ of(self.W_enc)
        if self.gate is not None:
            magnitude = pre * mx.exp(of(self.gate.r_mag)) + of(self.gate.b_mag)
            return mx.maximum(magnitude, 0) * (pre + of(self.gate.b_gate) > 0)
        assert self.b_enc is not None
        pre = pre + of(self.b_enc)
        acts = mx.maximum(pre, 0)
        return acts if self.threshold is None else acts * (pre > of(self.threshold))

    def _normalised(self, x: mx.array) -> tuple[mx.array, tuple[mx.array | float, Any]]:
        """(x as the encoder takes it, (scale, shift) that take it back)."""
        if self.normalize_activations == "constant_norm_rescale":
            scale = mx.linalg.norm(x, axis=-1, keepdims=True) / self.d_model**0.5
            return x / scale, (scale, 0.0)
        if self.normalize_activations == "layer_norm":
            mean = x.mean(axis=-1, keepdims=True)
            deviation = mx.std(x, axis=-1, keepdims=True, ddof=1)
            return (x - mean) / (deviation + LAYER_NORM_EPS), (deviation, mean)
        return x, (1.0, 0.0)


def _largest(pre: mx.array, k: int) -> mx.array:
    """[..., F]: ReLU of the k largest of each row, zeros elsewhere (Gao et al. 2024, eq. 4)."""
    indices = mx.argpartition(-pre, k - 1, axis=-1)[..., :k]
    values = mx.maximum(mx.take_along_axis(pre, indices, axis=-1), 0)
    return mx.put_along_axis(mx.zeros_like(pre), indices, values, axis=-1)


def _place(hook_name: Any) -> tuple[int | None, str | None]:
    """(layer, site) of a TransformerLens hook name; what enters block L is what left L - 1."""
    match = _HOOK.match(str(hook_name))
    if not match:
        return None, None
    layer = int(match[1]) - (match[2] == "resid_pre")
    return (None, None) if layer < 0 else (layer, _SITES.get(match[2], match[2]))


def _check_words(d: Dictionary) -> None:
    for what, value, known in (
        ("architecture", d.architecture, ARCHITECTURES),
        ("normalize_activations", d.normalize_activations, NORMALISATIONS),
    ):
        if value not in known:
            raise SaeError(f"Unknown {what} {value!r}: {', '.join(known)} can be read.")
    needs_threshold = d.architecture in ("jumprelu", "batchtopk")
    for what, needed, given in (
        ("threshold", needs_threshold, d.threshold is not None),
        ("k", d.architecture == "topk", d.k is not None),
        ("gate", d.architecture == "gated", d.gate is not None),
        ("b_enc", d.architecture != "gated", d.b_enc is not None),
    ):
        if needed and not given:
            raise SaeError(f"A {d.architecture} dictionary needs {what}, and none is given.")
        if given and not needed and what != "k":
            raise SaeError(f"A {d.architecture} dictionary has no {what}, but one is given.")


def _check_shapes(d: Dictionary) -> None:
    if d.W_dec.ndim != 2:
        raise SaeError(f"W_dec must be [features, width], not {list(d.W_dec.shape)}.")
    shapes: dict[str, tuple[mx.array | None, list[int]]] = {
        "W_enc": (d.W_enc, [d.d_model, d.n_features]),
        "b_dec": (d.b_dec, [d.d_model]),
        "b_enc": (d.b_enc, [d.n_features]),
        "threshold": (d.threshold, [d.n_features]),
    }
    if d.gate is not None:
        gate = vars(d.gate)
        shapes |= {name: (array, [d.n_features]) for name, array in gate.items()}
    shapes["W_dec"] = (d.W_dec, list(d.W_dec.shape))
    for name, (array, shape) in shapes.items():
        if array is None:
            continue
        if list(array.shape) != shape:
            raise SaeError(f"{name} has shape {list(array.shape)}; W_dec asks for {shape}.")
        if array.dtype != mx.float32:
            raise SaeError(f"{name} is {array.dtype}; a dictionary holds float32.")
        if not bool(mx.isfinite(array).all()):
            raise SaeError(f"{name} holds NaN or infinity: the weights are damaged.")
    if d.k is not None and not 1 <= d.k <= d.n_features:
        raise SaeError(f"k must be 1 to {d.n_features}, the number of features, not {d.k}.")
