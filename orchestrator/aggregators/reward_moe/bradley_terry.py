"""Learning from comparisons: the probability that answer w beats answer l is sigma(s_w - s_l). Training needs torch.

Legend: K pairs, N answers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from routers.records import Array

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """AdamW with a cosine to zero. Every ``check_every`` steps the held-out loss is read, and the best state is kept;
    ``patience`` checks without gain end the training."""

    steps: int = 600
    batch: int = 1024
    lr: float = 1e-3
    weight_decay: float = 0.0
    check_every: int = 50
    patience: int = 20
    seed: int = 0


def loss_of(winners: "torch.Tensor", losers: "torch.Tensor") -> "torch.Tensor":
    """The mean of -log sigma(winner - loser)."""
    from torch.nn.functional import softplus

    return softplus(losers - winners).mean()


def ranking_loss(ranked: "torch.Tensor") -> "torch.Tensor":
    """For the scores of one prompt's answers, best first: the mean over all pairs (DMoERM). One answer alone has no
    pair and no loss."""
    import torch

    winners, losers = torch.triu_indices(len(ranked), len(ranked), offset=1)
    return loss_of(ranked[winners], ranked[losers]) if len(winners) else ranked.sum() * 0


def minimise(
    parameters: Sequence["torch.Tensor"],
    loss: Callable[[Array], "torch.Tensor"],
    train: Array,
    held_out: Array,
    schedule: Schedule,
    *,
    weights: Array | None = None,
    on_advance: Callable[[int], None] = lambda _: None,
) -> float:
    """``loss`` takes numbers of pairs, which are drawn in proportion to ``weights``, and evenly without.

    Leaves in ``parameters`` what did best on ``held_out`` (the last state where that is empty); returns its loss there.
    """
    import torch

    rng = np.random.default_rng(schedule.seed)
    optimiser = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, schedule.steps)
    chances = None if weights is None else weights[train] / weights[train].sum()
    best, kept, idle = float("inf"), [p.detach().clone() for p in parameters], 0
    for step in range(1, schedule.steps + 1):
        optimiser.zero_grad()
        rows = rng.choice(train, min(schedule.batch, len(train)), p=chances)
        loss(rows).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        cosine.step()
        on_advance(1)
        if step % schedule.check_every and step < schedule.steps:
            continue
        found = _measured(loss, held_out if len(held_out) else train)
        if found < best or not len(held_out):
            best, kept, idle = found, [p.detach().clone() for p in parameters], 0
        elif (idle := idle + 1) >= schedule.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return best


def _measured(loss: Callable[[Array], "torch.Tensor"], rows: Array) -> float:
    import torch

    with torch.no_grad():
        return float(loss(rows))


@contextmanager
def deterministic(seed: int, threads: int = 1) -> Iterator["torch.Generator"]:
    """Torch's random numbers from ``seed`` and few threads, for a while: the process's own are put back."""
    import torch

    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(threads)
    try:
        yield torch.manual_seed(seed)
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(state)


def held_out_pairs(prompts_K: Array, share: float, seed: int) -> tuple[Array, Array]:
    """Numbers of pairs to learn from and to check with; a prompt's pairs stay together."""
    prompts = np.unique(prompts_K)
    np.random.default_rng(seed).shuffle(prompts)
    kept = np.isin(prompts_K, prompts[: int(len(prompts) * share)])
    return np.flatnonzero(~kept), np.flatnonzero(kept)
