"""What each of several answers says, equal strings for equal answers: by one of extract's kinds, or by meaning."""

import asyncio
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Protocol

import numpy as np
import orjson

from experts.errors import ConfigError
from experts.types import JSON, Completion, Request
from orchestrator.aggregators.base import AggregatorParts
from orchestrator.aggregators.extract import Extract, canonical_json, make_extract, plain, read_request, settle_percents
from orchestrator.aggregators.quoting import after_reasoning
from routers.encoders import Encoder

BY_MEANING = "embedding"


class Reader(Protocol):
    def is_stable(self, request: Request, completions: Sequence[Completion]) -> bool:
        """Whether further answers leave the reading of these as it is."""

    async def read(self, request: Request, completions: Sequence[Completion]) -> list[str | None]:
        """One reading an answer, in their order, None where there is none; the order of the answers changes nothing."""


class ByKind:
    """Each answer for itself, by ``extract``; tool calls by what they call."""

    def __init__(self, extract: Extract) -> None:
        self._extract = extract

    def is_stable(self, request: Request, completions: Sequence[Completion]) -> bool:
        """A percentage is read as others write it (settle_percents), so one that is settled now may yet change."""
        return not any(answer is not None and answer.endswith("%") for answer in self._each(request, completions))

    async def read(self, request: Request, completions: Sequence[Completion]) -> list[str | None]:
        return settle_percents(self._each(request, completions))

    def _each(self, request: Request, completions: Sequence[Completion]) -> list[str | None]:
        asked = read_request(request)
        return [
            _calls(c.tool_calls) if c.tool_calls else self._extract(after_reasoning(c.text or ""), asked)
            for c in completions
        ]


class ByMeaning:
    """Texts in clusters of which no two members are less alike than ``threshold`` (cosine, the service's encoder).

    Complete linkage, the most alike first. A cluster is called by the text in its middle.
    """

    def __init__(self, encoder: Callable[[], Encoder], threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is a cosine above 0, at most 1, not {threshold}")
        self._encoder = encoder
        self._threshold = threshold

    def is_stable(self, request: Request, completions: Sequence[Completion]) -> bool:
        return False

    async def read(self, request: Request, completions: Sequence[Completion]) -> list[str | None]:
        texts = [None if c.tool_calls else plain(after_reasoning(c.text or "")) for c in completions]
        different = sorted({text for text in texts if text is not None})
        names = await self._names(different)
        said = zip(completions, texts, strict=True)
        return [_calls(c.tool_calls) if c.tool_calls else None if t is None else names[t] for c, t in said]

    async def _names(self, texts: list[str]) -> dict[str, str]:
        if len(texts) < 2:
            return {text: text for text in texts}
        encoder = await asyncio.to_thread(self._encoder)
        vectors = await encoder.encode(texts)
        # Rounded: what else stood in the encoder's batch must not decide.
        cosines = np.round((vectors @ vectors.T).astype(np.float64), 5)
        names: dict[str, str] = {}
        for members in _clusters(cosines, self._threshold):
            middle = max(members, key=lambda i: (cosines[i, members].sum(), -i))
            names |= {texts[i]: texts[middle] for i in members}
        return names


def make_reader(parts: AggregatorParts | None, extract: str, field: str | None, threshold: float) -> Reader:
    """Raises ConfigError, ValueError."""
    if extract != BY_MEANING:
        return ByKind(make_extract(extract, field))
    if parts is None or field is not None:
        raise ConfigError(f"extract: '{BY_MEANING}' needs the service's encoder and takes no 'field'.")
    return ByMeaning(parts.encoder, threshold)


def _clusters(cosines: np.ndarray, threshold: float) -> list[list[int]]:
    clusters = [[i] for i in range(len(cosines))]
    while len(clusters) > 1:
        least = {
            (a, b): cosines[np.ix_(clusters[a], clusters[b])].min() for a, b in combinations(range(len(clusters)), 2)
        }
        (a, b), alike = max(least.items(), key=lambda item: item[1])  # the first of equals
        if alike < threshold:
            break
        clusters[a] = sorted([*clusters[a], *clusters.pop(b)])
    return clusters


def _calls(tool_calls: Sequence[JSON]) -> str:
    """Tool calls agree when they name the same functions with equal arguments; their ids do not matter."""
    functions = [call.get("function") or {} for call in tool_calls]
    return canonical_json([[f.get("name"), _arguments(str(f.get("arguments")))] for f in functions])


def _arguments(text: str) -> str:
    """One spelling for equal arguments; what is no JSON stays as it is."""
    try:
        return canonical_json(orjson.loads(text))
    except (orjson.JSONDecodeError, RecursionError):
        return text
