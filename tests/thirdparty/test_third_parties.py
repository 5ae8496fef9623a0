"""Foreign packages, built, installed into a fresh environment, and used through their entry points alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.thirdparty.environment import HERE, PACKAGES, ROOT, Environment

import adapterkit as ak


@pytest.fixture(scope="module")
def odd(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two more packages: one claims the name `outer` as well, one cannot be imported."""
    projects, target = tmp_path_factory.mktemp("projects"), tmp_path_factory.mktemp("odd")
    for name, entry, code in (("outer_too", "outer", None), ("broken", "broken", "import not_installed_anywhere\n")):
        project = shutil.copytree(PACKAGES["outer"], projects / name)
        module = project / f"adapterkit_{name}.py"
        (project / "adapterkit_outer.py").rename(module)
        if code is not None:
            module.write_text(code, encoding="utf-8")
        text = (project / "pyproject.toml").read_text(encoding="utf-8")
        text = text.replace("adapterkit-outer", f"adapterkit-{name}").replace("adapterkit_outer", f"adapterkit_{name}")
        text = text.replace("outer = ", f"{entry} = ")
        (project / "pyproject.toml").write_text(text, encoding="utf-8")
        environment.install(project, target=target)
    return target


SCRIPT = """
import json, os, sys
import torch
import adapterkit as ak

def refused(name):
    try: return str(ak.method(name))
    except ak.AdapterError as error: return str(error)

announced = {name: str(found) for name, found in ak.methods().items()}
imported = [name for name in sys.modules if name.startswith("adapterkit_")]
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
added = ak.attach(model).add("a", ak.config("ia3", target_modules=["0"])).targets
said = {"announced": announced, "imported": imported, "added": added, "twice": refused("outer")}
said["broken"] = refused("broken")
os.environ["ADAPTERKIT_DISABLE_PLUGINS"] = "outer,broken"
said |= {"off": refused("outer"), "on": refused("ia3"), "described": str(ak.describe_methods())}
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(environment: Environment, odd: Path) -> dict[str, Any]:
    """What `SCRIPT` found where all packages are installed."""
    found: dict[str, Any] = json.loads(environment.run(SCRIPT, path=[odd]))
    return found


def test_they_are_announced_and_imported_when_asked_for(said: dict[str, Any]) -> None:
    assert (
        said["announced"].items()
        >= {
            "ia3": "ia3 (adapterkit-ia3 1.0.0)",
            "lokr": "lokr (adapterkit-lokr 1.0.0)",
            "oft": "oft (adapterkit-oft 1.0.0)",
        }.items()
    )
    assert said["imported"] == []
    assert said["added"] == ["0"]


def test_what_adapterkit_new_writes_is_described_where_it_is_installed(said: dict[str, Any]) -> None:
    assert re.search(r"^low_sum +adapterkit-low-sum 0.1.0 +low_sum_ +yes +yes", said["described"], re.MULTILINE)


def test_two_packages_with_one_name_are_an_error_for_who_asks_for_it(said: dict[str, Any]) -> None:
    assert said["twice"] == (
        "Two packages provide the method 'outer': adapterkit-outer (adapterkit_outer:plugin) and "
        "adapterkit-outer_too (adapterkit_outer_too:plugin). Uninstall one of them, or switch it off: "
        "ADAPTERKIT_DISABLE_PLUGINS=adapterkit-outer."
    )


def test_a_broken_package_breaks_only_itself(said: dict[str, Any]) -> None:
    assert said["broken"] == (
        "The method 'broken' of adapterkit-broken 0.1 cannot be imported from 'adapterkit_broken:plugin': "
        "ModuleNotFoundError: No module named 'not_installed_anywhere'. Other methods are not affected; reinstall or "
        "remove that package, or set ADAPTERKIT_DISABLE_PLUGINS=broken."
    )


def test_a_blocked_package_is_not_there(said: dict[str, Any]) -> None:
    assert said["off"].startswith("Unknown adapter method 'outer'.")
    assert "It is switched off by ADAPTERKIT_DISABLE_PLUGINS." in said["off"]
    assert said["on"] == "<method 'ia3' from adapterkit-ia3 1.0.0>"


@pytest.fixture(scope="module")
def results(environment: Environment, new_package: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tests of all packages, which are the kit first of all, where only the installed packages are."""
    folder = tmp_path_factory.mktemp("tests")
    for name, package in PACKAGES.items():
        shutil.copytree(package, folder / name, ignore=shutil.ignore_patterns("adapterkit_*"))
    shutil.copytree(new_package / "tests", folder / "low_sum")
    code = """
        import os, sys, pytest
        os.chdir(sys.argv[1])
        pytest.main(["-v", "--disable-warnings", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", ".", "."])
    """
    return environment.run(code, folder)


@pytest.mark.parametrize("name", [*PACKAGES, "low_sum"])
def test_each_passes_its_own_tests(results: str, name: str) -> None:
    lines = [line for line in results.splitlines() if line.startswith(f"{name}/") and line.endswith("%]")]
    failed = [line for line in lines if not re.search(" (PASSED|SKIPPED)", line)]
    assert not failed, results[-6000:]
    assert sum(" PASSED" in line for line in lines) >= 14


def test_a_real_task(environment: Environment, tmp_path: Path) -> None:
    code = (HERE / "real_task.py").read_text(encoding="utf-8")
    assert environment.run(code, tmp_path, path=[ROOT / "examples"]).endswith("all is well\n")


def test_without_packaging(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a notebook: the module is there, and nobody installed it."""
    import torch

    monkeypatch.syspath_prepend(str(PACKAGES["outer"]))
    import adapterkit_outer

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    ak.register(adapterkit_outer)
    adapters = ak.attach(model)
    adapters.add("a", ak.config("outer", target_modules=["0"]))
    assert [name for name, _ in adapters.named_parameters("a")] == ["0.outer_u", "0.outer_v"]
