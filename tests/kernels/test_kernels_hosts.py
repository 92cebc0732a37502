"""Our experts inside transformers and inside vLLM."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from collegium_kernels.errors import KernelInputError
from collegium_kernels.ragged import Routing
from collegium_kernels.vllm_plugin.routing import RoutingPolicy, route

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")


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


@needs_transformers
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


@needs_transformers
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


@needs_transformers
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


@needs_transformers
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


@needs_transformers
@pytest.mark.parametrize(("options", "words"), [({"num_experts": 5, "paired": True}, "even"), ({"k": 5}, "k is 5")])
def test_an_upcycled_model_that_cannot_be(dense: Any, options: dict[str, Any], words: str) -> None:
    from evals.kernels.upcycle import upcycle

    with pytest.raises(ValueError, match=words):
        upcycle(dense, **options)


def test_engines_of_the_comparison_come_with_their_twins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from evals.kernels import hosts

    ran: list[str] = []

    def child(engine: Any, *_: Any) -> dict[str, Any]:
        ran.append(engine.name)
        return {"rows": [[1]], "tokens_per_s": 1.0, "chosen": 1}

    monkeypatch.setattr(hosts, "_child", child)
    monkeypatch.setattr(hosts, "prepare", lambda *_: None)
    given = ["--model", str(tmp_path), "--work", str(tmp_path), "--tokens", "1"]
    hosts.main([*given, "--engines", "collegium_int8, paired"])
    assert ran == ["dense", "one expert, int8", "collegium_int8, paired"]
    ran.clear()
    hosts.main([*given, "--engines", "collegium_int4, 16-bit activations"])
    assert ran == ["dense", "dense, int4 codes", "collegium_int4, 16-bit activations"]
    assert "| 1 of 1 | 1.0 |" in capsys.readouterr().out.splitlines()[-1]  # its twin's texts, then its speed
    for wrong in (["--engines", "collegium, bf16", "--transformers"], ["--engines", "stok"]):
        with pytest.raises(SystemExit):
            hosts.main([*given, *wrong])
        assert "there are dense, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        hosts.main([])


@needs_transformers
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


@needs_transformers
def test_experts_that_are_not_swiglu_are_refused(dense: Any) -> None:
    from collegium_kernels.transformers_experts import register

    from evals.kernels.upcycle import upcycle

    register()
    sparse = upcycle(dense)
    sparse.set_experts_implementation("collegium")
    sparse.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()
    with torch.no_grad(), pytest.raises(ValueError, match="not plain SwiGLU"):
        sparse(torch.tensor([[1, 2, 3]]))


@needs_transformers
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


def weights_of(routing: Routing) -> list[list[float]]:
    return [[round(w, 4) for w in row] for row in routing.dense_TE().tolist()]


def test_routing_policies_of_the_plugin() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]]).log()
    own = route(logits, RoutingPolicy(), k=2, renormalise=True)
    assert weights_of(own) == [[0.6667, 0.3333, 0], [0.5333, 0.4667, 0]]
    assert own.fixed_k == 2
    ragged = route(logits, RoutingPolicy(kind="top_p", p=0.6), k=2, renormalise=True)
    assert weights_of(ragged) == [[1, 0, 0], [0.5333, 0.4667, 0]]
    raw = route(logits, RoutingPolicy(kind="top_p", p=0.6), k=2, renormalise=False)
    assert weights_of(raw) == [[0.6, 0, 0], [0.4, 0.35, 0]]


GATE = """
from collegium_kernels.ragged import from_topk

def half_or_nobody(logits_TE, k):
    probs_TE = logits_TE.float().softmax(dim=1)
    weights_TK, ids_TK = probs_TE.topk(k, dim=1)
    return from_topk(ids_TK.masked_fill(weights_TK < 0.5, -1), weights_TK, num_experts=probs_TE.shape[1])
"""


def test_a_gate_of_ones_own_is_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "my_gates-1.0.dist-info"
    about.mkdir()
    (tmp_path / "my_gates.py").write_text(GATE)
    (about / "METADATA").write_text("Name: my-gates\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[collegium_kernels.routings]\nhalf = my_gates:half_or_nobody\n")
    monkeypatch.syspath_prepend(tmp_path)
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]]).log()
    found = route(logits, RoutingPolicy(kind="half"), k=2, renormalise=True)
    assert weights_of(found) == [[0.6, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="'my_gates:half_or_nobody' is not one of top_k, top_p, half"):
        RoutingPolicy(kind="my_gates:half_or_nobody")


@pytest.mark.parametrize(("options", "words"), [({"kind": "top_q"}, "top_q"), ({"p": 0.0}, "p is 0.0")])
def test_wrong_policies_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RoutingPolicy(**options)


@needs_transformers
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


# vLLM's own imports warn about torch.jit.
@needs_vllm
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_plugin_registers_itself_twice_and_checks_its_options() -> None:
    from collegium_kernels.vllm_plugin import register
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    register()
    assert get_quantization_config("collegium").precision == "native"
    config = get_quantization_config("collegium_int4")
    made = config.from_config(
        {"quant_method": "collegium_int4", "group": 32, "activation_bits": 16, "routing": "top_p", "p": 0.5}
    )
    assert (made.group, made.activation_bits, made.policy) == (32, 16, RoutingPolicy(kind="top_p", p=0.5))
    with pytest.raises(ValueError, match=r"does not know \['grup'\]"):
        config.from_config({"grup": 32})
    with pytest.raises(ValueError, match="p is read with"):
        config.from_config({"p": 0.5})
    for wrong in ({"group": 48}, {"group": "x"}, {"activation_bits": 12}, {"routing": "top_p", "p": "high"}):
        with pytest.raises(ValueError, match=f"collegium_int4: {list(wrong)[-1]} "):
            config.from_config(wrong)


COMPILED = """
import json, sys
from collegium_kernels.vllm_plugin import register
from vllm import LLM, SamplingParams

register()
llm = LLM(
    sys.argv[1], quantization="collegium", skip_tokenizer_init=True, dtype="float32", max_model_len=64, max_num_seqs=2,
    hf_overrides={"quantization_config_dict_json": sys.argv[2]},
)
params = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True, logprobs=0)
(output,) = llm.generate([{"prompt_token_ids": [3, 41, 5, 80]}], params, use_tqdm=False)
made = output.outputs[0]
print("\\n" + json.dumps([[token, step[token].logprob] for token, step in zip(made.token_ids, made.logprobs)]))
"""


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_compiles_a_model_around_ragged_experts(dense: Any, tmp_path: Path) -> None:
    """By default it does; the sizes of a ragged routing cannot be traced. Equal experts are the dense model."""
    from evals.kernels.upcycle import upcycle

    upcycle(dense).save_pretrained(tmp_path)
    environment = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(tmp_path), '{"routing": "top_p", "p": 0.6}'],
        capture_output=True, text=True, check=False, timeout=400, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "Error" in line)
    tokens, got = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    with torch.no_grad():
        rows = dense(torch.tensor([[3, 41, 5, 80, *tokens]])).logits[0, 3:-1].log_softmax(dim=1)
    assert rows.argmax(dim=1).tolist() == list(tokens)
    torch.testing.assert_close(
        torch.tensor(got), rows.gather(1, torch.tensor(tokens)[:, None])[:, 0], atol=1e-4, rtol=0
    )


def test_the_entry_point_names_the_function_that_registers() -> None:
    import tomllib
    from importlib import import_module

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["collegium"].partition(":")
    assert callable(getattr(import_module(module), name))
