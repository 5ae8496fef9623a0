"""Adapters for any torch model, where every adapter method is a plugin."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from adapterkit.adapters import Adapters, attach
from adapterkit.combiners import Combiner
from adapterkit.config import AdapterConfig
from adapterkit.errors import (
    AdapterError,
    AdapterWarning,
    CheckpointError,
    ConfigError,
    PluginError,
    SaveError,
    SelectionError,
    StateError,
    UnknownNameError,
    UnsupportedError,
)
from adapterkit.extract import extract
from adapterkit.factors import Factors
from adapterkit.factorstack import FactorStack
from adapterkit.features import features
from adapterkit.foreign import ForeignFile, ForeignLayers, with_patterns
from adapterkit.hookspecs import hookimpl
from adapterkit.keys import KeyRule
from adapterkit.kinds import LayerKind
from adapterkit.layer import AdapterLayer, Holder
from adapterkit.matching import PatternTable
from adapterkit.preview import LayerGroup, Preview, preview, read_config
from adapterkit.readers import declare_reader, effective_weight
from adapterkit.registry import Registry, default_registry
from adapterkit.reports import AddReport, CombineReport, LoadReport, Status, SwapReport
from adapterkit.selection import Selection, select
from adapterkit.target import Target

# What is not needed beside a model is imported when it is asked for: `import adapterkit` costs little beside torch.
_LATE = {
    "ExtensionInfo": "adapterkit.describe",
    "MethodInfo": "adapterkit.describe",
    "MethodsReport": "adapterkit.describe",
    "describe_methods": "adapterkit.describe",
    "Checkpoint": "adapterkit.disk.checkpoint",
    "combine_files": "adapterkit.disk.combination",
    "convert_file": "adapterkit.disk.conversion",
    "diff_adapters": "adapterkit.disk.difference",
    "AdapterDiff": "adapterkit.disk.diffreport",
    "extract_files": "adapterkit.disk.extraction",
    "AdapterInspection": "adapterkit.disk.inspection",
    "LayerInspection": "adapterkit.disk.inspection",
    "inspect_adapter": "adapterkit.disk.inspection",
    "MergeReport": "adapterkit.disk.merge",
    "merge_checkpoint": "adapterkit.disk.merge",
    "skeleton": "adapterkit.disk.skeleton",
    "Report": "adapterkit.report",
    "write_report": "adapterkit.report",
    "new_package": "adapterkit.scaffold",
}

if TYPE_CHECKING:
    from adapterkit.describe import ExtensionInfo, MethodInfo, MethodsReport, describe_methods
    from adapterkit.disk.checkpoint import Checkpoint
    from adapterkit.disk.combination import combine_files
    from adapterkit.disk.conversion import convert_file
    from adapterkit.disk.difference import diff_adapters
    from adapterkit.disk.diffreport import AdapterDiff
    from adapterkit.disk.extraction import extract_files
    from adapterkit.disk.inspection import AdapterInspection, LayerInspection, inspect_adapter
    from adapterkit.disk.merge import MergeReport, merge_checkpoint
    from adapterkit.disk.skeleton import skeleton
    from adapterkit.report import Report, write_report
    from adapterkit.scaffold import new_package
else:

    def __getattr__(name: str) -> Any:
        if name not in _LATE:
            raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(_LATE[name]), name)
        return found


__version__ = version("adapterkit")

config = default_registry.config
method = default_registry.method
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
    "Checkpoint",
    "CheckpointError",
    "CombineReport",
    "Combiner",
    "ConfigError",
    "ExtensionInfo",
    "FactorStack",
    "Factors",
    "ForeignFile",
    "ForeignLayers",
    "Holder",
    "KeyRule",
    "LayerGroup",
    "LayerInspection",
    "LayerKind",
    "LoadReport",
    "MergeReport",
    "MethodInfo",
    "MethodsReport",
    "PatternTable",
    "PluginError",
    "Preview",
    "Registry",
    "Report",
    "SaveError",
    "Selection",
    "SelectionError",
    "StateError",
    "Status",
    "SwapReport",
    "Target",
    "UnknownNameError",
    "UnsupportedError",
    "attach",
    "combine_files",
    "config",
    "convert_file",
    "declare_reader",
    "describe_methods",
    "diff_adapters",
    "effective_weight",
    "extract",
    "extract_files",
    "features",
    "hookimpl",
    "inspect_adapter",
    "merge_checkpoint",
    "method",
    "methods",
    "new_package",
    "preview",
    "read_config",
    "register",
    "select",
    "skeleton",
    "with_patterns",
    "write_report",
]
