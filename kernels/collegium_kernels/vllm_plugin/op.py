"""One layer's experts as an operator that torch.compile does not look into: routing there may be ragged, and the sizes
then depend on the values. Legend: T tokens, D width, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

NAME = "collegium_experts"


def experts_op(x_TD: Tensor, logits_TE: Tensor, layer_name: str) -> Tensor:
    """The layer of this name does it, in its ``run``: an operator takes no objects."""
    y_TD: Tensor = getattr(torch.ops.vllm, NAME)(x_TD, logits_TE, layer_name)
    return y_TD


def register_op() -> None:
    """Make the operator known. Doing it again changes nothing."""
    if not hasattr(torch.ops.vllm, NAME):
        direct_register_custom_op(op_name=NAME, op_func=_run, fake_impl=_shape)


def _run(x_TD: Tensor, logits_TE: Tensor, layer_name: str) -> Tensor:
    layer: Any = get_forward_context().no_compile_layers[layer_name]
    y_TD: Tensor = layer.routed_experts.quant_method.run(layer.routed_experts, x_TD, logits_TE)
    return y_TD


def _shape(x_TD: Tensor, logits_TE: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x_TD)
