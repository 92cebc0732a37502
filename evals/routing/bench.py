"""The whole evaluation: fit each router on train, ask it about test, compare question by question."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evals.routing.baselines import Baseline, baselines
from evals.routing.calibration import Calibration, calibrate
from evals.routing.curves import PairCurve, cost_curve, pair_curve
from evals.routing.setting import Setting
from evals.routing.statistics import Bootstrap, Estimate
from evals.routing.votes import Combiner, Outcome, aggregator_for, ask
from routers.encoders import Encoder
from routers.learned import MODELS, PROBABILITIES
from routers.learned.artefact import model_class
from routers.learned.base import Model
from routers.learned.threshold import cheapest_but
from routers.questions import Questions
from routers.records import Array

TIMED = 200
"""Questions that decisions are timed with, one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted router and what it predicts for the test split."""

    router: str
    model: Model
    predicted: Array
    curve: list[tuple[float, float]]
    pair: PairCurve | None
    calibration: Calibration | None
    fit_s: float
    decide_ms: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A router with one policy. ``difference`` is paired, to the best single expert on train."""

    fit: Fit
    aggregator: str
    top_k: int
    outcome: Outcome
    score: Estimate
    difference: Estimate
    gap_closed: float | None

    @property
    def label(self) -> str:
        return self.fit.router if self.top_k == 1 else f"{self.fit.router}, {self.top_k} calls"

    @property
    def helps(self) -> bool:
        """The difference to the best single expert is above 0 with 97.5 % confidence."""
        return self.difference.low > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    setting: Setting
    baselines: Mapping[str, Baseline]
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    results: Sequence[Result]

    @property
    def fits(self) -> list[Fit]:
        """Each router once."""
        return list({result.fit.router: result.fit for result in self.results}.values())


async def evaluate(
    setting: Setting,
    routers: Sequence[str],
    *,
    top_ks: Sequence[int],
    aggregator: str,
    combiner: Combiner | None = None,
    on_router: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Each router is fitted once, whatever is asked of it: ``top_ks`` is policy. ``aggregator`` is for more than one;
    a ``combiner`` takes its place where there is one.

    Raises ConfigError for a router or an aggregator that does not exist or cannot be used with this pool.
    """
    makers = [(name, model_class(name)) for name in routers]
    if max(top_ks) > 1 and combiner is None:
        aggregator_for(aggregator, setting)
    bootstrap = Bootstrap(len(setting.test), setting.seed)
    found = await baselines(setting, max(top_ks))
    results = []
    for name, maker in makers:
        on_router(name)
        fitted = _fit(name, maker, setting)
        for top_k in top_ks:
            own = aggregator if top_k > 1 else "first"
            if combiner is not None and top_k > 1:
                outcome = await combiner.ask(fitted.predicted, top_k)
            else:
                outcome = await ask(fitted.predicted, setting, aggregator_for(own, setting), top_k)
            results.append(_result(fitted, outcome, own, top_k, found, bootstrap))
    best = found["best_single"].outcome.scores
    return Evaluation(
        setting=setting,
        baselines=found,
        estimates={name: bootstrap.mean(b.outcome.scores) for name, b in found.items()},
        differences={name: bootstrap.difference(b.outcome.scores, best) for name, b in found.items()},
        results=results,
    )


def _fit(name: str, maker: type[Model], setting: Setting) -> Fit:
    started = time.perf_counter()
    model = maker.fit(setting.training)
    fit_s = time.perf_counter() - started
    predicted = model.predict(setting.asked)
    return Fit(
        router=name,
        model=model,
        predicted=predicted,
        curve=cost_curve(predicted, setting.scores_QE, setting.cost_QE[setting.test], setting.costs_E),
        pair=_pair(predicted, setting),
        calibration=calibrate(predicted, setting.scores_QE) if name in PROBABILITIES else None,
        fit_s=fit_s,
        decide_ms=decide_times_ms(model, setting.asked),
    )


def _result(
    fit: Fit, outcome: Outcome, aggregator: str, top_k: int, found: Mapping[str, Baseline], bootstrap: Bootstrap
) -> Result:
    best, oracle = found["best_single"].outcome.scores, found["oracle"].outcome.scores
    room = float(oracle.mean() - best.mean())
    difference = bootstrap.difference(outcome.scores, best)
    return Result(
        fit=fit,
        aggregator=aggregator,
        top_k=top_k,
        outcome=outcome,
        score=bootstrap.mean(outcome.scores),
        difference=difference,
        gap_closed=difference.value / room if room > 0 else None,
    )


def _pair(predicted: Array, setting: Setting) -> PairCurve | None:
    if predicted.shape[1] < 2:
        return None
    mean = setting.records.scores_QE[setting.train].mean(axis=0)
    strong = int(mean.argmax())
    return pair_curve(predicted, setting.scores_QE, strong, cheapest_but(strong, setting.costs_E, mean))


def decide_times_ms(model: Model, questions: Questions) -> Array:
    """One question at a time, embedding given."""
    times = []
    for row in range(min(TIMED, len(questions))):
        one = questions.take(np.array([row]))
        started = time.perf_counter()
        model.predict(one)
        times.append((time.perf_counter() - started) * 1e3)
    return np.array(times)


async def encode_times_ms(encoder: Encoder, setting: Setting, count: int = 40) -> Array:
    """One question at a time; the encoder remembers one text only."""
    times = []
    await encoder.encode(["the first text loads the model"])
    for question in setting.test[:count]:
        started = time.perf_counter()
        await encoder.encode([setting.records.texts[int(question)]])
        times.append((time.perf_counter() - started) * 1e3)
    return np.array(times)


def all_routers() -> list[str]:
    return list(MODELS)
