"""Our experts inside vLLM and transformers beside the stock ones, on a Mixtral upcycled from a small dense model.

``python -m evals.kernels.hosts --model MODEL_DIR --work FOLDER``. Each engine has a process of its own. With
``--transformers`` the same prompts go through transformers' registry of experts, in fp32.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)
RUNS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "dense": ("dense", None, {}),
    "stock": ("sparse", None, {}),
    "collegium_int8": ("sparse", "collegium_int8", {"group": 64}),
    "collegium_int4": ("sparse", "collegium_int4", {"group": 32}),
    "collegium_int8, top-p 0.6": ("sparse", "collegium_int8", {"group": 64, "routing": "top_p", "p": 0.6}),
}
TOPICS = (
    "the capital of France", "why the sky is blue", "how bread is baked", "what a bond is", "the water cycle",
    "how to sort a list", "the Roman Empire", "photosynthesis", "what inflation means", "how a bicycle stays up",
    "the speed of light", "how to boil an egg", "what a prime number is", "the moon landing", "how rain forms",
    "what DNA is", "the rules of chess", "how a loan works", "what a volcano is", "how plants drink",
)  # fmt: skip
TOKENS = 48
IMPLEMENTATIONS = ("dense", "eager", "collegium", "collegium_int8", "collegium_int4")


def prepare(dense_source: Path, work: Path) -> None:
    """The dense model and its upcycled twin as checkpoints; skipped where they are already."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evals.kernels.upcycle import upcycle

    if (work / "sparse" / "config.json").exists():
        return
    dense = AutoModelForCausalLM.from_pretrained(dense_source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(dense_source)
    for name, model in (("dense", dense), ("sparse", upcycle(dense))):
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)


def generate(model: Path, quantization: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Greedy texts of one engine, and tokens a second of the better of two runs."""
    from collegium_kernels.vllm_plugin import register
    from vllm import LLM, SamplingParams

    register()
    overrides = {"quantization_config_dict_json": json.dumps(options)} if quantization else {}
    engine = LLM(
        str(model), quantization=quantization, hf_overrides=overrides, enforce_eager=True, max_model_len=256,
        max_num_seqs=20, dtype="bfloat16", disable_log_stats=True,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    messages: Any = [[{"role": "user", "content": f"Explain in one sentence: {topic}."}] for topic in TOPICS]
    speeds, texts = [], []
    for _ in range(3):
        started = time.perf_counter()
        outputs = engine.chat(messages, params, use_tqdm=False)
        speeds.append(sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - started))
        texts = [o.outputs[0].text for o in outputs]
    return {"texts": texts, "tokens_per_s": max(speeds[1:])}


def run_all(work: Path) -> str:
    lines = [
        "| engine | texts as the dense model's | text before the first difference | tokens/s | of stock |",
        "|---|---|---|---|---|",
    ]
    results: dict[str, dict[str, Any]] = {}
    for name, (folder, quantization, options) in RUNS.items():
        results[name] = _child(work / folder, quantization, options)
        LOG.info("%s: %.1f tokens/s", name, results[name]["tokens_per_s"])
    for name, result in results.items():
        pairs = list(zip(result["texts"], results["dense"]["texts"], strict=True))
        same = sum(a == b for a, b in pairs)
        agree = sum(_shared(a, b) / max(1, len(b)) for a, b in pairs) / len(pairs)
        speed, stock = result["tokens_per_s"], results["stock"]["tokens_per_s"]
        lines.append(f"| {name} | {same} of {len(pairs)} | {agree:.0%} | {speed:.1f} | {speed / stock:.2f} |")
    return "\n".join(lines) + "\n"


def run_transformers(work: Path) -> str:
    """Greedy texts of the dense model and of its upcycled twin with each implementation of the experts."""
    import torch
    from collegium_kernels.transformers_experts import register
    from transformers import AutoModelForCausalLM, AutoTokenizer

    register()
    tokenizer = AutoTokenizer.from_pretrained(work / "dense", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    chats = [[{"role": "user", "content": f"Explain in one sentence: {topic}."}] for topic in TOPICS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    results: dict[str, list[list[int]]] = {}
    speeds: dict[str, float] = {}
    for name in IMPLEMENTATIONS:
        options = {} if name == "dense" else {"experts_implementation": name}
        folder = work / ("dense" if name == "dense" else "sparse")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        started = time.perf_counter()
        with torch.no_grad():
            ids = model.generate(**prompts, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        speeds[name] = len(TOPICS) * TOKENS / (time.perf_counter() - started)
        results[name] = ids[:, prompts.input_ids.shape[1] :].tolist()
        del model
    lines = [
        "| experts | texts as the dense model's | tokens before the first other one | tokens/s |",
        "|---|---|---|---|",
    ]
    for name, rows in results.items():
        pairs = list(zip(rows, results["dense"], strict=True))
        same = sum(a == b for a, b in pairs)
        agree = sum(next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), TOKENS) for a, b in pairs)
        lines.append(f"| {name} | {same} of {len(pairs)} | {agree / len(pairs):.1f} of {TOKENS} | {speeds[name]:.1f} |")
    return "\n".join(lines) + "\n"


def _shared(a: str, b: str) -> int:
    """Characters until the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _child(model: Path, quantization: str | None, options: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    asked = json.dumps({"model": str(model), "quantization": quantization, "options": options})
    command = [sys.executable, "-m", "evals.kernels.hosts", "--child", asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the engine {model.name} ({quantization}) failed: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder with a dense Llama checkpoint")
    parser.add_argument("--work", type=Path, help="where the two checkpoints are kept")
    parser.add_argument("--transformers", action="store_true", help="through transformers, without vLLM")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        asked = json.loads(chosen.child)
        result = generate(Path(asked["model"]), asked["quantization"], asked["options"])
        sys.stdout.write("\n" + json.dumps(result) + "\n")
        return
    logging.basicConfig(level=logging.INFO)
    prepare(chosen.model, chosen.work)
    sys.stdout.write(run_transformers(chosen.work) if chosen.transformers else run_all(chosen.work))


if __name__ == "__main__":
    main(sys.argv[1:])
