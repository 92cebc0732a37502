"""A small fitted reward of each kind, on a made-up pool with texts: right answers reason, wrong ones hedge."""

import numpy as np
import pytest

from experts.types import Message, Request
from orchestrator.aggregators.reward_moe.build import Material, build_reward
from orchestrator.aggregators.reward_moe.inputs import make_panel
from orchestrator.aggregators.reward_moe.samples import Sample
from routers.records import Array


class Hashed:
    """Words to pseudo-random directions: an encoder without a model."""

    name, width, runtime = "hashed", 16, "none"

    def __init__(self) -> None:
        self._words: dict[str, Array] = {}

    async def encode(self, texts: list[str]) -> Array:
        rows = np.array([sum(map(self._word, text.split()[:200]), self._word("")) for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    async def count_tokens(self, texts: list[str]) -> int:
        return sum(len(text.split()) for text in texts)

    def _word(self, word: str) -> Array:
        if word not in self._words:
            seed = [1, *word.encode("utf-8", "replace")]
            self._words[word] = np.random.default_rng(seed).normal(size=self.width)
        return self._words[word]


RIGHT = "First we count, therefore it is {0} in total. The answer is (A)."
WRONG = "Perhaps it might be {0}, not sure, I guess. The answer is (B)."


def ask(category: str = "sums", number: int = 7) -> Request:
    text = f"{category} {category} {category} how many are {number} things?\nA. some\nB. none"
    return Request(messages=(Message(role="user", content=text),))


def make_sample(number: int, category: str) -> Sample:
    """The category 'sums' wants the reasoning answer, 'chat' the hedging one."""
    good, bad = (RIGHT, WRONG) if category == "sums" else (WRONG, RIGHT)
    texts = [bad.format(number), good.format(number)]
    question = ask(category, number).question
    return Sample(
        panel=make_panel(question, ("some", "none"), texts),
        source=category,
        category=category,
        labels=(
            {"correct": 0.0, "verbosity": 0.2, f"correct:{category}": 0.0},
            {"correct": 1.0, "verbosity": 0.2, f"correct:{category}": 1.0},
        ),
        pairs=((1, 0),),
    )


@pytest.fixture(scope="session")
def encoder():
    return Hashed()


@pytest.fixture(scope="session")
def material():
    samples = [make_sample(i, "sums" if i % 3 else "chat") for i in range(480)]
    return Material(samples=tuple(samples), sources=())


@pytest.fixture(scope="session")
def make_reward(material, encoder, tmp_path_factory):
    """Each kind is fitted once."""
    made, cache = {}, tmp_path_factory.mktemp("cache")

    async def make(kind):
        if kind not in made:
            made[kind] = await build_reward(kind, material, encoder, cache, seed=0)
        return made[kind]

    return make
