"""The likeliest option, by a conditional logit fitted on recorded answers; see stacking/model.py.

An answer that cannot be read counts for nothing, except that its expert was asked. An expert that the stack never saw
counts as the weakest it knows. Ties go to the option that the request's seed picks; nothing depends on the order in
which answers came.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from experts.errors import ConfigError
from experts.types import JSON, Completion, Request
from orchestrator.aggregators.base import AggregatorParts
from orchestrator.aggregators.election import lot
from orchestrator.aggregators.extract import Asked, make_extract, read_request, read_stem, settle_percents
from orchestrator.aggregators.stacking import artefact
from orchestrator.aggregators.stacking.build import Stack, prior_of
from orchestrator.aggregators.stacking.grams import Grams, Options
from orchestrator.aggregators.stacking.model import Ballots, Logit
from orchestrator.aggregators.stacking.options import TRAITS, option_traits
from orchestrator.aggregators.stacking.recorded import letter_place
from orchestrator.aggregators.stacking.stopping import AHEAD, NEVER_BELOW, Stop, decide, expected_gain
from orchestrator.aggregators.stacking.words import WORDS, answer_words
from routers.artefacts import columns_of
from routers.base import RouteDecision
from routers.records import Array

_REMEMBERED = 64
"""Questions under way at a time whose prior is kept."""
_SHOWN = 120
"""Characters of an option that the trace shows."""


class Stacked:
    """``names`` maps an expert of the service to the recorded one it is, where their ids differ. ``threshold`` and
    ``least_gain`` say when to stop asking instead of the artefact's rule (stacking/stopping.py). A request's
    ``metadata["task"]`` is read as its task."""

    name = "stack"
    takes_one = False

    def __init__(
        self,
        parts: AggregatorParts,
        *,
        names: Mapping[str, str] | None = None,
        threshold: float | None = None,
        least_gain: float | None = None,
        extract: str = "auto",
    ) -> None:
        if parts.artefact is None:
            raise ConfigError(
                "aggregator 'stack' must be fitted first: collegium build stack --pool DIR --out DIR, then write "
                "'artefact: DIR' beside its name."
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(f"aggregator 'stack': 'threshold' is a probability from 0 to 1, got {threshold}.")
        if least_gain is not None and not NEVER_BELOW <= least_gain <= 1:
            raise ConfigError(f"aggregator 'stack': 'least_gain' is between probabilities, -1 to 1, got {least_gain}.")
        self._fitted = artefact.load(parts.artefact)
        if self._fitted.stack.prior is not None:
            self._fitted.stack.prior.neighbours.prepare()
        self._columns = columns_of(self._fitted.expert_ids, list(parts.experts), names or {})
        self._stop = self._fitted.stack.stop
        if threshold is not None or least_gain is not None:
            own = (1.0 if threshold is None else threshold, NEVER_BELOW if least_gain is None else least_gain)
            self._stop = Stop(threshold=own[0], least_gain=own[1])
        self._extract = make_extract(extract)
        # Asked for after every answer to a question, and the same each time.
        self._prior = lru_cache(_REMEMBERED)(self._think)

    async def aggregate(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion]
    ) -> Completion:
        heard = self._hear(request, completions)
        posterior_O, counts_A = self._weigh(request, heard)
        said = sorted({a.vote for a in heard.answers if a.vote >= 0})
        if not said:
            winner = min(heard.answers, key=lambda a: (-float(self._worth()[a.column]), a.place))
            note: str | None = "no answer could be read: the answer of the expert worth most is taken"
            return self._account(winner, heard, posterior_O, counts_A, note)
        seed = request.metadata.get("route_seed", request.params.seed)
        rounded = {o: round(float(posterior_O[o]), 9) for o in said}
        best = max(said, key=lambda o: (rounded[o], lot(seed, heard.options[o])))
        tied = sum(rounded[o] == rounded[best] for o in said)
        votes = [(-counts_A[i], a.place, a) for i, a in enumerate(heard.answers) if a.vote == best]
        note = f"{tied} options tied; decided by seed" if tied > 1 else None
        return self._account(min(votes, key=lambda v: v[:2])[2], heard, posterior_O, counts_A, note)

    async def settled(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion], pending: Sequence[str]
    ) -> bool:
        """Whether the likeliest option that was chosen so far is likely enough, or the next experts are not expected to
        change it."""
        if not pending or not completions:
            return not pending
        heard = self._hear(request, completions)
        logit, ballots = self._prepare(request, heard)
        usual_QE = self._fitted.stack.logit.usual(ballots.tasks_Q)
        due = [self._columns.get(expert_id, self._weakest()) for expert_id in pending[:AHEAD]]
        _, sure_Q = decide(logit, ballots)
        return bool(self._stop.is_enough(sure_Q, expected_gain(logit, ballots, usual_QE[:, due]))[0])

    def _hear(self, request: Request, completions: Sequence[Completion]) -> "_Heard":
        """In an order that does not depend on who came first."""
        asked = read_request(request)
        ordered = sorted(completions, key=lambda c: (c.expert_id, c.index, c.text or ""))
        answers = settle_percents([self._extract(c.text or "", asked) for c in ordered])
        options = asked.options or tuple(dict.fromkeys(sorted(a for a in answers if a is not None)))
        return _Heard(
            asked=asked,
            stem=read_stem(request.question),
            options=options,
            answers=tuple(
                _Answer(
                    completion=c,
                    place=(c.expert_id, c.index, c.text or ""),
                    column=self._columns.get(c.expert_id, self._weakest()),
                    known=c.expert_id in self._columns,
                    vote=-1 if a is None else _vote(a, asked, options),
                )
                for c, a in zip(ordered, answers, strict=True)
            ),
        )

    def _weigh(self, request: Request, heard: "_Heard") -> tuple[Array, Array]:
        """The posterior by option, the last being none of those of an open question; what each answer counted for."""
        logit, ballots = self._prepare(request, heard)
        counts = logit.counts(ballots)[0] * logit.strength(ballots)[0]
        return logit.posterior(ballots)[0], counts

    def _prepare(self, request: Request, heard: "_Heard") -> tuple[Logit, Ballots]:
        """Of those who answered, a column an answer."""
        stack = self._fitted.stack
        columns = [a.column for a in heard.answers]
        task = request.metadata.get("task")
        panel = _Panel(stack, columns)
        ballots = _ballots(heard, self._fitted.tasks.index(task) if task in self._fitted.tasks else -1)
        listed = heard.options if heard.asked.options else ()
        prior_QO = self._prior(heard.stem, listed) if listed else ballots.prior_QO
        return panel.stack.logit, panel.stack.prepare_with(prior_QO, ballots)

    def _think(self, stem: str, listed: tuple[str, ...]) -> Array:
        """(1, O) of the prior: what the options give away."""
        is_open = np.array([[*[True] * len(listed), False]])
        return prior_of(self._fitted.stack.prior, is_open, np.array([True]), _options(stem, listed))

    def _worth(self) -> Array:
        return self._fitted.stack.logit.worth_E

    def _weakest(self) -> int:
        return int(self._worth().argmin())

    def _account(
        self, winner: "_Answer", heard: "_Heard", posterior_O: Array, counts_A: Array, note: str | None
    ) -> Completion:
        strangers = sorted({a.completion.expert_id for a in heard.answers if not a.known})
        if strangers:
            unknown = f"the stack never saw {', '.join(strangers)}: taken for the weakest expert it knows"
            note = unknown if note is None else f"{note}; {unknown}"
        labels = [_label(option, place, heard.asked) for place, option in enumerate(heard.options)]
        posterior = {label: round(float(p), 6) for label, p in zip(labels, posterior_O, strict=False)}
        if not heard.asked.options:
            posterior["(none of these)"] = round(float(posterior_O[-1]), 6)
        trace: JSON = {
            "answers": [
                {
                    "expert_id": a.completion.expert_id,
                    "extracted": labels[a.vote] if a.vote >= 0 else None,
                    "weight": round(float(counts_A[i]), 6) if a.vote >= 0 else 0.0,
                }
                for i, a in enumerate(heard.answers)
            ],
            "posterior": posterior,
            "threshold": self._stop.threshold,
            "least_gain": self._stop.least_gain,
            "winner": labels[winner.vote] if winner.vote >= 0 else None,
        }
        return replace(winner.completion, trace=trace if note is None else {**trace, "note": note})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    completion: Completion
    place: tuple[str, int, str]
    column: int
    known: bool
    vote: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heard:
    """``stem``: the question less its options, as recorded ones are."""

    asked: Asked
    stem: str
    options: tuple[str, ...]
    answers: tuple[_Answer, ...]


class _Panel:
    """The stack cut down to those who answered, one column an answer: an expert may answer twice."""

    def __init__(self, stack: Stack, columns: Sequence[int]) -> None:
        logit = stack.logit
        self.stack = replace(
            stack,
            logit=replace(logit, worth_E=logit.worth_E[columns], in_task_CE=logit.in_task_CE[:, columns]),
            word_mean_EW=stack.word_mean_EW[columns],
        )


def _options(stem: str, listed: Sequence[str]) -> Options:
    width = len(listed) + 1
    traits = np.zeros((1, width, len(TRAITS)), np.float32)
    traits[0, :-1] = option_traits(listed, stem)
    return Options(traits_QOT=traits, grams=Grams.of([listed], width), asked=Grams.of_questions([stem]))


def _ballots(heard: _Heard, task: int) -> Ballots:
    answers, options = heard.answers, len(heard.options)
    listed = bool(heard.asked.options)
    words = np.zeros((1, len(answers), len(WORDS)), np.float32)
    for column, answer in enumerate(answers):
        choice = heard.options[answer.vote] if answer.vote >= 0 else None
        others = tuple(o for i, o in enumerate(heard.options) if i != answer.vote) if listed else ()
        words[0, column] = answer_words(answer.completion.text or "", heard.stem, choice, others)
    is_open = np.ones((1, options + 1), np.bool_)
    is_open[0, -1] = not listed
    return Ballots(
        votes_QE=np.array([[a.vote for a in answers]]),
        asked_QE=np.ones((1, len(answers)), np.bool_),
        words_QEW=words,
        open_QO=is_open,
        prior_QO=np.zeros(is_open.shape, np.float32),
        tasks_Q=np.array([task]),
        listed_Q=np.array([listed]),
    )


def _vote(answer: str, asked: Asked, options: Sequence[str]) -> int:
    return letter_place(answer, options) if asked.options else options.index(answer)


def _label(option: str, place: int, asked: Asked) -> str:
    return chr(ord("A") + place) if asked.options else option[:_SHOWN]
