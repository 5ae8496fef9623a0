"""The test kit's own test: what is right passes, and each broken method is caught by the check meant for it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.core import broken_methods
from tests.core.broken_methods import BROKEN, AllShared, BranchesOnAValue, Outer, OuterConfig, SharedOuter
from tests.models import build, inputs
from tests.processes import environment
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.testing import (
    CheckFailure,
    all_checks,
    case,
    check_kind,
    check_peft,
    kit,
    parametrize_with_checks,
    run_check,
    run_checks,
)
from adapterkit.testing.case import NotApplicable
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

NAME = OuterConfig.method
ROOT = Path(__file__).parents[2]


@parametrize_with_checks([LoraConfig(), LoHaConfig(), VeraConfig()])
def test_a_built_in_method(check, config):
    check(config)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layer kinds instead of eight, for tests that are not about kinds."""
    monkeypatch.setattr(case, "PROBES", [probe for probe in case.PROBES if probe.name in case.FEW])


@pytest.mark.usefixtures("few")
@parametrize_with_checks(
    [
        LoraConfig(r=4, lora_alpha=3, use_rslora=True, init_lora_weights=False, bias="all"),
        LoraConfig(lora_bias=True, lora_dropout=0.1, rank_pattern={"up": 3}, alpha_pattern={"down": 5}),
        LoraConfig(r=2, init_lora_weights="orthogonal"),
        LoraConfig(r=2, init_lora_weights="pissa"),
        LoHaConfig(r=3, alpha=2, use_effective_conv2d=True, rank_dropout=0.2, rank_pattern={"up": 2}),
        LoHaConfig(r=2, init_weights=False, module_dropout=0.1),
        VeraConfig(r=8, save_projection=False, vera_dropout=0.1, projection_prng_key=3, bias="vera_only"),
        VeraConfig(r=8, init_weights=False),
    ]
)
def test_the_options_of_a_built_in_method(check, config):
    check(config)


@contextmanager
def registered(plugin: Outer) -> Iterator[ak.AdapterConfig]:
    ak.register(plugin)
    try:
        yield plugin.config()
    finally:
        ak.default_registry.unregister(NAME)


@pytest.mark.parametrize("plugin", [Outer, SharedOuter, AllShared])
def test_what_the_broken_methods_are_made_from_passes(plugin):
    with registered(plugin()) as config:
        results = run_checks(config)
    skipped = {name for name, result in results.items() if result != "passed"}
    expected = {"check_given_fields_act", "check_dense_forms_agree", "check_files_tell_the_layers"}
    expected |= {"check_known_changes_become_adapters"}
    assert skipped == expected | ({"check_shared_tensors_are_one_copy"} if plugin is Outer else set())


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("plugin", BROKEN, ids=lambda plugin: plugin.__name__)
def test_each_broken_method_fails_the_check_meant_for_it_and_no_other(plugin, monkeypatch):
    if BROKEN[plugin] != "check_compiles":
        monkeypatch.setattr(kit.checks_models, "check_compiles", None)  # slow
    with registered(plugin()) as config:
        results = run_checks(config.replace(scale=0.25))
    failed = {name: result for name, result in results.items() if result.startswith("failed")}
    assert failed.keys() == {BROKEN[plugin]}, "\n".join(failed.values())
    if plugin is broken_methods.SharedForwardGivesNothing:
        assert "shared.forward returned None; it must return the output." in failed[BROKEN[plugin]]
    if plugin is BranchesOnAValue:
        assert "expected shapes alone to be enough; it reads values:" in failed[BROKEN[plugin]]


def test_every_check_has_a_broken_method():
    assert set(all_checks()) == set(BROKEN.values())


@pytest.mark.usefixtures("few")
def test_a_check_is_skipped_if_one_that_it_builds_on_failed():
    with registered(broken_methods.FactorsGiveNothing()) as config:
        results = run_checks(config)
        with pytest.raises(NotApplicable, match=r"^check_parameters failed$"):
            run_check(all_checks()["check_pickles"], config)
    assert results["check_config_survives_json"] == "passed"
    assert "layer.factors returned None; it must return a Factors." in results["check_parameters"]
    assert results["check_merge_is_linear"] == "skipped: check_parameters failed"


def test_a_failure_is_told_in_sentences():
    with registered(broken_methods.ForgottenScale()), pytest.raises(CheckFailure) as caught:
        run_check(all_checks()["check_merged_equals_adapted"], OuterConfig(scale=0.25))
    first, contract, here = str(caught.value).splitlines()
    assert first == "check_merged_equals_adapted failed for OuterConfig(scale=0.25)."
    assert contract.startswith("The contract: A merged adapter gives the outputs that it gave active")
    assert here.startswith(
        "Here: The outputs after merging on Linear layers in float64: expected equality within 1e-09"
    )
    assert "they differ by up to" in here


def test_a_failure_names_the_sizes():
    with registered(broken_methods.DependsOnTheWeight()) as config, pytest.raises(CheckFailure) as caught:
        run_check(all_checks()["check_merge_is_linear"], config)
    assert "On layers of 16 x 16 in torch.float64: expected the same change on another weight" in str(caught.value)


def test_an_exception_of_the_method_is_told_with_its_place():
    with registered(broken_methods.NotPicklable()), pytest.raises(CheckFailure, match="on Linear layers in float32"):
        run_check(all_checks()["check_pickles"], OuterConfig())


SUITE = """
import adapterkit as ak
from adapterkit.testing import parametrize_with_checks
from tests.core.broken_methods import ForgottenScale, OuterConfig
ak.register(ForgottenScale())

@parametrize_with_checks([OuterConfig()])
def test_a(check, config): check(config)

@parametrize_with_checks([OuterConfig()], expected_failures={"check_merged_equals_adapted": "known"})
def test_b(check, config): check(config)

@parametrize_with_checks([OuterConfig()], expected_failures={"check_pickles": "known"})
def test_c(check, config): check(config)

@parametrize_with_checks([OuterConfig()], expected_failures={"check_shared_tensors_are_one_copy": "known"})
def test_d(check, config): check(config)
"""


def test_expected_failures_are_strict(tmp_path):
    (tmp_path / "test_kit.py").write_text(SUITE, encoding="utf-8")
    some = "check_merged_equals or check_pickles or check_shared"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", tmp_path, "-k", some]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=False, env=environment(ROOT))
    lines = [line for line in done.stdout.splitlines() if "::test_" in line and "%]" in line]
    words = {"PASSED": "passed", "FAILED": "failed", "SKIPPED": "skipped", "XFAIL": "xfailed"}
    found = dict.fromkeys("abcd", "")
    for line in lines:
        test, word = line.split("::test_")[1][0], line.split("OuterConfig()]")[1].split()[0]
        found[test] += f"{words[word]} "
    assert found == {
        "a": "failed skipped passed ",
        "b": "xfailed skipped passed ",
        "c": "failed skipped failed ",
        "d": "failed failed passed ",
    }, done.stdout
    assert "[XPASS(strict)] known" in done.stdout
    assert "is an expected failure (known), but it does not apply: the method has no shared tensors." in done.stdout


def test_an_expected_failure_must_exist():
    with pytest.raises(ak.UnknownNameError, match=r"Unknown check 'check_pickle'.*Did you mean 'check_pickles'"):
        parametrize_with_checks([OuterConfig()], expected_failures={"check_pickle": "why"})


@pytest.mark.parametrize("configs", [[], [OuterConfig]])
def test_configs_are_needed(configs):
    with pytest.raises(ak.ConfigError, match=r"parametrize_with_checks needs a list of configs, such as \[MyConfig"):
        parametrize_with_checks(configs)


def test_checks_say_what_they_check():
    for name, check in all_checks().items():
        assert check.__doc__, name
        assert check.__doc__.strip().endswith("."), name


def test_the_kit_says_that_pytest_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    monkeypatch.delitem(sys.modules, "adapterkit.testing")
    needed = r"^adapterkit\.testing needs pytest, which is not installed: pip install 'adapterkit\[testing\]'\.$"
    with pytest.raises(ImportError, match=needed):
        importlib.import_module("adapterkit.testing")


# Equality with PEFT's own classes


PEFT = {
    "lora": (LoraConfig(r=4, lora_alpha=3), peft.LoraConfig(r=4, lora_alpha=3)),
    "loha": (LoHaConfig(r=4, alpha=3), peft.LoHaConfig(r=4, alpha=3)),
    "vera": (VeraConfig(r=4), peft.VeraConfig(r=4)),
}


@pytest.mark.parametrize(("config", "theirs"), PEFT.values(), ids=PEFT)
def test_check_peft_passes_for_the_built_in_methods(config: ak.AdapterConfig, theirs: Any) -> None:
    check_peft(config, theirs)


def test_check_peft_takes_models_of_transformers() -> None:
    fields: Any = {"r": 2, "target_modules": ["q_proj"]}
    model, arguments = partial(build, "llama"), inputs("llama")
    check_peft(LoraConfig(**fields), peft.LoraConfig(**fields), model=model, inputs=arguments)
    with pytest.raises(CheckFailure, match=r"expected 128 trained numbers, as PEFT has; .* has 192"):
        check_peft(LoraConfig(**fields | {"r": 3}), peft.LoraConfig(**fields), model=model, inputs=arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=3), "expected 320 trained numbers, as PEFT has; .* has 240"),
        (VeraConfig(r=4), "expected 320 trained numbers"),
    ],
)
def test_check_peft_says_what_differs(config: ak.AdapterConfig, message: str) -> None:
    with pytest.raises(CheckFailure, match=message):
        check_peft(config, peft.LoraConfig(r=4))


# Layer kinds


class Scaled(nn.Module):
    """Multiplies its stored weight by 3."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 3, self.bias)


class ScaledKind(ak.LayerKind):
    name = "Scaled"

    @classmethod
    def of(cls, module: nn.Module) -> Any:
        return cls(*module.weight.shape) if isinstance(module, Scaled) else None  # type: ignore[arg-type]

    def read(self, module: Any) -> Tensor:
        return module.weight.detach() * 3  # type: ignore[no-any-return]

    def write(self, module: Any, weight: Tensor) -> None:
        module.weight.detach().copy_(weight / 3)


class Swapped(ScaledKind):
    @classmethod
    def of(cls, module: nn.Module) -> Any:
        return cls(4, 5) if isinstance(module, Scaled) else None


class ReadsWhatIsStored(ScaledKind):
    def read(self, module: Any) -> Tensor:
        return module.weight.detach()  # type: ignore[no-any-return]


class WritesUnscaled(ScaledKind):
    def write(self, module: Any, weight: Tensor) -> None:
        module.weight.detach().copy_(weight)


class CountsItsWrites(ScaledKind):
    def write(self, module: Any, weight: Tensor) -> None:
        super().write(module, weight)
        module.calls.add_(1)


class AppliesTwice(ScaledKind):
    def project(self, x: Tensor, down: Tensor, dropout: float = 0.0) -> Tensor:
        return 2 * super().project(x, down, dropout)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ScaledKind, None),
        (Swapped, r"read: expected the shape \(out, in\) = \(4, 5\), found \(5, 4\)"),
        (ReadsWhatIsStored, "apply_weight, with the weight of read: expected equality"),
        (WritesUnscaled, "read, of what write wrote: expected equality"),
        (CountsItsWrites, r"write: expected it to change \('weight',\), which held names; it changed \['calls'\]"),
        (AppliesTwice, "apply, of factors: expected equality"),
    ],
)
def test_check_kind_says_what_is_wrong_with_a_layer_kind(kind: type[ak.LayerKind], said: str | None) -> None:
    extension = type("Kinds", (), {"layer_kinds": ak.hookimpl(lambda self: [kind])})()
    ak.extend(extension)
    layer, x = Scaled(), torch.randn(2, 4)
    before = layer(x)
    with nullcontext() if said is None else pytest.raises(CheckFailure, match=f"check_kind failed .*{said}"):
        check_kind(layer, x)
    assert torch.equal(layer(x), before)
    ak.default_registry.retract(extension)
    with pytest.raises(CheckFailure, match="no layer kind takes it: register its extension first"):
        check_kind(layer, x)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 5, bias=False), torch.randn(2, 4)),
        (nn.Embedding(4, 5), torch.tensor([[1, 3]])),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular"), torch.randn(1, 4, 5, 5)),
    ],
)
def test_check_kind_passes_for_built_in_kinds(layer: nn.Module, x: Tensor) -> None:
    check_kind(layer, x)
