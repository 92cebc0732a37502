"""Recorded pools on disk: questions, and what several experts once answered to them.

    pool.json                         name, experts
    questions.jsonl.gz                id, question, options
    responses/<expert_id>.jsonl.gz    id, text, answer, score, completion_chars, usd

Reading checks every row; a ConfigError names the file and the row at fault. All of it blocks.
"""

import gzip
import math
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from experts.errors import ConfigError

_BLOCK = 16
"""Rows packed together: more of them pack tighter, fewer are found faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedAnswer:
    """``text`` as the expert wrote it, ``answer`` as it was parsed, ``score`` from 0 to 1. None: was not kept."""

    text: str | None
    answer: str | None
    score: float
    completion_chars: int | None
    usd: float | None


class RecordedAnswers:
    """One expert's answers, by the number of the question; kept packed, so that all experts of a large pool fit."""

    def __init__(self, blocks: Sequence[bytes], places: "array[int]") -> None:
        self._blocks = blocks
        self._places = places

    def get(self, question: int) -> RecordedAnswer | None:
        place = self._places[question]
        if place < 0:
            return None
        text, answer, score, chars, usd = orjson.loads(zlib.decompress(self._blocks[place // _BLOCK]))[place % _BLOCK]
        return RecordedAnswer(text=text, answer=answer, score=score, completion_chars=chars, usd=usd)


class RecordedPool:
    """A pool's experts, and an index of its questions without their texts. Answers are read one expert at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError."""
        self._folder = folder
        self.expert_ids = _read_experts(folder / "pool.json")
        self._ids: dict[str, int] = {}
        self._by_text: dict[bytes, list[int]] = {}
        self._options: dict[int, list[str]] = {}
        self._longest = 0
        self._index(folder / "questions.jsonl.gz")

    def by_id(self, question_id: str) -> int | None:
        return self._ids.get(question_id)

    def by_text(self, text: str) -> int | None:
        """The number of the longest question that ``text`` is or begins with; white space does not count.

        Where several questions read alike, the one is meant whose options follow in their order (the longest, if
        several do), else the first.
        """
        parts = text.split(None, self._longest)
        digest, numbers, read = _digest(), [], 0
        for i, word in enumerate(parts[: self._longest], 1):
            digest.update(word.encode(errors="replace") + b" ")
            if found := self._by_text.get(digest.digest()):
                numbers, read = found, i
        if len(numbers) < 2:
            return numbers[0] if numbers else None
        rest = _squeezed(" ".join(parts[read:]))
        fitting = [n for n in numbers if _follow(self._options[n], rest)]
        return max(fitting, key=lambda n: sum(map(len, self._options[n])), default=numbers[0])

    def answers(self, expert_id: str) -> RecordedAnswers:
        """Raises ConfigError."""
        places = array("i", [-1]) * len(self._ids)
        answers: list[tuple[object, ...]] = []
        blocks: list[bytes] = []
        for count, (question, answer) in enumerate(self.read(expert_id)):
            places[question] = count
            answers.append((answer.text, answer.answer, answer.score, answer.completion_chars, answer.usd))
            if len(answers) == _BLOCK:
                blocks.append(_packed(answers))
                answers = []
        return RecordedAnswers([*blocks, _packed(answers)], places)

    def read(self, expert_id: str) -> Iterator[tuple[int, RecordedAnswer]]:
        """One expert's answers in the file's order, each with the number of its question. Raises ConfigError."""
        if expert_id not in self.expert_ids:
            known = ", ".join(self.expert_ids)
            raise ConfigError(f"{self._folder / 'pool.json'} has no expert '{expert_id}'; known: {known}.")
        answered: set[int] = set()
        for place, row in read_rows(self._folder / "responses" / f"{expert_id}.jsonl.gz"):
            question_id = _text(row, "id", place)
            question = None if question_id is None else self._ids.get(question_id)
            if question is None or question in answered:
                raise ConfigError(f"{place}: question {question_id!r} is unknown, or was answered already.")
            answered.add(question)
            yield question, _answer(row, place)

    def _index(self, path: Path) -> None:
        options: dict[int, list[str]] = {}
        for place, row in read_rows(path):
            question_id, words = _text(row, "id", place), (_text(row, "question", place) or "").split()
            if not words:
                raise ConfigError(f"{place}: 'question' is missing or blank.")
            if question_id is None or question_id in self._ids:
                raise ConfigError(f"{place}: the id {question_id!r} is missing or was given already.")
            number = self._ids[question_id] = len(self._ids)
            digest = _digest()
            digest.update("".join(f"{word} " for word in words).encode(errors="replace"))
            self._by_text.setdefault(digest.digest(), []).append(number)
            options[number] = _read_options(row, place)
            self._longest = max(self._longest, len(words))
        alike = (n for numbers in self._by_text.values() if len(numbers) > 1 for n in numbers)
        self._options = {number: options[number] for number in alike}


def _read_experts(path: Path) -> tuple[str, ...]:
    try:
        head = orjson.loads(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"Cannot read {path}: {exc.strerror}. A recorded pool is a folder with this file.") from exc
    except orjson.JSONDecodeError as exc:
        raise ConfigError(f"{path} is not JSON: {exc}.") from exc
    experts = head.get("experts") if isinstance(head, dict) else None
    if not isinstance(experts, list) or not experts:
        raise ConfigError(f"{path}: 'experts' is a list of at least one expert.")
    expert_ids: list[str] = []
    for number, expert in enumerate(experts, 1):
        expert_id = expert.get("expert_id") if isinstance(expert, dict) else None
        if not isinstance(expert_id, str) or Path(expert_id).name != expert_id or expert_id in expert_ids:
            raise ConfigError(f"{path}, expert {number}: 'expert_id' {expert_id!r} is no name, or was given already.")
        expert_ids.append(expert_id)
    return tuple(expert_ids)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place, for messages."""
    number = 0
    try:
        with gzip.open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, row {number}", _row(line, f"{path}, row {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise ConfigError(f"{path} is not gzip, or cut off after row {number}: {exc}.") from exc
    except OSError as exc:
        raise ConfigError(f"Cannot read {path}: {exc.strerror or exc}.") from exc


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as exc:
        raise ConfigError(f"{place} is not JSON (NaN is none either): {exc}.") from exc
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is not a JSON object.")
    return row


def _answer(row: dict[str, Any], place: str) -> RecordedAnswer:
    score = _amount(row, "score", place)
    if score is None or score > 1:
        raise ConfigError(f"{place}: 'score' is a number from 0 to 1, got {row.get('score')!r}.")
    chars = _amount(row, "completion_chars", place)
    return RecordedAnswer(
        text=_text(row, "text", place),
        answer=_text(row, "answer", place),
        score=score,
        completion_chars=None if chars is None else int(chars),
        usd=_amount(row, "usd", place),
    )


def _text(row: dict[str, Any], key: str, place: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{place}: '{key}' is a text, got {value!r}.")
    return value


def _amount(row: dict[str, Any], key: str, place: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ConfigError(f"{place}: '{key}' is a number, 0 or more, got {value!r}.")
    return value


def _read_options(row: dict[str, Any], place: str) -> list[str]:
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ConfigError(f"{place}: 'options' is a list of texts, got {options!r}.")
    return [_squeezed(option) for option in options]


def _follow(options: Sequence[str], text: str) -> bool:
    at = 0
    for option in options:
        at = text.find(option, at) + len(option)
        if at < len(option):
            return False
    return True


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _digest() -> blake2b:
    return blake2b(digest_size=12)


def _packed(block: list[tuple[object, ...]]) -> bytes:
    return zlib.compress(orjson.dumps(block))
