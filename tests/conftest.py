"""One vLLM engine for the whole session, since starting it takes ten times as long as the tests on it; and a recorded
pool on disk, small and made up: four skills, an expert for each, answers drawn by a seed."""

import gzip
import importlib.util
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

# Small matrices are multiplied faster by one thread, and many times faster so on a busy machine. Read by numpy once.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
import pytest_asyncio

from experts.types import EngineSpec
from experts.vllm import VllmEngine

os.environ["HF_HUB_OFFLINE"] = "1"

SMOLLM2_SHAPES = {"q_proj": (576, 576), "v_proj": (192, 576)}
SMOLLM2_LAYERS = 30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("vllm"):
            if importlib.util.find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip(reason="needs the extra 'cpu'"))
            # vLLM reads fields that it has deprecated itself, and leaves its sockets' context where it fails to start.
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    """SmolLM2 with the adapters 'loud' and 'odd'. Tests on it need ``pytest.mark.asyncio(loop_scope="session")``."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {name: str(random_adapter(folder / name, seed)) for seed, name in enumerate(("loud", "odd"))}
    options = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**28, "adapters": adapters}
    engine = VllmEngine(EngineSpec(engine_id="smol", backend="vllm", model="smollm2-135m-instruct", options=options))
    await engine.load()
    yield engine
    await engine.unload()


def random_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    """A LoRA folder as peft writes it, with random weights large enough to change what SmolLM2 says."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(SMOLLM2_LAYERS):
        for module, (rows, columns) in SMOLLM2_SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.1, (rank, columns)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.1, (rows, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": list(SMOLLM2_SHAPES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


SKILLS = {
    "algebra": "solve the equation for x",
    "law": "the court and the contract",
    "cells": "the membrane of a living cell",
    "prices": "supply and demand of a market",
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


@pytest.fixture
def make_pool(tmp_path):
    """make_pool(questions=.., skilled=.., other=..) -> the folder. Expert i answers skill i with ``skilled``."""

    def make(*, questions=240, skilled=0.9, other=0.3, seed=0, name="toy") -> Path:
        rng = np.random.default_rng(seed)
        folder, skills = tmp_path / name, list(SKILLS)
        rows = [
            {
                "id": f"q{i}",
                "task": skills[i % 4],
                "question": f"{SKILLS[skills[i % 4]]} number {i}",
                "options": ["a", "b", "c", "d"],
                "answer": "ABCD"[int(rng.integers(4))],
            }
            for i in range(questions)
        ]
        experts = [f"{skill}-expert" for skill in skills]
        order = [row["id"] for row in rows]
        head = {
            "name": name,
            "experts": [{"expert_id": e, "params_b": 1 + i, "context_length": 4} for i, e in enumerate(experts)],
            "splits": {"train": order[: questions // 2], "val": [], "test": order[questions // 2 :]},
        }
        folder.mkdir()
        (folder / "pool.json").write_text(json.dumps(head))
        write_rows(folder / "questions.jsonl.gz", rows)
        for number, expert in enumerate(experts):
            write_rows(folder / "responses" / f"{expert}.jsonl.gz", _answers(rng, rows, number, skilled, other))
        return folder

    return make


def _answers(rng, rows, expert, skilled, other):
    for number, row in enumerate(rows):
        right = rng.random() < (skilled if number % 4 == expert else other)
        wrong = [letter for letter in "ABCD" if letter != row["answer"]]
        yield {
            "id": row["id"],
            "answer": row["answer"] if right else wrong[int(rng.integers(3))],
            "score": float(right),
            "text": None,
            "completion_chars": 100,
        }
