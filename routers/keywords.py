"""Keywords of a question, from two sources: an expert that is asked for them, or the nearest of a known vocabulary.

Legend: Q questions, K keywords, W width of the embedding.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

import numpy as np

from experts.base import Expert, collect_choices
from experts.types import Message, Request, SamplingParams
from routers.questions import Questions
from routers.records import Array

LONGEST = 20
"""Characters of a keyword; what is longer is a sentence (Symbolic-MoE's filter)."""
_READ_CHARS = 4_000
_PROMPT = """Name the knowledge, subjects or skills that answering the question below takes. Do not answer it.
Give 2 to 5 keywords with commas between, such as: psychology, virology, microbiology, finance, property law, algebra,
world history, organic chemistry, statistics.
Write one line of this form and nothing else:
Keywords: first, second, third

Question:
{question}"""


def parse_keywords(text: str) -> list[str]:
    """What follows "Keywords:" on its line, in small letters; nothing where the word does not occur."""
    _, found, rest = text.rpartition("Keywords:")
    line = rest.strip().splitlines()[0] if found and rest.strip() else ""
    words = (" ".join(part.lower().replace(".", "").split()) for part in line.split(","))
    return [w for w in words if w]


def agreed(samples: Sequence[Sequence[str]]) -> list[str]:
    """Keywords of at most ``LONGEST`` characters that more than one sample names, in the order first seen."""
    counts = Counter(k for sample in samples for k in dict.fromkeys(sample) if len(k) <= LONGEST)
    return [k for k, n in counts.items() if n > 1]


class LlmKeywords:
    """Asks an expert ``samples`` times and keeps what it says more than once; the last ``cache`` questions' keywords
    are remembered. Raises what the expert raises."""

    def __init__(
        self,
        expert: Expert,
        *,
        samples: int = 5,
        temperature: float = 0.7,
        max_tokens: int = 64,
        cache: int = 10_000,
    ) -> None:
        self._expert = expert
        self._params = SamplingParams(n=samples, temperature=temperature, max_tokens=max_tokens, seed=0)
        self._size = cache
        self._known: OrderedDict[bytes, list[str]] = OrderedDict()

    async def of(self, question: str) -> list[str]:
        key = blake2b(question.encode(errors="replace"), digest_size=16).digest()
        if key not in self._known:
            prompt = _PROMPT.format(question=question[:_READ_CHARS])
            request = Request(messages=(Message(role="user", content=prompt),), params=self._params, stream=False)
            answers = await collect_choices(self._expert.generate(request), request)
            self._known[key] = agreed([parse_keywords(a.text) for a in answers])
        self._known.move_to_end(key)
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return self._known[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagger:
    """Keywords by embedding, no model asked: each keyword has a place, the mean of the questions that have it.

    Cosines are taken around the mean of all questions, which all of them share and which says nothing.
    """

    names: tuple[str, ...]
    places_KW: Array
    mean_W: Array

    @classmethod
    def fit(cls, questions: Questions, keywords_Q: Sequence[Sequence[str]]) -> Self:
        names = sorted({k for own in keywords_Q for k in own})
        places = {name: i for i, name in enumerate(names)}
        sums = np.zeros((len(names), questions.vectors_QW.shape[1]), np.float32)
        for vector, own in zip(questions.vectors_QW, keywords_Q, strict=True):
            sums[[places[k] for k in own]] += vector
        counts = np.array([sum(k in own for own in map(set, keywords_Q)) for k in names], np.float32)
        mean = questions.vectors_QW.mean(axis=0)
        return cls(names=tuple(names), places_KW=_unit(sums / np.maximum(counts, 1)[:, None] - mean), mean_W=mean)

    def tag(self, questions: Questions, *, most: int, floor: float) -> Array:
        """Q x K counts: the ``most`` nearest keywords that are no further than ``floor``, and the task where it is told
        and known (in place of the furthest of them). Of a small vocabulary a third at most: what most questions have
        tells nothing."""
        cosines = _unit(questions.vectors_QW - self.mean_W) @ self.places_KW.T
        columns = {name: k for k, name in enumerate(self.names)}
        told = [(q, columns[t]) for q, t in enumerate(questions.tasks) if t in columns]
        for q, k in told:
            cosines[q, k] = 2.0
        most = min(most, max(1, len(self.names) // 3))
        nearest = np.argpartition(-cosines, most - 1, axis=1)[:, :most]
        tags = np.zeros(cosines.shape, np.float32)
        np.put_along_axis(tags, nearest, np.take_along_axis(cosines, nearest, axis=1) >= floor, axis=1)
        return tags


def nearest_known(vectors_NW: Array, known_KW: Array, floor: float) -> list[int | None]:
    """The place of the nearest known keyword for each new one; None where even that is further than ``floor``."""
    cosines = _unit(vectors_NW) @ _unit(known_KW).T
    best = cosines.argmax(axis=1)
    return [int(b) if row[b] >= floor else None for row, b in zip(cosines, best, strict=True)]


def _unit(vectors: Array) -> Array:
    unit: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return unit
