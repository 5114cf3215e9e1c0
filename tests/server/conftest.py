"""One tiny model behind one running server, for every test of the API that changes neither."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxsteer
from mlxsteer import library
from mlxsteer.model import Model
from mlxsteer.server.engine import Engine
from mlxsteer.server.prefix import PrefixCache
from tests.chat_models import chat_folder, random_directions
from tests.server.api import running


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny random model that can chat and think, called `tiny`."""
    return mlxsteer.load(str(chat_folder(tmp_path_factory.mktemp("served") / "tiny")))


@pytest.fixture(scope="session")
def address(chatty: Model) -> Iterator[str]:
    """The address of a server on `chatty`."""
    engine = Engine(chatty, prefix_cache=PrefixCache())
    engine.start()
    with running(engine, chatty) as address:
        yield address


@pytest.fixture
def push(chatty: Model) -> Path:
    """A vector called `push` among the user's."""
    return library.save(random_directions(), chatty.key)
