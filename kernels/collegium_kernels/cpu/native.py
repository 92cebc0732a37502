"""moe.cpp from Python."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collegium_kernels.cpu.pack import Packed
from collegium_kernels.errors import BackendUnavailable, KernelError, KernelInputError, describe
from collegium_kernels.ragged import Routing

SIZE, POINTER, FLAG = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
PROBLEM = (POINTER, POINTER, FLAG, FLAG, SIZE, SIZE, SIZE, SIZE, POINTER, SIZE, POINTER, POINTER, FLAG, POINTER)
CODES = (FLAG, SIZE, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER, POINTER, FLAG, FLAG)
FLOATS = (FLAG, POINTER, POINTER)
# The numbers by which moe.cpp knows them.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NativeMoE:
    """The library, loaded. ``portable`` leaves AVX512 out, as a machine without it does."""

    def __init__(self, library: Path, *, portable: bool = False) -> None:
        try:
            self._library = ctypes.CDLL(str(library))
        except OSError as exc:
            raise BackendUnavailable(f"{library} does not load: {exc}. Delete it to have it built again.") from exc
        self._library.collegium_moe.argtypes = PROBLEM + CODES
        self._library.collegium_moe_floats.argtypes = PROBLEM + FLOATS
        self.portable = portable or not self._library.collegium_has_vnni()
        self._team = _openmp_team()
        self.on_intel = bool(self._library.collegium_is_intel())
        self.runs_floats = not portable and bool(self._library.collegium_has_avx512())

    def __call__(
        self,
        x_TD: Tensor,
        gate_up: Packed,
        down: Packed,
        routing: Routing,
        *,
        expert_width: int,
        num_experts: int,
        planes: int = 1,
    ) -> Tensor:
        """Experts in 8 or 4 bits, ``planes`` rows of 8 bits for each of the activations. The identity and constant
        experts are the caller's: beside them the result is in fp32, otherwise that of bf16 is bf16."""
        weights = (
            gate_up.bits, gate_up.span, down.span, gate_up.inputs, down.inputs, gate_up.codes.data_ptr(),
            gate_up.scales.data_ptr(), down.codes.data_ptr(), down.scales.data_ptr(), planes, self.portable,
        )  # fmt: skip
        return self._call(self._library.collegium_moe, x_TD, routing, expert_width, num_experts, weights)

    def floats(
        self, x_TD: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, *, expert_width: int, num_experts: int
    ) -> Tensor:
        """The same for float weights as ``pack_floats`` leaves them."""
        weights = KINDS[gate_up.dtype], gate_up.data_ptr(), down.data_ptr()
        return self._call(self._library.collegium_moe_floats, x_TD, routing, expert_width, num_experts, weights)

    def _call(
        self,
        function: Any,
        x_TD: Tensor,
        routing: Routing,
        expert_width: int,
        num_experts: int,
        arguments: tuple[int, ...],
    ) -> Tensor:
        x = (x_TD if x_TD.dtype == torch.bfloat16 else x_TD.float()).contiguous()
        last = routing.copy_T is None and routing.add_TD is None
        y = torch.empty(x.shape, dtype=x.dtype if last else torch.float32)
        indptr, ids = routing.indptr_T1.contiguous(), routing.expert_ids_P.contiguous()
        weights = routing.weights_P.detach().float().contiguous()
        problem = (
            x.data_ptr(), y.data_ptr(), x.dtype == torch.bfloat16, y.dtype == torch.bfloat16, *x.shape, expert_width,
            num_experts, indptr.data_ptr(), ids.shape[0], ids.data_ptr(), weights.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        code = function(*problem, self._team, *arguments)
        if code == 1:
            raise KernelInputError(f"{describe('routing.indptr_T1', indptr)}: must rise from 0 to {ids.shape[0]}.")
        if code != 0:
            reason = {2: "no memory for its rows", 3: "this CPU has no AVX512"}[code]
            raise KernelError(f"{describe('x_TD', x_TD)}: {reason}.")
        return y


def _openmp_team() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch runs on (GNU's, or Intel's or LLVM's in its place).

    Its threads wait for work, and stand on the cores that vLLM or the user bound them to. A thread of our own would
    share the one core of its maker.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None
