"""Losses that keep experts in use. Legend: T tokens, E experts."""

import torch
from torch import Tensor

from collegium_kernels.errors import require
from collegium_kernels.gates.base import Card
from collegium_kernels.ragged import Routing

BALANCE_CARD = Card(
    title="Switch balance loss", source="arXiv 2101.03961", k="-", cost="E", batch_dependent=True, kind="loss"
)
Z_CARD = Card(title="Router z-loss", source="arXiv 2202.08906", k="-", cost="E", kind="loss")
GLOBAL_CARD = Card(
    title="Global-batch balance loss", source="arXiv 2501.11873", k="-", cost="E", batch_dependent=True, kind="loss"
)
MUTUAL_CARD = Card(
    title="Mutual information of tasks, or tokens, and experts",
    source="arXiv 2212.08066, 2404.05567",
    k="-",
    cost="2 E",
    batch_dependent=True,
    kind="loss",
)


def counts(routing: Routing) -> Tensor:
    """Pairs of each expert."""
    return torch.bincount(routing.expert_ids_P, minlength=routing.num_experts)[: routing.num_experts]


def balance_loss(probs_TE: Tensor, routing: Routing) -> Tensor:
    """E x sum of f_i P_i: 1 when even, E when everything goes to one expert."""
    return global_balance_loss(probs_TE, counts(routing))


def global_balance_loss(probs_TE: Tensor, counts_E: Tensor) -> Tensor:
    """The same with the pairs counted over all micro-batches: all-reduce or add up ``counts_E`` first."""
    if probs_TE.shape[0] == 0:
        return probs_TE.sum()
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return counts_E.shape[0] * (share_E * probs_TE.mean(dim=0)[: counts_E.shape[0]]).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Keeps logits small: the mean square of their log-sum-exp."""
    return logits_TE.logsumexp(dim=1).square().mean() if logits_TE.shape[0] else logits_TE.sum()


def mutual_information_loss(probs_TE: Tensor, tasks_T: Tensor | None = None) -> Tensor:
    """Minus I(task; expert): each task should use few experts, and all tasks together all of them.

    Without ``tasks_T`` every token is a task of its own: the mean of the tokens' entropies less the entropy of their
    mean, as DS-MoE (arXiv 2404.05567) trains with. It is -log E when tokens are sure and experts evenly used."""
    if probs_TE.shape[0] == 0:
        return probs_TE.sum()
    if tasks_T is None:
        mean_E = probs_TE.mean(dim=0)
        return torch.xlogy(mean_E, mean_E).sum() - torch.xlogy(probs_TE, probs_TE).sum(dim=1).mean()
    require(tasks_T.shape == probs_TE.shape[:1], "tasks_T", tasks_T, f"a task for each of {len(probs_TE)} tokens")
    num_tasks = int(tasks_T.max()) + 1
    joint_ME = probs_TE.new_zeros(num_tasks, probs_TE.shape[1]).index_add(0, tasks_T, probs_TE) / probs_TE.shape[0]
    apart_ME = joint_ME.sum(dim=1, keepdim=True) * joint_ME.sum(dim=0, keepdim=True)
    return -(torch.xlogy(joint_ME, joint_ME) - torch.xlogy(joint_ME, apart_ME)).sum()
