"""Runs kernel bodies as C++ on the CPU: a shim of the few Metal names that they use."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsteer.models.deepseek_v4.kernels import Body

SHIM = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
typedef unsigned int uint;
struct uint3 { uint x, y, z; };
struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() {}
    explicit bfloat16_t(float f) {
        uint32_t u; std::memcpy(&u, &f, 4);
        bits = uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
    }
    operator float() const { uint32_t u = uint32_t(bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }
};
template <class A, class B> A as_type(B b) { A a; std::memcpy(&a, &b, sizeof a); return a; }
namespace metal {
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float sin(float x) { return std::sin(x); }
inline float cos(float x) { return std::cos(x); }
inline float fabs(float x) { return std::fabs(x); }
inline float rint(float x) { return std::nearbyint(x); }
inline float max(float a, float b) { return std::max(a, b); }
inline float min(float a, float b) { return std::min(a, b); }
}
"""  # noqa: E501
NAMES = {
    mx.float32: "float",
    mx.bfloat16: "bfloat16_t",
    mx.uint32: "uint",
    mx.int32: "int",
}


def launch(
    body: Body,
    inputs: Any,
    constants: dict[str, Any],
    grid: tuple[int, int, int],
    outputs: Any,
    reals: tuple[tuple[str, float], ...] = (),
) -> list[mx.array]:
    """As `kernels.launch`, one grid point after the other."""
    arguments = [
        f"const {NAMES[a.dtype]}* {name}" for a, name in zip(inputs, body.inputs, strict=True)
    ]
    arguments += [f"const int* {name}_shape" for name in body.inputs]
    arguments += [
        f"{NAMES[dtype]}* {name}" for (_, dtype), name in zip(outputs, body.outputs, strict=True)
    ]
    fixed = "\n".join(
        f"using {k} = {NAMES[v]};" if isinstance(v, mx.Dtype) else f"constexpr int {k} = {v};"
        for k, v in constants.items()
    )
    macros = "\n".join(f"#define {name} {value!r}f" for name, value in reals)
    run = _compiled(f"""{SHIM}
{macros}
extern "C" void run({", ".join(arguments)}, uint gx, uint gy, uint gz) {{
{fixed}
for (uint z = 0; z < gz; ++z) for (uint y_ = 0; y_ < gy; ++y_) for (uint x_ = 0; x_ < gx; ++x_) {{
uint3 thread_position_in_grid{{x_, y_, z}};
{body.source}
}}}}""")
    given = [_bytes(a) for a in inputs]
    shapes = [np.array(a.shape, np.int32) for a in inputs]
    size = {mx.bfloat16: np.uint16, mx.uint32: np.uint32, mx.float32: np.float32}
    made = [np.full(shape, 77, size[dtype]) for shape, dtype in outputs]
    run(*(a.ctypes.data_as(ctypes.c_void_p) for a in (*given, *shapes, *made)), *grid)
    return [
        mx.array(m).view(dtype) if dtype == mx.bfloat16 else mx.array(m)
        for m, (_, dtype) in zip(made, outputs, strict=True)
    ]


def _bytes(a: mx.array) -> np.ndarray:
    a = a.view(mx.uint16) if a.dtype == mx.bfloat16 else a
    return np.ascontiguousarray(np.array(a))


@cache
def _compiled(source: str) -> Any:
    folder = Path(tempfile.gettempdir()) / f"mlxsteer-kernels-{_digest(source)}"
    folder.mkdir(exist_ok=True)
    (folder / "kernel.cpp").write_text(source)
    command = ["g++", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    subprocess.run([*command, "-o", "kernel.so", "kernel.cpp"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernel.so")).run


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]
