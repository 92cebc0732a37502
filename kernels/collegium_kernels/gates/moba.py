"""MoBA: attention to the blocks of keys a query likes best.

Legend: H heads, T tokens, A head width, N blocks, B block size.
"""

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, best

CARD = Card(
    title="MoBA block gate", source="arXiv 2502.13189", k="3 blocks of T / 512", cost="N A a head", kind="layer"
)


def block_gate(q_HTA: Tensor, k_HTA: Tensor, *, block: int, k: int) -> Tensor:
    """Which blocks each query reads, (H, T, N). Its own block always, later blocks never."""
    H, T, A = k_HTA.shape
    N = -(-T // block)
    padded = torch.nn.functional.pad(k_HTA, (0, 0, 0, N * block - T)).view(H, N, block, A)
    sizes_N = torch.full((N,), block).clamp(max=T - torch.arange(N) * block).to(k_HTA)
    means_HNA = padded.sum(dim=2) / sizes_N[:, None]
    scores_HTN = q_HTA @ means_HNA.transpose(1, 2)
    own_T1 = (torch.arange(T, device=q_HTA.device) // block)[:, None]
    numbers_N = torch.arange(N, device=q_HTA.device)
    scores_HTN = scores_HTN.masked_fill(numbers_N > own_T1, -torch.inf).masked_fill(numbers_N == own_T1, torch.inf)
    chosen = best(scores_HTN.flatten(0, 1), min(k, N))[1].view(H, T, min(k, N))
    picked_HTN = torch.zeros_like(scores_HTN, dtype=torch.bool).scatter(2, chosen, True)
    return picked_HTN & (numbers_N <= own_T1)


def moba_attention(q_HTA: Tensor, k_HTA: Tensor, v_HTA: Tensor, *, block: int = 512, k: int = 3) -> Tensor:
    """Causal attention within the gated blocks."""
    T = q_HTA.shape[1]
    picked_HTN = block_gate(q_HTA, k_HTA, block=block, k=k)
    seen_HTT = picked_HTN.repeat_interleave(block, dim=2)[:, :, :T] & torch.ones(T, T, dtype=torch.bool).tril().to(
        q_HTA.device
    )
    return torch.nn.functional.scaled_dot_product_attention(q_HTA, k_HTA, v_HTA, attn_mask=seen_HTT)
