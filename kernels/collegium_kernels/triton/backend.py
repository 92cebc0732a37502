"""The Triton kernels as a backend.

Legend: T tokens, P pairs, D width, E experts, F expert width, N tiles.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from collegium_kernels.backends import ExpertWeights, Runner
from collegium_kernels.grouped import add_cheap_experts
from collegium_kernels.ragged import Routing
from collegium_kernels.triton.plan import Tiles, plan
from collegium_kernels.triton.table import Config, Pair, choose

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_COLUMNS = 2048
# The copy engine wants rows that begin at multiples of 16 bytes.
TMA_BYTES = 16


class TritonBackend:
    """``interpret`` runs on the CPU under TRITON_INTERPRET=1, to test; bf16 is then multiplied in fp32, because the
    interpreter's bf16 products are wrong. ``rows`` and ``pair`` replace the choice of tiles and of blocks."""

    name = "triton"
    differentiable = False

    def __init__(self, *, interpret: bool = False, rows: int | None = None, pair: Pair | None = None) -> None:
        self._interpret, self._rows, self._pair = interpret, rows, pair

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
        hopper = gate_up.is_cuda and torch.cuda.get_device_capability(gate_up.device)[0] == 9

        def run(x_TD: Tensor, routing: Routing) -> Tensor:
            if len(x_TD) == 0 or routing.num_pairs == 0:
                return add_cheap_experts(torch.zeros_like(x_TD), x_TD, routing).to(x_TD.dtype)
            tiles = plan(routing, rows=self._rows, on_device=True if self._interpret else None)
            pair = self._pair or choose(tiles.rows, itemsize=gate_up.itemsize, hopper=hopper)
            y_TD = launch(x_TD.contiguous(), gate_up, down, routing, tiles, pair, upcast=upcast)
            return add_cheap_experts(y_TD, x_TD, routing).to(x_TD.dtype)

        return run


def launch(
    x_TD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, routing: Routing, tiles: Tiles, pair: Pair, *, upcast: bool
) -> Tensor:
    """The routed experts' sum: in the dtype of the tokens, or in fp32 where cheap experts are to be added."""
    from collegium_kernels.triton import kernels

    T, D = x_TD.shape
    E, _, F = w_down_EDF.shape
    P, N = routing.num_pairs, tiles.expert_N.shape[0]
    cheap = routing.copy_T is not None or routing.add_TD is not None
    h_PF, y_PD = x_TD.new_empty(P, F), x_TD.new_empty(P, D)
    y_TD = x_TD.new_empty(T, D, dtype=torch.float32 if cheap else x_TD.dtype)
    where = (tiles.expert_N, tiles.start_N, tiles.end_N, N, D, F, E)
    weights_P, ids_P = routing.weights_P.detach().contiguous(), routing.expert_ids_P
    first, second = pair.gate_up, pair.down
    tma = {c: c.tma and _aligned(D, F, x_TD) for c in (first, second)}
    kernels.gate_up_kernel[(N * -(-F // first.n),)](
        *(x_TD, w_gate_up_EGD, _blocks(w_gate_up_EGD, first.n, first.k, tma[first]), h_PF, tiles.tokens_P, *where),
        **_options(first, tiles.rows, D, tma[first], upcast),
    )
    kernels.down_kernel[(N * -(-D // second.n),)](
        *(h_PF, _blocks(h_PF, tiles.rows, second.k, tma[second])),
        *(w_down_EDF, _blocks(w_down_EDF, second.n, second.k, tma[second]), y_PD, weights_P, tiles.pairs_P, *where),
        **_options(second, tiles.rows, F, tma[second], upcast),
    )
    columns = min(MOST_COLUMNS, 1 << (D - 1).bit_length()) if T > 64 else min(256, 1 << (D - 1).bit_length())
    grid = (T, -(-D // columns))
    kernels.combine_kernel[grid](y_PD, ids_P, routing.indptr_T1, y_TD, P, D, E, BLOCK=columns)
    return y_TD


def _aligned(D: int, F: int, x_TD: Tensor) -> bool:
    return D * x_TD.itemsize % TMA_BYTES == 0 and F * x_TD.itemsize % TMA_BYTES == 0


def _blocks(tensor: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """A descriptor of blocks of the tensor's last two dimensions, the first ones flattened."""
    if not tma:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]

    return TensorDescriptor.from_tensor(tensor.view(-1, tensor.shape[-1]), [rows, columns])


def _options(config: Config, rows: int, depth: int, tma: bool, upcast: bool) -> dict[str, Any]:
    return {
        "BLOCK_M": rows, "BLOCK_N": config.n, "BLOCK_K": config.k, "GROUP": config.group, "SWAP": config.swap,
        "TMA": tma, "EVEN": depth % config.k == 0, "UPCAST": upcast,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
