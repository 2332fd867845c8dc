"""Adapters for CoLLiE through peft. This file only describes them: it costs neither torch nor pydantic."""

from collie_core.api import AdapterCan, Component

ADALORA = Component(
    build="collie_peft.adalora:AdaLoraAdapter",
    config="collie_peft.adalora_config:AdaLoraConfig",
    summary="LoRA with a budget of ranks that goes where it matters, through peft (arXiv 2303.10512)",
    can=AdapterCan(starts_as_identity=True),
)
BOTTLENECK = Component(
    build="collie_peft.bottleneck:BottleneckAdapter",
    config="collie_peft.bottleneck_config:BottleneckConfig",
    summary="small networks after the outputs of layers (arXiv 1902.00751, 2005.00247)",
    can=AdapterCan(starts_as_identity=True),
)
IA3 = Component(
    build="collie_peft.ia3:Ia3Adapter",
    config="collie_peft.ia3_config:Ia3Config",
    summary="learned factors on outputs or inputs of layers, through peft (arXiv 2205.05638)",
    can=AdapterCan(starts_as_identity=True),
)
LORA = Component(
    build="collie_peft.lora:LoraAdapter",
    config="collie_peft.lora_config:LoraConfig",
    summary="low-rank adaptation through peft (arXiv 2106.09685), with rsLoRA and DoRA",
    can=AdapterCan(starts_as_identity=True),
)
LLAMA_ADAPTER = Component(
    build="collie_peft.llama_adapter:LlamaAdapter",
    config="collie_peft.llama_adapter_config:LlamaAdapterConfig",
    summary="gated prompts in the attention of the last layers, through peft (arXiv 2303.16199)",
    can=AdapterCan(peft_type="ADAPTION_PROMPT", starts_as_identity=True),
)
P_TUNING = Component(
    build="collie_peft.prompt:PTuningAdapter",
    config="collie_peft.prompt_config:PTuningConfig",
    summary="embeddings before the tokens, which a small network makes, with peft's encoder (arXiv 2103.10385)",
)
PREFIX_TUNING = Component(
    build="collie_peft.prompt:PrefixTuningAdapter",
    config="collie_peft.prompt_config:PrefixTuningConfig",
    summary="keys and values before those of every layer, with peft's encoder (arXiv 2101.00190)",
)
PROMPT_TUNING = Component(
    build="collie_peft.prompt:PromptTuningAdapter",
    config="collie_peft.prompt_config:PromptTuningConfig",
    summary="learned embeddings before the tokens, with peft's encoder (arXiv 2104.08691)",
)

__all__ = ["ADALORA", "BOTTLENECK", "IA3", "LLAMA_ADAPTER", "LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"]
