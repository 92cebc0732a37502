"""Stops when an answer is good enough: the second half of a cascade, whose order a router gives (FrugalGPT,
arXiv 2305.05176; agreement as in arXiv 2310.03094).

Asked one by one, experts after the stop are never called. ``signal`` says what is good enough: "agreement" of
``agree`` answers; "logprobs": the mean probability of an answer's tokens reaches ``threshold`` (an answer without
them is not good enough); "verifier": an expert asked whether the answer is right says so with such a probability.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from experts.base import Expert, Reward, Score, collect
from experts.errors import CollegiumError, ConfigError
from experts.types import Completion, Message, Request, SamplingParams
from orchestrator.aggregators.base import AggregatorParts
from orchestrator.aggregators.extract import make_extract, read_request, settle_percents
from routers.base import RouteDecision
from routers.choices import choice_format, choice_probabilities, read_choice
from routers.learned.cascade import BEHIND

SIGNALS = ("agreement", "logprobs", "verifier")
_READ_CHARS = 4_000
_REMEMBERED = 1_000


class Cascade:
    """An answer stands if it was good enough when it came. Otherwise agreement takes the answer given most (a tie: of
    those, the one whose expert was asked last, for dearer experts come later), the other signals the most confident."""

    name = "cascade"
    takes_one = False

    def __init__(
        self,
        parts: AggregatorParts,
        *,
        signal: str = "agreement",
        threshold: float = 0.8,
        agree: int = 2,
        verifier: str | None = None,
        extract: str = "auto",
        field: str | None = None,
    ) -> None:
        if signal not in SIGNALS or (signal == "verifier") != (verifier is not None):
            raise ConfigError(
                f"aggregator 'cascade': 'signal' is one of {', '.join(SIGNALS)}; 'verifier' names an expert, for the "
                "last one alone."
            )
        if not 0 < threshold <= 1 or agree < 2:
            raise ConfigError("aggregator 'cascade': 'threshold' lies between 0 and 1, 'agree' is 2 or more.")
        self._signal, self._threshold, self._agree = signal, threshold, agree
        self._verifier = None if verifier is None else Verifier(_known(verifier, parts))
        self._extract = make_extract(extract, field)
        self._seen: OrderedDict[tuple[str, str, int], float] = OrderedDict()

    async def aggregate(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion]
    ) -> Completion:
        answers = _in_order(decision, completions)
        if self._signal == "agreement":
            return self._most_given(request, answers)
        sure = [await self._confidence(request, a) for a in answers]
        good = [i for i, c in enumerate(sure) if c >= self._threshold]
        # Of equally sure ones the dearest.
        chosen = good[0] if good else max(range(len(answers)), key=lambda i: (sure[i], i))
        said = [{"expert_id": a.expert_id, "confidence": round(c, 4)} for a, c in zip(answers, sure, strict=True)]
        trace = {"signal": self._signal, "answers": said, "settled": bool(good)}
        return replace(answers[chosen], trace=trace)

    async def settled(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion], pending: Sequence[str]
    ) -> bool:
        if not completions or not _worth_asking(decision, pending):
            return bool(completions) or not pending
        answers = _in_order(decision, completions)
        if self._signal == "agreement":
            counts = Counter(e for e in self._extracted(request, answers) if e is not None)
            return max(counts.values(), default=0) >= self._agree
        return any([await self._confidence(request, a) >= self._threshold for a in answers])

    def _most_given(self, request: Request, answers: Sequence[Completion]) -> Completion:
        read = self._extracted(request, answers)
        counts = Counter(e for e in read if e is not None)
        votes = [counts[e] if e is not None else 0 for e in read]
        chosen = max(range(len(answers)), key=lambda i: (votes[i], i))
        said = [{"expert_id": a.expert_id, "agrees": v} for a, v in zip(answers, votes, strict=True)]
        trace = {"signal": self._signal, "answers": said, "settled": votes[chosen] >= self._agree}
        return replace(answers[chosen], trace=trace)

    def _extracted(self, request: Request, answers: Sequence[Completion]) -> list[str | None]:
        asked = read_request(request)
        return settle_percents([self._extract(a.text or "", asked) for a in answers])

    async def _confidence(self, request: Request, answer: Completion) -> float:
        if self._verifier is None:
            return mean_probability(answer)
        key = (request.request_id, answer.expert_id, answer.index)
        if key not in self._seen:
            (score,) = await self._verifier.score(request, [answer])
            self._seen[key] = score.value
            while len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        return self._seen[key]


class Verifier(Reward):
    """The probability with which an expert says that an answer is right; 0 where it fails or does not say."""

    name = "verifier"

    def __init__(self, expert: Expert) -> None:
        self._expert = expert

    async def score(self, request: Request, answers: Sequence[Completion]) -> list[Score]:
        return [Score(value=await self._one(request, answer)) for answer in answers]

    async def _one(self, request: Request, answer: Completion) -> float:
        text = (
            "Is the answer to the question right?\nA. Yes, it is right.\nB. No, it is wrong.\n"
            f"Question:\n{request.question[:_READ_CHARS]}\n\nAnswer:\n{answer.text[-_READ_CHARS:]}\n\n"
            'Write {"choice": "A"} or {"choice": "B"}.'
        )
        # Under the request's own id, so that its bill counts the call.
        asked = replace(
            request,
            messages=(Message(role="user", content=text),),
            prompt=None,
            params=SamplingParams(temperature=0.0, max_tokens=24, logprobs=5),
            tools=(),
            tool_choice=None,
            response_format=choice_format("AB"),
            stream=False,
        )
        try:
            said = await collect(self._expert.generate(asked), asked)
        except CollegiumError:
            return 0.0  # what cannot be verified is not: the cascade goes on
        label = read_choice(said.text, "AB")
        told = None if label is None else choice_probabilities(said, label, "AB")
        return told["A"] if told else float(label == "A")


def mean_probability(answer: Completion) -> float:
    """exp of the mean log-probability of the answer's tokens; 0 where they were not told."""
    logprobs = answer.logprobs or {}
    values = [e.get("logprob") for e in logprobs.get("content") or []] or list(logprobs.get("token_logprobs") or [])
    known = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return math.exp(sum(known) / len(known)) if known else 0.0


def _in_order(decision: RouteDecision, completions: Sequence[Completion]) -> list[Completion]:
    """As they were to be asked."""
    ranks = {expert_id: rank for rank, expert_id in enumerate(decision.ranked())}
    return sorted(completions, key=lambda c: (ranks.get(c.expert_id, len(ranks)), c.expert_id, c.index))


def _worth_asking(decision: RouteDecision, pending: Sequence[str]) -> list[str]:
    """Where the router 'cascade' gave the order, the stages it skipped are spares: nothing is gained by a cheaper
    answer after a dearer one."""
    if decision.router != "cascade":
        return list(pending)
    return [e for e in pending if decision.scores.get(e, 0.0) > BEHIND]


def _known(expert_id: str, parts: AggregatorParts) -> Expert:
    if expert_id not in parts.experts:
        raise ConfigError(f"aggregator 'cascade': no expert '{expert_id}'; known: {', '.join(parts.experts)}.")
    return parts.experts[expert_id]
