"""One vLLM engine for the whole session: starting it takes ten times as long as the tests on it."""

import importlib.util
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

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
