"""DynMoE: every expert has its own threshold, and experts come and go.

Legend: T tokens, D width, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from collegium_kernels.errors import require
from collegium_kernels.gates.base import Card, Context, Routed, fp32_mm
from collegium_kernels.moe import SwiGLUExperts
from collegium_kernels.ragged import from_dense
from collegium_kernels.steady import steady_map

CARD = Card(title="DynMoE", source="arXiv 2405.14297", k="1 to E, 0 too in training", cost="E D + D")


class DynMoEGate(nn.Module):
    """Active where sigmoid(cos(x, w_i)) exceeds sigmoid(G_i). A token nobody wants goes to the nearest expert, but in
    training to none: it is what ``adapt`` adds an expert for."""

    def __init__(self, width: int, num_experts: int, *, scale: float = 1.0, auxiliary: float = 0.01) -> None:
        super().__init__()
        self.scale, self.auxiliary = scale, auxiliary
        self.weight_ED = nn.Parameter(functional.normalize(torch.randn(num_experts, width), dim=1))
        self.threshold_E = nn.Parameter(torch.zeros(num_experts))

    @property
    def num_experts(self) -> int:
        return self.weight_ED.shape[0]

    def scores(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.float().contiguous()  # a sum over strided rows is in another order
        unit_TD = x_TD / x_TD.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
        cosines_TE = fp32_mm(unit_TD, functional.normalize(self.weight_ED.float(), dim=1))
        return steady_map(torch.sigmoid, self.scale * cosines_TE)

    def active(self, scores_TE: Tensor) -> Tensor:
        """Over their thresholds, before any fallback."""
        return scores_TE > steady_map(torch.sigmoid, self.threshold_E.float())

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        scores_TE = self.scores(x_TD)
        active_TE = self.active(scores_TE)
        if not self.training:
            nearest_TE = functional.one_hot(scores_TE.argmax(dim=1), self.num_experts).bool()
            active_TE = torch.where(active_TE.any(dim=1, keepdim=True), active_TE, nearest_TE)
        margin_TE = scores_TE - steady_map(torch.sigmoid, self.threshold_E.float())
        through_TE = active_TE + margin_TE - margin_TE.detach()
        weights_TE = through_TE / active_TE.sum(dim=1, keepdim=True).clamp(min=1)
        return Routed(routing=from_dense(weights_TE, active_TE), scores_TE=scores_TE, loss=self._loss())

    def _loss(self) -> Tensor:
        """Experts apart from each other, and short."""
        overlap = self.weight_ED @ self.weight_ED.t() - torch.eye(self.num_experts, device=self.weight_ED.device)
        loss: Tensor = self.auxiliary * (overlap.norm() + self.weight_ED.norm(dim=1).mean())
        return loss

    @torch.no_grad()
    def adapt(self, x_TD: Tensor) -> tuple[Tensor, bool]:
        """Drop experts no token activates; add one where tokens activate nothing. Returns the kept ids, and whether
        an expert was added: ``adapt_experts`` follows. Raises KernelInputError for no tokens, which say nothing."""
        require(len(x_TD) > 0, "x_TD", x_TD, "some tokens, to see which experts they use")
        active_TE = self.active(self.scores(x_TD))
        kept = active_TE.any(dim=0).nonzero()[:, 0]
        orphans_ND = x_TD[~active_TE.any(dim=1)].float()
        weights, thresholds = self.weight_ED[kept], self.threshold_E[kept]
        if len(orphans_ND):
            new_1D = functional.normalize(orphans_ND.sum(dim=0, keepdim=True), dim=1)
            weights = torch.cat([weights, new_1D.to(weights.dtype)])
            thresholds = torch.cat([thresholds, thresholds.new_zeros(1)])
        self.weight_ED, self.threshold_E = nn.Parameter(weights), nn.Parameter(thresholds)
        return kept, bool(len(orphans_ND))


@torch.no_grad()
def adapt_experts(experts: SwiGLUExperts, kept: Tensor, added: bool) -> SwiGLUExperts:
    """The experts for a gate after ``adapt``: those kept, and a freshly drawn one where one was added."""
    _, width, expert_width = experts.w_down_EDF.shape
    made = SwiGLUExperts(len(kept) + added, width, expert_width).to(experts.w_down_EDF)
    made.w_gate_up_EGD[: len(kept)] = experts.w_gate_up_EGD[kept]
    made.w_down_EDF[: len(kept)] = experts.w_down_EDF[kept]
    return made
