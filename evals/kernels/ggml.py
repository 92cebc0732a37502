"""llama.cpp's experts beside ours: ggml's ``mul_mat_id`` from the libraries that come with llama-cpp-python.

No Python of theirs is imported. Weights lie where llama.cpp puts them: Q4_0 in its repacked buffer, Q8_0 as stored.
Legend: T tokens, D width, E experts, F expert width, K slots.
"""

import ctypes
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from collegium_kernels.ragged import Routing, rectangular
from torch import Tensor
from torch.nn import functional

from evals.kernels.shape import Shape

F32, Q4_0, Q8_0, I32 = 0, 2, 8, 26
TYPES = {8: Q8_0, 4: Q4_0}
# Of Gaussian weights. More says that the graph is not the layer.
MOST_ERROR = {8: 0.03, 4: 0.25}
TENSORS_BYTES = 1 << 20
SIZE, POINTER = ctypes.c_int64, ctypes.c_void_p


class _Init(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (POINTER, (_Init,)),
    "ggml_new_tensor_2d": (POINTER, (POINTER, ctypes.c_int, SIZE, SIZE)),
    "ggml_new_tensor_3d": (POINTER, (POINTER, ctypes.c_int, SIZE, SIZE, SIZE)),
    "ggml_mul_mat_id": (POINTER, (POINTER,) * 4),
    "ggml_swiglu_split": (POINTER, (POINTER,) * 3),
    "ggml_mul": (POINTER, (POINTER,) * 3),
    "ggml_add": (POINTER, (POINTER,) * 3),
    "ggml_cont": (POINTER, (POINTER,) * 2),
    "ggml_view_2d": (POINTER, (POINTER, POINTER, SIZE, SIZE, ctypes.c_size_t, ctypes.c_size_t)),
    "ggml_new_graph": (POINTER, (POINTER,)),
    "ggml_build_forward_expand": (None, (POINTER, POINTER)),
    "ggml_nbytes": (ctypes.c_size_t, (POINTER,)),
    "ggml_quantize_chunk": (ctypes.c_size_t, (ctypes.c_int, POINTER, POINTER, SIZE, SIZE, SIZE, POINTER)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, (POINTER, POINTER)),
    "ggml_backend_tensor_set": (None, (POINTER, POINTER, ctypes.c_size_t, ctypes.c_size_t)),
    "ggml_backend_tensor_get": (None, (POINTER, POINTER, ctypes.c_size_t, ctypes.c_size_t)),
    "ggml_backend_graph_compute": (ctypes.c_int, (POINTER, POINTER)),
    "ggml_backend_cpu_buffer_type": (POINTER, ()),
    "ggml_backend_cpu_init": (POINTER, ()),
    "ggml_backend_cpu_set_n_threads": (None, (POINTER, ctypes.c_int)),
    "ggml_backend_cpu_reg": (POINTER, ()),
    "ggml_backend_reg_dev_get": (POINTER, (POINTER, ctypes.c_size_t)),
    "ggml_backend_reg_get_proc_address": (POINTER, (POINTER, ctypes.c_char_p)),
}


def find_libraries(folder: Path | None) -> Path | None:
    """``folder``, or where llama-cpp-python is installed."""
    if folder is None:
        spec = find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent / "lib"
    return folder if (folder / "libggml-cpu.so").exists() else None


def load(folder: Path) -> dict[str, Callable[..., Any]]:
    """ggml's functions by name. Both libraries stay loaded: the second needs the first."""
    parts = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in ("libggml-base.so", "libggml-cpu.so")]
    made = {}
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(parts[1] if "_cpu_" in name else parts[0], name)
        function.restype, function.argtypes = result, arguments
        made[name] = function
    return made


def repacked_buffer(ggml: dict[str, Callable[..., Any]]) -> int:
    """The CPU's first extra kind of buffer: weights are reordered as they are copied there."""
    registry = ggml["ggml_backend_cpu_reg"]()
    address = ggml["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
    list_kinds = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)
    kinds = list_kinds(ggml["ggml_backend_reg_dev_get"](registry, 0))
    if not kinds or kinds[0] is None:
        raise RuntimeError("this build of ggml repacks nothing")
    return int(kinds[0])


class GgmlExperts:
    """One layer, its graphs kept by the number of tokens. All experts hold the same weights: times do not depend
    on them, and what is right is then known without a second dispatch."""

    def __init__(self, folder: Path, shape: Shape, bits: int) -> None:
        self._ggml, self._shape, self._type = load(folder), shape, TYPES[bits]
        self._backend = self._ggml["ggml_backend_cpu_init"]()
        self._ggml["ggml_backend_cpu_set_n_threads"](self._backend, 1)
        context = self._context()
        sizes = {"gate": (shape.D, shape.F), "up": (shape.D, shape.F), "down": (shape.F, shape.D)}
        self._weights = {n: self._new(context, self._type, *size, shape.E) for n, size in sizes.items()}
        plain = self._ggml["ggml_backend_cpu_buffer_type"]()
        kind = repacked_buffer(self._ggml) if bits == 4 else plain
        self._allocate(context, kind)
        drawn = {name: torch.randn(n, k) / k**0.5 for name, (k, n) in sizes.items()}
        for name, weight in drawn.items():
            self._fill(self._weights[name], weight)
        self._graphs: dict[tuple[int, int], tuple[int, dict[str, int]]] = {}
        self._check(drawn, MOST_ERROR[bits])

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if routing.fixed_k is None:
            raise ValueError("mul_mat_id has the same number of experts for every token")
        T, K = len(x_TD), routing.fixed_k
        if (T, K) not in self._graphs:
            self._graphs[T, K] = self._graph(T, K)
        graph, tensors = self._graphs[T, K]
        x, ids, weights = x_TD.float().contiguous(), routing.expert_ids_P.int(), routing.weights_P.float()
        for name, value in (("x", x), ("ids", ids), ("weights", weights)):
            self._ggml["ggml_backend_tensor_set"](tensors[name], value.data_ptr(), 0, value.nbytes)
        if self._ggml["ggml_backend_graph_compute"](self._backend, graph) != 0:
            raise RuntimeError("ggml could not compute the graph")
        y_TD = torch.empty_like(x)
        self._ggml["ggml_backend_tensor_get"](tensors["y"], y_TD.data_ptr(), 0, y_TD.nbytes)
        return y_TD.to(x_TD.dtype)

    def _graph(self, T: int, K: int) -> tuple[int, dict[str, int]]:
        """As llama.cpp builds it: gate and up apart, the K results weighted and added."""
        g, D, context = self._ggml, self._shape.D, self._context()
        x, weights = self._new(context, F32, D, 1, T), self._new(context, F32, 1, K, T)
        ids = g["ggml_new_tensor_2d"](context, I32, K, T)
        gate, up = (g["ggml_mul_mat_id"](context, self._weights[name], x, ids) for name in ("gate", "up"))
        hidden = g["ggml_swiglu_split"](context, gate, up)
        each = g["ggml_mul"](context, g["ggml_mul_mat_id"](context, self._weights["down"], hidden, ids), weights)
        slots = [g["ggml_view_2d"](context, each, D, T, 4 * D * K, 4 * D * slot) for slot in range(K)]
        y = slots[0] if K > 1 else g["ggml_cont"](context, slots[0])
        for slot in slots[1:]:
            y = g["ggml_add"](context, y, slot)
        graph = g["ggml_new_graph"](context)
        g["ggml_build_forward_expand"](graph, y)
        self._allocate(context, g["ggml_backend_cpu_buffer_type"]())
        return graph, {"x": x, "ids": ids, "weights": weights, "y": y}

    def _context(self) -> int:
        made: int = self._ggml["ggml_init"](_Init(TENSORS_BYTES, None, True))
        return made

    def _new(self, context: int, kind: int, *size: int) -> int:
        made: int = self._ggml["ggml_new_tensor_3d"](context, kind, *size)
        return made

    def _allocate(self, context: int, kind: int) -> None:
        if not self._ggml["ggml_backend_alloc_ctx_tensors_from_buft"](context, kind):
            raise MemoryError("ggml has no memory for its tensors")

    def _fill(self, tensor: int, weight_NK: Tensor) -> None:
        """Every expert with these weights, in one copy: the repacked buffer takes nothing less."""
        N, K = weight_NK.shape
        size = self._ggml["ggml_nbytes"](tensor) // self._shape.E
        one = torch.empty(size, dtype=torch.uint8)
        source = weight_NK.float().contiguous()
        self._ggml["ggml_quantize_chunk"](self._type, source.data_ptr(), one.data_ptr(), 0, N, K, None)
        whole = one.repeat(self._shape.E)
        self._ggml["ggml_backend_tensor_set"](tensor, whole.data_ptr(), 0, whole.nbytes)

    def _check(self, drawn: dict[str, Tensor], limit: float) -> None:
        x, E, K = torch.randn(5, self._shape.D), self._shape.E, self._shape.k
        ids, weights = torch.multinomial(torch.ones(5, E), K), torch.rand(5, K)
        got = self(x, rectangular(ids, weights, num_experts=E))
        hidden = functional.silu(x @ drawn["gate"].T) * (x @ drawn["up"].T)
        wanted = weights.sum(1, keepdim=True) * (hidden @ drawn["down"].T)
        error = float((got - wanted).norm() / wanted.norm())
        if not error <= limit:
            raise RuntimeError(f"ggml's experts are off by {error:.1%}: not the layer that was asked for")
