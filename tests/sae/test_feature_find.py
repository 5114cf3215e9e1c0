"""Index, find, explain, label: what features fire on, found and named, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlxsteer.cli import main
from mlxsteer.contrast import ContrastSet
from mlxsteer.errors import MlxsteerError, SaeError
from mlxsteer.judge import Comparison
from mlxsteer.model import Model
from mlxsteer.models.hooks import Run
from mlxsteer.sae import activations, find, folder, index, indexing, label, labels, shelf
from mlxsteer.sae.corpus import Window
from mlxsteer.sae.dictionary import Dictionary
from mlxsteer.sae.index import Background, Feature, Index, Snippet
from mlxsteer.sae.label import ModelNamer
from mlxsteer.sae.labels import Label
from mlxsteer.vector import SteeringVector
from tests.chat_models import WORDS

pytestmark = pytest.mark.usefixtures("own_folders")
D, F, LAYER = 32, 24, 2


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    rng = np.random.default_rng(5)
    return [Window(tuple(rng.integers(6, 64, 12).tolist()), 1) for _ in range(40)]


@pytest.fixture(scope="module")
def dictionary(tiny: Model, windows: list[Window]) -> Dictionary:
    """Random directions; each feature fires on the few states that lie furthest along its own."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(F, D)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    states = np.array(activations.read_batch(tiny, windows, LAYER, "residual"))
    return Dictionary(
        "jumprelu",
        W_enc=mx.array(rows.T),
        W_dec=mx.array(rows),
        b_dec=mx.zeros(D),
        b_enc=mx.zeros(F),
        threshold=mx.array(np.maximum(np.quantile(states @ rows.T, 0.9, axis=0), 0)),
        about={"layer": LAYER, "site": "residual"},
    )


@pytest.fixture(scope="module")
def made(tiny: Model, dictionary: Dictionary, windows: list[Window]) -> Index:
    return indexing.build(tiny, dictionary, windows, show_progress=False)


@pytest.fixture
def kept(tiny: Model, dictionary: Dictionary, made: Index) -> Path:
    path = folder.write(dictionary, shelf.place_for("small", tiny.key))
    index.write(made, path)
    return path


def acts_of(tiny: Model, dictionary: Dictionary, window: Window) -> np.ndarray:
    """[T, F] by the model's own capture."""
    states = tiny.capture(window.tokens)["residual"][LAYER]
    return np.array(dictionary.encode(states))


# --- the index ----------------------------------------------------------------------------------


def test_the_index_counts_what_fires_where(
    tiny: Model, dictionary: Dictionary, windows: list[Window], made: Index
) -> None:
    acts = np.concatenate([acts_of(tiny, dictionary, w)[w.start :] for w in windows])
    assert set(made.features) == set(np.flatnonzero(acts.max(axis=0) > 0))
    for number, feature in made.features.items():
        column = acts[:, number]
        assert feature.density == pytest.approx((column > 0).mean(), abs=1e-3)
        assert feature.mean == pytest.approx(column.mean(), rel=1e-3)
        assert feature.maximum == pytest.approx(column.max(), rel=1e-3)
        best = windows[int(column.argmax()) // 11].tokens[int(column.argmax()) % 11 + 1]
        assert feature.snippets[0].token.strip() == WORDS[best]
        strengths = [one.activation for one in feature.snippets]
        assert strengths == sorted(strengths, reverse=True)
        assert len({one.window for one in feature.snippets}) == len(strengths)


def test_captured_states_give_the_same_index(
    tiny: Model, dictionary: Dictionary, windows: list[Window], tmp_path: Path
) -> None:
    data = activations.capture(tiny, windows, LAYER, "residual", tmp_path, show_progress=False)
    found = indexing.of_activations(tiny, dictionary, windows, data, show_progress=False)
    again = indexing.build(tiny, dictionary, windows, show_progress=False)
    both = set(found.features) & set(again.features)
    assert len(both) > F // 2
    near = [abs(found.features[i].maximum - again.features[i].maximum) for i in both]
    assert max(near) < 0.02 * max(again.features[i].maximum for i in both)  # bfloat16 on disk


def test_background_says_what_fires_in_it(
    tiny: Model, dictionary: Dictionary, windows: list[Window], made: Index
) -> None:
    texts = {tiny.tokenizer.decode(list(w.tokens[1:])): w for w in windows}
    assert len(made.background) == len(windows)
    for stretch in made.background[:5]:
        acts = acts_of(tiny, dictionary, texts[stretch.text])[1:]
        assert stretch.fires == set(np.flatnonzero((acts > 0).any(axis=0)))


def test_the_index_and_its_labels_survive_the_file(kept: Path, made: Index) -> None:
    assert index.read(kept) == made
    number = next(iter(made.features))
    labels.keep(kept, {number: Label("a name", 0.8, 6, 0.1, "somebody")})
    assert index.read(kept).features[number].label.text == "a name"
    (kept / index.INDEX).write_text("{")
    with pytest.raises(SaeError, match="damaged"):
        index.read(kept)
    (kept / index.INDEX).unlink()
    with pytest.raises(SaeError, match="mlxsteer sae index"):
        index.read(kept)


def test_search_goes_by_label_then_token_then_context() -> None:
    def feature(number: int, **fields: object) -> Feature:
        around = Snippet("the old ", "gate", " of gold", 2.0, 0)
        plain = {"density": 0.1, "maximum": 2.0, "mean": 0.1, "promoted": (), "snippets": (around,)}
        return Feature(number, **{**plain, **fields})  # type: ignore[arg-type]

    some = Snippet("cheese and ", "br", "idge", 1.0, 0)
    features = [
        feature(0),
        feature(1, snippets=(some,)),
        feature(2, label=Label("Bridges", 0.9, 6, 0.0, "x")),
        feature(3, promoted=(" bridge",), snippets=()),
        feature(4, snippets=(Snippet("a bridge of ", "stone", "", 1.0, 0),)),
        feature(5, label=Label("bridge", 0.9, 6, 0.0, "x")),
    ]
    found = index.search(Index({f.index: f for f in features}, (), {}), "Bridge")
    assert [f.index for f in found] == [5, 1, 3, 4]


# --- finding ------------------------------------------------------------------------------------


def test_find_by_set_is_the_contrast_of_activations(
    tiny: Model, dictionary: Dictionary, made: Index
) -> None:
    contrast_set = contrast_of("w1 w2 w3 w4", "w50 w51 w52 w53")
    found = find.by_set(tiny, dictionary, made, contrast_set)
    up, down = (np.mean([acts_of(tiny, dictionary, w)[1:].mean(axis=0) for w in pole], axis=0)
                for pole in find.poles_of(tiny, contrast_set))  # fmt: skip
    for one in found:
        by_hand = (up - down)[one.feature.index] / tiny.residual_norm[LAYER]
        assert one.contrast == pytest.approx(by_hand, rel=1e-3)
    assert [f.contrast for f in found] == sorted((f.contrast for f in found), reverse=True)


def contrast_of(positive: str, negative: str) -> ContrastSet:
    yaml = "combine: texts\ndescription: x\nlabels: {positive: a, negative: b}\npairs:\n"
    for more in range(8):
        yaml += f"  - positive: {positive} w{more}\n    negative: {negative} w{more}\n"
    yaml += "held_out: common\nmetric: {name: words, direction: up}\n"
    return ContrastSet.from_yaml(yaml, "x.yaml")


def test_effects_are_what_a_push_adds_to_the_likelihood(
    tiny: Model, dictionary: Dictionary
) -> None:
    window = Window((8, 20, 33, 41, 9), 2)
    got = find.effects(tiny, dictionary, [3, 5], [window])
    tokens = mx.array([window.tokens])

    def likelihood(shift: np.ndarray) -> float:
        with tiny.hooks.forward(Run(edits={(LAYER, "residual"): lambda x: x + mx.array(shift)})):
            logits = tiny.network(tokens)[0].astype(mx.float32)
        each = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return float(np.mean([each[t - 1, window.tokens[t]].item() for t in range(2, 5)]))

    size = find.EFFECT_DOSE * tiny.residual_norm[LAYER]
    for number, gain in zip([3, 5], got, strict=True):
        pushed = likelihood(size * dictionary.feature(number))
        assert gain == pytest.approx(pushed - likelihood(np.zeros(D, np.float32)), abs=1e-4)


def test_explain_finds_the_feature_that_a_vector_is_made_of(
    tiny: Model, dictionary: Dictionary, made: Index
) -> None:
    first, second = list(made.features)[:2]
    array = dictionary.feature(first) - 0.6 * dictionary.feature(second)
    vector = SteeringVector.from_arrays({LAYER: array}, n_layers=4)
    parts = find.explain(tiny, dictionary, made, vector, None)
    assert (parts[0].feature.index, parts[-1].feature.index) == (first, second)
    by_hand = float(dictionary.feature(first) @ vector.directions[LAYER])
    assert parts[0].cosine == pytest.approx(by_hand, abs=1e-5)
    elsewhere = SteeringVector.from_arrays({1: array}, n_layers=4)
    with pytest.raises(SaeError, match="reads residual after layer 2"):
        find.explain(tiny, dictionary, made, elsewhere, None)


# --- labels -------------------------------------------------------------------------------------


class Reader:
    """Names everything `fire`, and finds what holds that word; may prefer what is shown first."""

    def __init__(self, preference: float = 0.0) -> None:
        self.preference, self.asked = preference, list[str]()

    def ask(self, prompts: Sequence[str]) -> list[str]:
        self.asked += prompts
        return ['"Fire:"\nbecause it burns' for _ in prompts]

    def compare(self, comparisons: Sequence[Comparison]) -> list[float]:
        return [self.preference + (one.trait.casefold() in one.first)
                - (one.trait.casefold() in one.second) for one in comparisons]  # fmt: skip


def burning(*, firing: bool = True) -> Index:
    snippets = tuple(Snippet(f"{i} the ", "fire" if firing else "ice", " burns", 1.0, i)
                     for i in range(12))  # fmt: skip
    feature = Feature(7, 0.01, 1.0, 0.01, (), snippets)
    stretches = tuple(Background(f"water {i}", frozenset()) for i in range(8))
    loud = Background("the fire that burns", frozenset([7]))
    return Index({7: feature}, (*stretches, loud), {})


@pytest.mark.parametrize("preference", [0.0, 0.7, -0.7])
def test_a_true_name_is_detected_whatever_order_the_namer_prefers(preference: float) -> None:
    found = label.label(burning(), [7], ModelNamer(Reader(preference)), "reader")[7]
    assert (found.text, found.accuracy, found.pairs) == ("Fire", 1.0, 6)
    assert found.bias == pytest.approx(preference)


def test_a_name_that_fits_nothing_is_at_chance() -> None:
    assert (
        label.label(burning(firing=False), [7], ModelNamer(Reader(0.7)), "reader")[7].accuracy
        == 0.5
    )


def test_the_test_uses_snippets_that_the_name_was_not_found_by() -> None:
    reader = Reader()
    label.label(burning(), [7], ModelNamer(reader), "reader")
    assert "the «fire» burns" in reader.asked[0]
    assert [f"{i} the" in reader.asked[0] for i in range(0, 12, 2)] == [True] * 6
    assert "1 the «" not in reader.asked[0].replace("11 the", "")


def test_a_feature_that_is_never_silent_is_not_labelled() -> None:
    loud = Index(burning().features, (Background("fire", frozenset([7])),), {})
    with pytest.raises(SaeError, match="stretches without it"):
        label.label(loud, [7], ModelNamer(Reader()), "reader")


def test_the_lot_falls_only_on_features_worth_a_name(made: Index) -> None:
    picked = label.choose(made, 5, seed=1)
    assert picked == label.choose(made, 5, seed=1)
    low, high = label.DENSITIES
    assert all(low <= made.features[i].density <= high for i in picked)


# --- as it is typed -----------------------------------------------------------------------------


def typed(*words: object) -> Result:
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_find_prints_features_and_their_snippets(folder: Path, kept: Path) -> None:
    shown = typed("sae", "find", "w5 w6", "--model", folder)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.splitlines()[0].split() == [
        "feature", "label", "density", "largest", "promotes", "contrast", "effect"]  # fmt: skip
    assert "«" in shown.stdout
    rows = json.loads(typed("sae", "find", "w5", "--words", "--model", folder, "--json").stdout)
    assert any("w5" in one["token"] for f in rows["features"] for one in f["snippets"])


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["sae", "find"], 2, "Give a text or --prompts"),
        (["sae", "find", "x", "--prompts", "terse"], 2, "Leave one of them out"),
        (["sae", "find", "x", "--sae", "smal"], 1, "Did you mean 'small'"),
        (["sae", "label", "a,b"], 2, "no list of features"),
        (["sae", "label", "--namer", "http://x"], 2, "--namer-model"),
        (["sae", "label", "--namer", "gpt"], 2, "'gpt' is no namer"),
        (["sae", "find", "x", "--words", "--by", "effect"], 2, "Leave out --by effect"),
        (["sae", "label", "99"], 1, "never fires"),
        (["vectors", "explain", "nothing"], 1, "no vector"),
    ],
)
def test_bad_words_are_met_with_a_sentence(
    folder: Path, kept: Path, words: list[str], status: int, message: str
) -> None:
    done = typed(*words, "--model", folder)
    assert done.exit_code == status
    assert message in done.stderr


def test_index_of_a_dictionary_from_outside(folder: Path, kept: Path, tmp_path: Path) -> None:
    (kept / index.INDEX).unlink()
    without = typed("sae", "index", "small", "--model", folder)
    assert without.exit_code == 1
    assert "--corpus" in without.stderr
    (tmp_path / "text.txt").write_text(" ".join(WORDS[6:] * 4))
    done = typed("sae", "index", "small", "--model", folder, "--corpus", tmp_path / "text.txt")
    assert "features fire" in done.stdout
    assert index.read(kept).about["tokens"] > 100


def test_vectors_explain_prints_both_ends(folder: Path, kept: Path, tmp_path: Path,
                                          dictionary: Dictionary) -> None:  # fmt: skip
    vector = SteeringVector.from_arrays({LAYER: dictionary.feature(3)}, n_layers=4)
    path = vector.save(tmp_path / "v.safetensors")
    shown = typed("vectors", "explain", path, "--model", folder)
    assert shown.exit_code == 0, shown.stderr
    assert "Most alike:" in shown.stdout
    assert "+1.000" in shown.stdout
    rows = json.loads(typed("vectors", "explain", path, "--model", folder, "--json").stdout)
    assert rows["alike"][0]["index"] == 3


class Endpoint(BaseHTTPRequestHandler):
    """A chat endpoint that names features and picks the text that holds the name."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        reply = "Fire."
        if "Text A:" in prompt:
            reply = "A" if "fire" in prompt.split("Text B:")[0] else "B"
        sent = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_an_endpoint_names_and_its_name_can_be_steered_by(
    folder: Path, kept: Path, tiny: Model, endpoint: str
) -> None:
    index.write(burning(), kept)
    done = typed("sae", "label", "7", "--namer", endpoint, "--namer-model", "m", "--model", folder)
    assert done.exit_code == 0, done.stderr
    assert "Fire" in done.stdout
    assert "Detected on average: 1.00 (chance 0.50)" in done.stdout
    assert labels.labels_of(kept)[7].by == "m"
    assert tiny.plan("sae/fire:2r").terms[0].vector.about["feature"] == 7


def test_labels_made_before_a_namer_failed_are_kept(
    folder: Path, kept: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fire = burning()
    both = {**fire.features, 8: replace(fire.features[7], index=8)}
    index.write(replace(fire, features=both), kept)
    made = [Label("Fire", 1.0, 6, 0.0, "m"), MlxsteerError("the endpoint is gone")]
    monkeypatch.setattr(label, "_label", Mock(side_effect=made))
    words = ("sae", "label", "7,8", "--namer", endpoint, "--namer-model", "m", "--model", folder)
    failed = typed(*words)
    assert (failed.exit_code, "the endpoint is gone" in failed.stderr) == (1, True)
    assert list(labels.labels_of(kept)) == [7]


def test_the_model_itself_can_be_the_namer(folder: Path, kept: Path) -> None:
    index.write(burning(), kept)
    shown = typed("sae", "label", "7", "--model", folder)
    # The tiny model has no tokens A and B to choose between.
    assert shown.exit_code == 1
    assert "cannot judge" in shown.stderr
