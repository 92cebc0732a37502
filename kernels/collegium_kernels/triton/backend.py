"""The Triton kernels as a backend. No speed is claimed: none was measured on a GPU yet.

Legend: T tokens, P pairs, D width, E experts, F expert width.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from collegium_kernels.backends import ExpertWeights, Runner
from collegium_kernels.grouped import add_cheap_experts
from collegium_kernels.ragged import Routing
from collegium_kernels.triton.plan import plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_COLUMNS, BLOCK_DEPTH = 64, 64


class TritonBackend:
    """``interpret`` runs on the CPU under TRITON_INTERPRET=1, to test; bf16 is then multiplied in fp32, because the
    interpreter's bf16 products are wrong."""

    name = "triton"
    differentiable = False

    def __init__(self, *, interpret: bool = False, rows: int | None = None) -> None:
        self._interpret, self._rows = interpret, rows

    def refuses(self, weights: ExpertWeights) -> str | None:
        if weights.precision != "native":
            return "the Triton kernels compute with unquantised weights only"
        if weights.gate_up_EGD.dtype not in DTYPES:
            return f"no Triton kernel for {weights.gate_up_EGD.dtype}"
        if weights.gate_up_EGD.device.type != "cuda" and not self._interpret:
            return f"the weights are on {weights.gate_up_EGD.device}, not on CUDA"
        return None if find_spec("triton") else "triton is not installed"

    def how(self, weights: ExpertWeights) -> str:
        return "fused SwiGLU, tiles from the histogram, sums without atomics"

    def prepare(self, weights: ExpertWeights) -> Runner:
        gate_up, down = weights.gate_up_EGD.contiguous(), weights.down_EDF.contiguous()
        upcast = self._interpret and gate_up.dtype == torch.bfloat16

        def run(x_TD: Tensor, routing: Routing) -> Tensor:
            y_TD = launch(x_TD.contiguous(), gate_up, down, routing, rows=self._rows, upcast=upcast)
            return add_cheap_experts(y_TD, x_TD, routing).to(x_TD.dtype)

        return run


def launch(
    x_TD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, routing: Routing, *, rows: int | None, upcast: bool
) -> Tensor:
    """The routed experts' sum in fp32."""
    from collegium_kernels.triton import kernels

    T, D = x_TD.shape
    E, _, F = w_down_EDF.shape
    y_TD = x_TD.new_zeros(T, D, dtype=torch.float32)
    if T == 0 or routing.num_pairs == 0:
        return y_TD
    tiles = plan(routing, rows=rows)
    where = (tiles.expert_N, tiles.start_N, tiles.end_N, D, F, E)
    h_PF = x_TD.new_empty(routing.num_pairs, F)
    y_PD = y_TD.new_empty(routing.num_pairs, D)
    blocks = {"BLOCK_M": tiles.rows, "UPCAST": upcast}
    weights_P, ids_P = routing.weights_P.detach().float().contiguous(), routing.expert_ids_P
    N = tiles.expert_N.shape[0]
    kernels.gate_up_kernel[N, _blocks(F)](
        *(x_TD, w_gate_up_EGD, h_PF, tiles.pairs_P, routing.tokens_P(), *where),
        **blocks, BLOCK_F=BLOCK_COLUMNS, BLOCK_D=BLOCK_DEPTH,
    )  # fmt: skip
    kernels.down_kernel[N, _blocks(D)](
        *(h_PF, w_down_EDF, y_PD, weights_P, tiles.pairs_P, *where),
        **blocks, BLOCK_D=BLOCK_COLUMNS, BLOCK_F=BLOCK_DEPTH,
    )  # fmt: skip
    kernels.combine_kernel[T, _blocks(D)](y_PD, ids_P, routing.indptr_T1, y_TD, D, E, BLOCK_D=BLOCK_COLUMNS)
    return y_TD


def _blocks(size: int) -> int:
    return -(-size // BLOCK_COLUMNS)
