"""Stopped anywhere, the same command goes on; two at once refuse each other."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mlxsteer.convert import run as runner
from mlxsteer.convert.errors import ConvertError
from mlxsteer.convert.journal import WORK_DIR, locked
from tests.convert import synthetic
from tests.convert.conftest import run

COMMAND = """
import sys
from mlxsteer.cli.convert import command
command.main(sys.argv[1:], prog_name="convert")
"""


def spawn(source: Path, out: Path, recipe: str = "lossless") -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", COMMAND, str(source), "--out", str(out), "--recipe", recipe]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("small") / "source", synthetic.small_config())


class Stop(BaseException):
    """Stands for Ctrl-C at one exact point."""


@pytest.mark.parametrize(
    ("point", "recipe"),
    [
        ("write_shard", "lossless"),
        ("check_written", "lossless"),
        ("finish", "lossless"),
        ("check_written", "q2"),
    ],
)
def test_stopped_at_every_step_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, recipe: str
) -> None:
    run(source, tmp_path / "whole", recipe)
    real = getattr(runner, point)
    attempts = 0
    while True:
        calls = 0

        def stop_at_second(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2 or point == "finish":
                raise Stop
            return real(*args, **kwargs)

        monkeypatch.setattr(runner, point, stop_at_second)
        attempts += 1
        try:
            run(source, tmp_path / "pieces", recipe)
            break
        except Stop:
            assert not (tmp_path / "pieces" / "config.json").exists()
        if attempts > 6 or point == "finish":
            monkeypatch.setattr(runner, point, real)
            run(source, tmp_path / "pieces", recipe)
            break
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_finished_shards_are_not_written_again(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert run(source, tmp_path / "out").resumed == 5
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


@pytest.fixture
def unfinished(source: Path, tmp_path: Path) -> Path:
    """A lossless conversion stopped when all its shards were written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "finish", Mock(side_effect=Stop))
        with pytest.raises(Stop):
            run(source, tmp_path / "out")
    return tmp_path / "out"


def test_a_shard_damaged_between_runs_is_made_again(source: Path, unfinished: Path) -> None:
    shard = unfinished / "model-00003-of-00005.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run(source, unfinished).resumed == 4
    assert shard.read_bytes() == whole


def test_another_recipe_does_not_go_on_where_one_stopped(source: Path, unfinished: Path) -> None:
    with pytest.raises(ConvertError, match=r"unfinished conversion of .* with recipe lossless"):
        run(source, unfinished, "q2")


def test_two_converters_on_one_target_refuse_each_other(source: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(ConvertError, match="Another conversion"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out")


def test_half_written_files_never_have_a_final_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses bytes is noticed on reading back, before the file gets its name."""
    real = runner.write_shard

    def lossy(path: Path, *rest: Any) -> Any:
        digest = real(path, *rest)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return digest

    monkeypatch.setattr(runner, "write_shard", lossy)
    with pytest.raises(ConvertError, match="differs from what was written"):
        run(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("model-*"))


def test_killed_once_in_the_middle(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole")
    kill_until_done(source, tmp_path / "out", kills=1, longest=0.0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lossless", "q2"])
def test_killed_at_ten_random_moments_the_result_is_byte_identical(
    tmp_path: Path, recipe: str
) -> None:
    """All 43 layers, with the draft block, one file a layer as published."""
    source = synthetic.write(tmp_path / "source", synthetic.config())
    before = contents(source)
    started = time.monotonic()
    assert spawn(source, tmp_path / "whole", recipe).wait() == 0
    longest = time.monotonic() - started
    kill_until_done(source, tmp_path / "out", kills=10, longest=longest, recipe=recipe)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert contents(source) == before


def kill_until_done(
    source: Path, out: Path, kills: int, longest: float, recipe: str = "lossless"
) -> None:
    """kill -9 `kills` times, each a random while after the run began to write; then finish."""
    dice = random.Random(0)
    for _ in range(kills):
        process = spawn(source, out, recipe)
        while process.poll() is None and not (out / WORK_DIR / "journal.json").exists():
            time.sleep(0.005)
        time.sleep(dice.random() * longest / 4)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert spawn(source, out, recipe).wait() == 0
