"""The kit with which the author of a method checks it: one decorator, and checks that are plain functions.

```python
from adapterkit.testing import parametrize_with_checks

@parametrize_with_checks([MyConfig(), MyConfig(r=4)])
def test_contract(check, config):
    check(config)
```
"""

try:
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"adapterkit.testing needs pytest and hypothesis, and {error.name} is not installed: "
        "pip install pytest hypothesis."
    ) from error

from adapterkit.testing.case import TOLERANCES
from adapterkit.testing.decorator import parametrize_with_checks
from adapterkit.testing.peft import check_peft
from adapterkit.testing.running import CheckFailure, all_checks, run_check, run_checks

__all__ = [
    "TOLERANCES",
    "CheckFailure",
    "all_checks",
    "check_peft",
    "parametrize_with_checks",
    "run_check",
    "run_checks",
]
