"""Running the checks: each runs once for a config, in an order in which one mistake gives one failure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from adapterkit.contract import AdapterConfig
from adapterkit.errors import ConfigError, unknown
from adapterkit.testing import checks_files, checks_layers, checks_merging, checks_models
from adapterkit.testing.case import Broken, Case, NotApplicable, changed_fields

Check = Callable[[Case], None]

# A check is skipped if one that it builds on failed. All build on the first ones, and each of those on the one before.
_FIRST: Sequence[Check] = (
    checks_layers.check_config_survives_json,
    checks_layers.check_parameters,
    checks_layers.check_mathematics_is_pure,
    checks_layers.check_every_claimed_layer_kind,
    checks_layers.check_base_is_untouched,
    checks_merging.check_dense_forms_agree,
)
_BUILDS_ON: dict[Check, Check | None] = {
    **dict(zip(_FIRST, (None, *_FIRST), strict=False)),
    checks_layers.check_given_fields_act: checks_merging.check_merged_equals_adapted,
    checks_merging.check_merge_is_linear: checks_merging.check_merged_equals_adapted,
    checks_merging.check_known_changes_become_adapters: checks_merging.check_merged_equals_adapted,
    checks_merging.check_order_does_not_matter: checks_merging.check_merged_equals_adapted,
    checks_files.check_save_load_is_identity: checks_files.check_file_has_exactly_its_keys,
    checks_models.check_moves_to_dtype: checks_models.check_two_adapters_of_one_method,
    checks_models.check_shared_tensors_are_one_copy: checks_models.check_moves_to_dtype,
    checks_models.check_training_goes_on: checks_models.check_shared_tensors_are_one_copy,
    checks_models.check_reset_begins_again: checks_models.check_training_goes_on,
    checks_models.check_two_adapters_of_one_method: checks_files.check_save_load_is_identity,
    checks_files.check_only_exempt_keys_may_be_absent: checks_models.check_two_adapters_of_one_method,
}


class CheckFailure(AssertionError):
    """A check that failed. The message says which, for which config, what was expected and what was found."""


def all_checks() -> Mapping[str, Check]:
    """Every check by name. Its docstring is the sentence of the contract that it checks."""
    return {
        name: function
        for module in (checks_layers, checks_merging, checks_files, checks_models)
        for name, function in vars(module).items()
        if name.startswith("check_") and inspect.isfunction(function)
    }


def run_check(check: Check, config: AdapterConfig) -> None:
    """Run one check, after those that it builds on. It touches no global random state.

    Raises:
        CheckFailure: the contract does not hold, or the method raised.
        NotApplicable: the check says nothing about this config, or one that it builds on failed.
    """
    _run(check, Case(config))


def run_checks(config: AdapterConfig) -> dict[str, str]:
    """Run every check on a config without a test run of pytest, for example in a notebook.

    Returns:
        For each check's name `"passed"`, `"skipped: <why>"` or `"failed: <message>"`.
    """
    case, results = Case(config), {}
    for name, check in all_checks().items():
        try:
            _run(check, case)
            results[name] = "passed"
        except NotApplicable as reason:
            results[name] = f"skipped: {reason}"
        except CheckFailure as failure:
            results[name] = f"failed: {failure}"
    return results


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
        configs: what to check: as many as show what the method can do. Fields that a config sets must act.
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
    values = []
    for config in configs:
        case = Case(config, frozenset(expected))
        for name, check in checks.items():
            reason = expected.get(name)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, raises=CheckFailure, strict=True)]
            test = _as_test(check, case, reason)
            values.append(pytest.param(test, config, id=f"{name}-{describe(config)}", marks=marks))
    return pytest.mark.parametrize(("check", "config"), values)


def _as_test(check: Check, case: Case, reason: str | None) -> Callable[[AdapterConfig], None]:
    def test(config: AdapterConfig) -> None:
        __tracebackhide__ = True
        try:
            _run(check, case if config == case.given else Case(config))
        except NotApplicable as why:
            if reason is None:
                pytest.skip(str(why))
            name = check.__name__
            text = f"{name} is an expected failure ({reason}), but it does not apply: {why}."
            raise AssertionError(text) from None

    return test


def _run(check: Check, case: Case) -> None:
    result = _result(check, case)
    if result is not None:
        raise result


def _result(check: Check, case: Case) -> Exception | None:
    """The exception of the check for this case, or `None`. The check runs once."""
    if check not in case.results:
        cause = _cause(check, case)
        case.results[check] = _outcome(check, case) if cause is None else NotApplicable(f"{cause} failed")
    return case.results[check]


def _cause(check: Check, case: Case) -> str | None:
    """The check that failed among those that this one builds on."""
    first = _BUILDS_ON.get(check, _FIRST[-1])
    if first is None:
        return None
    failed = first.__name__ not in case.known and isinstance(_result(first, case), CheckFailure)
    return first.__name__ if failed else _cause(first, case)


def _outcome(check: Check, case: Case) -> Exception | None:
    """Run a check. Its tensors are so small that several threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    case.now = None
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(0)
            check(case)
        return None
    except NotApplicable as why:
        return why
    except Exception as error:  # noqa: BLE001 - a method that is wrong may raise anything
        what, cause = str(error), error.__cause__
        if not isinstance(error, Broken):
            where = "" if case.now is None else f" on {case.now}"
            what, cause = f"expected no error{where}; {type(error).__name__} was raised: {error}", error
        contract = " ".join((check.__doc__ or "").split())
        text = f"{check.__name__} failed for {describe(case.given)}.\nThe contract: {contract}\nHere: {what}"
        failure = CheckFailure(text)
        failure.__cause__ = cause
        return failure
    finally:
        torch.set_num_threads(threads)


def describe(config: AdapterConfig) -> str:
    """The config as a call, with the fields that are not at their defaults."""
    return f"{type(config).__name__}({', '.join(f'{n}={getattr(config, n)!r}' for n in changed_fields(config))})"
