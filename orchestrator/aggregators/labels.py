"""Which of a few labels a text settles on."""

import re
from collections.abc import Sequence

from orchestrator.aggregators.extract import stated
from orchestrator.aggregators.extract.plain import tail
from orchestrator.aggregators.quoting import without_reasoning


def checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError for labels that cannot be told apart."""
    folded = [" ".join(str(label).casefold().split()) for label in labels]
    if isinstance(labels, str) or len(labels) == 1 or not all(folded) or len(set(folded)) < len(folded):
        raise ValueError(f"option 'labels' is a list of two or more different words, not {labels!r}")
    return tuple(str(label) for label in labels)


def read_label(text: str, labels: Sequence[str]) -> str | None:
    """The label named after the last "answer is" or the like; else the only one named; else the only one of the last
    line. None when ``text`` does not settle on one."""
    text = tail(without_reasoning(text))
    for part in (stated(text), text, text.strip().rpartition("\n")[2]):
        named = _named(part or "", labels)
        if len(named) == 1:
            return named.pop()
    return None


def _named(text: str, labels: Sequence[str]) -> set[str]:
    """The labels in ``text`` as whole words. The longest wins where one is part of another ("strong up", "up")."""
    by_folded = {" ".join(label.casefold().split()): label for label in labels}
    words = "|".join(re.escape(folded) for folded in sorted(by_folded, key=len, reverse=True))
    found = re.findall(rf"(?<!\w)(?:{words})(?!\w)", " ".join(text.casefold().split()))
    return {by_folded[word] for word in found}
