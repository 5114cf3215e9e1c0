"""An evaluation on a tiny model: the arms are the right ones, and chance does not pass.

The tiny model's "trait" is a word that a direction makes likely, so what must work, what must
not, and what points the wrong way are all known.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxsteer import damage, library
from mlxsteer.answers import AnswerStore
from mlxsteer.cli import main
from mlxsteer.contrast import ContrastSet, Metric
from mlxsteer.controls import random_like
from mlxsteer.divergence import steered_kl
from mlxsteer.errors import UsageError
from mlxsteer.evaluate import Options, evaluate, questions_of, set_of, with_evaluation
from mlxsteer.generation import Answer
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from mlxsteer.vector import Calibration, SteeringVector
from mlxsteer.verdict import FAILS
from tests.chat_models import WORDS
from tests.tiny_models import HIDDEN

WORD = 40
QUESTIONS = tuple(f"w{i} w{i + 7}" for i in range(10))
SMALL: dict[str, Any] = {"questions": 10, "max_tokens": 10, "random_questions": 6}

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture(scope="module", autouse=True)
def no_texts_for_a_vocabulary_of_64():
    patch = pytest.MonkeyPatch()
    patch.setattr(damage, "neutral_log_likelihood", lambda model, plan: -1.0)
    patch.setattr(damage, "cloze_accuracy", lambda model, plan: 0.5)
    yield
    patch.undo()


def trait(direction: str = "up") -> ContrastSet:
    return ContrastSet(
        name="word",
        description="Says one word.",
        positive_label="the word",
        negative_label="others",
        combine="append",
        questions=("w50",),
        positive=("w51",),
        negative=("w52",),
        held_out=QUESTIONS,
        metric=Metric("regex_rate", direction, "the word", rf"\b{WORDS[WORD]}\b"),
    )


def towards(model: Model, name: str = "word") -> SteeringVector:
    """The direction that the head reads as the word, at the last layer."""
    head = model.network.lm_head.weight if hasattr(model.network, "lm_head") else None
    row = np.array((head if head is not None else model.network.model.embed_tokens.weight)[WORD])
    last = model.n_layers - 1
    vector = SteeringVector.from_arrays({last: row}, n_layers=model.n_layers, name=name)
    return replace(vector, calibration=Calibration(3.0, 3.0))


@pytest.fixture(scope="module")
def found(tiny: Model, tmp_path_factory: pytest.TempPathFactory):
    store = AnswerStore(tmp_path_factory.mktemp("answers") / "a.jsonl")
    return evaluate(
        tiny, towards(tiny), contrast=trait(), store=store, show_progress=False, **SMALL
    )


def test_a_direction_that_says_the_word_has_the_effect_and_outdoes_chance(found):
    by_name = {check.name: check for check in found.checks}
    assert by_name["effect"].passed
    assert by_name["outdoes random directions (20)"].passed
    assert by_name["dose and effect (Spearman)"].passed
    assert found.measured.reverse.low <= 0
    assert len(found.random_effects) == 20
    assert max(found.random_effects) < found.measured.effect.mean


def test_its_rows_are_all_doses_and_both_askings(found):
    names = ["-5", "-3", "-1", "0", "+1", "+3", "+5", "asking", "both"]
    assert [row["amount"] for row in found.rows] == names
    plain = next(row for row in found.rows if row["amount"] == "0")
    steered = next(row for row in found.rows if row["amount"] == f"{found.measured.strength:+g}")
    assert steered["metric"] - plain["metric"] == pytest.approx(
        found.measured.effect.mean, abs=1e-3
    )


@pytest.mark.parametrize("seed", [100, 101])
def test_a_random_direction_does_not_pass(tiny, tmp_path, seed):
    vector = random_like(towards(tiny), seed)
    store = AnswerStore(tmp_path / "a.jsonl")
    judged = evaluate(tiny, vector, contrast=trait(), store=store, show_progress=False, **SMALL)
    assert judged.verdict == FAILS


def test_a_vector_that_points_the_wrong_way_is_caught(tiny, tmp_path):
    store = AnswerStore(tmp_path / "a.jsonl")
    down = trait("down")  # says that more of the name is fewer of the word
    judged = evaluate(tiny, towards(tiny), contrast=down, store=store, show_progress=False, **SMALL)
    assert judged.verdict == FAILS
    assert judged.measured.effect.high < 0
    assert judged.measured.percentile <= 0.05
    assert judged.measured.reverse.low >= 0 or judged.measured.reverse.mean >= 0


def test_a_second_run_writes_nothing_and_finds_the_same(tiny, found, tmp_path):
    store = AnswerStore(tmp_path / "a.jsonl")
    options = {"contrast": trait(), "store": store, "show_progress": False, **SMALL}
    first = evaluate(tiny, towards(tiny), **options)
    size = store.path.stat().st_size
    second = evaluate(tiny, towards(tiny), **options)
    assert store.path.stat().st_size == size
    assert second.to_dict() == first.to_dict() == found.to_dict()


def test_the_evaluation_travels_in_the_vectors_file(tiny, found, tmp_path):
    path = with_evaluation(towards(tiny), found).save(tmp_path / "v.safetensors")
    read = SteeringVector.load(path).about["eval"]
    assert read == json.loads(json.dumps(found.to_dict()))
    assert read["verdict"] == found.verdict
    assert read["measured"]["kl95"] > 0


def test_a_vector_of_unknown_purpose_is_refused(tiny):
    with pytest.raises(UsageError, match=r"names no contrast set .* --set terse"):
        set_of(towards(tiny))


def test_calibrations_questions_are_not_asked_again_where_enough_are_left():
    many = ContrastSet.load("terse")
    assert questions_of(many, 5) == many.held_out[8:13]
    few = replace(many, held_out=many.held_out[:10])
    assert questions_of(few, 20) == few.held_out


@pytest.mark.parametrize(
    "options", [{"questions": 1}, {"random": -1}, {"strength": -3.0}, {"max_tokens": 2}]
)
def test_options_that_measure_nothing_are_refused(options):
    with pytest.raises(UsageError):
        Options(**options)


class FirstWord:
    """A judge that prefers the answer that holds the word, and otherwise the first one."""

    def __init__(self) -> None:
        self.traits: set[str] = set()

    def compare(self, comparisons: Any) -> list[float]:
        self.traits |= {one.trait for one in comparisons}
        return [
            1.0
            if (WORDS[WORD] in one.first.split()) >= (WORDS[WORD] in one.second.split())
            else -1.0
            for one in comparisons
        ]


def test_a_judge_is_asked_beside_the_metric(tiny, found, tmp_path):
    judge = FirstWord()
    judged = evaluate(
        tiny,
        towards(tiny),
        contrast=trait(),
        judge=judge,
        store=AnswerStore(tmp_path / "a.jsonl"),
        show_progress=False,
        **SMALL,
    )
    assert judge.traits == {"Says one word."}
    assert judged.measured.judge.low > 0
    assert any(check.name.startswith("judge sees more") for check in judged.checks)
    assert not any(check.name.startswith("judge") for check in found.checks)


# --- its parts ------------------------------------------------------------------------------


def test_a_random_control_keeps_lengths_and_the_cosines_between_layers():
    rng = np.random.default_rng(0)
    base = rng.normal(size=HIDDEN)
    arrays = {layer: base + 0.5 * rng.normal(size=HIDDEN) for layer in (1, 2, 3)}
    vector = SteeringVector.from_arrays(arrays, n_layers=4, name="v")
    turned = random_like(vector, 3)
    assert turned.layers == vector.layers
    for a in vector.layers:
        for b in vector.layers:
            before = vector.directions[a] @ vector.directions[b]
            assert turned.directions[a] @ turned.directions[b] == pytest.approx(before, abs=1e-5)
    other = random_like(vector, 4)
    assert abs(turned.directions[1] @ other.directions[1]) < 0.9
    assert not np.allclose(turned.directions[1], vector.directions[1])
    again = random_like(vector, 3)
    np.testing.assert_array_equal(turned.directions[1], again.directions[1])


def test_random_projections_stay_orthonormal():
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(HIDDEN, 2)))[0].T
    vector = SteeringVector("p", {1: rows.astype(np.float32)}, 4, op="project")
    turned = random_like(vector, 0).directions[1]
    np.testing.assert_allclose(turned @ turned.T, np.eye(2), atol=1e-5)


def test_kl_is_that_of_the_two_distributions_at_every_answer_token(tiny):
    prompts, answers = [tiny.render("w1"), tiny.render("w2 w3 w4")], [[7, 9, 11], [20, 21]]
    plan = tiny.plan((towards(tiny), 2.0))
    for prompt, answer, found in zip(
        prompts, answers, steered_kl(tiny, prompts, answers, plan), strict=True
    ):
        tokens = [*prompt, *answer[:-1]]
        both = [
            np.array(tiny.logits(tokens, steer=steer, prompt_length=len(prompt)), np.float64)
            for steer in (plan, None)
        ]
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in both)
        expected = (np.exp(p) * (p - q)).sum(-1)[len(prompt) - 1 :]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert found.max() > 0.01
    for nothing in steered_kl(tiny, prompts, answers, Plan([])):
        np.testing.assert_allclose(nothing, 0, atol=1e-5)


# --- the command ----------------------------------------------------------------------------


def test_the_command_prints_the_verdict_and_writes_it_into_the_vector(folder, tiny):
    path = library.save(towards(tiny), "tiny")
    arguments = ["evaluate", "word", "--model", str(folder), "--set", "terse", "--random", "2"]
    arguments += ["--questions", "3", "--max-tokens", "8"]
    dry = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "nothing was written" in dry.stdout
    assert "eval" not in SteeringVector.load(path).about
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("word: does not work: fails ")
    assert "moved the wrong way" in result.stdout
    evaluated = SteeringVector.load(path).about["eval"]
    assert evaluated["verdict"] == FAILS
    as_json = CliRunner().invoke(main, [*arguments, "--json"])
    assert json.loads(as_json.stdout)["verdict"] == FAILS


def test_a_vector_of_another_architecture_needs_force(folder, tiny):
    library.save(replace(towards(tiny), model={"architecture": "gpt2"}), "tiny")
    arguments = ["evaluate", "word", "--model", str(folder), "--set", "terse", "--random", "0"]
    arguments += ["--questions", "2", "--max-tokens", "8", "--dry-run"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert CliRunner().invoke(main, [*arguments, "--force"]).exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "word", "--judge-model", "wise"],
        ["sae", "label", "12", "--namer-model", "wise"],
    ],
)
def test_the_model_of_an_endpoint_that_is_not_named_is_refused(words):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "Give both" in result.stderr


def test_the_command_without_a_known_set_says_what_to_type(folder, tiny):
    library.save(towards(tiny), "tiny")
    result = CliRunner().invoke(main, ["evaluate", "word", "--model", str(folder)])
    assert result.exit_code == 2
    assert "--set terse" in result.stderr


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_answers_without_words_are_not_judged_and_break_nothing(tiny, tmp_path, monkeypatch):
    def silent(model, prompts, plans, *rest, **options):
        return [Answer([], "", "stop") for _ in prompts]

    monkeypatch.setattr("mlxsteer.trials.generate_batch", silent)
    contrast = replace(trait(), metric=Metric("word_length", "up"))
    store = AnswerStore(tmp_path / "silent.jsonl")
    made = evaluate(
        tiny, towards(tiny), contrast=contrast, questions=2, random=2, random_questions=2,
        show_progress=False, store=store,
    )  # fmt: skip
    assert made.verdict == FAILS
    passed = {check.name.split(",")[0].split(" (")[0]: check.passed for check in made.checks}
    assert passed["effect"] is False
    for name in ("moved the wrong way", "KL per token", "perplexity ratio"):
        assert passed[name] is None
