"""The panel in a real browser: an engine that writes on demand, and a page that is watched.

Needs Playwright and a Chromium or Chrome: MLXSTEER_BROWSER, or one that is installed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxsteer.model import Model
from mlxsteer.plan import ANSWER
from mlxsteer.server.jobs import Busy, Event, FinishReason, Generation, Job
from mlxsteer.server.settings import Settings
from tests.server.api import ScriptedEngine, running

sync_api = pytest.importorskip("playwright.sync_api", reason="the panel's tests need playwright")
expect = sync_api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
WAIT = 30_000  # ms, for machines that are busy
FILES = Path(__file__).parents[2] / "mlxsteer" / "server" / "panel"


def _browser_path() -> str | None:
    found = os.environ.get("MLXSTEER_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    return found or (MAC if Path(MAC).exists() else None)


BROWSER = _browser_path()
if BROWSER is None:
    pytest.skip("no Chromium or Chrome is installed", allow_module_level=True)


class Writer(ScriptedEngine):
    """Writes words until the steering has changed for 4 tokens, it is stopped, or 2,000 are out.

    full: how many requests are still to be turned away. Its thread runs, so vectors can be made.
    """

    def __init__(self, model: Model, texts: tuple[str, ...] = (), end: Event | None = None) -> None:
        super().__init__(model, texts, end)
        self.full = 0
        self.start()

    def submit(self, job: Job) -> Generation:
        if self.full:
            self.full -= 1
            raise Busy(7, 2.0)
        return super().submit(job)

    def _write(self, generation: Generation) -> None:
        if self.texts:
            return super()._write(generation)
        first, after = str(generation.job.plan), 0
        for index in range(2000):
            steer = str(generation.begin(index))
            after += steer != first
            if after > 4 or generation.cancelled:
                break
            read = (index / 10,) * len(generation.job.probes)
            generation.put(Event(f"w{index} ", 10, ANSWER, steer=steer, readings=read))
            time.sleep(0.02)
        reason: FinishReason = "cancelled" if generation.cancelled else "stop"
        generation.put(Event("", finish_reason=reason))


class Panel:
    """A page on a server, with what it logged and what it asked for."""

    def __init__(self, page: Any, model: Model, stack: ExitStack) -> None:
        self.page, self.model, self.stack = page, model, stack
        self.errors: list[str] = []
        self.urls: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.urls.append(request.url))

    def _heard(self, said: Any) -> None:
        if said.type == "error":
            self.errors.append(said.text)

    def open(self, engine: Writer, settings: Settings | None = None) -> None:
        self.engine = engine
        self.address = self.stack.enter_context(running(engine, self.model, settings))
        self.page.goto(self.address)

    def ask(self, text: str = "w1 w2") -> None:
        self.page.get_by_label("Your message").fill(text)
        self.page.keyboard.press("Enter")

    def find(self, selector: str) -> Any:
        return self.page.locator(selector)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def page_of(browser: Any, model: Model) -> Iterator[Panel]:
    """A page that is not open yet. At its end it has asked for nothing elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT)
    expect.set_options(timeout=WAIT)
    with ExitStack() as stack:
        panel = Panel(context.new_page(), model, stack)
        yield panel
        context.close()
    assert all(url.startswith(panel.address) for url in panel.urls)
    refused = ("Failed to load resource",)  # what Chromium itself logs of a 401, 429 or no reply
    assert [error for error in panel.errors if not error.startswith(refused)] == []


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + WAIT / 1000
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
