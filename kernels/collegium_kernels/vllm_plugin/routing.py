"""From a model's router logits to a ragged routing. Legend: T tokens, E experts, K slots."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from torch import Tensor

from collegium_kernels.gates.base import best, top_k
from collegium_kernels.gates.top_p import top_p
from collegium_kernels.ragged import Routing, from_topk

OWN = ("top_k", "top_p")
GROUP = "collegium_kernels.routings"
Function = Callable[[Tensor, int], Routing]
"""``logits_TE`` and the model's k to a routing of E experts: any number of them a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPolicy:
    """``top_k`` is the model's own. ``top_p`` stops within its k once the kept experts hold more than ``p`` of it.
    Any other ``kind`` is a Function that an installed package declares as an entry point of the group
    ``collegium_kernels.routings``: a checkpoint's config can choose among them, but bring no code."""

    kind: str = "top_k"
    p: float = 0.9

    def __post_init__(self) -> None:
        if self.kind not in OWN and self.kind not in (declared := entry_points(group=GROUP).names):
            raise ValueError(
                f"routing '{self.kind}' is not one of {', '.join([*OWN, *sorted(declared)])}; "
                f"a package of yours may declare one as an entry point of the group {GROUP}."
            )
        if not 0 < self.p <= 1:
            raise ValueError(f"p is {self.p}: it must lie in (0, 1]")


def route(logits_TE: Tensor, policy: RoutingPolicy, *, k: int, renormalise: bool) -> Routing:
    if policy.kind not in OWN:
        return _load(policy.kind)(logits_TE, k)
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


@cache
def _load(kind: str) -> Function:
    (point,) = entry_points(group=GROUP, name=kind)
    function: Function = point.load()
    return function
