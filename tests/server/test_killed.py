"""A server that is killed while it writes its disk cache, and the next one on the same folder."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest

import mlxsteer
from mlxsteer.model import Model
from tests.chat_models import chat_folder
from tests.server.api import WEB, chat, post
from tests.server.process import served

CHAT = "/v1/chat/completions"
OPTIONS = ("--disk-cache-size", "1G")
ROUNDS = 3
WRITTEN = 5  # entries, before a round ends
START_SECONDS = 120


def question(number: int) -> str:
    """About 1,500 words: long enough for the disk."""
    rng = random.Random(number)
    return " ".join(f"w{rng.randrange(50)}" for _ in range(1500))


def answer(address: str, number: int) -> tuple[str, int]:
    """(text, prompt tokens that were found)."""
    messages = [{"role": "user", "content": question(number)}]
    reply = post(address, CHAT, chat("tiny", messages=messages), timeout=START_SECONDS).json()
    found = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    return reply["choices"][0]["message"]["content"], found


def kill_under_load(address: str, process: subprocess.Popen[str], folder: Path, first: int) -> None:
    """Ask for answer after answer, and kill -9 in the middle of it."""
    before = len(list(folder.glob("*.json")))
    numbers = iter(range(first, first + 1000))

    def ask() -> None:
        try:
            for number in numbers:
                answer(address, number)
        except httpx.TransportError:
            return  # killed

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    deadline = time.monotonic() + START_SECONDS
    while len(list(folder.glob("*.json"))) < before + WRITTEN:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    for client in clients:
        client.join(START_SECONDS)


@pytest.mark.slow
def test_a_server_killed_under_load_leaves_a_cache_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXSTEER_CACHE", str(tmp_path / "cache"))
    path = chat_folder(tmp_path / "tiny", max_position_embeddings=4096)
    model = mlxsteer.load(str(path))
    folder = tmp_path / "cache" / "prompts" / model.key
    log = tmp_path / "log"
    for number in range(ROUNDS):
        with served(path, log, OPTIONS) as (address, process):
            assert _whole(folder)
            if number:
                _assert_goes_on(address, model, 1000 * (number - 1))
            kill_under_load(address, process, folder, 1000 * number)
        assert process.returncode == -9
    with served(path, log, OPTIONS) as (address, process):
        assert _whole(folder)
        _assert_goes_on(address, model, 1000 * (ROUNDS - 1))
        assert WEB.get(f"{address}/health").json()["status"] == "ok"
    assert process.returncode == 0
    assert "Traceback" not in log.read_text()


def _whole(folder: Path) -> bool:
    """Whether a server that has started left only pairs of files."""
    names = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    stems = {name.partition(".")[0] for name in names}
    return names == sorted(f"{stem}.{kind}" for stem in stems for kind in ("json", "safetensors"))


def _assert_goes_on(address: str, model: Model, first: int) -> None:
    """The first prompts of a killed server are found, and answered as by the model alone."""
    found = [answer(address, number) for number in range(first, first + 3)]
    texts = [
        model.generate([{"role": "user", "content": question(number)}], max_tokens=4)
        for number in range(first, first + 3)
    ]
    assert [text for text, _ in found] == texts
    assert min(cached for _, cached in found) > 1400
