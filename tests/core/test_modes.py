"""What the caller sets for forwards (autocast, inference mode, a default device) changes no number that is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models import build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.report.measuring import measure
from adapterkit.report.sources import stored_sources
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "another default device": lambda: torch.device("meta"),
}


@dataclass
class World:
    """A model with the adapters `a` (LoRA) and `h` (LoHa), the same in files, and two more models.

    Attributes:
        files: a folder with the model `base`, the adapters, and `tuned`: the base with `h` merged.
        out: a folder that is not there yet.
    """

    files: Path
    out: Path
    adapters: ak.Adapters
    base: nn.Module
    tuned: nn.Module

    @classmethod
    def of(cls, files: Path, out: Path) -> World:
        adapters = ak.attach(build("bert"))
        for name in "ah":
            adapters.load(files / name)
        base, tuned = build("bert"), build("bert")
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.mul_(1.5)
        return cls(files, out, adapters, base, tuned)


Call = Callable[[World], Mapping[str, Tensor]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `base`, its adapters `a` and `h`, and `tuned`, the base with `h` merged."""
    folder = tmp_path_factory.mktemp("modes")
    model = build("bert")
    model.save_pretrained(folder / "base")
    adapters = ak.attach(model)
    options: dict[str, Any] = {"target_modules": ["query", "value"], "modules_to_save": None}
    for name, config in (("a", LoraConfig(r=3, **options)), ("h", LoHaConfig(r=6, **options))):
        adapters.add(name, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ord(name))
            for parameter in adapters.parameters(name):
                torch.nn.init.normal_(parameter, std=0.3)
        adapters.save(name, folder / name)
    ak.merge_checkpoint(folder / "base", folder / "h", folder / "tuned")
    return folder


def saved(name: str, call: Callable[[World], ak.Adapters]) -> Call:
    """The tensors of an adapter that a call makes on a model."""
    return lambda world: call(world).state_dict(name)


def written(call: Callable[[World], object]) -> Call:
    """The tensors that a call writes."""

    def tensors(world: World) -> Mapping[str, Tensor]:
        call(world)
        return load_file(next(world.out.glob("*.safetensors")))

    return tensors


def numbers(call: Callable[[World], object]) -> Call:
    """The numbers that a call returns."""
    return lambda world: {"number": torch.tensor(call(world), dtype=torch.float64, device="cpu")}


def merged(world: World) -> Mapping[str, Tensor]:
    world.adapters.merge("a", "h")
    return world.adapters.model.state_dict()


def combined(world: World) -> ak.Adapters:
    world.adapters.combine("new", {"a": 1, "h": -0.5}, method="ties", density=0.5, space="core", rank=4)
    return world.adapters


def swapped(world: World) -> ak.Adapters:
    world.adapters.swap("a", world.files / "a")
    return world.adapters


def extracted(world: World) -> ak.Adapters:
    ak.extract(world.base, world.tuned, rank=2)
    return ak.attach(world.base)


def reported(world: World) -> object:
    findings = measure(stored_sources([world.files / "a", world.files / "h"], ["a", "h"], None))
    return [*(adapter.norm for adapter in findings.adapters), findings.pairs[0, 1].cosine, findings.pairs[0, 1].opposed]


CALLS: dict[str, Call] = {
    "merge": merged,
    "combine": saved("new", combined),
    "swap": saved("a", swapped),
    "extract": saved("extracted", extracted),
    "combine_files": written(lambda w: ak.combine_files({w.files / "a": 1, w.files / "h": 2}, w.out, rank=3)),
    "convert_file": written(lambda w: ak.convert_file(w.files / "h", w.out, rank=2)),
    "extract_files": written(lambda w: ak.extract_files(w.files / "base", w.files / "tuned", w.out, rank=2)),
    "merge_checkpoint": written(lambda w: ak.merge_checkpoint(w.files / "base", [w.files / "a", w.files / "h"], w.out)),
    "inspect_adapter": numbers(lambda w: ak.inspect_adapter(w.files / "h").norm),
    "diff_adapters": numbers(lambda w: [x.distance for x in ak.diff_adapters(w.files / "a", w.files / "h").layers]),
    "report": numbers(reported),
}


@pytest.fixture(scope="module")
def expected(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, Tensor]]:
    """What the calls give without a mode."""
    out = tmp_path_factory.mktemp("expected")
    return {name: call(World.of(files, out / name)) for name, call in CALLS.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_a_mode_for_forwards_changes_no_stored_number(
    call: str, mode: str, files: Path, expected: Mapping[str, Mapping[str, Tensor]], tmp_path: Path
) -> None:
    world = World.of(files, tmp_path / "out")
    with MODES[mode]():
        found = CALLS[call](world)
    assert found.keys() == expected[call].keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[call][key], rtol=1e-5, atol=1e-6)
