"""Sliders in a real browser: moved, searched, kept as presets, compared, read, and made."""

from __future__ import annotations

import re
import threading

from tests.server.browser import Panel, expect


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
