import asyncio
import math
from collections import Counter

import numpy as np
import pytest

from experts.errors import ConfigError
from experts.types import ExpertSpec, Request
from routers.base import RouterParts
from routers.centroid import Centroid


class Expert:
    def __init__(self, spec):
        self.spec = spec


class WordCounts:
    """An encoder whose dimensions are words: texts are near when they share words."""

    name = "words"
    width = 32

    def __init__(self):
        self.calls = []
        self.words = {}

    async def encode(self, texts):
        self.calls.append(list(texts))
        await asyncio.sleep(0)
        rows = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word, count in Counter(text.lower().split()).items():
                row[self.words.setdefault(word, len(self.words))] = count
            row /= max(np.linalg.norm(row), 1e-9)
        return rows

    async def count_tokens(self, texts):
        return sum(len(text.split()) for text in texts)


MATHS = ExpertSpec(expert_id="maths", engine_id="x", examples=("add two numbers", "add three numbers"))
FRENCH = ExpertSpec(expert_id="french", engine_id="x", demos=(("say bread in french", "pain"),))
VAGUE = ExpertSpec(expert_id="vague", engine_id="x", description="everyday chat", tags=("chat",))
BARE = ExpertSpec(expert_id="bare", engine_id="x")


def router(*specs, encoder=None, **options):
    encoder = encoder or WordCounts()
    parts = RouterParts(encoder=lambda: encoder, experts={s.expert_id: Expert(s) for s in specs})
    return Centroid(parts, **options), list(specs), encoder


async def route(questions, *specs, **options):
    made, pool, _ = router(*specs, **options)
    return await made.route([Request(prompt=q) for q in questions], pool)


async def test_the_nearest_expert_is_chosen_and_the_closest_example_named():
    maths, french = await route(["add two apples", "say cat in french"], MATHS, FRENCH)
    assert maths.expert_ids == ("maths",)
    assert maths.reason == "closest to 'add two numbers' 0.67"
    assert maths.scores["maths"] == pytest.approx(
        np.dot([2, 1, 2, 1], [1, 1, 0, 0]) / (math.sqrt(10) * math.sqrt(3)), abs=1e-5
    )
    assert maths.scores["french"] == 0
    assert french.expert_ids == ("french",)
    assert french.router == "centroid"


async def test_what_is_near_to_nobody_goes_to_who_shows_no_examples():
    (decision,) = await route(["paint a wall"], MATHS, FRENCH, BARE)
    assert decision.expert_ids == ("bare",)
    assert decision.scores == {"maths": 0, "french": 0, "bare": 0.25}
    assert decision.reason == "no example is near; 'bare' stands in"
    (decision,) = await route(["add numbers"], MATHS, FRENCH, BARE)
    assert decision.expert_ids == ("maths",)


async def test_a_description_places_an_expert_but_never_under_the_floor():
    near, far = await route(["a chat", "paint a wall"], MATHS, VAGUE, floor=0.3)
    assert near.scores["vague"] > 0.3
    assert near.reason.startswith("closest to 'everyday chat, chat'")
    assert far.scores["vague"] == 0.3


async def test_the_default_expert_stands_in_before_the_others():
    (decision,) = await route(["paint a wall"], MATHS, BARE, FRENCH, default="french")
    assert decision.ranked() == ["french", "bare", "maths"]
    assert decision.scores["french"] == 0.25
    (decision,) = await route(["say cat in french"], MATHS, BARE, FRENCH, default="french")
    assert decision.scores["french"] > 0.5


async def test_a_temperature_turns_cosines_into_shares():
    (raw,) = await route(["add two french"], MATHS, FRENCH)
    (soft,) = await route(["add two french"], MATHS, FRENCH, temperature=0.1)
    (hard,) = await route(["add two french"], MATHS, FRENCH, temperature=1e-4)
    assert sum(soft.scores.values()) == pytest.approx(1)
    gap = raw.scores["maths"] - raw.scores["french"]
    assert soft.scores["maths"] / soft.scores["french"] == pytest.approx(math.exp(gap / 0.1))
    assert soft.top(2).weights == pytest.approx(tuple(soft.scores.values()))
    assert hard.top(2).weights[0] > 0.999


async def test_all_questions_are_encoded_in_one_call_and_examples_only_once():
    made, pool, encoder = router(MATHS, FRENCH, BARE)
    requests = [Request(prompt=f"add {i}") for i in range(5)]
    await asyncio.gather(made.route(requests, pool), made.route(requests, pool))
    await made.route(requests, pool)
    examples, *questions = encoder.calls
    assert examples == [*MATHS.examples, "say bread in french"]
    assert questions == [[r.question for r in requests]] * 3


async def test_examples_are_tried_again_after_a_failure():
    class Failing(WordCounts):
        async def encode(self, texts):
            if not self.calls:
                self.calls.append([])
                raise ConfigError("no model")
            return await super().encode(texts)

    made, pool, _ = router(MATHS, encoder=Failing())
    with pytest.raises(ConfigError):
        await made.route([Request(prompt="add")], pool)
    (decision,) = await made.route([Request(prompt="add")], pool)
    assert decision.expert_ids == ("maths",)


async def test_only_the_pool_is_scored_and_strangers_in_it_are_neutral():
    made, _, _ = router(MATHS, FRENCH)
    stranger = ExpertSpec(expert_id="new", engine_id="x", examples=("sing a song",))
    (decision,) = await made.route([Request(prompt="say cat in french")], [MATHS, stranger])
    assert decision.scores == {"maths": 0, "new": 0.25}


async def test_a_pool_without_any_words_still_routes():
    (decision,) = await route(["hello"], BARE, ExpertSpec(expert_id="bare2", engine_id="x"))
    assert decision.expert_ids == ("bare",)


async def test_long_examples_are_shown_short():
    wordy = ExpertSpec(expert_id="wordy", engine_id="x", examples=("one two three\n" * 10,))
    (decision,) = await route(["one two three"], wordy)
    assert decision.reason == "closest to 'one two three one two three one two thr…' 1.00"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"default": "nobody"}, "no expert 'nobody'; known: maths"),
        ({"floor": 2}, "floor"),
        ({"floor": math.nan}, "floor"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        router(MATHS, **options)


NEAR = {
    "tutor": ["What is 2+2?", "Compute 17 * 23", "If I have 5 apples and eat 2, how many remain?", "Solve 2y = 11"],
    "coder": ["Write a Python function to reverse a string.", "Fix this error: list index out of range"],
    "translator": ["Translate into French: I am hungry.", "What's French for 'cat'?"],
    "generalist": ["Who wrote Hamlet?", "How do vaccines work?", "Recommend a good novel.", "Tell me a joke."],
}


@pytest.mark.slow
async def test_the_default_floor_tells_near_from_far_with_the_real_encoder():
    from routers.encoders import MiniLM

    examples = {
        "tutor": ("What is 48 divided by 6?", "Calculate 15 + 27.", "Solve 3x = 12 for x.", "Tom has 9 marbles."),
        "coder": ("Write a Python function that returns the largest item of a list.", "Fix this bug in my program."),
        "translator": ("Translate into French: The weather is nice.", "What is the French word for bread?"),
    }
    specs = [ExpertSpec(expert_id=e, engine_id="x", examples=x) for e, x in examples.items()]
    generalist = ExpertSpec(expert_id="generalist", engine_id="x")
    made, pool, _ = router(*specs, generalist, encoder=MiniLM())
    for expert_id, questions in NEAR.items():
        decisions = await made.route([Request(prompt=q) for q in questions], pool)
        assert [d.expert_ids[0] for d in decisions] == [expert_id] * len(questions), questions
