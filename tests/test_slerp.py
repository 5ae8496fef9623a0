"""The example of a third party's combiner: its numbers, and that an installed package is found."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.combining import deltas, nothing_changes, same, tiny
from tests.processes import python
from torch import Tensor

import adapterkit as ak

FOLDER = Path(__file__).parents[1] / "examples" / "thirdparty" / "adapterkit_slerp"


@pytest.fixture
def slerp(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    plugin = importlib.import_module("adapterkit_slerp")
    ak.default_registry.extend(plugin)
    yield plugin
    ak.default_registry.retract(plugin)
    sys.modules.pop("adapterkit_slerp")


def arc(x: Tensor, y: Tensor, share: float) -> Tensor:
    """Shoemake's formula, entry by entry as written."""
    a = torch.acos((x * y).sum() / x.norm() / y.norm())
    return torch.sin((1 - share) * a) / torch.sin(a) * x + torch.sin(share * a) / torch.sin(a) * y


@pytest.mark.parametrize("space", ["delta", "core"])
def test_adapters_are_combined_along_the_arc(slerp: ModuleType, space: Any) -> None:
    adapters = tiny("bert", {"a": {}, "b": {"r": 2}})
    adapters.combine("c", {"a": 1.0, "b": 3.0}, method="slerp", space=space)
    a, b = deltas(adapters, "a"), deltas(adapters, "b")
    same(deltas(adapters, "c"), {path: arc(a[path], b[path], 0.75) for path in a})


def test_changes_of_one_length_keep_it(slerp: ModuleType) -> None:
    stack = torch.nn.functional.normalize(torch.randn(2, 12, dtype=torch.float64), dim=1).view(2, 3, 4)
    found = slerp.slerp(stack, torch.tensor([0.5, 0.5]), None)
    assert float(found.norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("other", [1.0, -1.0, 0.0])
def test_where_there_is_no_arc_it_is_the_straight_line(slerp: ModuleType, other: float) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    found = slerp.slerp(torch.stack([x, other * x]), torch.tensor([3.0, 1.0]), None)
    torch.testing.assert_close(found, (0.75 + 0.25 * other) * x)


def test_three_adapters_have_no_arc(slerp: ModuleType) -> None:
    adapters = tiny("bert", {"a": {}, "b": {}, "c": {}})
    with nothing_changes(adapters), pytest.raises(ak.ConfigError, match="slerp goes from one adapter to another: it"):
        adapters.combine("d", {"a": 1.0, "b": 1.0, "c": 1.0}, method="slerp")


def test_the_built_distribution_is_found_through_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=FOLDER)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    found = ak.Registry().combiner("slerp")
    assert found.function.__module__ == "adapterkit_slerp"
    assert Path(sys.modules.pop("adapterkit_slerp").__file__ or "").parent == tmp_path
