"""Chats that the model itself writes: what it is asked, and its sampled answers.

Its own answers are the states that steering will meet. Questions come from the contrast sets
(with and without their instructions) and from a list of topics. Writing is much slower than
reading, so a few hundred chats go beside a corpus of text.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from mlxsteer.contrast import ContrastSet
from mlxsteer.contrast import available as available_sets
from mlxsteer.errors import SaeError
from mlxsteer.files import write_text
from mlxsteer.generation import Sampling, generate_batch
from mlxsteer.plan import Plan
from mlxsteer.progress import progress
from mlxsteer.sae.corpus import Messages

if TYPE_CHECKING:
    from mlxsteer.model import Model

ANSWER_TOKENS = 96
AT_A_TIME = 64  # kept together, so that little is lost when interrupted
TEMPERATURE = 0.8
REQUESTS = (
    "Tell me about {}.",
    "Write a short story about {}.",
    "What should a visitor know about {}?",
    "Explain {} to a child.",
    "List five facts about {}.",
    "Why do people care about {}?",
)
TOPICS = tuple(
    "the Golden Gate Bridge, San Francisco, the Eiffel Tower, Paris, London, Tokyo, Egypt,"
    " Antarctica, the Amazon rainforest, the Sahara desert, Mount Everest, the Grand Canyon,"
    " Niagara Falls, Venice, the Great Wall of China, volcanoes, earthquakes, the ocean, rivers,"
    " islands, the moon, Mars, black holes, stars, rockets, telescopes, gravity, electricity,"
    " magnets, atoms, light, sound, computers, the internet, programming, Python, databases,"
    " robots, artificial intelligence, encryption, algebra, prime numbers, probability, geometry,"
    " statistics, the Roman Empire, ancient Greece, the Vikings, the Middle Ages, pirates,"
    " the Industrial Revolution, the Second World War, democracy, elections, courts, police,"
    " taxes, banks, money, inflation, trade, factories, farms, wheat, rice, bread, cheese, coffee,"
    " tea, chocolate, wine, soup, breakfast, restaurants, recipes, cats, dogs, horses, whales,"
    " sharks, birds, bees, spiders, dinosaurs, snakes, elephants, trees, flowers, mushrooms,"
    " seeds, forests, the weather, rain, snow, hurricanes, climate change, recycling, solar power,"
    " oil, coal, nuclear energy, bridges, tunnels, skyscrapers, houses, furniture, roads, trains,"
    " airplanes, ships, bicycles, cars, doctors, hospitals, vaccines, viruses, bacteria, the heart,"
    " the brain, sleep, dreams, pain, cancer, exercise, running, swimming, football, basketball,"
    " chess, the Olympics, music, pianos, guitars, jazz, opera, dance, painting, sculpture,"
    " photography, films, theatre, novels, poetry, Shakespeare, newspapers, television, languages,"
    " French, Spanish, Chinese writing, grammar, spelling, schools, universities, exams, teachers,"
    " children, mothers, grandparents, friendship, love, marriage, anger, fear, happiness, grief,"
    " courage, honesty, luck, religion, Buddhism, Christianity, Islam, angels, ghosts, witches,"
    " dragons, kings, queens, knights, castles, swords, gold, diamonds, clothes, shoes, soap,"
    " clocks, calendars, maps, birthdays, Christmas, weddings, holidays, gardens, kitchens".split(
        ", "
    )
)


def questions(count: int, seed: int) -> list[Messages]:
    """`count` prompts, no two alike, in an order that `seed` decides.

    Half are requests about topics, half are questions of the contrast sets under their
    instructions. Raises SaeError when there are not so many.
    """
    about = [request.format(topic) for topic in TOPICS for request in REQUESTS]
    asked: list[Messages] = []
    for name in available_sets():
        contrast = ContrastSet.load(name)
        if contrast.combine in ("append", "persona"):
            asked += [list(pair.positive) for pair in contrast.pairs()]  # type: ignore[arg-type]
    shuffle = random.Random(seed)
    shuffle.shuffle(about)
    shuffle.shuffle(asked)
    topical: list[Messages] = [[{"role": "user", "content": text}] for text in about]
    half = min((count + 1) // 2, len(topical))
    found = topical[:half] + asked[: count - half]
    if len(found) < count:
        raise SaeError(f"There are prompts for {len(found)} chats, not {count}. Ask for fewer.")
    return found


def write(
    model: Model, count: int, store: Path, *, seed: int = 0, show_progress: bool = True
) -> list[Messages]:
    """`count` chats, sampled at temperature 0.8; what `store` keeps is not written again."""
    prompts = questions(count, seed)
    chats: list[Messages] = []
    with progress("Writing chats", count, enabled=show_progress) as advance:
        for start in range(0, count, AT_A_TIME):
            part = prompts[start : start + AT_A_TIME]
            path = store / f"{start:06d}.json"
            answers = _kept(path, len(part))
            if answers is None:
                tokens = [model.render(prompt) for prompt in part]
                sampling = Sampling(ANSWER_TOKENS, temp=TEMPERATURE, seed=seed + start)
                found = generate_batch(model, tokens, [Plan([])] * len(part), sampling)
                answers = [answer.text for answer in found]
                write_text(path, json.dumps(answers, ensure_ascii=False))
            chats += [
                [*prompt, {"role": "assistant", "content": answer}]
                for prompt, answer in zip(part, answers, strict=True)
            ]
            advance(len(part))
    return chats


def _kept(path: Path, count: int) -> list[str] | None:
    """The answers at `path`; None when they are not whole."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, list) and len(kept) == count else None
