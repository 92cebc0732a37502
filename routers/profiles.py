"""What each expert has shown to be good at: a score for every keyword, as JSON that a person can read.

A keyword's score rises by 1 with each right answer to a question that has it and falls by 1 with each wrong one
(Symbolic-MoE, arXiv 2503.05641); a grade between counts in proportion, a missing answer as a wrong one. All experts saw
the same questions, so that ``seen`` is kept once.

Legend: Q questions, K keywords, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from routers.records import Array

if TYPE_CHECKING:
    from rich.table import Table

SCORES = ("signed", "laplace", "shrunk")
_SHOWN = 25


@dataclass(frozen=True, kw_only=True)  # no slots: the arrays are kept once made
class Profiles:
    """``seen``: questions with a keyword. ``scores``: by expert, then keyword; a keyword that is missing counts 0."""

    seen: Mapping[str, int]
    scores: Mapping[str, Mapping[str, float]]

    @classmethod
    def build(cls, keywords_Q: Sequence[Sequence[str]], scores_QE: Array, expert_ids: Sequence[str]) -> Self:
        """``keywords_Q``: of each question. A keyword that one question names twice counts once here."""
        names = sorted({k for own in keywords_Q for k in own})
        places = {name: i for i, name in enumerate(names)}
        member = np.zeros((len(keywords_Q), len(names)), np.float32)
        for row, own in zip(member, keywords_Q, strict=True):
            row[[places[k] for k in own]] = 1
        signed_KE = member.T @ (2 * scores_QE - 1)
        return cls(
            seen={name: int(n) for name, n in zip(names, member.sum(axis=0), strict=True)},
            scores={
                expert: {name: round(float(signed_KE[k, e]), 3) for k, name in enumerate(names)}
                for e, expert in enumerate(expert_ids)
            },
        )

    @property
    def keywords(self) -> tuple[str, ...]:
        return tuple(self.seen)

    @cached_property
    def seen_K(self) -> Array:
        return np.array(list(self.seen.values()), np.float64)

    @cached_property
    def signed_KE(self) -> Array:
        rows = [[own.get(k, 0.0) for own in self.scores.values()] for k in self.seen]
        return np.array(rows, np.float64).reshape(len(self.seen), len(self.scores))

    @property
    def accuracy_KE(self) -> Array:
        """The share of a keyword's questions that each expert got right."""
        accuracy: Array = (self.signed_KE / np.maximum(self.seen_K, 1)[:, None] + 1) / 2
        return accuracy

    def scored(self, how: str, strength: float) -> tuple[Array, Array]:
        """K x E local scores, and each expert's global one. ``signed``: sums of +1 and -1, as published. ``laplace``:
        the share of right answers as if two more had been seen, one of them right. ``shrunk``: as if ``strength`` more
        had been seen that went as the expert's do on average."""
        if how == "signed":
            return self.signed_KE, self.signed_KE.sum(axis=0)
        right, seen = self.accuracy_KE * self.seen_K[:, None], self.seen_K[:, None]
        mean = right.sum(axis=0) / max(seen.sum(), 1)
        if how == "laplace":
            return (right + 1) / (seen + 2), mean
        return (right + strength * mean) / (seen + strength), mean

    def table(self) -> "Table":
        """The keywords seen most, and what each expert's score is there."""
        from rich.table import Table

        order = np.argsort(-self.seen_K, kind="stable")[:_SHOWN]
        table = Table("keyword", "seen", *self.scores, box=None)
        for k in order:
            best = self.signed_KE[k].max()
            cells = [f"[bold green]{s:g}[/]" if s == best else f"{s:g}" for s in self.signed_KE[k]]
            table.add_row(self.keywords[k], f"{self.seen_K[k]:g}", *cells)
        return table

    def heat_map(self, path: Path) -> None:
        """A PNG of who is right how often, by keyword."""
        from matplotlib.figure import Figure

        order = np.argsort(-self.seen_K, kind="stable")[: _SHOWN * 2]
        shown = self.accuracy_KE[order]
        figure = Figure(figsize=(3 + 0.45 * shown.shape[1], 2 + 0.22 * shown.shape[0]), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axes.set_xticks(range(shown.shape[1]), list(self.scores), rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(order)), [f"{self.keywords[k]} ({self.seen_K[k]:g})" for k in order], fontsize=8)
        axes.set_title("Share of right answers by keyword (questions seen)")
        figure.colorbar(image, shrink=0.5)
        figure.savefig(path, dpi=120)
