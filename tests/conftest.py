"""What holds for every test: the same examples on every machine, no clock that makes a test fail, long files first."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator

# Before torch and the hub are imported, and for every process that a test starts. The tensors are tiny: on a busy
# machine a second thread makes each operation wait for the other core. And nothing may depend on a hub.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import pytest
from hypothesis import HealthCheck, settings

from adapterkit import __version__, default_registry

# A busy machine draws slowly and runs slowly. `make fuzz` draws other examples each time.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# These take longest. A process runs a whole file, so a long one that comes last would keep the others waiting.
LONG = (
    "test_examples.py",
    "test_testing.py",
    "test_new_package.py",
    "test_third_parties.py",
    "test_trainer.py",
    "test_trainer_mixin.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported is there to stay: the garbage collector looks for nothing in it, neither now nor later."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long files begin."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def registrations_end_with_their_test() -> Iterator[None]:
    """What a test registers or extends is gone after it; so is what its packages announced."""
    methods, extensions = {*default_registry._methods}, {*default_registry._extensions}
    yield
    for name, method in [*default_registry._methods.items()]:
        if name not in methods and method.provider != f"adapterkit {__version__}":
            default_registry.unregister(name)
    for name in default_registry._extensions.keys() - extensions:
        default_registry.retract(default_registry._extensions[name].plugin)
