"""Answers as Markdown in a real browser: what is shown, as it grows, and what is never markup."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from mlxsteer.server.jobs import Event
from tests.server.browser import Panel, Writer, expect

SHOWN = {
    "plain w1": "<p>plain w1</p>",
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "# Title\ntext": "<h3>Title</h3><p>text</p>",
    "#hash": "<p>#hash</p>",
    "a **b** *c* __d__ _e_": "<p>a <strong>b</strong> <em>c</em> <strong>d</strong> <em>e</em></p>",
    "***x*** **a *b* c**": "<p><strong><em>x</em></strong> <strong>a <em>b</em> c</strong></p>",
    "snake_case_name 2 * 3 * 4 **open": "<p>snake_case_name 2 * 3 * 4 **open</p>",
    "`a*b*` ``c`d`` `open": "<p><code>a*b*</code> <code>c`d</code> `open</p>",
    r"\*no\* \`no\`": "<p>*no* `no`</p>",
    "```py\nx = 1\n\n# y\n```\nafter": "<pre><code>x = 1\n\n# y</code></pre><p>after</p>",
    "~~~\n```\n~~~": "<pre><code>```</code></pre>",
    "```\nnever closed": "<pre><code>never closed</code></pre>",
    "- a\n- **b**\n\n- c": "<ul><li>a</li><li><strong>b</strong></li><li>c</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "- a\n  - b\n    1. c\n- d": (
        '<ul><li>a<ul><li>b<ol start="1"><li>c</li></ol></li></ul></li><li>d</li></ul>'
    ),
    "- a\n\n  more\n\nout": "<ul><li>a<p>  more</p></li></ul><p>out</p>",
    "1. a\n```\nx\n```\n2. b": (
        '<ol start="1"><li>a</li></ol><pre><code>x</code></pre><ol start="2"><li>b</li></ol>'
    ),
}  # fmt: skip
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](https://example.org/x.png)",
    "<https://example.org> **<b onclick=alert(1)>b</b>**",
    "```html\n<iframe src=//example.org></iframe>\n```",
    "- <svg onload=alert(1)>\n# <style>*{display:none}</style>",
    "&lt;img src=x onerror=alert(1)&gt; `<a href=javascript:alert(1)>`",
)
WRITE = """async ([texts, cuts]) => {
  const { Prose } = await import("/panel/prose.js");
  return texts.map((text, index) => {
    const box = document.createElement("div");
    const prose = new Prose(box);
    for (const cut of cuts[index]) prose.update(text.slice(0, cut));
    prose.update(text);
    return box.innerHTML;
  });
}"""


def written(page: Any, texts: list[str], cuts: list[list[int]] | None = None) -> list[str]:
    """The texts as HTML, each shown first up to its cuts."""
    shown = page.evaluate(WRITE, [texts, cuts or [[] for _ in texts]])
    return [html.replace("<!---->", "") for html in shown]


def test_the_common_marks_become_elements(opened: Panel) -> None:
    assert dict(zip(SHOWN, written(opened.page, list(SHOWN)), strict=True)) == SHOWN


def test_a_text_that_grows_becomes_what_it_is_at_once(opened: Panel) -> None:
    rng = random.Random(0)
    pieces = [*SHOWN, *HOSTILE, "\n", "\n\n", "```", "**", "`", "- ", "1", ". ", "#", "_", " "]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 9))) for _ in range(300)]
    every = [list(range(len(text))) for text in texts]
    assert written(opened.page, texts, every) == written(opened.page, texts)


def test_a_long_text_of_open_marks_takes_no_time_to_speak_of(opened: Panel) -> None:
    took = opened.page.evaluate(
        """async () => {
          const { Prose } = await import("/panel/prose.js");
          const since = performance.now();
          for (const mark of ["*a ", "**a ", "_a ", "`a ``b ", "\\\\", "- ", "*a_b", "\\n> "]) {
            new Prose(document.createElement("div")).update(mark.repeat(20000 / mark.length));
          }
          return performance.now() - since;
        }"""
    )
    assert took < 20_000


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_nothing_in_an_answer_becomes_markup(panel: Panel, size: int) -> None:
    text = "\n\n".join(HOSTILE)
    pieces = tuple(text[at : at + size] for at in range(0, len(text), size))
    panel.open(Writer(panel.model, pieces))
    panel.page.on("dialog", lambda dialog: panel.errors.append(f"dialog: {dialog.message}"))
    expect(panel.find("#slider-push")).to_be_visible()
    panel.ask("w1")
    expect(panel.find(".facts")).to_be_visible()
    for hostile in ("<img src=x onerror=alert(1)>", "[click](javascript:alert(1))", "&lt;img"):
        expect(panel.find(".text")).to_contain_text(hostile)
    tags = panel.find(".text *").evaluate_all("all => all.map(e => e.localName)")
    assert set(tags) <= {"p", "pre", "code", "ul", "li", "h3", "span", "strong", "em"}
    attributes = panel.find(".text *").evaluate_all(
        "all => all.flatMap(e => e.getAttributeNames())"
    )
    assert set(attributes) <= {"class"}


def test_tokens_keep_their_marks_and_readings_inside_elements(panel: Panel) -> None:
    panel.open(Writer(panel.model))
    expect(panel.find("#slider-push")).to_be_visible()
    answer = """async () => {
      const { Answer } = await import("/panel/answer.js");
      const box = document.createElement("div");
      document.getElementById("columns").append(box);
      const answer = new Answer(box, "");
      const pieces = [["- a", ""], [" **b", ""], [" c**", "x:1"], ["\\n\\n", "x:2"],
        ["end", "x:2"]];
      pieces.forEach(([content, steer], index) => answer.add(
        { choices: [{ delta: { content }, steer, readings: [{ x: index }] }] }));
      return [box.querySelector(".text").innerHTML.replace(/ style="[^"]*"/g, ""), answer.content];
    }"""
    html, content = panel.page.evaluate(answer)
    sign = '<span class="mark" role="img" title="{0}" aria-label="{0}" data-steer="{1}"></span>'
    marks = [sign.format(f"From here on: {steer}", steer) for steer in ("x:1", "x:2")]
    token = '<span class="read">{}</span>'.format
    assert html == (
        f"<ul><li>{token('a')}{token(' ')}<strong>{token('b')}{marks[0]}{token(' c')}</strong>"
        f"</li></ul><p>{marks[1]}{token('end')}</p>"
    )
    assert content == "- a **b c**\n\nend"  # the next request has it as it came


def test_the_chat_goes_on_with_the_text_as_it_came(panel: Panel) -> None:
    panel.open(Writer(panel.model, ("**w7** ", "w8"), Event("", finish_reason="stop")))
    expect(panel.find("#slider-push")).to_be_visible()
    panel.ask("w1")
    expect(panel.find(".text strong")).to_have_text("w7")
    expect(panel.find(".facts")).to_be_visible()
    panel.find("#compare").click()
    expect(panel.find(".earlier .text strong")).to_have_text("w7")
    sent = []
    panel.page.on("request", lambda request: sent.append(request.post_data or ""))
    panel.ask("w2")
    expect(panel.find(".facts")).to_have_count(3)
    asked = [json.loads(body) for body in sent if "messages" in body]
    assert [body["messages"][1]["content"] for body in asked] == ["**w7** w8"] * 2
