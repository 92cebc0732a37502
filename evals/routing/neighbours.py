"""What the cells of 'knn' miss, on real questions: neighbours found, and the score of routing with and without them.

Recall is measured on the questions of all pools together, embedded statically; routing on a pool that is small enough
to be read whole, with cells that read as small a share of it as they do of 100,000 questions.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from evals.routing.scale import world
from evals.routing.setting import Setting, make_setting
from evals.routing.statistics import Bootstrap, Estimate
from evals.routing.suite import cases
from experts.models import cache_dir
from routers.learned.cells import Cells
from routers.learned.knn import Knn
from routers.questions import embed
from routers.records import Array, read_records
from routers.static import WordLlama

SHARE = 0.1
ASKED = 300
NEIGHBOURS = (50, 200)
LEAST = 2_000
"""Of fewer questions a tenth is about what one decision needs."""


def recall(vectors_NW: Array, share: float, seed: int = 0) -> dict[int, float]:
    """By k: how many of the k nearest of questions held out lie in the cells that are read."""
    order = np.random.default_rng(seed).permutation(len(vectors_NW))
    asked, kept = vectors_NW[order[:ASKED]], vectors_NW[order[ASKED:]]
    cells, sorted_by = Cells.fit(kept, seed, exact=0)
    cells, nearness = replace(cells, read=int(share * len(kept))), asked @ kept[sorted_by].T
    nearest = np.argsort(-nearness, axis=1, kind="stable")[:, : max(NEIGHBOURS)]
    hits = np.stack([_is_read(cells, vector, len(kept))[row] for vector, row in zip(asked, nearest, strict=True)])
    return {k: float(hits[:, :k].mean()) for k in NEIGHBOURS}


def _is_read(cells: Cells, vector_W: Array, count: int) -> Array:
    found = np.zeros(count, np.bool_)
    for part in cells.near(vector_W, 1):
        found[part] = True
    return found


def compare(setting: Setting, share: float) -> tuple[float, Estimate, float]:
    """The score of one call with all questions read, what cells change of it, and how often they name another expert
    first."""
    whole = Knn.fit(setting.training)
    cut = Knn.fit_with(setting.training, (whole.k, whole.strength, whole.same_task), exact=0)
    cut = replace(cut, cells=replace(cut.cells, read=int(share * len(setting.train))))
    rows = np.arange(len(setting.test))
    first, second = (m.predict(setting.asked).argmax(axis=1) for m in (whole, cut))
    scores = setting.scores_QE[rows, first], setting.scores_QE[rows, second]
    difference = Bootstrap(len(rows), setting.seed).difference(scores[1], scores[0])
    return float(scores[0].mean()), difference, float((first != second).mean())


async def _vectors(folders: Sequence[Path], encoder: WordLlama) -> Array:
    found = [await embed(encoder, read_records(folder).texts, cache_dir() / "embeddings") for folder in folders]
    return np.unique(np.concatenate(found), axis=0)


def main(pools: Annotated[Path, typer.Option(envvar="COLLEGIUM_POOLS", help="Folder of recorded pools.")]) -> None:
    """Print recall of the cells, and what they change of routing on the larger pools.

    Example: python -m evals.routing.neighbours --pools pools
    """
    encoder, found = WordLlama(), cases(pools)
    real = asyncio.run(_vectors(list(dict.fromkeys(folder for _, folder, _ in found)), encoder))
    for kind, vectors in (("real", real), ("synthetic", world(100_000, 2).questions.vectors_QW)):
        shown = ", ".join(f"{r:.3f} of {k}" for k, r in recall(vectors, SHARE).items())
        print(f"{len(vectors)} {kind} questions, {SHARE:.0%} read: recall {shown}")
    for name, folder, experts in found:
        records = read_records(folder, experts.split(",") if experts else None)
        cache = cache_dir() / "embeddings"
        setting = asyncio.run(make_setting(records, encoder, cache, train="train", test="test", seed=0))
        if len(setting.train) < LEAST:
            continue
        score, change, other = compare(setting, SHARE)
        low, high = (100 * x for x in change.ci95)
        print(
            f"{name:22s} {100 * score:.1f} read whole; cells {100 * change.value:+.2f} ({low:+.2f} to {high:+.2f}), "
            f"another expert first for {other:.1%}"
        )


if __name__ == "__main__":
    typer.run(main)
