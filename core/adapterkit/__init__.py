"""Adapters for any torch model, where every adapter method is a plugin."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from adapterkit.adapters import Adapters, attach, extract, penalty
from adapterkit.contract import (
    AdapterConfig,
    AdapterLayer,
    Combiner,
    CombinerOptions,
    DenseLayer,
    Dropout,
    ForeignFile,
    ForeignLayer,
    Format,
    Holder,
    KeyRule,
    Limit,
    LowRankLayer,
    Plugin,
    Probability,
    Rank,
    Registry,
    Shared,
    Target,
    default_registry,
    empty_layer,
    hookimpl,
    kaiming,
    plugin,
)
from adapterkit.errors import (
    AdapterError,
    AdapterWarning,
    CheckpointError,
    ConfigError,
    MissingMethodError,
    PluginError,
    SaveError,
    SelectionError,
    StateError,
    UnknownNameError,
    UnsupportedError,
    UsageError,
    nearest,
)
from adapterkit.features import features
from adapterkit.files import ServingReport, check_serving
from adapterkit.forward import Base, declare_reader, effective_weight
from adapterkit.kinds import Factors, LayerKind
from adapterkit.migration import FUNCTIONS, advice
from adapterkit.model import Selection, select
from adapterkit.preview import LayerGroup, Preview, preview, read_config
from adapterkit.results import AddReport, CombineReport, LoadReport, Status, SwapReport

# What is not needed beside a model is imported when it is asked for: `import adapterkit` costs little beside torch.
_LATE = {
    "ExtensionInfo": "adapterkit.describe",
    "MethodInfo": "adapterkit.describe",
    "MethodsReport": "adapterkit.describe",
    "describe_methods": "adapterkit.describe",
    "Checkpoint": "adapterkit.disk",
    "combine_files": "adapterkit.disk",
    "convert_file": "adapterkit.disk",
    "diff_adapters": "adapterkit.disk",
    "AdapterDiff": "adapterkit.disk",
    "extract_files": "adapterkit.disk",
    "AdapterInspection": "adapterkit.disk",
    "LayerInspection": "adapterkit.disk",
    "inspect_adapter": "adapterkit.disk",
    "MergeReport": "adapterkit.disk",
    "merge_checkpoint": "adapterkit.disk",
    "skeleton": "adapterkit.disk",
    "as_peft": "adapterkit.integrations.peft",
    "from_peft": "adapterkit.integrations.peft",
    "Report": "adapterkit.report",
    "write_report": "adapterkit.report",
    "new_package": "adapterkit.scaffold",
}

if TYPE_CHECKING:
    from adapterkit.describe import ExtensionInfo, MethodInfo, MethodsReport, describe_methods
    from adapterkit.disk import (
        AdapterDiff,
        AdapterInspection,
        Checkpoint,
        LayerInspection,
        MergeReport,
        combine_files,
        convert_file,
        diff_adapters,
        extract_files,
        inspect_adapter,
        merge_checkpoint,
        skeleton,
    )
    from adapterkit.integrations.peft import as_peft, from_peft
    from adapterkit.report import Report, write_report
    from adapterkit.scaffold import new_package


def __getattr__(name: str) -> Any:
    if name in _LATE:
        globals()[name] = found = getattr(import_module(_LATE[name]), name)
        return found
    if name.endswith("Config") and name not in FUNCTIONS:
        return default_registry.config_class(name)
    close = [] if name in FUNCTIONS else nearest(name, __all__)
    hint = f" Did you mean {' or '.join(close)}?" if close else advice(name, FUNCTIONS)
    if name in methods():
        hint = f" ak.config({name!r}) makes a config of that method."
    elif not name.startswith("_") and hasattr(Adapters, name):
        hint = f" A model's adapters have it: ak.attach(model).{name}."
    raise AttributeError(f"module 'adapterkit' has no attribute {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)


__version__ = version("adapterkit")

config = default_registry.config
method = default_registry.method
extend = default_registry.extend
methods = default_registry.methods
register = default_registry.register

__all__ = [
    "AdapterConfig",
    "AdapterDiff",
    "AdapterError",
    "AdapterInspection",
    "AdapterLayer",
    "AdapterWarning",
    "Adapters",
    "AddReport",
    "Base",
    "Checkpoint",
    "CheckpointError",
    "CombineReport",
    "Combiner",
    "CombinerOptions",
    "ConfigError",
    "DenseLayer",
    "Dropout",
    "ExtensionInfo",
    "Factors",
    "ForeignFile",
    "ForeignLayer",
    "Format",
    "Holder",
    "KeyRule",
    "LayerGroup",
    "LayerInspection",
    "LayerKind",
    "Limit",
    "LoadReport",
    "LowRankLayer",
    "MergeReport",
    "MethodInfo",
    "MethodsReport",
    "MissingMethodError",
    "Plugin",
    "PluginError",
    "Preview",
    "Probability",
    "Rank",
    "Registry",
    "Report",
    "SaveError",
    "Selection",
    "SelectionError",
    "ServingReport",
    "Shared",
    "StateError",
    "Status",
    "SwapReport",
    "Target",
    "UnknownNameError",
    "UnsupportedError",
    "UsageError",
    "as_peft",
    "attach",
    "check_serving",
    "combine_files",
    "config",
    "convert_file",
    "declare_reader",
    "describe_methods",
    "diff_adapters",
    "effective_weight",
    "empty_layer",
    "extend",
    "extract",
    "extract_files",
    "features",
    "from_peft",
    "hookimpl",
    "inspect_adapter",
    "kaiming",
    "merge_checkpoint",
    "method",
    "methods",
    "new_package",
    "penalty",
    "plugin",
    "preview",
    "read_config",
    "register",
    "select",
    "skeleton",
    "write_report",
]
