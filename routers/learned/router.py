"""Serves a fitted model: embeds the questions, predicts, and decides among the experts of the service's pool."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from experts.errors import ConfigError
from experts.types import ExpertSpec, Request
from routers.artefacts import columns_of
from routers.base import RouteDecision, RouterParts, decide
from routers.learned import artefact
from routers.learned.base import Model
from routers.learned.cascade import SPEND, Cascade
from routers.questions import Questions
from routers.records import Array


class Learned:
    """``names`` maps an expert of the service to the recorded one it is, where their ids differ.

    A request's ``metadata["task"]`` is read as its task; without one the task is guessed from the text. Experts that
    the artefact does not know score as the worst of those it does: they are asked when nobody else can be. ``adjust``
    changes what of the model is policy.
    """

    def __init__(
        self,
        parts: RouterParts,
        name: str,
        names: Mapping[str, str] | None,
        *,
        adjust: Callable[[Model], Model] = lambda model: model,
    ) -> None:
        if parts.artefact is None:
            raise ConfigError(
                f"router '{name}' must be fitted first: collegium router fit {name} --pool DIR --out DIR, then write "
                "'artefact: DIR' beside its name."
            )
        self.name = name
        self._fitted = artefact.load(parts.artefact)
        if self._fitted.name != name:
            raise ConfigError(f"{parts.artefact} holds a router '{self._fitted.name}', not '{name}'.")
        self._model = adjust(self._fitted.model)
        self._encoder = parts.encoder()
        check_encoder(self._fitted, self._encoder.name, self._encoder.width)
        self._columns = columns_of(self._fitted.expert_ids, list(parts.experts), names or {})

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        texts = tuple(request.question for request in requests)
        vectors = await self._encoder.encode(texts)
        questions = Questions(vectors_QW=vectors, tasks=tuple(told_task(request) for request in requests), texts=texts)
        if len(requests) == 1:
            rows = self._model.predict(questions)
        else:
            rows = await asyncio.to_thread(self._model.predict, questions)
        return [self._decide(row, pool) for row in rows]

    def _decide(self, row: Array, pool: Sequence[ExpertSpec]) -> RouteDecision:
        worst = float(row.min())
        columns = {s.expert_id: self._columns.get(s.expert_id) for s in pool}
        scores = {e: worst if c is None else float(row[c]) for e, c in columns.items()}
        best = max(scores, key=scores.__getitem__)
        reason = f"'{best}' at {scores[best]:.2f}, fitted on {self._fitted.questions} questions of {self._fitted.pool}"
        return decide(scores, reason=reason, router=self.name)


def check_encoder(fitted: artefact.Fitted, name: str, width: int) -> None:
    if (fitted.encoder, fitted.width) != (name, width):
        raise ConfigError(
            f"router '{fitted.name}' was fitted on embeddings of '{fitted.encoder}' ({fitted.width} wide), the "
            f"service's encoder is '{name}' ({width} wide); set encoder.model, or fit it again."
        )


def told_task(request: Request) -> str | None:
    task = request.metadata.get("task")
    return task if isinstance(task, str) else None


def task(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "task", names)


def knn(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "knn", names)


def linear(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "linear", names)


def logistic(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "logistic", names)


def factor(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "factor", names)


def cluster(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "cluster", names)


def gaussian(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "gaussian", names)


def mlp(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "mlp", names)


def choice(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "choice", names)


def threshold(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "threshold", names)


def stack(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "stack", names)


def panel(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "panel", names)


def contrastive(parts: RouterParts, *, names: Mapping[str, str] | None = None) -> Learned:
    return Learned(parts, "contrastive", names)


def cascade(parts: RouterParts, *, names: Mapping[str, str] | None = None, spend: float = SPEND) -> Learned:
    """``spend``: the budget, as a share of what its last stage alone would cost."""
    if not 0 < spend <= 1:
        raise ConfigError(f"router 'cascade': 'spend' is a share above 0, up to 1, not {spend}.")
    return Learned(parts, "cascade", names, adjust=lambda m: m.at(spend) if isinstance(m, Cascade) else m)
