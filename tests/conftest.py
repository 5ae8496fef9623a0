"""What holds for every test: hypothesis draws the same examples on every machine, and no clock makes a test fail."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine draws slowly and runs slowly. `make fuzz` draws other examples each time.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
