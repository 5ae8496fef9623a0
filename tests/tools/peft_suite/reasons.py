"""Why tests of PEFT's fail on a view: each reason, and a pattern of the test's name and error. The first one counts.

A pattern names tests, and of a test that may fail in several ways the error too, so that another failure has no reason.
"""

from __future__ import annotations

_WORKS = (
    r"(adding_multiple_adapters_with_bias|(alpha|rank)_pattern_and_rslora|incompatible_mamba_modules|different_prng|"
    r"multiple_configs_with_bias|mixing_save_projection|second_adapter_with_(higher_rank|incompatible_input_shape)|batches_training_mode|"
    r"rank_not_divisible|input_dtype_casting|generate_pos_args).* DID NOT RAISE"
)
REASONS: dict[str, str] = {
    "PEFT refuses it, and it works here": _WORKS,
    "the name of an adapter is not that of a module here, so it cannot clash with one": (
        r"naming_conflict_\w+ .*any\(|(modules_to_save|trainable_token_indices)_targets_lora_layer_raises.* Regex"
    ),
    "experts are one parameter in this model, and adapting that needs `target_parameters`": (
        r"partial_fusion_raises.* Regex pattern did not match"
    ),
    "the test replaces `state_dict`, which `save_pretrained` does not ask": r"missing_keys_warning .*any\(",
    "PiSSA and OLoRA do not change the base's weights here, so their files are plain LoRA of twice the rank": (
        r"(pissa|olora)\w*_conversion\w* .*assert 16 == 8"
    ),
    "PiSSA and OLoRA do not change the base's weights here, so nothing warns of other adapters": (
        r"load_pissa_olora_with_other_adapter_warns"
    ),
    "one layer alone cannot be merged, gets no parameters from outside, and has no `_active_adapter` that can be set": (
        r"safe_merge_does_not_mutate_base_layer_on_non_finite_bias|_irregular|access_non_existing_adapter"
    ),
    "an embedding that is adapted and was not resized is not saved beside its adapter": (
        r"save_pretrained_targeting_lora_to_embedding_layer.*-auto\]"
    ),
    "the adapter of a class that nobody registered here: PEFT has dispatch functions, adapterkit has kinds of layers": (
        r"TestDynamicDispatch"
    ),
    "PEFT adapts modules inside its own model, and a view adapts the base": r"test_get_peft_model_repeated_invocation",
    "PEFT trains the base's own biases; here each adapter has its own": r"test_lora_with_bias_argument",
    "the view folds scalings into the factors, so `scaling` stays a number": r"hotswap_scalings_are_tensors",
    "the test counts rows of PEFT's grouped convolutions": r"hotswap_conv2d_groups_rank_padding_works",
    "where the file of `hotswap_adapter` lacks a layer, `lora_B` alone becomes zero": r"hotswap_missing_key",
    "`key_mapping` is refused: keys of older versions of a model are those of its base": r"key_mapping",
    "a layer takes no `adapter_names`; the view does": r"embed_scale_is_applied_mixed_batch",
    "the input of a layer is always cast to the adapter's dtype: layers have no `cast_input_dtype_enabled`": (
        r"cast_input_dtype_enabled"
    ),
    "the config keeps `target_modules` as it was written, where PEFT makes a long list shorter": (
        r"applies_find_target_modules"
    ),
    "`lora_A[...]` is a holder of the weight, and not an `nn.Linear`": r"second_adapter_with_all_linear_works",
    "PEFT's private functions find the adapters of a view, and not those of its model": (
        r"prefixes_model_with_injected_layers_only"
    ),
    "`nn.MultiheadAttention` cannot be adapted": r"is a MultiheadAttention, which cannot be adapted",
    "a layer shows the fields of its own class": r"repr_lora_conv1d .*in_features=5",
    "where the last trained copy of a module is removed, nothing of PEFT's is left": (
        r"delete_adapter_multiple_adapters_with_modules_to_save .*no attribute 'modules_to_save'"
    ),
    "a model of mocks, of whose type nothing is known": r"MagicMock",
    "initial values come from a generator for each layer, not from the global one": (
        r"test_lora_\w*_(default|init)|different_scaling\[|"
        r"only_params_are_updated\[Embedding .*assert not True"
    ),
    "tied weights are parted by the merge itself, so nothing warns of it": (
        r"warn_for_tied_embeddings_merge|fixes_tie_word_embeddings"
    ),
    "a file of shards is refused when it is read, and not when it is written": r"warns_for_unsharded_state_dict",
    "outputs differ by a few roundings more than the test allows": (
        r"test_safe_merge\[Vanilla MLP 4 VeRA|fsdp_wrapped\[Conv1d LOHA|"
        r"fsdp_wrapped_learnable_bias\[bias_all-Vanilla MLP 5 LoRA"
    ),
}
