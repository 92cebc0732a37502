"""From a model's router logits to a ragged routing. Legend: T tokens, E experts, K slots."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from collegium_kernels.gates.base import best, top_k
from collegium_kernels.gates.top_p import top_p
from collegium_kernels.ragged import Routing, from_topk


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPolicy:
    """``top_k`` is the model's own. ``top_p`` stops within its k once the kept experts hold more than ``p`` of it."""

    kind: Literal["top_k", "top_p"] = "top_k"
    p: float = 0.9

    def __post_init__(self) -> None:
        if self.kind not in ("top_k", "top_p"):
            raise ValueError(f"routing '{self.kind}' is not one of top_k, top_p")
        if not 0 < self.p <= 1:
            raise ValueError(f"p is {self.p}: it must lie in (0, 1]")


def route(logits_TE: Tensor, policy: RoutingPolicy, *, k: int, renormalise: bool) -> Routing:
    probs_TE = logits_TE.float().softmax(dim=1)
    if policy.kind == "top_k":
        return top_k(probs_TE, k, renormalise=renormalise)
    weights_TK, ids_TK = best(probs_TE, k)
    of_kept_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    ids_TK = top_p(of_kept_TK, ids_TK, policy.p)
    kept_TK = (weights_TK if not renormalise else of_kept_TK) * (ids_TK >= 0)
    if renormalise:
        kept_TK = kept_TK / kept_TK.sum(dim=1, keepdim=True)
    return from_topk(ids_TK, kept_TK, num_experts=logits_TE.shape[1])
