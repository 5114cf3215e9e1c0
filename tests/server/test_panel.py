"""The panel in a real browser: what a user does, what goes wrong, and what it may never do.

Needs Playwright and a Chromium or Chrome: MLXSTEER_BROWSER, or one that is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlxsteer import library
from mlxsteer.model import Model
from mlxsteer.plan import ANSWER
from mlxsteer.server.jobs import Busy, Event, FinishReason, Generation, Job
from mlxsteer.server.panel import POLICY
from mlxsteer.server.settings import Settings
from mlxsteer.vector import Calibration
from tests.chat_models import random_directions
from tests.server.api import WEB, ScriptedEngine, running

sync_api = pytest.importorskip("playwright.sync_api", reason="the panel's tests need playwright")
expect = sync_api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
WAIT = 30_000  # ms, for machines that are busy
FILES = Path(__file__).parents[2] / "mlxsteer" / "server" / "panel"


def _browser_path() -> str | None:
    found = os.environ.get("MLXSTEER_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    return found or (MAC if Path(MAC).exists() else None)


pytestmark = pytest.mark.skipif(
    _browser_path() is None, reason="no Chromium or Chrome is installed, nor MLXSTEER_BROWSER set"
)


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=_browser_path(), args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def panel(browser: Any, chatty: Model) -> Iterator[Panel]:
    """A page that is not open yet. At its end it has asked for nothing elsewhere."""
    library.save(random_directions(), chatty.key)
    about = {"eval": {"sentence": "does what it says"}}
    known = replace(random_directions(1), calibration=Calibration(0.5, 0.4), about=about)
    library.save(known, chatty.key, "known")
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT)
    expect.set_options(timeout=WAIT)
    with ExitStack() as stack:
        panel = Panel(context.new_page(), chatty, stack)
        yield panel
        context.close()
    assert all(url.startswith(panel.address) for url in panel.urls)
    refused = ("Failed to load resource",)  # what Chromium itself logs of a 401, 429 or no reply
    assert [error for error in panel.errors if not error.startswith(refused)] == []


@pytest.fixture
def opened(panel: Panel) -> Panel:
    """The page of a server that writes until the steering changes."""
    panel.open(Writer(panel.model))
    expect(panel.find("#slider-push")).to_be_visible()
    return panel


def test_the_page_loads_whole_under_its_policy_and_logs_nothing(opened: Panel) -> None:
    expect(opened.find("#status")).to_contain_text("tiny")
    expect(opened.find(".row.unsure")).to_have_count(1)
    expect(opened.find("[data-name=push] .badge")).to_have_text("uncalibrated")
    expect(opened.find("[data-name=known] .badge")).to_have_count(0)
    facts = opened.find("#slider-known-note")
    expect(facts).to_have_text(re.compile("coherent up to dose 0.5.* Evaluated: does what it says"))
    assert opened.errors == []
    for name in ["", *(f"panel/{file.name}" for file in FILES.iterdir())]:
        reply = WEB.get(f"{opened.address}/{name}")
        assert (reply.status_code, reply.headers["content-security-policy"]) == (200, POLICY)


def test_nothing_in_the_page_needs_what_the_policy_forbids() -> None:
    page = (FILES / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://", page)
    assert not re.search(r"<script(?![^>]*\ssrc=)", page)
    assert not re.search(r"\beval\(|innerHTML|https?://", "".join(_scripts().values()))


def test_every_script_is_small_and_is_loaded(opened: Panel) -> None:
    loaded = {url.rpartition("/")[2] for url in opened.urls}
    assert set(_scripts()) <= loaded
    assert all(text.count("\n") < 300 for text in _scripts().values())


def _scripts() -> dict[str, str]:
    return {file.name: file.read_text() for file in FILES.glob("*.js")}


def test_a_question_is_answered_token_by_token_and_can_be_stopped(opened: Panel) -> None:
    opened.ask()
    expect(opened.find(".question")).to_have_text("w1 w2")
    expect(opened.find(".text")).to_contain_text("w0 w1 w2 w3")
    opened.page.keyboard.press("Escape")
    expect(opened.find(".facts")).to_contain_text("unsteered")
    expect(opened.find(".facts")).to_contain_text("stopped")
    expect(opened.find("#send")).to_be_visible()
    _until(lambda: opened.engine.generations[0].cancelled)


def test_the_next_question_carries_the_chat_and_the_slider(opened: Panel) -> None:
    opened.engine.texts = ("w7 ", "w8")
    opened.ask("w1")
    expect(opened.find(".facts")).to_have_count(1)
    opened.find("#slider-push").press("PageUp")
    expect(opened.find("#steer")).to_have_value("push:1")
    opened.ask("w2")
    expect(opened.find(".facts")).to_have_count(2)
    first, second = opened.engine.jobs
    assert str(second.plan) == "push:1"
    assert opened.model.tokenizer.decode(second.prompt).count("w7 w8") == 1
    assert len(second.prompt) > len(first.prompt)


def test_a_slider_moved_mid_answer_is_marked_where_the_text_obeys(opened: Panel) -> None:
    opened.ask()
    expect(opened.find(".text")).to_contain_text("w3")
    opened.find("#slider-push").press("ArrowRight")
    mark = opened.find(".mark")
    expect(mark).to_have_attribute("title", "From here on: push:0.5")
    expect(opened.find(".facts")).to_contain_text("unsteered → push:0.5")
    assert str(opened.engine.generations[0].plan) == "push:0.5"
    whole, rest = opened.find(".text").inner_text().split(), mark.evaluate(_AFTER).split()
    assert len(rest) == 4  # the tokens that the engine wrote under the new steering
    assert whole[-4:] == rest


_AFTER = """mark => {
  let text = "";
  for (let next = mark.nextSibling; next; next = next.nextSibling) text += next.textContent;
  return text;
}"""


def test_keys_move_a_slider_and_double_click_resets_it(opened: Panel) -> None:
    slider, line = opened.find("#slider-push"), opened.find("#steer")
    for key, expected in (
        ("ArrowRight", "push:0.5"),
        ("Shift+ArrowRight", "push:0.6"),
        ("PageUp", "push:1.6"),
        ("Home", ""),
        ("End", "push:5"),
    ):
        slider.press(key)
        expect(line).to_have_value(expected)
    expect(slider).to_have_attribute("aria-valuetext", "+5")
    slider.dblclick(position={"x": 4, "y": 8})
    expect(line).to_have_value("")


def test_the_line_moves_the_sliders_and_keeps_what_they_cannot_show(opened: Panel) -> None:
    line = opened.find("#steer")
    line.fill("known:-2@think, push:0.5r")
    expect(opened.find("#slider-known")).to_have_value("-2")
    expect(opened.find("#slider-push")).to_have_value("0")
    opened.find("#slider-known").press("ArrowLeft")
    expect(line).to_have_value("known:-2.5@think, push:0.5r")
    line.fill("known:x")
    expect(opened.find("#steer-note")).to_contain_text("not a strength")
    line.fill("nobody:2")
    expect(opened.find("#steer-note")).to_contain_text("no vector called “nobody”")
    opened.find("#reset").click()
    expect(line).to_have_value("")
    expect(opened.find("#steer-note")).to_have_text("")


def test_a_search_leaves_the_sliders_that_match(opened: Panel) -> None:
    opened.find("#search").fill("kno")
    expect(opened.find(".row:visible")).to_have_count(1)
    opened.find("#search").fill("zebra")
    expect(opened.find(".row:visible")).to_have_count(0)
    expect(opened.find(".nothing")).to_be_visible()


def test_presets_outlive_the_page(opened: Panel) -> None:
    opened.find("#steer").fill("push:2, known:-1")
    opened.page.get_by_role("button", name="Save preset").click()
    opened.page.get_by_label("Name of the preset").fill("mine")
    opened.page.keyboard.press("Enter")
    opened.page.reload()
    expect(opened.find("#steer")).to_have_value("")
    opened.page.get_by_role("button", name="mine", exact=True).click()
    expect(opened.find("#steer")).to_have_value("push:2, known:-1")
    opened.page.get_by_role("button", name="Forget mine").click()
    expect(opened.page.get_by_role("button", name="mine", exact=True)).to_have_count(0)


def test_two_columns_share_the_seed_and_differ_in_steering(opened: Panel) -> None:
    opened.engine.texts = ("w7 ", "w8")
    opened.ask("w1")
    expect(opened.find(".facts")).to_have_count(1)
    opened.find("#slider-push").press("End")
    opened.page.get_by_text("Answers", exact=True).click()
    opened.page.get_by_label("Temperature").fill("0.8")
    opened.find("#compare").click()
    opened.ask("w2")
    columns = opened.find(".column")
    for column, steer in ((0, "push:5"), (1, "unsteered")):
        expect(columns.nth(column).locator(".facts").last).to_contain_text(steer)
    _, *both = opened.engine.jobs
    assert sorted(str(job.plan) for job in both) == ["", "push:5"]
    assert len({(job.sampling.seed, job.sampling.temp, job.prompt) for job in both}) == 1
    assert both[0].sampling.seed is not None
    opened.find("#compare").click()
    expect(columns).to_have_count(1)


def test_only_the_column_of_the_sliders_follows_them(opened: Panel) -> None:
    opened.find("#compare").click()
    opened.ask()
    expect(opened.find(".column").nth(1).locator(".text")).to_contain_text("w3")
    opened.find("#slider-push").press("PageUp")
    expect(opened.find(".column").nth(0).locator(".mark")).to_have_count(1)
    opened.find("#stop").click()
    expect(opened.find(".facts")).to_have_count(2)
    expect(opened.find(".column").nth(1).locator(".mark")).to_have_count(0)


def test_tokens_are_coloured_and_tell_their_readings(opened: Panel) -> None:
    opened.page.get_by_label("Meter of push").click()
    opened.page.get_by_label("Meter of known").click()
    opened.ask()
    expect(opened.find(".text")).to_contain_text("w12")
    opened.find("#stop").click()
    expect(opened.find(".facts")).to_be_visible()
    opened.find(".read").nth(3).hover()
    expect(opened.find("#tip")).to_have_text(re.compile(r"push\+0\.3known\+0\.3"))
    opened.find(".text").focus()
    opened.page.keyboard.press("ArrowRight")
    expect(opened.find(".pointed")).to_have_text(re.compile("w4"))  # from where the pointer is
    expect(opened.find("#said")).to_contain_text("w4: push +0.4, known +0.4")
    colours = [opened.find(".read").nth(at).evaluate(_COLOUR) for at in (0, 12)]
    assert colours[0] != colours[1]
    opened.page.get_by_label("Colour tokens by").select_option("")
    assert opened.find(".read").nth(0).evaluate(_COLOUR) != colours[0]


_COLOUR = "token => getComputedStyle(token).backgroundColor"


def test_two_instructions_become_a_slider_with_its_verdict(opened: Panel) -> None:
    opened.find("#make").click()
    opened.page.get_by_label("Name", exact=True).fill("mine")
    opened.page.get_by_label("More of it").fill("w1 w2")
    opened.page.get_by_label("Less of it").fill("w3 w4")
    opened.page.get_by_label("Find how far it can go").uncheck()
    opened.page.get_by_role("button", name="Make it").click()
    expect(opened.find("#jobs .job")).to_be_visible()
    expect(opened.find("#jobs .good")).to_contain_text("Ready. Uncalibrated")
    expect(opened.find("#slider-mine")).to_be_focused()
    opened.find("#slider-mine").press("PageUp")
    expect(opened.find("#steer")).to_have_value("mine:1")


def test_a_vector_in_the_making_can_be_cancelled_and_a_bad_one_is_told(opened: Panel) -> None:
    held = threading.Event()
    opened.engine.run_between(lambda: held.wait(60))  # so that it waits in line
    opened.page.get_by_text("More, ready to be made").click()
    opened.page.get_by_role("button", name="terse", exact=True).click()
    opened.page.get_by_role("button", name="Cancel").click()
    held.set()
    expect(opened.find("#jobs .job")).to_have_count(0)
    opened.find("#make").click()
    for label, text in (("Name", "push"), ("More of it", "w1"), ("Less of it", "w2")):
        opened.page.get_by_label(label, exact=True).fill(text)
    opened.page.get_by_role("button", name="Make it").click()
    expect(opened.find("#maker .note")).to_contain_text("You have a vector 'push' already")


def test_a_full_queue_is_waited_for(opened: Panel) -> None:
    opened.engine.full = 1
    opened.engine.texts = ("w7",)
    opened.ask()
    expect(opened.find(".error")).to_contain_text("7 requests are waiting already")
    expect(opened.find(".left")).to_contain_text("Trying again in")
    expect(opened.find(".text")).to_have_text("w7")
    expect(opened.find(".error")).to_have_count(0)


def test_waiting_for_a_full_queue_can_be_given_up(opened: Panel) -> None:
    opened.engine.full = 1000
    opened.ask()
    expect(opened.find(".left")).to_contain_text("Trying again in")
    opened.find("#stop").click()
    expect(opened.find(".left")).to_have_text("Given up.")
    expect(opened.find("#send")).to_be_visible()


def test_a_server_that_is_gone_is_told_in_place(opened: Panel) -> None:
    opened.stack.close()
    opened.ask()
    expect(opened.find(".error")).to_contain_text("The server cannot be reached")
    expect(opened.find("#status")).to_have_text("Server not reached")
    expect(opened.page.get_by_role("button", name="Try again")).to_be_visible()


def test_an_error_in_the_stream_keeps_the_text_and_leaves_the_chat_as_it_was(
    panel: Panel,
) -> None:
    panel.open(Writer(panel.model, ("w7 ", "w8 "), Event("", finish_reason="error", error="Oh.")))
    expect(panel.find("#slider-push")).to_be_visible()
    panel.ask("w1")
    expect(panel.find(".error")).to_be_visible()
    expect(panel.find(".text")).to_have_text("w7 w8 ")
    panel.engine.end = Event("", finish_reason="stop")
    panel.ask("w2")
    expect(panel.find(".facts").nth(1)).to_be_visible()
    assert "w7" not in panel.model.tokenizer.decode(panel.engine.jobs[1].prompt)


def test_the_key_is_asked_for_and_kept_for_this_tab(panel: Panel) -> None:
    panel.open(Writer(panel.model, ("w7",)), Settings(api_key="secret"))
    field = panel.page.get_by_label("API key", exact=True)
    for key in ("wrong", "secret"):
        expect(field).to_have_value("")
        field.fill(key)
        panel.page.get_by_role("button", name="Use it").click()
    expect(panel.find("#slider-push")).to_be_visible()
    panel.page.reload()
    expect(panel.find("#slider-push")).to_be_visible()
    assert panel.page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]


def test_without_a_key_the_page_says_so_and_asks_again_when_told(panel: Panel) -> None:
    panel.open(Writer(panel.model, ("w7",)), Settings(api_key="secret"))
    panel.page.get_by_role("button", name="Cancel").click()
    expect(panel.find("#status")).to_contain_text("API key needed")
    panel.page.get_by_role("button", name="Enter it").click()
    panel.page.get_by_label("API key", exact=True).fill("secret")
    panel.page.keyboard.press("Enter")
    expect(panel.find("#slider-push")).to_be_visible()


def test_a_thought_is_folded_away_from_the_answer(panel: Panel) -> None:
    panel.open(Writer(panel.model, ("w5 ", "w6 ", "</think>", "w7")))
    panel.page.get_by_text("Answers", exact=True).click()
    panel.page.get_by_label("Think first").check()
    panel.ask()
    expect(panel.find(".thought summary")).to_contain_text("Thought for")
    expect(panel.find(".thought p")).to_be_hidden()
    expect(panel.find(".text")).to_have_text("w7")
    panel.find(".thought summary").click()
    expect(panel.find(".thought p")).to_contain_text("w5 w6")


def test_light_and_dark_follow_the_system_until_chosen(opened: Panel) -> None:
    def background() -> str:
        return str(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    opened.page.emulate_media(color_scheme="light")
    light = background()
    opened.page.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    opened.find("#theme").click()
    assert background() == light
    opened.page.reload()
    assert background() == light


def test_on_a_phone_the_sliders_are_in_a_drawer_and_nothing_is_cut_off(opened: Panel) -> None:
    opened.page.set_viewport_size({"width": 375, "height": 700})
    slider = opened.find("#slider-push")
    expect(slider).to_be_hidden()
    opened.find("#open").click()
    expect(slider).to_be_in_viewport(ratio=1)  # the drawer has come up
    slider.press("End")
    expect(opened.find("#open")).to_have_text("Sliders (1)")
    width = "document.documentElement.scrollWidth"
    assert opened.page.evaluate(width) == 375
    opened.page.keyboard.press("Escape")
    expect(slider).to_be_hidden()


def test_every_control_has_a_name(opened: Panel) -> None:
    nameless = """all => all.filter(
      e => !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())
    ).map(e => e.outerHTML)"""
    assert opened.find("button, input, select, textarea").evaluate_all(nameless) == []


def _until(holds: Any) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_files_that_the_panel_does_not_have_are_404(opened: Panel) -> None:
    replies: list[httpx.Response] = [
        WEB.get(f"{opened.address}/panel/{name}") for name in ("none.js", "..%2Fapp.py", "app.py")
    ]
    assert [reply.status_code for reply in replies] == [404] * 3
