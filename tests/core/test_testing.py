"""The test kit's own test: what is right passes, and each broken method is caught by the check meant for it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
from tests.core import broken_methods
from tests.core.broken_methods import BROKEN, BranchesOnAValue, Outer, OuterConfig, SharedOuter
from tests.models import build, inputs
from tests.processes import environment

import adapterkit as ak
from adapterkit.testing import (
    CheckFailure,
    all_checks,
    case,
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


@pytest.mark.parametrize("plugin", [Outer, SharedOuter])
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
