"""Prints what one decoded token of DeepSeek-V4-Flash launches (see `launches`).

python benchmarks/v4_primitives.py
"""

from __future__ import annotations

import argparse

from mlxsteer.models.deepseek_v4.launches import VIEWS, decode_launches, launches, mean_launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-rounding", action="store_true", help="without activation rounding")
    counts = decode_launches(rounding=not parser.parse_args().no_rounding)
    print(f"{'primitive':24}" + "".join(f"{label:>20}" for label in counts))
    names = [n for n, _ in counts["both close"].most_common() if n not in VIEWS]
    for name in names:
        print(f"{name:24}" + "".join(f"{c[name]:20,}" for c in counts.values()))
    print(f"{'estimated launches':24}" + "".join(f"{launches(c):20,}" for c in counts.values()))
    print(
        f"{'views (no launch)':24}"
        + "".join(f"{c.total() - launches(c):20,}" for c in counts.values())
    )
    print(f"launches per token over a long answer: {mean_launches(counts):,.0f}")


if __name__ == "__main__":
    main()
