"""The one decorator that is the kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from adapterkit.contract import AdapterConfig
from adapterkit.errors import ConfigError, unknown
from adapterkit.testing.case import NotApplicable
from adapterkit.testing.running import Check, CheckFailure, all_checks, describe, run_check


def parametrize_with_checks(
    configs: Sequence[AdapterConfig], *, expected_failures: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Make a pytest test of each check for each config.

    ```python
    @parametrize_with_checks([MyConfig(), MyConfig(r=4)])
    def test_contract(check, config):
        check(config)
    ```

    The checks choose the targets themselves: layers called `up` and `down` in small models of every layer
    kind. All other fields of a config are taken as they are.

    Args:
        configs: what to check: as many as show what the method can do.
        expected_failures: checks that are known to fail, and why. They are strict: one that passes, or that
            does not apply, fails the test.

    Raises:
        ConfigError: no config, or something that is none.
        UnknownNameError: an expected failure of a check that does not exist.
    """
    expected = dict(expected_failures or {})
    checks = all_checks()
    for name in expected:
        if name not in checks:
            raise unknown("check", name, checks)
    if not configs or not all(isinstance(config, AdapterConfig) for config in configs):
        raise ConfigError(f"parametrize_with_checks needs a list of configs, such as [MyConfig()], not {configs!r}.")
    values = [_value(check, config, expected.get(name)) for config in configs for name, check in checks.items()]
    return pytest.mark.parametrize(("check", "config"), values)


def _value(check: Check, config: AdapterConfig, reason: str | None) -> Any:
    marks = [] if reason is None else [pytest.mark.xfail(reason=reason, raises=CheckFailure, strict=True)]
    name = f"{check.__name__}-{describe(config)}"
    return pytest.param(_Bound(check, reason), config, id=name, marks=marks)


class _Bound:
    """A check as a test calls it."""

    def __init__(self, check: Check, reason: str | None) -> None:
        self.check, self.reason = check, reason

    def __repr__(self) -> str:
        return self.check.__name__

    def __call__(self, config: AdapterConfig) -> None:
        __tracebackhide__ = True
        try:
            run_check(self.check, config)
        except NotApplicable as why:
            if self.reason is not None:
                raise AssertionError(
                    f"{self.check.__name__} is an expected failure ({self.reason}), but it does not apply: {why}."
                ) from None
            pytest.skip(str(why))
