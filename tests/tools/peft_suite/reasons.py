"""Why tests of PEFT's fail on a view: each reason, and a pattern of the test's name and error. The first one counts."""

from __future__ import annotations

_PISSA = "PiSSA and OLoRA do not change the base's weights here, so their files are plain LoRA of twice the rank"
_BIAS = "PEFT trains the base's own biases; here each adapter has its own"
_ALONE = "the test changes or merges one layer alone; here adapters act in the whole model or not at all"
_CLASS = "the test asks for PEFT's class of a layer or a tuner, or for its private methods"
_HOTSWAP = "an adapter keeps its rank and scaling: `prepare_model_for_compiled_hotswap` adds no room for larger ranks"
_WORKS = "PEFT refuses it, and it works here"
_WORDS = "an error or a warning is worded in another way, or there is none"

REASONS: dict[str, str] = {
    "where the file of `hotswap_adapter` lacks a layer, `lora_B` alone becomes zero": r"hotswap_missing_key",
    _HOTSWAP: r"hotswap(?!_extra_key)",
    _PISSA: r"(pissa|olora)_conversion|load_pissa_olora",
    _WORKS: r"DID NOT RAISE|Only one adapter can be set at a time|test_generate_pos_args",
    _ALONE: r"has no attribute '(enable_adapters|set_adapter|merge|unmerge)'|irregular",
    _BIAS: r"learnable_bias|test_lora_with_bias_argument",
    _WORDS: (
        r"Regex pattern did not match|DID NOT WARN|SelectionError: |_warn_triggered|\S*warn\S* AssertionError|naming_co"
    ),
    _CLASS: r"isinstance\(|'Tuner' == |assert 0 (==|>) \d+|LayerView|is <class|attribute '_|Scaling|_repr_|plus_embed",
    "`modules()` of a view has no containers by adapter, and a layer takes no `adapter_names`; the view does": (
        r"test_merge_layers_multi|unexpected keyword argument 'adapter_names'"
    ),
    "initial values come from a generator for each layer, not from the global one": r"test_lora_conv2d_(default|init)",
    "`requires_grad` stays as it is in `disable_adapter`": r"Expected \(\) to require gradients",
    "`weight` of a module with trained copies is the base's, and not the active copy's": (
        r"test_transient_attribute_access|test_load_multiple_adapters_different_modules_to_save"
    ),
    "`key_mapping` is refused: keys of older versions of a model are those of its base": r"key_mapping",
    "the views of layers do not say how the base is quantised": r"quantization_backend",
    "outputs differ by a few roundings more than the test allows": r"test_safe_merge|fsdp_wrapped\[Conv1d LOHA",
}
