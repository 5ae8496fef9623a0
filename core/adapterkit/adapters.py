"""Adapters: all adapters of one model, and everything one does with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from adapterkit.combination import Combination
from adapterkit.errors import ConfigError
from adapterkit.keys import ATTRIBUTE
from adapterkit.wrapped import watch

if TYPE_CHECKING:
    from adapterkit.report import Report

# Wrappers that only forward to the model inside: the adapters are the inner model's.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def attach(model: nn.Module) -> Adapters:
    """The adapters of this model: made at the first call, the same object at every later one.

    Changes nothing by itself. A model wrapped by `torch.compile`, `DistributedDataParallel` or DeepSpeed's engine has
    the adapters of the model inside; torch's `AveragedModel` those of its copy.

    Attach to the whole model, not to a model inside it: the outer model's `save_pretrained` and `from_pretrained` would
    not know of the adapters. A transformers model warns when it is saved so.

    Raises:
        ConfigError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach needs a torch.nn.Module, not a {type(model).__name__}.")
    watch()
    model = inner_model(model)
    found = model.__dict__.get(ATTRIBUTE)
    if found is None:
        found = model.__dict__[ATTRIBUTE] = Adapters(model)
    assert isinstance(found, Adapters)
    return found


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers that only forward to it."""
    name = _WRAPPERS.get(type(model).__name__)
    inner = None if name is None else model._modules.get(name)
    return model if inner is None else inner_model(inner)


class Adapters(Combination):
    """The adapters of one model. Made by `attach`.

    A call that raises has changed nothing.
    """

    def report(self, *names: str, out: str | Path | None = None, title: str | None = None) -> Report:
        """A page to look at: which layers these adapters change most, which rank is enough, what can be merged.

        A notebook shows it; `print` gives its verdicts; `save(path)`, or `out=`, writes one self-contained HTML file.
        Nothing is changed, and no dense matrix is made. Sizes are relative to the base's weights where these are in
        memory.

        Args:
            names: the adapters; none: all of them.
            title: the page's.

        Raises:
            UnknownNameError: no such adapter.
            ConfigError: there is none, or one is named twice.
            StateError: values that are not finite, or on the meta device.
            UnsupportedError: matplotlib is not installed (the extra `report`).
            SaveError: the file cannot be written.
        """
        from adapterkit.report import Report
        from adapterkit.report.live import live_sources

        records = [self._record(name) for name in names or self.names]
        for name in names or self.names:
            self._warn_if_changed(name, "The report shows what was trained there, beside the base as it was.")
        with self._as_wholes(records):
            report = Report.of(live_sources(records, self._merged), title)
        if out is not None:
            report.save(out)
        return report
