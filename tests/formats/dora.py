"""The example of DoRA as an installed method, without a package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapterkit as ak

PLACE = Path(__file__).parents[2] / "examples" / "thirdparty" / "adapterkit_dora" / "adapterkit_dora.py"


@contextmanager
def dora() -> Iterator[None]:
    """Files of DoRA are read in this block."""
    spec: Any = importlib.util.spec_from_file_location("adapterkit_dora", PLACE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    ak.register(module.plugin)
    try:
        yield
    finally:
        ak.default_registry.unregister("dora")
        del sys.modules[spec.name]
