"""The panel in a real browser: what a user does, what goes wrong, and what it may never do."""

from __future__ import annotations

import re

import httpx

from mlxsteer.server.jobs import Event
from mlxsteer.server.panel import POLICY
from mlxsteer.server.settings import Settings
from tests.server.api import WEB
from tests.server.browser import FILES, Panel, Writer, expect, until


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
    until(lambda: opened.engine.generations[0].cancelled)


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


def test_files_that_the_panel_does_not_have_are_404(opened: Panel) -> None:
    replies: list[httpx.Response] = [
        WEB.get(f"{opened.address}/panel/{name}") for name in ("none.js", "..%2Fapp.py", "app.py")
    ]
    assert [reply.status_code for reply in replies] == [404] * 3
