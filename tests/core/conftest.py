"""What several files of this folder use: a snapshot of all that `detach` must give back, and trained adapters."""

from __future__ import annotations

import copy
import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that may differ after adapters have been on it and are gone."""
    modules = dict(model.named_modules(remove_duplicate=False))
    config = getattr(model, "config", None)
    return {
        "values": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "classes": {path: type(module) for path, module in modules.items()},
        "attributes": {path: sorted(module.__dict__) for path, module in modules.items()},
        "children": {path: list(module._modules) for path, module in modules.items()},
        "hooks": {path: [list(getattr(module, kind).values()) for kind in HOOKS] for path, module in modules.items()},
        "requires_grad": {path: p.requires_grad for path, p in model.named_parameters(remove_duplicate=False)},
        "training": {path: module.training for path, module in modules.items()},
        "config": copy.deepcopy(config.to_dict()) if hasattr(config, "to_dict") else None,
        "num_labels": getattr(model, "num_labels", None),
        "not saved": getattr(model, "_keys_to_ignore_on_save", None),
    }


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is what it was when `before` was taken, bit for bit."""
    now = snapshot(model)
    old_values, new_values = before["values"], now["values"]
    assert list(old_values) == list(new_values)
    for key, value in old_values.items():
        assert value.is_meta or torch.equal(value, new_values[key]), key
    for what in before.keys() - {"values"}:
        assert now[what] == before[what], what


def set_parameters(adapters: ak.Adapters, name: str, seed: int = 0, scale: float = 0.3) -> None:
    """Give an adapter weights it could have after training: none of them zero, all of them its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))


@pytest.fixture
def trained() -> Callable[..., ak.Adapters]:
    """`trained(model, "a", "b", target_modules=[...])`: its adapters, these added as if trained, none active."""

    def make(model: nn.Module, *names: str, **fields: Any) -> ak.Adapters:
        adapters = ak.attach(model)
        for name in names:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(adapters))
                adapters.add(name, LoraConfig(**{"r": 2, **fields}), activate=False)
            set_parameters(adapters, name, seed=len(adapters))
        return adapters

    return make


def different(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by more than rounding: the test would otherwise compare nothing."""
    return a.shape != b.shape or (a - b).abs().max().item() > 1e-4


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`install("dist", "name", code)`: a distribution on `sys.path` with one plugin in an entry-point group."""
    modules: list[str] = []

    def make(dist: str, name: str, code: str, group: str = "adapterkit.methods", types: str = "") -> None:
        site = tmp_path / dist
        module = f"plugin_of_{dist}"
        info = site / f"{dist}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module} {types}\n")
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        monkeypatch.syspath_prepend(site)
        modules.append(module)

    yield make
    for module in modules:
        sys.modules.pop(module, None)
    importlib.invalidate_caches()
