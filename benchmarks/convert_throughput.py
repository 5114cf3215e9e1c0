"""Lossless conversion beside `cp` of the same bytes, in turns, and peak memory. A few minutes.

    python -m benchmarks.convert_throughput [--experts 64] [--layers 2] [--recipe lossless]

Two layers of real width (4096) with fewer experts; random codes, in the official formats. The
second conversion knows the source's sha256, as after a download, and checks it. Processor time is
printed beside wall time because other work on the machine changes only the latter.
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
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mlxsteer.convert.shard_file import file_sha256

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


@dataclass
class Run:
    """One way to copy the source, once a round: seconds of wall and of processor time."""

    walls: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def wall(self) -> float:
        return median(self.walls)


@dataclass
class Facts:
    """What was measured. `fixed` seconds of a conversion come before its first byte."""

    total: int
    largest: int
    cp: Run = field(default_factory=Run)
    convert: Run = field(default_factory=Run)
    checked: Run = field(default_factory=Run)
    fixed: list[float] = field(default_factory=list)
    peak: int = 0
    imports: int = 0

    @property
    def ratio(self) -> float:
        """Of cp's rate, by wall time."""
        return self.cp.wall / self.convert.wall


def worker(source: Path, out: Path, recipe: str) -> None:
    """Convert in a process of its own; print seconds and the growth of peak memory."""
    from mlxsteer.convert.plan import make_plan
    from mlxsteer.convert.recipes import RECIPES
    from mlxsteer.convert.run import convert
    from mlxsteer.convert.sources import LocalSource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    local = LocalSource(source)
    plan = make_plan(local.checkpoint, RECIPES[recipe])
    started = time.perf_counter()
    convert(local, plan, out)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"seconds": seconds, "peak": after * unit, "imports": before * unit}))


def copy(source: Path, out: Path) -> float:
    """`cp` of the folder, on disk when it ends, as a converted shard is. Seconds."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - started


def processor_time() -> float:
    """Of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(place: Path, layers: int = 2, experts: int = 64, recipe: str = "lossless") -> Facts:
    """ROUNDS of each in turn."""
    source = write_source(place / "source", layers, experts)
    files = sorted(source.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    facts = Facts(sum(sizes), max(sizes))
    sums = source / "SHA256SUMS"
    digests = [f"{file_sha256(file)}  {file.name}" for file in files]
    for _ in range(ROUNDS):
        used = processor_time()
        facts.cp.walls.append(copy(source, place / "copy"))
        facts.cp.processor.append(processor_time() - used)
        shutil.rmtree(place / "copy")
        convert_once(source, place / "out", recipe, facts, facts.convert)
        sums.write_text("\n".join(digests))
        convert_once(source, place / "out", recipe, facts, facts.checked)
        sums.unlink()
    return facts


def convert_once(source: Path, out: Path, recipe: str, facts: Facts, run: Run) -> None:
    words = [sys.executable, "-m", "benchmarks.convert_throughput", "--recipe", recipe]
    used, started = processor_time(), time.perf_counter()
    done = subprocess.run([*words, "--worker", source, out], check=True, stdout=subprocess.PIPE)
    wall = time.perf_counter() - started
    found = json.loads(done.stdout)
    run.walls.append(found["seconds"])
    run.processor.append(processor_time() - used)
    facts.fixed.append(wall - found["seconds"])
    facts.peak = max(facts.peak, found["peak"])
    facts.imports = found["imports"]
    shutil.rmtree(out)


def show(facts: Facts) -> None:
    gigabytes = facts.total / 1e9
    largest = facts.largest / 1e9
    print(f"source: {gigabytes:.2f} GB, largest layer {largest:.2f} GB; {ROUNDS} rounds in turn,"
          f" load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip
    runs = {"cp": facts.cp, "convert": facts.convert, "convert, source checked": facts.checked}
    for name, run in runs.items():
        rates = f"{gigabytes / run.wall:5.2f} GB/s  {facts.cp.wall / run.wall:5.2f}x of cp"
        print(f"{name:24} {run.wall:7.2f} s  {rates}   processor {median(run.processor):5.2f} s")
    print(f"fixed cost, not in the above (process, imports, headers, plan): "
          f"{median(facts.fixed):.2f} s")  # fmt: skip
    print(f"peak memory {facts.peak / 1e9:.2f} GB, {facts.imports / 1e9:.2f} GB of it imports;"
          f" {facts.peak / facts.largest:.2f} of the largest layer")  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--experts", type=int, default=64)
    options.add_argument("--recipe", default="lossless")
    options.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        worker(chosen.worker[0], chosen.worker[1], chosen.recipe)
        return
    with tempfile.TemporaryDirectory() as place:
        show(measure(Path(place), chosen.layers, chosen.experts, chosen.recipe))


if __name__ == "__main__":
    main()
