"""moe.cpp from Python."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from collegium_kernels.cpu.pack import Packed
from collegium_kernels.errors import BackendUnavailable, KernelError, KernelInputError, describe
from collegium_kernels.ragged import Routing

SIZE, POINTER, FLAG = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
ARGUMENTS = (
    *(POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, FLAG, SIZE, SIZE, SIZE, SIZE),
    *(POINTER, POINTER, POINTER, POINTER, POINTER, SIZE, POINTER, POINTER, FLAG, FLAG),
)


class NativeMoE:
    """The library, loaded. ``portable`` leaves AVX512 out, as a machine without it does."""

    def __init__(self, library: Path, *, portable: bool = False) -> None:
        try:
            self._library = ctypes.CDLL(str(library))
        except OSError as exc:
            raise BackendUnavailable(f"{library} does not load: {exc}. Delete it to have it built again.") from exc
        self._call = self._library.collegium_moe
        self._call.argtypes = ARGUMENTS
        self.portable = portable or not self._library.collegium_has_vnni()

    def __call__(
        self, x_TD: Tensor, gate_up: Packed, down: Packed, routing: Routing, *, expert_width: int, num_experts: int
    ) -> Tensor:
        """fp32 in and out; the identity and constant experts are the caller's."""
        x = x_TD.float().contiguous()
        y = torch.empty_like(x)
        indptr, ids = routing.indptr_T1.contiguous(), routing.expert_ids_P.contiguous()
        weights = routing.weights_P.detach().float().contiguous()
        T, D = x.shape
        code = self._call(
            x.data_ptr(), y.data_ptr(), T, D, expert_width, num_experts, gate_up.bits, gate_up.span, down.span,
            gate_up.inputs, down.inputs, gate_up.codes.data_ptr(), gate_up.scales.data_ptr(), down.codes.data_ptr(),
            down.scales.data_ptr(), indptr.data_ptr(), ids.shape[0], ids.data_ptr(), weights.data_ptr(),
            torch.get_num_threads(), self.portable,
        )  # fmt: skip
        if code == 1:
            raise KernelInputError(f"{describe('routing.indptr_T1', indptr)}: must rise from 0 to {ids.shape[0]}.")
        if code == 2:
            raise KernelError(f"No memory for the rows of {describe('x_TD', x_TD)}.")
        return y
