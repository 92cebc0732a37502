"""UltraMem: a memory layer whose keys are a Tucker decomposition, and whose table is larger than it is stored.

Legend: T tokens, D width, N rows (N^2 slots), R rank, K slots a token, Q query, B blocks, V value width.
"""

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, best
from collegium_kernels.steady import steady_mm

CARD = Card(
    title="UltraMem retrieval",
    source="arXiv 2411.12364",
    k="16 of B N^2 slots",
    cost="2 Q D + 2 N R Q + K^2 R^2",
    kind="layer",
)


def tucker_top_k(rows_TNR: Tensor, columns_TNR: Tensor, core_RR: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best slots i N + j by rows[i]^T C columns[j]: found by C's leading singular pair, then scored exactly."""
    u_R, v_R = leading_pair(core_RR)
    row_ids = best((rows_TNR.detach() * u_R).sum(dim=2), k)[1]
    column_ids = best((columns_TNR.detach() * v_R).sum(dim=2), k)[1]
    rows_TKR = rows_TNR.gather(1, row_ids[..., None].expand(-1, -1, rows_TNR.shape[2]))
    columns_TKR = columns_TNR.gather(1, column_ids[..., None].expand(-1, -1, columns_TNR.shape[2]))
    scored_TKR = (rows_TKR[:, :, :, None] * core_RR).sum(dim=2)
    scores = (scored_TKR[:, :, None, :] * columns_TKR[:, None, :, :]).sum(dim=3).flatten(1)
    numbers = (row_ids[:, :, None] * rows_TNR.shape[1] + column_ids[:, None, :]).flatten(1)
    values_TK, picked_TK = best(scores, k)
    return values_TK, numbers.gather(1, picked_TK)


def leading_pair(core_RR: Tensor) -> tuple[Tensor, Tensor]:
    """The first left and right singular vectors, with the sign that makes both together point up.

    Either sign is a decomposition. The other one, which LAPACK gives for a core of ones, would look for the lowest
    rows, and a sign that changes from one training step to the next would change every slot."""
    u_RR, _, vh_RR = torch.linalg.svd(core_RR.detach().float())
    u_R, v_R = u_RR[:, 0], vh_RR[0]
    sign = torch.where(u_R.sum() + v_R.sum() < 0, -1.0, 1.0)
    return sign * u_R, sign * v_R


def second_singular_penalty(core_RR: Tensor, *, margin: float = 0.15) -> Tensor:
    """Keeps the core near rank one, on which the search relies."""
    penalty: Tensor = (torch.linalg.svdvals(core_RR.float())[1:2] - margin).relu().square().sum()
    return penalty


class UltraMemLayer(nn.Module):
    """``blocks`` virtual tables share one real table, each with its own output matrix. Each core scores a slice."""

    shuffle: Tensor

    def __init__(
        self,
        width: int,
        rows: int,
        *,
        rank: int = 2,
        k: int = 16,
        query: int = 32,
        value: int = 32,
        blocks: int = 4,
        cores: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        real = rows * rows // blocks
        if real * blocks != rows * rows:
            raise ValueError(f"{rows}^2 slots do not divide into {blocks} blocks")
        self.k, self.rank, self.blocks, self.real = min(k, rows), rank, blocks, real
        self.query = nn.Parameter(torch.randn(2 * query, width) / width**0.5)
        self.keys = nn.Parameter(torch.randn(2, rows * rank, query) / query**0.5)
        self.cores = nn.Parameter(torch.rand(cores, rank, rank))
        self.table = nn.Embedding(real, value)
        self.out = nn.Linear(blocks * value, width, bias=False)
        self.register_buffer("shuffle", torch.randperm(rows * rows, generator=torch.Generator().manual_seed(seed)))

    def retrieve(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores by each core (tokens, k, cores), and virtual slots."""
        first, second = steady_mm(x_TD, self.query).chunk(2, dim=1)
        sizes = len(x_TD), self.keys.shape[1] // self.rank, self.rank
        rows_TNR = steady_mm(first, self.keys[0]).view(sizes)
        columns_TNR = steady_mm(second, self.keys[1]).view(sizes)
        _, numbers_TK = tucker_top_k(rows_TNR, columns_TNR, self.cores.sum(dim=0), self.k)
        N = rows_TNR.shape[1]
        picked_r = rows_TNR.gather(1, (numbers_TK // N)[..., None].expand(-1, -1, self.rank))
        picked_c = columns_TNR.gather(1, (numbers_TK % N)[..., None].expand(-1, -1, self.rank))
        pairs = picked_r[:, :, None, :, None] * self.cores * picked_c[:, :, None, None, :]
        return pairs.sum(dim=(3, 4)), self.shuffle[numbers_TK]

    def forward(self, x_TD: Tensor, context: Context | None = None) -> Tensor:
        scores_TKC, slots_TK = self.retrieve(x_TD)
        values_TKV = self.table(slots_TK % self.real)
        halves = values_TKV.unflatten(2, (scores_TKC.shape[2], -1)) * scores_TKC[..., None]
        in_block = nn.functional.one_hot(slots_TK // self.real, self.blocks).to(x_TD.dtype)
        summed_TBV = (in_block[:, :, :, None] * halves.flatten(2)[:, :, None, :]).sum(dim=1)
        return steady_mm(summed_TBV.flatten(1), self.out.weight)
