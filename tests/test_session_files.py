"""Chats in files: a saved chat goes on identically, and what is no chat changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxsteer.errors import MlxsteerError, UsageError
from mlxsteer.generation import Sampling
from mlxsteer.model import Model
from mlxsteer.session import Session
from tests.chat_models import random_directions
from tests.conversations import SHORT, expect_turn, keep_push, tokens_of

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture
def model(tiny: Model) -> Model:
    """The tiny model, with a vector `push` among the user's."""
    keep_push(tiny)
    return tiny


def test_a_saved_chat_goes_on_identically(model: Model, tmp_path: Path) -> None:
    sampling = Sampling(max_tokens=12, temp=0.8, seed=7)
    session = Session(model, steer="push:1r@generated", system="w1", sampling=sampling)
    list(session.ask("w3 w4"))
    session.save(tmp_path / "chat.json")
    again = Session(model)
    again.load(tmp_path / "chat.json")
    assert (again.system, again.sampling, str(again.plan)) == ("w1", sampling, str(session.plan))
    assert tokens_of(again.ask("w5")) == tokens_of(session.ask("w5"))
    assert again.messages == session.messages


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not a saved chat"),
        ("[]", "no format_version"),
        ('{"format_version": 1}', "'model' is missing"),
        (
            '{"format_version": 1, "model": "m", "steer": "", "system": null, "thinking": false,'
            ' "sampling": {"tmp": 1}, "messages": []}',
            "tmp",
        ),
        (
            '{"format_version": 1, "model": "m", "steer": "", "system": null, "thinking": false,'
            ' "sampling": {}, "messages": [{"role": "king", "content": ""}]}',
            "king",
        ),
        (
            '{"format_version": 1, "model": "m", "steer": "nosuch:3", "system": null,'
            ' "thinking": false, "sampling": {}, "messages": []}',
            "nosuch",
        ),
    ],
)
def test_a_file_that_is_no_chat_changes_nothing(
    model: Model, tmp_path: Path, content: str, says: str
) -> None:
    session = Session(model, steer="push:1r", sampling=SHORT)
    expect_turn(session, "w3")
    before = (list(session.messages), session.plan, session.sampling)
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises(MlxsteerError, match=says) as caught:
        session.load(tmp_path / "chat.json")
    assert not isinstance(caught.value, UsageError)
    assert (session.messages, session.plan, session.sampling) == before


def test_save_replaces_no_other_file(model: Model, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(MlxsteerError, match="not a saved chat"):
        Session(model).save(notes)
    assert notes.read_text() == "mine"


def test_steering_by_arrays_is_not_saved_under_a_name_that_means_other_arrays(
    model: Model, tmp_path: Path
) -> None:
    other = random_directions(seed=5)
    with pytest.raises(MlxsteerError, match="given as arrays"):
        Session(model, steer=(other, "1r")).save(tmp_path / "chat.json")
    assert not (tmp_path / "chat.json").exists()
