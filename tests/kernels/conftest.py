"""Experts and routings of any shape."""

from collections.abc import Callable

import pytest
import torch
from collegium_kernels.ragged import Routing, from_topk
from torch import Tensor

MakeExperts = Callable[..., tuple[Tensor, Tensor]]
MakeRouting = Callable[..., Routing]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_experts() -> MakeExperts:
    def make(E: int, D: int, F: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return (torch.randn(E, 2 * F, D) / D**0.5).to(dtype), (torch.randn(E, D, F) / F**0.5).to(dtype)

    return make


@pytest.fixture
def make_routing() -> MakeRouting:
    def make(T: int, E: int, K: int = 2, *, drop: float = 0.0) -> Routing:
        ids = torch.rand(T, max(E, K)).argsort(dim=1)[:, :K]
        ids = torch.where(torch.rand(T, K) < drop, -1, ids)
        return from_topk(ids, torch.rand(T, K), num_experts=E)

    return make
