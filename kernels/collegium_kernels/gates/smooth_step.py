"""A step that is exactly 0 and 1 outside (-gamma/2, gamma/2): shared by DSelect-k and COMET."""

import math

import torch
from torch import Tensor


def smooth_step(t: Tensor, gamma: float = 1.0) -> Tensor:
    inner = t.clamp(-gamma / 2, gamma / 2)
    return -2 * inner**3 / gamma**3 + 3 * inner / (2 * gamma) + 0.5


def code_probabilities(steps_XM: Tensor, num_experts: int) -> Tensor:
    """The product over the bits of each expert's number: the last dimension M becomes E."""
    bits_EM = (torch.arange(num_experts, device=steps_XM.device)[:, None] >> torch.arange(steps_XM.shape[-1])) & 1
    factors = torch.where(bits_EM.bool(), steps_XM[..., None, :], 1 - steps_XM[..., None, :])
    return factors.prod(dim=-1)


def num_bits(num_experts: int) -> int:
    return max(1, math.ceil(math.log2(num_experts)))
