"""The search for scales: never worse than MLX's own, and what it stores is what it measured."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer.convert.formats import MXFP4, MXFP8, Format
from mlxsteer.convert.quantise import Quantised, pack, quantise
from tests.convert import reference

AFFINE = [Format("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def weights(kind: str, rows: int = 48, cols: int = 256) -> np.ndarray:
    random = np.random.default_rng(7)
    normal = random.standard_normal((rows, cols))
    values = {
        "normal": normal,
        "heavy tails": normal / np.maximum(np.abs(random.standard_normal((rows, cols))), 0.05),
        "one outlier a row": np.where(np.arange(cols) == 5, 40.0, normal),
        "rows of all sizes": normal * np.exp2(random.integers(-20, 8, (rows, 1))),
        "constant": np.full((rows, cols), 0.375),
        "zero": np.zeros((rows, cols)),
        "positive": np.abs(normal) + 3,
    }[kind].astype(np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)  # bf16, as every source is


KINDS = ["normal", "heavy tails", "one outlier a row", "rows of all sizes", "constant", "zero",
         "positive"]  # fmt: skip


def decoded(q: Quantised, target: Format) -> np.ndarray:
    """By the independent decoder, from the words that would be stored."""
    words = np.array(q.weight)
    if q.biases is None:
        return reference.mx_matrix(words, np.array(q.scales), target.bits)
    scales, biases = (np.array(a.view(mx.uint16)) for a in (q.scales, q.biases))
    return reference.affine_matrix(words, scales, biases, target.bits, target.group_size)


def mlx_own(w: np.ndarray, target: Format) -> np.ndarray:
    """What `mx.quantize` of the bf16 weights gives."""
    settings = {"group_size": target.group_size, "bits": target.bits, "mode": target.mode}
    parts = mx.quantize(mx.array(w).astype(mx.bfloat16), **settings)
    floats = [p.astype(mx.float32) if p.dtype == mx.bfloat16 else p for p in parts]
    return np.array(mx.dequantize(*floats, dtype=mx.float32, **settings)).astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [*AFFINE, MXFP4, MXFP8], ids=str)
def test_never_worse_than_mlx_in_weighted_error(kind: str, target: Format) -> None:
    w = weights(kind)
    importance = np.exp(np.random.default_rng(3).standard_normal(w.shape[1])).astype(np.float32)
    ours = decoded(quantise(mx.array(w), target, mx.array(importance)), target)
    error = (importance * (w - ours) ** 2).sum()
    theirs = (importance * (w - mlx_own(w, target)) ** 2).sum()
    assert error <= theirs * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("target", [*AFFINE, MXFP4, MXFP8], ids=str)
def test_reported_errors_are_those_of_what_is_stored(target: Format) -> None:
    w = weights("heavy tails")
    q = quantise(mx.array(w), target)
    assert q.error == pytest.approx(((w - decoded(q, target)) ** 2).sum(), rel=1e-3)
    assert q.mlx_error == pytest.approx(((w - mlx_own(w, target)) ** 2).sum(), rel=1e-3)
    assert q.power == pytest.approx((w.astype(np.float64) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3])
def test_few_bits_gain_much(bits: int) -> None:
    q = quantise(mx.array(weights("normal")), Format("affine", bits, 64))
    assert q.error < (0.75 if bits == 2 else 0.85) * q.mlx_error


def test_important_columns_are_kept_better() -> None:
    w = weights("normal", cols=64)
    importance = np.ones(64, np.float32)
    importance[:8] = 100
    target = Format("affine", 2, 64)
    plain = decoded(quantise(mx.array(w), target), target)
    weighted = decoded(quantise(mx.array(w), target, mx.array(importance)), target)
    assert ((w - weighted)[:, :8] ** 2).sum() < 0.6 * ((w - plain)[:, :8] ** 2).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_is_mlx_s(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 128)).astype(np.uint32)
    ones, zeros = mx.ones((3, 2)), mx.zeros((3, 2))
    back = mx.dequantize(pack(mx.array(codes), bits), ones, zeros, group_size=64, bits=bits)
    np.testing.assert_array_equal(np.array(back), codes)


def test_fp4_values_survive_mxfp4_even_when_they_came_as_fp8() -> None:
    """A repack of FP4 experts as FP8 finds its way back without loss."""
    random = np.random.default_rng(1)
    codes = random.integers(0, 16, (16, 128))
    w = reference.e2m1_table()[codes] * np.exp2(random.integers(-9, -4, (16, 4))).repeat(32, 1)
    np.testing.assert_array_equal(decoded(quantise(mx.array(w), MXFP4), MXFP4), w)
