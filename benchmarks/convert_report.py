"""What the converter claims, measured: one table, each claim with its figure. Two minutes.

    python -m benchmarks.convert_report [--mlx-vlm FOLDER] [--layers 2] [--experts 64]

FOLDER is mlx-vlm's unpacked wheel (see v4_peer). Without it, what needs it is left out, and said.
Exits 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import convert_refusals, convert_throughput, v4_peer
from mlxsteer.convert.recipes import RECIPES
from mlxsteer.convert.sources import LocalSource
from mlxsteer.convert.tables import recipe_sizes
from mlxsteer.convert.verify import verify
from tests.convert import mlx_vlm_peer
from tests.convert.conftest import TINY, run
from tests.convert.golden import our_errors

EXACT = 1e-4  # largest difference of a logit
TESTS = "tests/convert"
BIT_EQUAL = [f"{TESTS}/test_lossless.py::{name}" for name in (
    "test_all_102_quantised_tensors_are_bit_identical_to_a_direct_decode",
    "test_unquantised_tensors_keep_their_bytes_and_int64_becomes_int32",
)]  # fmt: skip
KILLS = f"{TESTS}/test_resume.py::test_killed_at_ten_random_moments_the_result_is_byte_identical"
DISK_AND_NETWORK = [
    f"{TESTS}/test_bad_input.py::{name}" for name in (
        "test_no_space_is_told_before_anything_is_written",
        "test_a_disk_that_fills_up_leaves_verified_shards",
        "test_no_permission",
    )
] + [
    f"{TESTS}/test_hub.py::{name}" for name in (
        "test_a_network_cut_inside_a_shard_is_taken_up_where_it_stopped",
        "test_a_network_that_stays_away_loses_at_most_one_shard",
    )
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One claim. `good` is None where nothing was promised, or nothing was run."""

    claim: str
    measured: str
    good: bool | None


def recipes(place: Path) -> Iterator[Row]:
    """The tiny official checkpoint in each recipe, loaded by our module."""
    for name in RECIPES:
        run(TINY, place / name, name)
        whole = name == "lossless"
        errors = our_errors(place / name, 200 if whole else 48)
        if whole:
            yield Row(
                "lossless: golden logits to 1e-4", f"{errors.max():.1e}", errors.max() < EXACT
            )
        else:
            rms = float((errors**2).mean() ** 0.5)
            yield Row(f"{name}: RMS logit error, random weights", f"{rms:.2f}", None)
    report = verify(place / "lossless", LocalSource(TINY), everything=True)
    found = f"{report.exact} matrices equal, {len(report.problems)} differ"
    yield Row("`convert verify --against --all`", found, report.ok)


def exchange(place: Path, peer: Path | None) -> Iterator[Row]:
    """Folders of either side in the other."""
    claims = ("our lossless folder in mlx-vlm: golden logits", "mlx-vlm's folder in our module")
    if peer is None:
        yield from (Row(claim, "not run: --mlx-vlm FOLDER", None) for claim in claims)
        return
    v4_peer.packages(peer)
    utils = types.ModuleType("mlx_vlm.utils")  # its converter imports these; none is called here
    for name in ("_load_safetensors", "create_model_card", "get_model_path", "upload_to_hub"):
        setattr(utils, name, None)
    sys.modules["mlx_vlm.utils"] = utils
    ours = mlx_vlm_peer.their_errors(place / "lossless").max()
    theirs = our_errors(mlx_vlm_peer.convert_tiny(place / "theirs")).max()
    for claim, error in zip(claims, (ours, theirs), strict=True):
        yield Row(claim, f"{error:.1e}", error < EXACT)


def tested(claim: str, *tests: str) -> Row:
    """A claim that tests hold: how many passed."""
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(words, capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip() or "nothing ran").splitlines()[-1]
    return Row(claim, last.strip("= "), done.returncode == 0)


def totals() -> Row:
    facts = recipe_sizes()["lossless"]
    found = (facts.tensors_in, facts.bytes_in, facts.bytes_out)
    good = found == (69_187, 159_609_485_896, 156_189_074_524)
    return Row(
        "real model: tensors in, bytes in, lossless bytes out",
        "{:,} {:,} {:,}".format(*found),
        good,
    )


def throughput(place: Path, layers: int, experts: int) -> Iterator[Row]:
    facts = convert_throughput.measure(place, layers, experts)
    convert_throughput.show(facts)
    yield Row("lossless: at least 0.5x of cp's rate", f"{facts.ratio:.2f}x", facts.ratio >= 0.5)
    share = facts.peak / facts.largest
    yield Row("peak memory at most 1.5x the largest layer", f"{share:.2f}x", share <= 1.5)


def refusals() -> Iterator[Row]:
    for name, spoil in convert_refusals.CASES.items():
        status, safe, words = convert_refusals.refusal(spoil)
        lost = "nothing lost" if safe else "DATA LOST"
        yield Row(
            f"{name}: one line, nothing lost",
            f"exit {status}, {lost}",
            status == 1 and safe and "Traceback" not in words,
        )


def rows(place: Path, chosen: argparse.Namespace) -> Iterator[Row]:
    yield from recipes(place)
    yield tested("lossless: every tensor equals a direct numpy decoding", *BIT_EQUAL)
    yield from exchange(place, chosen.mlx_vlm)
    yield tested("43 layers, kill -9 ten times, lossless and q2: same bytes", KILLS, "-m", "slow")
    yield totals()
    yield from refusals()
    yield tested("no space, no permission, network cut: nothing lost", *DISK_AND_NETWORK)
    yield from throughput(place / "throughput", chosen.layers, chosen.experts)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--mlx-vlm", type=Path, help="folder of its unpacked wheel")
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--experts", type=int, default=64)
    chosen = options.parse_args()
    words = {True: "pass", False: "FAIL", None: "-"}
    with tempfile.TemporaryDirectory() as name:
        found = list(rows(Path(name), chosen))
    print("\n| claim | measured | |\n|---|---|---|")
    for row in found:
        print(f"| {row.claim} | {row.measured} | {words[row.good]} |")
    sys.exit(any(row.good is False for row in found))


if __name__ == "__main__":
    main()
