"""What int8 activations cost: ``python -m evals.kernels.activations --model FOLDER`` with a dense Llama checkpoint.

The error of each feed-forward layer against the same weight codes with exact activations: with a scale a row, with one
a group, and with 16 bits. The inputs are the model's own, and Gaussian ones.
Legend: T tokens, D width, F feed-forward width.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from collegium_kernels.quant import quantise, quantise_rows
from torch import Tensor
from torch.nn import functional

from evals.kernels.hosts import PROMPTS

CODES = ((8, 32), (8, 64), (8, 128), (4, 32), (4, 128))
Layer = tuple[Tensor, Tensor, Tensor, Tensor]


def errors(layer: Layer, bits: int, group: int) -> tuple[float, float, float]:
    """Relative Frobenius errors of a layer: a scale a row, a scale a group, a group in 16 bits."""
    x_TD, *weights = layer
    gate_FD, up_FD, down_DF = (quantise(w[None], bits=bits, group=group).dequantise()[0] for w in weights)

    def run(rounded: Callable[[Tensor], Tensor]) -> Tensor:
        x = rounded(x_TD)
        return rounded(functional.silu(x @ gate_FD.t()) * (x @ up_FD.t())) @ down_DF.t()

    exact_TD = run(lambda x: x)
    row, grouped, twice = (
        float((run(r) - exact_TD).norm() / exact_TD.norm())
        for r in (lambda x: _coded(x, x.shape[1]), lambda x: _coded(x, group), lambda x: _coded_twice(x, group))
    )
    return row, grouped, twice


def _coded(x_TK: Tensor, span: int) -> Tensor:
    codes_TK, scales_TK = quantise_rows(x_TK, span)
    return codes_TK * scales_TK


def _coded_twice(x_TK: Tensor, span: int) -> Tensor:
    first_TK = _coded(x_TK, span)
    return first_TK + _coded(x_TK - first_TK, span)


def gaussian() -> Layer:
    """Sixty-four tokens and an expert of OLMoE's shape."""
    torch.manual_seed(0)
    return (
        torch.randn(64, 2048),
        torch.randn(1024, 2048) / 45,
        torch.randn(1024, 2048) / 45,
        torch.randn(2048, 1024) / 32,
    )


def layers_of(folder: Path, prompts: tuple[str, ...]) -> list[Layer]:
    """Each layer's inputs over the prompts, and its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    for inputs, layer in zip(seen, model.model.layers, strict=True):
        layer.mlp.register_forward_hook(lambda _, args, __, inputs=inputs: inputs.append(args[0][0]))
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        model(**tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True))
    mlps = [layer.mlp for layer in model.model.layers]
    return [
        (torch.cat(x), m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight)
        for x, m in zip(seen, mlps, strict=True)
    ]


def table(layers: list[Layer]) -> str:
    lines = [
        "| codes, group | Gaussian: a row | a group | 16 bits | the model: a row, median, worst | a group | 16 bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits, group in CODES:
        drawn = " | ".join(f"{error:.2g}" for error in errors(gaussian(), bits, group))
        of_model = zip(*(errors(layer, bits, group) for layer in layers), strict=True)
        rest = " | ".join(f"{statistics.median(e):.2g}, {max(e):.2g}" for e in of_model)
        lines.append(f"| int{bits}, {group} | {drawn} | {rest} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a dense Llama checkpoint")
    with torch.no_grad():
        sys.stdout.write(table(layers_of(parser.parse_args(arguments).model, PROMPTS[:10])))


if __name__ == "__main__":
    main(sys.argv[1:])
