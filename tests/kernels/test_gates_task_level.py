"""Task-level MoE's card: what is cut out for a task gives what the whole layer gives; token routing cannot be cut."""

import pytest
import torch
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.mixtral import MixtralGate
from collegium_kernels.gates.task_level import TaskLevelGate, extract_task
from collegium_kernels.moe import MoELayer, SwiGLUExperts

TASKS, EXPERTS, WIDTH, INNER, K = 4, 4, 8, 6, 2


def trained(seed: int = 0) -> MoELayer:
    """Each task is another linear map."""
    torch.manual_seed(seed)
    gate = TaskLevelGate(WIDTH, EXPERTS, tasks=TASKS, k=K)
    layer = MoELayer(gate, SwiGLUExperts(EXPERTS, WIDTH, INNER))
    maps = torch.randn(TASKS, WIDTH, WIDTH) / WIDTH**0.5
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(60):
        x, tasks = torch.randn(64, WIDTH), torch.randint(0, TASKS, (64,))
        y, routed = layer(x, Context(token_ids_T=tasks))
        loss = ((y - torch.einsum("td,tde->te", x, maps[tasks])) ** 2).mean() + routed.loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return layer.eval()


def test_a_cut_out_task_gives_what_the_whole_layer_gives() -> None:
    layer, x = trained(), torch.randn(33, WIDTH)
    for task in range(TASKS):
        alone = extract_task(layer, task)
        with torch.no_grad():
            whole, _ = layer(x, Context(token_ids_T=torch.full((33,), task)))
            torch.testing.assert_close(alone(x), whole, rtol=0, atol=1e-6)
        parameters = sum(p.numel() for p in alone.experts.parameters())
        assert parameters * EXPERTS == K * sum(p.numel() for p in layer.experts.parameters())


def test_a_batch_of_several_tasks_is_split_by_task() -> None:
    layer, x = trained(), torch.randn(40, WIDTH)
    tasks = torch.arange(40) % TASKS
    with torch.no_grad():
        mixed, _ = layer(x, Context(token_ids_T=tasks))
        for task in range(TASKS):
            rows = tasks == task
            torch.testing.assert_close(extract_task(layer, task)(x[rows]), mixed[rows], rtol=0, atol=1e-6)


def test_all_tokens_of_a_task_have_the_same_experts_and_tasks_learn_their_own() -> None:
    layer = trained()
    with torch.no_grad():
        _, routed = layer(torch.randn(40, WIDTH), Context(token_ids_T=torch.arange(40) % TASKS))
    ids = routed.routing.expert_ids_P.view(40, K)
    assert all((ids[task::TASKS] == ids[task]).all() for task in range(TASKS))
    assert len({tuple(sorted(row.tolist())) for row in ids[:TASKS]}) > 1


def test_a_layer_that_routes_tokens_cannot_be_cut() -> None:
    """Its tokens use other experts than any two: whatever is kept, some outputs change."""
    torch.manual_seed(0)
    layer = MoELayer(MixtralGate(WIDTH, EXPERTS), SwiGLUExperts(EXPERTS, WIDTH, INNER)).eval()
    with pytest.raises(TypeError, match="by task"):
        extract_task(layer, 0)
    with torch.no_grad():
        _, routed = layer(torch.randn(200, WIDTH))
    assert len({int(e) for e in routed.routing.expert_ids_P}) > K


def test_the_task_must_be_told() -> None:
    with pytest.raises(ValueError, match="token_ids_T"):
        TaskLevelGate(WIDTH, EXPERTS)(torch.randn(2, WIDTH), Context())
