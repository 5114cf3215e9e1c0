"""Lossless conversion beside `cp` of the same bytes, in turns, and peak memory. A few minutes.

    python benchmarks/convert_throughput.py [--experts 64] [--layers 2] [--recipe lossless]

Two layers of real width (4096) with fewer experts; random codes, in the official formats.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROUNDS = 3


def write_source(folder: Path, layers: int, experts: int) -> Path:
    """A checkpoint of real width; a tile of random codes repeated, as compression plays no part."""
    from mlxsteer.convert.layout import model_layout
    from mlxsteer.convert.real_model import CONFIG, official_tensors

    config: dict[str, Any] = {**CONFIG, "num_hidden_layers": layers, "n_routed_experts": experts}
    config |= {"compress_ratios": [0, 4, 128, 4][:layers], "vocab_size": 8192}
    units = model_layout(config)
    weight_map = {}
    folder.mkdir(parents=True)
    for number, unit in enumerate(units, start=1):
        name = f"model-{number:05d}-of-{len(units):05d}.safetensors"
        entries: dict[str, object] = {}
        position = 0
        tensors = list(official_tensors(unit))
        sizes = {"BF16": 2, "F32": 4, "I64": 8}
        for tensor, dtype, shape in tensors:
            end = position + int(np.prod(shape)) * sizes.get(dtype, 1)
            entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
            weight_map[tensor] = name
        header = json.dumps(entries).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for tensor, dtype, _ in tensors:
                begin, end = entries[tensor]["data_offsets"]  # type: ignore[index]
                file.write(codes(dtype, end - begin))
    (folder / "config.json").write_text(json.dumps(config))
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


TILE = np.random.default_rng(0).integers(0, 0x60, 1 << 20, np.uint8)  # no NaN in any format


def codes(dtype: str, nbytes: int) -> bytes:
    if dtype == "I64":
        return bytes(nbytes)
    return np.resize(TILE, nbytes).tobytes()


def worker(source: Path, out: Path, recipe: str) -> None:
    """Convert in a process of its own; print seconds and the growth of peak memory."""
    from mlxsteer.convert.plan import make_plan
    from mlxsteer.convert.recipes import RECIPES
    from mlxsteer.convert.run import convert
    from mlxsteer.convert.sources import LocalSource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    local = LocalSource(source)
    started = time.perf_counter()
    convert(local, make_plan(local.checkpoint, RECIPES[recipe]), out)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"seconds": seconds, "peak": after * unit, "idle": before * unit}))


def copy(source: Path, out: Path) -> float:
    """`cp` of the folder, on disk when it ends, as a converted shard is."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--experts", type=int, default=64)
    options.add_argument("--recipe", default="lossless")
    options.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        worker(*chosen.worker, chosen.recipe)
        return
    with tempfile.TemporaryDirectory() as place:
        compare(Path(place), chosen)


def compare(place: Path, chosen: argparse.Namespace) -> None:
    source = write_source(place / "source", chosen.layers, chosen.experts)
    files = sorted(source.glob("*.safetensors"))
    total, largest = sum(f.stat().st_size for f in files), max(f.stat().st_size for f in files)
    copies, conversions, facts = [], [], {"peak": 0, "idle": 0}
    for _ in range(ROUNDS):
        copies.append(copy(source, place / "copy"))
        shutil.rmtree(place / "copy")
        words = [sys.executable, __file__, "--recipe", chosen.recipe, "--worker", source]
        done = subprocess.run([*words, place / "out"], check=True, stdout=subprocess.PIPE)
        facts = json.loads(done.stdout)
        conversions.append(facts["seconds"])
        shutil.rmtree(place / "out")
    ratio = median(copies) / median(conversions)
    print(f"source: {total / 1e9:.2f} GB, largest layer {largest / 1e9:.2f} GB; {ROUNDS} rounds")
    print(f"cp       {median(copies):7.2f} s  {total / 1e9 / median(copies):5.2f} GB/s")
    print(f"convert  {median(conversions):7.2f} s  {total / 1e9 / median(conversions):5.2f} GB/s")
    print(f"convert / cp: {ratio:.2f}x of cp's rate")
    print(f"peak memory {facts['peak'] / 1e9:.2f} GB, {facts['idle'] / 1e9:.2f} GB of it imports;"
          f" {facts['peak'] / largest:.2f} of the largest layer")  # fmt: skip


if __name__ == "__main__":
    main()
