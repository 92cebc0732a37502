"""Where rewards learn from: recorded pools, whose answers have grades, and pairs that people compared.

A sample is one prompt with several answers, what is known of each (labels by objective, most of them missing), and
which beats which. Everything is drawn with a seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experts.errors import ConfigError
from experts.pools import RecordedAnswer, RecordedPool, read_rows
from orchestrator.aggregators.reward_moe import attacks
from orchestrator.aggregators.reward_moe.features import read_choice
from orchestrator.aggregators.reward_moe.inputs import Panel, make_panel
from routers.records import Array, Records

Labels = Mapping[str, float]

ANSWERED, VERBOSITY = "readable", "verbosity"
_MAX_PAIRS = 4
_ATTACK_PAIRS = 2
"""Of one sample: else half of all pairs would teach nothing but what an attack looks like."""
_TEXTS = ("prompt", "response_a", "response_b")
_SHARES = (("train", 0.6), ("val", 0.7), ("test", 1.0))
"""Of preference prompts: 60 % to learn from, 10 % to choose with, 30 % to measure on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """``labels`` of each answer, ``pairs`` of places in the panel, winner first.

    ``source`` is the pool's name or the preferences' file, ``category`` what the outer route of a DMoERM learns to
    tell. ``attacked`` says that the last answer is no real one.
    """

    panel: Panel
    source: str
    category: str
    labels: tuple[Labels, ...]
    pairs: tuple[tuple[int, int], ...]
    attacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Which experts' answers to a question make up a panel: numbers of the question and of its experts."""

    question: int
    experts: tuple[int, ...]


def draw_panels(
    records: Records, rows: Sequence[int] | Array, *, sizes: Sequence[int], seed: int, repeats: int = 1
) -> list[Drawn]:
    """For each question ``repeats`` panels of a size drawn from ``sizes``, of experts that answered it."""
    rng = np.random.default_rng(seed)
    drawn = []
    for question in rows:
        present = np.flatnonzero(records.answered_QE[question])
        for _ in range(repeats if len(present) > 1 else 0):
            size = min(int(rng.choice(list(sizes))), len(present))
            experts = rng.choice(present, size, replace=False)
            drawn.append(Drawn(question=int(question), experts=tuple(int(e) for e in experts)))
    return drawn


def read_questions(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """The wording and the options of a pool's questions, in the pool's order. Raises ConfigError."""
    return [
        (str(row.get("question") or ""), tuple(str(option) for option in row.get("options") or ()))
        for _, row in read_rows(folder / "questions.jsonl.gz")
    ]


def read_answers(
    folder: Path, records: Records, drawn: Sequence[Drawn], *, on_expert: Callable[[int], None] = lambda _: None
) -> dict[tuple[int, int], RecordedAnswer]:
    """The answers that ``drawn`` needs, by question and expert. Raises ConfigError where a pool kept no texts."""
    wanted: dict[int, set[int]] = {}
    for panel in drawn:
        for expert in panel.experts:
            wanted.setdefault(expert, set()).add(panel.question)
    pool, found = RecordedPool(folder), {}
    for expert, expert_id in enumerate(records.expert_ids):
        needed = wanted.get(expert, set())
        for question, answer in pool.read(expert_id) if needed else ():
            if question in needed:
                found[question, expert] = answer
        on_expert(1)
    if found and all(not answer.text for answer in found.values()):
        raise ConfigError(f"Pool '{records.name}' has no texts of answers; a reward reads texts. Record one that has.")
    return found


def written(question: str, options: Sequence[str]) -> str:
    """A question as the service is asked it: its options lettered below it."""
    return "\n".join([question, *(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))])


def pool_samples(
    records: Records,
    questions: Sequence[tuple[str, tuple[str, ...]]],
    answers: Mapping[tuple[int, int], RecordedAnswer],
    drawn: Sequence[Drawn],
    *,
    attacked: float,
    seed: int,
) -> list[Sample]:
    """Graded panels; a share ``attacked`` of them holds an attack, which loses to every real answer."""
    rng = np.random.default_rng(seed)
    return [
        _graded(records, questions[panel.question], answers, panel, rng, attacked=rng.random() < attacked)
        for panel in drawn
    ]


def _graded(
    records: Records,
    asked: tuple[str, tuple[str, ...]],
    answers: Mapping[tuple[int, int], RecordedAnswer],
    drawn: Drawn,
    rng: np.random.Generator,
    *,
    attacked: bool,
) -> Sample:
    question, options = asked
    found = [answers[drawn.question, expert] for expert in drawn.experts]
    task = records.tasks[drawn.question]
    scores = records.scores_QE[drawn.question, list(drawn.experts)]
    labels: list[Labels] = [
        {
            "correct": float(score),
            "agreement": _share(records, drawn.question, expert),
            ANSWERED: float(answer.answer is not None),
            VERBOSITY: _verbosity(answer.text or ""),
        }
        for expert, answer, score in zip(drawn.experts, found, scores, strict=True)
    ]
    pairs = _pairs(scores, rng)
    texts, choices = [answer.text or "" for answer in found], [answer.answer for answer in found]
    if attacked:
        # As the service would see it: its options are in what is copied, and a choice is read out of it if it can be.
        text = _attack(written(question, options), rng)
        texts, choices = [*texts, text], [*choices, read_choice(text, options)]
        labels.append({**dict.fromkeys(labels[0], 0.0), VERBOSITY: _verbosity(text)})
        winners = rng.permutation(len(found))[:_ATTACK_PAIRS]
        pairs += [(int(winner), len(found)) for winner in winners]
    return Sample(
        panel=make_panel(written(question, options), options, texts, choices),
        source=records.name,
        category=task,
        labels=tuple(labels),
        pairs=tuple(pairs),
        attacked=attacked,
    )


def _attack(question: str, rng: np.random.Generator) -> str:
    kind = attacks.KINDS[int(rng.integers(len(attacks.KINDS)))]
    return attacks.attack(kind, question, attacks.TRAIN, rng)


def _share(records: Records, question: int, expert: int) -> float:
    """The share of all other experts that gave the same answer."""
    own, row = records.answers_QE[question, expert], records.answers_QE[question]
    others = records.answered_QE[question].sum() - 1
    return float((row == own).sum() - 1) / float(others) if own >= 0 and others > 0 else 0.0


def _verbosity(text: str) -> float:
    return min(float(np.log1p(len(text.split()))) / 8, 1.0)


def _pairs(scores: Array, rng: np.random.Generator) -> list[tuple[int, int]]:
    right, wrong = np.flatnonzero(scores > 0.5), np.flatnonzero(scores <= 0.5)
    pairs = [(int(r), int(w)) for r, w in product(right, wrong)]
    if len(pairs) <= _MAX_PAIRS:
        return pairs
    return [pairs[i] for i in rng.choice(len(pairs), _MAX_PAIRS, replace=False)]


def read_preferences(path: Path) -> list[Mapping[str, Any]]:
    """Rows of prompt, response_a, response_b and label (a, b or tie). Raises ConfigError naming file and row."""
    rows: list[Mapping[str, Any]] = []
    for place, row in read_rows(path):
        for key in _TEXTS:
            if not isinstance(row.get(key), str | bool | int | float):
                raise ConfigError(f"{place}: '{key}' is a text, got {row.get(key)!r}.")
        if row.get("label") not in ("a", "b", "tie"):
            raise ConfigError(f"{place}: 'label' is a, b or tie, got {row.get('label')!r}.")
        # PandaLM has answers like "True" that became JSON's true on their way.
        rows.append({**row, **{key: str(row[key]) for key in _TEXTS}})
    return rows


def split_of(prompt: str, seed: int) -> str:
    """train, val or test, by the prompt's hash: pairs that share a prompt share a split, whatever else is in the
    file."""
    place = int.from_bytes(blake2b(f"{seed}\0{prompt}".encode(errors="replace"), digest_size=6).digest()) / 2**48
    return next(split for split, below in _SHARES if place < below)


def preference_samples(
    rows: Sequence[Mapping[str, Any]], name: str, split: str, *, attacked: float, seed: int, split_seed: int
) -> list[Sample]:
    """``name`` is the category and the objective. A tie teaches the objective only, both answers half."""
    rng = np.random.default_rng(seed)
    own = [row for row in rows if split_of(row["prompt"], split_seed) == split]
    return [_compared(row, name, rng, attacked=rng.random() < attacked) for row in own]


def _compared(row: Mapping[str, Any], name: str, rng: np.random.Generator, *, attacked: bool) -> Sample:
    texts = [row["response_a"], row["response_b"]]
    won = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5)}[row["label"]]
    labels: list[Labels] = [{f"preferred:{name}": w, VERBOSITY: _verbosity(t)} for w, t in zip(won, texts, strict=True)]
    pairs = [] if row["label"] == "tie" else [(0, 1) if row["label"] == "a" else (1, 0)]
    if attacked:
        text = _attack(row["prompt"], rng)
        texts.append(text)
        labels.append({f"preferred:{name}": 0.0, VERBOSITY: _verbosity(text)})
        pairs += [(0, 2), (1, 2)]
    return Sample(
        panel=make_panel(row["prompt"], (), texts),
        source=name,
        category=name,
        labels=tuple(labels),
        pairs=tuple(pairs),
        attacked=attacked,
    )
