"""Our experts inside transformers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from collegium_kernels.errors import KernelInputError
from torch.nn.utils.parametrize import register_parametrization

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "bound"), [("eager", 1e-5), ("collegium", 1e-5), ("collegium_int8", 0.03), ("collegium_int4", 0.12)]
)
def test_an_upcycled_model_answers_as_the_dense_one(dense: Any, name: str, bound: float) -> None:
    from collegium_kernels.transformers_experts import register

    from evals.kernels.upcycle import upcycle

    register()
    sparse = upcycle(dense)
    sparse.set_experts_implementation(name)
    ids = torch.randint(3, 97, (2, 17))
    with torch.no_grad():
        wanted, got = dense(ids).logits, sparse(ids).logits
    assert (got - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("name", ["collegium_int8", "collegium_int4"])
def test_quantised_experts_change_nothing_but_the_arithmetic_of_the_codes(dense: Any, name: str) -> None:
    """Two equal experts at a half each, chosen by the token, have the bits of one expert with the same codes."""
    from collegium_kernels.transformers_experts import register

    from evals.kernels.upcycle import upcycle

    register()
    one, paired = upcycle(dense, num_experts=1, k=1), upcycle(dense, paired=True)
    for model in (one, paired):
        model.set_experts_implementation(name)
    ids = torch.randint(3, 97, (2, 17))
    with torch.no_grad():
        got = paired(ids, output_router_logits=True)
        assert torch.equal(got.logits, one(ids).logits)
    chosen = {tuple(sorted(row)) for row in torch.cat(got.router_logits).topk(2).indices.tolist()}
    assert chosen == {(0, 1), (2, 3)}


def test_the_experts_of_a_model_train(dense: Any) -> None:
    """They were left out of the gradient without a word."""
    from collegium_kernels.transformers_experts import register

    from evals.kernels.upcycle import upcycle

    register()
    ids, gradients = torch.randint(3, 97, (2, 17)), {}
    for name in ("eager", "collegium"):
        sparse = upcycle(dense)
        sparse.set_experts_implementation(name)
        sparse(ids, labels=ids).loss.backward()
        gradients[name] = {n: p.grad for n, p in sparse.named_parameters()}
    for name, wanted in gradients["eager"].items():
        torch.testing.assert_close(gradients["collegium"][name], wanted, atol=1e-6, rtol=1e-4, msg=name)
    sparse.set_experts_implementation("collegium_int8")
    with pytest.raises(KernelInputError, match="no gradients"):
        sparse(ids)


@pytest.mark.parametrize("name", ["collegium", "collegium_int8"])
def test_experts_that_changed_are_packed_again(dense: Any, name: str) -> None:
    from collegium_kernels.transformers_experts import register

    from evals.kernels.upcycle import upcycle

    register()
    ids, sparse, other = torch.randint(3, 97, (2, 17)), upcycle(dense), upcycle(dense)
    with torch.no_grad():
        for model in (sparse, other):
            model.set_experts_implementation(name)
        before = sparse(ids).logits
        assert sparse.model.layers[0].mlp.experts._collegium_packed is not None
        other.model.layers[0].mlp.experts.down_proj.mul_(2)
        wanted = other(ids).logits
        sparse.load_state_dict(other.state_dict())
        assert torch.equal(sparse(ids).logits, wanted)
        assert not torch.equal(wanted, before)
        sparse.set_experts_implementation("collegium_int4")  # another precision of the same model
        other = upcycle(dense)
        other.load_state_dict(sparse.state_dict())
        other.set_experts_implementation("collegium_int4")
        assert torch.equal(sparse(ids).logits, other(ids).logits)
        assert sparse.to(torch.bfloat16)(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(("options", "words"), [({"num_experts": 5, "paired": True}, "even"), ({"k": 5}, "k is 5")])
def test_an_upcycled_model_that_cannot_be(dense: Any, options: dict[str, Any], words: str) -> None:
    from evals.kernels.upcycle import upcycle

    with pytest.raises(ValueError, match=words):
        upcycle(dense, **options)


@pytest.mark.parametrize("name", ["collegium", "collegium_int8"])
def test_a_slot_without_an_expert(dense: Any, name: str) -> None:
    """Its id is the number of experts: transformers' own loops pass it over."""
    from collegium_kernels.transformers_experts import forward_for

    from evals.kernels.upcycle import upcycle

    experts = upcycle(dense).model.layers[0].mlp.experts
    forward = forward_for("native" if name == "collegium" else "int8")
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    with torch.no_grad():
        got = forward(experts, x, torch.tensor([[0, 4], [4, 4], [1, 2]]), weights)
        wanted = forward(experts, x[:1], torch.tensor([[0]]), weights[:1, :1])
    assert torch.equal(got[:1], wanted)
    assert (got[1] == 0).all()


def test_experts_that_are_not_swiglu_are_refused(dense: Any) -> None:
    from collegium_kernels.transformers_experts import register

    from evals.kernels.upcycle import upcycle

    register()
    sparse = upcycle(dense)
    sparse.set_experts_implementation("collegium")
    sparse.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()
    with torch.no_grad(), pytest.raises(ValueError, match="not plain SwiGLU"):
        sparse(torch.tensor([[1, 2, 3]]))


def test_experts_of_another_family_are_refused_by_name() -> None:
    from collegium_kernels.transformers_experts import register
    from transformers import AutoModelForCausalLM, GptOssConfig

    register()
    model = AutoModelForCausalLM.from_config(
        GptOssConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=16, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    model.set_experts_implementation("collegium_int8")
    with torch.no_grad(), pytest.raises(ValueError, match="GptOssExperts are not plain SwiGLU"):
        model(torch.tensor([[1, 2, 3]]))


def test_a_trace_is_recorded_from_a_running_model(dense: Any) -> None:
    from evals.kernels.record import from_routed_experts, record
    from evals.kernels.upcycle import upcycle

    sparse = upcycle(dense)
    trace = record(sparse, [torch.tensor([3, 4, 5]), torch.tensor([6, 7])], new_tokens=4)
    assert trace.ids_SLK.shape == (3 + 3 + 2 + 3, 2, 2)
    assert trace.ids_SLK.float().std() > 0
    with pytest.raises(ValueError, match="LlamaForCausalLM is no mixture"):
        record(dense, [torch.tensor([3])], new_tokens=1)
    del sparse.config.num_local_experts
    sparse.config.num_experts = 4  # as most other families name it
    assert record(sparse, [torch.tensor([3, 4])], new_tokens=1).num_experts == 4
    again = from_routed_experts([trace.ids_SLK[:4].numpy(), trace.ids_SLK[4:].numpy()], num_experts=4)
    assert torch.equal(again.ids_SLK, trace.ids_SLK)


@pytest.mark.parametrize("name", ["collegium", "collegium_int8"])
def test_weights_computed_at_each_call_are_packed_each_time(dense: Any, name: str) -> None:
    """As adapters do; the new ones may lie where the old ones lay, and were taken for them."""
    from collegium_kernels.transformers_experts import register

    from evals.kernels.upcycle import upcycle

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by, self.room = 1.0, torch.empty(0)

        def forward(self, weights: torch.Tensor) -> torch.Tensor:
            self.room = self.room.resize_(weights.shape).copy_(weights * self.by)
            return self.room.data

    register()
    ids, sparse = torch.randint(3, 97, (2, 17)), upcycle(dense)
    sparse.set_experts_implementation(name)
    with torch.no_grad():
        for layer in sparse.model.layers:
            layer.mlp.experts.scaled = Scaled()
            register_parametrization(layer.mlp.experts, "down_proj", layer.mlp.experts.scaled)
        for by in (1.0, 2.0):
            other = upcycle(dense)
            other.set_experts_implementation(name)
            for layer in sparse.model.layers:
                layer.mlp.experts.scaled.by = by
            for layer in other.model.layers:
                layer.mlp.experts.down_proj.mul_(by)
            assert torch.equal(sparse(ids).logits, other(ids).logits)


@pytest.mark.parametrize("name", ["collegium", "collegium_int8"])
def test_a_model_that_has_run_can_be_copied_and_pickled(dense: Any, name: str) -> None:
    from collegium_kernels.transformers_experts import register

    from evals.kernels.upcycle import upcycle

    register()
    ids, sparse = torch.randint(3, 97, (2, 17)), upcycle(dense)
    sparse.set_experts_implementation(name)
    with torch.no_grad():
        wanted = sparse(ids).logits
        for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
            assert copied.model.layers[0].mlp.experts._collegium_packed is None
            assert torch.equal(copied(ids).logits, wanted)
