"""A vector from a contrast set: where it is read, what comes out, what an interruption costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxsteer
from mlxsteer import extract as extraction
from mlxsteer import files, reading
from mlxsteer.contrast import ContrastSet
from mlxsteer.errors import ContrastError, ModelError, UsageError, VectorError
from mlxsteer.extract import Options, extract, extract_positions, layers_for
from mlxsteer.model import Model
from mlxsteer.vector import SteeringVector
from tests.chat_models import chat_folder
from tests.tiny_models import HIDDEN

QUIET: dict[str, Any] = {"show_progress": False}
BASE: dict[str, Any] = {
    "name": "short",
    "description": "Short against long.",
    "labels": {"positive": "short", "negative": "long"},
    "held_out": ["w50 w51", "w52 w53"],
    "metric": {"name": "words", "direction": "down"},
}


POLES = {"positive": 20, "negative": 40}  # the first word of each pole's ten


def instructions(**changes: Any) -> ContrastSet:
    """Six questions, two wordings: twelve pairs."""
    parts = {
        "combine": "append",
        "questions": [f"w{i} w{i + 1} w{i + 2}" for i in range(10, 16)],
        "positive": ["w30 w31", "w32 w33 w34"],
        "negative": ["w40", "w41 w42"],
    }
    return ContrastSet.from_dict({**BASE, **parts, **changes})


pytestmark = pytest.mark.usefixtures("own_folders")


def last_states(model: Model, contrast: ContrastSet, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """([N, D], [N, D]) of the poles at the last prompt token, one forward pass each."""

    def state(messages: Any) -> np.ndarray:
        return np.array(model.capture(model.render(list(messages)))["residual"][layer, -1])

    pairs = contrast.pairs()
    positive = np.stack([state(pair.positive) for pair in pairs])
    return positive, np.stack([state(pair.negative) for pair in pairs])


# --- what comes out -------------------------------------------------------------------------


def test_the_default_is_the_mean_difference_at_the_last_prompt_token(tiny):
    contrast = instructions()
    vector = extract(tiny, contrast, **QUIET)
    assert vector.layers == (2,)  # 0.35 to 0.70 of four layers
    assert vector.about["extract_position"] == "last_prompt"
    assert vector.about["n_pairs"] == 12
    positive, negative = last_states(tiny, contrast, 2)
    expected = (positive - negative).mean(axis=0)
    found = vector.directions[2] * vector.magnitude[2]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_planted_direction_is_recovered(tmp_path):
    model = mlxsteer.load(str(chat_folder(tmp_path / "planted")))
    direction = np.random.default_rng(0).normal(size=HIDDEN).astype(np.float32)
    vocabulary = model.tokenizer.get_vocab()
    network: Any = model.network
    embedding = np.array(network.model.embed_tokens.weight)
    for index in range(10):  # w20…w29 are w40…w49, moved along the direction
        moved = embedding[vocabulary[f"w{40 + index}"]] + 3 * direction
        embedding[vocabulary[f"w{20 + index}"]] = moved
    network.model.embed_tokens.weight = mx.array(embedding)
    for block in network.layers:  # blocks that add little leave the direction as it went in
        block.self_attn.o_proj.weight *= 0.02
        block.mlp.down_proj.weight *= 0.02
    numbers = np.random.default_rng(1).integers(0, 10, (12, 6))
    pairs = [
        {key: " ".join(f"w{base + n}" for n in row) for key, base in POLES.items()}
        for row in numbers
    ]
    contrast = ContrastSet.from_dict({**BASE, "combine": "texts", "pairs": pairs})
    vector = extract(model, contrast, layers=range(4), **QUIET)
    unit = direction / np.linalg.norm(direction)
    assert min(vector.directions[layer] @ unit for layer in range(4)) > 0.99
    assert all(report["agreement"] == 1.0 for report in vector.about["layer_reports"])


def test_both_positions_in_one_pass_equal_two_separate_readings(tiny):
    contrast = instructions()
    both = extract_positions(tiny, contrast, position="both", layers=(1, 3), **QUIET)
    assert set(both) == {"last_prompt", "answer_mean"}
    for position, vector in both.items():
        alone = extract(tiny, contrast, position=position, layers=(1, 3), **QUIET)
        assert vector.about["extract_position"] == position
        for layer in (1, 3):
            np.testing.assert_allclose(vector.directions[layer], alone.directions[layer], atol=1e-5)
    assert both["last_prompt"] @ both["answer_mean"] < 0.99


def test_answers_are_read_over_the_answer_alone(tiny):
    rows = [
        {"question": f"w{i} w9", "positive": f"w{i} w30", "negative": f"w{i} w40 w41"}
        for i in range(10, 15)
    ]
    contrast = ContrastSet.from_dict({**BASE, "combine": "answers", "pairs": rows})
    passages = extraction._passages(tiny, contrast, contrast.pairs(), "answer_mean", None, False)
    for passage, words in zip(passages, [2, 3] * 5, strict=True):
        start, end = passage.spans["answer_mean"]
        assert (end, end - start) == (len(passage.tokens), words)


def test_the_same_call_gives_the_same_vector_and_another_seed_other_pairs(tiny):
    contrast = instructions()
    first, again = (extract(tiny, contrast, pairs=4, **QUIET) for _ in range(2))
    assert (first.directions[2] == again.directions[2]).all()
    other = extract(tiny, contrast, pairs=4, seed=1, **QUIET)
    assert (first.directions[2] != other.directions[2]).any()


def test_orthogonalise_leaves_nothing_along_the_control_mean_and_keeps_it(tiny, tmp_path):
    plain = extract(tiny, instructions(), layers=(1, 2), **QUIET)
    vector = extract(tiny, instructions(), layers=(1, 2), orthogonalise=True, **QUIET)
    for layer in (1, 2):
        control = vector.control_mean[layer] / np.linalg.norm(vector.control_mean[layer])
        assert abs(plain.directions[layer] @ control) > 1e-3
        assert abs(vector.directions[layer] @ control) < 1e-6
    read_back = SteeringVector.load(vector.save(tmp_path / "v.safetensors"))
    np.testing.assert_allclose(read_back.control_mean[1], vector.control_mean[1])
    assert read_back.about["orthogonalised"] is True


def test_poles_that_the_model_cannot_tell_apart_are_refused(tiny):
    contrast = instructions(positive=["unheard", "unknown"], negative=["words", "here"])
    with pytest.raises(VectorError, match="short: the two poles give the same states at layer 2"):
        extract(tiny, contrast, **QUIET)


@pytest.mark.parametrize("site", ["ffn_out", "attn_out"])
@pytest.mark.parametrize("op", ["add", "project", "clamp"])
def test_every_site_and_op_gives_a_vector_that_steers(tiny, site, op):
    vector = extract(tiny, instructions(), site=site, op=op, pairs=4, **QUIET)
    assert (vector.site, vector.op) == (site, op)
    tokens = tiny.render("w10 w11")
    plain = tiny.logits(tokens)
    assert not mx.array_equal(plain, tiny.logits(tokens, steer=[(vector, "1@all")]))


def test_the_vector_says_where_it_comes_from(tiny, tmp_path):
    contrast = instructions(extract={"norm_preserving": True, "acts_on": "all"})
    vector = extract(tiny, contrast, name="brief", pairs=5, method="pca", **QUIET)
    read_back = SteeringVector.load(vector.save(tmp_path / "v.safetensors"))
    assert read_back.name == "brief"
    assert read_back.norm_preserving
    assert read_back.positions == "all"
    assert read_back.model["weights_fingerprint"] == tiny.stamp["weights_fingerprint"]
    about = read_back.about
    assert about["dataset_sha256"] == contrast.digest()
    assert (about["n_pairs"], about["method"], about["seed"]) == (5, "pca", 0)
    assert about["positive_label"] == "short"
    assert about["tokens_run"] < about["tokens_given"]


def test_one_pair_is_enough_and_its_file_is_strict_json(tiny, tmp_path):
    vector = extract(tiny, instructions(), pairs=1, **QUIET)
    [report] = vector.about["layer_reports"]
    assert report["auroc"] is None
    json.dumps(dict(vector.about), allow_nan=False)
    vector.save(tmp_path / "v.safetensors")


# --- layers and options ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_layers", "op", "band", "expected"),
    [
        (30, "add", None, (11, 21)),
        (43, "add", None, (16, 30)),
        (30, "add", (0.30, 0.67), (9, 20)),
        (30, "add", (0.1, 0.5), (3, 15)),  # 0.1 · 30 is above 3 in floating point
        (30, "project", (0.3, 0.4), (6, 29)),
        (30, "project", None, (6, 29)),
        (1, "add", None, (0, 0)),
        (2, "add", None, (1, 1)),
        (4, "add", (0.9, 1.0), (3, 3)),
    ],
)
def test_bands_of_depth(n_layers, op, band, expected):
    contrast = instructions()
    contrast = replace(contrast, extract=replace(contrast.extract, band=band))
    layers = layers_for(n_layers, contrast, Options(op=op))
    assert (layers[0], layers[-1]) == expected
    assert layers == tuple(range(expected[0], expected[1] + 1))


def test_layers_asked_for_are_checked_sorted_and_may_be_any_integers():
    contrast = instructions()
    chosen = layers_for(4, contrast, Options(layers=tuple(np.array([3, 1, 3]))))
    assert chosen == (1, 3)
    assert all(type(layer) is int for layer in chosen)
    with pytest.raises(UsageError, match=r"Layer 4 is out of range: .* layers 0 to 3"):
        layers_for(4, contrast, Options(layers=(4,)))
    with pytest.raises(UsageError, match="Layer -1 is out of range"):
        layers_for(4, contrast, Options(layers=(-1,)))
    with pytest.raises(UsageError, match="No layers were given"):
        layers_for(4, contrast, Options(layers=()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "meen"}, "Unknown method 'meen'. Did you mean 'mean'"),
        ({"site": "residuals"}, "Unknown site 'residuals'. Did you mean 'residual'"),
        ({"site": "stream"}, "Unknown site 'stream'"),
        ({"op": "ad"}, "Unknown op 'ad'. Did you mean 'add'"),
        ({"position": "last_promt"}, "Unknown position 'last_promt'. Did you mean 'last_prompt'"),
        ({"pairs": 0}, "0 pairs are too few"),
        ({"methud": "mean"}, "Unknown option 'methud'. Did you mean 'method'"),
        ({"position": "both"}, "`extract_positions` gives both"),
        ({"position": "text_mean"}, "holds instructions, no texts"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_meant(tiny, options, message):
    with pytest.raises(UsageError) as caught:
        extract(tiny, instructions(), **options, **QUIET)
    assert message in str(caught.value)


def test_texts_cannot_be_read_at_a_prompt(tiny):
    pairs = [{"positive": f"w{i} w20", "negative": f"w{i} w30"} for i in range(3)]
    contrast = ContrastSet.from_dict({**BASE, "combine": "texts", "pairs": pairs})
    with pytest.raises(UsageError, match="read at text_mean, not last_prompt"):
        extract(tiny, contrast, position="last_prompt", **QUIET)


def test_more_pairs_than_there_are_is_said_once(tiny, capsys):
    extract(tiny, instructions(), **QUIET | {"pairs": 50, "show_progress": True})
    assert "short holds 12 pairs; using all." in capsys.readouterr().err
    extract(tiny, instructions())  # the default number means: up to that many
    assert "using all" not in capsys.readouterr().err


# --- interruption ---------------------------------------------------------------------------


def interrupt_reading(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    original, done = reading._run_group, []

    def run_group(*arguments: Any) -> Any:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return original(*arguments)

    monkeypatch.setattr(reading, "_run_group", run_group)


def kept_files() -> list[Path]:
    return [path for path in (files.cache_dir() / "extract").rglob("*") if path.is_file()]


def test_interrupted_twice_the_vector_is_bit_identical_and_nothing_is_left(tiny, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BATCH_TOKENS", 30)
    monkeypatch.setattr(extraction, "ANSWERS_AT_A_TIME", 5)
    options: dict[str, Any] = {"position": "both", "layers": (1, 2), **QUIET}
    whole = extract_positions(tiny, instructions(), resume=False, **options)
    assert kept_files() == []

    generate, calls = extraction.generate_batch, []

    def two_batches(*arguments: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return generate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "generate_batch", two_batches)
        with pytest.raises(KeyboardInterrupt):
            extract_positions(tiny, instructions(), **options)
        assert len(kept_files()) == 2
        calls.clear()
        patch.setattr(extraction, "generate_batch", lambda *a: calls.append(1) or generate(*a))
        interrupt_reading(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            extract_positions(tiny, instructions(), **options)
        assert len(calls) == 3  # 24 prompts make five batches, two of them done before

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "generate_batch", None)  # every answer is there
        again = extract_positions(tiny, instructions(), **options)
    for position, vector in whole.items():
        for layer in (1, 2):
            assert (again[position].directions[layer] == vector.directions[layer]).all()
    assert kept_files() == []


def test_another_set_or_site_never_takes_up_the_rest_of_this_one(tiny, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BATCH_TOKENS", 30)
    with monkeypatch.context() as patch:
        interrupt_reading(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            extract(tiny, instructions(), **QUIET)
    left = set(kept_files())
    assert len(left) == 2
    for other, options in ((instructions(), {"site": "ffn_out"}), (_other_set(), {})):
        fresh = extract(tiny, other, resume=False, **options, **QUIET)
        resumed = extract(tiny, other, **options, **QUIET)
        assert (fresh.directions[2] == resumed.directions[2]).all()
        assert set(kept_files()) == left


def _other_set() -> ContrastSet:
    return instructions(negative=["w43", "w44"])


def test_what_cannot_be_read_is_named(tiny):
    with pytest.raises(ContrastError, match="No contrast set"):
        tiny.extract("nothing")
    with pytest.raises(ModelError, match="Unknown site"):
        tiny.capture([1, 2], sites=["nowhere"])
