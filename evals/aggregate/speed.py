"""How fast answers are read and counted: ``python -m evals.aggregate.speed``.

One core; the best of many, for a busy machine only ever adds time. Extraction must be linear, so that each kind is
timed on 64 KB and on 1 MB of the texts that are worst for it, and the ratio stands beside: 16 is linear, less is better
(answers stand at the end, and most kinds read no more than that).
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from experts.types import Completion, Message, Request
from orchestrator.aggregators.extract import KINDS, Asked, read_request
from orchestrator.aggregators.vote import Vote, WeightedVote
from routers.base import RouteDecision

SMALL, LARGE = 2**16, 2**20
VOTE_LIMIT_MS, EXTRACT_LIMIT_MS = 0.2, 50.0

HOSTILE: dict[str, Callable[[int], str]] = {
    "prose": lambda n: ("It follows that the value of x is 12.5 and so on. " * (n // 50 + 1))[:n],
    "digits": lambda n: "1" * n,
    "commas": lambda n: ("1,234" * (n // 5 + 1))[:n],
    "braces": lambda n: "\\boxed{" + "{" * (n - 7),
    "boxes": lambda n: ("\\boxed{" * (n // 7 + 1))[:n],
    "fractions": lambda n: ("\\frac{1}{2" * (n // 10 + 1))[:n],
    "answers": lambda n: ("answer is answer: " * (n // 18 + 1))[:n],
    "spaces": lambda n: "The answer is" + " " * (n - 13),
    "json": lambda n: "[" * (n // 2) + "]" * (n // 2),
    "objects": lambda n: ('{"a": ' * (n // 6 + 1))[:n],
    "fences": lambda n: ("```json\n" * (n // 8 + 1))[:n],
    "letters": lambda n: ("A) " * (n // 3 + 1))[:n],
    "thoughts": lambda n: ("<think>" * (n // 7 + 1))[:n],
    "signs": lambda n: ("-+" * (n // 2 + 1))[:n],
}


def best_ms(work: Callable[[], object], *, at_least_s: float = 0.2, rounds: int = 5) -> float:
    """The fastest of ``rounds`` runs or more."""
    best, until, done = float("inf"), time.perf_counter() + at_least_s, 0
    while done < rounds or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        best, done = min(best, time.perf_counter() - started), done + 1
    return best * 1e3


def vote_ms(aggregator: Vote | WeightedVote, question: str, texts: list[str]) -> float:
    """One vote over ``texts``, reading the question and the answers included."""
    experts = [f"e{i}" for i in range(len(texts))]
    decision = RouteDecision(
        expert_ids=(), weights=(), scores={e: 1 / (i + 1) for i, e in enumerate(experts)}, reason="", router="bench"
    ).top(len(texts))
    request = Request(messages=(Message(role="user", content=question),))
    answers = [Completion(request_id="r", expert_id=e, text=t) for e, t in zip(experts, texts, strict=True)]

    async def many() -> float:
        best = float("inf")
        for _ in range(3000):
            started = time.perf_counter()
            await aggregator.aggregate(request, decision, answers)
            best = min(best, time.perf_counter() - started)
        return best

    return asyncio.run(many()) * 1e3


def measure() -> dict[str, Any]:
    asked = {
        "none": Asked(),
        "options": Asked(options=("Rome", "Paris", "Lyon", "Nice")),
        "number": Asked(number=True),
        "json": Asked(json=True),
    }
    rows = []
    for kind, extract in KINDS.items():
        for name, make in HOSTILE.items():
            for want, what in asked.items() if kind == "auto" else [("none", Asked())]:
                small, large = make(SMALL), make(LARGE)
                took = best_ms(lambda x=extract, t=large, a=what: x(t, a), at_least_s=0.02)  # type: ignore[misc]
                less = best_ms(lambda x=extract, t=small, a=what: x(t, a), at_least_s=0.02)  # type: ignore[misc]
                rows.append({"kind": kind, "asked": want, "text": name, "ms_1mb": took, "ratio": took / less})
    question = HOSTILE["prose"](LARGE)
    reading = best_ms(lambda: read_request(Request(prompt=question)))
    letters = [f"Let us see. {'It is long. ' * 40}The answer is ({c})." for c in "ABBACBBD"]
    numbers = [f"So we add. {'It is long. ' * 40}The answer is {n}." for n in (12, 12.0, 13, 12, 14, 12, 13, 12)]
    options = "Which?\nA. Rome\nB. Paris\nC. Lyon\nD. Nice"
    votes = {
        "vote, 8 letters": vote_ms(Vote(), options, letters),
        "vote, 8 numbers": vote_ms(Vote(), "How many apples are there?", numbers),
        "weighted_vote, 8 letters": vote_ms(WeightedVote(), options, letters),
        "weighted_vote, 8 numbers": vote_ms(WeightedVote(), "How many apples are there?", numbers),
    }
    return {"vote_ms": votes, "read_request_1mb_ms": reading, "extract": rows}


def main() -> None:
    report = measure()
    worst = {k: max((r for r in report["extract"] if r["kind"] == k), key=lambda r: r["ms_1mb"]) for k in KINDS}
    for name, took in report["vote_ms"].items():
        print(f"{name:28} {took:8.4f} ms   (to reach: {VOTE_LIMIT_MS})")
    print(f"{'a question of 1 MB':28} {report['read_request_1mb_ms']:8.3f} ms")
    for kind, row in worst.items():
        print(
            f"{kind + ', 1 MB, worst text':28} {row['ms_1mb']:8.3f} ms   (to reach: {EXTRACT_LIMIT_MS}; "
            f"{row['text']}, asked {row['asked']}; {row['ratio']:.1f} times 64 KB)"
        )


if __name__ == "__main__":
    main()
