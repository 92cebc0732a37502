"""What else computes the same layer on a GPU: torch's grouped products, a loop, padding, and vLLM's Triton kernel.

Each is made for one shape and one list of routings, and gets ready what it may before it is timed.
Legend: T tokens, D width, E experts, F expert width, K slots, P pairs, C capacity, M rows of a tile.
"""

import ast
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from collegium_kernels.backends import ExpertWeights
from collegium_kernels.ragged import Routing, by_expert
from torch import Tensor
from torch.nn import functional

Run = Callable[[Tensor], Tensor]


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate) * up


def grouped_mm(weights: ExpertWeights, routing: Routing) -> Run:
    """As transformers does it: sort, gather, two grouped products, add at the tokens."""
    up, down = weights.gate_up_EGD.mT, weights.down_EDF.mT

    def run(x_TD: Tensor) -> Tensor:
        rows = by_expert(routing)
        offsets = rows.indptr_E1[1:].int()
        h_PF = swiglu(functional.grouped_mm(x_TD[rows.tokens_P], up, offs=offsets))
        y_PD = functional.grouped_mm(h_PF, down, offs=offsets)
        weighted = y_PD * routing.weights_P[rows.pairs_P, None].to(y_PD.dtype)
        return torch.zeros_like(x_TD).index_add_(0, rows.tokens_P, weighted)

    return run


def loop(weights: ExpertWeights, routing: Routing) -> Run:
    """One cuBLAS product an expert; the bounds are on the host before the clock starts."""
    rows = by_expert(routing)
    bounds = list(enumerate(pairwise(rows.indptr_E1.tolist())))

    def run(x_TD: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for e, (start, end) in bounds:
            if end > start:
                tokens = rows.tokens_P[start:end]
                h = swiglu(functional.linear(x_TD[tokens], weights.gate_up_EGD[e]))
                scale = routing.weights_P[rows.pairs_P[start:end], None].to(h.dtype)
                y_TD.index_add_(0, tokens, functional.linear(h, weights.down_EDF[e]) * scale)
        return y_TD

    return run


def padded(weights: ExpertWeights, routing: Routing) -> Run:
    """Every expert computes as many rows as the busiest: batched products; the capacity is known beforehand."""
    rows = by_expert(routing)
    counts_E = rows.indptr_E1.diff()
    slots_C = torch.arange(int(counts_E.max()), device=counts_E.device)
    live_EC = slots_C < counts_E[:, None]
    row_EC = (rows.indptr_E1[:-1, None] + slots_C).clamp(max=routing.num_pairs - 1)

    def run(x_TD: Tensor) -> Tensor:
        tokens_EC = rows.tokens_P[row_EC]
        y_ECD = swiglu(x_TD[tokens_EC] @ weights.gate_up_EGD.mT) @ weights.down_EDF.mT
        scale_EC = routing.weights_P[rows.pairs_P[row_EC]].masked_fill(~live_EC, 0).to(x_TD.dtype)
        weighted = (y_ECD * scale_EC[..., None]).flatten(0, 1)
        return torch.zeros_like(x_TD).index_add_(0, tokens_EC.flatten(), weighted)

    return run


class VllmKernel:
    """vLLM's own Triton kernel and its choice of blocks, cut out of its ``fused_moe.py``.

    Timed are its two products with the blocks vLLM would choose, a fused activation and a fused sum in place of the
    compiled ones. Its sort is done beforehand and not timed, which is to its advantage.
    """

    def __init__(self, source: Path, work: Path, tuned: dict[int, dict[str, int]] | None = None) -> None:
        wanted = ("write_zeros_to_output", "fused_moe_kernel", "get_default_config")
        text = source.read_text()
        parts = [
            ast.get_source_segment(text, node) for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef) and node.name in wanted
        ]  # fmt: skip
        head = "import triton\nimport triton.language as tl\nenvs = current_platform = None\n\n"
        jit = [f"@triton.jit\n{part}" if part and not part.startswith("def get_") else str(part) for part in parts]
        target = work / "vllm_kernel.py"
        target.write_text(head + "\n\n".join(jit))
        spec = importlib.util.spec_from_file_location("vllm_kernel", target)
        if spec is None or spec.loader is None:
            raise RuntimeError(f"{target} cannot be imported")
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)
        module.current_platform = SimpleNamespace(is_rocm=lambda: False)
        self._module = module
        self._tuned = tuned

    def config(self, weights: ExpertWeights, T: int, K: int) -> dict[str, int]:
        if self._tuned:
            return dict(self._tuned[min(self._tuned, key=lambda size: abs(size - T))])
        E, D, F = weights.shape
        return dict(self._module.get_default_config(T, E, F, D, K, None))

    def run(self, weights: ExpertWeights, routing: Routing) -> Run:
        from evals.kernels.gpu_kernels import silu_mul, sum_slots

        T, P = routing.num_tokens, routing.num_pairs
        K, (E, D, F) = P // T, weights.shape
        config = self.config(weights, T, K)
        M, k = config["BLOCK_SIZE_M"], config.pop("BLOCK_SIZE_K")
        naive = P * 4 <= E
        ids, experts, total = self._align(routing, M, naive=naive)
        scale = routing.weights_P.float().contiguous()
        EM = P * M if naive else (min(len(ids), P * M) if M > T else len(ids))

        def product(a: Tensor, w: Tensor, out: Tensor, *, slots: int, weigh: bool) -> None:
            grid = (-(-EM // M) * -(-w.shape[1] // config["BLOCK_SIZE_N"]),)
            self._module.fused_moe_kernel[grid](
                a, w, out, None, None, None, scale, None if naive else ids, experts, total, w.shape[1], w.shape[2],
                EM, P, a.stride(0), a.stride(1), w.stride(0), w.stride(2), w.stride(1), out.stride(0), out.stride(1),
                *(0,) * 9, naive_block_assignment=naive, MUL_ROUTED_WEIGHT=weigh, top_k=slots,
                compute_type=self._module.tl.bfloat16, use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False,
                per_channel_quant=False, HAS_BIAS=False, BLOCK_SIZE_K=k, SWAP_AB=False, USE_TD=False,
                **{"SPLIT_K": 1, **config},
            )  # fmt: skip

        def run(x_TD: Tensor) -> Tensor:
            both, h, y = x_TD.new_empty(P, 2 * F), x_TD.new_empty(P, F), x_TD.new_empty(P, D)
            product(x_TD, weights.gate_up_EGD, both, slots=K, weigh=False)
            silu_mul(both, h)
            product(h, weights.down_EDF, y, slots=1, weigh=True)
            return sum_slots(y, T)

        return run

    def _align(self, routing: Routing, M: int, *, naive: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs by expert, each expert's padded to whole tiles with the number P; the expert of each tile."""
        ids_P, P, E = routing.expert_ids_P, routing.num_pairs, routing.num_experts
        if naive:
            return ids_P, ids_P.int(), torch.tensor([P * M], dtype=torch.int32, device=ids_P.device)
        rows = by_expert(routing)
        bounds, ids, experts = rows.indptr_E1.tolist(), [], []
        for e, (start, end) in enumerate(pairwise(bounds)):
            tiles = -(-(end - start) // M)
            padding = torch.full((tiles * M - (end - start),), P, device=ids_P.device)
            ids += [rows.pairs_P[start:end], padding]
            experts += [e] * tiles
        used = torch.cat(ids).int()
        room = P + E * (M - 1) if E <= P else min(P * M, P + E * (M - 1))
        spare = torch.full((max(0, room - len(used)),), P, dtype=torch.int32, device=ids_P.device)
        tile_experts = torch.tensor(experts + [0] * (len(spare) // M + 2), dtype=torch.int32, device=ids_P.device)
        return torch.cat([used, spare]), tile_experts, torch.tensor([len(used)], dtype=torch.int32, device=ids_P.device)
