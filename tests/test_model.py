"""The Python face (DESIGN, part 8): from names to logits, every form of steering, one result.

One test drives the demo model from end to end; the rest use a tiny random one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import mlxsteer
from mlxsteer import library
from mlxsteer.errors import ModelError, UsageError, VectorError
from mlxsteer.grammar import Term
from mlxsteer.model import Model
from tests.chat_models import random_directions
from tests.tiny_models import HIDDEN

TOKENS = [5, 9, 13, 21, 34, 55]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSTEER_HOME", str(tmp_path / "home"))


@pytest.fixture
def push(tiny: Model) -> Any:
    """A vector that is found by the name `push`."""
    vector = random_directions()
    library.save(vector, tiny.key)
    return vector


def logits(model: Model, *arguments: Any, **options: Any) -> np.ndarray:
    return np.array(model.logits(*arguments, **options))


def test_the_python_interface_from_end_to_end(demo_path, tmp_path):
    model = mlxsteer.load("demo")
    terse = model.extract("terse", pairs=6, show_progress=False)
    assert terse.layers == tuple(range(9, 21))  # 0.30 to 0.67 of 30
    agreement = [report["agreement"] for report in terse.about["layer_reports"]]
    assert np.mean(agreement) > 0.8  # on pairs that the direction was not fitted to
    path = (3 * terse).save(tmp_path / "x.safetensors")

    tokens = model.render("Why do databases use indexes?")
    plain, strong = logits(model, tokens), logits(model, tokens, steer=3 * terse)
    assert plain.shape == (len(tokens), model.config["vocab_size"])
    assert plain.dtype == np.float32
    np.testing.assert_allclose(strong[:-1], plain[:-1], atol=1e-3)  # `answer` steers the last
    assert np.abs(strong[-1] - plain[-1]).max() > 1
    np.testing.assert_allclose(logits(model, tokens, steer=f"{path}:1"), strong, atol=2e-3)

    everywhere = f"{path}:1.0r@all"
    whole = logits(model, tokens, steer=everywhere)
    cache = model.make_cache()
    parts = [
        logits(model, part, steer=everywhere, cache=cache) for part in (tokens[:10], tokens[10:])
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-3)

    states = model.capture(tokens, sites=["residual"])["residual"]
    assert states.shape == (30, len(tokens), 576)
    answer = model.generate("What is rain?", steer=terse * 3, max_tokens=6)
    pieces = model.stream([{"role": "user", "content": "What is rain?"}], terse * 3, max_tokens=6)
    assert "".join(pieces) == answer


# --- forms of steering ----------------------------------------------------------------------


def test_every_form_of_the_same_steering_is_the_same(tiny, push, tmp_path):
    path = push.save(tmp_path / "push.safetensors")
    expected = logits(tiny, TOKENS, steer="push:2")
    forms: list[Any] = [
        push * 2,
        2 * push,
        Term("push", 2.0),
        {"push": 2},
        [Term("push", 2.0)],
        ["push:2"],
        [(push, 2.0)],
        (push, "2"),
        f"{path}:2",
        "push:1, push:1",
        [push, "push:1"],
        ({"push": 3}, -push),
        tiny.plan("push:2"),
    ]
    for form in forms:
        np.testing.assert_allclose(logits(tiny, TOKENS, steer=form), expected, atol=1e-5)
    assert np.abs(expected - logits(tiny, TOKENS)).max() > 1e-2


def test_a_raw_multiple_adds_exactly_the_arrays(tiny):
    array = np.random.default_rng(3).normal(size=HIDDEN)
    vector = mlxsteer.SteeringVector.from_arrays({1: array}, op="add", site="residual", name="raw")
    plain = np.array(tiny.capture(TOKENS)["residual"])
    steered = np.array(tiny.capture(TOKENS, steer=[(vector, "1.0r@all")])["residual"])
    np.testing.assert_allclose(steered[1] - plain[1], np.tile(array, (6, 1)), atol=1e-5)
    assert (steered[0] == plain[0]).all()


def test_strength_zero_and_no_steering_are_the_bare_network_bit_for_bit(tiny, folder, push):
    bare, _ = load_model(folder)
    expected = np.array(bare(mx.array([TOKENS]), cache=make_prompt_cache(bare))[0])
    for steer in (None, "", "push:0", {"push": 0}, [], [Term("push", 0.0)], "push:0@all"):
        assert (logits(tiny, TOKENS, steer=steer) == expected).all()
    logits(tiny, TOKENS, steer="push:5@all")
    assert (logits(tiny, TOKENS) == expected).all()


@pytest.mark.parametrize(
    ("steer", "error", "message"),
    [
        ("pushh:2", VectorError, "Did you mean 'push'"),
        ("push:x", UsageError, "'x' is not a strength"),
        ({"push": float("nan")}, UsageError, "finite"),
        (3, UsageError, "Cannot steer with a int"),
        ([3.5], UsageError, "Cannot steer with a float"),
        ("./none.safetensors:1", VectorError, "none.safetensors"),
    ],
)
def test_what_cannot_steer_is_named(tiny, push, steer, error, message):
    with pytest.raises(error) as caught:
        tiny.logits(TOKENS, steer=steer)
    assert message in str(caught.value)


def test_a_vector_of_another_width_depth_or_site_never_does_nothing(tiny):
    make = mlxsteer.SteeringVector.from_arrays
    with pytest.raises(VectorError, match="width 5"):
        tiny.logits(TOKENS, steer=make({1: np.ones(5)}))
    with pytest.raises(VectorError, match="layers 0 to 3"):
        tiny.logits(TOKENS, steer=make({9: np.ones(HIDDEN)}))
    stream = make({1: np.ones((4, HIDDEN))}, site="stream")
    with pytest.raises(ModelError, match="offers no site 'stream'"):
        tiny.logits(TOKENS, steer=[(stream, "1r")])


def test_a_name_without_a_vector_is_extracted_on_the_spot(tiny, tmp_path, capsys):
    folder = tmp_path / "home" / "prompts"
    folder.mkdir(parents=True)
    (folder / "brief.yaml").write_text(
        "description: d\nlabels: {positive: a, negative: b}\ncombine: append\n"
        "questions: [w1 w2, w3 w4]\npositive: [w5]\nnegative: [w6 w7]\nheld_out: [w8]\n"
        "metric: {name: words}\n"
    )
    first = logits(tiny, TOKENS, steer="brief:3")
    assert "extracting it from its contrast set" in capsys.readouterr().err
    assert (library.user_dir(tiny.key) / "brief.safetensors").is_file()
    assert (logits(tiny, TOKENS, steer="brief:3") == first).all()
    assert (first != logits(tiny, TOKENS)).any()


# --- logits and caches ----------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 3, 5])
@pytest.mark.parametrize("steer", [None, "push:3@all", "push:3"])
def test_a_cache_filled_in_two_pieces_gives_the_logits_of_one(tiny, push, steer, cut):
    whole = logits(tiny, TOKENS, steer=steer)
    cache = tiny.make_cache()
    parts = [
        logits(tiny, piece, steer=steer, cache=cache, prompt_length=len(TOKENS))
        for piece in (TOKENS[:cut], TOKENS[cut:])
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


def test_the_default_prompt_ends_with_the_tokens_given(tiny, push):
    plain, steered = logits(tiny, TOKENS), logits(tiny, TOKENS, steer="push:3")
    assert (steered[:-1] == plain[:-1]).all()
    assert (steered[-1] != plain[-1]).any()
    later = logits(tiny, TOKENS, steer="push:3", prompt_length=3)
    assert (later[:2] == plain[:2]).all()
    assert (later[2:] != plain[2:]).any(axis=1).all()


def test_a_failed_call_leaves_the_cache_as_it_was(tiny, push):
    whole, cache = logits(tiny, TOKENS), tiny.make_cache()
    tiny.logits(TOKENS[:3], cache=cache)
    for bad in ({"token_ids": []}, {"token_ids": TOKENS[3:], "steer": "pushh:1"}):
        with pytest.raises(mlxsteer.MlxsteerError):
            tiny.logits(**bad, cache=cache)
    np.testing.assert_allclose(logits(tiny, TOKENS[3:], cache=cache), whole[3:], atol=1e-5)


def test_a_cache_of_another_kind_is_refused(tiny):
    for cache in ([], make_prompt_cache(tiny.network)):
        with pytest.raises(UsageError, match=r"model\.make_cache\(\)"):
            tiny.logits(TOKENS, cache=cache)


# --- capture --------------------------------------------------------------------------------


def test_capture_gives_every_layer_and_position_in_float32(tiny):
    sites = ["residual", "attn_out", "ffn_out"]
    states = tiny.capture(TOKENS, sites=sites)
    assert list(states) == sites
    for array in states.values():
        assert array.shape == (4, len(TOKENS), HIDDEN)
        assert array.dtype == mx.float32
    residual, attn, ffn = (np.array(states[site]) for site in sites)
    np.testing.assert_allclose(residual[1:], residual[:-1] + attn[1:] + ffn[1:], atol=1e-5)


def test_capture_with_steering_reads_what_the_model_went_on_with(tiny, push):
    plain = np.array(tiny.capture(TOKENS)["residual"])
    steered = np.array(tiny.capture(TOKENS, steer="push:1r@all")["residual"])
    moved = push.directions[1] * push.magnitude[1]
    np.testing.assert_allclose(steered[1] - plain[1], np.tile(moved, (6, 1)), atol=1e-5)
    assert (steered[0] == plain[0]).all()


def test_capture_refuses_what_is_not_there(tiny):
    with pytest.raises(ModelError, match="Unknown site 'residuals'"):
        tiny.capture(TOKENS, sites=["residuals"])
    with pytest.raises(UsageError, match="no tokens"):
        tiny.capture([])


# --- facts ----------------------------------------------------------------------------------


def test_a_model_says_what_it_is(tiny, folder):
    assert repr(tiny) == "<mlxsteer.Model tiny: 4 layers, width 32>"
    assert tiny.key == "tiny"
    assert tiny.context_length == 256
    assert tiny.stamp["architecture"] == "llama"


def test_an_unknown_model_or_option_is_named(tiny):
    with pytest.raises(ModelError, match="Did you mean 'demo'"):
        mlxsteer.load("demmo")
    with pytest.raises(UsageError, match="Did you mean 'max_tokens'"):
        tiny.generate("w1", max_token=3)
    with pytest.raises(UsageError, match="Did you mean 'method'"):
        tiny.extract("terse", metod="mean")
