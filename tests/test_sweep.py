"""A sweep tries what it says, resumes, and shows what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import mlxsteer
from mlxsteer import library
from mlxsteer.answers import AnswerStore
from mlxsteer.calibrate import Guard
from mlxsteer.cli import main
from mlxsteer.errors import ModelError, UsageError, VectorError
from mlxsteer.model import Model
from mlxsteer.sweep import Sweep, sweep
from mlxsteer.variants import variants
from mlxsteer.vector import SteeringVector
from tests.test_evaluate import towards, trait

pytestmark = pytest.mark.usefixtures("own_folders")
LOOSE = Guard(perplexity_ratio=1e9, distinct2_ratio=0, words=0)
SMALL: dict[str, Any] = {
    "contrast": trait(),
    "questions": 4,
    "max_tokens": 8,
    "random": 2,
    "random_questions": 2,
    "guard": LOOSE,
    "show_progress": False,
}


@pytest.fixture(scope="module")
def doses(tiny: Model) -> Sweep:
    return sweep(tiny, towards(tiny), **SMALL)


def test_the_metric_rises_with_the_dose_and_chance_does_not(doses):
    assert [cell.amount for cell in doses.cells] == [-5, -3, -1, 1, 3, 5]
    strongest = doses.cells[-1]
    assert strongest.effect.low > 0
    assert doses.best is not None
    assert doses.best.effect.mean == max(cell.effect.mean for cell in doses.cells)
    assert [point[0] for point in doses.band] == [-5, -3, -1, 1, 3, 5]
    assert all(low <= mean <= high for _, low, mean, high in doses.band)
    assert doses.band[-1][3] < strongest.arm.metric
    assert doses.asking is not None


def test_a_cell_that_breaks_the_guard_is_never_best(tiny):
    strict = Guard(perplexity_ratio=1e9, distinct2_ratio=2.0, words=0)
    found = sweep(tiny, towards(tiny), **{**SMALL, "guard": strict, "random": 0})
    assert not any(cell.coherent for cell in found.cells)
    assert found.best is None
    assert found.band == ()


def test_an_interrupted_sweep_goes_on_and_finds_the_same(tiny, doses, tmp_path):
    path = tmp_path / "out.jsonl"
    first = sweep(tiny, towards(tiny), store=AnswerStore(path), **SMALL)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:20])
    again = sweep(tiny, towards(tiny), store=AnswerStore(path), **SMALL)
    assert again.to_dict() == first.to_dict() == doses.to_dict()
    kept = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert {"variant", "amount", "question", "text"} <= set(kept[0])


def test_bands_cover_the_depth_and_act_on_their_layers_alone(tiny):
    bands = variants(tiny, towards(tiny), trait(), "layers", width=2, show_progress=False)
    assert [band.name for band in bands] == ["0-1", "1-2", "2-3"]
    for band in bands:
        first, last = map(int, band.name.split("-"))
        assert band.vector.layers == tuple(range(first, last + 1))
        assert band.vector.shares(np.ones(4, np.float32)).sum() == pytest.approx(1)
        assert tiny.plan((band.vector, "0.3d")).terms[0].layers == band.vector.layers
    [whole] = variants(tiny, towards(tiny), trait(), "layers", width=99, show_progress=False)
    assert whole.name == "0-3"


@pytest.mark.parametrize(
    ("over", "names"),
    [
        ("sites", ["residual", "ffn_out", "attn_out"]),
        ("ops", ["add", "add, norm kept", "project"]),
        ("methods", ["mean", "pca", "logistic", "whitened"]),
        ("positions", ["last_prompt", "answer_mean"]),
    ],
)
def test_other_axes_differ_in_one_thing(tiny, over, names):
    contrast = trait()
    made = variants(tiny, towards(tiny), contrast, over, show_progress=False)
    assert [variant.name for variant in made] == names
    facts = [
        (v.vector.site, v.vector.op, v.vector.norm_preserving, v.vector.about["method"],
         v.vector.about["extract_position"])
        for v in made
    ]  # fmt: skip
    assert len(set(facts)) == len(facts)
    assert [v.unit for v in made] == ["" if v.vector.op == "project" else "d" for v in made]


def test_what_cannot_be_varied_is_refused(tiny):
    with pytest.raises(UsageError, match=r"Unknown axis 'layer'.* Did you mean 'layers'"):
        variants(tiny, towards(tiny), trait(), "layer")
    with pytest.raises(ModelError, match="which are read in one way"):
        variants(tiny, towards(tiny), mlxsteer.ContrastSet.load("french"), "positions")
    with pytest.raises(UsageError, match="finite"):
        sweep(tiny, towards(tiny), **{**SMALL, "amounts": (float("nan"),)})


# --- what it looks like ---------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags that are opened, and whether any fetches something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetches: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href")
        inside = ("#", "data:")
        outside = [v for k, v in attrs if k in names and not (v or "").startswith(inside)]
        self.fetches += outside


@pytest.mark.parametrize("over", ["strength", "layers", "methods"])
def test_the_report_is_one_page_that_fetches_nothing(tiny, over):
    pytest.importorskip("matplotlib")
    from mlxsteer import report

    found = sweep(tiny, towards(tiny), **{**SMALL, "over": over, "amounts": (-1.0, 1.0)})
    text = report.page(found)
    page = _Page()
    page.feed(text)
    assert page.fetches == []
    assert {"svg", "table", "h3"} <= set(page.tags)
    assert "script" not in page.tags
    assert text.count("<tr") == 2 + len(found.cells) + (found.asking is not None)


def test_the_order_of_the_doses_does_not_change_the_figure(doses):
    pytest.importorskip("matplotlib")
    from mlxsteer import figures

    backwards = replace(doses, cells=doses.cells[::-1], band=doses.band[::-1])
    assert figures.svg(backwards) == figures.svg(doses)


def test_negative_doses_alone_make_a_report(tiny):
    pytest.importorskip("matplotlib")
    from mlxsteer import report

    found = sweep(tiny, towards(tiny), **{**SMALL, "over": "methods", "amounts": (-1.0,)})
    assert "mean:-1d" in report.page(found)


def test_a_vector_of_another_architecture_needs_force(tiny):
    foreign = replace(towards(tiny), model={"architecture": "gpt2"})
    with pytest.raises(VectorError, match="--force"):
        sweep(tiny, foreign, **SMALL)
    assert sweep(tiny, foreign, **{**SMALL, "amounts": (1.0,)}, force=True).cells


@pytest.mark.parametrize(
    ("options", "message"),
    [({"amounts": (0.0,)}, "Amount 0 is"), ({"width": 2}, "--over layers")],
)
def test_options_that_would_do_nothing_are_refused(tiny, options, message):
    with pytest.raises(UsageError, match=message):
        sweep(tiny, towards(tiny), **{**SMALL, **options})


def test_what_a_model_writes_is_no_markup(doses):
    pytest.importorskip("matplotlib")
    from dataclasses import replace

    from mlxsteer import report

    answers = ("<script>alert(1)</script>",) * len(doses.questions)
    nasty = replace(doses, plain=replace(doses.plain, answers=answers), name="<b>x</b>")
    text = report.page(nasty)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>x" not in text


def run(folder: Path, *arguments: str) -> Any:
    usual = ["--model", str(folder), "--questions", "2", "--max-tokens", "6", "--set", "terse"]
    return CliRunner().invoke(main, ["sweep", *arguments, *usual])


def test_the_command_prints_a_table_and_writes_what_was_asked(folder, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    library.save(towards(tiny), "tiny")
    files = [tmp_path / name for name in ("a.jsonl", "a.html", "a.png")]
    result = run(
        folder, "word", "--amounts", "-1,1", "--random", "1",
        "--out", str(files[0]), "--html", str(files[1]), "--png", str(files[2]),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "unsteered" in result.stdout
    assert all(path.stat().st_size > 100 for path in files)
    assert files[2].read_bytes()[:4] == b"\x89PNG"
    as_json = json.loads(run(folder, "word", "--amounts", "-1,1", "--json").stdout)
    assert [cell["amount"] for cell in as_json["cells"]] == [-1, 1]


def test_writing_back_needs_an_axis_and_an_effect(folder, tiny, monkeypatch):
    path = library.save(towards(tiny), "tiny")
    refused = run(folder, "word", "--write")
    assert refused.exit_code == 2
    assert "choose one with --over" in refused.stderr
    assert "no list of amounts" in run(folder, "word", "--amounts", "").stderr
    nothing = run(folder, "word", "--write", "--over", "methods", "--amounts", "0.01")
    assert nothing.exit_code == 2
    assert "nothing was written" in nothing.stderr
    assert SteeringVector.load(path).about.get("chosen_by") is None
