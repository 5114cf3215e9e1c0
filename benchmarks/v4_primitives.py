"""Prints what one decoded token of DeepSeek-V4-Flash launches, here and in mlx-vlm.

Counted alike (see `launches`), on the same 43-layer layout. mlx-vlm is optional: a folder of
its unpacked wheel (see `v4_peer`).

    python -m benchmarks.v4_primitives --mlx-vlm mlx-vlm
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import mlxsteer  # noqa: F401  (puts the fast BLAS in place before mlx is imported)

# isort: split
from benchmarks import v4_peer
from mlxsteer.models.deepseek_v4.launches import VIEWS, decode_launches, launches, mean_launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-rounding", action="store_true", help="without activation rounding")
    parser.add_argument("--mlx-vlm", type=Path, help="folder of the wheel")
    options = parser.parse_args()
    report("mlxsteer", decode_launches(rounding=not options.no_rounding))
    if options.mlx_vlm:
        report("mlx-vlm (without activation rounding)", v4_peer.decode_launches(options.mlx_vlm))


def report(title: str, counts: dict[str, Counter[str]]) -> None:
    """Print primitives by name and by what happens at the step."""
    print(f"{title:40}" + "".join(f"{label:>20}" for label in counts))
    names = [n for n, _ in counts["both close"].most_common() if n not in VIEWS]
    for name in names:
        print(f"{name:40}" + "".join(f"{c[name]:20,}" for c in counts.values()))
    for name, value in (
        ("estimated launches", launches),
        ("views (no launch)", lambda c: c.total() - launches(c)),
    ):
        print(f"{name:40}" + "".join(f"{value(c):20,}" for c in counts.values()))
    print(f"launches per token over a long answer: {mean_launches(counts):,.0f}\n")


if __name__ == "__main__":
    main()
