"""A pytest plugin under which PEFT's own tests run here: without a hub, with PEFT itself or with a view in its place.

`--through peft` is the control; `--through view` gives the tests `as_peft` views wherever PEFT makes a `PeftModel`.
`--outcomes FILE` writes a line of JSON for each test: its outcome, its error, and which adapters it made.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from tests.tools.peft_suite.outcomes import Outcome, read
from torch import nn

import adapterkit as ak
from adapterkit.contract import default_registry

# What the running test has made: each adapter's type, and why no method here takes its config.
made: dict[str, str | None] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the runner passes."""
    parser.addoption("--through", choices=("peft", "view"), default="peft")
    parser.addoption("--outcomes", type=Path)
    parser.addoption("--control", type=Path, help="run only the tests that count by these outcomes")
    parser.addoption("--every", type=int, default=1, help="run each Nth of them")


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests import anything from PEFT."""
    config.addinivalue_line("markers", "regression: PEFT's own mark")
    if config.getoption("--through") == "view":
        from tests.tools.peft_suite import views

        views.install()
    else:
        watch_adapters()


def watch_adapters() -> None:
    """Note each adapter that PEFT's tuners inject, and whether a `PeftModel` asked for it."""
    inject, init, add = BaseTuner.inject_adapter, PeftModel.__init__, PeftModel.add_adapter
    asked: list[PeftModel] = []

    def noting(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config[adapter_name]
        why = missing_option(config, model) if asked else "made without a PeftModel"
        kind = getattr(config.peft_type, "value", config.peft_type)
        made[kind] = made.get(kind) or why
        result = inject(self, model, adapter_name, *args, **kwargs)
        made[kind] = made[kind] or missing_option(config, model)  # PEFT may have set `target_parameters`
        return result

    def asking(call: Any) -> Any:
        @functools.wraps(call)
        def wrapped(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
            asked.append(self)
            try:
                return call(self, *args, **kwargs)
            finally:
                asked.pop()

        return wrapped

    BaseTuner.inject_adapter = noting
    PeftModel.__init__, PeftModel.add_adapter = asking(init), asking(add)


def missing_option(config: peft.PeftConfig, model: nn.Module) -> str | None:
    """Why no method here makes this adapter of the model; `None`: one does."""
    values = {"modules_to_save": None, **config.to_dict()}
    try:
        ak.select(model, default_registry.claim(values, "the test").config_type().from_dict(values))
    except ak.SelectionError as error:  # the tests may expect that nothing is selected
        found = re.search(r"is an? (\w+), which cannot be adapted", str(error))
        return None if found is None else f"layers of the class `{found[1]}`"
    except ak.AdapterError as error:
        return str(error)
    return None


class _Everything(dict[str, int]):
    """PEFT's tests go online for an id that is not in here."""

    def __contains__(self, key: object) -> bool:
        self.setdefault(str(key), 1)
        return True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests for other methods' configs, and let every id count as fetched before."""
    for item in items:
        utils = vars(item.module).get("hub_online_once")
        if utils is not None:
            utils.__wrapped__.__globals__["_HUB_MODEL_ACCESSES"] = _Everything()
    known = [peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper()) for name in ak.methods()]
    items[:] = [item for item in items if not _is_for_another_method(item, known)]
    control = config.getoption("--control")
    if control is not None:
        counted = {outcome.test for outcome in read([control]).values() if outcome.counts}
        items[:] = [item for item in items if item.nodeid in counted][:: config.getoption("--every")]


def _is_for_another_method(item: pytest.Item, known: Sequence[type | None]) -> bool:
    """Whether the test is one of a row for many methods, and this one is not among the known configs."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    types = [value for value in params if isinstance(value, type) and issubclass(value, peft.PeftConfig)]
    return any(t not in known for t in types)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: object) -> Iterator[None]:
    """Each test begins with no adapter noted."""
    made.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Write down how the test ended."""
    report = yield
    out = item.config.getoption("--outcomes")
    if out is not None and (report.when == "call" or report.outcome != "passed"):
        error = "" if call.excinfo is None or report.outcome == "skipped" else _summary(call.excinfo)
        Outcome(item.nodeid, report.outcome, dict(made), error).write(out)
    return report


def _summary(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The error in one line, and the last place in PEFT's tests and here where it was."""
    places = [f"{Path(str(e.path)).name}:{e.lineno + 1}" for e in error.traceback]
    text = " ".join(str(error.value).split())[:300]
    return f"{error.typename}: {text} @ {' > '.join(places[-6:])}"
