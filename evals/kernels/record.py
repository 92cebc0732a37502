"""Record which experts a real model uses: ``python -m evals.kernels.record MODEL_DIR trace.safetensors``."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collegium_kernels.cache import Trace
from numpy.typing import NDArray
from torch import Tensor

PROMPTS = (
    "Explain how a bicycle stays upright.",
    "Write a Python function that sorts a list of numbers.",
    "What moves the price of a government bond?",
    "Tell a short story about a lighthouse.",
)


def record(model: Any, prompts: list[Tensor], *, new_tokens: int) -> Trace:
    """Generate greedily from each prompt of token ids and keep the router's choice in every layer. Raises ValueError
    for a model that has no experts in some layer, or does not say how many."""
    num_experts = getattr(model.config, "num_local_experts", None) or getattr(model.config, "num_experts", None)
    if num_experts is None or not all(hasattr(layer.mlp, "gate") for layer in model.model.layers):
        raise ValueError(f"{type(model).__name__} is no mixture of experts with a router in every layer.")
    chosen: list[list[Tensor]] = []
    hooks = []
    for layer in model.model.layers:
        seen: list[Tensor] = []
        chosen.append(seen)
        hooks.append(layer.mlp.gate.register_forward_hook(_keep(seen)))
    try:
        with torch.no_grad():
            for ids in prompts:
                model.generate(
                    ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=new_tokens, do_sample=False
                )
    finally:
        for hook in hooks:
            hook.remove()
    ids_SLK = torch.stack([torch.cat(seen) for seen in chosen], dim=1)
    return Trace(ids_SLK=ids_SLK, num_experts=num_experts)


def _keep(seen: list[Tensor]) -> Any:
    """transformers' routers return logits, weights and ids."""

    def hook(module: Any, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        seen.append(output[2].reshape(-1, output[2].shape[-1]).cpu())

    return hook


def from_routed_experts(arrays: list[NDArray[np.integer[Any]]], *, num_experts: int) -> Trace:
    """vLLM's ``routed_experts`` of several requests, each (tokens, layers, k), as one trace."""
    if not arrays:
        raise ValueError("There are no routed experts to make a trace of.")
    return Trace(ids_SLK=torch.cat([torch.from_numpy(a.astype(np.int64)) for a in arrays]), num_experts=num_experts)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    chosen = parser.parse_args(arguments)
    if not (chosen.model / "config.json").is_file():
        parser.error(f"{chosen.model} has no config.json: name the folder of a checkpoint")
    if not chosen.trace.parent.is_dir():
        parser.error(f"there is no folder {chosen.trace.parent} for the trace")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    prompts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in PROMPTS]
    try:
        trace = record(model, prompts, new_tokens=chosen.new_tokens)
    except ValueError as exc:
        parser.error(str(exc))
    trace.save(chosen.trace)
    S, L, K = trace.ids_SLK.shape
    sys.stdout.write(f"{S} tokens, {L} layers, {K} of {trace.num_experts} experts\n")


if __name__ == "__main__":
    main(sys.argv[1:])
