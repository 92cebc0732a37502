import json
from pathlib import Path
from typing import Any

import pytest

from experts.errors import ConfigError
from experts.types import EngineSpec
from experts.vllm_options import Options, check_memory, environment, read_options

KNOWN = ["model", "max_model_len", "max_num_seqs", "enforce_eager", "kv_cache_memory_bytes", "tensor_parallel_size"]
GIB = 2**30


def spec(memory_gib: float | None = None, **options: Any) -> EngineSpec:
    return EngineSpec(engine_id="e", backend="vllm", model="m", options=options, memory_gib=memory_gib)


def read(cpu: bool = True, cores: int = 2, model: str = "m", **options: Any) -> Options:
    return read_options(spec(**options), model, KNOWN, cpu=cpu, cores=cores)


def test_what_the_user_says_beats_the_defaults() -> None:
    arguments = read(max_num_seqs=3).arguments
    assert (arguments["model"], arguments["max_num_seqs"], arguments["enforce_eager"]) == ("m", 3, True)


def test_a_gpu_keeps_vllms_own_defaults() -> None:
    options = read(cpu=False)
    assert "enforce_eager" not in options.arguments
    assert "worker_cls" not in options.arguments
    assert "OMP_NUM_THREADS" not in options.environment


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("max_model_length", "max_model_len"), ("adapter", "adapters"), ("cpu_thread", "cpu_threads")],
)
def test_unknown_option_names_the_nearest(option: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"'{option}'; did you mean '{nearest}'"):
        read(**{option: 1})


def test_the_model_is_no_option() -> None:
    said_twice = EngineSpec(engine_id="e", backend="vllm", model="m", options={"model": "other"})
    with pytest.raises(ConfigError, match="unknown option 'model'"):
        read_options(said_twice, "m", KNOWN, cpu=True, cores=2)


def test_small_machine_leaves_a_core_to_the_service_and_saves_a_process() -> None:
    options = read(cores=2)
    assert options.environment["OMP_NUM_THREADS"] == "1"
    assert options.environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert options.arguments["distributed_executor_backend"] == "experts.vllm_executor.OneProcess"


def test_large_machine_is_left_to_vllms_binding() -> None:
    options = read(cores=32)
    assert "OMP_NUM_THREADS" not in options.environment
    assert options.arguments["distributed_executor_backend"] == "experts.vllm_executor.WorkerProcess"


def test_threads_can_be_chosen() -> None:
    assert read(cores=32, cpu_threads=5).environment["OMP_NUM_THREADS"] == "5"


def test_parallel_engines_keep_vllms_executor() -> None:
    assert "distributed_executor_backend" not in read(tensor_parallel_size=2).arguments


def test_compiled_engines_may_compile() -> None:
    assert read().environment["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in read(enforce_eager=False).environment


def test_a_model_that_lies_here_needs_no_hub(tmp_path: Path) -> None:
    assert environment(str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment("someone/some-model")


def adapter(folder: Path, rank: int) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return str(folder)


def test_adapters_make_room_for_the_largest_rank(tmp_path: Path) -> None:
    adapters = {"a": adapter(tmp_path / "a", 4), "b": adapter(tmp_path / "b", 24)}
    arguments = read(adapters=adapters).arguments
    assert arguments["enable_lora"] is True
    assert arguments["max_lora_rank"] == 32
    assert "adapters" not in arguments


@pytest.mark.parametrize(("cpu", "places"), [(True, 2), (False, 1)])
def test_a_cpu_keeps_an_empty_place_for_requests_without_adapter(tmp_path: Path, cpu: bool, places: int) -> None:
    assert read(cpu=cpu, adapters={"a": adapter(tmp_path / "a", 4)}).arguments["max_loras"] == places


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"r": "x"}'])
def test_a_folder_that_is_no_adapter_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match="adapter 'a' is no LoRA folder"):
        read(adapters={"a": str(tmp_path)})


def test_server_options_have_defaults_and_can_be_set() -> None:
    assert read().serving["tool_call_parser"] == "hermes"
    assert read(tool_call_parser="mistral").serving["tool_call_parser"] == "mistral"
    assert "tool_call_parser" not in read(tool_call_parser="mistral").arguments


def test_memory_is_estimated_from_weights_and_cache(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(3 * GIB)
    options = read(model=str(tmp_path), kv_cache_memory_bytes=2 * GIB)
    check_memory(spec(), options, available_bytes=6 * GIB)
    with pytest.raises(ConfigError, match=r"needs about 6\.0 GiB, but only 5\.9 GiB are free"):
        check_memory(spec(), options, available_bytes=int(5.9 * GIB))


def test_memory_is_taken_from_the_config_where_it_says(tmp_path: Path) -> None:
    check_memory(spec(memory_gib=0.5), read(), available_bytes=GIB)
    with pytest.raises(ConfigError, match=r"about 1\.5 GiB"):
        check_memory(spec(memory_gib=1.5), read(), available_bytes=GIB)


def test_cache_space_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    with pytest.raises(ConfigError, match=r"about 41\.0 GiB"):
        check_memory(spec(), read(), available_bytes=8 * GIB)
