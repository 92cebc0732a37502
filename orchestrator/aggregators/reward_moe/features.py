"""What a text shows on its surface: length, form, hedging, repetition, and whether the reasoning leads to the choice.

Pure functions of the texts, without an encoder or an engine; about 0.1 ms a text. ``surface`` is one answer,
``surface_matrix`` many. Legend: N answers, F = len(NAMES) features.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.aggregators.extract.letters import letter
from orchestrator.aggregators.extract.numbers import last_number
from routers.records import Array

NAMES = (
    *("log_chars", "log_words", "log_lines", "word_chars", "digit_share", "log_latex", "log_equals", "unique_share"),
    *("repeated_lines", "loops", "has_marker", "log_markers", "marker_place", "runs_on", "cut_off", "log_bullets"),
    *("log_hedges", "log_doubts", "log_refusals", "log_flattery", "log_self_praise", "log_steps", "log_asks"),
    *("from_question", "question_covered", "copies_question", "has_choice", "choice_place", "log_options", "support"),
    *("other_support", "support_rank", "quoted", "log_others_quoted", "numeric", "number_found", "ends_on_number"),
    *("ends_on_other", "log_reasoning", "empty"),
)

READ_CHARS = 8_000
"""Of the beginning, and as much of the end: no text costs more than twice this."""

_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_RUN_ON = re.compile(r"\n\s{0,8}(?:Question|Q|User|Human|Problem)\s?\d{0,3}:")
_END = re.compile(r"[.!?)\]}$\"'`*0-9]$")
_BULLET = re.compile(r"\n\s{0,8}(?:[-*•]|[0-9]{1,2}[.)])\s")
_MARKERS = ("answer is", "answer:", "####", "\\boxed", "\na: ")

# Literal strings: counting them takes a twentieth of what one regular expression of all of them takes.
_HEDGES = (
    *("maybe", "perhaps", "might ", "possibly", "probably", "likely", " seem", " appear", "assum", " guess"),
    *("approximately", "i think", "not sure", "unclear", "could be"),
)
_DOUBTS = (
    *("none of the", "closest", "not among", "not listed", "not given", "not provided", "cannot be determined"),
    *("not enough", "insufficient", "mistake", " error", "however", " but ", "wait"),
)
_REFUSALS = (
    *("sorry", "apolog", "i cannot", "i can not", "i can't", "i can’t", "unable to", "as an ai", "i don't know"),
    *("i don’t know", "refuse"),
)
_FLATTERY = (
    *(
        "great question",
        "good question",
        "excellent question",
        "wonderful question",
        "brilliant",
        "amazing",
        "fantastic",
    ),
    *("genius", "thank you for asking", "honored", "honoured", "admire", "impressive", "you're so", "you are so"),
    *("you are very", "you are truly", "pleasure to", "what a "),
)
_SELF_PRAISE = (
    *("answer is correct", "response is correct", "solution is correct", "this is correct", "reply is correct"),
    *("answer is right", "definitely", "certain that", "i am confident", "i am sure", "trust me", "100%", "a doubt"),
    *("guarantee", "highest score", "highest rating", "verified", "full marks", "best answer", "best response"),
)
_STEPS = (
    *("first", "second", "then", "next", "therefore", "thus", "hence", " so ", "because", "since", "step", "finally"),
)
_SMALL_WORDS = frozenset(
    (
        *("a", "an", "the", "of", "to", "in", "and", "or", "is", "are", "was", "were", "be", "by", "for", "on", "with"),
        *("that", "this", "it", "as", "at", "from"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question, read once for all its answers. ``numbers`` are the options' numbers, None where one has none."""

    opening: str
    words: frozenset[str]
    options: tuple[str, ...]
    option_words: tuple[frozenset[str], ...]
    numbers: tuple[float | None, ...]


def read_prompt(question: str, options: Sequence[str] = ()) -> Prompt:
    texts = tuple(option.casefold()[:READ_CHARS] for option in options)
    question = question[-2 * READ_CHARS :]
    return Prompt(
        opening=" ".join(question.split())[:120].casefold(),
        words=frozenset(_WORD.findall(question.casefold())) - _SMALL_WORDS,
        options=tuple(" ".join(text.split()) for text in texts),
        option_words=tuple(frozenset(_WORD.findall(text)) - _SMALL_WORDS for text in texts),
        numbers=tuple(_first_number(text) for text in texts),
    )


def own_part(text: str) -> str:
    """``text`` without what follows when a base model goes on to ask itself the next question; bounded."""
    if len(text) > 2 * READ_CHARS:
        text = text[:READ_CHARS] + text[-READ_CHARS:]
    text = text.strip()
    end = _RUN_ON.search(text)
    return text[: end.start()].rstrip() if end else text


def read_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter of the option that ``text`` settles on, or its last number where there are no options; or None."""
    own = own_part(text)
    return letter(own, options) if options else last_number(own)


def surface_matrix(texts: Sequence[str], prompts: Sequence[Prompt], choices: Sequence[str | None]) -> Array:
    """N x F; ``prompts`` and ``choices`` (as read_choice() gives them) belong to the texts one by one."""
    rows = [surface(text, prompt, choice) for text, prompt, choice in zip(texts, prompts, choices, strict=True)]
    return np.array(rows, np.float32).reshape(len(texts), len(NAMES))


def surface(text: str, prompt: Prompt, choice: str | None) -> list[float]:
    """The features NAMES, all finite, most of them between 0 and 10."""
    own = own_part(text)
    low = own.casefold()
    marker = min((at for m in _MARKERS if (at := low.find(m)) >= 0), default=None)
    reasoning = low[:marker]
    words = _WORD.findall(low)
    return [
        math.log1p(len(text)),
        *_form(own, low, words),
        *_ending(own, low, marker, runs_on=len(own) + 16 < min(len(text.strip()), 2 * READ_CHARS)),
        *(math.log1p(sum(map(low.count, phrases))) for phrases in _COUNTED),
        math.log1p(own.count("?")),
        *_overlap(low, set(words), prompt),
        *_argument(reasoning, prompt, choice),
        math.log1p(len(reasoning)),
        float(not own),
    ]


_COUNTED = (_HEDGES, _DOUBTS, _REFUSALS, _FLATTERY, _SELF_PRAISE, _STEPS)


def _form(own: str, low: str, words: list[str]) -> tuple[float, ...]:
    lines = [line for line in own.split("\n") if line]
    return (
        math.log1p(len(words)),
        math.log1p(len(lines)),
        min(sum(map(len, words)) / max(len(words), 1), 20.0),
        sum(map(own.count, "0123456789")) / max(len(own), 1),
        math.log1p(own.count("\\") + own.count("$")),
        math.log1p(own.count("=")),
        len(set(words)) / max(len(words), 1),
        1 - len(set(lines)) / max(len(lines), 1),
        math.log1p(low.count(low[-40:]) - 1) if len(low) > 80 else 0.0,
    )


def _ending(own: str, low: str, marker: int | None, *, runs_on: bool) -> tuple[float, ...]:
    return (
        float(marker is not None),
        math.log1p(sum(map(low.count, _MARKERS))),
        1.0 if marker is None else marker / len(low),
        float(runs_on),
        float(_END.search(own) is None),
        math.log1p(len(_BULLET.findall(own))),
    )


def _overlap(low: str, words: set[str], prompt: Prompt) -> tuple[float, ...]:
    shared = len(words & prompt.words)
    return (
        shared / max(len(words), 1),
        shared / max(len(prompt.words), 1),
        float(len(prompt.opening) > 20 and prompt.opening in " ".join(low[:READ_CHARS].split())),
    )


def _argument(reasoning: str, prompt: Prompt, choice: str | None) -> tuple[float, ...]:
    """From has_choice to ends_on_other: what the reasoning says for the choice and for the other options."""
    if not prompt.options:
        return _number_argument(reasoning, choice)
    chosen = ord(choice) - ord("A") if choice and len(choice) == 1 else -1
    known = 0 <= chosen < len(prompt.options)
    said = set(_WORD.findall(reasoning))
    support = [len(words & said) / len(words) if words else 0.0 for words in prompt.option_words]
    flat = " ".join(reasoning.split())
    quoted = [len(option) > 2 and option in flat for option in prompt.options]
    own = support[chosen] if known else 0.0
    return (
        float(known),
        chosen / len(prompt.options) if known else 0.0,
        math.log(len(prompt.options)),
        own,
        max((s for i, s in enumerate(support) if i != chosen), default=0.0),
        sum(s > own for s in support) / len(support),
        float(known and quoted[chosen]),
        math.log1p(sum(q for i, q in enumerate(quoted) if i != chosen)),
        *_numbers(reasoning, prompt.numbers, chosen if known else -1),
    )


def _number_argument(reasoning: str, choice: str | None) -> tuple[float, ...]:
    number = _first_number(choice or "")
    return (float(choice is not None), *(0.0,) * 7, *_numbers(reasoning, (number,), 0))


def _numbers(reasoning: str, numbers: Sequence[float | None], chosen: int) -> tuple[float, ...]:
    """numeric, number_found, ends_on_number, ends_on_other."""
    wanted = numbers[chosen] if chosen >= 0 else None
    found = [float(n) for n in _NUMBER.findall(reasoning.replace(",", "")[-READ_CHARS:]) if len(n) < 40]
    others = [n for i, n in enumerate(numbers) if i != chosen and n is not None]
    last = found[-1] if found else None
    return (
        float(any(n is not None for n in numbers)),
        float(wanted is not None and any(_close(n, wanted) for n in found)),
        float(wanted is not None and last is not None and _close(last, wanted)),
        float(last is not None and any(_close(last, n) for n in others)),
    )


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * max(abs(a), abs(b))


def _first_number(text: str) -> float | None:
    match = _NUMBER.search(text.replace(",", ""))
    return float(match[0]) if match and len(match[0]) < 40 else None
