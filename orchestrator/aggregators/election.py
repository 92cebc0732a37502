"""How answers vote: counting them, electing one, and telling whether it can still be turned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import fsum

from experts.types import Completion, Request
from routers.base import RouteDecision, normalise

_NEW = "\0"
"""Stands for an answer that nobody has given yet; no extraction gives it."""
_LABEL = 120
"""Characters of an answer that the trace shows; voting compares all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    completion: Completion
    answer: str | None
    weight: float
    counts: float = 0.0


def _counting(ballot: Ballot, counts: float) -> Ballot:
    # dataclasses.replace() takes five times as long.
    return Ballot(completion=ballot.completion, answer=ballot.answer, weight=ballot.weight, counts=counts)


Counting = Callable[[Sequence[Ballot]], list[Ballot]]


def by_head(ballots: Sequence[Ballot]) -> list[Ballot]:
    return [_counting(b, 1.0) for b in ballots]


def by_weight(ballots: Sequence[Ballot]) -> list[Ballot]:
    shares = iter(normalise([b.weight for b in ballots if b.answer is not None]))
    return [b if b.answer is None else _counting(b, next(shares)) for b in ballots]


def make_ballots(
    decision: RouteDecision, completions: Sequence[Completion], answers: Sequence[str | None]
) -> list[Ballot]:
    """The heaviest first, then the best ranked. ``answers`` are what the completions say, in their order."""
    weights = dict(zip(decision.expert_ids, decision.weights, strict=True))
    least = min(decision.weights, default=1.0)
    ranks = {expert_id: rank for rank, expert_id in enumerate(decision.ranked())}
    ballots = [
        Ballot(completion=c, answer=a, weight=weights.get(c.expert_id, least))
        for c, a in zip(completions, answers, strict=True)
    ]
    return sorted(ballots, key=lambda b: (-b.weight, *place(b.completion, ranks)))


def by_rank(decision: RouteDecision, completions: Sequence[Completion]) -> list[Completion]:
    """``completions``, the best-ranked expert's first, whatever order they came in."""
    ranks = {expert_id: rank for rank, expert_id in enumerate(decision.ranked())}
    return sorted(completions, key=lambda c: place(c, ranks))


def place(completion: Completion, ranks: Mapping[str, int]) -> tuple[int, str, int, str]:
    """A spot in the order of experts that no two answers share."""
    expert_id = completion.expert_id
    return ranks.get(expert_id, len(ranks)), expert_id, completion.index, completion.text or ""


def elect(ballots: Sequence[Ballot], request: Request) -> Completion:
    """``ballots``, best first, to the winner's own Completion with an account of the election."""
    votes = _count(ballots, "counts")
    if not votes:
        return _account(ballots[0], ballots, {}, "no answer could be read: the heaviest expert's is taken")
    weights = _count(ballots, "weight")
    winner = _winner(votes, weights, request)
    tied = [a for a in votes if votes[a] == votes[winner]]
    by = "weight" if sum(weights[a] == weights[winner] for a in tied) == 1 else "seed"
    note = f"{len(tied)} answers tied; decided by {by}" if len(tied) > 1 else None
    return _account(next(b for b in ballots if b.answer == winner), ballots, votes, note)


def _winner(votes: Mapping[str, float], weights: Mapping[str, float], request: Request) -> str:
    seed = request.metadata.get("route_seed", request.params.seed)
    return max(votes, key=lambda a: (votes[a], weights[a], lot(seed, a)))


def is_safe(
    ballots: Sequence[Ballot], decision: RouteDecision, pending: Sequence[str], counting: Counting, request: Request
) -> bool:
    """Whether the leader stays first when all of ``pending`` agree on any one other answer, read already or new."""
    votes = _count(counting(ballots), "counts")
    if not votes:
        return False
    leader = _winner(votes, _count(ballots, "weight"), request)
    weights = dict(zip(decision.expert_ids, decision.weights, strict=True))
    late_weights = [weights.get(e, 0.0) for e in pending]
    rivals = [answer for answer in votes if answer != leader]
    return all(_holds(leader, rival, ballots, late_weights, counting, request) for rival in [*rivals, _NEW])


def _holds(
    leader: str,
    rival: str,
    ballots: Sequence[Ballot],
    late_weights: Sequence[float],
    counting: Counting,
    request: Request,
) -> bool:
    late = [replace(ballots[0], answer=rival, weight=weight) for weight in late_weights]
    ballots = [*ballots, *late]
    votes, weights = _count(counting(ballots), "counts"), _count(ballots, "weight")
    if rival == _NEW and (votes[leader], weights[leader]) == (votes[rival], weights[rival]):
        return False  # nobody knows yet which of them the seed would pick
    return _winner(votes, weights, request) == leader


def _count(ballots: Sequence[Ballot], what: str) -> dict[str, float]:
    """By answer. Rounded, so that 0.1 + 0.2 ties with 0.3."""
    sums: dict[str, list[float]] = {}
    for ballot in ballots:
        if ballot.answer is not None:
            sums.setdefault(ballot.answer, []).append(getattr(ballot, what))
    return {answer: round(fsum(parts), 9) for answer, parts in sums.items()}


def lot(seed: object, answer: str) -> bytes:
    return blake2b(f"{seed}\0{answer}".encode(errors="replace"), digest_size=8).digest()


def _account(winner: Ballot, ballots: Sequence[Ballot], votes: Mapping[str, float], note: str | None) -> Completion:
    answers = [
        {
            "expert_id": b.completion.expert_id,
            "extracted": _label(b.answer),
            "weight": 0.0 if b.answer is None else round(b.counts, 9),
        }
        for b in ballots
    ]
    trace = {
        "answers": answers,
        "votes": {_label(answer): count for answer, count in votes.items()},
        "winner": _label(winner.answer),
    }
    return replace(winner.completion, trace=trace if note is None else {**trace, "note": note})


def _label(answer: str | None) -> str | None:
    if answer is None or len(answer) <= _LABEL:
        return answer
    return f"{answer[:_LABEL]}… #{lot('', answer).hex()}"
