"""Prompt experts (mixture of prompts, arXiv 2407.00256): the nearest region's prompt answers.

The artefact is prompts.json (the experts, what they were made from) and regions.safetensors (their centroids).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experts.errors import ConfigError
from experts.types import ExpertSpec, Request
from routers.artefacts import Format
from routers.base import RouteDecision, RouterParts, decide
from routers.records import Array
from routers.regions import nearest_region

FORMAT = Format(
    thing="prompt experts",
    head="prompts.json",
    body="regions.safetensors",
    version=2,
    again="collegium router prompts --demos FILE --expert ID --out DIR",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """``expert_ids`` in the order of the rows of ``centroids_KW``."""

    expert_ids: tuple[str, ...]
    centroids_KW: Array
    encoder: str
    demos_digest: str

    def save(self, folder: Path, about: dict[str, object]) -> None:
        """Raises ConfigError where the folder cannot be written."""
        head = {
            "encoder": self.encoder,
            "width": int(self.centroids_KW.shape[1]),
            "demos_digest": self.demos_digest,
            "expert_ids": list(self.expert_ids),
            **about,
        }
        FORMAT.write(folder, head, {"centroids": self.centroids_KW})

    @classmethod
    def load(cls, folder: Path) -> "Regions":
        """Raises ConfigError."""
        head = FORMAT.read_head(folder)
        with FORMAT.reading(folder, head) as arrays:
            found = cls(
                expert_ids=tuple(head["expert_ids"]),
                centroids_KW=arrays["centroids"],
                encoder=head["encoder"],
                demos_digest=head["demos_digest"],
            )
        if (experts := len(found.expert_ids)) != (regions := len(found.centroids_KW)):
            raise ConfigError(f"{folder / FORMAT.head} names {experts} experts for {regions} regions.")
        return found


class Prompts:
    """Scores fall with the distance to an expert's region. ``far``: a question further than this from every region is
    left to ``otherwise``, an expert with a prompt for everything."""

    name = "prompts"

    def __init__(self, parts: RouterParts, *, far: float | None = None, otherwise: str | None = None) -> None:
        if parts.artefact is None:
            raise ConfigError(f"router 'prompts' needs an artefact; make it with: {FORMAT.again}")
        if (far is None) != (otherwise is None) or (far is not None and not far > 0):
            raise ConfigError("router 'prompts': 'far' (a distance) and 'otherwise' (an expert) go together.")
        self._regions = Regions.load(parts.artefact)
        wanted = (*self._regions.expert_ids, *([] if otherwise is None else [otherwise]))
        if missing := [e for e in wanted if e not in parts.experts]:
            raise ConfigError(f"router 'prompts': no expert {missing}; add {parts.artefact / 'experts.yaml'} to yours.")
        self._encoder = parts.encoder()
        if (self._encoder.name, self._encoder.width) != (self._regions.encoder, self._regions.centroids_KW.shape[1]):
            raise ConfigError(
                f"The regions in {parts.artefact} lie among embeddings of '{self._regions.encoder}', the service's "
                f"encoder is '{self._encoder.name}'; set encoder.model, or make them again."
            )
        self._far, self._otherwise = far, otherwise

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        vectors = await self._encoder.encode([r.question for r in requests])
        distances = nearest_region(vectors, self._regions.centroids_KW)
        return [self._decide(row, pool) for row in distances]

    def _decide(self, row_K: Array, pool: Sequence[ExpertSpec]) -> RouteDecision:
        distances = dict(zip(self._regions.expert_ids, map(float, row_K), strict=True))
        scores = {s.expert_id: 1 / (1 + distances[s.expert_id]) if s.expert_id in distances else 0.0 for s in pool}
        near = min(distances.values())
        reason = f"the nearest region is {near:.2f} away"
        if self._far is not None and near > self._far and self._otherwise in scores:
            scores[str(self._otherwise)] = 1.0
            reason = f"{reason}, further than {self._far:g}"
        return decide(scores, reason=reason, router=self.name)
