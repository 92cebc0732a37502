"""Fusing by the expert that is best at it: Symbolic-MoE's aggregator choice (Chen et al., 2025, arXiv 2503.05641).

Being good at a task and being good at merging others' answers to it are two things. ``collegium eval aggregators``
measures the second one and writes the ranking that stands here as an artefact.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from experts.errors import ConfigError
from orchestrator.aggregators.base import AggregatorParts
from orchestrator.aggregators.fuse import Fuse

FILE, VERSION = "aggregators.json", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one expert did: ``right`` of ``asked`` questions; the same of the ``winnable`` ones, where one of the
    responses shown was right; ``failed`` calls, which count as wrong."""

    expert_id: str
    asked: int
    right: int
    winnable: int
    winnable_right: int
    failed: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorRanking:
    """``standings``, best first, and what they were measured on."""

    pool: str
    pool_digest: str
    split: str
    seed: int
    standings: tuple[Standing, ...]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        body = {"version": VERSION, **asdict(self)}
        (folder / FILE).write_bytes(orjson.dumps(body, option=orjson.OPT_INDENT_2))


def load_ranking(folder: Path) -> AggregatorRanking:
    """Raises ConfigError."""
    path = folder / FILE
    try:
        body: Any = orjson.loads(path.read_bytes())
        if body.pop("version") != VERSION:
            raise ConfigError(f"{path} is of another version; make it again with 'collegium eval aggregators'.")
        standings = tuple(Standing(**row) for row in body.pop("standings"))
        return AggregatorRanking(standings=standings, **body)
    except OSError as exc:
        raise ConfigError(f"Cannot read {path}: {exc.strerror}. 'collegium eval aggregators' writes it.") from exc
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path} is no ranking of aggregators: {exc}.") from exc


class PickAggregator(Fuse):
    """``fuse`` by the best of its artefact's ranking that this config has."""

    name = "pick_aggregator"

    def __init__(self, parts: AggregatorParts, *, response_chars: int = 4000, question_chars: int = 16_000) -> None:
        if parts.artefact is None:
            raise ConfigError("needs an artefact: the folder that 'collegium eval aggregators' wrote.")
        ranked = [s.expert_id for s in load_ranking(parts.artefact).standings]
        best = next((e for e in ranked if e in parts.experts), None)
        if best is None:
            raise ConfigError(f"{parts.artefact} ranks {', '.join(ranked)}: none of them is an expert of this config.")
        super().__init__(parts, expert=best, response_chars=response_chars, question_chars=question_chars)
