"""Damage off target: likelihoods that one sequence alone gives, and facts with one right ending."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsteer import damage
from mlxsteer.damage import cloze_accuracy, cloze_facts, neutral_log_likelihood, neutral_texts
from mlxsteer.model import Model
from mlxsteer.plan import Plan
from tests.chat_models import random_directions

TEXTS = ("w1 w2 w3 w4", "w5 w6", "w7 w8 w9 w1 w2 w3")


def alone(model: Model, text: str, steer: object) -> np.ndarray:
    """log p of a text's tokens after the first, from a forward pass over it only."""
    tokens = list(model.tokenizer.encode(text))
    logits = np.array(model.logits(tokens, steer=steer), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.array([log_p[i, token] for i, token in enumerate(tokens[1:])])


@pytest.mark.parametrize("elements", [1, 1 << 27])
def test_log_likelihood_is_that_of_each_text_alone(
    tiny: Model, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "MAX_ELEMENTS", elements)
    plan = tiny.plan((random_directions(), "2r@all"))
    expected = np.concatenate([alone(tiny, text, plan) for text in TEXTS]).mean()
    assert neutral_log_likelihood(tiny, plan, texts=TEXTS) == pytest.approx(expected, abs=1e-4)
    unsteered = np.concatenate([alone(tiny, text, None) for text in TEXTS]).mean()
    found = neutral_log_likelihood(tiny, Plan([]), texts=TEXTS)
    assert found == pytest.approx(unsteered, abs=1e-4)
    assert abs(found - expected) > 0.01


def test_a_text_is_steered_whatever_positions_the_plan_names(tiny: Model) -> None:
    prompt, everywhere = (tiny.plan((random_directions(), f"2r@{p}")) for p in ("think", "all"))
    found = [neutral_log_likelihood(tiny, plan, texts=TEXTS) for plan in (prompt, everywhere)]
    assert found[0] == found[1]
    own = neutral_log_likelihood(tiny, prompt, texts=TEXTS, positions=None)
    assert own == neutral_log_likelihood(tiny, Plan([]), texts=TEXTS)


def test_a_schedule_counts_as_always_on(tiny: Model) -> None:
    vector = random_directions()
    first, always = (tiny.plan((vector, text)) for text in ("2r@first(1)", "2r"))
    found = [neutral_log_likelihood(tiny, plan, texts=TEXTS) for plan in (first, always)]
    assert found[0] == found[1]


def test_cloze_finds_what_the_model_finds_likeliest(tiny: Model) -> None:
    logits = np.array(tiny.logits(list(tiny.tokenizer.encode("w1 w2"))))[-1]
    order = [word for word in np.argsort(-logits) if word > 5]  # the first six are markers
    first, second, third = (tiny.tokenizer.decode([int(word)]) for word in order[:3])
    facts = [
        ("w1 w2", f" {first}", f" {second}", f" {third}"),
        ("w1 w2", f" {second}", f" {first}", f" {third}"),
        ("w1 w2", f" {first}", f" {first}"),  # a tie is not known
    ]
    assert cloze_accuracy(tiny, Plan([]), facts=facts) == pytest.approx(1 / 3)


def test_an_ending_of_several_tokens_is_their_product(tiny: Model) -> None:
    one, other = (alone(tiny, f"w1 {ending}", None).sum() for ending in ("w2 w3 w4", "w5 w6"))
    right, wrong = (" w2 w3 w4", " w5 w6") if one > other else (" w5 w6", " w2 w3 w4")
    assert cloze_accuracy(tiny, Plan([]), facts=[("w1", right, wrong)]) == 1
    assert cloze_accuracy(tiny, Plan([]), facts=[("w1", wrong, right)]) == 0


def test_the_texts_that_ship_are_of_one_size() -> None:
    assert len(neutral_texts()) == 12
    assert all(60 <= len(text.split()) <= 100 for text in neutral_texts())


def test_the_facts_that_ship_have_one_right_ending() -> None:
    facts = cloze_facts()
    assert len(facts) == 40
    assert len({stem for stem, *_ in facts}) == 40
    for stem, right, *wrong in facts:
        assert len(wrong) == 3
        assert len({right, *wrong}) == 4
        assert not stem.endswith(" ")
        assert all(ending.startswith(" ") for ending in (right, *wrong))


@pytest.mark.slow
def test_the_demo_model_knows_the_facts_and_noise_costs_it_text_and_facts() -> None:
    import mlxsteer

    model = mlxsteer.load("demo")
    noise = mlxsteer.SteeringVector.from_arrays(
        {14: np.random.default_rng(0).normal(size=model.d_model)}, n_layers=model.n_layers
    )
    plan = model.plan((noise, "1.5d"))
    assert cloze_accuracy(model, Plan([])) > 0.85  # 37 of 40
    assert cloze_accuracy(model, plan) < 0.8
    assert neutral_log_likelihood(model, Plan([])) > neutral_log_likelihood(model, plan) + 0.5
