"""Three different engines from the one bundled checkpoint: as it is, with a low-rank change merged in, upcycled."""

import shutil
from pathlib import Path
from typing import Any

from experts.models import resolve

BASE = "smollm2-135m-instruct"
KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
MARK = "collegium-made"
"""Written last: a folder without it was cut off, and is made again."""


def make_models(folder: Path) -> dict[str, Path]:
    """Checkpoints by name, made under ``folder`` where they are not there yet. Takes 10 s."""
    base = Path(resolve(BASE))
    made = {"base": base, "merged": folder / "merged", "mixtral": folder / "mixtral"}
    for name in ("merged", "mixtral"):
        if not (made[name] / MARK).exists():
            _make(name, base, made[name])
    return made


def _make(name: str, base: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from evals.kernels.upcycle import upcycle

    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if name == "merged":
        _merge_low_rank(dense, rank=8, share=0.08, seed=0)
    shutil.rmtree(target, ignore_errors=True)
    (upcycle(dense) if name == "mixtral" else dense).save_pretrained(target)
    for file in KEPT:
        if (base / file).exists():
            shutil.copy(base / file, target / file)
    (target / MARK).touch()


def _merge_low_rank(model: Any, *, rank: int, share: float, seed: int) -> None:
    """Adds B @ A to every query and value projection, as merging a LoRA adapter does, with ``share`` of its norm."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            delta = torch.randn(weight.shape[0], rank, generator=generator)
            delta = delta @ torch.randn(rank, weight.shape[1], generator=generator)
            delta *= share * weight.data.float().norm() / delta.norm()
            weight.data += delta.to(weight.dtype)
