"""What a check is given and what it gives back."""

from dataclasses import dataclass
from typing import Literal

from experts.types import Backend, EngineSpec
from orchestrator.aggregators.reading import BY_MEANING
from orchestrator.config import AggregatorConfig, Config
from routers.learned import MODELS
from routers.static import WordLlama

ENCODER_ROUTERS = frozenset({"centroid", "prompts", *MODELS})
"""Routers that read embeddings, and so need the extra 'encoder' and its model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``todo`` is empty where nothing is to be done."""

    check: str
    status: Literal["ok", "warn", "fail"] = "ok"
    message: str
    todo: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The config, and where it is to be served."""

    config: Config
    host: str = "127.0.0.1"
    port: int = 8000

    def specs(self, backend: Backend) -> list[EngineSpec]:
        return [e.spec(name) for name, e in self.config.engines.items() if e.backend == backend]

    @property
    def needs_encoder(self) -> bool:
        policies = self.config.policies.values()
        return any(p.router.name in ENCODER_ROUTERS or _reads_embeddings(p.aggregator) for p in policies)

    @property
    def encoder_package(self) -> str:
        """What the encoder cannot do without."""
        return "wordllama" if self.config.encoder.model == WordLlama.NAME else "sentence_transformers"


def _reads_embeddings(aggregator: AggregatorConfig) -> bool:
    """Agreement and votes by meaning do. What an artefact needs, it says when it is made: the check 'policies'."""
    agreement = aggregator.name == "best_of" and aggregator.artefact is None
    return agreement or aggregator.options.get("extract") == BY_MEANING
