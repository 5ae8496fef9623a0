"""What is said of the installed methods and extensions."""

from __future__ import annotations

from typing import Any

import pytest
from tests.core.test_contract import Plugin, plugin, returning
from tests.core.test_registry import METHOD

import adapterkit as ak
from adapterkit.contract import combiners
from adapterkit.kinds import BUILTIN, Linear


class Theirs(Linear):
    name = "Theirs"


def describe(registry: ak.Registry | None = None) -> ak.MethodsReport:
    return ak.describe_methods(registry or ak.Registry())


def test_every_method_with_its_package_prefix_and_hooks() -> None:
    found = {m.name: m for m in describe().methods}
    assert set(found) >= {"loha", "lora", "vera"}
    lora = found["lora"]
    assert (lora.package, lora.version, lora.prefix, lora.error) == ("adapterkit", ak.__version__, "lora_", None)
    assert lora.config == "adapterkit_lora.config.LoraConfig"
    assert lora.hooks == ak.method("lora").hooks
    assert {m.name for m in found.values() if m.results} == {"lora"}
    assert {m.name for m in found.values() if m.foreign} == {"loha", "lora"}
    assert all(m.merges and m.combines for m in found.values())


def test_a_method_of_another_package_and_one_that_was_registered(install: Any) -> None:
    install("foo_dist", "foo", METHOD.format(name="foo"))
    registry = ak.Registry()
    registry.register(plugin())
    found = {m.name: m for m in describe(registry).methods}
    assert (found["foo"].package, found["foo"].version, found["foo"].prefix) == ("foo_dist", "1.2", "foo_")
    assert not found["foo"].merges
    assert not found["foo"].combines
    assert found["shift"].version is None


def test_what_fails_is_listed_with_its_reason_and_hinders_no_other(install: Any) -> None:
    install("foo_dist", "foo", "import no_such_module_at_all")
    install("bar_dist", "bar", METHOD.format(name="bar"))
    install("other_dist", "bar", METHOD.format(name="bar"))
    install("ext_dist", "ext", "1 / 0", group="adapterkit.extensions")
    raises = "import adapterkit as ak\n@ak.hookimpl\ndef layer_kinds():\n    1 / 0"
    install("kinds_dist", "kinds", raises, group="adapterkit.extensions")
    report = describe()
    reasons = {plugin.name: plugin.error or "" for plugin in report.failed}
    assert set(reasons) == {"foo", "bar", "ext", "kinds"}
    assert "its hook layer_kinds raised ZeroDivisionError: division by zero." in reasons["kinds"]
    assert "ModuleNotFoundError: No module named 'no_such_module_at_all'" in reasons["foo"]
    assert "Two packages provide the method 'bar'" in reasons["bar"]
    assert "The extension 'ext' of ext_dist 1.2 cannot be imported" in reasons["ext"]
    assert "lora" in {m.name for m in report.methods if not m.error}
    assert "failed: foo (foo_dist 1.2): The method 'foo'" in str(report)


def test_extensions_with_what_they_add() -> None:
    registry = ak.Registry()
    registry.extend(Plugin(layer_kinds=returning([Theirs])))

    @ak.hookimpl
    def added() -> dict[str, ak.Combiner]:
        return {"mine": ak.Combiner(combiners.linear)}

    registry.extend(Plugin(combiners=added))
    report = describe(registry)
    assert sorted((e.kinds, e.combiners) for e in report.extensions) == [((), ("mine",)), (("Theirs",), ())]
    assert report.kinds == ("Theirs", *(kind.name for kind in BUILTIN))
    assert set(report.combiners) == {"mine", *combiners.BUILTIN}
    assert ": Theirs" in str(report)


def test_an_extension_that_is_loaded_later_is_used(install: Any) -> None:
    registry = ak.Registry()
    assert registry.kinds() == BUILTIN
    install(
        "ext_dist",
        "ext",
        "import adapterkit as ak\n@ak.hookimpl\ndef layer_kinds():\n    return []",
        "adapterkit.extensions",
    )
    assert [e.name for e in describe(registry).extensions] == ["ext"]
    assert registry.kinds() == BUILTIN


def test_what_the_environment_switches_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKIT_DISABLE_PLUGINS", "lora, nobody")
    report = describe()
    assert report.switched_off == ("lora", "nobody")
    assert "lora" not in {m.name for m in report.methods}
    assert "switched off: lora" in str(report)


def test_it_prints_as_a_table() -> None:
    lines = str(describe()).splitlines()
    assert lines[0].split() == ["method", "package", "prefix", "merges", "combines", "result", "foreign", "files"]
    assert f"lora    adapterkit {ak.__version__}  lora_   yes     yes       yes     yes" in lines
    assert "layer kinds: Linear, Conv1D, Conv1d, Conv2d, Conv3d, Embedding, packed Linear" in lines
