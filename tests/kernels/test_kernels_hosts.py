"""Our experts inside vLLM, and the comparison of hosts."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from collegium_kernels.ragged import Routing
from collegium_kernels.vllm_plugin.routing import RoutingPolicy, route

from evals.kernels import record

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")


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
    for wrong in (
        {"group": 48},
        {"group": "x"},
        {"group": 64.0},
        {"activation_bits": 12},
        {"routing": "top_p", "p": "high"},
    ):
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


def test_the_recorder_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    nowhere = str(tmp_path / "none" / "trace")
    for arguments, words in (([nowhere, "trace"], "has no config.json"), ([str(tmp_path), nowhere], "no folder")):
        with pytest.raises(SystemExit):
            record.main(arguments)
        assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match="no routed experts"):
        record.from_routed_experts([], num_experts=4)
