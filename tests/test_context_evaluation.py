"""What a document's vector recovers, on a tiny model: against closed forms and by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxsteer import library
from mlxsteer.cli import main
from mlxsteer.context_evaluation import evaluate_context, recovered_share, with_evaluation
from mlxsteer.context_extract import extract_context, prompt_pairs
from mlxsteer.context_verdict import A_PART, STANDS_IN, Recovered, checks, sentence, verdict
from mlxsteer.contextset import ContextSet, Question
from mlxsteer.divergence import kl_from_context
from mlxsteer.errors import UsageError
from mlxsteer.plan import Plan
from mlxsteer.statistics import Interval, ratio_interval
from mlxsteer.vector import SteeringVector
from mlxsteer.verdict import FAILS

QUESTIONS = tuple(Question(f"w{i} w{i + 9}", pattern=r"w\d") for i in range(9))
CONTEXT = ContextSet("rules", "w40 w41 w42 w43 w44 w45", QUESTIONS)
SMALL: dict[str, Any] = {"random": 4, "max_tokens": 6, "show_progress": False}

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture
def vector(tiny) -> SteeringVector:
    return extract_context(tiny, CONTEXT, show_progress=False)["last_prompt"]


# --- the figures ----------------------------------------------------------------------------


def test_kl_is_that_of_the_two_distributions_at_every_answer_token(tiny, vector):
    [(full, bare)] = prompt_pairs(tiny, CONTEXT, [2])
    answer = [7, 9, 11]
    plan = tiny.plan((vector, 3.0))
    found = kl_from_context(tiny, full, bare, answer, [Plan([]), plan])
    logits = [
        tiny.logits([*prompt, *answer[:-1]], steer=steer, prompt_length=len(prompt))
        for prompt, steer in ((full, None), (bare, None), (bare, plan))
    ]
    p, *others = (np.array(x, np.float64)[-len(answer) :] for x in logits)
    p, *others = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, *others))
    expected = [(np.exp(p) * (p - q)).sum(-1) for q in others]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.min(axis=0).max() > 1e-3


def test_the_document_itself_recovers_all_and_strength_0_exactly_nothing(tiny, vector):
    [(full, bare)] = prompt_pairs(tiny, CONTEXT, [2])
    [itself] = kl_from_context(tiny, full, full, [7, 9], [Plan([])])
    [plain] = kl_from_context(tiny, full, bare, [7, 9], [Plan([])])
    assert recovered_share(itself, plain).mean == pytest.approx(1, abs=1e-4)
    found = evaluate_context(tiny, vector, CONTEXT, strengths=(0.0, 3.0), strength=0.0, **SMALL)
    assert found.recovered.share == Interval(0.0, 0.0, 0.0)
    assert found.training == Interval(0.0, 0.0, 0.0)


def test_a_share_is_of_the_mean_and_its_interval_is_paired():
    share = recovered_share(np.array([1.0, 3.0]), np.array([2.0, 6.0]))
    assert share == Interval(0.5, 0.5, 0.5)  # half of each, whichever are drawn
    mixed = recovered_share(np.array([0.0, 6.0]), np.array([2.0, 6.0]))
    assert mixed.mean == pytest.approx(1 - 6 / 8)
    assert (mixed.low, mixed.high) == (0.0, 1.0)


def test_a_ratio_of_nothing_is_no_number():
    assert np.isnan(ratio_interval([], []).mean)
    assert np.isnan(ratio_interval([1.0], [0.0]).mean)
    with pytest.raises(UsageError, match="changes no answer"):
        recovered_share(np.zeros(2), np.zeros(2))


def test_the_rows_are_the_document_plain_and_every_strength(tiny, vector):
    found = evaluate_context(tiny, vector, CONTEXT, strengths=(1.0, 4.0), **SMALL)
    assert [row["amount"] for row in found.rows] == ["document", "0", "+1", "+4"]
    assert found.rows[0]["share"] == [1, 1, 1]
    assert found.rows[1]["share"] == [0, 0, 0]
    assert (found.n_questions, found.n_answerable, found.context_tokens) == (3, 3, 6)
    assert found.vector_bytes == 4 * vector.d_model * len(vector.layers)
    assert len(found.random_shares) == 4
    judged = found.rows[2 if found.strength == 1 else 3]
    assert judged["share"][0] == pytest.approx(found.recovered.share.mean, abs=1e-4)


def test_right_answers_are_counted_among_those_that_only_the_document_gives(tiny, vector):
    full, bare = zip(*prompt_pairs(tiny, CONTEXT, CONTEXT.held_out), strict=True)
    texts = [tiny.generate(list(CONTEXT.asking(i)), max_tokens=6) for i in CONTEXT.held_out]
    wanted = tuple(
        replace(q, pattern=f"^{texts[CONTEXT.held_out.index(i)]}$") if i in CONTEXT.held_out else q
        for i, q in enumerate(QUESTIONS)
    )
    found = evaluate_context(tiny, vector, replace(CONTEXT, questions=wanted), **SMALL)
    plain = [tiny.generate(list(CONTEXT.bare(i)), max_tokens=6) for i in CONTEXT.held_out]
    expected = sum(a != b for a, b in zip(texts, plain, strict=True))
    assert full != bare
    assert expected > 0
    assert found.rows[0]["right"] == 3
    assert found.rows[1]["right"] == 3 - expected
    assert found.recovered.gained == expected
    assert 0 <= found.recovered.regained <= expected


def test_without_answers_only_the_distributions_are_compared(tiny, vector):
    bare = replace(CONTEXT, questions=tuple(Question(q.text) for q in QUESTIONS))
    found = evaluate_context(tiny, vector, bare, **SMALL)
    assert found.recovered.gained is None
    assert found.rows[0]["right"] is None
    assert "questions" not in found.sentence


def test_another_document_or_other_questions_are_refused(tiny, vector):
    with pytest.raises(UsageError, match="not the document that 'rules' was made from"):
        evaluate_context(tiny, vector, replace(CONTEXT, document="w1"), **SMALL)
    with pytest.raises(UsageError, match="not the list of questions that 'rules'"):
        evaluate_context(tiny, vector, replace(CONTEXT, questions=QUESTIONS[::-1]), **SMALL)
    with pytest.raises(UsageError, match="'rules' was not made from a document"):
        evaluate_context(tiny, replace(vector, about={}), CONTEXT, **SMALL)


# --- the verdict ----------------------------------------------------------------------------

GOOD = Recovered(Interval(0.6, 0.5, 0.7), 1.0, 20, 4, 3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, STANDS_IN),
        ({"share": Interval(0.1, 0.05, 0.2)}, A_PART),
        ({"regained": 1}, A_PART),
        ({"share": Interval(0.1, -0.05, 0.2)}, FAILS),
        ({"percentile": 0.9}, FAILS),
    ],
)
def test_the_verdict(change, expected):
    assert verdict(checks(replace(GOOD, **change))) == expected


def test_the_sentence_gives_both_figures():
    part = replace(GOOD, share=Interval(0.12, 0.05, 0.2), regained=0)
    assert sentence(part) == (
        "recovers a part: 12% of the document's effect on the next token; 0 of the 4 questions"
        " that only it answered"
    )
    nothing = replace(GOOD, share=Interval(-0.001, -0.01, 0.01))
    assert sentence(nothing).startswith("does not work: 0% of the document's effect")


# --- the commands ---------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> list[str]:
    (tmp_path / "rules.txt").write_text(CONTEXT.document)
    rows = [{"question": q.text, "pattern": q.pattern} for q in QUESTIONS]
    (tmp_path / "q.yaml").write_text(json.dumps(rows))
    return [str(tmp_path / "rules.txt"), "--questions", str(tmp_path / "q.yaml")]


def test_the_commands_make_measure_and_show_it(folder, files):
    at = ["--model", str(folder)]
    made = CliRunner().invoke(main, ["extract", "--from-context", *files, *at])
    assert made.exit_code == 0, made.output
    assert f"mlxsteer evaluate rules --context {files[0]}" in made.stdout
    words = ["evaluate", "rules", "--context", *files, *at, "--random", "2", "--max-tokens", "8"]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    assert "of the document's effect on the next token" in found.stdout
    assert "The document takes 6 tokens of every request" in found.stdout
    shown = CliRunner().invoke(main, ["vectors", "show", "rules", *at])
    assert "KL per token" in shown.stdout
    assert "The document takes 6 tokens of every request" in shown.stdout
    as_json = CliRunner().invoke(main, [*words, "--json", "--dry-run"])
    assert json.loads(as_json.stdout)["kind"] == "context"


def test_the_evaluation_travels_in_the_vectors_file(tiny, vector, tmp_path):
    found = evaluate_context(tiny, vector, CONTEXT, **SMALL)
    path = with_evaluation(vector, found).save(tmp_path / "v.safetensors")
    read = SteeringVector.load(path).about["eval"]
    assert read == json.loads(json.dumps(found.to_dict(), allow_nan=False))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extract"], "Give a contrast set"),
        (["extract", "terse", "--from-context", "FILE", "--questions", "q"], "one of the two"),
        (["extract", "--from-context", "FILE"], "--questions FILE go together"),
        (["extract", "terse", "--questions", "q"], "--questions FILE go together"),
        (["evaluate", "rules", "--questions", "q.txt"], "--questions is a number here"),
        (["evaluate", "rules", "--context", "FILE"], "--context FILE goes with --questions"),
    ],
)
def test_options_that_do_not_go_together_are_named(words, message):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_what_does_not_go_with_a_document_is_refused(folder, files, tiny, vector):
    result = CliRunner().invoke(main, ["evaluate", "rules", "--context", *files, "--set", "terse"])
    assert result.exit_code == 2
    assert "--set does not go with --context" in result.stderr
    library.save(vector, tiny.key)
    bare = CliRunner().invoke(main, ["evaluate", "rules", "--model", str(folder)])
    assert bare.exit_code == 2
    assert "evaluate rules --context FILE --questions FILE" in bare.stderr
