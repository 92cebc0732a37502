import numpy as np
import pytest

from experts.base import EngineExpert
from experts.fake import FakeEngine
from experts.types import EngineSpec, ExpertSpec
from routers.keywords import LlmKeywords, Tagger, agreed, nearest_known, parse_keywords
from routers.questions import Questions


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Keywords: Virology, property law.", ["virology", "property law"]),
        ("I think so.\nKeywords: a,  b ,, c\nand more", ["a", "b", "c"]),
        ("Keywords:", []),
        ("virology, law", []),
        ("", []),
        ("Keywords: old\nKeywords: new", ["new"]),
    ],
)
def test_keywords_are_what_follows_the_word(text, found):
    assert parse_keywords(text) == found


def test_keywords_that_only_one_sample_names_are_dropped():
    samples = [["law", "cells"], ["cells", "law"], ["cells", "once", "once"], ["far too long to be a keyword"] * 2, []]
    assert agreed(samples) == ["law", "cells"]
    assert agreed([["far too long to be a keyword"], ["far too long to be a keyword"]]) == []
    assert agreed([]) == []


def fake(text):
    engine = FakeEngine(EngineSpec(engine_id="x", backend="fake", model="fake", options={"text": text}))
    return engine, EngineExpert(ExpertSpec(expert_id="k", engine_id="x"), engine)


async def test_a_question_is_asked_about_once_and_the_memory_is_bounded():
    engine, expert = fake("Keywords: law, cells")
    source = LlmKeywords(expert, cache=2)
    for question in ("one", "two", "one", "three", "two"):
        assert await source.of(question) == ["law", "cells"]
    assert engine.calls == 4


def test_a_tagger_puts_a_question_where_its_like_are():
    rng = np.random.default_rng(0)
    group = np.arange(90) % 3
    vectors = (np.eye(3, 8)[group] + rng.normal(0, 0.1, (90, 8))).astype(np.float32)
    questions = Questions(vectors_QW=vectors, tasks=(None,) * 90)
    tagger = Tagger.fit(questions, [[f"k{g}"] for g in group])
    assert (tagger.tag(questions, most=1, floor=0.0).argmax(axis=1) == group).all()
    assert tagger.tag(questions, most=9, floor=2.0).sum() == 0
    told = Questions(vectors_QW=vectors, tasks=("k2",) * 90)
    assert tagger.tag(told, most=1, floor=0.5)[:, 2].all(), "a task that is told is believed"


def test_new_keywords_become_the_nearest_known_one():
    known = np.eye(3)
    assert nearest_known(np.array([[0.9, 0.1, 0], [0, 0, 5.0]]), known, 0.5) == [0, 2]
    assert nearest_known(np.array([[1.0, 1.0, 1.0]]), known, 0.9) == [None]
