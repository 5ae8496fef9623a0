"""Running checks, and saying in sentences what failed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from adapterkit.contract import AdapterConfig
from adapterkit.testing import checks_copies, checks_files, checks_merging, checks_neighbours, checks_training
from adapterkit.testing.case import Broken, Case, NotApplicable

Check = Callable[[Case], None]


class CheckFailure(AssertionError):
    """A check that failed. The message says which, for which config, what was expected and what was found."""


def all_checks() -> Mapping[str, Check]:
    """Every check by name. Its docstring is the sentence of the contract that it checks."""
    modules = (checks_training, checks_merging, checks_files, checks_copies, checks_neighbours)
    return {
        name: function
        for module in modules
        for name, function in vars(module).items()
        if name.startswith("check_") and inspect.isfunction(function) and function.__module__ == module.__name__
    }


def run_check(check: Check, config: AdapterConfig) -> None:
    """Run one check. It touches no global random state.

    Raises:
        CheckFailure: the contract does not hold, or the method raised.
        NotApplicable: the check says nothing about this config.
    """
    case: Case | None = None
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _one_thread():
        torch.manual_seed(0)
        try:
            case = Case(config)
            check(case)
        except NotApplicable:
            raise
        except Broken as error:
            raise CheckFailure(_told(check, config, str(error))) from error.__cause__
        except Exception as error:
            where = f" on {case.now}" if case is not None and case.now is not None else ""
            what = f"expected no error{where}; {type(error).__name__} was raised: {error}"
            raise CheckFailure(_told(check, config, what)) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors are so small here that several threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_checks(config: AdapterConfig) -> dict[str, str]:
    """Run every check on a config, without pytest's machinery, as from a notebook.

    Returns:
        For each check's name `"passed"`, `"skipped: <why>"` or `"failed: <message>"`.
    """
    results = {}
    for name, check in all_checks().items():
        try:
            run_check(check, config)
            results[name] = "passed"
        except NotApplicable as reason:
            results[name] = f"skipped: {reason}"
        except CheckFailure as failure:
            results[name] = f"failed: {failure}"
    return results


def _told(check: Check, config: AdapterConfig, what: str) -> str:
    contract = " ".join((check.__doc__ or "").split())
    return f"{check.__name__} failed for {describe(config)}.\nThe contract: {contract}\nHere: {what}"


def describe(config: AdapterConfig) -> str:
    """The config as a call, with the fields that are not at their defaults."""
    fields = type(config).__dataclass_fields__.values()
    plain = type(config)()
    changed = {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != getattr(plain, f.name)}
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"
