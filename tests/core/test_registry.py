"""Which methods and extensions there are: found late, by name, each broken one by itself."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core.conftest import assert_as_before, set_parameters, snapshot
from tests.core.test_contract import Plugin, ShiftConfig, plugin, returning
from tests.core.test_errors import unchanged
from tests.models import EmbeddingNet, assert_same_outputs
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract import combiners
from adapterkit.contract.registry import DISABLE_VARIABLE, default_registry
from adapterkit.kinds import BUILTIN, Linear
from adapterkit_lora import LoraConfig

METHOD = """
    from dataclasses import dataclass
    import adapterkit as ak

    @dataclass(frozen=True, kw_only=True)
    class Config(ak.AdapterConfig):
        method = "{name}"

    @ak.hookimpl
    def config_type():
        return Config

    @ak.hookimpl
    def key_rule(config):
        return ak.KeyRule(prefix="{name}_")

    @ak.hookimpl
    def inject(target):
        return None
"""


# A method of another package whose parameters are called as LoRA's are.
TWIN = (
    METHOD.format(name="twin")
    .replace("twin_", "lora_")
    .replace("inject(target)", "inject(target, config)")
    .replace("return None", "return Layer(target, config)")
    + """
    class Layer(ak.LowRankLayer):
        def setup(self, target, config):
            self.lora_A, self.lora_B = target.new(target.in_features, init=1.0), target.new(target.out_features)

        def factors(self):
            return ak.Factors(self.lora_B[:, None], self.lora_A[None])
"""
)


# Discovery


VARIANT = METHOD.replace('method = "{name}"', 'method, peft_type, marks = "{name}", "LORA", {{"use_dora": True}}')


def test_a_file_is_claimed_without_the_import_of_methods_that_cannot_be_its_own(install: Any) -> None:
    for name in ("variant", "heavy"):
        install(f"{name}_dist", name, (VARIANT if name == "variant" else METHOD).format(name=name))
    install("said_dist", "said", VARIANT.format(name="said"), types="[lora]")
    registry = ak.Registry()
    assert registry.claim({"peft_type": "LORA"}, "a file").name == "lora"
    assert registry.claim({"peft_type": "LORA", "use_dora": True}, "a file").name == "said"
    assert {"plugin_of_variant_dist", "plugin_of_heavy_dist"}.isdisjoint(sys.modules)


def test_a_method_that_does_not_say_which_type_its_files_have_is_found_if_no_other_takes_the_file(install: Any) -> None:
    install("variant_dist", "variant", VARIANT.format(name="variant"))
    assert ak.Registry().claim({"peft_type": "LORA", "use_dora": True}, "a file").name == "variant"


def test_methods_are_listed_without_an_import_and_found_when_they_are_asked_for(install: Any) -> None:
    install("foo_dist", "foo", METHOD.format(name="foo"))
    registry = ak.Registry()
    found = registry.methods()
    assert [str(found[name]) for name in ("foo", "lora")] == [
        "foo (foo_dist 1.2)",
        f"lora (adapterkit {ak.__version__})",
    ]
    assert "plugin_of_foo_dist" not in sys.modules
    method = registry.method("foo")
    assert method.provider == "foo_dist 1.2"
    assert type(registry.config("foo", target_modules=["a"])).__name__ == "Config"
    assert registry.method("foo") is method
    registry.unregister("foo")
    assert registry.method("foo").name == "foo"


def test_packages_that_come_and_go_while_python_runs_are_noticed(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("foo_dist", "foo", METHOD.format(name="foo"))
    (info,) = (tmp_path / "foo_dist").glob("*.dist-info")
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    shutil.move(info, tmp_path)
    os.utime(site, (1, 1))  # a clock of the disk may be too coarse to tell these moments apart
    assert "foo" not in ak.methods()
    shutil.move(tmp_path / info.name, site)
    os.utime(site, (2, 2))
    assert str(ak.methods()["foo"]) == "foo (foo_dist 1.2)"
    shutil.rmtree(site / info.name)
    assert "foo" not in ak.methods()


@pytest.mark.parametrize("name", ["lorra", None, 3, ["lora"], ""], ids=repr)
def test_method_that_does_not_exist(name: Any) -> None:
    for ask in (ak.method, ak.config):
        with pytest.raises(ak.UnknownNameError) as caught:
            ask(name)
        assert f"Unknown adapter method {name!r}. Available: 'loha', 'lora', 'vera'" in str(caught.value)
        if name == "lorra":
            where = "Methods come from installed packages (entry-point group 'adapterkit.methods') or ak.register."
            assert f"Did you mean 'lora'? {where}" in str(caught.value)


def test_two_distributions_of_one_name_are_named_to_who_asks_for_it(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("foo_dist", "foo", METHOD.format(name="foo"))
    install("other_dist", "foo", METHOD.format(name="foo"))
    registry = ak.Registry()
    with pytest.raises(ak.PluginError) as caught:
        registry.method("foo")
    assert (
        "Two packages provide the method 'foo': foo_dist (plugin_of_foo_dist) and other_dist (plugin_of_other_dist). "
        f"Uninstall one of them, or switch it off: {DISABLE_VARIABLE}=foo_dist."
    ) in str(caught.value)
    assert registry.method("lora").name == "lora"
    monkeypatch.setenv(DISABLE_VARIABLE, "foo_dist")
    assert registry.method("foo").provider == "other_dist 1.2"


@pytest.mark.parametrize("code", ["import no_such_module_at_all", "1 / 0", "def f(:", "raise SystemExit"])
def test_plugin_that_cannot_be_imported_breaks_only_itself(install: Any, code: str) -> None:
    install("foo_dist", "foo", code)
    registry = ak.Registry()
    assert registry.method("lora").name == "lora"
    with pytest.raises(ak.PluginError) as caught:
        registry.method("foo")
    message = str(caught.value)
    assert "The method 'foo' of foo_dist 1.2 cannot be imported from 'plugin_of_foo_dist': " in message
    assert f"set {DISABLE_VARIABLE}=foo." in message
    assert "Other methods are not affected; reinstall or remove that package" in message
    assert isinstance(caught.value.__cause__, ImportError | ZeroDivisionError | SyntaxError | SystemExit)
    assert "foo" in registry.methods()


def test_plugin_of_another_name_than_its_entry_point(install: Any) -> None:
    install("foo_dist", "foo", METHOD.format(name="bar"))
    with pytest.raises(ak.PluginError, match=r"The method 'foo' \(foo_dist 1.2\): Config.method is 'bar'"):
        ak.Registry().method("foo")


@pytest.mark.parametrize(("variable", "name"), [(" foo , bar,", "foo"), ("lora", "lora")])
def test_disabled_plugins_are_not_there(
    install: Any, monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    install("foo_dist", "foo", "raise ImportError")
    monkeypatch.setenv(DISABLE_VARIABLE, variable)
    registry = ak.Registry()
    assert name not in registry.methods()
    with pytest.raises(ak.UnknownNameError, match=f"It is switched off by {DISABLE_VARIABLE}. Methods come from"):
        registry.method(name)
    assert registry.method("vera").name == "vera"


def test_unregister_forgets_a_method_of_this_registry() -> None:
    registry, other = ak.Registry(), ak.Registry()
    registry.register(plugin())
    assert "shift" not in other.methods()
    registry.unregister("shift")
    assert "shift" not in registry.methods()
    with pytest.raises(ak.UnknownNameError, match="Unknown registered method 'shift'"):
        registry.unregister("shift")
    registry.register(plugin())


# Configs and methods


def test_config_class_that_another_plugin_uses() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Impostor(ak.AdapterConfig):
        method = "lora"

    model = EmbeddingNet()
    message = f"Impostor says it is for 'lora', but that method (adapterkit {ak.__version__}) uses LoraConfig."
    with unchanged(model), pytest.raises(ak.ConfigError, match=re.escape(message)):
        ak.attach(model).add("a", Impostor(target_modules=["head"]))
    with unchanged(model), pytest.raises(ak.UnknownNameError, match="Unknown adapter method 'shift'"):
        ak.attach(model).add("a", ShiftConfig(target_modules=["head"]))


def test_methods_do_not_answer_for_each_other_whatever_their_functions_are_called() -> None:
    @ak.hookimpl(specname="config_type")
    def which() -> type[ak.AdapterConfig]:
        return ShiftConfig

    @ak.hookimpl
    def targets() -> list[str]:
        return ["x"]

    registry = ak.Registry()
    lora = registry.method("lora")
    assert registry.register(plugin(which=which, config_type=None, targets=targets)).name == "shift"
    assert lora.config_type() is LoraConfig
    assert lora.targets(nn.Module(), LoraConfig()) is None


# Two methods of third parties, beside LoRA


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(ak.AdapterConfig):
    """(IA)3-like: the output, bias included, times a trained vector."""

    method = "scale"


class ScaleLayer(ak.AdapterLayer):
    def setup(self, target: ak.Target, config: ScaleConfig) -> None:
        self.scale_by = target.new(target.out_features, init=1.0)

    def forward(self, base: ak.Base, x: Tensor) -> Tensor:
        out: Tensor = base(x)
        return out * self.scale_by


@dataclass(frozen=True, kw_only=True)
class MoveConfig(ak.AdapterConfig):
    """Changes the layer's input, and has a shared tensor."""

    method = "move"


class MoveLayer(ak.AdapterLayer):
    def setup(self, target: ak.Target, config: MoveConfig) -> None:
        self.move_by = target.new(target.in_features)

    def forward(self, base: ak.Base, x: Tensor) -> Tensor:
        out: Tensor = base(x + self.move_by * self.shared.move_all)
        return out


class MoveShared(ak.Shared):
    def setup(self, targets: Sequence[ak.Target], config: MoveConfig, root: ak.Target) -> None:
        self.register_buffer("move_all", torch.arange(1.0, 1.0 + targets[0].in_features))


@pytest.fixture
def third_parties() -> None:
    """Three methods from outside: additive, one that scales the output, one that changes the input."""
    ak.register(plugin())
    ak.register(ak.plugin(ScaleConfig, ScaleLayer, prefix="scale_"))
    ak.register(ak.plugin(MoveConfig, MoveLayer, prefix="move_", shared=MoveShared))


def linear(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).eval()


def configs() -> dict[str, ak.AdapterConfig]:
    return {
        "lora": LoraConfig(r=2, target_modules=["0", "1"]),
        "shift": ak.config("shift", target_modules=["0", "1"]),
        "scale": ak.config("scale", target_modules=["0", "1"]),
        "move": ak.config("move", target_modules=["0", "1"]),
    }


@pytest.fixture
def mixed(third_parties: None) -> nn.Module:
    """A model with one adapter of each method, as if trained, none active."""
    model = linear()
    for i, (name, config) in enumerate(configs().items()):
        ak.attach(model).add(name, config, activate=False)
        set_parameters(ak.attach(model), name, seed=i)
    return model


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))


def by_hand(model: nn.Module, names: Sequence[str]) -> Tensor:
    """The output from the formulas: the first adapter is the innermost."""
    h = X
    for i, base in enumerate(linear().children()):

        def run(x: Tensor, base: Any = base) -> Tensor:
            return F.linear(x, base.weight, base.bias)

        for name in names:
            p = {k.removeprefix(f"{i}."): v for k, v in ak.attach(model).named_parameters(name) if k[0] == str(i)}
            if name == "lora":
                a, b = p["lora_A.weight"], p["lora_B.weight"]
                run = lambda x, run=run, a=a, b=b: run(x) + x @ a.T @ b.T * 4.0  # noqa: E731
            elif name == "shift":
                run = lambda x, run=run, p=p: run(x) + p["shift_by"]  # noqa: E731
            elif name == "scale":
                run = lambda x, run=run, p=p: run(x) * p["scale_by"]  # noqa: E731
            else:
                run = lambda x, run=run, p=p: run(x + p["move_by"] * torch.arange(1.0, 7.0))  # noqa: E731
        h = run(h)
    return h


@pytest.mark.parametrize(
    "names",
    [("shift",), ("lora", "scale"), ("scale", "lora"), ("move", "lora"), ("shift", "scale", "lora", "move")],
    ids="+".join,
)
def test_methods_compose_from_the_inside_out(mixed: nn.Module, names: tuple[str, ...]) -> None:
    ak.attach(mixed).activate(*names)
    torch.testing.assert_close(mixed(X), by_hand(mixed, names))


def test_methods_train_side_by_side_and_their_files_load(mixed: nn.Module, tmp_path: Path) -> None:
    adapters = ak.attach(mixed)
    adapters.activate("lora", "scale", "move")
    mixed(X).sum().backward()
    for name in adapters:
        trained = [p.grad is not None and bool(p.grad.any()) for p in adapters.parameters(name)]
        assert all(trained) if name != "shift" else not any(trained), name
    own = {"base_model.move_all": torch.full((6,), 3.0)}  # a loaded shared tensor is the file's
    adapters.load_state_dict("move", adapters.state_dict("move") | own)
    again = ak.attach(linear())
    for name in ("scale", "move"):
        assert again.load(adapters.save(name, tmp_path / name), name).ok
        assert again.state_dict(name).keys() - own == {f"base_model.model.{i}.{name}_by" for i in (0, 1)}
    for one in (adapters, again):
        one.activate("scale", "move")
    assert_same_outputs(again.model(X), mixed(X))


def test_the_model_is_given_back_one_method_after_the_other(third_parties: None) -> None:
    model = linear()
    before = snapshot(model)
    adapters = ak.attach(model)
    for name, config in configs().items():
        adapters.add(name, config)
        assert_same_outputs(model(X), linear()(X))  # each begins as the identity
        set_parameters(adapters, name)
    adapters.activate("lora", "scale", "shift", "move")
    adapters.remove("scale")
    assert adapters.active == ("lora", "shift", "move")
    torch.testing.assert_close(model(X), by_hand(model, adapters.active))
    adapters.detach()
    assert_as_before(model, before)


def test_file_of_a_method_that_is_gone(mixed: nn.Module, tmp_path: Path) -> None:
    ak.attach(mixed).save("shift", tmp_path / "a")
    default_registry.unregister("shift")
    model = linear()
    with unchanged(model), pytest.raises(ak.UnknownNameError, match="no plugin provides the method 'shift'"):
        ak.attach(model).load(tmp_path / "a", "x")


# Extensions


class MyLinear(Linear):
    name = "MyLinear"


def test_layer_kind_of_an_extension_is_asked_first() -> None:
    ak.extend(Plugin(layer_kinds=returning([MyLinear])))
    assert default_registry.kinds() == (MyLinear, *BUILTIN)
    assert type(default_registry.kind_of(nn.Linear(2, 2))) is MyLinear
    assert ak.select(linear(), LoraConfig(target_modules="all-linear")).targets[0].kind.name == "MyLinear"


LIST, BY_NAME = "it must return a list of LayerKind classes.", "it must return Combiners by name."
WRONG_ANSWERS: list[tuple[str, object, str]] = [
    ("layer_kinds", MyLinear, LIST),
    ("layer_kinds", [nn.Linear], LIST),
    ("layer_kinds", [MyLinear(4, 6)], LIST),
    ("layer_kinds", ZeroDivisionError("no kinds"), "its hook layer_kinds raised ZeroDivisionError: no kinds."),
    ("combiners", {"a": combiners.linear}, BY_NAME),
    ("combiners", ["a"], BY_NAME),
    ("combiners", ZeroDivisionError("none"), "its hook combiners raised ZeroDivisionError: none."),
    (
        "combiners",
        {"a": combiners.Combiner(combiners.ties, rotates=True)},
        "the combiner 'a' has rotates=True, but its result does not rotate with its inputs: f(P X Q) is not P f(X) Q.",
    ),
    ("combiners", {"linear": combiners.BUILTIN["ties"]}, "its hook combiners gives 'linear', a name that is taken"),
    ("inject", None, "is not a method, so it may not answer hook inject: it would answer for every method. Register"),
    ("layer_kind", [], "implements 'layer_kind', which is not a hook. Did you mean 'layer_kinds'?"),
]


@pytest.mark.parametrize(("hook", "answer", "message"), WRONG_ANSWERS, ids=[row[2][:40] for row in WRONG_ANSWERS])
def test_extensions_that_are_wrong_are_refused_and_hinder_nobody(hook: str, answer: object, message: str) -> None:
    registry = ak.Registry()
    with pytest.raises(ak.PluginError) as caught:
        registry.extend(Plugin(**{hook: returning(answer)}))
    assert message in str(caught.value)
    assert "The extension 'Plugin'" in str(caught.value)
    assert registry.kinds() == BUILTIN
    assert registry.combiner("linear") is combiners.BUILTIN["linear"]
    assert registry.extensions() == {}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ZeroDivisionError("no such module"), "it raised ZeroDivisionError: no such module."),
        (True, "its `of` returned True, which is neither a layer kind nor None."),
    ],
)
def test_layer_kind_that_fails_is_passed_over(answer: Any, said: str) -> None:
    class Broken(Linear):
        name = "Broken"

        @classmethod
        def of(cls, module: nn.Module) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    ak.extend(Plugin(layer_kinds=returning([Broken])))
    with pytest.warns(ak.AdapterWarning, match=f"The layer kind 'Broken' of .* is passed over for a Linear: {said}"):
        ak.attach(linear()).add("a", LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module_at_all", "The extension 'ext' of ext_dist 1.2 cannot be imported"),
        (
            "import adapterkit as ak\n@ak.hookimpl\ndef combiners():\n    raise ValueError('oh')\n",
            "The extension 'ext': its hook combiners raised ValueError: oh",
        ),
    ],
)
def test_extension_of_a_package_that_fails_breaks_only_itself(install: Any, code: str, message: str) -> None:
    install("ext_dist", "ext", code, group="adapterkit.extensions")
    registry = ak.Registry()
    with pytest.warns(ak.AdapterWarning, match=message):
        assert registry.kind_of(nn.Linear(2, 2)) == Linear(2, 2)
    assert registry.kinds() == BUILTIN
    assert registry.combiner("linear") is combiners.BUILTIN["linear"]
    assert isinstance(registry.extensions()["ext"], ak.PluginError)


def test_methods_with_one_prefix_work_side_by_side(install: Any, tmp_path: Path) -> None:
    install("twin_dist", "twin", TWIN)
    adapters = ak.attach(linear())
    adapters.add("a", LoraConfig(r=2, target_modules=["0"]))
    adapters.add("b", ak.config("twin", target_modules=["0"]))
    for name in "ab":
        set_parameters(adapters, name)
    adapters.activate("a", "b")
    expected = adapters.model(X).detach()
    folders = [adapters.save(name, tmp_path / name) for name in "ab"]
    again = ak.attach(linear())
    for name, folder in zip("ab", folders, strict=True):
        assert again.load(folder, name) == ak.LoadReport()
    again.activate("a", "b")
    torch.testing.assert_close(again.model(X), expected)
    torch.testing.assert_close(again.merge_and_detach("a", "b")(X), expected)


EXTENSION = """
    import adapterkit as ak
    from adapterkit.contract.combiners import BUILTIN
    from adapterkit.kinds import Linear

    class Theirs(Linear):
        name = "{0}"

    @ak.hookimpl
    def layer_kinds():
        return [Theirs]

    @ak.hookimpl
    def combiners():
        return {{"{0}": BUILTIN["ties"]}}
"""


def test_extensions_of_installed_packages_are_found_and_two_of_one_name_are_both_there(install: Any) -> None:
    for name in ("one", "two"):
        install(f"{name}_dist", "ext", EXTENSION.format(name), group="adapterkit.extensions")
    registry = ak.Registry()
    assert {kind.name for kind in registry.kinds()[:2]} == {"one", "two"}
    assert registry.kinds()[2:] == BUILTIN
    assert registry.combiner("one") is registry.combiner("two")
    assert len(registry.extensions()) == 2


def test_an_extension_is_added_once_and_can_be_retracted_once() -> None:
    registry, extension = ak.Registry(), Plugin(layer_kinds=returning([MyLinear]))
    registry.extend(extension)
    with pytest.raises(ak.PluginError, match="is registered already"):
        registry.extend(extension)
    registry.retract(extension)
    assert registry.kinds() == BUILTIN
    with pytest.raises(ak.UnknownNameError, match="Unknown extension"):
        registry.retract(extension)
