"""Extraction beside repeng and steering-vectors: same model, same pairs, same layers, one run.

    python benchmarks/extraction.py --pairs 100 --rounds 3

All in float32 with one BLAS thread; every round times each tool in turn, so that a machine that
is shared slows all alike. One table on stdout: tokens that went through the model, positions
with padding, layers run, the median seconds (and of the processor's, which a shared machine
disturbs less), pairs per second, the time as a multiple of ours (median over rounds, with
range), and the cosine between a tool's direction and ours by the same method (mean difference;
uncentred PCA beside repeng), lowest and highest over the layers.

The peers need older packages, so the first run makes an environment for them in the cache
folder with pip, and writes the demo model there as a Hugging Face folder (540 MB).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before anything loads a BLAS

import mlxsteer  # noqa: E402, I001  before mlx, for its fast BLAS
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.utils import dequantize_model  # noqa: E402

from mlxsteer.cli.options import print_table  # noqa: E402
from mlxsteer.contrast import ContrastSet  # noqa: E402
from mlxsteer.errors import MlxsteerError  # noqa: E402
from mlxsteer.extract import extract  # noqa: E402
from mlxsteer.files import cache_dir  # noqa: E402
from mlxsteer.model import Model  # noqa: E402
from mlxsteer.vector import SteeringVector  # noqa: E402

OURS = "mlxsteer"
PEERS = {"repeng": "pca", "steering-vectors": "mean"}  # and our method that is the same
REQUIREMENTS = (
    "repeng==0.4.*",
    "steering-vectors==0.12.*",
    "transformers<5",
    "numpy<2",
    "torch==2.13.0",
)
HEADS = [
    "tool",
    "tokens",
    "padded",
    "layers",
    "seconds",
    "cpu",
    "pairs/s",
    "time",
    "range",
    "cosine",
]


@dataclass
class Measured:
    """One tool: what went through the model, and how long each round took."""

    tokens: int = 0
    positions: int = 0
    layers: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    model, contrast = mlxsteer.load("demo", dtype="float32"), ContrastSet.load(options.set)
    dequantize_model(model.network)  # on Metal, weights load packed; the peers' are plain
    count = min(options.pairs, contrast.max_pairs)
    ours = {method: _extracted(model, contrast, count, method) for method in ("mean", "pca")}
    measured = {OURS: _ours(model, ours["mean"])}
    with _peers(model, contrast, count, ours["mean"], options) as ask:
        for name in PEERS if ask else ():
            measured[name] = Measured(layers=model.n_layers)
        for _ in range(options.rounds):
            for name, tool in measured.items():
                if name == OURS:
                    _time_ours(tool, model, contrast, count)
                else:
                    _time_peer(tool, ask(name), ours[PEERS[name]])
    print(f"{model.label}, {contrast.name}, {count} pairs, {options.rounds} interleaved rounds,")
    print(f"layers {ours['mean'].layers[0]}-{ours['mean'].layers[-1]}, {mx.default_device()}\n")
    print_table(HEADS, _rows(measured, count))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=100, help="pairs (default: 100)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--batch", type=int, default=32, help="the peers' batch (default: 32)")
    parser.add_argument("--set", default="terse", help="contrast set (default: terse)")
    parser.add_argument("--no-peers", action="store_true", help="time mlxsteer alone")
    return parser.parse_args(arguments)


# --- ours -----------------------------------------------------------------------------------


def _extracted(model: Model, contrast: ContrastSet, count: int, method: str) -> SteeringVector:
    return extract(model, contrast, pairs=count, method=method, show_progress=False)


class CountingNetwork:
    """A network that counts the positions it is given."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.positions = 0

    def __call__(self, tokens: mx.array, **options: Any) -> mx.array:
        self.positions += tokens.size
        return self.network(tokens, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


def _ours(model: Model, vector: SteeringVector) -> Measured:
    return Measured(tokens=vector.about["tokens_run"], layers=vector.layers[-1] + 1)


def _time_ours(tool: Measured, model: Model, contrast: ContrastSet, count: int) -> None:
    network = model.network
    counting = CountingNetwork(network)
    model.network = counting  # type: ignore[assignment]
    start, worked = time.perf_counter(), time.process_time()
    try:
        _extracted(model, contrast, count, "mean")
    finally:
        model.network = network
    tool.seconds.append(time.perf_counter() - start)
    tool.cpu.append(time.process_time() - worked)
    tool.positions = counting.positions


# --- the peers ------------------------------------------------------------------------------


@contextmanager
def _peers(
    model: Model,
    contrast: ContrastSet,
    count: int,
    vector: SteeringVector,
    options: argparse.Namespace,
) -> Iterator[Any]:
    """A function from a peer's name to its facts and directions of one round; None without."""
    if options.no_peers:
        yield None
        return
    python, folder = _environment(), _plain_folder(model)
    with tempfile.TemporaryDirectory() as work:
        task = Path(work) / "task.json"
        pairs = [[_text(model, pair.positive), _text(model, pair.negative)]
                 for pair in contrast.pairs(count)]  # fmt: skip
        facts = {"pairs": pairs, "layers": list(vector.layers), "batch": options.batch}
        task.write_text(json.dumps(facts))
        script = Path(__file__).with_name("extraction_peers.py")
        process = subprocess.Popen(
            [python, script, folder, task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(Path(work) / "log").open("w"),
            text=True,
        )
        try:
            yield lambda name: _asked(process, name, Path(work))
        finally:
            process.kill()
            process.wait()


def _asked(process: subprocess.Popen[str], name: str, work: Path) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(name + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        log = (work / "log").read_text().strip().splitlines()
        raise MlxsteerError(f"{name} failed: {log[-1] if log else 'no message'}. Try --no-peers.")
    with np.load(work / f"{name}.npz") as file:
        return {**json.loads(line), "directions": {int(key): file[key] for key in file.files}}


def _time_peer(tool: Measured, facts: dict[str, Any], ours: SteeringVector) -> None:
    tool.seconds.append(facts["seconds"])
    tool.cpu.append(facts["cpu"])
    tool.tokens, tool.positions = facts["tokens"], facts["positions"]
    theirs = facts["directions"]
    tool.cosines = [
        float(theirs[layer] @ unit / np.linalg.norm(theirs[layer]))
        for layer, unit in ours.directions.items()
    ]


def _text(model: Model, messages: Any) -> str:
    return model.tokenizer.decode(model.render(list(messages)))


def _environment() -> Path:
    """The Python of the peers' environment, made when missing or made for other versions."""
    folder = cache_dir() / "benchmarks" / "peers"
    python, made = folder / "bin" / "python", folder / "made-for"
    wanted = "\n".join(REQUIREMENTS)
    if made.is_file() and made.read_text() == wanted:
        return python
    print(f"Making an environment for the peers in {folder}; minutes.", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True, symlinks=True)
    install = [str(python), "-m", "pip", "install", "-q", *REQUIREMENTS]
    result = subprocess.run(install, capture_output=True, text=True)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1]
        raise MlxsteerError(f"pip cannot install the peers: {last} Try --no-peers.")
    made.write_text(wanted)
    return python


def _plain_folder(model: Model) -> Path:
    """The model in float32 as a Hugging Face folder, written when missing."""
    name = f"float32-{model.stamp['weights_fingerprint'][:16]}"
    folder = cache_dir() / "benchmarks" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        written = Path(work) / name
        written.mkdir()
        weights: Any = tree_flatten(model.network.parameters())
        weights = {key: array.astype(mx.float32) for key, array in weights}
        mx.save_safetensors(str(written / "model.safetensors"), weights, {"format": "pt"})
        config = {key: value for key, value in model.config.items() if "quantization" not in key}
        (written / "config.json").write_text(json.dumps(config))
        for file in model.path.glob("tokenizer*.json"):
            (written / file.name).write_bytes(file.read_bytes())
        written.rename(folder)
    return folder


# --- the table ------------------------------------------------------------------------------


def _rows(measured: dict[str, Measured], count: int) -> list[list[str]]:
    ours = measured[OURS].seconds
    rows = []
    for name, tool in measured.items():
        ratios = [theirs / mine for theirs, mine in zip(tool.seconds, ours, strict=True)]
        seconds = statistics.median(tool.seconds)
        cosine = f"{min(tool.cosines):.4f} to {max(tool.cosines):.4f}" if tool.cosines else "-"
        rows.append([
            name, f"{tool.tokens}", f"{tool.positions}", f"{tool.layers}", f"{seconds:.1f}",
            f"{statistics.median(tool.cpu):.1f}", f"{count / seconds:.1f}",
            f"{statistics.median(ratios):.2f}x", f"{min(ratios):.2f}-{max(ratios):.2f}", cosine,
        ])  # fmt: skip
    return rows


if __name__ == "__main__":
    try:
        main()
    except MlxsteerError as error:
        sys.exit(f"Error: {error}")
