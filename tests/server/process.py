"""A real `mlxsteer serve` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

END_SECONDS = 60


@contextmanager
def served(
    model: str | Path, log: Path, options: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running server of `model`: (address, process). Its stderr is added to `log`.

    Ended by SIGTERM, where it still runs. RuntimeError when it does not start.
    """
    command = [sys.executable, "-m", "mlxsteer", "serve", "--model", str(model), "--port", "0"]
    with log.open("a") as errors:
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http" not in line:
            raise RuntimeError(f"The server did not start: {log.read_text()[-2000:]}")
        yield line.split(" at ")[1].split()[0], process
    finally:
        process.terminate()
        process.wait(END_SECONDS)
