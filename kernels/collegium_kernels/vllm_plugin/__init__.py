"""Our experts inside vLLM, for any softmax top-k model: ``quantization="collegium"`` (the checkpoint's own weights),
``"collegium_int8"`` or ``"collegium_int4"``.

vLLM calls ``register`` in each of its processes (entry point ``vllm.general_plugins``).
"""


def register() -> None:
    """Make the three methods known. Doing it again changes nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from collegium_kernels.vllm_plugin.config import Int4Config, Int8Config, NativeConfig
    from collegium_kernels.vllm_plugin.op import register_op

    register_op()
    for config in (NativeConfig, Int8Config, Int4Config):
        if config.method not in QUANTIZATION_METHODS:
            register_quantization_config(config.method)(config)
