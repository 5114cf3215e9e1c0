"""A small model that cannot stop talking about the Golden Gate Bridge, in two ways.

By a contrast vector (what texts about the bridge have that texts about other things have not) and
by a feature of a sparse autoencoder (what made Golden Gate Claude), added and clamped. Prints for
each the share of answers that name the bridge, and their perplexity under the unsteered model.

    python examples/golden_gate.py          # nine steerings of eight short answers each

The feature needs a dictionary. Train one first (14 minutes on two cores):

    mlxsteer sae train --model demo --layer 15 --name full
"""

import mlxsteer
from mlxsteer import library, trials
from mlxsteer.contrast import ContrastSet
from mlxsteer.sae import features, find, index, shelf

QUESTIONS, TOKENS = 8, 48


def steerings(model: mlxsteer.Model) -> list[str]:
    """The texts to steer by: the vector, and the feature that fires most on the words."""
    texts = ["golden-gate:3", "golden-gate:5"]
    dictionaries = shelf.available(model.key)
    if not dictionaries:
        print("No dictionary for this model yet; the command above trains one.\n")
        return texts
    name, path = next(iter(dictionaries.items()))
    dictionary, known = features.opened(path), index.read(path)
    best = find.by_text(model, dictionary, known, "Golden Gate Bridge", count=1)[0].feature
    print(f"Feature {best.index} of {name!r} fires on {best.density:.1%} of states, most on:")
    for snippet in best.snippets[:3]:
        print(f"  …{snippet}…".replace("\n", " "))
    print()
    feature = f"{library.FEATURES}{name}/{best.index}"
    doses = [f"{dose}d@all" for dose in (0.3, 0.5, 0.7)]
    return texts + [f"{what}:{dose}" for what in (feature, f"{feature}/clamp") for dose in doses]


def main() -> None:
    model = mlxsteer.load("demo")
    bridge = ContrastSet.load("golden-gate")
    texts = ["", *steerings(model)]
    plans = [(float(i), model.plan(text)) for i, text in enumerate(texts)]
    questions = bridge.held_out[:QUESTIONS]
    arms = trials.run(model, questions, plans, bridge.metric, max_tokens=TOKENS)
    plain = arms[0].perplexity
    print(f"{'steering':32}{'names the bridge':>18}{'perplexity ratio':>18}")
    for text, arm in zip(texts, arms, strict=True):
        ratio = arm.perplexity / plain
        print(f"{text or 'nothing':32}{arm.metric:>18.0%}{ratio:>18.2f}")
    for text, arm in zip(texts, arms, strict=True):
        print(f"\n{text or 'nothing'}: {questions[0]}\n  {' '.join(arm.answers[0].split())}")


if __name__ == "__main__":
    main()
