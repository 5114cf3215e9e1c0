"""A document and its questions as files: what is read, what is held out, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxsteer.contextset import ContextSet, Question, read_questions
from mlxsteer.errors import ContrastError

SIX = tuple(Question(f"w{i}") for i in range(6))
EXAMPLES = Path(__file__).parent.parent / "examples"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_third_question_is_held_out_and_the_rest_is_trained_on():
    context = ContextSet("d", "w1", tuple(Question(f"w{i}") for i in range(8)))
    assert context.held_out == (2, 5)
    assert context.training == (0, 1, 3, 4, 6, 7)


def test_the_poles_differ_in_the_document_alone():
    context = ContextSet("d", "w1 w2", SIX)
    assert context.asking(3) == ({"role": "user", "content": "w1 w2\n\nw3"},)
    assert context.bare(3) == ({"role": "user", "content": "w3"},)


def test_questions_stand_one_a_line_or_in_yaml(tmp_path):
    lines = write(tmp_path / "q.txt", "Who?\n\n  When?  \n")
    assert read_questions(lines) == (Question("Who?"), Question("When?"))
    rows = "- Who?\n- {question: When, answer: '40'}\n- {question: Where, pattern: 'a|b'}\n"
    found = read_questions(write(tmp_path / "q.yaml", rows))
    assert found == (Question("Who?"), Question("When", "40"), Question("Where", None, "a|b"))
    assert [question.answerable for question in found] == [False, True, True]


@pytest.mark.parametrize(
    ("question", "text", "right"),
    [
        (Question("q", answer="40"), "Within 40 days.", True),
        (Question("q", answer="40"), "It costs 400.", False),
        (Question("q", answer="cargo bike"), "By Cargo Bike!", True),
        (Question("q", answer="$4.00"), "That is $4.00.", True),
        (Question("q", answer="$4.00"), "That is $4x00.", False),
        (Question("q", pattern=r"\b(6|six) days"), "In SIX days", True),
        (Question("q", pattern=r"\b(6|six) days"), "In 16 days", False),
    ],
)
def test_a_right_answer_is_recognised(question, text, right):
    assert question.answered_by(text) is right


def test_giving_an_answer_later_leaves_the_questions_the_same():
    plain = ContextSet("d", "w1", SIX)
    answered = ContextSet("d", "w1", (Question("w0", "w9"), *SIX[1:]))
    assert plain.questions_sha256 == answered.questions_sha256
    other = ContextSet("d", "w1", (*SIX[1:], SIX[0]))
    assert plain.questions_sha256 != other.questions_sha256


def test_the_example_reads_and_its_document_holds_its_answers():
    context = ContextSet.load(EXAMPLES / "support_desk.txt", EXAMPLES / "support_desk.yaml")
    assert len(context.held_out) == 6
    text = " ".join(context.document.split())
    assert all(question.answered_by(text) for question in context.questions)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("- Who?\n- {question: When, anwser: x}\n", r"q.yaml:2: unknown key 'anwser'.*'answer'"),
        ("- Who?\n- {answer: x}\n", "q.yaml:2: key 'question' is missing"),
        ("- {question: a, answer: b, pattern: c}\n", "q.yaml:1: 'answer' and 'pattern' both"),
        ("- {question: a, pattern: '('}\n", "q.yaml:1: this is not a regular expression"),
        ("- {question: a, answer: 40}\n", r"q.yaml:1: .*must be text, found 40"),
        ("- a\n- 7\n", "q.yaml:2: .*must be text, found 7"),
        ("questions: [a]\n", "expected a list of questions, found keys"),
        ("", "expected a list of questions"),
        ("- [", "not valid YAML"),
    ],
)
def test_a_fault_in_the_questions_names_the_file_and_the_line(tmp_path, rows, message):
    with pytest.raises(ContrastError, match=message):
        read_questions(write(tmp_path / "q.yaml", rows))


def test_files_that_cannot_be_read_are_named(tmp_path):
    questions = write(tmp_path / "q.txt", "\n".join(f"w{i}" for i in range(6)))
    with pytest.raises(ContrastError, match=r"Cannot read .*none\.txt: No such file"):
        ContextSet.load(tmp_path / "none.txt", questions)
    (tmp_path / "latin.txt").write_bytes("straße".encode("latin-1"))
    with pytest.raises(ContrastError, match=r"latin\.txt is not UTF-8 text"):
        ContextSet.load(tmp_path / "latin.txt", questions)
    with pytest.raises(ContrastError, match=r"The document .blank. is empty"):
        ContextSet.load(write(tmp_path / "blank.txt", " \n"), questions)
    with pytest.raises(ContrastError, match=r"0 questions are too few: .* at least 6"):
        ContextSet.load(questions, write(tmp_path / "no.txt", "\n"))


def test_a_question_asked_twice_is_refused():
    with pytest.raises(ContrastError, match=r"'W0\?' is asked twice: questions 1 and 6"):
        ContextSet("d", "w1", (*SIX[:5], Question("W0?")))
