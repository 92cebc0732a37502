"""GGUF to safetensors, on a tiny llama written here."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer

from experts.checkpoints import convert_gguf, split_halves, to_bf16
from experts.errors import ConfigError
from experts.models import Silent

HEADS, KV_HEADS, HEAD, WIDTH, HIDDEN = 4, 2, 8, 32, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
TOKENS = [*SPECIAL, *LETTERS, "ab", "Ġab", "12"]
MERGES = ["a b", "Ġ ab", "1 2"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tensors(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.attn_q": (HEADS * HEAD, WIDTH),
        "blk.0.attn_k": (KV_HEADS * HEAD, WIDTH),
        "blk.0.attn_v": (KV_HEADS * HEAD, WIDTH),
        "blk.0.attn_output": (WIDTH, HEADS * HEAD),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    weights: dict[str, NDArray[np.float32]],
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    quantised: tuple[str, ...] = (),
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, array in weights.items():
        if name in quantised:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp_permute(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """What llama.cpp does to queries and keys on the way to GGUF: row i of a head's first half and row i of its second
    half come to lie side by side."""
    out = np.empty_like(weights)
    size = len(weights) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weights[head * size + i]
            out[head * size + 2 * i + 1] = weights[head * size + size // 2 + i]
    return out


def converted(tmp_path: Path, **options: Any) -> tuple[dict[str, NDArray[np.float32]], Path]:
    weights = tensors(np.random.default_rng(0))
    folder = tmp_path / "out"
    folder.mkdir()
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", weights, **options), folder, Silent())
    return weights, folder


def load(folder: Path) -> dict[str, NDArray[np.float32]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
        return {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118


def test_every_tensor_gets_its_name_and_its_values(tmp_path: Path) -> None:
    weights, folder = converted(tmp_path)
    found = load(folder)
    layer = "model.layers.0."
    assert set(found) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"{layer}self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        f"{layer}input_layernorm.weight",
        f"{layer}post_attention_layernorm.weight",
    }
    # bf16 keeps 8 bits of the mantissa.
    np.testing.assert_allclose(found["model.embed_tokens.weight"], weights["token_embd.weight"], rtol=2**-8)
    np.testing.assert_allclose(found[f"{layer}mlp.down_proj.weight"], weights["blk.0.ffn_down.weight"], rtol=2**-8)
    np.testing.assert_allclose(found[f"{layer}self_attn.v_proj.weight"], weights["blk.0.attn_v.weight"], rtol=2**-8)


@pytest.mark.parametrize(("ours", "theirs", "heads"), [("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)])
def test_queries_and_keys_are_put_back_in_order(tmp_path: Path, ours: str, theirs: str, heads: int) -> None:
    weights, folder = converted(tmp_path)
    found = load(folder)[f"model.layers.0.self_attn.{ours}.weight"]
    np.testing.assert_allclose(llama_cpp_permute(found, heads), weights[f"blk.0.{theirs}.weight"], rtol=2**-8)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (1, 4), (3, 64), (9, 6)])
def test_split_halves_undoes_llama_cpp(heads: int, size: int) -> None:
    weights = np.arange(heads * size * 5, dtype=np.float32).reshape(heads * size, 5)
    np.testing.assert_array_equal(split_halves(llama_cpp_permute(weights, heads), heads), weights)


def test_quantised_tensors_are_unpacked(tmp_path: Path) -> None:
    weights, folder = converted(tmp_path, quantised=("blk.0.ffn_gate.weight", "blk.0.attn_q.weight"))
    gate = load(folder)["model.layers.0.mlp.gate_proj.weight"]
    assert gate.shape == (HIDDEN, WIDTH)
    # Sixteen steps over the range of a block of 32 normal numbers.
    assert np.abs(gate - weights["blk.0.ffn_gate.weight"]).max() < 0.3


def test_bf16_rounds_like_torch() -> None:
    import torch

    rng = np.random.default_rng(1)
    values = np.concatenate(
        [rng.normal(size=4096), rng.normal(size=512) * 1e-38, [0.0, -0.0, 3e38, 1.00390625, 1.01171875]]
    )
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bf16(values), expected)


def test_config_says_what_transformers_wants_to_know(tmp_path: Path) -> None:
    _, folder = converted(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (HEADS, KV_HEADS, HEAD)
    assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-5, 10_000.0)
    assert config["tie_word_embeddings"] is True
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_transformers_runs_what_was_converted(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder = converted(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    ids = tokenizer("ab 12", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert model(ids).logits.isfinite().all()


def test_numbers_are_read_digit_by_digit_and_specials_whole(tmp_path: Path) -> None:
    _, folder = converted(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|>ab ab12<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "ab", "Ġab", "1", "2", "<|im_end|>"]
    assert encoded.ids[0] == 1
    assert tokenizer.decode(encoded.ids) == "ab ab12"


def test_output_matrix_of_its_own_unties_the_embedding(tmp_path: Path) -> None:
    weights = tensors(np.random.default_rng(0))
    weights["output.weight"] = weights["token_embd.weight"] + 1
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", weights), tmp_path, Silent())
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load(tmp_path)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny\.gguf is no llama"):
        converted(tmp_path, architecture="gemma3")


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pre-tokenizer 'llama-bpe' is not known"):
        converted(tmp_path, pre="llama-bpe")


def test_tensor_that_no_llama_has_is_named(tmp_path: Path) -> None:
    weights = {**tensors(np.random.default_rng(0)), "blk.0.attn_q.bias.extra": np.ones(4, np.float32)}
    with pytest.raises(ConfigError, match=r"tensor 'blk\.0\.attn_q\.bias\.extra'"):
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", weights), tmp_path, Silent())
