"""From a decision to running experts: a chain of spares for each choice, within what may be spent."""

from collections.abc import Iterable, Mapping, Sequence

from experts.base import Expert
from experts.errors import BadRequest
from experts.types import ExpertSpec, Request
from orchestrator.resilience import Fallback, Hedged
from routers.base import RouteDecision


def chains(
    decision: RouteDecision, experts: Mapping[str, Expert], *, max_calls: int, hedge_after_s: float | None
) -> list[Expert]:
    """One Expert for each choice of ``decision``, backed by the next best candidates: at most ``max_calls`` are asked
    altogether. A hedged choice takes the first spare."""
    chosen = decision.expert_ids
    if len(chosen) >= max_calls or len(chosen) == len(decision.scores):
        return [experts[e] for e in chosen]
    spares = iter([experts[e] for e in decision.ranked() if e not in chosen][: max_calls - len(chosen)])
    rows: list[Expert] = []
    for expert_id in chosen:
        first = experts[expert_id]
        if hedge_after_s is not None and (second := next(spares, None)) is not None:
            first = Hedged(first, second, after_s=hedge_after_s)
        rows.append(Fallback(first, spares))
    return rows


def affordable(pool: Sequence[ExpertSpec], request: Request, max_usd: float | None) -> list[ExpertSpec]:
    """The experts whose dearest answer to ``request`` (see dearest_usd) stays within ``max_usd``. Raises BadRequest
    when there is none."""
    if max_usd is None:
        return list(pool)
    usd = {s.expert_id: dearest_usd(s, request) for s in pool}
    within = [s for s in pool if usd[s.expert_id] <= max_usd]
    if not within:
        raise _too_dear(min(usd.values()), max_usd)
    return within


def calls_within(ranked: Iterable[ExpertSpec], request: Request, *, max_calls: int, max_usd: float) -> int:
    """How many of ``ranked``, best first, may be asked: ``max_calls`` at most, and only as long as the dearest answers
    of all of them together stay within ``max_usd``. Raises BadRequest when not even the first does.

    An expert asked again after a failure counts once: what failed before it began has cost nothing.
    """
    calls, total = 0, 0.0
    for spec in ranked:
        total += dearest_usd(spec, request)
        if calls == max_calls or total > max_usd:
            break
        calls += 1
    if calls == 0:
        raise _too_dear(total, max_usd)
    return calls


def dearest_usd(spec: ExpertSpec, request: Request) -> float:
    """What an answer may cost at most. The prompt, the expert's own included, is counted at 4 characters a token; each
    of the ``n`` answers at max_tokens (256 where neither the request nor the expert sets it)."""
    own = (spec.system_prompt or "", *(text for demo in spec.demos for text in demo))
    asked = (request.prompt or "", *(m.content or "" for m in request.messages))
    prompt_tokens = sum(len(text) for text in (*own, *asked)) / 4
    answer_tokens = request.params.n * (request.params.max_tokens or spec.defaults.max_tokens or 256)
    return (prompt_tokens * spec.usd_per_mtok_in + answer_tokens * spec.usd_per_mtok_out) / 1e6


def _too_dear(usd: float, max_usd: float) -> BadRequest:
    return BadRequest(
        f"No answer can be had for {max_usd:g} USD; it may take {usd:.4g}. "
        "Raise collegium.max_usd or lower max_tokens.",
        param="collegium.max_usd",
    )
