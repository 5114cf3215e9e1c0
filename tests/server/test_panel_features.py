"""Features in a real browser: found, added, clamped, removed, kept, and told of when missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxsteer.model import Model
from mlxsteer.sae import index
from mlxsteer.server.settings import Settings
from tests.server.browser import Panel, Writer, expect
from tests.server.dictionaries import small_dictionary

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def shelf(chatty: Model) -> Iterator[Path]:
    """The folder of a dictionary of 25 features, of which one has a hostile label."""
    path = small_dictionary(chatty, count=25, label=HOSTILE)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def looking(shelf: Path, opened: Panel) -> Panel:
    """A page that shows the features."""
    opened.page.get_by_role("tab", name="Features").click()
    expect(opened.find("#found li")).to_have_count(20)
    return opened


def look_for(panel: Panel, words: str) -> Any:
    panel.page.get_by_label("Find a feature").fill(words)
    return panel.find("#found li")


def test_a_search_shows_what_each_feature_is(looking: Panel) -> None:
    expect(looking.find("#feature-note")).to_have_text("The first 20 features.")
    found = look_for(looking, "w3")
    expect(found).to_have_count(1)
    expect(found).to_contain_text("small/3 promotes w3")
    expect(found).to_contain_text("fires on 10% of states")
    expect(found.locator("mark")).to_have_text("w3")
    expect(looking.find("#feature-note")).to_have_text("1 feature.")
    expect(look_for(looking, "17").locator("b")).to_have_text("small/17")
    expect(look_for(looking, "zebra")).to_have_count(0)
    expect(looking.find("#feature-note")).to_have_text("No feature matches “zebra”.")


def test_the_list_goes_on(looking: Panel) -> None:
    looking.page.get_by_role("button", name="More features").click()
    expect(looking.find("#found li")).to_have_count(25)
    expect(looking.find("#found li").nth(20).get_by_role("button")).to_be_focused()
    expect(looking.find("#more-features")).to_be_hidden()


def test_a_label_is_text_whatever_it_holds(looking: Panel) -> None:
    expect(looking.find("#found li").first).to_contain_text(HOSTILE)
    looking.page.get_by_role("button", name="Add sae/small/4").click()
    expect(looking.find("#in-use .row")).to_contain_text(HOSTILE)
    assert looking.find("#features img").count() == 0


def test_an_added_feature_steers_beside_a_vector_and_can_be_clamped(looking: Panel) -> None:
    looking.find("#steer").fill("push:2")
    looking.page.get_by_role("button", name="Add sae/small/3").click()
    line = looking.find("#steer")
    expect(line).to_have_value("push:2, sae/small/3:1")
    slider = looking.find("#in-use input[type=range]")
    slider.press("PageUp")
    expect(line).to_have_value("push:2, sae/small/3:2")
    expect(slider).to_have_attribute("max", "5")
    looking.page.get_by_label("Clamp sae/small/3").click()
    expect(line).to_have_value("push:2, sae/small/3/clamp:2")
    expect(looking.page.get_by_label("Clamp sae/small/3")).to_be_focused()
    expect(looking.page.get_by_label("Clamp sae/small/3")).to_have_attribute("aria-pressed", "true")
    looking.engine.texts = ("w7 ", "w8")
    looking.page.get_by_label("Meter of sae/small/3").click()
    looking.ask("w1")
    expect(looking.find(".facts").last).to_contain_text("push:2, sae/small/3/clamp:2")
    (job,) = looking.engine.jobs
    assert [probe.name for probe in job.probes] == ["sae/small/3"]
    looking.page.get_by_label("Clamp sae/small/3").click()
    expect(line).to_have_value("push:2, sae/small/3:2")


def test_a_feature_is_removed_where_it_was_added_or_at_its_slider(looking: Panel) -> None:
    for remove in ("#found li:nth-child(2) button", "#in-use .drop"):
        looking.find("#found li:nth-child(2) button").click()
        expect(looking.find("#in-use .row")).to_have_count(1)
        expect(looking.find("#found li:nth-child(2) button")).to_have_text("Remove")
        expect(looking.find("#features-count")).to_have_text("1")
        looking.find(remove).click()
        expect(looking.find("#in-use .row")).to_have_count(0)
        expect(looking.find("#steer")).to_have_value("")
        expect(looking.find("#found li:nth-child(2) button")).to_have_text("Add")


def test_sliders_of_features_outlive_the_page_and_not_their_dictionary(
    looking: Panel, shelf: Path
) -> None:
    for name in ("sae/small/0", "sae/small/1"):
        looking.page.get_by_role("button", name=f"Add {name},").click()
    expect(looking.find("#in-use .row")).to_have_count(2)
    looking.page.reload()
    expect(looking.find("#features-count")).to_have_text("2")
    expect(looking.find("#steer")).to_have_value("")
    looking.page.get_by_role("tab", name="Features").click()
    looking.find("#in-use input[type=range]").first.press("End")
    expect(looking.find("#steer")).to_have_value(re.compile(r"^sae/small/[01]:5$"))
    shutil.rmtree(shelf)
    looking.page.reload()
    looking.page.get_by_role("tab", name="Features").click()
    expect(looking.find("#feature-note")).to_contain_text("This model has no dictionary")
    expect(looking.find("#in-use .row")).to_have_count(0)
    kept = looking.page.evaluate("localStorage.getItem('mlxsteer.features')")
    assert json.loads(kept) == {"tiny": []}


def test_the_line_gives_features_sliders_and_says_which_are_none(looking: Panel) -> None:
    line, rows = looking.find("#steer"), looking.find("#in-use .row")
    line.fill("sae/small/2")
    expect(rows).to_have_count(1)
    line.fill("sae/small/23:-2, push:1")
    expect(rows.locator("b")).to_have_text("small/23")  # the other was only on the way
    rows.locator("input").press("Home")
    expect(line).to_have_value("push:1")
    expect(rows).to_have_count(1)
    line.fill("sae/small/99:1")
    expect(looking.find("#steer-note")).to_contain_text("99")
    line.fill("push:1")
    expect(looking.find("#steer-note")).to_have_text("")


def test_a_dictionary_without_an_index_says_what_to_type(shelf: Path, opened: Panel) -> None:
    (shelf / index.INDEX).unlink()
    opened.page.get_by_role("tab", name="Features").click()
    note = opened.find("#feature-note")
    expect(note).to_have_text("small cannot be searched yet: mlxsteer sae index small")


def test_a_search_that_fails_says_so_and_can_be_tried_again(looking: Panel) -> None:
    looking.page.route("**/v1/steering/features*", lambda route: route.abort())
    expect(look_for(looking, "w3")).to_have_count(0)
    expect(looking.find("#feature-note")).to_contain_text("The server cannot be reached")
    looking.page.unroute("**/v1/steering/features*")
    looking.page.get_by_role("button", name="Try again").click()
    expect(looking.find("#found li")).to_have_count(1)


def test_only_the_last_words_are_answered(looking: Panel) -> None:
    looking.page.route("**/features?q=w3&*", lambda route: None)  # never answered
    with looking.page.expect_request("**/features?q=w3&*") as first:
        look_for(looking, "w3")
    expect(looking.find("#found")).to_have_attribute("aria-busy", "true")
    expect(look_for(looking, "w5")).to_have_count(1)
    expect(looking.find("#found b")).to_have_text("small/5")
    expect(looking.find("#feature-note")).to_have_text("1 feature.")
    assert first.value.failure  # the page gave it up


def test_of_the_snippets_one_with_the_words_is_shown(shelf: Path, opened: Panel) -> None:
    known = index.read(shelf)
    others = (
        index.Snippet("far ", "off", " here", 2.0, 0),
        index.Snippet("the zebra ", "w3", "", 1.0, 1),
    )
    changed = {**known.features, 3: replace(known.features[3], snippets=others)}
    index.write(index.Index(changed, (), {}), shelf)
    opened.page.get_by_role("tab", name="Features").click()
    found = look_for(opened, "zebra")
    expect(found).to_have_count(1)
    expect(found.locator(".snippet")).to_have_text("the zebra w3")
    look_for(opened, "off")
    expect(found.locator(".snippet")).to_have_text("far off here")


def test_tabs_go_by_arrow_keys_and_features_fit_a_phone(shelf: Path, opened: Panel) -> None:
    opened.page.set_viewport_size({"width": 375, "height": 700})
    opened.find("#open").click()
    opened.page.get_by_role("tab", name="Vectors").press("ArrowRight")
    tab = opened.page.get_by_role("tab", name="Features")
    expect(tab).to_be_focused()
    expect(tab).to_have_attribute("aria-selected", "true")
    expect(opened.find("#vectors")).to_be_hidden()
    opened.find("#found button").first.click()
    slider = opened.find("#in-use input[type=range]")
    slider.press("End")
    expect(opened.find("#open")).to_have_text("Sliders (1)")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 375
    wide = """all => all.filter(e => e.scrollWidth > e.clientWidth + 1 && e.localName !== 'input'
      && getComputedStyle(e).overflow === 'visible' && e.clientWidth).map(e => e.outerHTML)"""
    assert opened.find("#features *").evaluate_all(wide) == []
    nameless = """all => all.filter(
      e => !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())
    ).map(e => e.outerHTML)"""
    assert opened.find("button, input, select, textarea").evaluate_all(nameless) == []


def test_features_of_the_servers_own_steering_have_sliders(shelf: Path, panel: Panel) -> None:
    panel.open(Writer(panel.model), Settings(steer="sae/small/3/clamp:2"))
    expect(panel.find("#features-count")).to_have_text("1")
    expect(panel.find("#steer-note")).to_have_text("")
    panel.page.get_by_role("tab", name="Features").click()
    expect(panel.find("#in-use input[type=range]")).to_have_value("2")
