"""The kit with which the author of a method checks it: one decorator, and checks that are plain functions.

```python
from adapterkit.testing import parametrize_with_checks

@parametrize_with_checks([MyConfig(), MyConfig(r=4)])
def test_contract(check, config):
    check(config)
```

In: configs of a method. Out: a test of each check for each config.
Each check puts a config on small models of every layer kind (`case`). `kit` runs the checks in their order.
Uses: errors, kinds, contract, files, disk, and the public names of `adapterkit`.
"""

try:
    import pytest
except ImportError as error:
    raise ImportError(
        "adapterkit.testing needs pytest, which is not installed: pip install 'adapterkit[testing]'."
    ) from error

from adapterkit.testing.case import TOLERANCES
from adapterkit.testing.kit import CheckFailure, all_checks, parametrize_with_checks, run_check, run_checks
from adapterkit.testing.layer_kind import check_kind
from adapterkit.testing.peft import check_peft

__all__ = [
    "TOLERANCES",
    "CheckFailure",
    "all_checks",
    "check_kind",
    "check_peft",
    "parametrize_with_checks",
    "run_check",
    "run_checks",
]
