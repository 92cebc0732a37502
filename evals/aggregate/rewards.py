"""Rewards on recorded answers: who tells the better of two, who picks best of n, and whom an attack fools.

    COLLEGIUM_POOLS=DIR python -m evals.aggregate.rewards --preferences DIR

Everything is fitted on train splits. Preferences have no split of their own: samples.py draws one by prompt.
Legend: K pairs, P prompts, N answers, E experts.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import orjson
import typer

from evals.aggregate.attacked import attack_rates
from evals.aggregate.fitted import Contestant, fit_contestants
from evals.routing.statistics import Bootstrap, Estimate
from experts.models import cache_dir
from orchestrator.aggregators.reward_moe.build import ATTACKED, SIZES, SPLIT_SEED, preference_files
from orchestrator.aggregators.reward_moe.corpus import Corpus, make_corpus
from orchestrator.aggregators.reward_moe.samples import (
    Drawn,
    Sample,
    draw_panels,
    pool_samples,
    preference_samples,
    read_answers,
    read_preferences,
    read_questions,
)
from orchestrator.build import make_encoder
from routers.records import Array, Records, read_records

PANEL = 5
"""Answers in a panel that pairs are taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One source's held-out samples as arrays."""

    name: str
    samples: Sequence[Sample]
    corpus: Corpus

    def accuracy(self, scores_N: Array) -> Array:
        """For each prompt with a pair: the share of its pairs that ``scores_N`` gets right, a tie half."""
        pairs_K2 = self.corpus.pairs_K2
        gap_K = scores_N[pairs_K2[:, 0]] - scores_N[pairs_K2[:, 1]]
        right_K = (gap_K > 0) + 0.5 * (gap_K == 0)
        _, codes_K = np.unique(self.corpus.inputs.prompt_N[pairs_K2[:, 0]], return_inverse=True)
        found: Array = np.bincount(codes_K, right_K) / np.bincount(codes_K)
        return found


def main(
    pools: Annotated[Path, typer.Option(envvar="COLLEGIUM_POOLS", help="Folder of recorded pools.")],
    preferences: Annotated[
        Path | None, typer.Option(help="Folder of preferences; beside the pools by default.")
    ] = None,
    pool: Annotated[str, typer.Option(help="The pool that has texts.")] = "mmlu-pro",
    encoder: Annotated[str, typer.Option(help="wordllama, or the service's encoder.")] = "wordllama",
    questions: Annotated[int, typer.Option(help="Questions of the train split to learn from, drawn by seed.")] = 4000,
    seed: Annotated[int, typer.Option(help="Panels, attacks, starting points.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A file for the figures, as JSON.")] = None,
) -> None:
    """Pairwise accuracy, best-of-n and attacks for each reward."""
    figures = asyncio.run(_measure(pools, preferences or pools.parent / "preferences", pool, encoder, questions, seed))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))


async def _measure(
    pools: Path, preferences: Path, pool: str, encoder_name: str, questions: int, seed: int
) -> Mapping[str, object]:
    folder, encoder, cache = pools / pool, make_encoder(encoder_name, 1), cache_dir() / "embeddings"
    records = read_records(folder)
    panels = _panels(records, pools.parent / "subsets.json", seed)
    rows = np.random.default_rng(seed).permutation(records.rows("train"))[:questions]
    drawn = draw_panels(records, rows, sizes=SIZES, seed=seed)
    answers = read_answers(folder, records, [*drawn, *(d for _, own in panels for d in own)])
    asked, train = read_questions(folder), _preferences(preferences, "train", seed)
    graded = pool_samples(records, asked, answers, drawn, attacked=ATTACKED, seed=seed)
    fitted = await fit_contestants([*graded, *(s for own in train.values() for s in own)], encoder, cache, seed)
    print(f"fitted on {len(fitted.train.inputs)} answers, {len(fitted.train.pairs_K2)} pairs\n", flush=True)
    samples = {name: pool_samples(records, asked, answers, own, attacked=0, seed=seed) for name, own in panels}
    tested = {}
    for name, own in {**samples, **_preferences(preferences, "test", seed)}.items():
        objectives, scaling = fitted.train.objectives, fitted.train.scaling
        corpus = await make_corpus(own, encoder, cache, objectives=objectives, scaling=scaling)
        tested[name] = HeldOut(name=name, samples=own, corpus=corpus)
    best_of = {name: t for name, t in tested.items() if name.startswith("best of ")}
    paired = {name: t for name, t in tested.items() if name not in best_of}
    figures: dict[str, object] = {"pairs": _pair_table(paired, fitted.contestants, seed)}
    figures["best_of"] = {name: _best_of(t, fitted.contestants, seed) for name, t in best_of.items()}
    figures["attacks"] = await attack_rates(paired, fitted, encoder, cache, seed)
    figures["ms_per_answer"] = _speed(paired[records.name], fitted.contestants)
    return figures


def _preferences(folder: Path, split: str, seed: int) -> dict[str, list[Sample]]:
    attacked = ATTACKED if split == "train" else 0.0
    found = {}
    for path in preference_files(folder):
        name = path.name.removesuffix(".jsonl.gz")
        found[name] = preference_samples(
            read_preferences(path), name, split, attacked=attacked, seed=seed, split_seed=SPLIT_SEED
        )
    return found


def _panels(records: Records, subsets: Path, seed: int) -> list[tuple[str, list[Drawn]]]:
    """Random panels for pairs; for each named subset the experts that are best on train, for best-of-n."""
    test = records.rows("test")
    found = [(records.name, draw_panels(records, test, sizes=(PANEL,), seed=seed))]
    listed = orjson.loads(subsets.read_bytes()).get(records.name, {}) if subsets.is_file() else {}
    means_E = records.scores_QE[records.rows("train")].mean(axis=0)
    for name, expert_ids in (listed or {"all": records.expert_ids}).items():
        own = sorted((records.expert_ids.index(e) for e in expert_ids), key=lambda e: -means_E[e])
        for n in (3, 5):
            top = own[:n]
            drawn = [Drawn(question=int(q), experts=tuple(e for e in top if records.answered_QE[q, e])) for q in test]
            found.append((f"best of {n}, {name}", [d for d in drawn if d.experts]))
    return found


def _pair_table(
    tested: Mapping[str, HeldOut], contestants: Sequence[Contestant], seed: int
) -> Mapping[str, Mapping[str, object]]:
    """By source, and "mean": sources count the same in it. Differences are paired, to the ArmoRM gate."""
    rights = {c.name: {n: t.accuracy(c.score(t.corpus.inputs)) for n, t in tested.items()} for c in contestants}
    boots = {n: Bootstrap(len(next(iter(rights.values()))[n]), seed) for n in tested}
    objectives = [c.name for c in contestants if c.objective]
    means = {o: float(np.mean([rights[o][n].mean() for n in tested])) for o in objectives}
    best = max(means, key=means.__getitem__)
    shown = [c.name for c in contestants if not c.objective] + [best]
    print(f"Pairwise accuracy, ci95; {', '.join(f'{n}: {len(rights[best][n])} prompts' for n in tested)}")
    table: dict[str, Mapping[str, object]] = {}
    for name in shown:
        row = {n: boots[n].mean(rights[name][n]) for n in tested}
        gaps = {n: boots[n].difference(rights["armorm"][n], rights[name][n]) for n in tested}
        row["mean"], gaps["mean"] = _mean(row), _mean(gaps)
        label = f"best single objective ({name})" if name == best else name
        print(f"  {label:48s}" + "  ".join(f"{n} {_percent(e)}" for n, e in row.items()))
        print(f"  {'  armorm minus it':48s}" + "  ".join(f"{n} {_percent(e)}" for n, e in gaps.items()), flush=True)
        table[label] = {n: {"value": e.value, "ci95": e.ci95, "armorm_minus_it": gaps[n].ci95} for n, e in row.items()}
    print("  objectives alone: " + ", ".join(f"{o} {100 * m:.1f}" for o, m in means.items()) + "\n")
    return table


def _mean(estimates: Mapping[str, Estimate]) -> Estimate:
    """Of independent sources: the half-widths add up as squares."""
    value = float(np.mean([e.value for e in estimates.values()]))
    half = float(np.sqrt(sum(((e.high - e.low) / 2) ** 2 for e in estimates.values()))) / len(estimates)
    return Estimate(value=value, low=value - half, high=value + half)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:5.1f} [{100 * estimate.low:5.1f}, {100 * estimate.high:5.1f}]"


def _best_of(tested: HeldOut, contestants: Sequence[Contestant], seed: int) -> Mapping[str, object]:
    prompt_N = tested.corpus.inputs.prompt_N
    starts = np.flatnonzero(np.diff(prompt_N, prepend=-1))
    graded_N = np.array([labels["correct"] for sample in tested.samples for labels in sample.labels])
    boot = Bootstrap(len(starts), seed)
    first = graded_N[starts]
    rows = {"best single": first, "oracle": np.maximum.reduceat(graded_N, starts), "vote": _vote(tested)}
    for contestant in [c for c in contestants if not c.objective]:
        scores_N = contestant.score(tested.corpus.inputs)
        ends = np.append(starts[1:], len(scores_N))
        picks = np.array([s + int(scores_N[s:e].argmax()) for s, e in zip(starts, ends, strict=True)])
        rows[contestant.name] = graded_N[picks]
    print(f"{tested.name}: accuracy, and the paired difference to the best single expert")
    for name, scores in rows.items():
        print(f"  {name:20s} {_percent(boot.mean(scores))}   {_percent(boot.difference(scores, first))}", flush=True)
    return {name: {"value": float(s.mean()), "ci95": boot.mean(s).ci95} for name, s in rows.items()}


def _vote(tested: HeldOut) -> Array:
    """Plain majority of what the answers settle on; ties and nothing readable go to the better expert on train."""
    picked = []
    for sample in tested.samples:
        choices = sample.panel.choices
        best = max(range(len(choices)), key=lambda i: (choices[i] is not None and choices.count(choices[i]), -i))
        picked.append(sample.labels[best]["correct"])
    return np.array(picked)


def _speed(tested: HeldOut, contestants: Sequence[Contestant], panels: int = 200) -> Mapping[str, float]:
    """From embeddings that are known, surface features included: the least of five runs over panels, one at a time."""
    from orchestrator.aggregators.reward_moe.inputs import raw_features

    inputs, scaling = tested.corpus.inputs, tested.corpus.scaling
    vectors_NW = inputs.features_ND[:, : inputs.prompts_PW.shape[1]] / 4
    starts = np.flatnonzero(np.diff(inputs.prompt_N, prepend=-1))[: panels + 1]
    found = {}
    for contestant in [c for c in contestants if not c.objective]:
        runs = []
        for _ in range(5):
            started = time.perf_counter()
            for place, (start, end) in enumerate(pairwise(starts)):
                raw = raw_features(tested.samples[place].panel, vectors_NW[start:end])
                prompt = inputs.prompts_PW[place : place + 1]
                contestant.score(scaling.inputs(raw, vectors_NW[start:end], prompt, np.zeros(end - start, np.int64)))
            runs.append((time.perf_counter() - started) * 1e3 / float(starts[-1]))
        found[contestant.name] = min(runs)
    print("ms an answer, one core, embeddings given: " + ", ".join(f"{n} {ms:.2f}" for n, ms in found.items()))
    return found


if __name__ == "__main__":
    typer.run(main)
