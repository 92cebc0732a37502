"""vLLM's view of our experts: a quantisation config, and the method it gives to each layer of experts.

Experts are packed, and quantised where the method says so, while the checkpoint loads; everything else in the model
stays as it is.
Legend: T tokens, E experts.
"""

import json
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from collegium_kernels.backends import Precision
from collegium_kernels.moe import FusedMoE
from collegium_kernels.quant import ACTIVATION_BITS, GROUPS
from collegium_kernels.vllm_plugin.op import experts_op
from collegium_kernels.vllm_plugin.routing import RoutingPolicy, route

OPTIONS = {"group", "activation_bits", "routing", "p"}


class CollegiumConfig(QuantizationConfig):
    """Options, in the checkpoint's ``quantization_config`` or as JSON in ``hf_overrides``
    (``quantization_config_dict_json``): group, activation_bits (8 or 16), routing (top_k or top_p) and p."""

    method: ClassVar[str]
    precision: ClassVar[Precision]

    def __init__(self, *, group: int = 128, activation_bits: int = 8, policy: RoutingPolicy | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.group, self.activation_bits, self.policy = group, activation_bits, policy or RoutingPolicy()

    def get_name(self) -> Any:
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CollegiumConfig":
        unknown = set(config) - OPTIONS - {"quant_method"}
        if unknown:
            raise ValueError(f"{cls.method} does not know {sorted(unknown)}; its options are {sorted(OPTIONS)}.")
        if "p" in config and config.get("routing") != "top_p":
            raise ValueError(f'{cls.method}: p is read with "routing": "top_p" only; add that, or leave p out.')
        group, activation_bits = config.get("group", 128), config.get("activation_bits", 8)
        for name, value, allowed in (("group", group, GROUPS), ("activation_bits", activation_bits, ACTIVATION_BITS)):
            if value not in allowed or not isinstance(value, int):
                raise ValueError(f"{cls.method}: {name} {value!r} is not one of {', '.join(map(str, allowed))}.")
        if not isinstance(p := config.get("p", 0.9), int | float):
            raise ValueError(f"{cls.method}: p {p!r} is not a number.")  # noqa: TRY004 - vLLM shows these
        policy = RoutingPolicy(kind=config.get("routing", "top_k"), p=p)
        return cls(group=group, activation_bits=activation_bits, policy=policy)

    @classmethod
    def from_config_dict_json(cls, text: str) -> "CollegiumConfig":
        return cls.from_config(json.loads(text))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return CollegiumMoEMethod(layer.moe_config, self)
        return None


class NativeConfig(CollegiumConfig):
    """Nothing is quantised: our dispatch, and with it ragged routing, over the checkpoint's weights."""

    method, precision = "collegium", "native"


class Int8Config(CollegiumConfig):
    method, precision = "collegium_int8", "int8"


class Int4Config(CollegiumConfig):
    method, precision = "collegium_int4", "int4"


class CollegiumMoEMethod(FusedMoEMethodBase):
    """One layer's experts. Routing happens here, from the logits, so that it may be ragged."""

    def __init__(self, moe: FusedMoEConfig, config: CollegiumConfig) -> None:
        super().__init__(moe)
        self._config = config
        self._experts: FusedMoE | None = None

    @property
    def is_monolithic(self) -> bool:
        return True

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        _refuse_what_we_cannot(layer)
        shapes = {
            "w13_weight": (num_experts, 2 * intermediate_size_per_partition, hidden_size),
            "w2_weight": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, extra_weight_attrs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantise and pack; the layer gives up the loaded weights."""
        config = self._config
        self._experts = FusedMoE(
            layer.w13_weight.data,
            layer.w2_weight.data,
            precision=config.precision,
            group=config.group,
            activation_bits=config.activation_bits,
        )
        for parameter in (layer.w13_weight, layer.w2_weight):
            parameter.data = parameter.data.new_empty(0)

    def apply_monolithic(
        self, layer: RoutedExperts, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        return experts_op(x, router_logits, layer.layer_name)

    def run(self, layer: RoutedExperts, x: Tensor, router_logits: Tensor) -> Tensor:
        if self._experts is None:
            raise RuntimeError("the experts were used before their weights were loaded")
        routing = route(router_logits, self._config.policy, k=layer.top_k, renormalise=layer.renormalize)
        return self._experts(x, routing)


def _refuse_what_we_cannot(layer: RoutedExperts) -> None:
    """A model that routes or activates in another way would give wrong text in silence."""
    parallel = layer.moe_config.moe_parallel_config
    reasons = {
        "grouped top-k": layer.use_grouped_topk,
        "a custom routing function": layer.custom_routing_function is not None,
        f"{layer.scoring_func} scores": layer.scoring_func != "softmax",
        "a score correction": layer.e_score_correction_bias is not None,
        "routed weights on the input": layer.apply_router_weight_on_input,
        "biases": layer.moe_config.has_bias,
        f"the activation {layer.activation}": str(getattr(layer.activation, "value", layer.activation)) != "silu",
        "expert or tensor parallelism": parallel.use_ep or parallel.tp_size > 1,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"{layer.layer_name} uses {', '.join(found)}; the collegium methods do not support that.")
