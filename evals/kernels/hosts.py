"""Our experts inside vLLM and transformers beside the stock ones, on a Mixtral upcycled from a small dense model.

``python -m evals.kernels.hosts --model MODEL_DIR --work FOLDER``. Each engine has a process of its own. The dense model
in fp32 says what is right: its greedy texts are compared, and each engine is asked which token it would have chosen
after every prefix of them. Beside ours stand the dense model in bf16 and the dense model with feed-forward weights that
went through the same codes: what rounding alone changes. Each quantised engine also has a twin with one expert, k 1 and
the same codes: a dense model in our arithmetic. Its texts are owed where a layer's output has the same bits, as with
the paired router of ``upcycle``; where a token's weights are drawn, rounding of the last bit moves activation codes.
With activations of 16 bits the twin is stock vLLM's dense model whose weights went through the codes.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One way to run one checkpoint."""

    name: str
    folder: str
    dtype: str = "float32"
    quantization: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    twin: str | None = None
    compiled: bool = False


TOP_P = {"routing": "top_p", "p": 0.6}
GROUP = {"int8": 64, "int4": 32}


def _quantised(
    name: str, precision: str, folder: str, *, twin: bool = True, top_p: bool = False, activation_bits: int = 8
) -> Engine:
    dense = f"one expert, {precision}" if activation_bits == 8 else f"dense, {precision} codes"
    return Engine(
        name=name,
        folder=folder,
        quantization=f"collegium_{precision}",
        options={"group": GROUP[precision], "activation_bits": activation_bits, **(TOP_P if top_p else {})},
        twin=dense if twin else None,
    )


ENGINES = (
    Engine(name="dense", folder="dense"),
    Engine(name="stock", folder="sparse"),
    Engine(name="collegium", folder="sparse", quantization="collegium"),
    Engine(name="collegium, top-p 0.6", folder="sparse", quantization="collegium", options=TOP_P),
    Engine(name="dense, int8 codes", folder="dense_int8"),
    _quantised("one expert, int8", "int8", "single", twin=False),
    _quantised("collegium_int8", "int8", "sparse"),
    _quantised("collegium_int8, paired", "int8", "paired"),
    _quantised("collegium_int8, top-p 0.6", "int8", "sparse", top_p=True),
    _quantised("collegium_int8, 16-bit activations", "int8", "sparse", activation_bits=16),
    _quantised("collegium_int8, 16-bit activations, top-p 0.6", "int8", "sparse", activation_bits=16, top_p=True),
    Engine(name="dense, int4 codes", folder="dense_int4"),
    _quantised("one expert, int4", "int4", "single", twin=False),
    _quantised("collegium_int4", "int4", "sparse"),
    _quantised("collegium_int4, paired", "int4", "paired"),
    _quantised("collegium_int4, 16-bit activations", "int4", "sparse", activation_bits=16),
    Engine(name="dense, bf16", folder="dense", dtype="bfloat16"),
    Engine(name="stock, bf16", folder="sparse", dtype="bfloat16"),
    Engine(name="collegium, bf16", folder="sparse", dtype="bfloat16", quantization="collegium"),
)
CODES = {"dense_int8": (8, GROUP["int8"]), "dense_int4": (4, GROUP["int4"])}
TOPICS = (
    "the capital of France", "why the sky is blue", "how bread is baked", "what a bond is", "the water cycle",
    "how to sort a list", "the Roman Empire", "photosynthesis", "what inflation means", "how a bicycle stays up",
    "the speed of light", "how to boil an egg", "what a prime number is", "the moon landing", "how rain forms",
    "what DNA is", "the rules of chess", "how a loan works", "what a volcano is", "how plants drink",
)  # fmt: skip
PROMPTS = tuple(f"Explain in one sentence: {topic}." for topic in TOPICS)
# Of transformers: the checkpoint, the dtype, and who runs the experts.
IMPLEMENTATIONS: dict[str, tuple[str, str, str | None]] = {
    "dense": ("dense", "float32", None),
    "stock": ("sparse", "float32", "eager"),
    "collegium": ("sparse", "float32", "collegium"),
    "dense, bf16": ("dense", "bfloat16", None),
    "stock, bf16": ("sparse", "bfloat16", "eager"),
    "collegium_int8": ("sparse", "float32", "collegium_int8"),
    "one expert, int8": ("single", "float32", "collegium_int8"),
    "dense, int8 codes": ("dense_int8", "float32", None),
    "collegium_int8, paired": ("paired", "float32", "collegium_int8"),
    "collegium_int4": ("sparse", "float32", "collegium_int4"),
    "one expert, int4": ("single", "float32", "collegium_int4"),
    "collegium_int4, paired": ("paired", "float32", "collegium_int4"),
    "dense, int4 codes": ("dense_int4", "float32", None),
}


def prepare(dense_source: Path, work: Path) -> None:
    """The dense model, its upcycled twin and its rounded ones as checkpoints; those that are there already are kept."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evals.kernels.upcycle import upcycle

    missing = [
        name for name in ("dense", "sparse", "single", "paired", *CODES) if not (work / name / "config.json").exists()
    ]
    tokenizer = AutoTokenizer.from_pretrained(dense_source)
    for name in missing:
        model: Any = AutoModelForCausalLM.from_pretrained(dense_source, dtype=torch.bfloat16)
        if name == "sparse":
            model = upcycle(model)
        elif name == "single":
            model = upcycle(model, num_experts=1, k=1)
        elif name == "paired":
            model = upcycle(model, paired=True)
        elif name in CODES:
            _round(model.float(), *CODES[name])
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)


def _round(model: Any, bits: int, group: int) -> None:
    """What our codes stand for, in place of the feed-forward weights. Activations stay exact, unlike in our kernels."""
    from collegium_kernels.quant import quantise

    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.data = quantise(parameter.data[None], bits=bits, group=group).dequantise()[0]


def run_engine(engine: Engine, work: Path, tokens: int, wanted: list[list[int]] | None) -> dict[str, Any]:
    """Greedy tokens, tokens a second of the better of two runs, and how many of ``wanted``'s it would have chosen."""
    from collegium_kernels.vllm_plugin import register
    from vllm import LLM, SamplingParams

    register()
    overrides = {"quantization_config_dict_json": json.dumps(engine.options)} if engine.quantization else {}
    dtype: Any = engine.dtype
    quantization: Any = engine.quantization
    llm = LLM(
        str(work / engine.folder), quantization=quantization, hf_overrides=overrides, enforce_eager=not engine.compiled,
        max_model_len=256, max_num_seqs=20, dtype=dtype, disable_log_stats=True, enable_prefix_caching=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    messages: Any = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    speeds, outputs = [], []
    for _ in range(3):
        started = time.perf_counter()
        outputs = llm.chat(messages, params, use_tqdm=False)
        speeds.append(len(PROMPTS) * tokens / (time.perf_counter() - started))
    rows = [list(output.outputs[0].token_ids) for output in outputs]
    prompts = [list(output.prompt_token_ids or ()) for output in outputs]
    chosen = _would_choose(llm, prompts, wanted or rows)
    return {"rows": rows, "tokens_per_s": max(speeds[1:]), "chosen": chosen}


def _would_choose(llm: Any, prompts: list[list[int]], wanted: list[list[int]]) -> int:
    """Of all wanted tokens, those that are the engine's own first choice after the wanted ones before them."""
    from vllm import SamplingParams

    whole: Any = [{"prompt_token_ids": [*p, *w]} for p, w in zip(prompts, wanted, strict=True)]
    outputs = llm.generate(whole, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), use_tqdm=False)
    return sum(
        step[token].rank == 1
        for output, prompt, row in zip(outputs, prompts, wanted, strict=True)
        for token, step in zip(row, output.prompt_logprobs[len(prompt) :], strict=True)
    )


def run_vllm(work: Path, tokens: int, names: Collection[str], *, compiled: bool) -> str:
    results: dict[str, dict[str, Any]] = {}
    for engine in (e for e in ENGINES if e.name in _with_twins(names)):
        wanted = results["dense"]["rows"] if results else None
        made = _child(replace(engine, compiled=compiled), work, tokens, wanted)
        results[engine.name] = made | {"twin": engine.twin}
        LOG.info("load %.1f %s", os.getloadavg()[0], table(results, tokens).splitlines()[-1])
    return table(results, tokens)


def _with_twins(names: Collection[str]) -> set[str]:
    """All engines where none is named; else those, the dense model, and the twins that they are compared with."""
    chosen = {e.name for e in ENGINES if not names or e.name in names}
    return {"dense", *chosen, *(e.twin for e in ENGINES if e.name in chosen and e.twin)}


def run_transformers(work: Path, tokens: int, names: Collection[str]) -> str:
    """Greedy tokens of the dense model and of its upcycled twin with each implementation of the experts."""
    import torch
    from collegium_kernels.transformers_experts import register
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register()
    tokenizer = AutoTokenizer.from_pretrained(work / "dense", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    results: dict[str, dict[str, Any]] = {}
    for name, (folder, dtype, experts) in IMPLEMENTATIONS.items():
        if names and name not in ("dense", *names):
            continue
        options = {"experts_implementation": experts} if experts else {}
        model = AutoModelForCausalLM.from_pretrained(work / folder, dtype=getattr(torch, dtype), **options)
        started = time.perf_counter()
        with torch.no_grad():
            ids = model.generate(**prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            speed = len(PROMPTS) * tokens / (time.perf_counter() - started)
            wanted = results["dense"]["ids"] if results else ids
            mask = torch.nn.functional.pad(prompts.attention_mask, (0, tokens), value=1)
            # As in generate(): padding on the left has no position, and a text may not end early.
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = model(wanted, attention_mask=mask, position_ids=places, logits_to_keep=tokens + 1).logits[:, :-1]
            logits[:, :, tokenizer.eos_token_id] = -torch.inf
        chosen = int((logits.argmax(dim=2) == wanted[:, -tokens:]).sum())
        results[name] = {"rows": ids[:, -tokens:].tolist(), "tokens_per_s": speed, "chosen": chosen, "ids": ids}
        LOG.info("load %.1f %s", os.getloadavg()[0], table(results, tokens).splitlines()[-1])
        del model
    return table(results, tokens)


def table(results: dict[str, dict[str, Any]], tokens: int) -> str:
    """Each engine beside the dense model in fp32; the middle columns are over greedy texts of ``tokens`` tokens."""
    lines = [
        "| engine | texts equal | tokens before the first other one | dense's tokens it would choose "
        "| its twin's texts | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        pairs = list(zip(result["rows"], results["dense"]["rows"], strict=True))
        before = sum(agreed(a, b) for a, b in pairs) / len(pairs)
        chosen = f"{result['chosen'] / len(pairs) / tokens:.1%}" if "chosen" in result else "-"
        lines.append(
            f"| {name} | {sum(a == b for a, b in pairs)} of {len(pairs)} | {before:.1f} of {tokens} | {chosen} "
            f"| {_as_its_twin(result, results)} | {result['tokens_per_s']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _as_its_twin(result: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    twin = results.get(result.get("twin") or "")
    if twin is None:
        return "-"
    return f"{sum(a == b for a, b in zip(result['rows'], twin['rows'], strict=True))} of {len(twin['rows'])}"


def agreed(row: list[int], wanted: list[int]) -> int:
    """Tokens until the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(row, wanted, strict=True)) if a != b), len(wanted))


def _child(engine: Engine, work: Path, tokens: int, wanted: list[list[int]] | None) -> dict[str, Any]:
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    asked = json.dumps({"engine": asdict(engine), "work": str(work), "tokens": tokens, "wanted": wanted})
    command = [sys.executable, "-m", "evals.kernels.hosts", "--child", asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the engine '{engine.name}' failed: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder with a dense Llama checkpoint")
    parser.add_argument("--work", type=Path, help="where the checkpoints are kept")
    parser.add_argument("--tokens", type=int, default=48, help="greedy tokens of each text")
    parser.add_argument("--engines", nargs="+", default=[], metavar="NAME", help="rows of the table; all by default")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the models, as it does by default")
    parser.add_argument("--transformers", action="store_true", help="through transformers, without vLLM")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        asked = json.loads(chosen.child)
        result = run_engine(Engine(**asked["engine"]), Path(asked["work"]), asked["tokens"], asked["wanted"])
        sys.stdout.write("\n" + json.dumps(result) + "\n")
        return
    known = [*IMPLEMENTATIONS] if chosen.transformers else [e.name for e in ENGINES]
    if unknown := [name for name in chosen.engines if name not in known]:
        parser.error(f"--engines: there is no {', '.join(map(repr, unknown))} here; there are {', '.join(known)}")
    if chosen.model is None or chosen.work is None:
        parser.error("--model and --work are needed")
    logging.basicConfig(level=logging.INFO)
    prepare(chosen.model, chosen.work)
    made = (
        run_transformers(chosen.work, chosen.tokens, chosen.engines)
        if chosen.transformers
        else run_vllm(chosen.work, chosen.tokens, chosen.engines, compiled=chosen.compiled)
    )
    sys.stdout.write(made)


if __name__ == "__main__":
    main(sys.argv[1:])
