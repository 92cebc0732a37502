"""Experts and routings of any shape."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from collegium_kernels.ragged import Routing, from_topk
from torch import Tensor

MakeExperts = Callable[..., tuple[Tensor, Tensor]]
MakeRouting = Callable[..., Routing]


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The library is compiled once a session, and not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """One thread: small tensors gain nothing from two, and lose much on a busy machine."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


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


@pytest.fixture(scope="module")
def dense() -> Any:
    """Heads as small as vLLM's attention takes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
