"""A Mixtral whose experts are all the dense model's feed-forward network, and a router drawn at random.

With weights that sum to 1 it answers exactly as the dense model does, whatever the router says: a test for experts.
"""

from typing import Any

import torch
from torch import Tensor


def upcycle(dense: Any, *, num_experts: int = 4, k: int = 2, seed: int = 0, paired: bool = False) -> Any:
    """A MixtralForCausalLM from a LlamaForCausalLM, in the same dtype.

    ``paired`` gives experts 0 and 1, 2 and 3, ... the same score: a token's top-2 is one of the pairs, and its weights
    are exactly a half each, so that the layer's output has the very bits of one expert's. Raises ValueError for a
    number of experts that has no such pairs, or fewer than ``k``.
    """
    if not 0 < k <= num_experts:
        raise ValueError(f"k is {k}: it must lie between 1 and num_experts, which is {num_experts}.")
    if paired and num_experts % 2:
        raise ValueError(f"num_experts is {num_experts}: experts come in pairs with paired=True, so it must be even.")
    from transformers import MixtralConfig, MixtralForCausalLM

    c = dense.config
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.hidden_size // c.num_attention_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=c.rope_parameters,
        tie_word_embeddings=c.tie_word_embeddings,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
        num_local_experts=num_experts,
        num_experts_per_tok=k,
    )
    with torch.device("meta"):
        sparse = MixtralForCausalLM(config)
    sparse.to_empty(device="cpu").to(dense.dtype)
    weights = _weights(dense.state_dict(), sparse.state_dict(), num_experts, seed)
    if paired:
        weights = {
            n: w[::2].repeat_interleave(2, 0) if n.endswith("mlp.gate.weight") else w for n, w in weights.items()
        }
    sparse.load_state_dict(weights, strict=False)
    fresh = type(sparse.model.rotary_emb)(config)
    sparse.model.rotary_emb = fresh
    sparse.tie_weights()
    sparse.train(False)
    return sparse


def _weights(dense: dict[str, Tensor], wanted: dict[str, Tensor], num_experts: int, seed: int) -> dict[str, Tensor]:
    """The dense tensors under Mixtral's names."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, like in wanted.items():
        stem = name.partition(".mlp.")[0] + ".mlp."
        if name.endswith("mlp.gate.weight"):
            made[name] = torch.randn(like.shape, generator=generator).to(like.dtype) / like.shape[1] ** 0.5
        elif name.endswith("experts.gate_up_proj"):
            both = torch.cat([dense[f"{stem}gate_proj.weight"], dense[f"{stem}up_proj.weight"]])
            made[name] = both.expand(num_experts, -1, -1)
        elif name.endswith("experts.down_proj"):
            made[name] = dense[f"{stem}down_proj.weight"].expand(num_experts, -1, -1)
        else:
            made[name] = dense[name]
    return made
