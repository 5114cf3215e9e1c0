"""A vector from a document: what is read, what it says of itself, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlxsteer import library
from mlxsteer.context_extract import context_tokens, extract_context, prompt_pairs
from mlxsteer.contextset import ContextSet, Question
from mlxsteer.errors import ContextLengthError, UsageError
from mlxsteer.extract import ANSWER_TOKENS
from mlxsteer.vector import SteeringVector

QUIET: dict[str, Any] = {"show_progress": False}
DOCUMENT = "w40 w41 w42 w43 w44"
CONTEXT = ContextSet("rules", DOCUMENT, tuple(Question(f"w{i} w{i + 9}") for i in range(7)))

pytestmark = pytest.mark.usefixtures("own_folders")


def state(model: Any, tokens: list[int], start: int) -> np.ndarray:
    """[D]: the mean state of layer 2 from position `start` on."""
    return np.array(model.capture(tokens)["residual"][2, start:]).mean(axis=0)


def test_it_is_the_mean_difference_at_the_last_prompt_token_of_the_training_questions(tiny):
    [(position, vector)] = extract_context(tiny, CONTEXT, **QUIET).items()
    assert (position, vector.name, vector.layers) == ("last_prompt", "rules", (2,))
    expected = np.mean(
        [
            state(tiny, full, -1) - state(tiny, bare, -1)
            for full, bare in prompt_pairs(tiny, CONTEXT, (0, 1, 3, 4, 6))
        ],
        axis=0,
    )
    np.testing.assert_allclose(vector.directions[2] * vector.magnitude[2], expected, atol=1e-5)


def test_answer_mean_reads_the_answer_with_the_document_behind_both_prompts(tiny):
    found = extract_context(tiny, CONTEXT, position="both", **QUIET)
    assert set(found) == {"last_prompt", "answer_mean"}
    differences = []
    for index, (full, bare) in zip(
        (0, 1, 3, 4, 6), prompt_pairs(tiny, CONTEXT, (0, 1, 3, 4, 6)), strict=True
    ):
        text = tiny.generate(list(CONTEXT.asking(index)), max_tokens=ANSWER_TOKENS)
        answer = tiny.tokenizer.encode(text) or [0]
        ends = [state(tiny, [*prompt, *answer], len(prompt)) for prompt in (full, bare)]
        differences.append(ends[0] - ends[1])
    vector = found["answer_mean"]
    np.testing.assert_allclose(
        vector.directions[2] * vector.magnitude[2], np.mean(differences, axis=0), atol=1e-4
    )


def test_it_says_where_it_comes_from_and_never_the_text(tiny, tmp_path):
    vector = extract_context(tiny, CONTEXT, name="desk", **QUIET)["last_prompt"]
    about = SteeringVector.load(vector.save(tmp_path / "v.safetensors")).about
    assert (about["kind"], about["n_pairs"], about["n_questions"]) == ("context", 5, 7)
    assert about["held_out"] == [2, 5]
    assert about["context_tokens"] == 5
    assert about["document_sha256"] == CONTEXT.document_sha256
    assert DOCUMENT.encode() not in (tmp_path / "v.safetensors").read_bytes()


def test_context_tokens_are_what_the_document_adds_to_a_prompt():
    assert context_tokens([([1, 2, 3, 4], [1]), ([1, 2, 3], [1])]) == 2  # 2.5, to even


def test_fewer_pairs_are_drawn_by_the_seed(tiny):
    few, again, other = (
        extract_context(tiny, CONTEXT, pairs=3, seed=seed, **QUIET)["last_prompt"]
        for seed in (0, 0, 1)
    )
    assert few.about["n_pairs"] == 3
    assert few @ again == pytest.approx(1, abs=1e-6)
    assert few @ other < 0.9999


def test_a_document_that_does_not_fit_is_refused_with_the_counts(tiny):
    limit = tiny.context_length
    long = ContextSet("long", "w1 " * limit, CONTEXT.questions)
    with pytest.raises(ContextLengthError, match=f"long has {limit:,} tokens; .* takes {limit:,}"):
        extract_context(tiny, long, **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "project"}, "A projection removes"),
        ({"position": "text_mean"}, "not text_mean"),
        ({"layers": (9,)}, "Layer 9 is out of range"),
        ({"methud": "mean"}, "Did you mean 'method'"),
    ],
)
def test_a_wrong_option_is_refused(tiny, options, message):
    with pytest.raises(UsageError, match=message):
        extract_context(tiny, CONTEXT, **options, **QUIET)


def test_the_name_of_the_document_can_be_found_again(tiny):
    vector = extract_context(tiny, CONTEXT, **QUIET)["last_prompt"]
    library.save(vector, tiny.key)
    assert library.find("rules", tiny.key).about["kind"] == "context"
