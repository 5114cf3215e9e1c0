"""One tiny model behind one running server, for every test of the API that changes neither."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import mlxsteer
from mlxsteer import library
from mlxsteer.model import Model
from mlxsteer.server.engine import Engine
from mlxsteer.server.prefix import PrefixCache
from mlxsteer.vector import Calibration
from tests.chat_models import chat_folder, random_directions
from tests.server.api import running

if TYPE_CHECKING:
    from tests.server.browser import Panel


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


@pytest.fixture
def engine(tiny: Model) -> Iterator[Engine]:
    """A started engine on the tiny model."""
    running = Engine(tiny, max_running=8, max_queued=8)
    running.start()
    yield running
    running.close(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser, for each file its own: Playwright's event loop must not outlive it."""
    from tests.server.browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def panel(browser: Any, chatty: Model, push: Path) -> Iterator[Panel]:
    """A page that is not open yet, for the vectors `push` and `known`."""
    from tests.server.browser import page_of

    about = {"eval": {"sentence": "does what it says"}}
    known = replace(random_directions(1), calibration=Calibration(0.5, 0.4), about=about)
    library.save(known, chatty.key, "known")
    with page_of(browser, chatty) as page:
        yield page


@pytest.fixture
def opened(panel: Panel) -> Panel:
    """The page of a server that writes until the steering changes."""
    from tests.server.browser import Writer, expect

    panel.open(Writer(panel.model))
    expect(panel.find("#slider-push")).to_be_visible()
    return panel
