"""A llama GGUF file to a checkpoint that vLLM and transformers load: bf16 safetensors, config, tokenizer.

Done tensor by tensor with numpy alone, so that it needs neither torch nor twice the model's memory. transformers can
read GGUF too, but takes the tokenizer of every llama for Llama 3's, which cuts numbers and words differently.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experts.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

    from experts.models import Progress

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


@dataclass(frozen=True, slots=True)
class _Source:
    """The GGUF file's metadata by key and its tensors."""

    meta: Mapping[str, Any]
    tensors: "list[ReaderTensor]"

    def llama(self, key: str) -> Any:
        return self.meta[f"llama.{key}"]


def convert_gguf(source: Path, folder: Path, progress: "Progress") -> None:
    """Write the checkpoint of ``source`` into ``folder``. Raises ConfigError when it is not a llama."""
    try:
        from gguf import GGUFReader
    except ImportError as exc:
        raise ConfigError("Reading GGUF files needs the package 'gguf': pip install gguf.") from exc
    gguf = _read(GGUFReader(source))
    if gguf.meta["general.architecture"] != "llama" or gguf.meta["tokenizer.ggml.model"] != "gpt2":
        raise ConfigError(f"{source.name} is no llama with a byte-level tokenizer; only those can be converted.")
    _write_weights(gguf, folder / "model.safetensors", progress)
    _write_json(folder / "config.json", _config(gguf))
    _write_json(folder / "generation_config.json", _special_ids(gguf.meta))
    _write_json(folder / "tokenizer.json", _tokenizer(gguf.meta))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(gguf))


def _read(reader: "GGUFReader") -> _Source:
    return _Source({key: field.contents() for key, field in reader.fields.items()}, list(reader.tensors))


def _write_weights(gguf: _Source, path: Path, progress: "Progress") -> None:
    """safetensors is a header with every tensor's place, then the bytes: written as they come."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in gguf.tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]
        header[_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    progress.start(f"converting to {path.name}", len(gguf.tensors), "tensors")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for weights in _weights(gguf):
            file.write(to_bf16(weights).tobytes())
            progress.advance(1)


def _name(name: str) -> str:
    """The name transformers gives the tensor that GGUF calls ``name``."""
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _INNER:
        raise ConfigError(f"The GGUF file has a tensor '{name}' that no llama has; it cannot be converted.")
    return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.{parts[3]}"


def _weights(gguf: _Source) -> Iterator[NDArray[np.float32]]:
    from gguf import dequantize

    heads = {"attn_q": gguf.llama("attention.head_count"), "attn_k": gguf.llama("attention.head_count_kv")}
    for tensor in gguf.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        yield split_halves(weights, heads[part]) if part in heads else weights


def split_halves(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF keeps the two numbers that a rotary embedding turns side by side; transformers half a head apart."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def to_bf16(weights: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest, ties to even. Weights are finite."""
    bits = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def _config(gguf: _Source) -> dict[str, Any]:
    heads = gguf.llama("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": gguf.llama("embedding_length"),
        "intermediate_size": gguf.llama("feed_forward_length"),
        "num_hidden_layers": gguf.llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.llama("attention.head_count_kv"),
        "head_dim": gguf.meta.get("llama.rope.dimension_count", gguf.llama("embedding_length") // heads),
        "max_position_embeddings": gguf.llama("context_length"),
        "rms_norm_eps": float(np.format_float_positional(np.float32(gguf.llama("attention.layer_norm_rms_epsilon")))),
        "rope_parameters": {"rope_type": "default", "rope_theta": gguf.llama("rope.freq_base")},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in gguf.tensors),
        "vocab_size": len(gguf.meta["tokenizer.ggml.tokens"]),
        **_special_ids(gguf.meta),
    }


def _special_ids(meta: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": meta.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}


def _tokenizer(meta: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE that reads numbers digit by digit, as every 'smollm' pre-tokenizer does."""
    if meta["tokenizer.ggml.pre"] != "smollm":
        raise ConfigError(f"The GGUF file's pre-tokenizer '{meta['tokenizer.ggml.pre']}' is not known here.")
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(gguf: _Source) -> dict[str, Any]:
    tokens, meta = gguf.meta["tokenizer.ggml.tokens"], gguf.meta
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.llama("context_length"),
        "chat_template": meta["tokenizer.chat_template"],
        **{f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()},
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
