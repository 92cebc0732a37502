"""Scorers: an answer's text and the question to what was answered and whether it is right, a few lines each.

``kind_of`` chooses one by what the question is; ``--scorer`` sets one for all.
"""

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from evals.generation.sandbox import passes
from orchestrator.aggregators.extract import boxed, letter, number, plain, read_options, same, stated

if TYPE_CHECKING:
    from evals.generation.questions import Question

Verdict = tuple[str | None, float]
"""The answer as it was read (None: there is none), and its score from 0 to 1."""

_CODE = re.compile(r"```(?:python|py)?[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_CODE_LIMIT = 65_536


async def by_letter(text: str, question: "Question") -> Verdict:
    found = letter(text, question.options or read_options(question.text))
    return found, float(found == question.answer)


async def by_letters(text: str, question: "Question") -> Verdict:
    """Several choices, all of which must be named."""
    said = stated(text) or text[-80:]
    found = "".join(sorted(set(re.findall(r"(?<![A-Za-z])[A-H](?![a-z])|(?<=[A-H])[A-H]", said))))
    return found or None, float(found == "".join(sorted(set(re.findall(r"[A-H]", question.answer)))))


async def by_number(text: str, question: "Question") -> Verdict:
    found = number(text)
    gold = number(question.answer) or question.answer
    return found, float(found is not None and (found == gold or _close(found, question.answer)))


async def by_box(text: str, question: "Question") -> Verdict:
    found = boxed(text) or stated(text)
    return found, float(found is not None and same(found, question.answer))


async def by_wording(text: str, question: "Question") -> Verdict:
    """The answer that the text states, or its last line, is the right one but for case and punctuation."""
    said = stated(text) or text.strip().rpartition("\n")[2]
    return said or None, float(bool(said) and (same(said, question.answer) or plain(said) == plain(question.answer)))


async def by_containing(text: str, question: "Question") -> Verdict:
    """The right answer's words stand somewhere in the text: lenient, and cheated by a text that lists everything."""
    wanted = plain(question.answer) or ""
    hit = f" {wanted} " in f" {plain(text) or ''} "
    return (question.answer if hit else text[:200] or None), float(hit)


async def by_running(text: str, question: "Question") -> Verdict:
    """The code passes the question's tests, in a sandbox."""
    blocks = [m[1] for m in _CODE.finditer(text[:_CODE_LIMIT])]
    code = max(blocks, key=len, default=text[:_CODE_LIMIT])
    if f"def {question.entry_point}" not in code:
        code = question.text + "\n" + code  # a continuation of the function's head
    head = question.text.partition("def ")[0]  # its imports
    program = f"{head}\n{code}\n{question.tests}\ncheck({question.entry_point})\n"
    return (code or None), float(await passes(program))


Scorer = Callable[[str, "Question"], Awaitable[Verdict]]
KINDS: dict[str, Scorer] = {
    "letter": by_letter,
    "letters": by_letters,
    "number": by_number,
    "boxed": by_box,
    "exact": by_wording,
    "contains": by_containing,
    "code": by_running,
}


async def score(text: str, question: "Question") -> Verdict:
    """A recorded answer keeps the verdict that was recorded with it."""
    for recorded in question.recorded:
        if text and recorded.text and recorded.text.startswith(text):
            return recorded.answer, recorded.score
    return await KINDS[question.kind](text, question)


def kind_of(row: Mapping[str, Any]) -> str:
    """The scorer for a row of a question file."""
    answer, options = str(row["answer"]).strip(), row.get("options")
    if row.get("tests"):
        return "code"
    if options and re.fullmatch(r"[A-H](?:\s?[A-H])+", answer) and answer not in options:
        return "letters"
    if options or re.fullmatch(r"\([A-Z]\)", answer):
        return "letter"
    if "level" in row or "\\" in answer or "$" in answer:
        return "boxed"
    return "number" if _float(answer) is not None else "exact"


def _close(found: str, gold: str) -> bool:
    """Some files round large numbers to six digits."""
    one, other = _float(found), _float(gold)
    return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-5)


def _float(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
