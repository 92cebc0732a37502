"""Answers quoted in another expert's prompt. They are data: cut to size, their reasoning left out, and between marks
that no answer can forge, since none knows the others' texts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

_OPENING = re.compile(r"<(think|thinking|reasoning)>", re.IGNORECASE)
_CLOSING = re.compile(r"</(?:think|thinking|reasoning)>", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotation:
    """``text`` goes into a prompt; ``tag`` stands in each of its marks and in none of the answers."""

    text: str
    tag: str


def unmarked(answer: str, tag: str) -> str:
    """``answer`` without the lines that repeat a mark."""
    return "\n".join(line for line in answer.split("\n") if tag not in line).strip() if tag in answer else answer


def without_reasoning(text: str) -> str:
    """What stands after the last ``</think>``; nothing of a block that was never closed (Symbolic-MoE passes on only
    what follows the reasoning)."""
    closings = list(_CLOSING.finditer(text))
    rest = text[closings[-1].end() :] if closings else text
    opening = _OPENING.search(rest)
    return (rest[: opening.start()] if opening else rest).strip()


def clip(text: str, limit: int) -> str:
    """At most about ``limit`` characters: the middle gives way, for questions stand at the start and answers at the
    end."""
    if len(text) <= limit:
        return text
    head = limit // 2
    tail = limit - head
    return f"{text[:head]}\n[... {len(text) - limit} characters left out ...]\n{text[-tail:]}"


def quote(texts: Sequence[str], *, what: str, secret: str, names: Sequence[str] = ()) -> Quotation:
    """Each of ``texts`` between marks with its number or name. ``secret`` is something that their writers do not know,
    such as the request's id."""
    tag = _tag(texts, secret)
    marked = zip(names or range(1, len(texts) + 1), texts, strict=True)
    blocks = [f"[{what} {name} #{tag}]\n{text}\n[end of {what} {name} #{tag}]" for name, text in marked]
    return Quotation(text="\n\n".join(blocks), tag=tag)


def _tag(texts: Sequence[str], secret: str) -> str:
    digest = blake2b("\0".join([secret, *texts]).encode(errors="replace"), digest_size=4)
    while any(digest.hexdigest() in text for text in texts):
        digest = blake2b(digest.digest(), digest_size=4)
    return digest.hexdigest()
