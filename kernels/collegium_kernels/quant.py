"""Expert weights in 8 or 4 bits, and how far off they are.

Legend: E experts, N outputs, X = E N, K inputs, G groups of inputs that share a scale. A code c stands for
(c - zero) * scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from collegium_kernels.errors import KernelInputError, require

# Inputs are filled up to whole vectors of activations.
MULTIPLE = 32
# 255 x 127 x this many still fits the kernels' 32-bit sums.
MOST_INPUTS = 65536
# Inputs that share a scale; 0 is the whole row.
GROUPS = (0, 32, 64, 128)
# Of activations: a row of int8, or a second one beside it.
ACTIVATION_BITS = (8, 16)
# Weights quantised at once: bounds the memory that the search takes.
ELEMENTS = 1 << 22
# For 4 bits a scale beside the one that just reaches the largest weight often fits the group better.
STRETCH = {8: (1.0,), 4: (1.06, 1.01, 0.96, 0.91, 0.86, 0.81)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """Codes of (E, N, K) weights. K is filled up; ``inputs`` is the true one. ``group`` 0 means a scale a row."""

    codes_ENK: Tensor
    scales_ENG: Tensor
    bits: int
    group: int
    inputs: int

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def span(self) -> int:
        """Inputs that share a scale."""
        return self.group or self.codes_ENK.shape[2]

    def dequantise(self) -> Tensor:
        """The weights these codes stand for, in fp32."""
        E, N, K = self.codes_ENK.shape
        grouped = (self.codes_ENK.float() - self.zero).view(E, N, K // self.span, self.span)
        whole = (grouped * self.scales_ENG.float()[..., None]).view(E, N, K)
        return whole[:, :, : self.inputs]


def quantise(w_ENK: Tensor, *, bits: int, group: int) -> Quantised:
    """Codes with bf16 scales; the codes are made for the rounded scale, so rounding it costs nothing more. The weight
    that is largest by size has the lowest code, of which there is one more than on the other side: its scale is
    negative where that weight is positive."""
    require(w_ENK.dim() == 3, "w_ENK", w_ENK, "three dimensions (experts, outputs, inputs)")
    require(w_ENK.is_floating_point(), "w_ENK", w_ENK, "a floating-point dtype")
    if bits not in STRETCH:
        raise KernelInputError(f"bits {bits} is not one of 4, 8.")
    if group not in GROUPS:
        raise KernelInputError(f"group {group} is not one of 0 (the whole row), 32, 64, 128.")
    E, N, K = w_ENK.shape
    require(group > 0 or K <= MOST_INPUTS, "w_ENK", w_ENK, f"at most {MOST_INPUTS} inputs, or a group")
    span = group or K + -K % MULTIPLE
    groups = -(-K // span)
    codes = torch.empty(E * N, groups * span, dtype=torch.uint8, device=w_ENK.device)
    scales = torch.empty(E * N, groups, dtype=torch.bfloat16, device=w_ENK.device)
    rows_XK, some = w_ENK.reshape(E * N, K), max(1, ELEMENTS // codes.shape[1])
    for start in range(0, E * N, some):
        mine = slice(start, start + some)
        filled = functional.pad(rows_XK[mine].float(), (0, -K % span))
        codes[mine], scales[mine] = _quantise_rows(filled, bits, span)
    codes, scales = codes.view(E, N, -1), scales.view(E, N, -1)
    return Quantised(codes_ENK=codes, scales_ENG=scales, bits=bits, group=group, inputs=K)


def relative_error(w_ENK: Tensor, quantised: Quantised) -> float:
    """The Frobenius norm of the difference over that of the weights."""
    return float((quantised.dequantise() - w_ENK.float()).norm() / w_ENK.float().norm().clamp(min=1e-30))


def quantise_rows(x_TK: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Activations as the kernels see them: whole numbers in [-127, 127] as fp32, and a scale for each ``span`` inputs.

    Both of shape (T, K): a scale stands beside each of its codes. A group too small for 1 / scale counts as zero.
    """
    T, K = x_TK.shape
    grouped = functional.pad(x_TK.float(), (0, -K % span)).view(T, -(-K // span), span)
    top = grouped.abs().amax(dim=2, keepdim=True)
    whole = torch.where(top < 127 * torch.finfo(torch.float32).tiny, 0, top / 127)
    scale = torch.where(top.isfinite(), whole, torch.nan)
    codes = (grouped * torch.where(scale > 0, 1 / scale, 0)).nan_to_num(0, 0, 0).round().clamp(-127, 127)
    return codes.flatten(1)[:, :K], scale.expand_as(grouped).flatten(1)[:, :K]


def _quantise_rows(w_XK: Tensor, bits: int, span: int) -> tuple[Tensor, Tensor]:
    zero = 1 << (bits - 1)
    grouped = w_XK.view(len(w_XK), -1, span)
    high, low = grouped.amax(dim=2), grouped.amin(dim=2)
    reach = torch.where(high > -low, high, low) / -zero
    best_error = torch.full_like(reach, torch.inf)
    codes, scales = torch.full_like(grouped, float(zero)), torch.zeros_like(reach)
    for stretch in STRETCH[bits]:
        scale = (reach * stretch).bfloat16().float()
        tried = (grouped / torch.where(scale == 0, 1, scale)[..., None]).round().clamp(-zero, zero - 1)
        error = (tried * scale[..., None] - grouped).square().sum(dim=2)
        better = (error < best_error) | error.isnan()
        best_error = torch.where(better, error, best_error)
        codes = torch.where(better[..., None], tried.nan_to_num(0) + zero, codes)
        scales = torch.where(better, scale, scales)
    return codes.to(torch.uint8).flatten(1), scales.bfloat16()
