"""Readings token by token: against capture, against each other, and at no cost where unwanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxsteer import generation, library
from mlxsteer.errors import UsageError, VectorError
from mlxsteer.generation import Piece, Sampling
from mlxsteer.meter import MeteredModel, probes_of, series_of
from mlxsteer.model import Model
from mlxsteer.plan import ANSWER, THINK, Plan
from mlxsteer.probe import probe_of
from mlxsteer.session import Session
from mlxsteer.steered import SteeredModel
from tests.chat_models import random_directions

TOKENS = [2, 9, 13, 21, 34, 55, 3]
GREEDY = Sampling(max_tokens=12)

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture
def vectors(tiny: Model) -> list[Any]:
    """Two vectors on layers 1 and 2, found by the names `push` and `pull`."""
    made = [random_directions(), random_directions(1, "pull")]
    for vector in made:
        library.save(vector, tiny.key)
    return made


def pieces(model: Model, steer: str | None = None, probes: Any = ()) -> list[Piece]:
    return list(generation.stream(model, TOKENS, model.plan(steer), GREEDY, probes=probes))


# --- text that exists -----------------------------------------------------------------------------


@pytest.mark.parametrize("steer", [None, "pull:1r@all"])
def test_the_series_of_a_text_reads_what_capture_reads(tiny: Model, vectors, steer) -> None:
    series = tiny.meter(TOKENS, "push, pull@1", steer)
    assert series.names == ("push", "pull")
    assert series.tokens == tuple(TOKENS)
    states = np.array(tiny.capture(TOKENS, steer=steer)["residual"])
    norms = tiny.residual_norm
    push = states[2] @ vectors[0].directions[2] / norms[2]
    pull = states[1] @ vectors[1].directions[1] / norms[1]
    assert np.isnan(series.values[0]).all()  # the first position is a sink
    np.testing.assert_allclose(series.values[1:, 0], push[1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(series.values[1:, 1], pull[1:], rtol=1e-4, atol=1e-5)
    means = {"push": push[1:].mean(), "pull": pull[1:].mean()}
    assert series.means == pytest.approx(means, abs=1e-6)


def test_text_is_read_as_the_tokenizer_cuts_it(tiny: Model, vectors) -> None:
    series = tiny.meter("w3 w4 w5", "push")
    assert series.texts == ("w3", "w4", "w5")
    assert np.array_equal(series.values, tiny.meter(series.tokens, "push").values, equal_nan=True)


# --- text that is being written -------------------------------------------------------------------


@pytest.mark.parametrize("steer", [None, "pull:1r"])
def test_a_piece_carries_the_reading_of_the_state_it_was_chosen_from(
    tiny: Model, vectors, steer
) -> None:
    probes = probes_of(tiny, "push,pull")
    written = [piece for piece in pieces(tiny, steer, probes) if piece.finish_reason is None]
    assert len(written) >= 5
    whole = [*TOKENS, *(piece.token for piece in written)]
    series = tiny.meter(whole, probes, steer, prompt_length=len(TOKENS))
    start = len(TOKENS) - 1
    expected = series.values[start : start + len(written)]
    np.testing.assert_allclose([p.readings for p in written], expected, atol=1e-4)


def test_metering_changes_no_token_and_the_end_has_no_reading(tiny: Model, vectors) -> None:
    plain, metered = pieces(tiny), pieces(tiny, probes=probes_of(tiny, "push"))
    assert [piece.token for piece in metered] == [piece.token for piece in plain]
    assert [piece.readings for piece in plain] == [()] * len(plain)
    assert metered[-1].finish_reason is not None
    assert metered[-1].readings == ()


def test_without_a_meter_nothing_is_captured(tiny: Model, vectors, monkeypatch) -> None:
    asked: list[Any] = []
    read = SteeredModel.read
    monkeypatch.setattr(
        SteeredModel,
        "read",
        lambda self, tokens, cache, places: (
            asked.append(places) or read(self, tokens, cache, places)
        ),
    )
    pieces(tiny)
    assert set(asked) == {frozenset()}
    asked.clear()
    count = len(pieces(tiny, probes=probes_of(tiny, "push")))
    metered = [places for places in asked if places]
    assert set(metered) == {frozenset({(2, "residual")})}
    assert len(metered) in (count, count + 1)  # the prompt's first part is read by nobody


def test_readings_are_computed_with_the_logits(tiny: Model, vectors) -> None:
    model = MeteredModel(tiny.steered, probes_of(tiny, "push"))
    cache = tiny.steered.new_cache(tiny.row(Plan([]), len(TOKENS)))
    logits = model(mx.array([TOKENS]), cache)
    mx.eval(logits)
    (reading,) = model.take(len(TOKENS) - 1)
    assert reading == pytest.approx(tiny.meter(TOKENS, "push").values[-1, 0], abs=1e-4)
    with pytest.raises(KeyError):
        model.take(len(TOKENS) - 1)


def test_a_session_meters_every_turn_and_what_it_caches_stays_right(tiny: Model, vectors) -> None:
    plain = Session(tiny, sampling=GREEDY)
    metered = Session(tiny, sampling=GREEDY, meters="push")
    for question in ("w1 w2", "w3"):
        expected = [piece.token for piece in plain.ask(question)]
        found = list(metered.ask(question))
        assert [piece.token for piece in found] == expected
        assert all(len(piece.readings) == 1 for piece in found if piece.finish_reason is None)
    assert metered.last.cached_tokens > 0
    metered.meter(())
    assert all(piece.readings == () for piece in metered.ask("w4"))


def test_the_series_of_an_answer_leaves_thoughts_and_the_end_out(tiny: Model, vectors) -> None:
    probes = probes_of(tiny, vectors)
    written = [
        Piece("hm", 1, THINK, None, (9.0, 9.0)),
        Piece("a", 2, ANSWER, None, (1.0, 2.0)),
        Piece("b", 3, ANSWER, None, (3.0, 4.0)),
        Piece("", 0, ANSWER, "stop"),
    ]
    series = series_of(probes, written)
    assert (series.tokens, series.texts) == ((2, 3), ("a", "b"))
    assert series.means == {"push": 2.0, "pull": 3.0}
    assert series_of(probes, []).means == {}


# --- what to read ---------------------------------------------------------------------------------


def test_meters_are_names_layers_vectors_or_probes(tiny: Model, vectors, tmp_path: Path) -> None:
    path = vectors[0].save(tmp_path / "far@away" / "push.safetensors")
    probe = probe_of(vectors[1], tiny.shape, 1)
    found = probes_of(tiny, ["push@1, pull", str(path), vectors[0], probe])
    assert [(p.name, p.layer) for p in found] == [
        ("push", 1), ("pull", 2), ("push", 2), ("push", 2), ("pull", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("meters", "error", "message"),
    [
        (" , ", UsageError, "No meter is named"),
        ([], UsageError, "No meter is named"),
        ("push@x", UsageError, "'x' is not a layer. Type e.g. push@12"),
        ("push@0", UsageError, "no direction at layer 0"),
        ("pusch", VectorError, "'pusch'.* Did you mean 'push'"),
    ],
)
def test_what_cannot_be_read_says_why(tiny: Model, vectors, meters, error, message) -> None:
    with pytest.raises(error, match=message):
        probes_of(tiny, meters)


def test_no_tokens_are_no_text(tiny: Model, vectors) -> None:
    with pytest.raises(UsageError, match="no text to read"):
        tiny.meter([], "push")
