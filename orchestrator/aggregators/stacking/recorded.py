"""A recorded pool as ballots: what the stack is fitted on and measured with.

Legend: Q questions, E experts, O options, T traits, W words.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np

from experts.errors import ConfigError
from experts.pools import RecordedPool, read_rows
from orchestrator.aggregators.extract import value
from orchestrator.aggregators.stacking.families import families
from orchestrator.aggregators.stacking.grams import Grams, Options
from orchestrator.aggregators.stacking.model import Ballots
from orchestrator.aggregators.stacking.options import TRAITS, option_traits
from orchestrator.aggregators.stacking.words import WORDS, answer_words
from routers.records import Array, Records, read_records

_FORMAT = 5
"""Of the cached features; another one is read anew."""
_WORDED = ("grams", "asked")
MAX_OPTIONS = 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """``ballots`` have no prior yet and words as they were counted; ``gold_Q`` is the last column where the right
    answer is none of the options, -1 where it is not known. ``family_Q``: which questions are one asked twice."""

    records: Records
    ballots: Ballots
    options: Options
    gold_Q: Array
    family_Q: Array
    tasks: tuple[str, ...]

    def only(self, expert_ids: Sequence[str]) -> Self:
        """The same questions with these experts. Raises ConfigError for unknown ones."""
        records = self.records.only(expert_ids)
        columns = [self.records.expert_ids.index(e) for e in expert_ids]
        ballots = replace(
            self.ballots,
            **{name: getattr(self.ballots, name)[:, columns] for name in ("votes_QE", "asked_QE", "words_QEW")},
        )
        return replace(self, records=records, ballots=ballots)


def read_recorded(
    folder: Path,
    expert_ids: Sequence[str] | None = None,
    *,
    cache: Path | None = None,
    on_expert: Callable[[str], None] = lambda _: None,
) -> Recorded:
    """Raises ConfigError. Texts are read once and their features kept in ``cache``."""
    records = read_records(folder, expert_ids)
    questions = [row for _, row in read_rows(folder / "questions.jsonl.gz")]
    arrays = _cached(records, questions, folder, cache, on_expert)
    tasks = tuple(sorted(set(records.tasks)))
    places = {task: number for number, task in enumerate(tasks)}
    ballots = Ballots(
        votes_QE=arrays["votes_QE"].astype(np.int64),
        asked_QE=records.answered_QE,
        words_QEW=arrays["words_QEW"],
        open_QO=arrays["open_QO"],
        prior_QO=np.zeros(arrays["open_QO"].shape, np.float32),
        tasks_Q=np.array([places[task] for task in records.tasks]),
        listed_Q=arrays["listed_Q"],
    )
    return Recorded(
        records=records,
        ballots=ballots,
        options=Options(
            traits_QOT=arrays["traits_QOT"],
            **{part: Grams(**{f.name: arrays[f"{part}.{f.name}"] for f in fields(Grams)}) for part in _WORDED},
        ),
        gold_Q=arrays["gold_Q"],
        family_Q=arrays["family_Q"],
        tasks=tasks,
    )


def _kind() -> str:
    """Of cached features: changes with what is counted."""
    return blake2b(repr((_FORMAT, TRAITS, WORDS)).encode(), digest_size=6).hexdigest()


def _cached(
    records: Records,
    questions: Sequence[Mapping[str, Any]],
    folder: Path,
    cache: Path | None,
    on_expert: Callable[[str], None],
) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    path = None if cache is None else cache / f"stack-{_kind()}-{records.digest[:24]}.safetensors"
    if path is not None and path.is_file():
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            path.unlink(missing_ok=True)
    arrays = _read(records, questions, folder, on_expert)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, draft)
        draft.replace(path)
    return arrays


def _read(
    records: Records, questions: Sequence[Mapping[str, Any]], folder: Path, on_expert: Callable[[str], None]
) -> dict[str, Array]:
    lists = [tuple(row.get("options") or ())[:MAX_OPTIONS] for row in questions]
    listed = np.array([bool(options) for options in lists])
    said = [dict[str, int]() for _ in questions]
    votes = np.full(records.scores_QE.shape, -1, np.int16)
    words = np.zeros((*records.scores_QE.shape, len(WORDS)), np.float32)
    pool = RecordedPool(folder)
    for column, expert_id in enumerate(records.expert_ids):
        on_expert(expert_id)
        for row, answer in pool.read(expert_id):
            votes[row, column] = vote = _place(answer.answer, lists[row], said[row])
            options = lists[row] or tuple(said[row])
            choice = options[vote] if vote >= 0 else None
            others = tuple(o for place, o in enumerate(lists[row]) if place != vote)
            asked = str(questions[row].get("question") or "")
            words[row, column] = answer_words(answer.text or "", asked, choice, others)
    width = max(max(len(options or own) for options, own in zip(lists, said, strict=True)), 1) + 1
    is_open = np.arange(width) < np.array([len(o or s) for o, s in zip(lists, said, strict=True)])[:, None]
    is_open[:, -1] |= ~listed
    traits = np.zeros((len(lists), width, len(TRAITS)), np.float32)
    for row, options in enumerate(lists):
        if options:
            traits[row, : len(options)] = option_traits(options, str(questions[row].get("question") or ""))
    gold = np.array([_gold(row, lists[i], votes[i], records.scores_QE[i], width) for i, row in enumerate(questions)])
    texts = [str(row.get("question") or "") for row in questions]
    worded = (Grams.of(lists, width), Grams.of_questions(texts))
    return {
        "votes_QE": votes,
        "words_QEW": words,
        "open_QO": is_open,
        "listed_Q": listed,
        "traits_QOT": traits,
        "gold_Q": gold,
        "family_Q": families(texts),
        **{
            f"{part}.{f.name}": getattr(grams, f.name)
            for part, grams in zip(_WORDED, worded, strict=True)
            for f in fields(grams)
        },
    }


def _place(answer: str | None, options: Sequence[str], said: dict[str, int]) -> int:
    """The number of the option that ``answer`` names; ``said`` gathers the answers to an open question."""
    if answer is None:
        return -1
    if options:
        return letter_place(answer, options)
    canonical = value(answer)
    return -1 if canonical is None else said.setdefault(canonical, len(said))


def letter_place(answer: str, options: Sequence[str]) -> int:
    """-1 where ``answer`` is neither the letter, in brackets or not, nor the wording of an option."""
    letter = answer.strip().strip("()").upper()
    if len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(options):
        return ord(letter) - ord("A")
    return options.index(answer) if answer in options else -1


def _gold(row: Mapping[str, Any], options: Sequence[str], votes_E: Array, scores_E: Array, width: int) -> int:
    if options:
        return letter_place(str(row.get("answer") or ""), options)
    right = votes_E[(votes_E >= 0) & (scores_E > 0.5)]
    return int(right[0]) if len(right) else width - 1


def usable(recorded: Recorded, rows: Array) -> Array:
    """``rows`` whose right answer is known. Raises ConfigError when none is left, and where nobody's answers can be
    read."""
    kept: Array = rows[recorded.gold_Q[rows] >= 0]
    if not len(kept):
        raise ConfigError(f"Pool '{recorded.records.name}': no question says which of its options is right.")
    if (recorded.ballots.votes_QE[kept] < 0).all():
        raise ConfigError(
            f"Pool '{recorded.records.name}': no row in responses/ has an 'answer' that can be read, and a stack "
            "weighs answers."
        )
    return kept


def rows_of(recorded: Recorded, splits: Sequence[str]) -> Array:
    """The questions of ``splits``; those that are empty add none. Raises ConfigError when there is no question."""
    records = recorded.records
    filled = [s for s in splits if len(records.splits.get(s, ()))]
    return np.concatenate([records.rows(s) for s in filled or splits])
