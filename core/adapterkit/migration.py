"""PEFT's names, and what does the same here: an error that a wrong name raises tells it."""

from __future__ import annotations

# Functions and classes of the package `peft`.
FUNCTIONS = {
    "get_peft_model": "adapters = ak.attach(model); adapters.add(name, config)",
    "inject_adapter_in_model": "ak.attach(model).add(name, config)",
    "prepare_model_for_kbit_training": "ak.attach(model).add(name, config), which freezes the base model by itself",
    "PeftModel": "ak.attach(model).load(folder), or ak.as_peft(model) where a tool needs a PeftModel",
    "TaskType": "text, such as task_type='CAUSAL_LM'",
    "PeftConfig": "ak.read_config(folder), or ak.AdapterConfig",
    "PeftMixedModel": "ak.attach(model): a model may have adapters of any methods",
    "AutoPeftModel": "ak.attach(model).load(folder) on a base model",
    "AutoPeftModelForCausalLM": "ak.attach(model).load(folder) on a base model",
    "AutoPeftModelForSequenceClassification": "ak.attach(model).load(folder) on a base model",
    "get_peft_model_state_dict": "adapters.state_dict(name)",
    "set_peft_model_state_dict": "adapters.load_state_dict(name, tensors)",
    "get_layer_status": "adapters.status()",
    "get_model_status": "adapters.status()",
    "create_loraplus_optimizer": "adapters.parameter_groups(..., lora_plus_ratio=16) for any optimizer",
    "hotswap_adapter": "adapters.swap(name, folder)",
}
# Methods of a `PeftModel`, of its tuner, and of transformers' models with an adapter.
METHODS = {
    "set_adapter": "adapters.activate(name)",
    "add_adapter": "adapters.add(name, config)",
    "load_adapter": "adapters.load(folder, name)",
    "delete_adapter": "adapters.remove(name)",
    "disable_adapter": "with adapters.disabled(): ...",
    "disable_adapters": "adapters.activate() with no name, or with adapters.disabled(): ...",
    "enable_adapters": "adapters.activate(name)",
    "disable_adapter_layers": "adapters.activate() with no name, or with adapters.disabled(): ...",
    "enable_adapter_layers": "adapters.activate(name)",
    "add_weighted_adapter": "adapters.combine(name, {'a': 0.7, 'b': 0.3})",
    "merge_adapter": "adapters.merge(name)",
    "unmerge_adapter": "adapters.unmerge()",
    "merge_and_unload": "model = adapters.merge_and_detach()",
    "unload": "model = adapters.detach()",
    "get_base_model": "adapters.model, which is the base model itself",
    "base_model": "adapters.model, which is the base model itself",
    "save_pretrained": "adapters.save(name, folder)",
    "from_pretrained": "adapters.load(folder, name)",
    "print_trainable_parameters": "print(adapters.status())",
    "get_nb_trainable_parameters": "adapters.status().trainable_parameters",
    "active_adapter": "adapters.active",
    "active_adapters": "adapters.active",
    "peft_config": "adapters.config(name)",
    "targeted_module_names": "adapters.layers(name), whose keys are the paths",
    "get_layer_status": "adapters.status()",
    "get_model_status": "adapters.status()",
    "set_scale": "adapters.activate(name, strengths={name: 0.7})",
    "set_adapters": "adapters.activate('a', 'b', strengths={'a': 0.7})",
    "set_requires_grad": "adapters.activate(name, trainable=True)",
    "parameters_to_train": "adapters.parameters(name)",
    "generate": "adapters.model.generate(...): the model is used as before",
    "forward": "adapters.model(...): the model is used as before",
    "train": "adapters.model.train(): the model is used as before",
    "eval": "adapters.model.eval(): the model is used as before",
    "to": "adapters.model.to(...): adapters move with their model",
}
# Values of `combination_type` in PEFT's `add_weighted_adapter`.
COMBINATIONS = {
    "cat": "method='linear', which is exact",
    "svd": "method='linear' with rank=",
    "linear_svd": "method='linear' with rank=",
    "ties_svd": "method='ties' with rank=",
    "dare_linear_svd": "method='dare_linear' with rank=",
    "dare_ties_svd": "method='dare_ties' with rank=",
    "magnitude_prune_svd": "method='magnitude_prune' with rank=",
}


def advice(name: str, table: dict[str, str]) -> str:
    """A sentence that names what does the same here, to follow an error's; empty if PEFT has no such name."""
    end = "" if table.get(name, "").endswith("...") else "."
    return f" That is PEFT's name; here it is {table[name]}{end}" if name in table else ""
