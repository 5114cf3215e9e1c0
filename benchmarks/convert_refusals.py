"""What `mlxsteer convert` says to each bad input, and whether anything was lost. One table.

    python -m benchmarks.convert_refusals

Every case spoils a fresh copy of the tiny official checkpoint and types the command.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from mlxsteer.cli import main as mlxsteer
from tests.convert.conftest import TINY
from tests.convert.test_bad_input import WEIGHTS, contents, edit_header, edit_json, poke

INDEX = "model.safetensors.index.json"
Spoil = Callable[[Path], None]


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    """One byte, with the published hash known."""
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  {WEIGHTS}\n")
    poke(folder, "layers.0.attn.wq_a.weight", 0x55)


def lose(folder: Path) -> None:
    """A tensor under another name, in header and index."""

    def rename(names: dict[str, Any]) -> None:
        names["mtp.0.left.over"] = names.pop("layers.2.attn.indexer.wq_b.scale")

    edit_header(folder, rename)
    edit_json(folder / INDEX, lambda data: rename(data["weight_map"]))


def turn(folder: Path) -> None:
    edit_header(folder, lambda header: header["layers.0.attn.wkv.weight"]["shape"].reverse())


def retype(folder: Path) -> None:
    edit_header(folder, lambda header: header["embed.weight"].update(dtype="F4"))


def place(file: str, folder: Path) -> None:
    """The index says that a tensor lies in `file`."""
    edit_json(folder / INDEX, lambda data: data["weight_map"].update({"norm.weight": file}))


CASES: dict[str, Spoil] = {
    "truncated shard": truncate,
    "flipped byte": flip,
    "missing tensor": lose,
    "wrong shape": turn,
    "unknown dtype": retype,
    "NaN scale": lambda folder: poke(folder, "layers.0.ffn.experts.1.w2.scale", 255),
    "file not there": partial(place, "model-2.safetensors"),
    "path traversal": partial(place, "../secret"),
}


def refusal(spoil: Spoil) -> tuple[int, bool, str]:
    """Exit status, whether the source is untouched and no model appeared, and the last words."""
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        shutil.copytree(TINY, source)
        spoil(source)
        before = contents(source)
        result = CliRunner().invoke(mlxsteer, ["convert", str(source), "--out", str(out)])
        safe = contents(source) == before and not (out / "config.json").exists()
        words = result.stderr.splitlines()[-1].replace(name, "")
        return result.exit_code, safe, words


def main() -> None:
    print(f"{'input':16} exit  lost     said")
    for name, spoil in CASES.items():
        status, safe, words = refusal(spoil)
        print(f"{name:16} {status:4}  {'nothing' if safe else 'DATA':7}  {words}")


if __name__ == "__main__":
    main()
